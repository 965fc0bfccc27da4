"""What charts are drawn with: SVG elements, scales, and places for labels, in pixels of the chart's own grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log2, log10

from markupsafe import Markup

#: Height of a line of text, and width of a letter of average width, in the labels' size.
LINE, LETTER = 13.0, 6.3
#: A label keeps this far from its point.
GAP = 10.0

Box = tuple[float, float, float, float]


def element(name: str, *content: str, **attributes: object) -> Markup:
    """Write an element; what is not markup is escaped. ``class_`` and ``text_anchor`` give the names that they mean."""
    pairs = (
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup().join(pairs), Markup().join(content))


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels.

    Args:
        low: The value at ``start``.
        high: The value at ``end``; another one than ``low``.
        start: A pixel.
        end: A pixel.
        logarithmic: Whether equal ratios are equally wide.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; one that lies outside is put at the edge."""
        value = min(max(value, self.low), self.high)
        low, high, value = (log2(each) if self.logarithmic else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values within, about four."""
        size = (self.high - self.low) / 4
        power = 10.0 ** floor(log10(size))
        step = power * min((1, 2, 5, 10), key=lambda factor: abs(log10(factor * power / size)))
        return [step * count for count in range(ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9) + 1)]


def widened(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """Return the ends of an axis that leaves some room around the values, also where they are all one."""
    found = list(values)
    low, high = min(found), max(found)
    room = share * (high - low) or share * abs(high) or share
    return low - room, high + room


def focused(leading: Sequence[float], others: Iterable[float]) -> tuple[float, float]:
    """Return the ends of an axis for the leading values, and for those others that do not squeeze them.

    One setting that failed to learn would leave the others a few pixels to differ in.
    """
    low, high = min(leading), max(leading)
    floor = low - max(high - low, 0.05 * abs(high))
    return widened([high, *leading, *(value for value in others if value >= floor)])


def spread(places: Sequence[float], low: float, high: float, gap: float = LINE) -> list[float]:
    """Move places apart until neighbours are a gap away from each other, in their order, between two limits."""
    order = sorted(range(len(places)), key=places.__getitem__)
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    moved = list(places)
    limit = low
    for index in order:  # Downwards, nobody above the limit that the one before has set …
        moved[index] = max(moved[index], limit)
        limit = moved[index] + gap
    limit = high
    for index in reversed(order):  # … and back, for those that have been pushed over the edge.
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved


@dataclass(frozen=True)
class Label:
    """A text that found a place: the point where it starts, ends or has its middle, as ``anchor`` says."""

    text: str
    x: float
    y: float
    anchor: str

    @property
    def box(self) -> Box:
        """Left, top, right and bottom."""
        width = LETTER * len(self.text)
        left = self.x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor]
        return left, self.y - LINE + 4, left + width, self.y + 3


def place_labels(
    points: Sequence[tuple[float, float]], texts: Sequence[Sequence[str]], frame: Box
) -> list[Label | None]:
    """Find a place beside each point where its label covers nothing: the first come choose first.

    Args:
        points: Pixels.
        texts: For each point, what it may be called, best first.
        frame: Where labels must stay.
    """
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    labels: list[Label | None] = []
    for (x, y), names in zip(points, texts, strict=True):
        found = next((label for text in names for label in _around(text, x, y) if _free(label.box, taken, frame)), None)
        labels.append(found)
        taken += [found.box] if found else []
    return labels


def _around(text: str, x: float, y: float) -> list[Label]:
    return [
        Label(text, x - GAP, y + 4, "end"),
        Label(text, x - 4, y - GAP, "start"),
        Label(text, x + GAP, y + 4, "start"),
        Label(text, x + 4, y - GAP, "end"),
        Label(text, x, y + GAP + LINE - 3, "middle"),
    ]


def _free(box: Box, taken: Sequence[Box], frame: Box) -> bool:
    left, top, right, bottom = box
    inside = left >= frame[0] and top >= frame[1] and right <= frame[2] and bottom <= frame[3]
    return inside and not any(
        left < other[2] and right > other[0] and top < other[3] and bottom > other[1] for other in taken
    )
