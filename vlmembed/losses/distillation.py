"""Losses that distil a teacher's scores, into a reranker's or into an embedder's similarities."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor
from torch.nn.functional import normalize

from vlmembed.losses.candidates import check_temperature, cleared, log_shares
from vlmembed.losses.loss import Loss
from vlmembed.losses.ranking import RankingLoss, Targets


class KLDivergence(RankingLoss):
    """Kullback-Leibler divergence of the teacher's distribution over a query's candidates from the model's.

    Averaged over queries. Not multiplied by the temperature's square, as Sentence Transformers' ``DistillKLDivLoss``
    is: that would make a cosine's small temperature a small loss.

    Args:
        temperature: Scores are divided by it.
        teacher_temperature: The teacher's scores are divided by it: the larger, the more a teacher says about what is
            not at its top.

    Raises:
        ValueError: If a temperature is not above 0 and finite.
    """

    targets: ClassVar[Targets] = Targets(scores=True, several=True)

    def __init__(self, temperature: float = 1.0, teacher_temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature(temperature=temperature, teacher_temperature=teacher_temperature)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature

    def forward(
        self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]
    ) -> Float[Tensor, ""]:
        """See `RankingLoss.forward`."""
        own, teachers = log_shares(scores, mask, self.temperature), log_shares(targets, mask, self.teacher_temperature)
        return (cleared(teachers.exp(), mask) * (teachers - own)).sum(1).mean()


class MarginMSE(RankingLoss):
    """Squared difference of margins: two candidates should be as far apart as the teacher says. See arXiv:2010.02666.

    Averaged over all pairs of a query's candidates, then over queries. All pairs, and not only a right answer with each
    of the others, as the teacher's order of the others says most of what labels do not. With two candidates for each
    query this is Sentence Transformers' ``MarginMSELoss``.
    """

    targets: ClassVar[Targets] = Targets(scores=True, several=True)

    def forward(
        self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]
    ) -> Float[Tensor, ""]:
        """See `RankingLoss.forward`."""
        off = cleared(scores, mask) - cleared(targets, mask)
        counts = mask.sum(1)
        # The mean over pairs of squared differences is twice the variance, which takes no product of all with all.
        squares = cleared(off - (off.sum(1) / counts)[:, None], mask).square().sum(1)
        return (2 * squares / (counts - 1).clamp(min=1)).mean()


class ScoreDistillation(Loss):
    """Distils a teacher's scores into an embedder: its cosines are to a reranking loss what a reranker's scores are.

    Of each query, the documents that count are those that the teacher scored for it: the positives and the negatives
    of its rows. For in-batch negatives too, train with `WeightedSum` of this and `InfoNCE`.

    Args:
        loss: What compares them with the teacher's: `KLDivergence` (the default if null), or `MarginMSE`.
        temperature: Cosines are divided by it, so that they spread as a teacher's scores do. As in `InfoNCE` it should
            be what the embedder is to be trained at.

    Raises:
        ValueError: If the loss wants labels, or the temperature is not above 0 and finite.
    """

    def __init__(self, loss: RankingLoss | None = None, temperature: float = 0.02) -> None:
        super().__init__()
        check_temperature(temperature=temperature)
        self.loss = loss or KLDivergence()
        if not self.loss.targets.scores:
            raise ValueError(
                f"{type(self.loss).__name__} wants labels, not a teacher's scores: take KLDivergence or MarginMSE."
            )
        self.temperature = temperature

    @property
    def wants_scores(self) -> bool:
        """True: there is nothing else to learn from."""
        return True

    def forward(
        self,
        queries: Float[Tensor, "Q D"],
        documents: Float[Tensor, "P D"],
        relevance: Int8[Tensor, "Q P"],
        scores: Float[Tensor, "Q P"] | None = None,
    ) -> Float[Tensor, ""]:
        """See `Loss.forward`.

        Raises:
            ValueError: If there are no scores.
        """
        if scores is None:
            raise ValueError("ScoreDistillation needs a teacher's scores, and the batch has none.")
        scores = scores.to(queries.device, non_blocking=True)
        # A product is made in half precision under autocast.
        with torch.autocast(queries.device.type, enabled=False):
            asked, answers = (_directions(each) for each in (queries, documents))
            loss: Tensor = self.loss(asked @ answers.T / self.temperature, scores.to(asked.dtype), _scored(scores))
            return loss


def _directions(embeddings: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    return normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))


def _scored(scores: Float[Tensor, "Q P"]) -> Bool[Tensor, "Q P"]:
    return ~scores.isnan()
