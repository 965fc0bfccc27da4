"""Poolings of other layers than the last."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmembed.pooling.base import Pooling, PoolingWrapper, at_least_float32


class EarlierLayer(PoolingWrapper):
    """Another pooling, of one earlier layer: the last one is made for predicting words (arXiv:2502.02013).

    Args:
        pooling: What to do with the layer's states.
        layer: Which, -1 being the last one after the final norm, and 0 the token embeddings.
    """

    def __init__(self, pooling: Pooling, layer: int = -2) -> None:
        super().__init__(pooling)
        self.layer = layer
        self.layers = (layer,)

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """Pool the layer's states."""
        pooled: Tensor = self.pooling(hidden, mask, input_ids)
        return pooled


class LayerMix(PoolingWrapper):
    """Another pooling, of a softmax-weighted mean of the last few layers (ELMo, arXiv:1802.05365).

    Layers before the last are taken as they are, without the final norm.

    Args:
        pooling: What to do with the mixed states.
        count: How many layers, counted from the last.

    Raises:
        ValueError: If ``count`` is below 2, or the other pooling reads other layers than the last.
    """

    def __init__(self, pooling: Pooling, count: int = 4) -> None:
        super().__init__(pooling)
        if count < 2:
            raise ValueError(f"LayerMix: count is 2 or more, got {count}.")
        if pooling.layers != (-1,):
            raise ValueError(f"LayerMix: the pooling inside reads layers {pooling.layers}; it is given the mixed one.")
        self.count = count
        self.layers = tuple(range(-count, 0))
        self.weights = nn.Parameter(torch.zeros(count))

    def forward(
        self,
        hidden: Float[Tensor, "K B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """Mix the layers, and pool."""
        kept = at_least_float32(hidden.masked_fill(mask[..., None] == 0, 0.0))
        mixed = torch.einsum("kblh,k->blh", kept, self.weights.softmax(dim=0).to(kept.dtype))
        pooled: Tensor = self.pooling(mixed, mask, input_ids)
        return pooled
