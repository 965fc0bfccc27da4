"""Training and measuring a cross-encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlmembed import distributed
from vlmembed.backbones import PairTemplate, QueryFirst, VisionLanguageModel
from vlmembed.data import PairCollator
from vlmembed.encoder import Scorer
from vlmembed.features import RecentFeatures
from vlmembed.heads import ScoreHead, YesNo
from vlmembed.losses import RankingLoss
from vlmembed.metrics import RerankingMetrics
from vlmembed.modules.base import RetrievalModule
from vlmembed.training.guards import CollapseMonitor, score_likeness
from vlmembed.types import PairBatch, RankingBatch, RerankingSet


class CrossEncoderModule(RetrievalModule):
    """Turns a vision-language model into a cross-encoder: a reranker, which reads a query and a document together.

    Args:
        backbone: The vision-language model.
        loss: What to train with, such as BinaryCrossEntropy or SoftmaxCrossEntropy.
        head: From its hidden states to a score; null for ``vlmembed.heads.YesNo``.
        template: How a query and a document become one input; null for ``vlmembed.backbones.QueryFirst``, the layout
            of Qwen3-VL-Reranker.
        in_batch_negatives: How many documents of other rows of the batch each query gets as negatives, besides its
            own, in each process by itself. Cheap where the template puts the document first: each is read once.
        losses: Further losses by name, for training sources that name one; see ``vlmembed.data.Mixture``.
        **options: As for `RetrievalModule`.
    """

    loss: RankingLoss
    encoder: Scorer

    def __init__(
        self,
        backbone: VisionLanguageModel,
        loss: RankingLoss,
        head: ScoreHead | None = None,
        template: PairTemplate | None = None,
        in_batch_negatives: int = 0,
        losses: Mapping[str, RankingLoss] | None = None,
        **options: Any,
    ) -> None:
        self.in_batch_negatives = in_batch_negatives
        scorer = Scorer(backbone, head or YesNo(), template or QueryFirst())
        super().__init__(scorer, loss, CollapseMonitor("Scores", score_likeness), losses=losses, **options)

    def collator(self) -> PairCollator:
        """Score pairs, with the labels that the loss wants."""
        by_document = self.encoder.template.ends_with_query
        labels = self.loss.label_spec, self.in_batch_negatives, by_document, self.label_specs
        return PairCollator(self.preprocessor, *labels)

    def gather_batch(self, outputs: Tensor, batch: RankingBatch) -> tuple[Tensor, ...]:
        """Join the scores of all processes."""
        return gather_candidates(outputs[:, 0].float(), batch)

    def metric(self, evaluation: RerankingSet) -> RerankingMetrics:
        """Measure the order of each query's candidates."""
        self._recent = RecentFeatures(self.encoder)
        return RerankingMetrics(evaluation)

    def measure(self, batch: PairBatch, metric: RerankingMetrics) -> None:
        """Score pairs."""
        features = self._recent.encode_images(batch.images)
        scores = torch.cat([self.encoder(chunk, features) for chunk in batch.chunks])  # (N, 1)
        metric.update(batch.rows, scores[:, 0])


def gather_candidates(
    scores: Float[Tensor, " N"], batch: RankingBatch
) -> tuple[Float[Tensor, "Q C"], Float[Tensor, "Q C"], Bool[Tensor, "Q C"]]:
    """Join all processes' pairs into what a ranking loss takes: the candidates of each query, side by side.

    A pair that several processes hold is kept once, with its highest target, so that the loss is that of one process
    with all their pairs. Returns scores, targets and mask, the same on every process.
    """
    device = scores.device
    gathered = distributed.gather(scores)
    targets = distributed.gather_on_host(batch.targets, device)
    pairs = distributed.gather_on_host(torch.stack([batch.queries, batch.documents], dim=1), device)
    distinct, inverse = pairs.unique(dim=0, return_inverse=True)
    first = distributed.first_indices(inverse, len(distinct))
    highest = torch.full((len(distinct),), -math.inf).scatter_reduce(0, inverse, targets, "amax")
    # From one row per pair to one row per query: cell (q, c) is there if query q has more than c candidates.
    counts = distinct[:, 0].unique_consecutive(return_counts=True)[1]
    mask = torch.arange(int(counts.max())) < counts[:, None]
    # Empty cells read the first pair's score, which the mask hides.
    indices = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, first)
    padded = torch.zeros(mask.shape).masked_scatter(mask, highest)
    indices, padded, mask = (tensor.to(device, non_blocking=True) for tensor in (indices, padded, mask))
    return gathered[indices], padded, mask
