"""Losses of each candidate by itself."""

from __future__ import annotations

import math
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from vlmembed.losses.candidates import cleared
from vlmembed.losses.ranking import RankingLoss, Targets


class BinaryCrossEntropy(RankingLoss):
    """Binary cross-entropy of each pair's label: is this document an answer to this query?

    Averaged over all pairs of the batch, so that queries with more candidates count more, as in Sentence Transformers.

    Args:
        positive_weight: What a right answer counts, beside a wrong one: as many as there are wrong answers for each
            right one, to make up for their number.

    Raises:
        ValueError: If the weight is not above 0 and finite.
    """

    targets: ClassVar[Targets] = Targets(largest=1.0)

    def __init__(self, positive_weight: float = 1.0) -> None:
        super().__init__()
        if not 0 < positive_weight < math.inf:
            raise ValueError(f"positive_weight must be above 0 and finite, got {positive_weight}")
        self.positive_weight = positive_weight

    def forward(
        self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]
    ) -> Float[Tensor, ""]:
        """See `RankingLoss.forward`."""
        logits, labels = cleared(scores, mask), cleared(targets, mask)
        weight = logits.new_full((), self.positive_weight)
        losses = binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none", pos_weight=weight)
        return cleared(losses, mask).sum() / mask.sum()
