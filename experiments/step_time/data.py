"""Pairs of a text and a picture: two photographs that come with scikit-learn, cut into many pieces."""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image
from sklearn.datasets import load_sample_images

from vlmembed.backbones.tiny import NUMBER_WORDS

Pair = tuple[str, Image.Image]

#: Width and height in pixels, of a mean of 27 tokens. With 4 to 64 tokens as limits the first three are made larger and
#: the last is made smaller.
MIXED = (
    *((32, 32), (64, 32), (32, 64), (64, 64), (96, 96), (128, 64), (64, 128), (96, 144)),
    *((160, 96), (128, 192), (192, 192), (256, 128), (192, 256), (224, 224), (256, 256), (320, 320)),
)
MIN_TOKENS, MAX_TOKENS = 4, 64
#: Words per text, as in questions; with the template around them, texts of about 20 to 35 tokens.
WORDS = (1, 2, 3, 4, 5, 6, 8, 12)


def pairs(count: int, sizes: Sequence[tuple[int, int]] = MIXED, seed: int = 0) -> list[Pair]:
    """Return distinct texts and distinct cuts. Sizes and lengths repeat every 16, each time in another order."""
    draw = random.Random(seed)
    found: list[Pair] = []
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    while len(found) < count:
        words, pictures = list(WORDS) * 2, list(sizes) * (16 // len(sizes))
        draw.shuffle(words)
        draw.shuffle(pictures)
        for length, size in zip(words, pictures, strict=True):
            text = " ".join([*f"{len(found):04}", *draw.choices(NUMBER_WORDS, k=length)])
            found.append((text, _cut(draw.choice(photographs), size, draw)))
    return found[:count]


def _cut(photograph: Image.Image, size: tuple[int, int], draw: random.Random) -> Image.Image:
    """A random piece of the photograph, enlarged where it has to be."""
    scale = min(1.0, *(have / want for have, want in zip(photograph.size, size, strict=True)))
    # Never quite all of it, so that pieces differ.
    width, height = (max(16, int(0.9 * scale * side)) for side in size)
    left, top = draw.randint(0, photograph.width - width), draw.randint(0, photograph.height - height)
    return photograph.resize(size, box=(left, top, left + width, top + height))
