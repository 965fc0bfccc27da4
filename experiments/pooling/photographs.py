"""Pieces of photographs: from a piece, find the piece that overlaps it, in two photographs that scikit-learn carries.

A temple and a flower, 640 × 427 pixels. Training sees their left part, validation and test strips of the right: no
pixel that is tested was trained on. Queries and documents are images alone.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from vlmembed.data import EvaluationSource, Source
from vlmembed.types import EvaluationSet, Example, Item, Part

Split = Literal["train", "val", "test"]

#: Columns of pixels.
STRIPS: dict[Split, tuple[int, int]] = {"train": (0, 352), "val": (352, 464), "test": (464, 640)}
#: Width and height of a piece: 3 × 3 tokens.
SIDE = 96
#: How far, in pixels, the piece that overlaps another is from it: they share a third to two thirds.
NEAREST, FARTHEST = 24, 56
#: Queries of validation and test; each photograph has half, with pieces on a grid as their documents.
QUERIES = {"val": 100, "test": 200}

Place = tuple[int, int, int]


@cache
def photographs() -> list[Image.Image]:
    """Return the two photographs."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def draw_place(split: Split, generator: np.random.Generator) -> Place:
    """Draw a photograph, and the left and upper edge of a piece."""
    first, last = STRIPS[split]
    height = photographs()[0].height
    left, top = generator.integers(first, last - SIDE + 1), generator.integers(height - SIDE + 1)
    return int(generator.integers(len(photographs()))), int(left), int(top)


def beside(place: Place, split: Split, generator: np.random.Generator) -> Place:
    """Draw a piece that overlaps another one."""
    first, last = STRIPS[split]
    photograph, left, top = place
    while True:
        right, down = generator.integers(-FARTHEST, FARTHEST + 1, size=2)
        there = photograph, left + int(right), top + int(down)
        inside = first <= there[1] <= last - SIDE and 0 <= there[2] <= photographs()[0].height - SIDE
        if inside and max(abs(right), abs(down)) >= NEAREST:
            return there


def piece(place: Place, brightness: float = 1.0) -> Part:
    """Cut a piece, a little brighter or darker: else its mean colour would give it away."""
    photograph, left, top = place
    cut = photographs()[photograph].crop((left, top, left + SIDE, top + SIDE))
    return Part("image", cut.point(lambda value: min(255, int(value * brightness))))


class Pieces(Source):
    """Training rows: a piece, and one that overlaps it.

    Args:
        size: Rows.
        seed: Draws the pieces.
    """

    def __init__(self, size: int = 5_120, seed: int = 0) -> None:
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        generator = np.random.default_rng([self.seed, index])
        place = draw_place("train", generator)
        there = beside(place, "train", generator)
        shown, answer = (piece(each, generator.uniform(0.7, 1.3)) for each in (place, there))
        origin = f"Pieces(seed={self.seed}), row {index}"
        return Example(Item("query", (shown,), origin), (Item("document", (answer,), origin),))


class PiecesEvaluation(EvaluationSource):
    """Pieces, each to find its overlapping one among those of all.

    Args:
        split: Which strip of the photographs.
    """

    def __init__(self, split: Literal["val", "test"] = "test") -> None:
        self.split: Literal["val", "test"] = split

    def load(self) -> EvaluationSet:
        """Draw the pieces; a document answers every query that it overlaps as far as a training answer does."""
        generator = np.random.default_rng(sorted(STRIPS).index(self.split))
        asked = [draw_place(self.split, generator) for _ in range(QUERIES[self.split])]
        answers = [beside(place, self.split, generator) for place in asked]
        names = [f"{row:03}" for row in range(len(asked))]
        return EvaluationSet(
            name="photographs",
            queries=[
                Item("query", (piece(place, generator.uniform(0.7, 1.3)),), name)
                for place, name in zip(asked, names, strict=True)
            ],
            corpus=[
                Item("document", (piece(place, generator.uniform(0.7, 1.3)),), name)
                for place, name in zip(answers, names, strict=True)
            ],
            query_names=names,
            document_names=names,
            qrels={
                name: {other: 1 for other, there in zip(names, answers, strict=True) if _overlap(place, there)}
                for name, place in zip(names, asked, strict=True)
            },
        )


def _overlap(one: Place, other: Place) -> bool:
    return one[0] == other[0] and max(abs(one[1] - other[1]), abs(one[2] - other[2])) <= FARTHEST
