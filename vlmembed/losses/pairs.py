"""The (query, positive) pairs of a batch, and what a contrastive loss compares each with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

Direction = Literal["query_to_document", "document_to_query", "query_to_query", "document_to_document"]
Negatives = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]

#: The directions whose candidates include the positive pair itself.
CROSS_DIRECTIONS = frozenset(("query_to_document", "document_to_query"))


@dataclass(frozen=True)
class Pairs:
    """The M pairs of a query and one of its positives, and what each is compared with.

    Args:
        queries: Unit vectors.
        documents: Unit vectors.
        relevance: See ``Loss.forward``.
        similarities: Cosine of every query with every document.
        query: The pair's row in ``queries``.
        document: The pair's row in ``documents``.
    """

    queries: Float[Tensor, "Q D"]
    documents: Float[Tensor, "P D"]
    relevance: Int8[Tensor, "Q P"]
    similarities: Float[Tensor, "Q P"]
    query: Int[Tensor, " M"]
    document: Int[Tensor, " M"]

    @classmethod
    def of(cls, queries: Tensor, documents: Tensor, relevance: Tensor) -> Pairs:
        """List the pairs of a batch."""
        query, document = (relevance == 1).nonzero(as_tuple=True)
        return cls(queries, documents, relevance, queries @ documents.T, query, document)

    @cached_property
    def similarity(self) -> Float[Tensor, " M"]:
        """Cosine of the pair's query and document."""
        return self.similarities[self.query, self.document]

    @property
    def weight(self) -> Float[Tensor, " M"]:
        """The pair's share in a mean over queries of means over positives."""
        positives = (self.relevance == 1).sum(1)[self.query]
        return 1 / (positives * len(self.queries)).float()

    def negatives(self, kind: Negatives) -> Bool[Tensor, "M P"]:
        """Which documents are negatives of this kind for the pair's query."""
        judged = self.relevance[self.query]
        return {"in_batch_negatives": judged == 0, "hard_negatives": judged == -1, "all_negatives": judged != 1}[kind]

    def candidates(self, direction: Direction) -> tuple[Float[Tensor, "M C"], Bool[Tensor, "M C"]]:
        """Each pair's similarity to the candidates of a direction, and which of them are negatives."""
        if direction == "query_to_document":
            return self.similarities[self.query], self.negatives("all_negatives")
        if direction == "document_to_query":
            return self.similarities.T[self.document], (self.relevance != 1).T[self.document]
        if direction == "query_to_query":
            positive = (self.relevance == 1).float()
            return (self.queries @ self.queries.T)[self.query], (positive @ positive.T == 0)[self.query]
        judged = (self.relevance != 0).float()
        return self.documents[self.document] @ self.documents.T, judged.T[self.document] @ judged == 0
