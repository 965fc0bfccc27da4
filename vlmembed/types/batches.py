"""What travels from loader workers to the model."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int, Int8
from torch import Tensor

from vlmembed.types.items import Inputs


@dataclass(frozen=True)
class BadRow:
    """A training row that was left out of its batch, because it cannot be used.

    Args:
        row: Its number among all training rows, from 1 on, in the order of their sources.
        reason: What is wrong with it; names the file and the row in it.
    """

    row: int
    reason: str


@dataclass
class Batch:
    """The distinct items of some examples, ready to encode, and who belongs to whom.

    A document that several examples share is encoded once and is one column of the score matrix, so it can never be
    a negative of a query that it answers. An image that several items share is seen once.

    Args:
        chunks: The items, N in all. Encoding the chunks in order and concatenating gives embeddings (N, D).
        images: The distinct images and videos of all items, in chunks of their own; empty for a backbone that takes
            pixels together with the text.
        queries: (Q,) row of each query in those embeddings.
        documents: (P,) row of each document in those embeddings.
        query_ids: (Q,) ``Item.id`` of each query, so that processes can compare theirs.
        document_ids: (P,) ``Item.id`` of each document.
        pairs: (M, 2) judged pairs, as ``(query id, document id)``.
        labels: (M,) 1 where the pair's document is a right answer, -1 where it is a hard negative.
        scores: (M,) a teacher's scores, where the loss distils them.
        origins: Where each row of the batch came from, for messages.
        bad_rows: The rows that were left out.
    """

    chunks: list[Inputs]
    images: list[Inputs]
    queries: Int[Tensor, " Q"]
    documents: Int[Tensor, " P"]
    query_ids: Int[Tensor, " Q"]
    document_ids: Int[Tensor, " P"]
    pairs: Int[Tensor, "M 2"]
    labels: Int8[Tensor, " M"]
    scores: Float[Tensor, " M"] | None = None
    origins: tuple[str, ...] = ()
    bad_rows: tuple[BadRow, ...] = ()

    def pin_memory(self) -> Batch:
        """Lock the chunks in host memory, so that each is copied to the device while the one before it computes."""
        self.chunks, self.images = _pinned(self.chunks), _pinned(self.images)
        return self


@dataclass
class ItemBatch:
    """Items to encode for measuring or prediction.

    Args:
        inputs: The items, as one chunk.
        images: Their distinct images; see ``Batch.images``.
        rows: (B,) their row numbers in the evaluation set: its queries first, then its corpus.
    """

    inputs: Inputs
    images: list[Inputs]
    rows: Int[Tensor, " B"]

    def pin_memory(self) -> ItemBatch:
        """See ``Batch.pin_memory``."""
        (self.inputs,), self.images = _pinned([self.inputs]), _pinned(self.images)
        return self


@dataclass
class RankingBatch:
    """The distinct pairs of some examples, ready to score.

    Args:
        chunks: The pairs, N in all. Scoring the chunks in order and concatenating gives scores (N,).
        images: The distinct images; see ``Batch.images``.
        queries: (N,) ``Item.id`` of each pair's query: pairs of one query are its candidates.
        documents: (N,) ``Item.id`` of each pair's document, so that processes can compare theirs.
        targets: (N,) what each pair's score should say: a label, or a teacher's score.
        origins: Where each row of the batch came from, for messages.
        bad_rows: The rows that were left out.
    """

    chunks: list[Inputs]
    images: list[Inputs]
    queries: Int[Tensor, " N"]
    documents: Int[Tensor, " N"]
    targets: Float[Tensor, " N"]
    origins: tuple[str, ...] = ()
    bad_rows: tuple[BadRow, ...] = ()

    def pin_memory(self) -> RankingBatch:
        """See ``Batch.pin_memory``."""
        self.chunks, self.images = _pinned(self.chunks), _pinned(self.images)
        return self


@dataclass
class PairBatch:
    """Pairs to score for measuring or prediction.

    Args:
        chunks: The pairs, N in all.
        images: The distinct images of all chunks; see ``Batch.images``.
        rows: (N, 2) of each pair, the number of its query and of its document in the evaluation set.
    """

    chunks: list[Inputs]
    images: list[Inputs]
    rows: Int[Tensor, "N 2"]

    def pin_memory(self) -> PairBatch:
        """See ``Batch.pin_memory``."""
        self.chunks, self.images = _pinned(self.chunks), _pinned(self.images)
        return self


def _pinned(chunks: list[Inputs]) -> list[Inputs]:
    return [{name: tensor.pin_memory() for name, tensor in chunk.items()} for chunk in chunks]
