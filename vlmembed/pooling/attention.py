"""Poolings that learn where to look."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from vlmembed.pooling.base import Pooling, at_least_float32, weighted_mean


class Attention(Pooling):
    """A weighted mean for each of some learned queries, one after the other (arXiv:1703.03130).

    The first query starts as `Mean`; the others start at random, so that they become different ones.

    Args:
        queries: How many.

    Raises:
        ValueError: If ``queries`` is below 1.
    """

    def __init__(self, queries: int = 1) -> None:
        super().__init__()
        if queries < 1:
            raise ValueError(f"Attention: queries is 1 or more, got {queries}.")
        self.queries = queries

    def configure(self, hidden_size: int) -> None:
        """Create the queries."""
        self.query = nn.Parameter(torch.randn(self.queries, hidden_size))
        with torch.no_grad():
            self.query[0] = 0.0

    def dimension(self, hidden_size: int) -> int:
        """Return H for each query."""
        return self.queries * hidden_size

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """Pool one weighted mean per query."""
        kept = at_least_float32(hidden.masked_fill(mask[..., None] == 0, 0.0))
        scores = torch.einsum("blh,qh->bql", kept, self.query.to(kept.dtype)) / kept.shape[-1] ** 0.5
        shares = scores.masked_fill(mask[:, None] == 0, float("-inf")).softmax(dim=-1)
        return torch.einsum("bql,blh->bqh", shares, kept).flatten(1)


class LatentAttention(Pooling):
    """The mean of what tokens look up in a learned dictionary (NV-Embed, arXiv:2405.17428).

    Each token's state attends to the latents, the answer is added to it and goes through an MLP, and then comes the
    mean over tokens.

    Args:
        latents: Entries of the dictionary.
        heads: Of the attention; they divide the hidden size.
        expansion: How many times as wide the MLP is inside.
    """

    def __init__(self, latents: int = 512, heads: int = 8, expansion: int = 4) -> None:
        super().__init__()
        self.latents = latents
        self.heads = heads
        self.expansion = expansion

    def configure(self, hidden_size: int) -> None:
        """Create the dictionary, the attention's and the MLP's weights.

        Raises:
            ValueError: If heads do not divide the hidden size.
        """
        if hidden_size % self.heads:
            raise ValueError(f"LatentAttention: {self.heads} heads do not divide the hidden size {hidden_size}.")
        self.dictionary = nn.Parameter(torch.randn(self.latents, hidden_size))
        self.norm_states, self.norm_latents = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.norm_inner = nn.LayerNorm(hidden_size)
        self.to_query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.to_output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.widen = nn.Linear(hidden_size, self.expansion * hidden_size)
        self.narrow = nn.Linear(self.expansion * hidden_size, hidden_size)

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the mean of the answers."""
        states = hidden.masked_fill(mask[..., None] == 0, 0.0).to(self.dictionary.dtype)
        states = states + self._look_up(states)
        states = states + self.narrow(gelu(self.widen(self.norm_inner(states))))
        return weighted_mean(states, mask)

    def _look_up(self, states: Float[Tensor, "B L H"]) -> Float[Tensor, "B L H"]:
        latents = self.norm_latents(self.dictionary)[None].expand(len(states), -1, -1)
        key, value = self.to_key_value(latents).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_query(self.norm_states(states)), key, value)
        )
        found: Tensor = self.to_output(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return found
