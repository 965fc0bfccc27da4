"""From ``ablation.yaml`` to its runs: every setting of the grid with every seed."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlmembed.ablation.configuration import Ablation, read_mapping
from vlmembed.ablation.planned import Run
from vlmembed.ablation.results import run_folder
from vlmembed.secrets import refuse_secrets

#: File systems take names of 255 bytes.
LONGEST_SLUG = 200


def plan(ablation: Ablation) -> list[Run]:
    """Make all runs, those of the first seed first, so that every setting has a number early.

    Raises:
        ValueError: If a key cannot be set in the base, or two settings would share a folder.
    """
    base = read_mapping(ablation.base)
    slugs = _slugs(ablation.settings, ablation.path)
    return [
        Run(
            run_folder(ablation.output_dir.resolve(), slug, seed),
            setting,
            seed,
            ablation.metric,
            configuration(ablation, base, setting, seed),
        )
        for seed in ablation.seeds
        for slug, setting in zip(slugs, ablation.settings, strict=True)
    ]


def check_runs(runs: list[Run], check: Callable[[dict[str, Any]], None], path: Path) -> None:
    """Try each setting's configuration on the command line's parser, so that the last one's typo shows at once.

    Args:
        runs: All runs.
        check: Raises a ValueError that says what is wrong with a configuration.
        path: The ablation's file, for error messages.
    """
    # Seeds differ in nothing that could be wrong.
    for run in [run for run in runs if run.seed == runs[0].seed]:
        try:
            check(run.located())
        except ValueError as error:
            raise ValueError(f"{path}: {run} is not a configuration of `fit`: {error}") from None


def configuration(ablation: Ablation, base: Mapping[str, Any], setting: Mapping[str, str], seed: int) -> dict[str, Any]:
    """Return the base with what all runs change, what the setting changes, and the seed.

    Raises:
        ValueError: If a key lies within something that is not a mapping, or is for a secret.
    """
    config = copy.deepcopy(dict(base))
    changes = {**ablation.set, **{axis.key: axis.values[setting[name]] for name, axis in ablation.grid.items()}}
    refuse_secrets(changes, str(ablation.path))
    for key, value in {**changes, **dict.fromkeys(ablation.seed_keys, seed)}.items():
        try:
            place(config, key, value)
        except TypeError as error:
            raise ValueError(f"{ablation.path}: {key} cannot be {value!r:.100}: {error} ({ablation.base}).") from error
    return config


def place(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a configuration.

    Raises:
        TypeError: If it lies within something that is not a mapping.
    """
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents, start=1):
        config = config.setdefault(parent, {})
        if not isinstance(config, dict):
            place = ".".join(parents[:depth])
            raise TypeError(f"{place} is {config!r:.100} in the base, which has no keys within; set {place} as a whole")
    config[last] = merge(config.get(last), value)


def merge(old: Any, new: Any) -> Any:
    """Return ``new``; merged into ``old``, key by key, where both are mappings and ``new`` names no class.

    A class comes with its own arguments: those of another one, or of the same one before, are gone.
    """
    if not isinstance(old, dict) or not isinstance(new, dict) or "class_path" in new:
        return copy.deepcopy(new)
    return old | {key: merge(old.get(key), value) for key, value in new.items()}


def differences(before: Run, now: Run) -> list[str]:
    """Name every key in which a run differs from what was planned before, with both values."""
    ours, theirs = (_flat({**run.config, "measured on": run.metric.split("/")[0]}) for run in (now, before))
    keys = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
    return [f"{key} was {theirs.get(key, 'not there')}, is {ours.get(key, 'not there')}" for key in keys]


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Every value as JSON, by its dotted key: NaN equals itself there."""
    if not isinstance(value, dict) or not value:
        return {key: json.dumps(value)}
    return {
        place: text
        for name, inner in value.items()
        for place, text in _flat(inner, f"{key}.{name}" if key else str(name)).items()
    }


def _slugs(settings: list[dict[str, str]], path: Path) -> list[str]:
    """Name the folder of each setting."""
    owners: dict[str, Mapping[str, str]] = {}
    slugs = []
    for setting in settings:
        slug = "_".join(re.sub(r"[^\w.+-]+", "-", f"{axis}-{label}") for axis, label in setting.items())
        if len(slug.encode()) > LONGEST_SLUG:
            raise ValueError(f"{path}: the folder of {setting} would be called {slug!r}; give it shorter labels.")
        # Some file systems do not tell a from A.
        owner = owners.setdefault(slug.casefold(), setting)
        if owner is not setting:
            raise ValueError(f"{path}: {owner} and {setting} would share the folder {slug!r}; rename a label.")
        slugs.append(slug)
    return slugs
