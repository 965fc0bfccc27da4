"""Train the first d numbers of an embedding to be an embedding themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from vlmembed.losses.loss import Loss
from vlmembed.losses.similarity import SimilarityLoss


class Matryoshka(Loss):
    """Sum of a loss over embeddings cut to several dimensions, so that users may cut them too. See arXiv:2205.13147.

    Args:
        loss: The loss to take at each dimension.
        dimensions: How many leading numbers of the embedding to keep, each once. Include the full dimension: what is
            not listed is not trained.
        weights: What each dimension's loss counts, in the order of ``dimensions``; 1 each by default.

    Raises:
        ValueError: If dimensions are missing, repeated or below 1, or there is not one weight for each.
    """

    def __init__(self, loss: Loss, dimensions: Sequence[int], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not dimensions or min(dimensions) < 1 or len(set(dimensions)) < len(dimensions):
            raise ValueError(f"dimensions must be distinct numbers of at least 1, got {dimensions!r}")
        weights = [1.0] * len(dimensions) if weights is None else weights
        if len(weights) != len(dimensions):
            raise ValueError(f"weights must be one per dimension ({len(dimensions)}), got {weights!r}")
        self.loss = loss
        self.weights = dict(sorted(zip(dimensions, weights, strict=True), reverse=True))

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The dimensions trained, largest first."""
        return tuple(self.weights)

    @property
    def wants_scores(self) -> bool:
        """Whether the wrapped loss does."""
        return self.loss.wants_scores

    def forward(
        self,
        queries: Float[Tensor, "Q D"],
        documents: Float[Tensor, "P D"],
        relevance: Int8[Tensor, "Q P"],
        scores: Float[Tensor, "Q P"] | None = None,
    ) -> Float[Tensor, ""]:
        """See ``Loss.forward``.

        Raises:
            ValueError: If a dimension is above the embedding's.
        """
        largest, available = self.dimensions[0], queries.shape[1]
        if largest > available:
            raise ValueError(f"Matryoshka dimension {largest} is above the embedding's, which is {available}")
        # One that changes forward wants to be called, like any other loss.
        if isinstance(self.loss, SimilarityLoss) and type(self.loss).forward is SimilarityLoss.forward:
            return self.loss.weighted_sum(queries, documents, relevance, self.weights)
        teacher = () if scores is None else (scores,)
        losses = [
            weight * self.loss(queries[:, :dimension], documents[:, :dimension], relevance, *teacher)
            for dimension, weight in self.weights.items()
        ]
        return torch.stack(losses).sum()
