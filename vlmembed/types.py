"""The vocabulary that every other file speaks.

Shape letters, used in every annotation of the package:

    B  items in a chunk          Q  queries                 H  hidden size of the backbone
    N  items in a batch          P  documents               D  embedding dimension
    L  tokens of an item         C  candidates of a query   K  layers a pooling reads
    M  judged pairs of a query and a document

An *item* is one thing to encode (a query or a document). An *example* is one training row. A *batch* holds each
distinct item of its examples once, cut into *chunks*; a chunk is what goes through the model in one forward pass.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from jaxtyping import Float, Int, Int8
from PIL.Image import Image
from torch import Tensor

Role = Literal["query", "document"]

#: What one forward pass takes: ``input_ids`` and ``attention_mask`` (B, L), and whatever else the backbone reads.
Inputs = dict[str, Tensor]


class LazyImage(ABC):
    """An image that is made when it is needed, in a loader worker, such as a page of a PDF; as a string, its name."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Equal for equal images of the same files."""

    @property
    @abstractmethod
    def content(self) -> str:
        """Equal for equal images, whatever their files are called; reads the files, and makes no image."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, known without making it; raises as `render` does."""

    @abstractmethod
    def render(self) -> Path:
        """Make the image if it is not there yet, and return its file; a ``ValueError`` says why that cannot be."""


#: An image: open, in a file, the content of a file (of a stream not copied), or made when it is needed.
Frame = Image | Path | bytes | memoryview | LazyImage

#: What a patch costs, in tokens, where the vision tower is trained: about half of a token's activations in Qwen3-VL.
PATCH_COST = 0.5


@dataclass(frozen=True)
class Part:
    """A piece of an item: a text, one image, one video (a file, or its frames in order), or one recording (audio)."""

    kind: Literal["text", "image", "video", "audio"]
    value: str | Frame | tuple[Frame, ...]

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The image, or the video's frames; nothing for a text, a video file or a recording."""
        if isinstance(self.value, tuple):
            return self.value
        return (self.value,) if self.kind == "image" and not isinstance(self.value, str) else ()

    @cached_property
    def digest(self) -> bytes:
        """Equal for equal content: of a file its path, of what is encoded the bytes, of open images the pixels."""
        hashed = hashlib.blake2b(self.kind.encode(), digest_size=16)
        for value in self.value if isinstance(self.value, tuple) else (self.value,):
            if isinstance(value, Image):
                hashed.update(f"\0pixels {value.mode} {value.size}".encode() + value.tobytes())
            elif isinstance(value, bytes | memoryview):
                hashed.update(f"\0bytes {len(value)} ".encode())
                hashed.update(value)
            elif isinstance(value, LazyImage):
                hashed.update(f"\0{type(value).__name__} {value.key}".encode())
            else:
                hashed.update(f"\0{type(value).__name__} {value}".encode())
        return hashed.digest()


@dataclass(frozen=True)
class Item:
    """One thing to encode: texts, images, videos and recordings, in the order in which the model reads them."""

    role: Role  # Decides the instruction, where the item has none of its own.
    parts: tuple[Part, ...]
    origin: str = field(default="", compare=False)  # For messages: ``train.jsonl, row 17, column 'positive'``.
    instruction: str | None = None  # What the model is told to do with it; empty for nothing, None for the backbone's.

    @cached_property
    def id(self) -> int:
        """A 63-bit number that is the same for equal content in equal roles and instructions, in every process."""
        hashed = hashlib.blake2b(self.role.encode(), digest_size=8)
        if self.instruction is not None:
            hashed.update(f"\0instruction {len(self.instruction)} {self.instruction}".encode())
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
    def instruction(self) -> str | None:
        """The query's: a pair has one."""
        return self.query.instruction

    @property
    def origin(self) -> str:
        """Where both came from."""
        return f"{self.query.origin} with {self.document.origin}"


@dataclass(frozen=True)
class Example:
    """One training row."""

    query: Item
    positives: tuple[Item, ...]
    negatives: tuple[Item, ...] = ()
    scores: tuple[float, ...] | None = None  # A teacher's, of the positives and then the negatives.
    labels: tuple[float, ...] | None = None  # How relevant each is, in the same order; None for 1 and 0.
    loss: str | None = None  # The name of the loss that its source is trained with; None for the module's own.

    @property
    def documents(self) -> tuple[Item, ...]:
        """The positives, and then the negatives: in the order of scores and labels."""
        return self.positives + self.negatives

    @property
    def grades(self) -> tuple[float, ...]:
        """The labels: 1 for a positive and 0 for a negative where the row has none."""
        return self.labels or (1.0,) * len(self.positives) + (0.0,) * len(self.negatives)


@dataclass(frozen=True)
class Chunking:
    """What a chunk has room for."""

    size: int | None = None  # Items of average cost, at least the most expensive one; None for all in one chunk.
    tokens: int | None = None  # Tokens instead, and so many patches for a chunk of images, where that was measured.
    patch_cost: float = PATCH_COST  # In tokens; 0 where the tower is frozen, and keeps no activations.

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"chunk_size is 1 or more, or null for a single chunk; got {self.size}.")

    def room(self, costs: Sequence[float]) -> int | None:
        """What a chunk may cost, given the costs of all items (or images); None for no limit."""
        if self.tokens is not None or self.size is None:
            return self.tokens
        return math.ceil(max(*costs, 1, self.size * sum(costs) / len(costs))) if costs else 1


