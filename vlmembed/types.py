"""The vocabulary that every other file speaks.

Shape letters, used in every annotation of the package:

    B  items in a chunk          Q  queries                 H  hidden size of the backbone
    N  items in a batch          P  documents               D  embedding dimension
    L  tokens of an item         C  candidates of a query   K  layers a pooling reads

An *item* is one thing to encode (a query or a document). An *example* is one training row. A *batch* holds each
distinct item of its examples once, cut into *chunks*; a chunk is what goes through the model in one forward pass.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from jaxtyping import Float, Int, Int8
from PIL.Image import Image
from torch import Tensor

__all__ = [
    "BadRow",
    "Batch",
    "EvaluationSet",
    "Example",
    "Frame",
    "Inputs",
    "Item",
    "ItemBatch",
    "Pair",
    "PairBatch",
    "Part",
    "Prepared",
    "Preprocessor",
    "RankingBatch",
    "RerankingSet",
    "Role",
]


Role = Literal["query", "document"]

#: What one forward pass takes: ``input_ids`` and ``attention_mask`` of shape (B, L), and whatever else the backbone
#: reads (``pixel_values``, ``image_grid_thw``, …).
Inputs = dict[str, Tensor]

Frame = Image | Path


@dataclass(frozen=True)
class Part:
    """A piece of an item: a text, one image, or one video (a file, or its frames in order)."""

    kind: Literal["text", "image", "video"]
    value: str | Frame | tuple[Frame, ...]

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The image, or the video's frames; nothing for a text or a video file."""
        if isinstance(self.value, tuple):
            return self.value
        return () if isinstance(self.value, str) or self.kind == "video" else (self.value,)

    @cached_property
    def digest(self) -> bytes:
        """The same for equal content. A file counts as its path, an image as its pixels."""
        hashed = hashlib.blake2b(self.kind.encode(), digest_size=16)
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        for value in values:
            if isinstance(value, Image):
                hashed.update(f"\0pixels {value.mode} {value.size}".encode())
                hashed.update(value.tobytes())
            else:
                hashed.update(f"\0{type(value).__name__} {value}".encode())
        return hashed.digest()


@dataclass(frozen=True)
class Item:
    """One thing to encode: any number of texts, images and videos, in order.

    Args:
        role: Whether the item asks or answers; decides the instruction it is encoded with.
        parts: The content, in the order in which the model reads it.
        origin: Where the item came from, for error messages: ``train.jsonl, row 17, column 'positive'``.
    """

    role: Role
    parts: tuple[Part, ...]
    origin: str = field(default="", compare=False)

    @cached_property
    def id(self) -> int:
        """A 63-bit number that is the same for equal content in equal roles, in every process."""
        hashed = hashlib.blake2b(self.role.encode(), digest_size=8)
        for part in self.parts:
            hashed.update(part.digest)
        return int.from_bytes(hashed.digest(), "big") >> 1


@dataclass(frozen=True)
class Pair:
    """A query and a document, to be read together by a cross-encoder."""

    query: Item
    document: Item

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content of both."""
        return self.query.parts + self.document.parts

    @property
    def origin(self) -> str:
        """Where the two came from, for error messages."""
        return f"{self.query.origin} with {self.document.origin}"


@dataclass(frozen=True)
class Example:
    """One training row.

    Args:
        query: What is asked.
        positives: The right answers, at least one.
        negatives: Wrong answers chosen on purpose (hard negatives).
        scores: Teacher scores for distillation, one per positive and then per negative.
        labels: How relevant each of them is, in the same order; None for 1 and 0.
    """

    query: Item
    positives: tuple[Item, ...]
    negatives: tuple[Item, ...] = ()
    scores: tuple[float, ...] | None = None
    labels: tuple[float, ...] | None = None

    @property
    def documents(self) -> tuple[Item, ...]:
        """The right answers, and then the wrong ones: in the order of scores and labels."""
        return self.positives + self.negatives


class Preprocessor(ABC):
    """Turns items into model inputs. Runs in data loader workers: it is pickled, and never holds weights."""

    @abstractmethod
    def __call__(self, items: Sequence[Item | Pair]) -> Inputs:
        """Preprocess items into one padded chunk, images included.

        Args:
            items: B items, roles mixed as they come; or B pairs.

        Raises:
            ValueError: If an item cannot be read or would be cut in a harmful way; the message names its origin.
        """

    @abstractmethod
    def cost(self, item: Item | Pair) -> int:
        """Estimate the tokens an item will take, cheaply: items of similar cost share a chunk."""

    def prepare(self, items: Sequence[Item | Pair], draft: bool = False) -> Prepared:
        """Read the items of a batch, before it is decided which of them share a chunk.

        Args:
            items: N items, or N pairs.
            draft: Whether large images may be decoded at less than their full size where that changes little.
        """
        return Prepared(self, items)


class Prepared:
    """The items of a batch, about to be cut into chunks.

    Args:
        preprocessor: Makes the chunks.
        items: N items, or N pairs.
    """

    def __init__(self, preprocessor: Preprocessor, items: Sequence[Item | Pair]) -> None:
        self._preprocessor = preprocessor
        self._items = items

    @property
    def lengths(self) -> list[int]:
        """(N,) the tokens of each item, as well as they are known."""
        return [self._preprocessor.cost(item) for item in self._items]

    @property
    def patches(self) -> list[int]:
        """(N,) the patches that the vision tower reads of each item, where it reads them apart."""
        return [0] * len(self._items)

    @property
    def order(self) -> list[int]:
        """The items' rows, so that neighbours share a beginning, or are of similar length."""
        return sorted(range(len(self._items)), key=self.lengths.__getitem__, reverse=True)

    def shared(self, rows: Sequence[int]) -> list[int]:
        """Count, for each of some rows, the first tokens that a chunk of them takes from the row before."""
        return [0] * len(rows)

    def chunk(self, rows: Sequence[int]) -> Inputs:
        """Make one chunk of some of the items."""
        return self._preprocessor([self._items[row] for row in rows])

    def images(self, room: int | None) -> list[Inputs]:
        """Make chunks of the distinct images.

        Args:
            room: The most patches of a chunk; None for no limit.

        Returns:
            Nothing where `chunk` holds the images.
        """
        return []


PATCH_COST = 0.5


@dataclass(frozen=True)
class Chunking:
    size: int | None = None
    tokens: int | None = None
    patch_cost: float = PATCH_COST


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


@dataclass(frozen=True)
class EvaluationSet:
    """Queries, a corpus, and which of its documents answer which query.

    Args:
        name: Used in metric names where a run has several sets.
        queries: The queries to measure.
        corpus: Every document that a query is ranked against.
        query_names: The data set's own query ids, in the order of ``queries``.
        document_names: The data set's own document ids, in the order of ``corpus``; equal scores are ranked by them.
        qrels: query name → document name → grade; above 0 is relevant.
    """

    name: str
    queries: Sequence[Item]
    corpus: Sequence[Item]
    query_names: Sequence[str]
    document_names: Sequence[str]
    qrels: dict[str, dict[str, int]]


@dataclass(frozen=True)
class RerankingSet:
    """An evaluation set, and the candidates that a first stage found for each of its queries.

    Args:
        evaluation: The queries, the corpus and the judgements.
        candidates: For each query, columns of the corpus, the first stage's best first.
    """

    evaluation: EvaluationSet
    candidates: Sequence[Sequence[int]]

    @property
    def name(self) -> str:
        """That of the evaluation set."""
        return self.evaluation.name
