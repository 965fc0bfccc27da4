"""Several sources as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from vlmembed.data.sources import Source, read
from vlmembed.types import Example


class Mixture(Source):
    """Several sources, each with its share of every epoch.

    An epoch is as many rows as the sources have together; a source with more than its natural share repeats rows within
    it, one with less shows another random part of its rows each epoch.

    Args:
        sources: What to mix.
        weights: Shares of the sources, in their order, in any unit. Null for shares by size.
        alpha: Without weights, shares are proportional to size to this power: 1 keeps the natural shares, 0 makes them
            equal, values between favour small sources (multilingual BERT used 0.7, XLM-R 0.3).
        one_source_batches: Whether every batch, over all processes, holds rows of a single source, so that negatives in
            the batch are of the same kind as the positives.
    """

    def __init__(
        self,
        sources: list[Source],
        weights: list[float] | None = None,
        alpha: float = 1.0,
        one_source_batches: bool = False,
    ):
        _check_mixture(sources, weights, alpha)
        self.sources = sources
        self.weights = weights
        self.alpha = alpha
        self.one_source_batches = one_source_batches

    @property
    def name(self) -> str:
        """The names of the sources."""
        return " + ".join(source.name for source in self.sources)

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Example:
        return read(*self._locate(index))

    def query_id(self, index: int) -> int:
        """See ``Source.query_id``."""
        source, row = self._locate(index)
        return source.query_id(row)

    @property
    def offsets(self) -> list[int]:
        """The index of each source's first row, and the number of rows."""
        return [0, *accumulate(map(len, self.sources))]

    def apportion(self, count: int) -> list[int]:
        """Divide a number of rows (or batches) among the sources by their shares, largest remainders first.

        Raises:
            ValueError: If a source gets none, so that it would never be seen.
        """
        given = np.array(self.weights or [len(source) ** self.alpha for source in self.sources], dtype=float)
        exact = given / given.sum() * count
        parts = np.floor(exact).astype(int)
        for source in np.argsort(parts - exact, kind="stable")[: count - parts.sum()]:
            parts[source] += 1
        if not parts.all():
            which = self.sources[int(parts.argmin())].name
            raise ValueError(
                f"Source {which!r} gets none of the {count} rows or batches of an epoch; raise its weight."
            )
        return parts.tolist()

    def _locate(self, index: int) -> tuple[Source, int]:
        offsets = self.offsets
        if not 0 <= index < offsets[-1]:
            raise IndexError(f"row {index} of {offsets[-1]}")
        source = bisect_right(offsets, index) - 1
        return self.sources[source], index - offsets[source]


def _check_mixture(sources: Sequence[Source], weights: Sequence[float] | None, alpha: float) -> None:
    if not sources:
        raise ValueError("A mixture needs at least one source.")
    if any(isinstance(source, Mixture) for source in sources):
        raise ValueError("A mixture inside a mixture would lose its shares; list all sources in one.")
    if weights is not None and alpha != 1.0:
        raise ValueError(f"Give weights or alpha, not both: weights is {weights}, alpha is {alpha}.")
    if weights is not None and (len(weights) != len(sources) or not all(0 < weight < np.inf for weight in weights)):
        raise ValueError(f"weights needs one number above 0 for each of the {len(sources)} sources, got {weights}.")
    if not 0 <= alpha < np.inf:
        raise ValueError(f"alpha is 0 or more, got {alpha}.")