class Preprocessor(ABC):
    """Turns items into model inputs, in data loader workers: it is pickled, and never holds weights."""

    @abstractmethod
    def __call__(self, items: Sequence[Item | Pair]) -> Inputs:
        """Preprocess B items, or pairs, into one padded chunk, images included; a ``ValueError`` names an origin."""

    @abstractmethod
    def cost(self, item: Item | Pair) -> int:
        """Estimate the tokens an item will take, cheaply: evaluation batches hold items of similar cost."""

    def prepare(self, items: Sequence[Item | Pair], draft: bool = False) -> Prepared:
        """Read N items or pairs; with ``draft``, large JPEGs may be decoded at less than their full size."""
        return Prepared(self, items)


class Prepared:
    """The N items of a batch, about to be cut into chunks."""

    #: Whether all items of a chunk cost as much as its longest.
    padded = True

    def __init__(self, preprocessor: Preprocessor, items: Sequence[Item | Pair]) -> None:
        self._preprocessor = preprocessor
        self._items = items

    @cached_property
    def lengths(self) -> list[int]:
        """(N,) the tokens of each item, as well as they are known."""
        return [self._preprocessor.cost(item) for item in self._items]

    @property
    def patches(self) -> list[int]:
        """(N,) the patches of each item's images, where the vision tower reads them in a pass of their own."""
        return [0] * len(self._items)

    @property
    def order(self) -> list[int]:
        """The items' rows: neighbours share a beginning or, where chunks are padded, the longest come first."""
        lengths = self.lengths
        return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)

    def shared(self, rows: Sequence[int]) -> list[int]:
        """Count, for each of some rows, the first tokens that a chunk of them takes from the row before."""
        return [0] * len(rows)

    def chunk(self, rows: Sequence[int]) -> Inputs:
        """Make one chunk of some of the items."""
        return self._preprocessor([self._items[row] for row in rows])

    def images(self, room: int | None) -> list[Inputs]:
        """Make chunks of the distinct images, of at most ``room`` patches; none where `chunk` holds the images."""
        return []


@dataclass(frozen=True)
class BadRow:
    """A training row that was left out of its batch."""

    row: int  # Its number over all sources, from 1 on.
    reason: str

    @classmethod
    def of(cls, index: int, error: ValueError) -> BadRow:
        """Make one of a row's number, from 0 on, and the beginning of a message that may quote what cannot be read."""
        return cls(index + 1, str(error)[:1000])


@dataclass
class _Chunks:
    """What a loader hands out, in chunks. The distinct images have chunks of their own, unless the items' hold them."""

    chunks: list[Inputs]
    images: list[Inputs]

    def to(self, device: object, **_: object) -> Self:
        """Stay on the host, where a trainer would move a batch: the encoder takes its chunks over one at a time."""
        return self

    def pin_memory(self) -> Self:
        """Lock all chunks in host memory, so that one is copied to the device while another computes."""
        for chunk in (*self.chunks, *self.images):
            chunk.update({name: tensor.pin_memory() for name, tensor in chunk.items()})
        return self


@dataclass
class Batch(_Chunks):
    """The N distinct items of some examples, ready to encode, and who belongs to whom.

    The chunks in order give embeddings (N, D). A document that several examples share is one column of the score
    matrix, so it can never be a negative of a query that it answers. Ids are `Item.id`, the same in every process.
    """

    queries: Int[Tensor, " Q"]  # The row of each query in the embeddings.
    documents: Int[Tensor, " P"]
    query_ids: Int[Tensor, " Q"]
    document_ids: Int[Tensor, " P"]
    pairs: Int[Tensor, "M 2"]  # Query id, document id.
    labels: Int8[Tensor, " M"]  # 1 for a positive, -1 for a hard negative.
    scores: Float[Tensor, " M"] | None = None  # A teacher's, where the loss distils them; or grades.
    origins: tuple[str, ...] = ()  # Where each row of the batch came from, for messages.
    bad_rows: tuple[BadRow, ...] = ()
    loss: str | None = None  # Of all its examples.


@dataclass
class RankingBatch(_Chunks):
    """The N distinct pairs of some examples, ready to score; pairs of one query are its candidates."""

    queries: Int[Tensor, " N"]  # Ids, as in `Batch`.
    documents: Int[Tensor, " N"]
    targets: Float[Tensor, " N"]  # What each score should say: a label, or a teacher's score.
    origins: tuple[str, ...] = ()
    bad_rows: tuple[BadRow, ...] = ()
    loss: str | None = None


@dataclass
class ItemBatch(_Chunks):
    """Items to encode for measuring or prediction, as one chunk; pairs to score are a `PairBatch`."""

    rows: Int[Tensor, " B"]  # Of the evaluation set: its queries first, then its corpus.

    @property
    def inputs(self) -> Inputs:
        """The chunk."""
        return self.chunks[0]


@dataclass
class PairBatch(_Chunks):
    """Pairs to score for measuring or prediction."""

    rows: Int[Tensor, "N 2"]  # The number of the query and of the document in the evaluation set.


@dataclass(frozen=True)
class EvaluationSet:
    """Queries, a corpus, and which of its documents answer which query."""

    name: str  # Used in metric names where a run has several sets.
    queries: Sequence[Item]
    corpus: Sequence[Item]
    query_names: Sequence[str]  # The data set's ids.
    document_names: Sequence[str]  # Equal scores are ranked by them.
    qrels: dict[str, dict[str, int]]  # Query name → document name → grade; above 0 is relevant.
    candidates: Sequence[Sequence[int]] | None = None  # The columns that each query is ranked against; None for all.
    subsets: Sequence[str] | None = None  # Of each query; metrics are then means over subsets. None for a single one.


@dataclass(frozen=True)
class RerankingSet:
    """An evaluation set, and the candidates that a first stage found for each query."""

    evaluation: EvaluationSet
    candidates: Sequence[Sequence[int]]  # For each query, columns of the corpus, the first stage's best first.

    @property
    def name(self) -> str:
        """The evaluation set's."""
        return self.evaluation.name
