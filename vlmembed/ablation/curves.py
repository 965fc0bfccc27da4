"""How quality grows with training, and falls with the embedding's dimension: means over the seeds of each setting."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmembed.ablation.results import Result
from vlmembed.ablation.summary import Row

#: Where Lightning's CSV logger writes, in a run's folder.
METRICS = "metrics.csv"


@dataclass(frozen=True)
class Curve:
    """A setting's values, from left to right.

    Args:
        row: The setting.
        points: Step or dimension, and the mean over those seeds that were measured there.
        ends: The least and the most of them.
    """

    row: Row
    points: Sequence[tuple[float, float]]
    ends: Sequence[tuple[float, float]]


def learning_curves(rows: Sequence[Row], name: str) -> list[Curve]:
    """Read a logged name by training step; a setting that never logged it has no curve."""
    return _curves((row, [pair for run in row.runs for pair in _logged(run.folder / METRICS, name)]) for row in rows)


def by_dimension(rows: Sequence[Row], metric: str) -> list[Curve]:
    """Take a metric at every dimension that embeddings were cut to, and at the whole."""
    stem = stem_of(metric)
    return _curves((row, [pair for run in row.runs for pair in _at_dimensions(run, stem)]) for row in rows)


def stem_of(metric: str) -> str:
    """Return a metric's name without the dimension that embeddings were cut to."""
    rest, _, last = metric.rpartition("/")
    return rest if last.isdecimal() else metric


def logged_names(rows: Sequence[Row]) -> list[str]:
    """Return what the runs wrote while they trained."""
    names: dict[str, None] = {}
    for path in (run.folder / METRICS for row in rows for run in row.runs):
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                names |= dict.fromkeys(next(csv.reader(file), []))
    return list(names)


def validation_name(metric: str, names: Sequence[str]) -> str | None:
    """Return the validation metric that comes closest to what settings are compared by, None if there is none.

    That is the same name under ``val/``; else the same measure on another evaluation set.
    """
    rest = metric.partition("/")[2]
    measure = next(part for part in reversed(rest.split("/")) if not part.isdecimal())
    candidates = [f"val/{rest}", f"val/{measure}", *(name for name in names if name.endswith(f"/{measure}"))]
    return next((name for name in candidates if name in names and name.startswith("val/")), None)


def _curves(settings: Iterable[tuple[Row, list[tuple[float, float]]]]) -> list[Curve]:
    curves = []
    for row, pairs in settings:
        at: dict[float, list[float]] = {}
        for x, value in sorted(pairs):
            at.setdefault(x, []).append(value)
        if at:
            points = [(x, sum(values) / len(values)) for x, values in at.items()]
            curves.append(Curve(row, points, [(min(values), max(values)) for values in at.values()]))
    return curves


def _logged(path: Path, name: str) -> list[tuple[float, float]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [(float(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def _at_dimensions(run: Result, stem: str) -> list[tuple[float, float]]:
    cut = {name.removeprefix(f"{stem}/"): value for name, value in run.metrics.items() if name.startswith(f"{stem}/")}
    pairs = [(float(suffix), value) for suffix, value in cut.items() if suffix.isdecimal()]
    if stem in run.metrics and "embedding_dimension" in run.cost:
        pairs.append((run.cost["embedding_dimension"], run.metrics[stem]))
    return pairs
