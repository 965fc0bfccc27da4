"""The report's tables: what a cell shows and what it sorts by, the same for every form of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from statistics import median
from typing import Literal

from vlmembed.ablation.charts import swatch, whisker
from vlmembed.ablation.results import csv_text
from vlmembed.ablation.summary import Row, Stand, Summary

NOTHING = "–"
#: A whisker reaches this many half intervals to each side.
WIDEST = 5


@dataclass(frozen=True)
class Cell:
    """One value.

    Args:
        text: What is read.
        value: What is sorted by, and what the CSV file holds; None where there is nothing.
        note: A word about it.
        drawing: A picture of it, as markup.
    """

    text: str
    value: float | str | None
    note: str = ""
    drawing: str = ""


@dataclass(frozen=True)
class Column:
    """What stands above values.

    Args:
        heading: Its name, with the unit.
        first: Which way the first click sorts: what is better comes first.
        numeric: Whether it is aligned as numbers are.
    """

    heading: str
    first: Literal["ascending", "descending"] = "ascending"
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Columns, and rows of as many cells: the second of a row is its name."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


def score(value: float) -> str:
    """Write a metric."""
    return f"{value:.4f}"


def signed(value: float) -> str:
    """Write a difference, with a minus sign as wide as the plus."""
    return f"{value:+.4f}".replace("-", "−")


def p_text(value: float) -> str:
    """Write a p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Write seconds of a step: three figures below one second."""
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3g}"


def mebibytes(value: float) -> str:
    """Write bytes of memory."""
    return f"{value / 2**20:,.0f}"


def count(value: float) -> str:
    """Write a whole number."""
    return f"{value:,.0f}"


#: Of each cost, its heading and how it is written.
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds_per_step": ("s per step", duration),
    "peak_memory_bytes": ("peak MiB", mebibytes),
    "trained_parameters": ("trained parameters", count),
    "pooling_parameters": ("of the pooling", count),
    "embedding_bytes": ("bytes per embedding", count),
}


def settings_table(summary: Summary, styles: dict[str, int]) -> Table:
    """Make the main table.

    Args:
        summary: The ablation.
        styles: Of some settings, how the charts draw them.
    """
    name = Column(" · ".join(summary.ablation.grid), numeric=False)
    columns = [Column("rank"), name, Column(summary.ablation.metric, "descending"), Column("over seeds")]
    stands: list[Callable[[Row], list[Cell]]] = []
    for title in ("best", "baseline"):
        of = attrgetter(title)
        others = {of(row).other for row in summary.rows if of(row)}
        if others and (title == "best" or others != {summary.rows[0].name}):  # The same numbers once.
            columns += [Column(f"to the {title}", "descending"), Column(f"p, {title}")]
            stands.append(partial(_stand_cells, of, _extent([of(row) for row in summary.rows])))
    columns += [Column(heading) for heading, _ in COSTS.values()]
    rows = [
        [*_own_cells(row, styles), *(cell for stand in stands for cell in stand(row)), *_cost_cells(row)]
        for row in summary.rows
    ]
    return Table(columns, rows)


def metrics_table(summary: Summary) -> Table:
    """Make the table of everything that was measured."""
    names = list(dict.fromkeys(name for row in summary.rows for name in row.metrics))
    columns = [Column("rank"), Column(" · ".join(summary.ablation.grid), numeric=False)]
    rows = [
        [
            Cell(str(row.rank), row.rank),
            Cell(row.name, row.name),
            *(_cell(row.metrics.get(name), score) for name in names),
        ]
        for row in summary.rows
    ]
    return Table([*columns, *(Column(name, "descending") for name in names)], rows)


def to_csv(summary: Summary) -> str:
    """Write a line per setting, with all figures of all values."""
    metrics = list(dict.fromkeys(name for row in summary.rows for name in row.metrics))
    stands = [
        f"{other}_{part}" for other in ("best", "baseline") for part in ("difference", "low", "high", "p", "verdict")
    ]
    values = ["mean", "standard_deviation", "least", "most"]
    lines = []
    for row in summary.rows:
        seeds = " ".join(str(run.seed) for run in row.runs)
        own = [row.mean, row.deviation, min(row.values), max(row.values)]
        stood = [value for stand in (row.best, row.baseline) for value in _stand_values(stand)]
        rest = [*(row.cost.get(name) for name in COSTS), *(row.metrics.get(name) for name in metrics)]
        lines.append([row.rank, *row.labels.values(), seeds, *own, *stood, *rest])
    return csv_text(["rank", *summary.ablation.grid, "seeds", *values, *stands, *COSTS, *metrics], lines)


def _cell(value: float | None, write: Callable[[float], str]) -> Cell:
    return Cell(NOTHING, None) if value is None else Cell(write(value), value)


def _own_cells(row: Row, styles: dict[str, int]) -> list[Cell]:
    titles = ["best"] * (row.rank == 1) + ["baseline"] * row.is_baseline
    drawing = swatch(styles[row.name]) if row.name in styles else ""
    ends = f"{score(min(row.values))} to {score(max(row.values))}, n {len(row.values)}"
    return [
        Cell(str(row.rank), row.rank, drawing=drawing),
        Cell(row.name, row.name, ", ".join(titles)),
        Cell(score(row.mean), row.mean),
        Cell(
            NOTHING if row.deviation is None else f"±{score(row.deviation)}",
            row.deviation,
            ends if len(row.values) > 1 else "n 1",
        ),
    ]


def _stand_cells(of: Callable[[Row], Stand | None], extent: tuple[float, float], row: Row) -> list[Cell]:
    stand = of(row)
    if stand is None:
        return [Cell(NOTHING, None), Cell(NOTHING, None)]
    ends = f"{signed(stand.difference - stand.margin)} to {signed(stand.difference + stand.margin)}"
    drawing = whisker(stand.difference, stand.margin, extent, stand.found)
    return [
        Cell(signed(stand.difference), stand.difference, ends, drawing),
        Cell(p_text(stand.p_value), stand.p_value, stand.verdict),
    ]


def _extent(stands: Sequence[Stand | None]) -> tuple[float, float]:
    """Return what all intervals and 0 fit in, but for those far off, next to which the others would shrink to dots."""
    found = [stand for stand in stands if stand]
    ends = [stand.difference + sign * stand.margin for stand in found for sign in (-1, 1)]
    reach = WIDEST * median(stand.margin for stand in found)
    low, high = max(min(0.0, *ends), -reach), min(max(0.0, *ends), reach)
    return (low, high) if low < high else (-1.0, 1.0)


def _cost_cells(row: Row) -> list[Cell]:
    return [_cell(row.cost.get(name), write) for name, (_, write) in COSTS.items()]


def _stand_values(stand: Stand | None) -> list[float | str | None]:
    if stand is None:
        return [None] * 5
    low, high = stand.difference - stand.margin, stand.difference + stand.margin
    return [stand.difference, low, high, stand.p_value, stand.verdict]
