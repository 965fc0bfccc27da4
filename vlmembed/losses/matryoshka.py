"""Losses made of other losses: one at several dimensions or numbers of vectors, or several at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmembed.late_interaction import MultiVectors, Vectors, at_least_float32, merge, truncate, ward_trees
from vlmembed.losses.base import LabelSpec, Loss


class LossAtSizes(Loss):
    """Sum of a loss over embeddings of several sizes, each with a weight."""

    #: What a size is called.
    size = "size"

    def __init__(self, loss: Loss, sizes: Sequence[int], names: str, weights: Sequence[float] | None) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            raise ValueError(f"{names} must be distinct numbers of at least 1, got {sizes!r}")
        weights = [1.0] * len(sizes) if weights is None else weights
        if len(weights) != len(sizes):
            raise ValueError(f"weights must be one per {self.size} ({len(sizes)}), got {weights!r}")
        self.loss = loss
        self.weights = dict(zip(sizes, weights, strict=True))
        self.dimensions, self.merging_factors = loss.dimensions, loss.merging_factors
        self.label_spec = loss.label_spec

    @abstractmethod
    def resized(self, queries: Vectors, documents: Vectors) -> Iterator[tuple[Vectors, Vectors]]:
        """Yield queries and documents of each size, in the order of ``weights``."""

    def forward(self, queries: Vectors, documents: Vectors, relevance: Tensor, scores: Tensor | None = None) -> Tensor:
        teacher = () if scores is None else (scores,)
        losses = [
            weight * self.loss(*sides, relevance, *teacher)
            for weight, sides in zip(self.weights.values(), self.resized(queries, documents), strict=True)
        ]
        return torch.stack(losses).sum()


class Matryoshka(LossAtSizes):
    """Sum of a loss over embeddings cut to several dimensions, so that users may cut them too. See arXiv:2205.13147.

    Args:
        loss: The loss to take at each dimension.
        dimensions: How many leading numbers of the embedding to keep, each once. Include the full dimension: what is
            not listed is not trained.
        weights: What each dimension's loss counts, in the order of ``dimensions``; 1 each by default.
    """

    size = "dimension"

    def __init__(self, loss: Loss, dimensions: Sequence[int], weights: Sequence[float] | None = None) -> None:
        super().__init__(loss, dimensions, "dimensions", weights)
        self.weights = dict(sorted(self.weights.items(), reverse=True))  # Largest dimension first.
        self.dimensions = tuple(self.weights)

    def resized(self, queries: Vectors, documents: Vectors) -> Iterator[tuple[Vectors, Vectors]]:
        return ((truncate(queries, size), truncate(documents, size)) for size in self.dimensions)

    def forward(self, queries: Vectors, documents: Vectors, relevance: Tensor, scores: Tensor | None = None) -> Tensor:
        largest, available = self.dimensions[0], queries.shape[1]
        if largest > available:
            raise ValueError(f"Matryoshka dimension {largest} is above the embedding's, which is {available}")
        # Converted once, so that half-precision embeddings get a gradient that was added up over dimensions in float32.
        return super().forward(at_least_float32(queries), at_least_float32(documents), relevance, scores)


class MergedTokens(LossAtSizes):
    """Sum of a loss over documents whose vectors are merged to ever fewer; for models with several vectors an item.

    So users may store fewer: a factor of 4 is a quarter of the bytes. Vectors are merged by similarity, never left
    out; see `vlmembed.late_interaction.merge` and arXiv:2506.04997.

    Args:
        loss: The loss to take at each factor.
        factors: How many times fewer vectors, each once; 1 for all of them. What is not listed is not trained.
        weights: What each factor's loss counts, in the order of ``factors``; 1 each by default.
    """

    size = "factor"

    def __init__(self, loss: Loss, factors: Sequence[int], weights: Sequence[float] | None = None) -> None:
        super().__init__(loss, factors, "factors", weights)
        self.weights = dict(sorted(self.weights.items()))
        self.merging_factors = tuple(self.weights)

    def resized(self, queries: Vectors, documents: Vectors) -> Iterator[tuple[Vectors, Vectors]]:
        if not isinstance(documents, MultiVectors):
            raise ValueError("MergedTokens is for vlmembed.modules.MultiVectorModule: a single vector has no others.")
        trees = None if self.merging_factors == (1,) else ward_trees(documents)
        return ((queries, merge(documents, factor, trees)) for factor in self.merging_factors)


class WeightedSum(Loss):
    """Sum of several losses, each with a weight: such as InfoNCE, and the distillation of a teacher's scores.

    Args:
        losses: What to add up.
        weights: What each counts, in their order; 1 each by default.
    """

    def __init__(self, losses: Sequence[Loss], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not losses:
            raise ValueError("losses must be a list of one or more, got none")
        weights = [1.0] * len(losses) if weights is None else list(weights)
        if len(weights) != len(losses):
            raise ValueError(f"weights must be one per loss ({len(losses)}), got {weights!r}")
        self.losses, self.weights = nn.ModuleList(losses), weights
        self.dimensions = tuple(sorted({dimension for loss in losses for dimension in loss.dimensions}, reverse=True))
        factors = {factor for loss in losses for factor in loss.merging_factors}
        self.merging_factors = tuple(sorted(factors))
        specs = [loss.label_spec for loss in losses]
        self.label_spec = LabelSpec(
            teacher_scores=any(spec.teacher_scores for spec in specs),
            grades=any(spec.grades for spec in specs),
            needs_negative=any(spec.needs_negative for spec in specs),
        )

    @property
    def terms(self) -> list[tuple[Any, float]]:
        """The losses, each with its weight."""
        return list(zip(self.losses, self.weights, strict=True))

    def forward(self, queries: Vectors, documents: Vectors, relevance: Tensor, scores: Tensor | None = None) -> Tensor:
        batch = queries, documents, relevance
        losses = [
            weight * (loss(*batch, scores) if loss.label_spec.scores else loss(*batch)) for loss, weight in self.terms
        ]
        return torch.stack(losses).sum()
