"""Quality against cost, as SVG: which settings no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from vlmembed.ablation.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    across_scale,
    called,
    chart,
    frame,
    path_through,
    text,
)
from vlmembed.ablation.drawing import Scale, element, focused, place_labels, widened


@dataclass(frozen=True)
class Point:
    """A setting's cost and quality.

    Args:
        name: The setting.
        cost: Less is better.
        quality: More is better.
        short: What to call it where its name has no room; without it, only the front has names.
        leads: Whether the vertical axis must have room for it.
    """

    name: str
    cost: float
    quality: float
    short: str = ""
    leads: bool = True


def scatter_chart(
    title: str, x_label: str, y_label: str, points: Sequence[Point], x_ticks: Sequence[float] = ()
) -> Markup:
    """Draw quality against cost, with those marked that no other beats in both; see ``line_chart``."""
    across = across_scale(widened(point.cost for point in points), WIDTH - RIGHT, x_ticks)
    leading = [point.quality for point in points if point.leads]
    upward = Scale(*focused(leading, [point.quality for point in points]), HEIGHT - BOTTOM, TOP)
    front = pareto_front(points)
    # Those of the front are labelled first, and drawn last.
    order = sorted(points, key=lambda point: (point not in front, -point.quality))
    places = [(across(point.cost), upward(point.quality)) for point in order]
    parts = [
        frame(across, upward, x_label, y_label, x_ticks or across.ticks()),
        element("path", class_="front", d=_staircase([places[order.index(point)] for point in front])),
        *(
            _dot(point, place, point in front, point.quality < upward.low)
            for point, place in reversed(list(zip(order, places, strict=True)))
        ),
        *_labels(order, places, front, upward),
    ]
    return chart(title, parts)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in cost or quality without being worse in the other, by cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.quality)):
        best = front[-1] if front else None
        if not best or point.quality > best.quality or (point.cost, point.quality) == (best.cost, best.quality):
            front.append(point)
    return front


def _labels(
    order: Sequence[Point], places: Sequence[tuple[float, float]], front: Sequence[Point], upward: Scale
) -> list[Markup]:
    named = [point.short or point in front for point in order]
    texts = [
        [called(point.name, point.quality, upward), *filter(None, [point.short])] if has_name else []
        for point, has_name in zip(order, named, strict=True)
    ]
    found = place_labels(places, texts, (LEFT, TOP - 12, WIDTH, HEIGHT - BOTTOM + 6))
    return [
        text(
            label.text, x=label.x, y=label.y, text_anchor=label.anchor, class_="label on" if point in front else "label"
        )
        for label, point in zip(found, order, strict=True)
        if label
    ]


def _dot(point: Point, place: tuple[float, float], on_front: bool, below: bool) -> Markup:
    """A dot, or an arrow where the place is only the edge of the chart."""
    kind, (x, y) = "point front" if on_front else "point beaten", place
    if below:
        mark = element("path", class_=kind, d="M-5 -4h10l-5 8Z", transform=f"translate({x:.1f} {y:.1f})")
    else:
        mark = element("circle", class_=kind, cx=x, cy=y, r=5 if on_front else 4)
    return element("g", element("title", f"{point.name}: {point.quality:.4f}"), mark)


def _staircase(places: Sequence[tuple[float, float]]) -> str:
    """Along what is possible at each cost: across to the next, then up."""
    corners = [(right[0], left[1]) for left, right in pairwise(places)]
    return path_through([place for step in zip(places, [*corners, places[-1]], strict=True) for place in step])
