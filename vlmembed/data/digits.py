"""Handwritten numbers: real handwriting to retrieve, with no network and no GPU.

The query "four zero seven" is answered by images of the number 407, of the 1,797 scans of 8×8 pixels that scikit-learn
carries (Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998). Training, validation and test
share no number to search for and no scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from vlmembed.data.evaluation import EvaluationSource
from vlmembed.data.sources import Source
from vlmembed.types import EvaluationSet, Example, Item, Part

Split = Literal["train", "val", "test"]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = 3
#: Width and height in pixels that a digit has in an image: one language token of Qwen3-VL.
CELL = 32
SMALLEST = 28

#: Where each split begins and ends in the shuffled numbers, and in the shuffled scans.
NUMBER_SPLITS: dict[Split, slice] = {"test": slice(0, 200), "val": slice(200, 300), "train": slice(300, None)}
SCAN_SPLITS: dict[Split, slice] = {"test": slice(0, 270), "val": slice(270, 400), "train": slice(400, None)}


@cache
def numbers(split: Split) -> tuple[int, ...]:
    """Return the numbers that are queries of a split: always the same, so that no seed can mix training and test."""
    return tuple(np.random.default_rng(0).permutation(10**DIGITS)[NUMBER_SPLITS[split]].tolist())


@cache
def scans() -> tuple[list[Image.Image], np.ndarray]:
    """Return every scan (dark ink on white, 8×8) and the digit that it shows."""
    bundled = load_digits()
    return [Image.fromarray(np.uint8(255 - scan * (255 / 16))) for scan in bundled.images], bundled.target


@cache
def scans_of(split: Split) -> tuple[np.ndarray, ...]:
    """Return, for each digit, the indices of its scans in a split: always the same."""
    target = scans()[1]
    within = np.random.default_rng(1).permutation(len(target))[SCAN_SPLITS[split]]
    return tuple(within[target[within] == digit] for digit in range(10))


def in_words(number: int) -> str:
    """Return a number's digits as words, with leading zeros: 47 is "zero four seven"."""
    return " ".join(WORDS[int(digit)] for digit in f"{number:0{DIGITS}}")


def write(number: int, split: Split, generator: np.random.Generator) -> Image.Image:
    """Write a number by hand, with leading zeros and a split's scans: RGB, 96×32 pixels."""
    return paste([generator.choice(scans_of(split)[int(digit)]) for digit in f"{number:0{DIGITS}}"], generator)


def paste(chosen: Sequence[int], generator: np.random.Generator) -> Image.Image:
    """Paste scans side by side, enlarged and moved a little differently."""
    image = Image.new("L", (CELL * len(chosen), CELL), color=255)
    for column, index in enumerate(chosen):
        size = int(generator.integers(SMALLEST, CELL + 1))
        left, top = (int(shift) for shift in generator.integers(CELL - size + 1, size=2))
        scan = scans()[0][index].resize((size, size), Image.Resampling.BICUBIC)
        image.paste(scan, (column * CELL + left, top))
    return image.convert("RGB")


def query(number: int, origin: str) -> Item:
    """Return the item that asks for a number."""
    return Item("query", (Part("text", in_words(number)),), origin)


@dataclass(eq=False)
class HandwrittenNumbers(Source):
    """Training rows: a number in words, and a fresh image of it.

    700 of the 1,000 three-digit numbers come up, in turn; the other 300 belong to ``HandwrittenNumbersEvaluation``.

    Args:
        size: Rows. No image repeats, so one long epoch sees more handwriting than many short ones.
        seed: Draws the images.
    """

    size: int = 12_800
    seed: int = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of {self.size} handwritten numbers")
        (asked,) = self.read_queries([index])
        number = numbers("train")[index % len(numbers("train"))]
        image = write(number, "train", np.random.default_rng([self.seed, index]))
        return Example(asked, (Item("document", (Part("image", image),), asked.origin),))

    def read_queries(self, indices: Sequence[int]) -> list[Item]:
        """Return the queries of some rows, without drawing their images."""
        train, name = numbers("train"), f"HandwrittenNumbers(seed={self.seed})"
        return [query(train[index % len(train)], f"{name}, row {index}") for index in indices]


@dataclass(eq=False)
class HandwrittenNumbersEvaluation(EvaluationSource):
    """Numbers in words, to find among images that are written with scans held out of training.

    ``test`` has 200 numbers with 5 images each, among 1,000 images of other numbers; ``val`` 100 with 2, among 300.

    Args:
        split: Which of the two; they share no number and no scan.
        seed: Draws the images.
    """

    split: Literal["val", "test"] = "test"
    seed: int = 0

    def load(self) -> EvaluationSet:
        """Draw the images and say which number each one shows."""
        copies, distractors = {"val": (2, 300), "test": (5, 1_000)}[self.split]
        asked = numbers(self.split)
        generator = np.random.default_rng([self.seed, 10**DIGITS])
        # Validation shows no number of the test, not even as a negative.
        others = np.setdiff1d(np.arange(10**DIGITS), asked + numbers("test"))
        shown = [*np.repeat(asked, copies), *generator.choice(others, distractors)]
        names = [f"{number:0{DIGITS}}-{row}" for row, number in enumerate(shown)]
        origin = f"HandwrittenNumbersEvaluation(split={self.split}, seed={self.seed})"
        asked_names = [f"{number:0{DIGITS}}" for number in asked]
        images = [(Part("image", write(int(number), self.split, generator)),) for number in shown]
        return EvaluationSet(
            "handwritten-numbers",
            [query(number, f"{origin}, {in_words(number)}") for number in asked],
            [Item("document", parts, f"{origin}, {name}") for parts, name in zip(images, names, strict=True)],
            asked_names,
            names,
            {name: dict.fromkeys(names[copies * k : copies * (k + 1)], 1) for k, name in enumerate(asked_names)},
        )
