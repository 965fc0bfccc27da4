"""Training and measuring a cross-encoder."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlmembed import distributed
from vlmembed.backbones import VisionLanguageModel
from vlmembed.backbones.chat_templates import PairTemplate, QueryFirst
from vlmembed.data import PairCollator
from vlmembed.encoder import Scorer
from vlmembed.heads import ScoreHead, YesNo
from vlmembed.losses import RankingLoss
from vlmembed.metrics import RerankingMetrics
from vlmembed.modules.module import RetrievalModule
from vlmembed.modules.prediction import write_reranking
from vlmembed.modules.recent import RecentFeatures
from vlmembed.modules.watch import ScoreWatch
from vlmembed.types import PairBatch, RankingBatch, RerankingSet


class CrossEncoderModule(RetrievalModule):
    """Turns a vision-language model into a cross-encoder: a reranker, which reads a query and a document together.

    Args:
        backbone: The vision-language model.
        loss: What to train with, such as BinaryCrossEntropy or SoftmaxCrossEntropy.
        head: From its hidden states to a score; null for ``vlmembed.heads.YesNo``.
        template: How a query and a document become one input; null for ``vlmembed.backbones.QueryFirst``, the layout
            of Qwen3-VL-Reranker.
        in_batch_negatives: How many documents of other rows of the batch each query gets as wrong answers, besides its
            own, in each process by itself. Cheap where the template puts the document first: each is read once.
        **options: As for `RetrievalModule`.
    """

    loss: RankingLoss
    watches = ScoreWatch

    def __init__(
        self,
        backbone: VisionLanguageModel,
        loss: RankingLoss,
        head: ScoreHead | None = None,
        template: PairTemplate | None = None,
        in_batch_negatives: int = 0,
        **options: Any,
    ) -> None:
        self._template = template or QueryFirst()
        self._in_batch_negatives = in_batch_negatives
        super().__init__(partial(Scorer, backbone, head or YesNo(), self._template), loss, **options)

    def collator(self) -> PairCollator:
        """Batches of pairs, with the targets that the loss wants."""
        by_document = self._template.ends_with_query
        return PairCollator(self.preprocessor, self.loss.label_spec, self._in_batch_negatives, by_document)

    def gather_batch(self, outputs: Tensor, batch: RankingBatch) -> tuple[Tensor, ...]:
        """Join the scores of all processes."""
        return gather_candidates(outputs[:, 0].float(), batch)

    def measurement(self, evaluation: RerankingSet) -> RerankingMetrics:
        """Measure the order of each query's candidates."""
        self._recent = RecentFeatures(self.encoder)
        return RerankingMetrics(evaluation)

    def measure(self, batch: PairBatch, metrics: RerankingMetrics) -> None:
        """Score pairs."""
        features = self._recent.encode_images(batch.images)
        scores = torch.cat([self.encoder(chunk, features) for chunk in batch.chunks])
        metrics.update(batch.rows, scores[:, 0])

    def write_predictions(self, metrics: RerankingMetrics, folder: Path) -> None:
        """Write the candidates in their new order."""
        write_reranking(metrics, folder, self.trainer.is_global_zero)


def gather_candidates(
    scores: Float[Tensor, " N"], batch: RankingBatch
) -> tuple[Float[Tensor, "Q C"], Float[Tensor, "Q C"], Bool[Tensor, "Q C"]]:
    """Join all processes' pairs into what a ranking loss takes: the candidates of each query, side by side.

    A pair that several processes hold is kept once, with its highest target, so that the loss is that of one process
    with all their pairs.

    Args:
        scores: Of this process's pairs.
        batch: This process's batch.

    Returns:
        Scores, targets and mask, the same on every process.
    """
    device = scores.device
    gathered = distributed.gather(scores)
    targets = distributed.gather_on_host(batch.targets, device)
    pairs = distributed.gather_on_host(torch.stack([batch.queries, batch.documents], dim=1), device)
    distinct, inverse = pairs.unique(dim=0, return_inverse=True)
    first = distributed.first_places(inverse, len(distinct))
    highest = torch.full((len(distinct),), -math.inf).scatter_reduce(0, inverse, targets, "amax")
    counts = distinct[:, 0].unique_consecutive(return_counts=True)[1]
    mask = torch.arange(int(counts.max())) < counts[:, None]
    # Each place's pair; the places where there is none look at the first of all, and nobody looks at them.
    places = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, first)
    wanted = torch.zeros(mask.shape).masked_scatter(mask, highest)
    here, wanted_here, mask_here = (each.to(device, non_blocking=True) for each in (places, wanted, mask))
    return gathered[here], wanted_here, mask_here
