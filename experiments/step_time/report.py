"""What was measured, as Markdown and as a plot."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

SPREAD = (
    "Spread: of times, a 95 % interval of the ratio of medians, by bootstrap; of memory, from the least to the most."
)
PACKAGES = ("torch", "transformers", "sentence-transformers", "vlmembed")
#: The ends of the plot's axis, and the colours of its bars, by whether a ratio is as it should be.
FIRST, LAST = 0.25, 64
COLOURS = {True: "#4c9f70", False: "#c8553d", None: "#8a8f98"}


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
        _plot(self.rows, folder / f"{name}.svg")


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


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Draw a bar per ratio on a logarithmic axis, its spread, and a line where it has to reach or to end."""
    figure = Figure(figsize=(11, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    values, low, high = np.array([row.ratio for row in rows]).T
    axes.barh(
        places,
        values - FIRST,
        left=FIRST,
        xerr=[values - low, high - values],
        color=[COLOURS[row.met] for row in rows],
    )
    for place, row in zip(places, rows, strict=True):
        axes.text(row.ratio[2], place, f"  {row.ratio[0]:.2f}", verticalalignment="center")
        if row.limit is not None:
            axes.plot([row.limit] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_xlim(FIRST, LAST)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_yticks(places, [row.work for row in rows])
    axes.invert_yaxis()
    figure.savefig(path)
