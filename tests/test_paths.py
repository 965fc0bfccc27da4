"""A string that names data is a path: whatever the file holds, nothing of it is parsed, imported or run."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmembed.cli import CLI, main
from vlmembed.mining import mine, score

#: Files that are valid configuration, each of another kind.
PLANTED = {
    "train.jsonl": '{"class_path": "planted_source.Planted"}\n',
    "train.json": '{"class_path": "vlmembed.data.Rows", "init_args": {"path": "x", "allow_outside": ["/"]}}',
    "train.csv": "class_path: planted_source.Planted\n",
    "train.yaml": "class_path: planted_source.Planted\n",
    "train": "class_path: planted_source.Planted\n",
}


@pytest.fixture
def planted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a data file in the current folder, which names a class whose import leaves a mark."""
    (tmp_path / "planted_source.py").write_text(
        "from pathlib import Path\nPath('imported').touch()\n"
        "from vlmembed.data import Source\nclass Planted(Source):\n    def __len__(self): return 1\n"
        "    def __getitem__(self, index): raise ValueError\n"
    )
    (tmp_path / name).write_text(PLANTED[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


class ParseOnly(CLI):
    """The command line up to its parsed configuration."""

    def instantiate_classes(self) -> None: ...
    def after_instantiate_classes(self) -> None: ...
    def _run_subcommand(self, subcommand: str) -> None: ...


OTHERS = ("validate", "test", "predict", "export")


@pytest.mark.parametrize(
    ("command", "name"), [*(("fit", name) for name in PLANTED), *((command, "train.jsonl") for command in OTHERS)]
)
def test_no_data_key_of_the_trainer_commands_opens_its_file(command: str, planted: str) -> None:
    rows = {"class_path": "vlmembed.data.Rows", "init_args": {"path": planted}}
    mixture = {"class_path": "vlmembed.data.Mixture", "init_args": {"sources": [rows]}}
    folder = {"class_path": "vlmembed.data.EvaluationFolder", "init_args": {"path": planted}}
    run = {"class_path": "vlmembed.data.RerankingRun", "init_args": {"evaluation": planted, "run": planted}}
    config = {
        "model": {
            "class_path": "vlmembed.modules.EmbeddingModule",
            "init_args": {
                "backbone": {"class_path": "vlmembed.backbones.Qwen3VL", "init_args": {"checkpoint": planted}},
                "pooling": {"class_path": "vlmembed.pooling.LastToken"},
                "loss": {"class_path": "vlmembed.losses.InfoNCE"},
            },
        },
        "data": {"class_path": "vlmembed.data.RetrievalDataModule", "init_args": {}},
    }
    for train, val, test in (
        (planted, planted, planted),
        ([planted, rows], [planted, folder], run),
        (mixture, folder, planted),
    ):
        config["data"]["init_args"] = {"train": train, "val": val, "test": test}
        Path("run.yaml").write_text(yaml.safe_dump(config))
        parsed = ParseOnly([command, "--config", "run.yaml"]).config[command].data.init_args
        assert all(planted in str(parsed[key]) for key in ("train", "val", "test"))
        assert "planted_source" not in str(parsed)
    on_command_line = ParseOnly([command, "--config", "run.yaml", f"--data.init_args.train={planted}"])
    assert on_command_line.config[command].data.init_args.train == planted
    assert not Path("imported").exists()


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize(
    ("command", "keys"), [(mine, ("rows", "corpus", "model", "cache")), (score, ("rows", "model", "output"))]
)
def test_no_data_key_of_mine_and_score_opens_its_file(
    command: Callable[..., None], keys: tuple[str, ...], planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line, and in a configuration."""
    called: list[dict[str, Any]] = []
    name = command.__name__
    monkeypatch.setattr(f"vlmembed.mining.mining.{name}", wraps(command)(lambda **words: called.append(words)))
    words = {"rows": "a.jsonl", "model": "folder", "output": "b.jsonl"} | dict.fromkeys(keys, planted)
    Path("run.yaml").write_text(yaml.safe_dump(words))
    for given in (["--config", "run.yaml"], [f"--{key}={value}" for key, value in words.items()]):
        main([name, *given])
        assert [called[-1][key] for key in keys] == [planted] * len(keys)
    assert not Path("imported").exists()
