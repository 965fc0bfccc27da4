"""Items, and the rows that they come in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from PIL.Image import Image
from torch import Tensor

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
