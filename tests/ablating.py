"""A training run in name only, for tests of what is around it: it takes no time, and scores what it is told to."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import yaml

FIT = shlex.join([sys.executable, __file__])
QUERIES = 4


def fit(config: Any) -> None:
    logger = config["trainer"]["logger"][0]["init_args"]
    folder = Path(logger["save_dir"], logger["name"], logger["version"])
    left = sorted(path.name for path in folder.iterdir())
    _tally(config, f"start {folder.parent.name} {folder.name} {left}")
    time.sleep(config.get("seconds", 0))
    if config["part"]["class_path"] == "Broken":
        print("step 1\rstep 2", flush=True)
        raise ArithmeticError("the loss is not a number")
    score = config["part"]["init_args"]["score"] + config["seed"] / 100
    (folder / "metrics.csv").write_text(f"step,test/ndcg@10,train/loss\n0,0.1,\n5,,2.5\n9,{score},\n")
    rows = "".join(f"q{query},{score}\n" for query in range(QUERIES))
    (folder / "measured" / "things").mkdir(parents=True)
    (folder / "measured" / "things" / "per_query.csv").write_text(f"query,ndcg@10\n{rows}")
    (folder / "measured" / "things" / "top.json").write_text("{}")
    cost = {"seconds_per_step": 0.5, "steps_per_epoch": 106, "peak_memory_bytes": 1, "trained_parameters": 1}
    cost |= {"pooling_parameters": 0, "embedding_dimension": 2, "document_bytes": 8, "search_seconds": 0.002}
    (folder / "cost.json").write_text(json.dumps(cost))
    _tally(config, f"end {folder.parent.name} {folder.name}")


def _tally(config: Any, line: str) -> None:
    with Path(config["tally"]).open("a") as file:
        file.write(f"{line}\n")


def started(folder: Path) -> list[str]:
    """What was started, in order: setting and seed."""
    tally = folder / "tally"
    lines = tally.read_text().splitlines() if tally.exists() else []
    return [" ".join(line.split()[1:3]) for line in lines if line.startswith("start")]


def write(folder: Path, **changes: Any) -> Path:
    """An ablation of two settings and two seeds, and its base."""
    part = {"class_path": "Plain", "init_args": {"score": 0.5, "width": 3}}
    base = {"part": part, "tally": str(folder / "tally"), "trainer": {"max_epochs": 1}, "seed": 9}
    values = {
        "plain": {"class_path": "Plain", "init_args": {"score": 0.25}},
        "other": {"class_path": "Other", "init_args": {"score": 0.75}},
    }
    ablation = {
        "base": "base.yaml",
        "output_dir": str(folder / "out"),
        "metric": "test/ndcg@10",
        "seeds": [0, 1],
        "seed_keys": ["seed"],
        "grid": {"part": {"key": "part", "values": values}},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(ablation | changes, sort_keys=False))
    return path


def base_with_model(checkpoint: Path, trainer: dict[str, Any], loss: dict[str, Any] | None = None, **data: Any) -> dict:
    """A configuration of ``fit`` on the CPU."""
    from building import run_config  # Not by a trial in name only, which takes no time.

    config = run_config(checkpoint, **data)
    config["model"]["init_args"] |= {"graph_memory": "none", **({"loss": loss} if loss else {})}
    return config | {"trainer": {"accelerator": "cpu"} | trainer}


if __name__ == "__main__":
    fit(yaml.safe_load(Path(sys.argv[1]).read_text()))
