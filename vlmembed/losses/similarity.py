"""Similarities of queries and documents: cosines of single vectors, MaxSim of several. Losses are written for both.

Similarities are computed in at least float32, of unit vectors, whatever the precision around them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vlmembed.late_interaction import MultiVectors, Vectors, at_least_float32, maxsim


def compare(queries: Vectors, documents: Vectors, directions: Sequence[str] = ("query_to_document",)) -> Similarity:
    """Return the similarities of a batch. ``directions``, as `InfoNCE` names them, are those whose rows are wanted."""
    queries, documents = at_least_float32(queries), at_least_float32(documents)
    if isinstance(queries, MultiVectors) and isinstance(documents, MultiVectors):
        return MaxSimilarity(queries, documents, directions)
    if isinstance(queries, MultiVectors) or isinstance(documents, MultiVectors):
        raise TypeError("Queries and documents have one vector each, or several each; not one the other.")
    return CosineSimilarity(queries, documents)


class Similarity(ABC):
    """The similarities of Q queries and P documents to each other."""

    @property
    @abstractmethod
    def matrix(self) -> Float[Tensor, "Q P"]:
        """Of each query with each document."""

    @abstractmethod
    def pairs(self, query: Int[Tensor, " R"], document: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
        """Of some queries, each with one document."""

    @abstractmethod
    def rows(self, direction: str, query: Int[Tensor, " R"], document: Int[Tensor, " R"]) -> Float[Tensor, "R C"]:
        """Of each pair's query, or document, with all C queries or documents: ``query_to_document`` and so on."""


class CosineSimilarity(Similarity):
    """Cosines, computed when they are asked for: a large batch never has all of them at once."""

    def __init__(self, queries: Float[Tensor, "Q D"], documents: Float[Tensor, "P D"]) -> None:
        self.sides = {"query": normalize(queries), "document": normalize(documents)}

    @property
    def matrix(self) -> Float[Tensor, "Q P"]:
        return self.sides["query"] @ self.sides["document"].T

    def pairs(self, query: Int[Tensor, " R"], document: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
        # Selected by index, whose gradient adds up; indexing would wait for the device.
        return (self.sides["query"].index_select(0, query) * self.sides["document"].index_select(0, document)).sum(1)

    def rows(self, direction: str, query: Int[Tensor, " R"], document: Int[Tensor, " R"]) -> Float[Tensor, "R C"]:
        source, target = direction.split("_to_")
        index = query if source == "query" else document
        return self.sides[source].index_select(0, index) @ self.sides[target].T


class MaxSimilarity(Similarity):
    """MaxSim, all of it computed at once: it costs more than the rows that are taken out of it."""

    def __init__(self, queries: MultiVectors, documents: MultiVectors, directions: Sequence[str]) -> None:
        sides = {"query": queries, "document": documents}
        matrix = maxsim(queries, documents)
        # A document's similarities with all queries are a column: the query's vectors look for theirs in both cases.
        self._rows = {"query_to_document": matrix, "document_to_query": matrix.T}
        for direction in set(directions) - set(self._rows):
            source, target = direction.split("_to_")
            self._rows[direction] = maxsim(sides[source], sides[target])

    @property
    def matrix(self) -> Float[Tensor, "Q P"]:
        return self._rows["query_to_document"]

    def pairs(self, query: Int[Tensor, " R"], document: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
        return self.matrix[query, document]

    def rows(self, direction: str, query: Int[Tensor, " R"], document: Int[Tensor, " R"]) -> Float[Tensor, "R C"]:
        return self._rows[direction].index_select(0, query if direction.startswith("query") else document)
