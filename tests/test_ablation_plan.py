"""From ``ablation.yaml`` to configurations of trials, and what is refused on the way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ablating import write

from vlmembed.ablation.command import planned_steps
from vlmembed.ablation.plan import check_trials, parse, plan, read_ablation
from vlmembed.ablation.run import Local, Trial
from vlmembed.cli import check

ROOT = Path(__file__).parent.parent
#: A class in the base, and its arguments, one of which is a class.
IN = {"class_path": "A", "init_args": {"n": 1}}
OWN = {"score": 0.5, "in": IN}
PLAIN = {"class_path": "Plain"}


def test_every_setting_meets_every_seed(tmp_path: Path) -> None:
    grid = {
        "part": {"key": "part.class_path", "values": {"a b": "A", 2: "B"}},
        "rate": {"key": "part.init_args.rate", "values": {"low": 0.1, "high": 0.2}},
    }
    ablation = read_ablation(write(tmp_path, grid=grid, seeds=[5, 3], set={"trainer.max_epochs": 7}))
    trials = plan(ablation)
    assert [(trial.seed, *trial.setting.values()) for trial in trials] == [
        (seed, part, rate) for seed in (5, 3) for part in ("a b", "2") for rate in ("low", "high")
    ]
    last = trials[-1]
    assert last.folder == tmp_path / "out" / "settings" / "part-2_rate-high" / "seed-3"
    assert last.config == {
        "part": {"class_path": "B", "init_args": {"rate": 0.2}},
        "tally": str(tmp_path / "tally"),
        "trainer": {"max_epochs": 7},
        "seed": 3,
    }
    assert str(last) == "part=2, rate=high, seed 3"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        # Naming a class, even the same one, replaces the mapping: no argument of an earlier class survives.
        ("part", {"class_path": "Other"}, {"class_path": "Other"}),
        ("part", {"class_path": "Plain", "init_args": {"n": 1}}, {"class_path": "Plain", "init_args": {"n": 1}}),
        ("part.class_path", "Other", {"class_path": "Other"}),
        # Arguments alone are merged into the base's class, down to those that name one.
        ("part", {"init_args": {"score": 1}}, PLAIN | {"init_args": OWN | {"score": 1}}),
        ("part.init_args.in", {"class_path": "B"}, PLAIN | {"init_args": OWN | {"in": {"class_path": "B"}}}),
        ("part.init_args.in.init_args.n", 2, PLAIN | {"init_args": OWN | {"in": IN | {"init_args": {"n": 2}}}}),
        ("part.init_args.in", "module.B", PLAIN | {"init_args": OWN | {"in": "module.B"}}),
        ("alone", {"init_args": {"n": 1}}, {"class_path": "Alone", "init_args": {"n": 1}}),
        ("part", None, None),
    ],
)
@pytest.mark.parametrize("way", ["grid", "set"])
def test_a_class_brings_its_own_arguments_and_nothing_else(
    tmp_path: Path, way: str, key: str, value: Any, expected: Any
) -> None:
    grid = {"part": {"key": key if way == "grid" else "other", "values": {"one": value}}}
    path = write(tmp_path, grid=grid, set={key: value} if way == "set" else {})
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    base["part"]["init_args"], base["alone"] = OWN, "Alone"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    assert plan(read_ablation(path))[0].config[key.split(".")[0]] == expected


def test_numbers_are_read_as_the_command_line_reads_them(tmp_path: Path) -> None:
    path = write(tmp_path, grid={"rate": {"key": "part.init_args.rate", "values": {"low": 0}}})
    path.write_text(path.read_text().replace("low: 0", "low: 1e-3"))
    assert plan(read_ablation(path))[0].config["part"]["init_args"]["rate"] == 0.001


def test_a_trial_logs_into_its_folder_and_keeps_other_loggers(tmp_path: Path) -> None:
    folder = tmp_path / "settings" / "part-a" / "seed-4"
    board = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "boards"}}
    other = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "elsewhere"}}
    callback = {"class_path": "vlmembed.modules.ParityCheck"}
    config = {"trainer": {"logger": [other, board], "callbacks": callback, "max_steps": 3}, "x": 1}
    configuration = Trial(folder, {"part": "a"}, 4, "val/ndcg@10", config).configuration()
    log, second = configuration["trainer"]["logger"]
    assert Path(*log["init_args"].values()) == folder
    assert second == board
    first, record = configuration["trainer"]["callbacks"]
    assert first == callback
    assert record["init_args"] == {"documents": str(tmp_path / "documents"), "stage": "val"}
    assert configuration["x"] == 1
    assert configuration["trainer"]["max_steps"] == 3


AXIS = {"key": "part", "values": {"plain": 1}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "Option 'sedes' is not accepted (`ablate --help` lists the keys)"),
        ({"seeds": [0, 0]}, "seeds is [0, 0]; give different integers"),
        ({"seeds": [0, -1]}, "seeds is [0, -1]; give different integers, none below 0"),
        ({"seeds": 3}, "Parser key \"seeds\":\n  Expected a <class 'list'>. Got value: 3"),
        ({"jobs": True}, "Parser key \"jobs\":\n  Expected a <class 'int'>. Got value: True"),
        ({"base": None}, "the following arguments are required: base"),
        ({"probe": {"layers": [0]}}, "probe is {'layers': [0]}; a probe has no grid, seed_keys, seeds"),
        ({"jobs": 0}, "jobs is 0; give 1 or more"),
        ({"metric": "test/ndgc@10"}, "metric is 'test/ndgc@10'; write val/ or test/"),
        ({"metric": "train/loss"}, "metric is 'train/loss'"),
        ({"baseline": {"pooling": "plain"}}, "baseline.pooling is 'plain'; the axes of the grid are ['part']"),
        ({"baseline": {"part": "mean"}}, "baseline.part is 'mean'; the labels of that axis are ['plain', 'other']"),
        ({"grid": {}}, "grid is {}; name at least one axis"),
        ({"grid": {"part": {"key": "part"}}}, "grid.part is {'key': 'part'}; it has key, a key of"),
        ({"grid": {"part": {"key": "part", "values": {True: 1}}}}, "grid.part.values is True; a label is a text"),
        ({"grid": {"a": AXIS, "b": AXIS}}, "grid.b is 'part'; it overwrites 'part' of grid.a"),
        (
            {
                "grid": {
                    "a": {"key": "part.init_args.n", "values": {"x": 1}},
                    "b": {"key": "part.class_path", "values": {"x": 1}},
                }
            },
            "grid.b is 'part.class_path'; it overwrites 'part.init_args.n' of grid.a",
        ),
        ({"set": {"part.init_args.score": 1}}, "grid.part is 'part'; it overwrites 'part.init_args.score' of set"),
        ({"set": {"seed": 1}}, "seed_keys is 'seed'; it overwrites 'seed' of set"),
        ({"base": "gone.yaml"}, "gone.yaml cannot be read as YAML: [Errno 2]"),
        ({"grid": {"part": {"key": "part", "values": {"a b": 1, "A-B": 2}}}}, "would share the folder 'part-A-B'"),
        ({"grid": {"part": {"key": "part", "values": {"a" * 300: 1}}}}, "give it shorter labels"),
        ({"set": {"seed.deep": 1}, "seed_keys": ["other"]}, "seed.deep cannot be 1: seed is 9 in the base"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        plan(read_ablation(path))
    assert str(error.value).startswith((str(tmp_path), f"--config {path}: "))


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    ablation, options = parse(["--config", str(path), "--seeds", "[4]", "--metric=val/map", "--jobs", "3"])
    assert (ablation.seeds, ablation.metric, ablation.jobs) == ([4], "val/map", 3)
    assert [*ablation.grid] == ["part"]
    assert isinstance(options.executor, Local)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.init_args.pooling", {"class_path": "vlmembed.pooling.Meen"}, "part=bad, seed 0 is not.*Meen"),
        ("model.init_args.poling", {"class_path": "vlmembed.pooling.Mean"}, "part=bad, seed 0 is not.*poling"),
        ("trainer.max_epoch", 1, "part=bad, seed 0 is not.*max_epoch"),
        ("model.init_args.optimizer.init_args.lr", "quick", "part=bad, seed 0 is not.*quick"),
    ],
)
def test_a_typo_in_a_configuration_shows_before_anything_runs(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    good = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    for part in key.split("."):
        good = good.get(part, {})
    values = {"good": good or None, "bad": value}
    path = write(tmp_path, base=str(ROOT / "configs" / "quickstart.yaml"), seed_keys=["seed_everything"])
    given = yaml.safe_load(path.read_text()) | {"grid": {"part": {"key": key, "values": values}}}
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    trials = plan(read_ablation(path))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        check_trials([trial for trial in trials if trial.setting["part"] == "bad"], check, path)


def test_a_value_that_names_data_is_a_path(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in the file, nothing of it is parsed, imported or run: neither by the ablation nor by its trials."""
    monkeypatch.syspath_prepend(str(here))
    Path("planted_rows.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    planted = {name: f"rows.{name}" for name in ("jsonl", "yaml", "csv")}
    for name in planted.values():
        Path(name).write_text("class_path: planted_rows.Rows\n")
    grid = {"rows": {"key": "data.init_args.train", "values": planted}}
    changes = {"data.init_args.test": "rows.yaml", "data.init_args.val": ["rows.csv"]}
    base = str(ROOT / "configs" / "quickstart.yaml")
    ablation = read_ablation(write(here, base=base, grid=grid, seed_keys=["seed_everything"], set=changes))
    trials = plan(ablation)
    check_trials(trials, check, ablation.path)
    assert [trial.config["data"]["init_args"]["train"] for trial in trials[:3]] == [*planted.values()]
    assert not Path("imported").exists()


@pytest.mark.parametrize("path", [*(ROOT / "experiments").rglob("ablation.yaml")], ids=lambda path: path.parent.name)
def test_every_ablation_of_the_repository_is_one(path: Path) -> None:
    ablation = read_ablation(path)
    check_trials(plan(ablation), check, path)


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"max_epochs": 3}, 30),
        ({"max_steps": 7}, 7),
        ({"max_steps": 70, "max_epochs": 3}, 30),
        ({"max_steps": 7, "max_epochs": 3}, 7),
        ({}, 10_000),
        ({"max_epochs": -1}, float("inf")),
    ],
)
def test_steps_are_counted_as_lightning_does(trainer: dict[str, int], steps: float) -> None:
    assert planned_steps(trainer, 10) == steps
