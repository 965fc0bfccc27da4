"""What every pooling is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Template:
    """What token ids mean in a checkpoint's chat template.

    Args:
        visual: The ids that stand where images and videos are.
        instructions: How items begin that have an instruction, one for each that is used.
    """

    visual: tuple[int, ...]
    instructions: tuple[tuple[int, ...], ...]


class Pooling(nn.Module, ABC):
    """Turns token states into one embedding per item.

    A subclass that has weights creates them in `configure`; one that reads other layers than the last sets `layers`.
    It keeps each argument of its constructor as an attribute of that name: an export writes them down.

    Attributes:
        layers: Which of the backbone's hidden states to pool, as indices into its layers with -1 the last one after
            the final norm. With more than one, ``hidden`` has a leading dimension K in this order.
        num_last_tokens: How many of an item's last tokens are read, if not all: the others' states need not be
            computed, and may be NaN.
        appended: Tokens that every item gets at its end, behind all that the chat template writes.
        learns_tokens: Whether these are new tokens, with embeddings of their own.
        reads_template: Whether `template` is wanted.
        template: What token ids mean, set by the encoder.
    """

    layers: tuple[int, ...] = (-1,)
    num_last_tokens: int | None = None
    appended: tuple[str, ...] = ()
    learns_tokens: bool = False
    reads_template: bool = False
    template: Template | None = None

    @property
    def token_embeddings(self) -> Float[Tensor, "tokens H"] | None:
        """Embeddings that are learned for the appended tokens, if the pooling learns tokens and is configured."""
        return None

    def configure(self, hidden_size: int) -> None:
        """Create weights, once the backbone's hidden size is known.

        Args:
            hidden_size: H.
        """

    def dimension(self, hidden_size: int) -> int:
        """Return D, the dimension of the embedding, for hidden size H."""
        return hidden_size

    @abstractmethod
    def forward(
        self,
        hidden: Float[Tensor, "*K B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """Pool the positions where ``mask`` is 1; ``input_ids`` are there for a pooling that selects by token."""


class PoolingWrapper(Pooling, ABC):
    """A pooling that does something before or after another one.

    Args:
        pooling: The other.
    """

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        self.layers = pooling.layers
        self.num_last_tokens = pooling.num_last_tokens
        self.appended = pooling.appended
        self.learns_tokens = pooling.learns_tokens

    @property
    def token_embeddings(self) -> Tensor | None:
        """Those of the pooling inside."""
        return self.pooling.token_embeddings

    def configure(self, hidden_size: int) -> None:
        """Configure the pooling inside."""
        self.pooling.configure(hidden_size)

    def dimension(self, hidden_size: int) -> int:
        """Return that of the pooling inside."""
        return self.pooling.dimension(hidden_size)


def at_least_float32(values: Tensor) -> Tensor:
    """Leave half precision: a sum over thousands of tokens would lose the small ones."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def tokens_from_end(mask: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Count from each item's last token, which is 1, whichever side is padded; 0 at padding."""
    return mask.flip(1).cumsum(dim=1).flip(1) * mask


def weighted_mean(hidden: Float[Tensor, "B L H"], weights: Int[Tensor, "B L"]) -> Float[Tensor, "B H"]:
    """Return the mean over tokens, each as often as its weight says."""
    return weighted_sum(hidden, weights) / weights.sum(dim=1, keepdim=True)


def weighted_sum(hidden: Float[Tensor, "B L H"], weights: Int[Tensor, "B L"]) -> Float[Tensor, "B H"]:
    """Return the sum over tokens, each as often as its weight says.

    Zero weight is not enough to drop a position, since 0 × NaN is NaN and padding may hold anything.
    """
    kept = at_least_float32(hidden.masked_fill(weights[..., None] == 0, 0.0))
    return torch.einsum("blh,bl->bh", kept, weights.to(kept.dtype))
