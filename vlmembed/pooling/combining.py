"""Poolings made of others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmembed.pooling.base import Pooling, PoolingWrapper


class Concatenation(Pooling):
    """Several poolings of the same states, one after the other; D is the sum of theirs.

    Args:
        poolings: The poolings, in the order in which their embeddings are concatenated.

    Raises:
        ValueError: If fewer than two poolings are given, or if they read different layers or append different tokens.
    """

    def __init__(self, poolings: Sequence[Pooling]) -> None:
        super().__init__()
        if len(poolings) < 2:
            raise ValueError(f"Concatenation needs at least two poolings, got {len(poolings)}.")
        if len({pooling.layers for pooling in poolings}) > 1:
            raise ValueError(
                f"Concatenated poolings must read the same layers, got {[pooling.layers for pooling in poolings]}."
            )
        if any(pooling.appended for pooling in poolings):
            raise ValueError(
                "Concatenated poolings must read items as they are; these append tokens: "
                f"{[type(pooling).__name__ for pooling in poolings if pooling.appended]}."
            )
        self.members = nn.ModuleList(poolings)
        self.layers = poolings[0].layers
        tails = [pooling.num_last_tokens for pooling in poolings if pooling.num_last_tokens is not None]
        self.num_last_tokens = max(tails) if len(tails) == len(poolings) else None

    @property
    def poolings(self) -> list[Pooling]:
        """The poolings, in order."""
        return [pooling for pooling in self.members if isinstance(pooling, Pooling)]

    def configure(self, hidden_size: int) -> None:
        """Configure each pooling."""
        for pooling in self.poolings:
            pooling.configure(hidden_size)

    def dimension(self, hidden_size: int) -> int:
        """Return the sum of the poolings' dimensions."""
        return sum(pooling.dimension(hidden_size) for pooling in self.poolings)

    def forward(
        self,
        hidden: Float[Tensor, "*K B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """Pool with each, and concatenate."""
        return torch.cat([pooling(hidden, mask, input_ids) for pooling in self.poolings], dim=-1)


class Projection(PoolingWrapper):
    """Another pooling, and a learned map to a dimension of its own: a linear one, or an MLP (SimCLR, arXiv:2002.05709).

    Args:
        pooling: What to project.
        size: D, the dimension of the embedding.
        inner_size: Of an MLP's layer between, with a GELU behind it; null for a linear map.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(self, pooling: Pooling, size: int, inner_size: int | None = None) -> None:
        super().__init__(pooling)
        if size < 1 or (inner_size is not None and inner_size < 1):
            raise ValueError(f"Projection: sizes are 1 or more, got size={size}, inner_size={inner_size}.")
        self.size = size
        self.inner_size = inner_size

    def configure(self, hidden_size: int) -> None:
        """Create the map."""
        super().configure(hidden_size)
        widths = [self.pooling.dimension(hidden_size), *([self.inner_size] if self.inner_size else []), self.size]
        self.inner = nn.Linear(widths[0], widths[1]) if self.inner_size else None
        self.outer = nn.Linear(widths[-2], widths[-1])

    def dimension(self, hidden_size: int) -> int:
        """Return the size."""
        return self.size

    def forward(
        self,
        hidden: Float[Tensor, "*K B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """Pool, and project."""
        pooled = self.pooling(hidden, mask, input_ids).to(self.outer.weight.dtype)
        if self.inner is not None:
            pooled = nn.functional.gelu(self.inner(pooled))
        projected: Tensor = self.outer(pooled)
        return projected
