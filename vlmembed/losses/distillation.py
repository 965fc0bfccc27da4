"""Losses of graded relevance: a teacher's scores, into a reranker or an embedder, and the order of labels."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlmembed.late_interaction import Vectors
from vlmembed.losses.base import LabelSpec, Loss, RankingLoss, check_positive, compare, masked, masked_log_softmax


class KLDivergence(RankingLoss):
    """Kullback-Leibler divergence of the teacher's distribution over a query's candidates from the model's.

    Averaged over queries. Not multiplied by the temperature's square, as Sentence Transformers' ``DistillKLDivLoss``
    is: that would make a cosine's small temperature a small loss.

    Args:
        temperature: Scores are divided by it; above 0, else ValueError.
        teacher_temperature: The same for the teacher's scores: the larger, the more the lower-ranked candidates count.
    """

    label_spec = LabelSpec(teacher_scores=True, needs_several=True)

    def __init__(self, temperature: float = 1.0, teacher_temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(temperature=temperature, teacher_temperature=teacher_temperature)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def forward(self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]) -> Tensor:
        model = masked_log_softmax(scores, mask, self.temperature)
        teacher = masked_log_softmax(targets, mask, self.teacher_temperature)
        return (masked(teacher.exp(), mask) * (teacher - model)).sum(1).mean()


class MarginMSE(RankingLoss):
    """Squared difference of margins: two candidates should be as far apart as the teacher says. See arXiv:2010.02666.

    Averaged over all pairs of a query's candidates, then over queries. All pairs, and not only a positive with each
    negative, as the teacher's order of the negatives says most of what labels do not. With two candidates per query
    this is Sentence Transformers' ``MarginMSELoss``.
    """

    label_spec = LabelSpec(teacher_scores=True, needs_several=True)

    def forward(self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]) -> Tensor:
        errors = masked(scores, mask) - masked(targets, mask)
        counts = mask.sum(1)
        # The mean over pairs of squared differences is twice the variance, which takes no (Q, C, C) matrix.
        squares = masked(errors - (errors.sum(1) / counts)[:, None], mask).square().sum(1)
        return (2 * squares / (counts - 1).clamp(min=1)).mean()


class ScoreDistillation(Loss):
    """Distils a teacher's scores into an embedder: similarities are to a reranking loss what a reranker's scores are.

    A query's candidates are the documents that the teacher scored for it: the positives and negatives of its rows. For
    in-batch negatives too, train with `WeightedSum` of this and `InfoNCE`.

    Args:
        loss: What compares them with the teacher's: `KLDivergence` (the default if null), or `MarginMSE`.
        temperature: Similarities are divided by it, so that they spread as a teacher's scores do; as a rule
            `InfoNCE`'s.
    """

    label_spec = LabelSpec(teacher_scores=True)

    def __init__(self, loss: RankingLoss | None = None, temperature: float = 0.02) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.loss = loss or KLDivergence()
        if not self.loss.label_spec.teacher_scores:
            name = type(self.loss).__name__
            raise ValueError(f"{name} wants labels, not a teacher's scores: take KLDivergence or MarginMSE.")
        self.temperature = temperature

    def forward(self, queries: Vectors, documents: Vectors, relevance: Tensor, scores: Tensor | None = None) -> Tensor:
        if scores is None:
            raise ValueError("ScoreDistillation needs a teacher's scores, and the batch has none.")
        scores = scores.to(queries.device, non_blocking=True)
        # A product is made in half precision under autocast.
        with torch.autocast(queries.device.type, enabled=False):
            similarities = compare(queries, documents).matrix  # (Q, P)
            # The documents that the teacher scored are the query's candidates: C = P, mostly masked.
            return self.loss(similarities / self.temperature, scores.to(similarities.dtype), ~scores.isnan())


class CoSENT(Loss):
    """Of two pairs of a query and a document, that with the higher label should have the higher cosine.

    The logarithm of 1 plus the sum, over all two judged pairs of the batch whose labels differ, of e to the power of
    (the lower-labelled pair's cosine - the higher-labelled one's) / temperature. Labels are compared, so any scale will
    do: a row's ``label`` or, where it has them, its ``scores``. Documents of other rows are no negatives. A pair that
    is judged twice counts once, with its highest label; otherwise the same as Sentence Transformers' ``CoSENTLoss``.
    See Huang et al., "CoSENT: Consistent Sentence Embedding via Similarity Ranking",
    IEEE/ACM TASLP 2024 (doi:10.1109/TASLP.2024.3402087).

    Args:
        temperature: Cosines are divided by it; Sentence Transformers' ``scale`` is 1 over it.
    """

    label_spec = LabelSpec(grades=True)

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, queries: Vectors, documents: Vectors, relevance: Tensor, scores: Tensor | None = None) -> Tensor:
        if scores is None:
            raise ValueError("CoSENT needs the labels of pairs, and the batch has none.")
        # On the host, where scores are in training: nobody waits for the device.
        rows, columns = (~scores.isnan()).nonzero().T  # Of the M judged pairs.
        labels, device = scores[rows, columns], queries.device
        is_lower = labels[:, None] < labels  # (M, M): the row's pair has the lower label, the column's the higher.
        rows, columns, is_lower = (tensor.to(device, non_blocking=True) for tensor in (rows, columns, is_lower))
        with torch.autocast(device.type, enabled=False):
            similarities = compare(queries, documents).pairs(rows, columns) / self.temperature
            differences = (similarities[:, None] - similarities[None, :]).masked_fill(~is_lower, -math.inf)
            return torch.cat([similarities.new_zeros(1), differences.flatten()]).logsumexp(0)
