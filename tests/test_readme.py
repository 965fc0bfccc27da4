"""What the README says, done."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from building import picture
from forked import run_command

from vlmembed.backbones import tiny
from vlmembed.data import Rows

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / page
    for page in (
        "README.md",
        "vlmembed/data/README.md",
        "vlmembed/modules/README.md",
        "vlmembed/pooling/README.md",
        "vlmembed/training/README.md",
        "vlmembed/export/README.md",
        "experiments/README.md",
    )
]
#: Just as much as shows that a command works. Most of an export's time would go to the attention of a long text.
SHORT = [
    "--trainer.max_steps=2",
    "--model.init_args.backbone.init_args.max_length=512",
    "--trainer.enable_progress_bar=false",
    "--data.init_args.val=numbers.jsonl",
    "--data.init_args.test=numbers.jsonl",
    "--data.init_args.num_workers=0",
]
#: What the commands of each section leave behind.
SECTIONS = {
    "Commands": ["my-model/modules.json", "runs/quickstart/*/predictions/numbers.trec"],
    "Rerankers": ["runs/weak/*/predictions/numbers.trec", "runs/quickstart_reranker/*/export/modules.json"],
    "Ablations": ["runs/which-pooling/report.md"],
    "Your own parts": [],
}


def block(marker: str) -> str:
    """The code under a marker, on whatever page it is."""
    pattern = rf"<!-- {re.escape(marker)} -->\n```\w+\n(.*?)```"
    (found,) = [match[1] for page in PAGES if (match := re.search(pattern, page.read_text(), re.DOTALL))]
    return found


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("python -m vlmembed ")]


def section_commands(section: str) -> list[str]:
    (text,) = [page.read_text() for page in PAGES if f"\n## {section}\n" in page.read_text()]
    return commands(text.split(f"\n## {section}\n")[1].split("\n## ")[0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a user would be: the checkpoint, the configs, and a small file to measure on."""
    tiny.create(tmp_path / "checkpoints" / "tiny")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("my_pooling.py", "my_parts.py", "my_run.yaml"):
        (tmp_path / name).write_text(block(name))
    rows = [f'{{"query": "number {index}", "positive": "{index}"}}' for index in range(8)]
    (tmp_path / "numbers.jsonl").write_text("\n".join(rows))
    ablation = yaml.safe_load(block("ablation.yaml"))
    ablation["set"] |= {name: yaml.safe_load(value) for name, value in (each[2:].split("=") for each in SHORT)}
    ablation["seeds"] = [0]
    del ablation["grid"]["pooling"]["values"]["last"]
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(ablation))
    return tmp_path


@pytest.mark.parametrize("section", SECTIONS)
def test_every_command_runs(section: str, folder: Path) -> None:
    quick_start = block("quick start").split(" && ")[-1]
    assert quick_start.startswith("python -m vlmembed fit")
    for command in [*([quick_start] if section == "Commands" else []), *section_commands(section)]:
        words = command.split()
        shorter = {"fit": SHORT, "ablate": []}.get(words[3], SHORT[3:])
        status, printed = run_command(folder, [*words[3:], *shorter])
        assert status == 0, f"{command}\n{printed[-6000:]}"
    assert all(list(folder.glob(pattern)) for pattern in SECTIONS[section])
    if section == "Ablations":
        assert "mine" in (folder / "runs" / "which-pooling" / "report.md").read_text()


def test_no_command_is_left_out() -> None:
    everywhere = [line for page in PAGES for line in commands(page.read_text())]
    assert sorted(everywhere) == sorted(line for section in SECTIONS for line in section_commands(section))


def test_the_readme_is_a_map() -> None:
    assert len(PAGES[0].read_text().split()) <= 1500
    missing = [
        (page.name, link)
        for page in (*PAGES, *(ROOT / "vlmembed").rglob("README.md"))
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not missing


def test_every_kind_of_cell_is_read(tmp_path: Path) -> None:
    for name in ("invoice", "receipt", "frame1", "frame2", "frame3", "frame4"):
        picture(64, 64).save(tmp_path / f"{name}.png")
    (tmp_path / "crane.mp4").touch()
    (tmp_path / "train.jsonl").write_text(block("cells"))
    rows = Rows(str(tmp_path / "train.jsonl"))
    kinds = [[part.kind for part in rows[index].positives[0].parts] for index in range(len(rows))]
    assert kinds == [
        ["text"],
        ["image"],
        ["image", "text"],
        ["image", "image"],
        ["image"],
        ["video"],
        ["video"],
        ["text", "image", "text", "image"],
    ]
    assert all(len(rows[index].positives) == 1 for index in range(len(rows)))


@pytest.mark.parametrize("path", [*(ROOT / "configs").rglob("*.yaml")], ids=lambda path: path.stem)
def test_every_config_builds_its_objects(path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny checkpoint in place of the released one; no weights are read, so no memory is needed."""
    from lightning.pytorch.cli import LightningCLI

    from vlmembed.cli import CLI

    monkeypatch.setattr("sys.argv", ["vlmembed"])
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda *_: None)
    options = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true"]
    place = f"--model.init_args.backbone.init_args.checkpoint={checkpoint}"
    cli = CLI(["fit", "--config", str(path), place, *options])
    written = yaml.safe_load(path.read_text())["model"]["init_args"]["loss"]
    assert type(cli.model.loss).__name__ == written["class_path"].split(".")[-1]
    assert getattr(cli.model.loss, "dimensions", ()) == tuple(written.get("init_args", {}).get("dimensions", ()))
    if hasattr(cli.model.encoder.pooling, "allow_larger"):
        cli.model.encoder.pooling.allow_larger = True  # Than the tiny checkpoint's hidden states.
    cli.model.encoder.configure()
    for adapter in cli.model.adapters:
        adapter.apply(cli.model.encoder.backbone)
    assert any(parameter.requires_grad for parameter in cli.model.encoder.parameters())


def test_the_set_up_commands_are_one_line_each() -> None:
    for marker in ("quick start", "tests"):
        assert len(block(marker).strip().splitlines()) == 1
