"""Which of the documents that are most like a query are hard negatives of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from jaxtyping import Float
from torch import Tensor

from vlmembed.mining.pool import Pool

#: What the similarities of some queries with all documents may take.
TILE_BYTES = 256 * 2**20

Similarity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Choice:
    """How hard negatives are chosen among a query's candidates.

    Args:
        count: How many to take, the most similar first.
        depth: How many candidates to look at, besides right answers.
        skip: How many of those that may be taken to leave out, from the top.
        margin: How far below the right answer a negative's similarity must be.
        relative_margin: The same, as a share of the right answer's similarity.
        max_score: The largest similarity of a negative.
    """

    count: int
    depth: int
    skip: int
    margin: float | None
    relative_margin: float | None
    max_score: float | None

    def __post_init__(self) -> None:
        if min(self.count, self.depth) < 1 or self.skip < 0:
            raise ValueError(
                f"negatives and depth are 1 or more, skip is 0 or more; got {self.count}, {self.depth}, {self.skip}."
            )
        if self.depth < self.skip + self.count:
            raise ValueError(f"depth {self.depth} has no room for {self.skip} to skip and {self.count} to take.")
        for name in ("margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is 0 or more, or null; got {value}.")

    def ceiling(self, positive: float) -> float:
        """Return the largest similarity of a negative, given that of the right answer."""
        ceilings = [math.inf if self.max_score is None else self.max_score]
        if self.margin is not None:
            ceilings.append(positive - self.margin)
        if self.relative_margin is not None:
            # A share of the size, so that a similarity below zero gets a lower ceiling too.
            ceilings.append(positive - abs(positive) * self.relative_margin)
        return min(ceilings)


def hard_negatives(
    pool: Pool,
    queries: Float[Tensor, "Q D"],
    documents: Float[Tensor, "P D"],
    similarity: Similarity,
    choice: Choice,
) -> tuple[list[list[int]], Counter[str]]:
    """Choose the hard negatives of each query.

    Args:
        pool: What was embedded.
        queries: Its queries.
        documents: Its documents.
        similarity: The model's.
        choice: How to choose.

    Returns:
        Of each query, the numbers of its hard negatives; and how many candidates were left out, and why.
    """
    chosen: list[list[int]] = []
    reasons: Counter[str] = Counter()
    most = max(map(len, pool.answers))
    seen = min(pool.candidates, choice.depth + most)
    tile = max(1, TILE_BYTES // (4 * len(documents)))
    for some in queries.split(tile):
        similarities = similarity(some, documents)
        found = similarities[:, : pool.candidates].topk(seen)
        for row, scores, numbers in zip(similarities, found.values.tolist(), found.indices.tolist(), strict=True):
            query = len(chosen)
            # The least similar of them: a candidate above it would be ranked above a right answer.
            positive = float(row[[*pool.answers[query]]].min())
            wrong = (each for each in zip(numbers, scores, strict=True) if each[0] not in pool.answers[query])
            chosen.append(_choose(pool, query, islice(wrong, choice.depth), choice, choice.ceiling(positive), reasons))
    return chosen, reasons


def _choose(
    pool: Pool,
    query: int,
    ranked: Iterable[tuple[int, float]],
    choice: Choice,
    ceiling: float,
    reasons: Counter[str],
) -> list[int]:
    """Take what is neither too similar nor the same as a right answer, the query, or what was taken before."""
    contents, kept = pool.documents.contents, list[int]()
    shown = {contents[answer].pictures for answer in pool.answers[query]} - {""}
    for number, score in ranked:
        if contents[number].whole == pool.queries.contents[query].whole:
            reasons["the query itself"] += 1
        elif contents[number].pictures in shown:
            reasons["the same pictures as a right answer, or as a negative that was taken"] += 1
        elif score > ceiling:
            reasons["so similar that they may be right"] += 1
        else:
            kept.append(number)
            shown |= {contents[number].pictures} - {""}
        if len(kept) == choice.skip + choice.count:
            break
    return kept[choice.skip :]
