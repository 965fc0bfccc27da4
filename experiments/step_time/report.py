"""What was measured, as Markdown and as a plot."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import version
from math import log2
from pathlib import Path
from typing import Literal

import torch

SPREAD = (
    "Spread: of times, a 95 % interval of the ratio of medians, by bootstrap; of memory, from the least to the most."
)
PACKAGES = ("torch", "transformers", "sentence-transformers", "vlmembed")


@dataclass(frozen=True)
class Row:
    """One ratio.

    Args:
        work: What was done.
        ratio: Its value, and the ends of its spread.
        bound: Whether it should be at least or at most this.
        limit: The bound; None where none is set.
    """

    work: str
    ratio: tuple[float, float, float]
    bound: Literal["≥", "≤"]
    limit: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether it is as it should be; None where nothing was asked for."""
        if self.limit is None:
            return None
        return self.ratio[0] >= self.limit if self.bound == "≥" else self.ratio[0] <= self.limit

    def cells(self) -> tuple[str, ...]:
        value, low, high = self.ratio
        required = "" if self.limit is None else f"{self.bound} {self.limit:g}"
        return self.work, f"{value:.2f}", f"{low:.2f}–{high:.2f}", required, _answer(self.met)


@dataclass
class Report:
    """Everything that one run of the benchmark found.

    Args:
        setup: What was run, in sentences.
        rows: Ratios.
        details: Further tables: a heading, column names, lines.
    """

    setup: list[str]
    rows: list[Row] = field(default_factory=list)
    details: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = field(default_factory=dict)

    def add(self, heading: str, columns: tuple[str, ...], *lines: tuple[str, ...]) -> None:
        """Add lines to a further table."""
        self.details.setdefault(heading, (columns, []))[1].extend(lines)

    def markdown(self) -> str:
        summary = _table(("work", "ratio", "spread", "required", "met"), [row.cells() for row in self.rows])
        parts = ["# Step time and memory beside Sentence Transformers", *self.setup, SPREAD, summary]
        for heading, (columns, lines) in self.details.items():
            parts += [f"## {heading}", _table(columns, lines)]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, name: str) -> None:
        """Write a Markdown file, and a plot beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        text = f"{self.markdown()}\n![The ratios]({name}.svg)\n"
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        (folder / f"{name}.svg").write_text(_plot(self.rows), encoding="utf-8")


def machine() -> str:
    """Processor, cores, threads and versions."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{_processor()}, {threads}; Python {platform.python_version()}, {versions}."


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _answer(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "**no**"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *lines))


# The plot: a bar per ratio on a logarithmic axis from 1/4, its spread, and a line where it has to reach or to end.

LABELS, BARS, HEIGHT, MARGIN = 430, 420, 22, 30
FIRST, LAST = 0.25, 64
COLOURS = {True: "#4c9f70", False: "#c8553d", None: "#8a8f98"}


def _plot(rows: Sequence[Row]) -> str:
    height = 2 * MARGIN + HEIGHT * len(rows)
    parts = [_mark(2.0**power, MARGIN, height - MARGIN) for power in range(-2, 7)]
    parts += [line for index, row in enumerate(rows) for line in _bar(row, MARGIN + HEIGHT * index)]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABELS + BARS + 20}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        *parts,
        "</svg>\n",
    ])  # fmt: skip


def _x(value: float) -> float:
    value = min(max(value, FIRST), LAST)
    return LABELS + BARS * log2(value / FIRST) / log2(LAST / FIRST)


def _mark(value: float, top: float, bottom: float) -> str:
    x = _x(value)
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="#dddddd"/>'
        f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" fill="#666666">{value:g}×</text>'
    )


def _bar(row: Row, top: float) -> list[str]:
    value, low, high = row.ratio
    middle = top + HEIGHT / 2
    parts = [
        f'<text x="{LABELS - 8}" y="{middle + 4}" text-anchor="end">{escape(row.work)}</text>',
        f'<rect x="{LABELS}" y="{top + 4}" width="{_x(value) - LABELS:.1f}" height="{HEIGHT - 8}" '
        f'fill="{COLOURS[row.met]}"/>',
        f'<line x1="{_x(low):.1f}" x2="{_x(high):.1f}" y1="{middle}" y2="{middle}" stroke="black"/>',
        f'<text x="{_x(high) + 6:.1f}" y="{middle + 4}">{value:.2f}</text>',
    ]
    if row.limit is not None:
        x = _x(row.limit)
        ends = f'y1="{top + 1}" y2="{top + HEIGHT - 1}"'
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="black" stroke-width="2"/>')
    return parts
