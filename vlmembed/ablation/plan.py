"""The plan of an ablation: its YAML file, the grid of settings, and the configuration of every trial."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import get_loader

from vlmembed.ablation.run import Trial, read_trials
from vlmembed.metrics import METRICS
from vlmembed.secrets import refuse_secrets

#: The keys of the file, and the type of each.
KINDS: dict[str, type] = {
    **dict.fromkeys(("base", "output_dir", "metric"), str),
    **dict.fromkeys(("grid", "baseline", "set"), dict),
    **dict.fromkeys(("seeds", "seed_keys"), list),
    "jobs": int,
}

#: What a seed changes if the file does not say: chance in the weights and in dropout, and the order of training rows.
SEED_KEYS = ["seed_everything", "data.init_args.seed"]

DEFAULTS: dict[str, Any] = {"baseline": {}, "seeds": [0], "seed_keys": SEED_KEYS, "set": {}, "jobs": 1}

#: File systems take names of 255 bytes.
LONGEST_SLUG = 200


class Axis(NamedTuple):
    """One thing that is varied: a dotted key of the configuration, and label → value."""

    key: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Ablation:
    """The content of ``ablation.yaml``."""

    path: Path  # the file, for error messages
    base: Path  # the configuration of `fit` that trials differ from; in the file, relative to it
    output_dir: Path
    metric: str  # the logged name that settings are compared by, such as test/ndcg@10; higher is better
    grid: Mapping[str, Axis]  # a setting is one label per axis
    baseline: Mapping[str, str]  # axis → label, of some axes: what the other settings are compared to
    seeds: list[int]  # each setting is run with each of these
    seed_keys: list[str]  # the keys that the seed is set at
    set: Mapping[str, Any]  # dotted key → value, for all trials
    jobs: int  # trials at the same time

    @property
    def settings(self) -> list[dict[str, str]]:
        """Every setting of the grid: the label on each axis."""
        labels = product(*(axis.values for axis in self.grid.values()))
        return [dict(zip(self.grid, combination, strict=True)) for combination in labels]

    def to_yaml(self) -> str:
        """Write what is run, with nothing left to defaults."""
        grid = {name: axis._asdict() for name, axis in self.grid.items()}
        fields = vars(self) | {"base": str(self.base), "output_dir": str(self.output_dir), "grid": grid}
        return yaml.safe_dump({key: fields[key] for key in KINDS}, sort_keys=False, allow_unicode=True)


def read_ablation(path: Path) -> Ablation:
    """Read and check an ``ablation.yaml``.

    Raises:
        ValueError: Naming the file, the key, its value and what to do.
    """
    content = read_mapping(path)
    check_keys(path, content, list(KINDS), list(DEFAULTS))
    fields = DEFAULTS | content
    for key, kind in KINDS.items():
        _expect(type(fields[key]) is kind, path, key, fields[key], f"it is a {kind.__name__}")
    fields["grid"] = {str(name): _axis(path, f"grid.{name}", axis) for name, axis in fields["grid"].items()}
    fields["baseline"] = {str(axis): str(label) for axis, label in fields["baseline"].items()}
    fields["base"] = (path.parent / fields["base"]).resolve()
    ablation = Ablation(path, **(fields | {"output_dir": Path(fields["output_dir"])}))
    _check(ablation)
    _check_overlaps(ablation)
    return ablation


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file as the command line does, which knows more floats (1e-3) and no dates.

    Raises:
        ValueError: If there is no such file, or it holds no mapping, or what looks like a secret.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        content = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: this is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, got {content!r:.100}.")
    refuse_secrets(content, str(path))
    return content


def check_keys(path: Path, content: Mapping[str, Any], keys: Sequence[str], optional: Sequence[str]) -> None:
    """Refuse unknown and missing keys of a file."""
    for key in content.keys() - set(keys):
        raise ValueError(f"{path}: there is no key {key!r} (its value is {content[key]!r}). The keys are {[*keys]}.")
    for key in set(keys) - set(optional) - content.keys():
        raise ValueError(f"{path}: the key {key!r} is missing. The keys are {[*keys]}; see the README for an example.")


def plan(ablation: Ablation) -> list[Trial]:
    """Plan every trial, those of the first seed first, so that every setting has a number early.

    Raises:
        ValueError: If a key cannot be set in the base, or two settings would share a folder.
    """
    base, output = read_mapping(ablation.base), ablation.output_dir.resolve()
    trials = []
    for seed in ablation.seeds:
        for slug, setting in _slugs(ablation).items():
            folder = output / "settings" / slug / f"seed-{seed}"
            config = configuration(ablation, base, setting, seed)
            trials.append(Trial(folder, setting, seed, ablation.metric, config))
    return trials


def check_trials(trials: list[Trial], check: Callable[[dict[str, Any]], None], path: Path) -> None:
    """Parse each setting's configuration with ``check``, so that the last one's typo shows before anything runs.

    Raises:
        ValueError: Naming the file at ``path``, the trial, and what ``check`` says.
    """
    # Seeds differ in nothing that could be wrong.
    for trial in [trial for trial in trials if trial.seed == trials[0].seed]:
        try:
            check(trial.configuration())
        except ValueError as error:
            raise ValueError(f"{path}: {trial} is not a configuration of `fit`: {error}") from None


def configuration(ablation: Ablation, base: Mapping[str, Any], setting: Mapping[str, str], seed: int) -> dict[str, Any]:
    """Return the base with what all trials change, then what the setting changes, then the seed; raises as ``plan``."""
    config = copy.deepcopy(dict(base))
    changes = {**ablation.set, **{axis.key: axis.values[setting[name]] for name, axis in ablation.grid.items()}}
    refuse_secrets(changes, str(ablation.path))
    for key, value in {**changes, **dict.fromkeys(ablation.seed_keys, seed)}.items():
        try:
            set_key(config, key, value)
        except TypeError as error:
            raise ValueError(f"{ablation.path}: {key} cannot be {value!r:.100}: {error} ({ablation.base}).") from error
    return config


def set_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a configuration.

    Raises:
        TypeError: If it lies within something that is not a mapping.
    """
    *parents, last = key.split(".")
    if last == "class_path" and parents:
        # Naming the class alone is naming it without arguments: those of the class before go with it.
        *parents, last = parents
        value = {"class_path": value}
    for depth, parent in enumerate(parents, start=1):
        config = config.setdefault(parent, {})
        if not isinstance(config, dict):
            outer = ".".join(parents[:depth])
            raise TypeError(f"{outer} is {config!r:.100} in the base, which has no keys within; set {outer} as a whole")
    config[last] = merge(config.get(last), value)


