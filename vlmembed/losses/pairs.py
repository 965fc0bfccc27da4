"""The (query, positive) pairs of a batch, and what a contrastive loss compares each with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from vlmembed.losses.truncations import Truncations

Direction = Literal["query_to_document", "document_to_query", "query_to_query", "document_to_document"]
Negatives = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]

#: The directions whose candidates include the positive pair itself.
CROSS_DIRECTIONS = frozenset(("query_to_document", "document_to_query"))


@dataclass(frozen=True)
class Judgements:
    """Who answers whom in a batch, as a matrix and as lists.

    Args:
        relevance: See ``Loss.forward``.
        positives: Number of each query's positives.
        answer_count: How many 1 there are in ``relevance``.
        judged_count: How many numbers other than 0.
    """

    relevance: Int8[Tensor, "Q P"]
    positives: Int[Tensor, " Q"]
    answer_count: int
    judged_count: int

    @classmethod
    def of(cls, relevance: Int8[Tensor, "Q P"], device: torch.device) -> Judgements:
        """Count the judgements of a batch.

        Args:
            relevance: On any device: where it is on the host, another device is never waited for.
            device: Where to keep them.

        Raises:
            ValueError: If a query has no positive.
        """
        positives = (relevance == 1).sum(1)
        # A question to a GPU waits for all work before it, so there is one, for all that the host must know.
        fewest, answers, judged = torch.stack([positives.min(), positives.sum(), relevance.count_nonzero()]).tolist()
        if fewest == 0:
            missing = (positives == 0).nonzero()[:, 0].tolist()
            raise ValueError(f"every query needs a positive; relevance has no 1 in rows {missing}")
        return cls(relevance.to(device, non_blocking=True), positives.to(device, non_blocking=True), answers, judged)

    @cached_property
    def answers(self) -> Int[Tensor, "2 A"]:
        """Row and column of every 1 in ``relevance``, row by row."""
        return (self.relevance == 1).nonzero_static(size=self.answer_count).T

    @cached_property
    def judged(self) -> Int[Tensor, "2 J"]:
        """Row and column of every number other than 0 in it."""
        return self.relevance.nonzero_static(size=self.judged_count).T


@dataclass(frozen=True)
class Pairs:
    """M pairs of a query and one of its positives, and what each is compared with, at T dimensions.

    Args:
        queries: All Q queries of the batch.
        documents: All P documents of the batch.
        judgements: Of the batch.
        rows: Each pair's row in ``queries`` and in ``documents``.
    """

    queries: Truncations
    documents: Truncations
    judgements: Judgements
    rows: Int[Tensor, "2 M"]

    @property
    def query(self) -> Int[Tensor, " M"]:
        """The pair's row in ``queries``."""
        return self.rows[0]

    @property
    def document(self) -> Int[Tensor, " M"]:
        """The pair's row in ``documents``."""
        return self.rows[1]

    @cached_property
    def similarity(self) -> Float[Tensor, "T M"]:
        """Cosine of the pair's query and document."""
        return self._own["query"].paired_cosines(self._own["document"])

    @property
    def weight(self) -> Float[Tensor, " M"]:
        """The pair's share in a mean over queries of means over positives."""
        positives = self.judgements.positives
        return 1 / (positives[self.query] * len(positives)).float()

    def similarities(self, directions: Sequence[Direction]) -> dict[Direction, Float[Tensor, "T M _"]]:
        """Compare each pair's query or document with every candidate, for each direction."""
        everything = {"query": self.queries, "document": self.documents}
        found: dict[Direction, Tensor] = {}
        # From a query to documents first: where each query is in one pair, the way back needs no further product.
        for direction in sorted(directions, reverse=True):
            if direction == "document_to_query" and "query_to_document" in found and self._each_query_once:
                found[direction] = found["query_to_document"].mT[:, self.document]
            else:
                source, target = direction.split("_to_")
                found[direction] = self._own[source].cosines(everything[target])
        return found

    def negatives(self, direction: Direction) -> Bool[Tensor, "M C"]:
        """Which candidates of a direction are negatives of the pair."""
        relevance = self.judgements.relevance
        if direction == "query_to_document":
            return relevance[self.query] != 1
        if direction == "document_to_query":
            return relevance.T[self.document] != 1
        if direction == "query_to_query":
            return ~_reach(relevance[self.query] == 1, self.judgements.answers.flip(0), len(relevance))
        return ~_reach(relevance.T[self.document] != 0, self.judgements.judged, relevance.shape[1])

    def query_negatives(self, kind: Negatives) -> Bool[Tensor, "M P"]:
        """Which documents are negatives of a kind for the pair's query."""
        judged = self.judgements.relevance[self.query]
        return {"in_batch_negatives": judged == 0, "hard_negatives": judged == -1, "all_negatives": judged != 1}[kind]

    @cached_property
    def _own(self) -> dict[str, Truncations]:
        return {"query": self.queries[self.query], "document": self.documents[self.document]}

    @property
    def _each_query_once(self) -> bool:
        # Each has a pair; with as many pairs as queries, pairs are in the order of queries.
        return self.judgements.answer_count == self.rows.shape[1] == len(self.judgements.relevance)


def _reach(start: Bool[Tensor, "M N"], links: Int[Tensor, "2 L"], size: int) -> Bool[Tensor, "M C"]:
    """Where each row of ``start`` gets to over one of the links from N to C things, C being ``size``."""
    source, target = links
    counts = torch.zeros(size, len(start), dtype=torch.int32, device=start.device)
    return counts.index_add_(0, target, start.T[source].int()).T > 0
