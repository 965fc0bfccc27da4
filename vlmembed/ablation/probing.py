"""``python -m vlmembed ablate`` with a ``probe`` in the file in place of a grid: one pass over the test data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from vlmembed.ablation.configuration import read_mapping
from vlmembed.ablation.plan import merge, place
from vlmembed.ablation.planned import csv_logger
from vlmembed.files import write_whole

KEYS = {"base", "output_dir", "set", "probe"}


def probe(path: Path, output_dir: str | None = None) -> None:
    """Score the read-outs of one model.

    Args:
        path: The file: ``base``, ``output_dir``, ``probe`` (what `Probe` takes besides the model), and perhaps ``set``.
        output_dir: Where to write, instead of what the file says.

    Raises:
        ValueError: If the file does not say what to do.
        SystemExit: With the status of the run, if it fails.
    """
    given = read_mapping(path)
    for key in given.keys() - KEYS:
        raise ValueError(f"{path}: there is no key {key!r} (its value is {given[key]!r}). The keys are {sorted(KEYS)}.")
    for key in KEYS - {"set"} - given.keys():
        raise ValueError(f"{path}: the key {key!r} is missing. The keys are {sorted(KEYS)}.")
    folder = Path(output_dir or given["output_dir"]).resolve()
    config = folder / "run.yaml"
    write_whole(config, yaml.safe_dump(configuration(path, given, folder), sort_keys=False).encode())
    result = subprocess.run([sys.executable, "-m", "vlmembed", "test", "--config", str(config)], check=False)
    if result.returncode:
        sys.exit(result.returncode)


def configuration(path: Path, given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the configuration of ``test``: the base, with its model inside a `Probe`."""
    base = read_mapping((path.parent / given["base"]).resolve())
    for key, value in (given.get("set") or {}).items():
        place(base, key, value)
    model = {"class_path": "vlmembed.ablation.probe.Probe", "init_args": {"model": base["model"], **given["probe"]}}
    return merge(base, {"model": model, "trainer": {"logger": csv_logger(folder), "exporter": None, "callbacks": None}})