def merge(old: Any, new: Any) -> Any:
    """Return ``new``; merged into ``old``, key by key, where both are mappings and ``new`` names no class.

    A class comes with its own arguments: those of another one, or of the same one before, are gone.
    """
    if isinstance(old, str) and isinstance(new, dict) and "init_args" in new:
        old = {"class_path": old}  # A class that is named alone.
    if not isinstance(old, dict) or not isinstance(new, dict) or "class_path" in new:
        return copy.deepcopy(new)
    return old | {key: merge(old.get(key), value) for key, value in new.items()}


def remaining(trials: Sequence[Trial], retry_failed: bool = False) -> list[Trial]:
    """Return the trials that have not ended, or, perhaps, failed.

    Raises:
        ValueError: If a trial has ended that is not what is planned now.
    """
    states = [trial.ended().status for trial in trials]
    left = [status == "planned" or (retry_failed and status == "failed") for status in states]
    for trial, status, is_left in zip(trials, states, left, strict=True):
        changed = [] if is_left else differences(Trial.read(trial.folder), trial)
        if changed:
            retry = ", run with --retry_failed" if status == "failed" else ""
            raise ValueError(
                f"{trial.folder / 'planned.json'}: {trial} has {status} with another configuration: "
                f"{'; '.join(changed)}. Undo the change, delete that folder to run it again{retry}, or give another "
                "--output_dir."
            )
    # A report would show trials that the configuration does not have any more.
    output = trials[0].folder.parents[2]
    unplanned = sorted({trial.folder for trial in read_trials(output)} - {trial.folder for trial in trials})
    if unplanned:
        names = ", ".join(str(folder.relative_to(output)) for folder in unplanned[:3])
        raise ValueError(
            f"{output} has {len(unplanned)} trials that are not in the configuration (any more), such as {names}. Put "
            "them back into its grid or seeds, delete their folders, or give another --output_dir."
        )
    return [trial for trial, is_left in zip(trials, left, strict=True) if is_left]


