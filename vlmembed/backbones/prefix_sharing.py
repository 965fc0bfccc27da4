"""Items that begin alike compute their beginning once: candidates of one query, queries of one document.

Under causal attention a token's state depends on nothing behind it. So of two items that begin with the same tokens,
and the same images, the second takes the states of its beginning from the first: scores and gradients are the same, in
less time. A chunk's items stand in order, each beside the one that it shares most with.
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


def shared_lengths(signatures: Sequence[np.ndarray]) -> list[int]:
    """Count the tokens that each item begins with as the one before it does; one at least is left to compute."""
    counts = [0] * len(signatures)
    for row, (before, item) in enumerate(pairwise(signatures), start=1):
        length = min(len(before), len(item) - 1)
        different = (before[:length] != item[:length]).nonzero()[0]
        counts[row] = int(different[0]) if len(different) else length
    return counts


@dataclass(frozen=True)
class Sharing:
    """Which tokens of a chunk are computed, and which of those each token is."""

    computed: Bool[Tensor, " T"]  # True at the tokens that are computed.
    index: Int[Tensor, " T"]  # Of each token, among the computed ones.
    counts: Int[Tensor, " B"]  # How many tokens of each item are computed.

    @classmethod
    def of(cls, lengths: Int[Tensor, " B"], shared: Int[Tensor, " B"]) -> Sharing:
        """Follow how many first tokens each item shares with the one before it, which may share them in its turn."""
        counts, start = lengths - shared, 0
        index: list[Tensor] = []
        for prefix, count in zip(shared.tolist(), counts.tolist(), strict=True):
            new = torch.arange(start, start + count)
            index.append(torch.cat([index[-1][:prefix], new]) if prefix else new)
            start += count
        computed = [torch.arange(len(item)) >= prefix for item, prefix in zip(index, shared.tolist(), strict=True)]
        return cls(torch.cat(computed), torch.cat(index), counts)


def computed_images(chunk: Inputs) -> list[int]:
    """Return the index of each image that a chunk computes with: not those of shared beginnings."""
    images = chunk["images"]
    if "shared" in chunk:
        images = images[chunk["image_starts"] >= chunk["shared"][images[:, 0]]]
    indices: list[int] = images[:, 1].tolist()
    return indices
