"""The vectors of some items, any number of each, without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class MultiVectors:
    """The vectors of N items, one item's after the other's: what embeddings (N, D) are to a single-vector model."""

    vectors: Float[Tensor, "T D"]  # T = the sum of the lengths.
    lengths: Int[Tensor, " N"]  # How many vectors each item has; on the host, which knows it from the tokens.
    #: Whether a score is the mean over a query's vectors, and not their sum.
    length_normalized: bool = False

    @classmethod
    def of(cls, items: Sequence[Float[Tensor, "n D"]], length_normalized: bool = False) -> MultiVectors:
        """Join the vectors of some items; see `split`."""
        return cls(torch.cat([*items]), torch.tensor([*map(len, items)]), length_normalized)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.vectors.device

    @property
    def shape(self) -> tuple[int, int]:
        """Items and dimensions: N, D."""
        return len(self.lengths), self.vectors.shape[1]

    @cached_property
    def starts(self) -> Int[Tensor, " N"]:
        """The row of each item's first vector; on the host."""
        return self.lengths.cumsum(0) - self.lengths

    def __getitem__(self, items: Int[Tensor, " n"]) -> MultiVectors:
        """Return some items, by their numbers on the host."""
        lengths = self.lengths[items]
        # Row t of the result is the item's first row, and how far t is behind the item's first in the result.
        offsets = self.starts[items] - (lengths.cumsum(0) - lengths)
        rows = torch.arange(int(lengths.sum())) + offsets.repeat_interleave(lengths)
        vectors = self.vectors.index_select(0, rows.to(self.device, non_blocking=True))
        return replace(self, vectors=vectors, lengths=lengths)

    def map(self, change: Callable[[Tensor], Tensor]) -> MultiVectors:
        """Return the same items with every vector changed: (T, D) → (T, d)."""
        return replace(self, vectors=change(self.vectors))

    def detach(self) -> MultiVectors:
        """Return the same vectors without gradient."""
        return self.map(Tensor.detach)

    def split(self) -> list[Float[Tensor, "n D"]]:
        """Return the vectors of each item."""
        return list(self.vectors.split(self.lengths.tolist()))


#: Embeddings (N, D) of N items, or the vectors of each.
Vectors = Tensor | MultiVectors


def at_least_float32(vectors: Vectors) -> Vectors:
    """Leave half precision."""
    return vectors.map(promoted) if isinstance(vectors, MultiVectors) else promoted(vectors)


def promoted(vectors: Tensor) -> Tensor:
    """Leave half precision."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def truncate(vectors: Vectors, dimension: int) -> Vectors:
    """Keep the leading numbers of each vector."""
    if isinstance(vectors, MultiVectors):
        return vectors.map(lambda rows: rows[:, :dimension])
    return vectors[:, :dimension]
