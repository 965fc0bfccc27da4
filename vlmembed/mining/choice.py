"""How hard negatives are chosen among the candidates of a query."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from vlmembed.mining.embedding import DistinctItems


@dataclass(frozen=True)
class Choice:
    """How hard negatives are chosen among a query's candidates; see the arguments of `mine`."""

    count: int
    depth: int
    skip: int
    margin: float | None
    relative_margin: float | None
    max_score: float | None

    def __post_init__(self) -> None:
        if self.count < 1 or self.skip < 0 or self.depth < self.skip + self.count:
            raise ValueError(
                f"negatives is 1 or more, skip 0 or more, and depth at least both together; got {self.count}, "
                f"{self.skip} and {self.depth}."
            )
        for name in ("margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is 0 or more, or null; got {value}.")

    def ceiling(self, positive: float) -> float:
        """Return the largest similarity of a negative, given that of the positive."""
        limits = [math.inf if self.max_score is None else self.max_score]
        if self.margin is not None:
            limits.append(positive - self.margin)
        if self.relative_margin is not None:
            # A share of the size, so that a similarity below zero gets a lower ceiling too.
            limits.append(positive - abs(positive) * self.relative_margin)
        return min(limits)


@dataclass
class Pool:
    """What is mined: distinct queries and documents, each by what identifies its content."""

    queries: DistinctItems = field(default_factory=dict)  #: Their instructions, where they have some, are behind it.
    documents: DistinctItems = field(default_factory=dict)  #: The candidates, and then positives that are none.
    candidates: int = 0
    positives: dict[str, set[str]] = field(default_factory=dict)  #: Of each query, those of all rows that ask it.
    rows: list[tuple[str, set[str]]] = field(default_factory=list)  #: The query of each row, and its own negatives.


def choose(
    pool: Pool, query: str, ceiling: float, candidates: Iterable[tuple[float, str, str]], choice: Choice
) -> tuple[list[str], Counter[str]]:
    """Choose hard negatives of a query among candidates, and count those that are left out, by reason.

    A candidate is its similarity, its content and its images; the most similar is first, and no positive among them.
    """
    taken, reasons = list[str](), Counter[str]()
    shown = {pool.documents[content].images for content in pool.positives[query]}
    for score, content, images in candidates:
        if query.partition(" ")[0] == content:
            reasons["the query itself"] += 1
        elif images and images in shown:
            reasons["the same images as a positive, or as a negative that was taken"] += 1
        elif score > ceiling:
            reasons["so similar that they may be positives"] += 1
        else:
            taken.append(content)
            shown.add(images)
        if len(taken) == choice.skip + choice.count:
            break
    return taken[choice.skip :], reasons
