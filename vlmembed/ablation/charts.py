"""The report's charts, as SVG. Colours come from the page's style sheet; none of them is needed to read a chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from vlmembed.ablation.drawing import GAP, Scale, element, focused, spread, widened

WIDTH, HEIGHT = 420.0, 280.0
LEFT, TOP, BOTTOM, RIGHT = 40.0, 30.0, 44.0, 14.0
#: Room for the names at the right of lines, and the longest name that fits.
NAMES, LONGEST = 122.0, 17
#: With more lines than this, only those with a style have their name beside them.
MOST_NAMES = 14
#: With more points than this, a line has a marker at its end alone.
MOST_MARKERS = 5

#: Told apart by dash and shape, where colour does not.
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "14 4", "4 2 1 2")
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "M-3.6 -3.6h7.2v7.2h-7.2Z",
    "M0 -4.8L4.6 3.4h-9.2Z",
    "M0 -5L5 0L0 5L-5 0Z",
    "M0 4.8L-4.6 -3.4h9.2Z",
    "M-5 -1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5Z",
)
STYLES = len(SHAPES)

text = partial(element, "text")


@dataclass(frozen=True)
class Line:
    """A setting's values.

    Args:
        name: The setting.
        points: From left to right.
        ends: At each point, the least and the most over seeds; empty where there is nothing to show.
        style: Which colour, dash and shape; None in the background.
    """

    name: str
    points: Sequence[tuple[float, float]]
    ends: Sequence[tuple[float, float]] = ()
    style: int | None = None

    @property
    def heights(self) -> list[float]:
        """The values that must fit."""
        return [y for _, y in self.points] + [y for pair in self.ends for y in pair]


def line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], x_ticks: Sequence[float] = ()) -> Markup:
    """Draw lines, the first in front, each with its name at the right.

    Args:
        title: What a reader without the picture is told.
        x_label: Named along the bottom.
        y_label: Named at the top.
        lines: At least one.
        x_ticks: The values to mark at the bottom, on a logarithmic axis; without them the axis is linear, and the
            vertical one has room for all lines, not only for those with a style.
    """
    across = across_scale([x for line in lines for x, _ in line.points], WIDTH - NAMES, x_ticks)
    heights = [y for line in lines for y in line.heights]
    leading = [y for line in lines if line.style is not None for y in line.heights]
    upward = Scale(*(focused(leading, heights) if x_ticks and leading else widened(heights)), HEIGHT - BOTTOM, TOP)
    parts = [
        frame(across, upward, x_label, y_label, x_ticks or across.ticks()),
        *(_range(line, across, upward) for line in lines if line.ends and line.style is not None),
        *(_line(line, across, upward) for line in reversed(lines)),
        *_names(lines, across, upward),
    ]
    return chart(title, parts)


def whisker(difference: float, margin: float, extent: tuple[float, float], found: bool) -> Markup:
    """Draw a difference and its interval within a line of a table; the numbers stand beside it.

    Args:
        difference: The dot; an arrow where it lies below the extent.
        margin: Half the interval.
        extent: The values at the edges.
        found: Whether it is called a difference: a full dot, else an empty one.
    """
    across = Scale(*extent, 6.0, 74.0)
    place, low, high = (across(value) for value in (difference, difference - margin, difference + margin))
    dot = (
        f"M{place - 4:.1f} 8l7 -4v8Z"
        if difference < extent[0]
        else f"M{place - 3.5:.1f} 8a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0Z"
    )
    parts = [
        element("line", class_="zero", x1=across(0), x2=across(0), y1=0, y2=16),
        element("line", class_="bar", x1=low, x2=high, y1=8, y2=8),
        element("path", class_="dot found" if found else "dot", d=dot),
    ]
    return element("svg", *parts, class_="whisker", viewBox="0 0 80 16", aria_hidden="true")


def swatch(style: int) -> Markup:
    """Draw what a style looks like, for beside a name."""
    parts = [_stroke("M2 8H30", style), _shape(style, 16.0, 8.0)]
    return element("svg", *parts, class_="swatch", viewBox="0 0 32 16", aria_hidden="true")


def shortened(name: str, longest: int = LONGEST) -> str:
    """Cut a name to what a chart has room for."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def called(name: str, value: float, upward: Scale) -> str:
    """Return what a chart calls a setting: with its value, where that lies below the axis."""
    return shortened(name) if value >= upward.low else f"{shortened(name, LONGEST - 6)} ↓{value:.2f}"


