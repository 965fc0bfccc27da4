"""A cross-encoder's losses on labels: pointwise, listwise and pairwise."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from vlmembed.losses.base import LabelSpec, RankingLoss, check_positive, masked, masked_log_softmax


class BinaryCrossEntropy(RankingLoss):
    """Binary cross-entropy of each pair's label: is this document a positive of this query?

    Averaged over all pairs of the batch, so that queries with more candidates count more, as in Sentence Transformers.

    Args:
        positive_weight: What a positive counts beside a negative, to balance their numbers; above 0, else ValueError.
    """

    label_spec = LabelSpec(largest=1.0)

    def __init__(self, positive_weight: float = 1.0) -> None:
        super().__init__()
        check_positive(positive_weight=positive_weight)
        self.positive_weight = positive_weight

    def forward(self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]) -> Tensor:
        logits, labels = masked(scores, mask), masked(targets, mask)
        weight = logits.new_full((), self.positive_weight)
        losses = binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none", pos_weight=weight)
        return masked(losses, mask).sum() / mask.sum()


class SoftmaxCrossEntropy(RankingLoss):
    """Softmax cross-entropy over a query's candidates: a positive should take the whole of the softmax.

    Positives share it in proportion to their labels; labels of 0 get nothing. Averaged over queries. With one positive
    per query: localized contrastive estimation (arXiv:2101.08751), as Qwen3-Reranker and most others train listwise.

    Args:
        temperature: Scores are divided by it; above 0, else ValueError.
    """

    label_spec = LabelSpec(needs_positive=True, needs_several=True)

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]) -> Tensor:
        labels = masked(targets, mask)
        shares = labels / labels.sum(1, keepdim=True)
        return -(shares * masked_log_softmax(scores, mask, self.temperature)).sum(1).mean()


class ListNet(RankingLoss):
    """Cross-entropy between the softmax of labels and the softmax of scores, averaged over queries.

    Labels are logits here: one of 0 still gets a share, and one of 1 only e times as much, so it suits grades better
    than 0 and 1, for which there is `SoftmaxCrossEntropy`. The same as Sentence Transformers' ``ListNetLoss``. See Cao
    et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007.
    """

    label_spec = LabelSpec(needs_positive=True, needs_several=True)

    def forward(self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]) -> Tensor:
        shares = masked(targets, mask, -math.inf).softmax(1)
        return -(shares * masked_log_softmax(scores, mask)).sum(1).mean()


class RankNet(RankingLoss):
    """Pairwise logistic loss: the candidate with the higher label should have the higher score.

    For two candidates of one query whose labels differ, minus the binary logarithm of the sigmoid of the difference of
    their scores; averaged over all such pairs of the batch. The same as Sentence Transformers' ``RankNetLoss``. See
    Burges et al., "Learning to Rank using Gradient Descent", ICML 2005.
    """

    label_spec = LabelSpec(needs_positive=True, needs_several=True)

    def forward(self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]) -> Tensor:
        losses, is_ordered = _pairs(masked(scores, mask), masked(targets, mask), mask)
        return losses.masked_fill(~is_ordered, 0.0).sum() / is_ordered.sum().clamp(min=1)


class LambdaRank(RankingLoss):
    """RankNet whose pairs are weighted by how much NDCG@k changes when the two candidates swap ranks.

    Only pairs count with a candidate among the model's first k, and their average is taken. The gain of label l is
    2^l - 1, over the best DCG@k of the query's candidates. The same as Sentence Transformers' ``LambdaLoss`` with its
    ``LambdaRankScheme``. See Wang et al., "The LambdaLoss Framework for Ranking Metric Optimization", CIKM 2018.

    Args:
        k: How many ranks NDCG looks at; 1 or more, else ValueError.
    """

    # 2^50, squared and added up, is still finite in float32.
    label_spec = LabelSpec(largest=50.0, needs_positive=True, needs_several=True)

    def __init__(self, k: int = 10) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k is 1 or more, got {k}")
        self.k = k

    def forward(self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]) -> Tensor:
        logits, labels = masked(scores, mask), masked(targets, mask)
        losses, is_ordered = _pairs(logits, labels, mask)
        # (Q, C) rank of each candidate by score, from 0; padding comes last.
        order = masked(logits.detach(), mask, -math.inf).argsort(descending=True, stable=True)
        ranks = order.argsort()
        discounts = 1 / torch.log2(2.0 + torch.arange(labels.shape[1], device=labels.device))  # (C,), by rank
        gains = torch.exp2(labels) - 1  # Padding has label 0, which gains nothing.
        best = (gains.sort(descending=True).values * discounts)[:, : self.k].sum(1, keepdim=True)  # (Q, 1)
        # Without a positive all gains are 0, and a pair that does not count must still be finite.
        gains = gains / best.clamp(min=torch.finfo(best.dtype).tiny)
        change = (_differences(gains) * _differences(discounts[ranks])).abs()  # (Q, C, C)
        is_top = ranks < self.k
        counts = is_ordered & (is_top[:, :, None] | is_top[:, None, :])
        return (change * losses).masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)


def _pairs(logits: Tensor, labels: Tensor, mask: Tensor) -> tuple[Float[Tensor, "Q C C"], Bool[Tensor, "Q C C"]]:
    """Return -log2 sigmoid(score of row - score of column), and whether the row's candidate has the higher label."""
    losses = softplus(-_differences(logits)) / math.log(2)
    return losses, (_differences(labels) > 0) & mask[:, :, None] & mask[:, None, :]


def _differences(values: Float[Tensor, "Q C"]) -> Float[Tensor, "Q C C"]:
    return values[:, :, None] - values[:, None, :]
