"""``ablation.yaml``: what is varied, how often, and what is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from vlmembed.metrics import METRICS
from vlmembed.secrets import refuse_secrets

#: The keys of the file, and what each holds.
KINDS: dict[str, type] = {
    "base": str,
    "output_dir": str,
    "metric": str,
    "grid": dict,
    "baseline": dict,
    "seeds": list,
    "seed_keys": list,
    "set": dict,
    "jobs": int,
}

#: What a seed changes if the file does not say: chance in the weights and in dropout, and the order of training rows.
SEED_KEYS = ["seed_everything", "data.init_args.seed"]

DEFAULTS: dict[str, Any] = {"baseline": {}, "seeds": [0], "seed_keys": SEED_KEYS, "set": {}, "jobs": 1}


@dataclass(frozen=True)
class Axis:
    """One thing that is varied.

    Args:
        key: What it is in a run's configuration, dotted.
        values: Of each label, the value.
    """

    key: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Ablation:
    """What ``ablation.yaml`` says.

    Args:
        path: The file, for error messages.
        base: A run's configuration, which the others differ from; relative to the file.
        output_dir: Where everything is written; relative to where the command runs.
        metric: The logged name that settings are compared by, such as ``test/ndcg@10``; higher is better.
        grid: Of each axis, what is varied; a setting is one label per axis.
        baseline: Of some axes, the label that the others are held against.
        seeds: Each setting is run with each of these.
        seed_keys: The keys that the seed is put at.
        set: Keys of the configuration that all runs change, dotted.
        jobs: Runs at the same time.
    """

    path: Path
    base: Path
    output_dir: Path
    metric: str
    grid: Mapping[str, Axis]
    baseline: Mapping[str, str]
    seeds: list[int]
    seed_keys: list[str]
    set: Mapping[str, Any]
    jobs: int

    @property
    def settings(self) -> list[dict[str, str]]:
        """Every setting of the grid: of each axis, the label."""
        labels = product(*(axis.values for axis in self.grid.values()))
        return [dict(zip(self.grid, each, strict=True)) for each in labels]

    def to_yaml(self) -> str:
        """Write what is run, with an absolute path to the base, and nothing left to defaults."""
        fields = {name: value for name, value in vars(self).items() if name != "path"}
        fields |= {"base": str(self.base), "output_dir": str(self.output_dir)}
        fields["grid"] = {name: vars(axis) for name, axis in self.grid.items()}
        return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def read_ablation(path: Path) -> Ablation:
    """Read and check an ``ablation.yaml``.

    Raises:
        ValueError: Naming the file, the key, its value and what to do.
    """
    given = read_mapping(path)
    for key in given.keys() - KINDS:
        raise ValueError(f"{path}: there is no key {key!r} (its value is {given[key]!r}). The keys are {[*KINDS]}.")
    for key in KINDS.keys() - DEFAULTS.keys() - given.keys():
        raise ValueError(f"{path}: the key {key!r} is missing. It is {KINDS[key].__name__}; see the README for one.")
    fields = DEFAULTS | given
    for key, kind in KINDS.items():
        _expect(type(fields[key]) is kind, path, key, fields[key], f"it is a {kind.__name__}")
    fields["grid"] = {str(name): _axis(path, str(name), axis) for name, axis in fields["grid"].items()}
    fields["baseline"] = {str(axis): str(label) for axis, label in fields["baseline"].items()}
    fields["base"] = (path.parent / fields["base"]).resolve()
    ablation = Ablation(path, **(fields | {"output_dir": Path(fields["output_dir"])}))
    _check(ablation)
    return ablation


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file as the command line does, which knows more floats (1e-3) and no dates.

    Raises:
        ValueError: If the file is not there, holds something else than keys and values, or what looks like a secret.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        given = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: this is not YAML: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected keys and values, got {given!r:.100}.")
    refuse_secrets(given, str(path))
    return given


def _axis(path: Path, name: str, given: Any) -> Axis:
    place = f"grid.{name}"
    _expect(isinstance(given, dict) and given.keys() == {"key", "values"}, path, place, given, "it has key and values")
    key, values = given["key"], given["values"]
    _expect(isinstance(key, str) and bool(key), path, f"{place}.key", key, "it is a key of a run's configuration")
    _expect(isinstance(values, dict) and bool(values), path, f"{place}.values", values, "it maps labels to values")
    for label in values:
        # YAML reads on, off, yes and no as booleans; nobody would find True in the report.
        quoted = isinstance(label, str | int | float) and not isinstance(label, bool)
        _expect(quoted, path, f"{place}.values", label, "a label is a text: put it in quotes")
    return Axis(key, {str(label): value for label, value in values.items()})


def _check(ablation: Ablation) -> None:
    path, (stage, *names) = ablation.path, ablation.metric.split("/")
    measured = stage in ("val", "test") and any(name in METRICS for name in names)
    known = f"write val/ or test/, the set's name if there are several, and one of {[*METRICS]}"
    _expect(measured, path, "metric", ablation.metric, known)
    _expect(bool(ablation.grid), path, "grid", {}, "name at least one axis")
    for axis, label in ablation.baseline.items():
        _expect(axis in ablation.grid, path, f"baseline.{axis}", label, f"the axes of the grid are {[*ablation.grid]}")
        labels = [*ablation.grid[axis].values]
        _expect(label in labels, path, f"baseline.{axis}", label, f"the labels of that axis are {labels}")
    seeds = ablation.seeds
    proper = bool(seeds) and all(type(seed) is int and seed >= 0 for seed in seeds) and len(seeds) == len({*seeds})
    _expect(proper, path, "seeds", seeds, "give different integers, none below 0")
    texts = bool(ablation.seed_keys) and all(isinstance(key, str) for key in ablation.seed_keys)
    _expect(texts, path, "seed_keys", ablation.seed_keys, "give keys of a run's configuration")
    _expect(ablation.jobs >= 1, path, "jobs", ablation.jobs, "give 1 or more")
    _check_keys(ablation)


def _check_keys(ablation: Ablation) -> None:
    """Refuse keys that overwrite what was placed before them: nobody would notice."""
    placed = [(key, "set") for key in ablation.set]
    placed += [(axis.key, f"grid.{name}") for name, axis in ablation.grid.items()]
    placed += [(key, "seed_keys") for key in ablation.seed_keys]
    for (first, where), (later, place) in combinations(placed, 2):
        over = f"{first}.".startswith(f"{later}.")
        _expect(not over, ablation.path, place, later, f"it overwrites {first!r} of {where}; leave one of them out")


def _expect(met: bool, path: Path, key: str, value: Any, advice: str) -> None:
    if not met:
        raise ValueError(f"{path}: {key} is {value!r:.200}; {advice}.")