def chart(title: str, parts: Iterable[Markup]) -> Markup:
    """Put a chart together; the title is what a reader without the picture is told."""
    view = f"0 0 {WIDTH:g} {HEIGHT:g}"
    return element("svg", element("title", title), *parts, class_="chart", viewBox=view, role="img", aria_label=title)


def across_scale(values: Sequence[float], end: float, ticks: Sequence[float]) -> Scale:
    """Scale the horizontal axis, up to a pixel: logarithmic where its ticks are given."""
    if ticks:  # Doubled and halved where there is but one, so that it stands in the middle.
        low, high = min(ticks), max(ticks)
        return Scale(low / (1.15 if low < high else 2), high * (1.15 if low < high else 2), LEFT, end, True)
    low, high = min(values), max(values)
    return Scale(low, high + 0.08 * (high - low) if low < high else low + 1, LEFT, end)


def frame(across: Scale, upward: Scale, x_label: str, y_label: str, x_ticks: Sequence[float]) -> Markup:
    """Draw what lines and points stand in: the axes' names, their values, and thin lines across."""
    floor = HEIGHT - BOTTOM
    parts = [text(y_label, x=0, y=12, class_="axis")]
    for value in upward.ticks():
        parts.append(element("line", class_="grid", x1=LEFT, x2=across.end, y1=upward(value), y2=upward(value)))
        parts.append(text(f"{value:.4g}", x=LEFT - 6, y=upward(value) + 4, text_anchor="end"))
    parts += [text(f"{value:.4g}", x=across(value), y=floor + 16, text_anchor="middle") for value in x_ticks]
    parts.append(text(x_label, x=across.end, y=HEIGHT - 6, text_anchor="end", class_="axis"))
    return element("g", *parts)


def path_through(places: Sequence[tuple[float, float]]) -> str:
    """Write the path from place to place."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _line(line: Line, across: Scale, upward: Scale) -> Markup:
    places = [(across(x), upward(y)) for x, y in line.points]
    if line.style is None:
        parts = [element("path", class_="line rest", d=path_through(places)), *_ends(places)]
    else:
        marked = places if len(places) <= MOST_MARKERS else places[-1:]
        parts = [_stroke(path_through(places), line.style), *(_shape(line.style, x, y) for x, y in marked)]
    return element("g", element("title", line.name), *parts)


def _ends(places: Sequence[tuple[float, float]]) -> list[Markup]:
    """A dot where a line has but one point, which alone would not show."""
    return [element("circle", class_="dot", cx=x, cy=y, r=2.5) for x, y in places if len(places) == 1]


def _stroke(path: str, style: int) -> Markup:
    return element("path", class_=f"line style{style}", d=path, stroke_dasharray=DASHES[style])


def _shape(style: int, x: float, y: float) -> Markup:
    return element("path", class_=f"shape style{style}", d=SHAPES[style], transform=f"translate({x:.1f} {y:.1f})")


def _range(line: Line, across: Scale, upward: Scale) -> Markup:
    lows = [(across(x), upward(low)) for (x, _), (low, _) in zip(line.points, line.ends, strict=True)]
    highs = [(across(x), upward(high)) for (x, _), (_, high) in zip(line.points, line.ends, strict=True)]
    return element("path", class_=f"range style{line.style}", d=path_through([*lows, *reversed(highs)]) + "Z")


def _names(lines: Sequence[Line], across: Scale, upward: Scale) -> list[Markup]:
    named = [line for line in lines if line.style is not None or len(lines) <= MOST_NAMES]
    lasts = [(across(line.points[-1][0]), upward(line.points[-1][1])) for line in named]
    heights = spread([y for _, y in lasts], TOP, HEIGHT - BOTTOM)
    parts = []
    for line, (x, y), height in zip(named, lasts, heights, strict=True):
        start = WIDTH - NAMES + GAP
        style = "rest" if line.style is None else f"style{line.style}"
        leader = element("line", class_="leader", x1=x + 5, x2=start - 2, y1=y, y2=height)
        parts += [
            leader,
            text(called(line.name, line.points[-1][1], upward), x=start, y=height + 4, class_=f"name {style}"),
        ]
    return parts
