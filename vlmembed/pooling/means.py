"""Poolings that average over tokens by where they are."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from vlmembed.pooling.base import Pooling, tokens_from_end, weighted_mean, weighted_sum


class Mean(Pooling):
    """The mean over the tokens (Sentence-BERT, arXiv:1908.10084)."""

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the mean."""
        return weighted_mean(hidden, mask)


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
        return weighted_sum(hidden, mask) / mask.sum(dim=1, keepdim=True).sqrt()


class WeightedMean(Pooling):
    """The mean weighted by position, 1 for the first token to n for the last (SGPT, arXiv:2202.08904)."""

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the weighted mean; positions count from each item's first token, whichever side is padded."""
        return weighted_mean(hidden, mask.cumsum(dim=1) * mask)


class MeanOfLast(Pooling):
    """The mean over the last few tokens: a compromise between `LastToken` and `Mean`.

    Args:
        tokens: How many; an item that has fewer is averaged as a whole.

    Raises:
        ValueError: If ``tokens`` is below 1.
    """

    def __init__(self, tokens: int = 8) -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"MeanOfLast: tokens is 1 or more, got {tokens}.")
        self.tokens = tokens
        self.num_last_tokens = tokens

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the mean of the last tokens."""
        place = tokens_from_end(mask)
        return weighted_mean(hidden, mask * (place <= self.tokens))
