"""What a pooling is: hidden states (B, L, H) of an item's tokens -> one embedding (B, D).

The files of this folder import only each other, torch and jaxtyping: an export copies them whole, and they run where
vlmembed is not installed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Template:
    """What token ids mean in a checkpoint's chat template."""

    visual: tuple[int, ...]  # Of image and video tokens.
    instructions: tuple[tuple[int, ...], ...]  # What items with an instruction begin with, for each instruction.


class Pooling(nn.Module, ABC):
    """Turns token states into one embedding per item.

    A subclass that has weights creates them in `configure`; one that reads other layers than the last sets `layers`.
    It keeps each argument of its constructor as an attribute of the same name, because an export writes them down.
    """

    #: Which hidden states to pool: -1 is the last, after the final norm, 0 the token embeddings; of several, ``hidden``
    #: has a leading dimension K in this order.
    layers: tuple[int, ...] = (-1,)
    #: How many of an item's last tokens are read; None for all. States of other tokens may be NaN.
    num_last_tokens: int | None = None
    #: Tokens that every item gets at its end, and whether these are new ones, with learned embeddings.
    appended: tuple[str, ...] = ()
    learns_tokens: bool = False
    #: Whether `template` is needed, which the encoder sets.
    reads_template: bool = False
    template: Template | None = None

    @property
    def token_embeddings(self) -> Float[Tensor, "tokens H"] | None:
        """Learned embeddings of the appended tokens, if there are any and the pooling is configured."""
        return None

    def configure(self, hidden_size: int) -> None:
        """Create weights, once the backbone's hidden size H is known."""

    def dimension(self, hidden_size: int) -> int:
        """Return D, the dimension of the embedding, for hidden size H."""
        return hidden_size

    @abstractmethod
    def forward(
        self, hidden: Float[Tensor, "*K B L H"], mask: Int[Tensor, "B L"], input_ids: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B D"]:
        """Pool the positions where ``mask`` is 1; ``input_ids`` are for poolings that select by token."""


class TokenWeights(Pooling):
    """A mean over tokens, each with a weight: most poolings only say how much a token counts."""

    @abstractmethod
    def weights(self, mask: Int[Tensor, "B L"], input_ids: Int[Tensor, "B L"] | None) -> Int[Tensor, "B L"]:
        """Return how much each token counts; 0 at padding."""

    def forward(
        self, hidden: Float[Tensor, "B L H"], mask: Int[Tensor, "B L"], input_ids: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B H"]:
        return weighted_mean(hidden, self.weights(mask, input_ids))


class PoolingWrapper(Pooling):
    """A pooling that does something before or after another one."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        self.layers, self.num_last_tokens = pooling.layers, pooling.num_last_tokens
        self.appended, self.learns_tokens = pooling.appended, pooling.learns_tokens

    @property
    def token_embeddings(self) -> Tensor | None:
        return self.pooling.token_embeddings

    def configure(self, hidden_size: int) -> None:
        self.pooling.configure(hidden_size)

    def dimension(self, hidden_size: int) -> int:
        return self.pooling.dimension(hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        pooled: Tensor = self.pooling(hidden, mask, input_ids)
        return pooled


def at_least_float32(values: Tensor) -> Tensor:
    """Leave half precision: a sum over thousands of tokens would lose the small ones."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def mask_padding(hidden: Float[Tensor, "*K B L H"], kept: Tensor) -> Float[Tensor, "*K B L H"]:
    """Set states to 0 where ``kept`` (B, L) is, in float32: 0 × NaN is NaN, and padding may hold anything."""
    return at_least_float32(hidden.masked_fill(kept[..., None] == 0, 0.0))


def weighted_sum(hidden: Float[Tensor, "B L H"], weights: Int[Tensor, "B L"]) -> Float[Tensor, "B H"]:
    """Return the sum over tokens, each times its weight."""
    states = mask_padding(hidden, weights)
    return torch.einsum("blh,bl->bh", states, weights.to(states.dtype))


def weighted_mean(hidden: Float[Tensor, "B L H"], weights: Int[Tensor, "B L"]) -> Float[Tensor, "B H"]:
    """Return the mean over tokens, each with its weight."""
    return weighted_sum(hidden, weights) / weights.sum(dim=1, keepdim=True)


def state_at(hidden: Float[Tensor, "B L H"], position: Int[Tensor, " B"]) -> Float[Tensor, "B H"]:
    """Return the state at one position of each item; cheaper than a weighted mean, which copies all states."""
    return at_least_float32(hidden[torch.arange(len(hidden), device=hidden.device), position])


def tokens_from_end(mask: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Count from each item's last token, which is 1, whichever side is padded; 0 at padding."""
    return mask.flip(1).cumsum(dim=1).flip(1) * mask


def is_any(input_ids: Int[Tensor, "B L"], tokens: tuple[int, ...]) -> Bool[Tensor, "B L"]:
    """Say where a token is one of a few; one by one, as a tensor of them would have to be sent to the device."""
    matches = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in tokens:
        matches |= input_ids == token
    return matches
