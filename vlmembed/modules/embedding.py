"""Training and measuring an embedder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmembed import distributed
from vlmembed.backbones import VisionLanguageModel
from vlmembed.encoder import Encoder
from vlmembed.heads import ScoreHead
from vlmembed.late_interaction import MultiVectors, Vectors
from vlmembed.losses import Loss
from vlmembed.metrics import RetrievalMetrics
from vlmembed.modules.base import RetrievalModule
from vlmembed.pooling import Pooling
from vlmembed.training.guards import CollapseMonitor, embedding_likeness
from vlmembed.types import Batch, EvaluationSet


class EmbeddingModule(RetrievalModule):
    """Turns a vision-language model into an embedder.

    Args:
        backbone: The vision-language model.
        pooling: From its hidden states to an embedding.
        loss: What to train with, such as InfoNCE, or Matryoshka around it.
        losses: Further losses by name, for training sources that name one; see ``vlmembed.data.Mixture``.
        **options: As for `RetrievalModule`.
    """

    loss: Loss

    def __init__(
        self,
        backbone: VisionLanguageModel,
        pooling: Pooling,
        loss: Loss,
        losses: Mapping[str, Loss] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(pooling, ScoreHead):
            raise ValueError(f"{type(pooling).__name__} is a head of vlmembed.modules.CrossEncoderModule, no pooling.")
        monitor = CollapseMonitor("Embeddings", embedding_likeness)
        super().__init__(Encoder(backbone, pooling), loss, monitor, losses=losses, **options)

    def check(self) -> None:
        """Refuse losses over fewer vectors, too."""
        if any(loss.merging_factors for loss in (self.loss, *self.losses.values())):
            raise ValueError("MergedTokens is for vlmembed.modules.MultiVectorModule: a single vector has no others.")
        super().check()

    def gather_batch(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Join the embeddings of all processes."""
        return gather_batch(outputs, batch)

    def metric(self, evaluation: EvaluationSet) -> RetrievalMetrics:
        """Measure how well queries find their documents in the whole corpus."""
        return RetrievalMetrics(evaluation, self.dimensions)

    def predictions(self, metric: RetrievalMetrics) -> dict[str, Tensor]:
        """``queries`` (Q, D) and ``documents`` (P, D), not normalised, in the order of the set's files."""
        counts = [len(metric.evaluation.queries), len(metric.evaluation.corpus)]
        queries, documents = metric.gather_embeddings().split(counts)
        return {"queries": queries, "documents": documents}


def gather_batch(embeddings: Vectors, batch: Batch) -> tuple[Any, ...]:
    """Join all processes' batches into what a loss takes.

    A document, or a query, that several processes hold is kept once, so that the loss is that of one process with
    all their examples. From embeddings (N, D), or the vectors of N items, in the order of the batch's chunks, come
    queries (Q, D), documents (P, D), relevance (Q, P) and, if the batch has them, a teacher's scores (Q, P), the same
    on every process. Relevance stays on the host, which knows it already: nobody waits for the device.
    """
    queries, query_ids = _gather_distinct(embeddings, batch.queries, batch.query_ids)
    documents, document_ids = _gather_distinct(embeddings, batch.documents, batch.document_ids)
    # Judged pairs of all processes, (M, 2) ids with (M,) labels, become cells of the matrix (Q, P).
    pairs = distributed.gather_on_host(batch.pairs, embeddings.device)
    labels = distributed.gather_on_host(batch.labels, embeddings.device)
    rows = torch.searchsorted(query_ids, pairs[:, 0].contiguous())
    columns = torch.searchsorted(document_ids, pairs[:, 1].contiguous())
    shape = len(queries), len(documents)
    # Where examples disagree about a pair, it is a positive.
    joined = [queries, documents, _matrix(shape, rows, columns, labels, empty=0)]
    if batch.scores is not None:
        scores = distributed.gather_on_host(batch.scores, embeddings.device)
        joined.append(_matrix(shape, rows, columns, scores, empty=math.nan))
    return tuple(joined)


def _matrix(shape: tuple[int, int], rows: Tensor, columns: Tensor, values: Tensor, empty: float) -> Tensor:
    """Put values (M,) into a matrix (Q, P), the largest where several have the same cell."""
    matrix = torch.full(shape, empty, dtype=values.dtype).flatten()
    return matrix.scatter_reduce(0, rows * shape[1] + columns, values, "amax", include_self=False).view(shape)


def _gather_distinct(embeddings: Vectors, rows: Tensor, ids: Tensor) -> tuple[Vectors, Tensor]:
    """Gather some rows, and keep the first of each id; they come back in the order of ids."""
    distinct, inverse = distributed.gather_on_host(ids, embeddings.device).unique(return_inverse=True)
    first = distributed.first_indices(inverse, len(distinct))
    if distributed.world_size() == 1:  # One copy less of all vectors.
        return _take(embeddings, rows[first]), distinct
    return _take(_gather(_take(embeddings, rows)), first), distinct


def _take(embeddings: Vectors, rows: Tensor) -> Vectors:
    """Return the embeddings of some items, by their rows on the host."""
    if isinstance(embeddings, MultiVectors):
        return embeddings[rows]
    return embeddings[rows.to(embeddings.device, non_blocking=True)]


def _gather(embeddings: Vectors) -> Vectors:
    if isinstance(embeddings, MultiVectors):
        lengths = distributed.gather_on_host(embeddings.lengths, embeddings.device)
        return replace(embeddings, vectors=distributed.gather(embeddings.vectors), lengths=lengths)
    return distributed.gather(embeddings)
