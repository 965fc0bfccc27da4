"""Losses of all of a query's candidates together, as a distribution over them."""

from __future__ import annotations

import math
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from vlmembed.losses.candidates import check_temperature, cleared, log_shares
from vlmembed.losses.ranking import RankingLoss, Targets


class SoftmaxCrossEntropy(RankingLoss):
    """Softmax cross-entropy over a query's candidates: a right answer should take the whole of the softmax.

    Several right answers share it in proportion to their labels, and labels of 0 get nothing. Averaged over queries.
    With one right answer for each query this is what Qwen3-Reranker and most others train listwise with (localized
    contrastive estimation, arXiv:2101.08751).

    Args:
        temperature: Scores are divided by it.

    Raises:
        ValueError: If the temperature is not above 0 and finite.
    """

    targets: ClassVar[Targets] = Targets(positive=True, several=True)

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature(temperature=temperature)
        self.temperature = temperature

    def forward(
        self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]
    ) -> Float[Tensor, ""]:
        """See `RankingLoss.forward`."""
        labels = cleared(targets, mask)
        return _cross_entropy(log_shares(scores, mask, self.temperature), labels / labels.sum(1, keepdim=True))


class ListNet(RankingLoss):
    """Cross-entropy between the softmax of labels and the softmax of scores. Averaged over queries.

    Labels are logits here: one of 0 still gets a share, and one of 1 only e times as much. So graded labels with some
    distance between them suit it better than 0 and 1, for which there is `SoftmaxCrossEntropy`. The same as Sentence
    Transformers' ``ListNetLoss``. See Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach",
    ICML 2007.
    """

    targets: ClassVar[Targets] = Targets(positive=True, several=True)

    def forward(
        self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]
    ) -> Float[Tensor, ""]:
        """See `RankingLoss.forward`."""
        return _cross_entropy(log_shares(scores, mask), cleared(targets, mask, -math.inf).softmax(1))


def _cross_entropy(shares: Float[Tensor, "Q C"], wanted: Float[Tensor, "Q C"]) -> Float[Tensor, ""]:
    return -(wanted * shares).sum(1).mean()
