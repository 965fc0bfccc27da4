"""The items and pairs that an export is verified with: one of each kind that users will encode or score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlmembed.types import Item, Pair, Part, Role

LONG_TEXT_WORDS = 400


@dataclass(frozen=True)
class Probe:
    """One input, in our terms and in those of Sentence Transformers."""

    name: str
    parts: tuple[Part, ...]

    def item(self, role: Role) -> Item:
        """Return the input as an item."""
        return Item(role, self.parts, origin=f"export probe {self.name!r}")

    def description(self) -> str | dict[str, list[str]]:
        """Return the input as JSON, images as paths; Sentence Transformers takes it once those are opened."""
        if [part.kind for part in self.parts] == ["text"]:
            return str(self.parts[0].value)
        content: dict[str, list[str]] = {}
        for part in self.parts:
            content.setdefault(part.kind, []).extend(map(str, part.frames or (part.value,)))
        return content


@dataclass(frozen=True)
class PairProbe:
    """A query and a document, in our terms and in those of Sentence Transformers."""

    query: Probe
    document: Probe

    @property
    def name(self) -> str:
        """What they are."""
        return f"{self.query.name} – {self.document.name}"

    def pair(self) -> Pair:
        """Return them as a pair."""
        return Pair(self.query.item("query"), self.document.item("document"))

    def description(self) -> list[str | dict[str, list[str]]]:
        """Return them as JSON; see `Probe.description`."""
        return [self.query.description(), self.document.description()]


def make_probes(folder: Path, with_video: bool = False) -> list[Probe]:
    """Draw the probes' images into a folder.

    Args:
        folder: An existing folder.
        with_video: Whether the model reads videos.

    Returns:
        A short text, an image, an image with a text, two images with a text, a long text, a tiny image, and perhaps the
        frames of a video.
    """
    random = np.random.default_rng(0)
    wide, tall, tiny, *frames = (_draw(folder, name, size, random) for name, size in IMAGES.items())
    video = Part("video", tuple(frame for part in frames for frame in part.frames))
    words = " ".join(random.choice(WORDS) for _ in range(LONG_TEXT_WORDS))
    question = Part("text", "What does the picture show?")
    return [
        Probe("text", (Part("text", "four zero seven"),)),
        Probe("image", (wide,)),
        Probe("image and text", (tall, question)),
        Probe("two images and text", (wide, tall, question)),
        Probe("long text", (Part("text", words),)),
        Probe("tiny image", (tiny,)),
        *([Probe("video", (video,))] if with_video else []),
    ]


def make_pairs(probes: Sequence[Probe]) -> list[PairProbe]:
    """Pair probes: every kind as a query and as a document, the first one with several documents to rank."""
    named = {probe.name: probe for probe in probes}
    return [PairProbe(named[query], named[document]) for query, document in PAIRS if {query, document} <= named.keys()]


#: Queries and documents, by the names of their probes.
PAIRS = (
    ("text", "long text"),
    ("text", "image"),
    ("text", "two images and text"),
    ("text", "video"),
    ("image", "text"),
    ("image", "tiny image"),
    ("image and text", "text"),
    ("two images and text", "image and text"),
    ("video", "image"),
)

IMAGES = {"wide": (160, 96), "tall": (64, 192), "tiny": (3, 2)} | {f"frame{index}": (96, 64) for index in range(4)}
WORDS = ("retrieval", "of", "pages", "und", "Bilder", "числа", "数字", "42", "naïve", "—", "\n")


def _draw(folder: Path, name: str, size: tuple[int, int], random: np.random.Generator) -> Part:
    """Draw smooth coloured noise, so that resizing matters as it does for photographs."""
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    path = folder / f"{name}.png"
    coarse.resize(size, Image.Resampling.BICUBIC).save(path)
    return Part("image", path)
