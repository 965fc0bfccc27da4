"""Poolings: from the hidden states of an item's tokens to one embedding.

A pooling is a module called with ``(hidden, mask)``. None of them depends on the padding side or on what the padded
positions hold. To add one, subclass `Pooling` anywhere and name it by ``class_path``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Pooling(nn.Module, ABC):
    """Turns token states into one embedding per item.

    A subclass that has weights creates them in `configure`; one that reads other layers than the last sets `layers`.

    Attributes:
        layers: Which of the backbone's hidden states to pool, as indices into its layers with -1 the last one after
            the final norm. With more than one, ``hidden`` has a leading dimension K in this order.
        tail: How many of an item's last tokens are read, if not all: the others' states need not be computed, and
            may be NaN.
    """

    layers: tuple[int, ...] = (-1,)
    tail: int | None = None

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


class FirstToken(Pooling):
    """The state of the first token, CLS pooling (BERT, arXiv:1810.04805); says little under causal attention."""

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the first position of each item that is not padding."""
        return _at(hidden, mask.argmax(dim=1))


class LastToken(Pooling):
    """The state of the last token, which alone has seen the whole item under causal attention (arXiv:2401.00368)."""

    tail = 1

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the last position of each item that is not padding."""
        return _at(hidden, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1))


class Max(Pooling):
    """The largest value of each feature over the tokens (Sentence-BERT, arXiv:1908.10084)."""

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool each feature's maximum."""
        return hidden.masked_fill(mask[..., None] == 0, float("-inf")).amax(dim=1)


class Mean(Pooling):
    """The mean over the tokens (Sentence-BERT, arXiv:1908.10084)."""

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the mean."""
        return _weighted_sum(hidden, mask) / mask.sum(dim=1, keepdim=True)


class MeanSqrtLength(Pooling):
    """The sum over the tokens divided by √length (Universal Sentence Encoder, arXiv:1803.11175).

    Differs from `Mean` only where lengths matter: concatenated with another pooling, or before a layer.
    """

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the scaled sum."""
        return _weighted_sum(hidden, mask) / mask.sum(dim=1, keepdim=True).sqrt()


class WeightedMean(Pooling):
    """The mean weighted by position, 1 for the first token to n for the last (SGPT, arXiv:2202.08904)."""

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the weighted mean; positions count from each item's first token, whichever side is padded."""
        weights = mask.cumsum(dim=1) * mask
        return _weighted_sum(hidden, weights) / weights.sum(dim=1, keepdim=True)


class Concatenation(Pooling):
    """Several poolings of the same states, one after the other; D is the sum of theirs.

    Args:
        poolings: The poolings, in the order in which their embeddings are concatenated.

    Raises:
        ValueError: If fewer than two poolings are given, or if they read different layers.
    """

    def __init__(self, poolings: Sequence[Pooling]) -> None:
        super().__init__()
        if len(poolings) < 2:
            raise ValueError(f"Concatenation needs at least two poolings, got {len(poolings)}.")
        if len({pooling.layers for pooling in poolings}) > 1:
            raise ValueError(
                f"Concatenated poolings must read the same layers, got {[pooling.layers for pooling in poolings]}."
            )
        self.members = nn.ModuleList(poolings)
        self.layers = poolings[0].layers
        tails = [pooling.tail for pooling in poolings if pooling.tail is not None]
        self.tail = max(tails) if len(tails) == len(poolings) else None

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


def _at(hidden: Float[Tensor, "B L H"], position: Int[Tensor, " B"]) -> Float[Tensor, "B H"]:
    return hidden[torch.arange(len(hidden), device=hidden.device), position].float()


def _weighted_sum(hidden: Float[Tensor, "B L H"], weights: Int[Tensor, "B L"]) -> Float[Tensor, "B H"]:
    """Sum in float32: a half-precision sum over thousands of tokens loses the small ones.

    Zero weight is not enough to drop a position, since 0 × NaN is NaN and padding may hold anything.
    """
    kept = hidden.masked_fill(weights[..., None] == 0, 0.0)
    return torch.einsum("blh,bl->bh", kept.float(), weights.float())