def differences(before: Trial, now: Trial) -> list[str]:
    """Name every key in which a trial differs from what was planned before, with both values."""
    old, new = (_flat({**trial.config, "measured on": trial.metric.split("/")[0]}) for trial in (before, now))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key} was {old.get(key, 'not there')}, is {new.get(key, 'not there')}" for key in keys]


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Return every value as JSON, by its dotted key; as JSON, NaN equals itself."""
    if not isinstance(value, dict) or not value:
        return {key: json.dumps(value)}
    inner = [_flat(part, f"{key}.{name}" if key else str(name)) for name, part in value.items()]
    return {name: text for part in inner for name, text in part.items()}


def _slugs(ablation: Ablation) -> dict[str, dict[str, str]]:
    """Name the folder of each setting: name → setting."""
    slugs: dict[str, dict[str, str]] = {}
    for setting in ablation.settings:
        slug = "_".join(re.sub(r"[^\w.+-]+", "-", f"{axis}-{label}") for axis, label in setting.items())
        fits = len(slug.encode()) <= LONGEST_SLUG
        _expect(fits, ablation.path, "grid", setting, f"its folder would be {slug!r}: give it shorter labels")
        # Some file systems do not tell a from A.
        same = [other for other in slugs if other.casefold() == slug.casefold()]
        _expect(not same, ablation.path, "grid", setting, f"another would share the folder {slug!r}; rename a label")
        slugs[slug] = setting
    return slugs


def _axis(path: Path, key: str, content: Any) -> Axis:
    known = isinstance(content, dict) and content.keys() == {"key", "values"}
    _expect(known, path, key, content, "it has key and values")
    name, values = content["key"], content["values"]
    _expect(isinstance(name, str) and bool(name), path, f"{key}.key", name, "it is a key of a configuration of `fit`")
    _expect(isinstance(values, dict) and bool(values), path, f"{key}.values", values, "it maps labels to values")
    for label in values:
        # YAML reads on, off, yes and no as booleans; nobody would find True in the report.
        is_text = isinstance(label, str | int | float) and not isinstance(label, bool)
        _expect(is_text, path, f"{key}.values", label, "a label is a text: put it in quotes")
    return Axis(name, {str(label): value for label, value in values.items()})


def _check(ablation: Ablation) -> None:
    path, seeds, (stage, *names) = ablation.path, ablation.seeds, ablation.metric.split("/")
    is_metric = stage in ("val", "test") and any(name in METRICS for name in names)
    advice = f"write val/ or test/, the set's name if there are several, and one of {[*METRICS]}"
    _expect(is_metric, path, "metric", ablation.metric, advice)
    _expect(bool(ablation.grid), path, "grid", {}, "name at least one axis")
    for axis, label in ablation.baseline.items():
        _expect(axis in ablation.grid, path, f"baseline.{axis}", label, f"the axes of the grid are {[*ablation.grid]}")
        labels = [*ablation.grid[axis].values]
        _expect(label in labels, path, f"baseline.{axis}", label, f"the labels of that axis are {labels}")
    are_seeds = bool(seeds) and all(type(seed) is int and seed >= 0 for seed in seeds) and len(seeds) == len({*seeds})
    _expect(are_seeds, path, "seeds", seeds, "give different integers, none below 0")
    are_keys = bool(ablation.seed_keys) and all(isinstance(key, str) for key in ablation.seed_keys)
    _expect(are_keys, path, "seed_keys", ablation.seed_keys, "give keys of a configuration of `fit`")
    _expect(ablation.jobs >= 1, path, "jobs", ablation.jobs, "give 1 or more")


def _check_overlaps(ablation: Ablation) -> None:
    """Refuse keys that overwrite what was set before them: nobody would notice."""
    keys = [(key, "set") for key in ablation.set]
    keys += [(axis.key, f"grid.{name}") for name, axis in ablation.grid.items()]
    keys += [(key, "seed_keys") for key in ablation.seed_keys]
    for (earlier, origin), (later, where) in combinations(keys, 2):
        over = f"{earlier}.".startswith(f"{later.removesuffix('.class_path')}.")
        _expect(not over, ablation.path, where, later, f"it overwrites {earlier!r} of {origin}; leave one of them out")


def _expect(met: bool, path: Path, key: str, value: Any, advice: str) -> None:
    if not met:
        raise ValueError(f"{path}: {key} is {value!r:.200}; {advice}.")
