"""The plan of an ablation: its YAML file, the grid of settings, and the configuration of every trial."""

from __future__ import annotations

import copy
import json
import re
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, lazy_instance

from vlmembed.ablation.run import Executor, Local, Trial
from vlmembed.metrics import METRICS
from vlmembed.secrets import refuse_secrets, refuse_secrets_in

#: What a seed changes if the file does not say: chance in the weights and in dropout, and the order of training rows.
SEED_KEYS = ("seed_everything", "data.init_args.seed")

#: File systems take names of 255 bytes.
LONGEST_SLUG = 200


class Axis(NamedTuple):
    """One thing that is varied: a dotted key of the configuration, and label → value."""

    key: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Ablation:
    """What ``ablation.yaml`` holds.

    Args:
        base: The configuration of ``fit`` that trials differ from; relative to the file.
        output_dir: Where trials and their report are written.
        grid: What is varied, by name: a dotted key of the configuration, and its values by label.
        metric: The logged name that settings are compared by; higher is better.
        baseline: Axis → label, of some axes: what the other settings are compared to.
        seeds: Each setting is run with each of these.
        seed_keys: The keys that the seed is set at.
        set: Dotted key → value, for all trials.
        jobs: How many trials run at the same time.
        path: The file, for messages.
    """

    base: Path
    output_dir: Path
    grid: dict = field(default_factory=dict)  # Of Axis, once it is read.
    metric: str = "test/ndcg@10"
    baseline: dict = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    seed_keys: list[str] = field(default_factory=lambda: [*SEED_KEYS])
    set: dict = field(default_factory=dict)
    jobs: int = 1
    path: Path = Path("ablation.yaml")

    @property
    def settings(self) -> list[dict[str, str]]:
        """Every setting of the grid: the label on each axis."""
        labels = product(*(axis.values for axis in self.grid.values()))
        return [dict(zip(self.grid, combination, strict=True)) for combination in labels]

    def to_yaml(self) -> str:
        """Write what is run, with nothing left to defaults."""
        grid = {name: axis._asdict() for name, axis in self.grid.items()}
        content = vars(self) | {"base": str(self.base), "output_dir": str(self.output_dir), "grid": grid}
        del content["path"]
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def parse(args: Sequence[str]) -> tuple[Ablation, Namespace]:
    """Read the command line of ``ablate`` and the file that it names: the ablation, and the other options."""
    refuse_secrets_in(args)
    command_line = parser()
    try:
        options = command_line.parse_args([*args])
    except ArgumentError as error:
        raise ValueError(f"{' '.join(args)}: {error} (`ablate --help` lists the keys).") from None
    ablation = Ablation(**{key.name: options[key.name] for key in fields(Ablation) if key.name != "path"})
    path = Path(options.config[-1])
    ablation = replace(ablation, path=path, base=(path.parent / ablation.base).resolve())
    if options.probe is None:
        grid = {str(name): _axis(path, f"grid.{name}", axis) for name, axis in ablation.grid.items()}
        baseline = {str(axis): str(label) for axis, label in ablation.baseline.items()}
        ablation = replace(ablation, grid=grid, baseline=baseline)
        _check(ablation)
    else:
        others = {"grid", "metric", "baseline", "seeds", "seed_keys", "jobs"}
        unused = sorted(key for key in others if options[key] != command_line.get_default(key))
        _expect(not unused, path, "probe", options.probe, f"a probe has no {', '.join(unused)}")
    return ablation, command_line.instantiate_classes(options)


def read_ablation(path: Path) -> Ablation:
    """Read and check an ``ablation.yaml``."""
    return parse(["--config", str(path)])[0]


