"""A token gets neither into a configuration nor out of the environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from building import run_config, write_rows
from hub_server import Hub, Refusal, serve
from test_hub import connect

from vlmembed.ablation.plan import plan, read_ablation
from vlmembed.cli import main
from vlmembed.export.exporter import PushError, push
from vlmembed.secrets import refuse_secrets, refuse_secrets_in

ROOT = Path(__file__).parent.parent

#: Of no account. Put together here, so that nobody's search for leaked tokens finds them.
TOKEN = "hf_" + "aBcDeFgHiJ" * 3 + "kLmN"
KEY = "0123456789abcdef" * 2 + "01234567"

#: What must not be repeated.
VALUES = ["abc'", "abcdef", "1234", TOKEN, KEY, "a1a1"]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"seed": 1, "trainer": {"logger": [{"init_args": {"api_key": "abc"}}]}}, "trainer.logger.init_args.api_key"),
        ({"credentials": {"user": "someone"}}, "credentials"),
        ({"passwords": [None, "abc"]}, "passwords"),
        ({"password": 1234}, "password"),
        ({"model": {"hub_token": "abc"}}, "model.hub_token"),
        ({"use_auth_token": "abc"}, "use_auth_token"),
        ({"token": KEY}, "token"),
        ({"logger": [{"init_args": {"key": KEY}}]}, "logger.init_args.key"),
        ({"data": {"train": [f"path?x={TOKEN}"]}}, "data.train"),
        ({"data": {TOKEN: {"a": 1}}}, "data"),
        ({"uri": "https://someone:abcdef@example.org/runs"}, "uri"),
        *(({"note": f"{start}{'a1' * 20}"}, "note") for start in ("github_pat_", "ghp_", "glpat-", "sk-", "AIza")),
        ({"note": "AKIA" + "A1" * 8}, "note"),
        ({"note": "eyJ" + "a1" * 9 + "." + "a1" * 9}, "note"),
    ],
)
def test_what_looks_like_a_secret_is_refused_by_its_key(config: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=r"looks like a token.*HF_TOKEN.*WANDB_API_KEY") as error:
        refuse_secrets(config, "run.yaml")
    assert str(error.value).startswith(f"run.yaml: {key} holds ")
    assert not any(value in str(error.value) for value in VALUES)


@pytest.mark.parametrize(
    "config",
    [
        {"pooling": {"init_args": {"token": "<|im_end|>", "tokens": 4}}, "max_tokens": 2048, "tokenizer": "org/words2"},
        {"hub_token": None, "use_auth_token": True, "api_key": "", "token": False},
        {"revision": "0123456789abcdef0123456789abcdef01234567", "path": "data/secrets/passwords.jsonl"},
        {"grid": {"size": {"key": "data.init_args.train.init_args.size2", "values": {"a": 1}}}},
        {"uri": "https://example.org:8080/a", "end_token": "[EOS]", "checkpoint": "hf_models/base"},
        {"uri": "postgresql://user:${PASSWORD}@host/runs"},
    ],
)
def test_what_is_no_secret_passes(config: dict[str, Any]) -> None:
    refuse_secrets(config)
    refuse_secrets_in([f"--{key}={json.dumps(value)}" for key, value in config.items()])


def test_every_configuration_of_the_repository_passes() -> None:
    paths = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "experiments").rglob("*.yaml")]
    assert len(paths) > 10
    for path in paths:
        refuse_secrets(yaml.safe_load(path.read_text()), str(path))
        refuse_secrets_in(["fit", "--config", str(path)])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--trainer.logger.init_args.api_key=abc"], "trainer.logger.init_args.api_key"),
        (["--trainer.logger.init_args.api_key", "abc"], "trainer.logger.init_args.api_key"),
        (["--push_to_hub", f"org/{TOKEN}"], "push_to_hub"),
        (["--trainer.logger", '{"init_args": {"password": "abc"}}'], "trainer.logger.init_args.password"),
        ([TOKEN], "The command line"),
        (["--config", "{folder}/run.yaml"], "run.yaml: a.secret"),
        (["-c", "{folder}/run.yaml"], "run.yaml: a.secret"),
        (["--model={folder}/run.yaml"], "run.yaml: a.secret"),
        (["--config={folder}/run"], "run: a.secret"),
    ],
)
def test_a_command_line_is_refused(tmp_path: Path, words: list[str], named: str) -> None:
    for name in ("run.yaml", "run"):
        (tmp_path / name).write_text("a: {secret: abcdef}\n")
    with pytest.raises(ValueError, match="looks like a token") as error:
        refuse_secrets_in(
            ["fit", "--seed_everything", "1", *(word.replace("{folder}", str(tmp_path)) for word in words)]
        )
    assert named in str(error.value)
    assert not any(value in str(error.value) for value in VALUES)


def test_what_is_no_yaml_is_left_to_the_parser(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: [1,\n")
    refuse_secrets_in(["fit", "--config", str(tmp_path / "run.yaml"), "--data", "{", "--other", "gone.yaml"])


def test_the_other_commands_refuse_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="command line: model holds what looks like a token"):
        main(["mine", "--model", TOKEN])
    with pytest.raises(ValueError, match=r"executor\.options holds"):
        main(["ablate", "--config", "a.yaml", "--executor", "Slurm", "--executor.options", f"[--export=X={TOKEN}]"])
    base = ROOT / "configs" / "quickstart.yaml"
    changed = {"model.init_args.api_key": "abcdef"}
    given = {"base": str(base), "output_dir": str(tmp_path / "out"), "metric": "test/ndcg@10", "set": changed}
    given |= {"grid": {"size": {"key": "data.init_args.batch_size", "values": {"a": 1}}}}
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(ValueError, match=r"ablation\.yaml: set\.model\.init_args\.api_key holds"):
        read_ablation(tmp_path / "ablation.yaml")
    given |= {"set": {}, "grid": {"x": {"key": "model.init_args.api_key", "values": {"a": "abcdef"}}}}
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(ValueError, match=r"ablation\.yaml: model\.init_args\.api_key holds") as error:
        plan(read_ablation(tmp_path / "ablation.yaml"))
    assert "abcdef" not in str(error.value)


# The environment's token


def test_a_token_of_the_environment_is_nowhere_in_what_a_run_writes_or_says(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that exports, and then uploads to a Hub that refuses the token, and to one that fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vlmembed"])
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    write_rows(tmp_path / "train.jsonl")
    config = run_config(checkpoint, train="train.jsonl", batch_size=3)
    config["trainer"]["max_steps"] = 1
    config["model"]["init_args"]["backbone"]["init_args"]["max_length"] = 256
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "run.yaml"])
    folder = Path("runs/run/version_0")
    with serve("hf_anotherToken") as hub:
        connect(monkeypatch, hub.url, TOKEN)
        with pytest.raises(PushError, match="the token was refused") as refused:
            push(folder / "export", "org/model")
    with serve(TOKEN) as hub:
        connect(monkeypatch, hub.url, TOKEN)
        monkeypatch.setattr("hub_server.ROUTES", [("POST", "/api/repos/create", fail)])
        with pytest.raises(PushError, match=r"500.*Bearer \[token\]") as failed:
            push(folder / "export", "org/model")
    printed = capfd.readouterr()
    said = [printed.out, printed.err, *map(str, (refused.value, failed.value))]
    assert "Verified" in printed.out
    assert TOKEN not in "".join(said)
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.csv", "README.md", "model.safetensors"} <= {path.name for path in files}
    assert any(path.suffix == ".ckpt" for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def fail(hub: Hub, body: bytes) -> Any:
    """Answer with an error, and quote what was sent."""
    raise Refusal(500, "", f"Internal error. Authorization: Bearer {hub.token}")
