"""Several losses at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from vlmembed.losses.loss import Loss


class WeightedSum(Loss):
    """Sum of several losses, each with a weight: such as InfoNCE, and the distillation of a teacher's scores.

    Args:
        losses: What to add up.
        weights: What each counts, in their order; 1 each by default.

    Raises:
        ValueError: If there are no losses, or not one weight for each.
    """

    def __init__(self, losses: Sequence[Loss], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not losses:
            raise ValueError("losses must be a list of one or more, got none")
        weights = [1.0] * len(losses) if weights is None else list(weights)
        if len(weights) != len(losses):
            raise ValueError(f"weights must be one per loss ({len(losses)}), got {weights!r}")
        self.losses = nn.ModuleList(losses)
        self.weights = weights

    @property
    def terms(self) -> list[tuple[Loss, float]]:
        """The losses and what each counts."""
        return [
            (loss, weight) for loss, weight in zip(self.losses, self.weights, strict=True) if isinstance(loss, Loss)
        ]

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Those of all losses, largest first."""
        return tuple(sorted({each for loss, _ in self.terms for each in loss.dimensions}, reverse=True))

    @property
    def wants_scores(self) -> bool:
        """Whether one of them does."""
        return any(loss.wants_scores for loss, _ in self.terms)

    def forward(
        self,
        queries: Float[Tensor, "Q D"],
        documents: Float[Tensor, "P D"],
        relevance: Int8[Tensor, "Q P"],
        scores: Float[Tensor, "Q P"] | None = None,
    ) -> Float[Tensor, ""]:
        """See `Loss.forward`."""
        given = (queries, documents, relevance)
        losses = [weight * (loss(*given, scores) if loss.wants_scores else loss(*given)) for loss, weight in self.terms]
        return torch.stack(losses).sum()
