"""Items that begin alike compute their beginning once: candidates of one query, queries of one document.

Under causal attention a token's state depends on nothing behind it. So of two items that begin with the same tokens,
and the same images, the second takes the states of its beginning from the first: scores and gradients are the same, in
less time. A chunk's items stand in order, each beside the one that it shares most with; what is shared may go back over
many of them, an instruction to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlmembed.types import Inputs


def signature(tokens: Int[Tensor, " L"], types: Int[Tensor, " L"], images: Sequence[int]) -> np.ndarray:
    """Return an item's tokens as numbers that are equal where tokens, and the images at them, are.

    Args:
        tokens: Their ids.
        types: 0 for a text's token, else for an image's or a video's.
        images: The key of each run of visual tokens, in order.
    """
    numbers = tokens.numpy().astype(np.int64)
    visual = types.numpy() > 0
    starts = visual & ~np.concatenate([[False], visual[:-1]])
    keys = np.asarray([0, *images], dtype=np.int64)
    # Negative, so that no key is a token's id.
    return np.where(visual, -1 - keys[np.cumsum(starts)], numbers)


def neighbours(signatures: Sequence[np.ndarray]) -> list[int]:
    """Order items so that those that begin alike stand together."""
    return sorted(range(len(signatures)), key=lambda row: signatures[row].astype(">i8").tobytes())


def common(first: np.ndarray, second: np.ndarray) -> int:
    """Count the tokens that two items begin with alike. The second keeps one of its own at least."""
    length = min(len(first), len(second) - 1)
    different = (first[:length] != second[:length]).nonzero()[0]
    return int(different[0]) if len(different) else length


@dataclass(frozen=True)
class Sharing:
    """Which tokens of a chunk are computed, and which item finds its beginning where.

    Args:
        own: (T,) which of the chunk's tokens are computed: those that are not shared.
        places: (T,) where each token's state is among those.
        counts: (B,) how many tokens of each item are computed.
    """

    own: Bool[Tensor, " T"]
    places: Int[Tensor, " T"]
    counts: Int[Tensor, " B"]

    @classmethod
    def of(cls, lengths: Int[Tensor, " B"], shared: Int[Tensor, " B"]) -> Sharing:
        """Follow what each item shares with the one before it.

        Args:
            lengths: Tokens of each item.
            shared: How many of its first tokens are those of the item before.
        """
        counts = lengths - shared
        places: list[Tensor] = []
        own: list[Tensor] = []
        start = 0
        for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
            fresh = torch.arange(start, start + count)
            places.append(torch.cat([places[-1][: length - count], fresh]) if length > count else fresh)
            own.append(torch.arange(length) >= length - count)
            start += count
        return cls(torch.cat(own), torch.cat(places), counts)


def kept(shared: Int[Tensor, " B"], rows: Sequence[int]) -> Int[Tensor, " rows"]:
    """Return what some rows of a chunk, in order, share with the one before them, once the others are gone."""
    between = [int(shared[before + 1 : row + 1].min()) for before, row in pairwise(rows)]
    return torch.tensor([0, *between])


def own_images(chunk: Inputs) -> list[int]:
    """Return the places of the images that a chunk computes with: not those of shared beginnings."""
    places = chunk["images"]
    if "shared" in chunk:
        places = places[chunk["image_starts"] >= chunk["shared"][places[:, 0]]]
    listed: list[int] = places[:, 1].tolist()
    return listed
