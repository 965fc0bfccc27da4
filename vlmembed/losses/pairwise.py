"""Losses of two of a query's candidates at a time: the one with the higher label should have the higher score."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from vlmembed.losses.candidates import cleared
from vlmembed.losses.ranking import RankingLoss, Targets

#: 2 to this power, squared and added up, still is a number in float32.
LARGEST_GRADE = 50.0


class RankNet(RankingLoss):
    """Pairwise logistic loss: how surprising it is, in bits, that the candidate with the higher label is the better.

    For two candidates of one query whose labels differ, minus the binary logarithm of the sigmoid of the difference of
    their scores; averaged over all such pairs of the batch. The same as Sentence Transformers' ``RankNetLoss``. See
    Burges et al., "Learning to Rank using Gradient Descent", ICML 2005.
    """

    targets: ClassVar[Targets] = Targets(positive=True, several=True)

    def forward(
        self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]
    ) -> Float[Tensor, ""]:
        """See `RankingLoss.forward`."""
        logits, labels = cleared(scores, mask), cleared(targets, mask)
        return _mean(_surprise(logits), _ordered(labels, mask))


class LambdaRank(RankingLoss):
    """RankNet whose pairs count as much as NDCG@k changes when the two change places.

    Only pairs count of which one is among the model's first k; a label l is worth 2^l - 1, and all is over the best
    NDCG@k that the query's own candidates allow. Averaged over all pairs that count. The same as Sentence
    Transformers' ``LambdaLoss`` with its ``LambdaRankScheme``. See Wang et al., "The LambdaLoss Framework for Ranking
    Metric Optimization", CIKM 2018.

    Args:
        k: How many places of the ranking NDCG looks at.

    Raises:
        ValueError: If k is below 1.
    """

    targets: ClassVar[Targets] = Targets(largest=LARGEST_GRADE, positive=True, several=True)

    def __init__(self, k: int = 10) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k is 1 or more, got {k}")
        self.k = k

    def forward(
        self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]
    ) -> Float[Tensor, ""]:
        """See `RankingLoss.forward`."""
        logits, labels = cleared(scores, mask), cleared(targets, mask)
        ranks = _ranks(logits.detach(), mask)
        top = ranks < self.k
        ordered = _ordered(labels, mask) & (top[:, :, None] | top[:, None, :])
        return _mean(self._gains(labels, ranks) * _surprise(logits), ordered)

    def _gains(self, labels: Float[Tensor, "Q C"], ranks: Int[Tensor, "Q C"]) -> Float[Tensor, "Q C C"]:
        """By how much NDCG changes when two candidates change places."""
        # Grades of 0 where there is no candidate are worth nothing.
        ideal = torch.exp2(labels.sort(descending=True).values) - 1
        places = torch.arange(labels.shape[1], device=labels.device)
        best = (ideal * _discounts(places))[:, : self.k].sum(1)
        # Where there is no right answer nothing has worth, and a pair that does not count must still be a number.
        worth = (torch.exp2(labels) - 1) / best.clamp(min=torch.finfo(best.dtype).tiny)[:, None]
        return _differences(_discounts(ranks)).abs() * _differences(worth).abs()


def _differences(values: Tensor) -> Tensor:
    return values[:, :, None] - values[:, None, :]


def _surprise(logits: Float[Tensor, "Q C"]) -> Float[Tensor, "Q C C"]:
    """In bits, that the row's candidate is better than the column's."""
    return softplus(-_differences(logits)) / math.log(2)


def _ordered(labels: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]) -> Bool[Tensor, "Q C C"]:
    """Whether the row's candidate has the higher label of the two."""
    return (_differences(labels) > 0) & mask[:, :, None] & mask[:, None, :]


def _ranks(logits: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]) -> Int[Tensor, "Q C"]:
    """Each candidate's place by score, the best being 0; places without candidate come last."""
    return cleared(logits, mask, -math.inf).argsort(descending=True, stable=True).argsort()


def _discounts(ranks: Int[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
    return 1 / torch.log2(2.0 + ranks)


def _mean(losses: Float[Tensor, "Q C C"], counted: Bool[Tensor, "Q C C"]) -> Float[Tensor, ""]:
    """Average what counts; nothing where no two labels differ."""
    return losses.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
