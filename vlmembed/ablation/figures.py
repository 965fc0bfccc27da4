"""The report's figures: which values are drawn, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vlmembed.ablation.charts import STYLES, Line, line_chart
from vlmembed.ablation.curves import Curve, by_dimension, learning_curves, logged_names, stem_of, validation_name
from vlmembed.ablation.scatter import Point, pareto_front, scatter_chart
from vlmembed.ablation.summary import Row, Summary

#: Bytes of a dimension of an embedding in float32.
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Figure:
    """A chart, and the sentence below it."""

    chart: Markup
    caption: str


def styles_of(rows: Sequence[Row]) -> dict[str, int]:
    """Give the first settings, and a baseline, a style to be known by in all charts."""
    leading = list(rows[:STYLES])
    baselines = [row for row in rows[STYLES:] if row.is_baseline]
    if len(baselines) == 1:
        leading[-1] = baselines[0]
    return {row.name: style for style, row in enumerate(leading)}


def figures(summary: Summary, styles: dict[str, int]) -> dict[str, Figure]:
    """Draw what there are values for.

    Args:
        summary: An ablation with a finished run.
        styles: Of some settings, how to draw them; the others are in the background.
    """
    rows, metric = summary.rows, summary.ablation.metric
    validation = validation_name(metric, logged_names(rows))
    learning = learning_curves(rows, validation) if validation else []
    dimensions = by_dimension(rows, metric)
    drawn = {
        "learning": _learning(validation or "", learning, styles),
        "dimension": _dimension(stem_of(metric), dimensions, styles),
        "seconds": _seconds(metric, rows, styles),
        "bytes": _bytes(stem_of(metric), dimensions, styles),
    }
    return {name: figure for name, figure in drawn.items() if figure}


def _learning(name: str, curves: Sequence[Curve], styles: dict[str, int]) -> Figure | None:
    if not curves:
        return None
    chart = line_chart(f"{name} by training step: {_said(curves)}", "training step", name, _lines(curves, styles))
    return Figure(chart, "Learning. Lines are means over seeds, shades reach from the least to the most of them.")


def _dimension(name: str, curves: Sequence[Curve], styles: dict[str, int]) -> Figure | None:
    ticks = _places(curves)
    if len(ticks) < 2:
        return None
    title = f"{name} by embedding dimension: {_said(curves)}"
    chart = line_chart(title, "dimension", name, _lines(curves, styles), ticks)
    return Figure(chart, "Embeddings cut to fewer dimensions; means and ranges as before.")


def _seconds(name: str, rows: Sequence[Row], styles: dict[str, int]) -> Figure | None:
    points = [
        Point(row.name, row.cost["seconds_per_step"], row.mean, f"#{row.rank}", row.name in styles)
        for row in rows
        if "seconds_per_step" in row.cost
    ]
    if not points:
        return None
    chart = scatter_chart(f"{name} by seconds per training step. {_front(points)}", "seconds per step", name, points)
    return Figure(chart, "Full dots, joined: no other setting is both better and faster. Numbers are ranks.")


def _bytes(name: str, curves: Sequence[Curve], styles: dict[str, int]) -> Figure | None:
    ticks = _places(curves)
    several = len(ticks) > 1
    points = [
        Point(curve.row.name, FLOAT_BYTES * x, y, "" if several else f"#{curve.row.rank}", curve.row.name in styles)
        for curve in curves
        for x, y in curve.points
    ]
    if not points:
        return None
    title = f"{name} by bytes per embedding. {_front(points)}"
    chart = scatter_chart(title, "bytes per embedding", name, points, [FLOAT_BYTES * x for x in ticks])
    return Figure(chart, "Every setting at every dimension. Full dots, joined: none is both better and smaller.")


def _lines(curves: Sequence[Curve], styles: dict[str, int]) -> list[Line]:
    return [Line(curve.row.name, curve.points, curve.ends, styles.get(curve.row.name)) for curve in curves]


def _places(curves: Sequence[Curve]) -> list[float]:
    return sorted({x for curve in curves for x, _ in curve.points})


def _said(curves: Sequence[Curve]) -> str:
    """Say what the right ends of lines show."""
    ends = sorted(((curve.points[-1][1], curve.row.name) for curve in curves), reverse=True)
    return ", ".join(f"{name} {value:.4f}" for value, name in ends) + " at the right end."


def _front(points: Sequence[Point]) -> str:
    names = ", ".join(f"{point.name} ({point.quality:.4f} at {point.cost:.4g})" for point in pareto_front(points))
    return f"Not beaten in both: {names}."
