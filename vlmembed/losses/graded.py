"""A loss of graded similarity: pairs in the order of their labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmembed.late_interaction import Vectors
from vlmembed.losses.base import Loss, check_positive
from vlmembed.losses.similarity import compare


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

    wants_grades = True

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
        is_lower = (
            labels[:, None] < labels[None, :]
        )  # (M, M): the row's pair has the lower label, the column's the higher.
        rows, columns, is_lower = (tensor.to(device, non_blocking=True) for tensor in (rows, columns, is_lower))
        with torch.autocast(device.type, enabled=False):
            similarities = compare(queries, documents).pairs(rows, columns) / self.temperature
            differences = (similarities[:, None] - similarities[None, :]).masked_fill(~is_lower, -math.inf)
            return torch.cat([similarities.new_zeros(1), differences.flatten()]).logsumexp(0)
