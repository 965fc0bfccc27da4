"""The two kinds of loss, of embeddings and of scores, and what their families share: similarities, and checks.

Similarities are cosines of single vectors or MaxSim of several, and losses are written for both. They are computed in
at least float32, of unit vectors, whatever the precision around them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlmembed.late_interaction import MultiVectors, Vectors, at_least_float32, maxsim


@dataclass(frozen=True)
class LabelSpec:
    """What a loss needs to know of each candidate of a query."""

    teacher_scores: bool = False  # A teacher's scores instead of labels.
    largest: float = math.inf  # The largest label that has a meaning; the smallest is 0.
    needs_positive: bool = False  # For each query a candidate with a label above 0.
    needs_several: bool = False  # For each query at least two candidates.
    grades: bool = False  # Of an embedder's loss: a teacher's scores or, where a row has none, its labels.
    needs_negative: bool = False  # Of an embedder's loss: in each row a negative.

    @property
    def scores(self) -> bool:
        """Whether an embedder's loss is given ``scores``."""
        return self.teacher_scores or self.grades


class Loss(nn.Module, ABC):
    """An embedder's loss: a number to minimise, from the embeddings of a batch and their relevance to each other.

    A loss sees the whole batch, of all processes together, and knows nothing of how the embeddings were made.
    """

    #: Truncated embedding dimensions that it trains, and that are therefore worth measuring as well.
    dimensions: tuple[int, ...] = ()
    #: How many times fewer vectors an item may have, where it has several; 1 for all of them.
    merging_factors: tuple[int, ...] = ()
    #: What it needs to know of each row; the collator checks it, and names the row.
    label_spec: LabelSpec = LabelSpec()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if old := [name for name in vars(cls) if name in ("wants_scores", "wants_grades", "wants_negatives")]:
            raise TypeError(f"{cls.__name__}.{old[0]} is not read any more: set label_spec, a LabelSpec.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Loss:
        # Follow to a device, never to another precision: a learnable temperature's steps round to nothing in bfloat16.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)

    @abstractmethod
    def forward(
        self,
        queries: Vectors,
        documents: Vectors,
        relevance: Int8[Tensor, "Q P"],
        scores: Float[Tensor, "Q P"] | None = None,
    ) -> Float[Tensor, ""]:
        """Compute the loss.

        Args:
            queries: Embeddings (Q, D), or the vectors of each query, as the model made them: any float type, not
                normalised. `compare` makes similarities of them.
            documents: The same for the P documents; each distinct document of the batch is there once.
            relevance: 1 where the document is a positive of the query, -1 where it is a hard negative of that query, 0
                where the pair is not judged (another query's document). On the host in training, whatever the device.
            scores: A teacher's, or grades, NaN where there is none. None, and may be left out, unless the loss's
                ``label_spec`` asks for them.
        """


class RankingLoss(nn.Module, ABC):
    """A cross-encoder's loss: a number to minimise, from the scores of some queries' candidates."""

    #: What it needs to know of each candidate; the collator checks it, and names the row.
    label_spec: ClassVar[LabelSpec] = LabelSpec()

    @abstractmethod
    def forward(self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]) -> Tensor:
        """Compute the loss.

        Args:
            scores: Logits as the model made them; anything where the mask is false.
            targets: A label or a teacher's score of each candidate; anything where the mask is false.
            mask: True where there is a candidate: queries may have different numbers of them, at least one each.
        """


def masked(values: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"], fill: float = 0.0) -> Float[Tensor, "Q C"]:
    """Return values in at least float32, with ``fill`` where the mask is false."""
    # Filled, not multiplied by zero: padding may be NaN, and its gradient must still be zero.
    return values.to(torch.promote_types(values.dtype, torch.float32)).masked_fill(~mask, fill)


def masked_log_softmax(logits: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"], temperature: float = 1.0) -> Tensor:
    """Return the log-softmax of logits / temperature over each query's candidates; 0 where the mask is false."""
    return (masked(logits, mask, -math.inf) / temperature).log_softmax(1).masked_fill(~mask, 0.0)


def check_positive(**arguments: float) -> None:
    """Refuse arguments that are not above 0 and finite, naming the first."""
    for name, value in arguments.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {value}")


def compare(queries: Vectors, documents: Vectors, directions: Sequence[str] = ("query_to_document",)) -> Similarity:
    """Return the similarities of a batch. ``directions``, as `InfoNCE` names them, are those whose rows are wanted."""
    queries, documents = at_least_float32(queries), at_least_float32(documents)
    if isinstance(queries, MultiVectors) and isinstance(documents, MultiVectors):
        return MaxSimilarity(queries, documents, directions)
    if isinstance(queries, MultiVectors) or isinstance(documents, MultiVectors):
        raise TypeError("Queries and documents have one vector each, or several each; not one the other.")
    return Similarity(queries, documents)


class Similarity:
    """Cosines of Q queries and P documents, computed when asked for: a large batch never has all of them at once."""

    def __init__(self, queries: Float[Tensor, "Q D"], documents: Float[Tensor, "P D"]) -> None:
        self.sides = {"query": normalize(queries), "document": normalize(documents)}

    @property
    def matrix(self) -> Float[Tensor, "Q P"]:
        """Of each query with each document."""
        return self.sides["query"] @ self.sides["document"].T

    def pairs(self, query: Int[Tensor, " R"], document: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
        """Of some queries, each with one document."""
        # Selected by index, whose gradient adds up; indexing would wait for the device.
        return (self.sides["query"].index_select(0, query) * self.sides["document"].index_select(0, document)).sum(1)

    def rows(self, direction: str, query: Int[Tensor, " R"], document: Int[Tensor, " R"]) -> Float[Tensor, "R C"]:
        """Of each pair's query, or document, with all C queries or documents: ``query_to_document`` and so on."""
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