def parser() -> ArgumentParser:
    """Return the parser of the command line, and of its file."""
    command_line = ArgumentParser(
        prog="python -m vlmembed ablate",
        description="Run every setting of a grid with every seed, and report which differences are real. A trial is an "
        "ordinary run of `fit`, in a folder of its own. After an interruption, the same command resumes. With a "
        "`probe` in place of a `grid`, score every pooling without weights of one model, in one pass.",
        exit_on_error=False,
    )
    probe = "in place of a grid: what vlmembed.ablation.command.Probe takes besides the model"
    where = "where trials run: Local, Ray, Slurm, or your own; `--executor Slurm --executor.options '[--gpus=1]'`"
    command_line.add_argument("--config", action="config", required=True, help="the ablation, as YAML")
    command_line.add_argument("--dry_run", action="store_true", help="list the trials and estimate their time")
    command_line.add_argument("--retry_failed", action="store_true", help="run failed trials again")
    command_line.add_argument("--report_only", action="store_true", help="report what has ended; train nothing")
    command_line.add_argument("--probe", type=dict | None, help=probe)
    command_line.add_class_arguments(Ablation, skip={"path"})
    command_line.add_subclass_arguments(Executor, "executor", default=lazy_instance(Local), help=where)
    return command_line


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values as the command line does, which knows more floats (1e-3) and no dates."""
    try:
        content = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, got {content!r:.100}.")
    refuse_secrets(content, str(path))
    return content


def plan(ablation: Ablation) -> list[Trial]:
    """Plan every trial, those of the first seed first, so that every setting has a number early."""
    base, settings, trials = read_mapping(ablation.base), ablation.output_dir.resolve() / "settings", list[Trial]()
    for seed, (slug, setting) in product(ablation.seeds, _slugs(ablation).items()):
        changes = {axis.key: axis.values[setting[name]] for name, axis in ablation.grid.items()}
        changes |= dict.fromkeys(ablation.seed_keys, seed)
        config = configuration(ablation, base, changes)
        trials.append(Trial(settings / slug / f"seed-{seed}", setting, seed, ablation.metric, config))
    return trials


def check_trials(trials: list[Trial], check: Callable[[dict[str, Any]], None], path: Path) -> None:
    """Parse each setting's configuration with ``check``, so that the last one's typo shows before anything runs."""
    # Seeds differ in nothing that could be wrong.
    for trial in [trial for trial in trials if trial.seed == trials[0].seed]:
        try:
            check(trial.configuration())
        except ValueError as error:
            raise ValueError(f"{path}: {trial} is not a configuration of `fit`: {error}") from None


def configuration(ablation: Ablation, base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base with what all trials change, then with changes of one: dotted key → value."""
    config, changes = copy.deepcopy(dict(base)), {**ablation.set, **changes}
    refuse_secrets(changes, str(ablation.path))
    for key, value in changes.items():
        try:
            _set_key(config, key, value)
        except TypeError as error:
            raise ValueError(f"{ablation.path}: {key} cannot be {value!r:.100}: {error} ({ablation.base}).") from error
    return config


def _set_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a configuration; a ``TypeError`` says that it lies within something that is no mapping."""
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
    """Return the trials that have not ended, or, perhaps, failed; refuse what ended with another configuration."""
    left = []
    for trial in trials:
        status = trial.ended().status
        if status == "planned" or (retry_failed and status == "failed"):
            left.append(trial)
        elif changed := differences(Trial.read(trial.folder), trial):
            retry = ", run with --retry_failed" if status == "failed" else ""
            raise ValueError(
                f"{trial.folder / 'planned.json'}: {trial} has {status} with another configuration: "
                f"{'; '.join(changed)}. Undo the change, delete that folder to run it again{retry}, or give another "
                "--output_dir."
            )
    return left


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
    fields: dict[str, Any] = content if isinstance(content, dict) else {}
    name, values = fields.get("key"), fields.get("values")
    known = len(fields) == 2 and isinstance(name, str) and isinstance(values, dict) and bool(values)
    _expect(known, path, key, content, "it has key, a key of a configuration of `fit`, and values, a mapping of labels")
    for label in values or ():
        # YAML reads on, off, yes and no as booleans; nobody would find True in the report.
        is_text = isinstance(label, str | int | float) and not isinstance(label, bool)
        _expect(is_text, path, f"{key}.values", label, "a label is a text: put it in quotes")
    return Axis(fields["key"], {str(label): value for label, value in fields["values"].items()})


def _check(ablation: Ablation) -> None:
    """Refuse what does not fit together, and keys that overwrite what was set before them: nobody would notice."""
    path, seeds, (stage, *names) = ablation.path, ablation.seeds, ablation.metric.split("/")
    is_metric = stage in ("val", "test") and any(name in METRICS for name in names)
    advice = f"write val/ or test/, the set's name if there are several, and one of {[*METRICS]}"
    _expect(is_metric, path, "metric", ablation.metric, advice)
    _expect(bool(ablation.grid), path, "grid", {}, "name at least one axis")
    for axis, label in ablation.baseline.items():
        _expect(axis in ablation.grid, path, f"baseline.{axis}", label, f"the axes of the grid are {[*ablation.grid]}")
        labels = [*ablation.grid[axis].values]
        _expect(label in labels, path, f"baseline.{axis}", label, f"the labels of that axis are {labels}")
    are_seeds = 0 < len(seeds) == len({*seeds}) and min(seeds) >= 0
    _expect(are_seeds, path, "seeds", seeds, "give different integers, none below 0")
    _expect(bool(ablation.seed_keys), path, "seed_keys", [], "give keys of a configuration of `fit`")
    _expect(ablation.jobs >= 1, path, "jobs", ablation.jobs, "give 1 or more")
    keys = [(key, "set") for key in ablation.set]
    keys += [(axis.key, f"grid.{name}") for name, axis in ablation.grid.items()]
    keys += [(key, "seed_keys") for key in ablation.seed_keys]
    for (earlier, origin), (later, where) in combinations(keys, 2):
        over = f"{earlier}.".startswith(f"{later.removesuffix('.class_path')}.")
        _expect(not over, path, where, later, f"it overwrites {earlier!r} of {origin}; leave one of them out")


def _expect(met: bool, path: Path, key: str, value: Any, advice: str) -> None:
    if not met:
        raise ValueError(f"{path}: {key} is {value!r:.200}; {advice}.")
