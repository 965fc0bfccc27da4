"""Poolings with weights, and those made of other poolings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from vlmembed.pooling.base import Pooling, PoolingWrapper, mask_padding, state_at, tokens_from_end, weighted_mean


class LearnedTokens(Pooling):
    """The states of tokens behind every item, whose embeddings alone are learned for it (arXiv:2101.00190).

    Args:
        tokens: How many.
        combine: Whether their states are averaged or concatenated.
    """

    learns_tokens = True

    def __init__(self, tokens: int = 4, combine: Literal["mean", "concatenation"] = "mean") -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"LearnedTokens: tokens is 1 or more, got {tokens}.")
        self.tokens = self.num_last_tokens = tokens
        self.combine = combine
        self.appended = tuple(f"<|read_out_{index}|>" for index in range(tokens))
        self.learned: nn.Parameter | None = None

    @property
    def token_embeddings(self) -> Float[Tensor, "tokens H"] | None:
        return self.learned

    def configure(self, hidden_size: int) -> None:
        self.learned = nn.Parameter(0.02 * torch.randn(self.tokens, hidden_size))

    def dimension(self, hidden_size: int) -> int:
        return hidden_size * (self.tokens if self.combine == "concatenation" else 1)

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        from_end = tokens_from_end(mask)
        if self.combine == "mean":
            return weighted_mean(hidden, mask * (from_end <= self.tokens))
        positions = [(from_end == count).int().argmax(dim=1) for count in range(self.tokens, 0, -1)]
        return torch.cat([state_at(hidden, position) for position in positions], dim=-1)


class Attention(Pooling):
    """A weighted mean for each of some learned queries, one after the other (arXiv:1703.03130).

    The first query starts as `Mean`; the others start at random, so that they become different ones.

    Args:
        queries: How many.
    """

    def __init__(self, queries: int = 1) -> None:
        super().__init__()
        if queries < 1:
            raise ValueError(f"Attention: queries is 1 or more, got {queries}.")
        self.queries = queries

    def configure(self, hidden_size: int) -> None:
        self.query = nn.Parameter(torch.randn(self.queries, hidden_size))
        with torch.no_grad():
            self.query[0] = 0.0

    def dimension(self, hidden_size: int) -> int:
        return self.queries * hidden_size

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        states = mask_padding(hidden, mask)
        scores = torch.einsum("blh,qh->bql", states, self.query.to(states.dtype)) / states.shape[-1] ** 0.5
        shares = scores.masked_fill(mask[:, None] == 0, float("-inf")).softmax(dim=-1)  # (B, Q, L)
        return torch.einsum("bql,blh->bqh", shares, states).flatten(1)


class LatentAttention(Pooling):
    """The mean of what tokens look up in a learned dictionary, followed by an MLP (NV-Embed, arXiv:2405.17428).

    Args:
        latents: Entries of the dictionary.
        heads: Of the attention; they divide the hidden size.
        expansion: How many times as wide the MLP is inside.
    """

    def __init__(self, latents: int = 512, heads: int = 8, expansion: int = 4) -> None:
        super().__init__()
        self.latents, self.heads, self.expansion = latents, heads, expansion

    def configure(self, hidden_size: int) -> None:
        if hidden_size % self.heads:
            raise ValueError(f"LatentAttention: {self.heads} heads do not divide the hidden size {hidden_size}.")
        self.dictionary = nn.Parameter(torch.randn(self.latents, hidden_size))
        self.norm_states, self.norm_latents, self.norm_inner = (nn.LayerNorm(hidden_size) for _ in range(3))
        self.to_query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.to_output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.widen = nn.Linear(hidden_size, self.expansion * hidden_size)
        self.narrow = nn.Linear(self.expansion * hidden_size, hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        states = mask_padding(hidden, mask).to(self.dictionary.dtype)
        latents = self.norm_latents(self.dictionary)[None].expand(len(states), -1, -1)
        key, value = self.to_key_value(latents).chunk(2, dim=-1)
        query, key, value = (  # (B, heads, L or latents, H / heads)
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_query(self.norm_states(states)), key, value)
        )
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)  # (B, L, H)
        states = states + self.to_output(attended)
        states = states + self.narrow(gelu(self.widen(self.norm_inner(states))))
        return weighted_mean(states, mask)


class EarlierLayer(PoolingWrapper):
    """Another pooling, of one earlier layer: the last one is made for predicting words (arXiv:2502.02013).

    Args:
        pooling: What to do with the layer's states.
        layer: Which, -1 being the last one after the final norm, and 0 the token embeddings.
    """

    def __init__(self, pooling: Pooling, layer: int = -2) -> None:
        super().__init__(pooling)
        self.layer, self.layers = layer, (layer,)


class LayerMix(PoolingWrapper):
    """Another pooling, of a learned mean of the last layers, only the last with the final norm (arXiv:1802.05365).

    Args:
        pooling: What to do with the mixed states.
        count: How many layers, counted from the last.
    """

    def __init__(self, pooling: Pooling, count: int = 4) -> None:
        super().__init__(pooling)
        if count < 2:
            raise ValueError(f"LayerMix: count is 2 or more, got {count}.")
        if pooling.layers != (-1,):
            raise ValueError(f"LayerMix: the pooling inside reads layers {pooling.layers}; it is given the mixed one.")
        self.count, self.layers = count, tuple(range(-count, 0))
        self.weights = nn.Parameter(torch.zeros(count))

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        states = mask_padding(hidden, mask)
        mixed = torch.einsum("kblh,k->blh", states, self.weights.softmax(dim=0).to(states.dtype))
        return super().forward(mixed, mask, input_ids)


class Concatenation(Pooling):
    """Several poolings of the same states, one after the other; D is the sum of theirs.

    Args:
        poolings: The poolings, in the order in which their embeddings are concatenated.
    """

    def __init__(self, poolings: Sequence[Pooling]) -> None:
        super().__init__()
        if len(poolings) < 2:
            raise ValueError(f"Concatenation needs at least two poolings, got {len(poolings)}.")
        layers = [pooling.layers for pooling in poolings]
        if len(set(layers)) > 1:
            raise ValueError(f"Concatenated poolings must read the same layers, got {layers}.")
        if appending := [type(pooling).__name__ for pooling in poolings if pooling.appended]:
            raise ValueError(f"Concatenated poolings must read items as they are; these append tokens: {appending}.")
        self.members = nn.ModuleList(poolings)
        self.layers = layers[0]
        last_tokens = [pooling.num_last_tokens for pooling in poolings]
        self.num_last_tokens = None if None in last_tokens else max(count or 0 for count in last_tokens)

    @property
    def poolings(self) -> list[Pooling]:
        return [pooling for pooling in self.members if isinstance(pooling, Pooling)]

    def configure(self, hidden_size: int) -> None:
        for pooling in self.poolings:
            pooling.configure(hidden_size)

    def dimension(self, hidden_size: int) -> int:
        return sum(pooling.dimension(hidden_size) for pooling in self.poolings)

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        return torch.cat([pooling(hidden, mask, input_ids) for pooling in self.poolings], dim=-1)


class Projection(PoolingWrapper):
    """Another pooling, and a learned map to a dimension of its own: a linear one, or an MLP (SimCLR, arXiv:2002.05709).

    Args:
        pooling: What to project.
        size: D, the dimension of the embedding.
        inner_size: The width of an MLP's inner layer, with a GELU behind it; null for a linear map.
    """

    def __init__(self, pooling: Pooling, size: int, inner_size: int | None = None) -> None:
        super().__init__(pooling)
        if size < 1 or (inner_size is not None and inner_size < 1):
            raise ValueError(f"Projection: sizes are 1 or more, got size={size}, inner_size={inner_size}.")
        self.size, self.inner_size = size, inner_size

    def configure(self, hidden_size: int) -> None:
        super().configure(hidden_size)
        width = self.pooling.dimension(hidden_size)
        self.inner = nn.Linear(width, self.inner_size) if self.inner_size else None
        self.outer = nn.Linear(self.inner_size or width, self.size)

    def dimension(self, hidden_size: int) -> int:
        return self.size

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        pooled = super().forward(hidden, mask, input_ids).to(self.outer.weight.dtype)
        if self.inner is not None:
            pooled = gelu(self.inner(pooled))
        projected: Tensor = self.outer(pooled)
        return projected


#: The old YAML name, for one release.
ReadOutTokens = LearnedTokens
