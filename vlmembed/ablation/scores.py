"""The scores of single queries, as the runs of an ablation have left them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from vlmembed.ablation.results import per_query_path


@dataclass(frozen=True)
class Scores:
    """One metric, query by query.

    Args:
        evaluation: The evaluation set that the queries are from.
        column: What the metric is called there: ``ndcg@10``.
        queries: Their ids.
        settings: Of each setting, a row per run and a column per query.
    """

    evaluation: str
    column: str
    queries: Sequence[str]
    settings: Sequence[Float64[np.ndarray, "_ Q"]]


def read_scores(metric: str, settings: Sequence[Sequence[Path]]) -> Scores:
    """Read a metric by its logged name.

    Args:
        metric: Such as ``test/ndcg@10`` or ``test/NAME/ndcg@10/32``.
        settings: Of each setting, the folders of its runs. At least one.

    Raises:
        FileNotFoundError: If a run has no scores of that evaluation set.
        ValueError: If the metric is not among what was measured, runs were measured with other queries, or a score is
            not a number.
    """
    evaluation, column = find_metric(metric, settings[0][0])
    files = [[per_query_path(run, evaluation) for run in runs] for runs in settings]
    tables = [[read_column(path, column) for path in paths] for paths in files]
    first, queries = files[0][0], list(tables[0][0])
    for path, table in (
        (path, table) for pair in zip(files, tables, strict=True) for path, table in zip(*pair, strict=True)
    ):
        if list(table) != queries:
            raise ValueError(f"{path} has other queries than {first}: runs can only be compared on the same ones")
    arrays = [np.array([list(table.values()) for table in each], dtype=np.float64) for each in tables]
    return Scores(evaluation, column, queries, arrays)


def find_metric(metric: str, run: Path) -> tuple[str, str]:
    """Find which evaluation set of a run, and which column of its scores, a logged name means.

    Raises:
        ValueError: If none, or several.
    """
    rest = metric.partition("/")[2]
    measured = {
        path.parent.relative_to(run / "measured").as_posix(): path for path in run.glob("measured/**/per_query.csv")
    }
    columns = [(name, column) for name, path in sorted(measured.items()) for column in _header(path)[1:]]
    found = [pair for pair in columns if rest in (pair[1], "/".join(pair))]
    if len(found) != 1:
        known = sorted("/".join(pair) for pair in columns)
        raise ValueError(f"metric {metric!r} means {len(found)} of the columns measured in {run}, which are {known}")
    return found[0]


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def read_column(path: Path, column: str) -> dict[str, float]:
    """Read a metric of each query, in the order of the file; raises as ``read_scores`` does."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and column not in rows[0]:
        raise ValueError(f"{path} has no column {column!r}, which other runs have: it has {list(rows[0])}")
    table = {row["query"]: float(row[column]) for row in rows}
    if len(table) < len(rows):
        raise ValueError(f"{path} has a query twice")
    return table
