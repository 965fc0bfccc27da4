"""Training and measuring an embedder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlmembed import distributed
from vlmembed.backbones import VisionLanguageModel
from vlmembed.data import ItemCollator
from vlmembed.encoder import Encoder
from vlmembed.heads import ScoreHead
from vlmembed.late_interaction import MultiVectors, Vectors
from vlmembed.losses import Loss
from vlmembed.metrics import RetrievalMetrics
from vlmembed.modules.base import DEPTH, RetrievalModule, write_run
from vlmembed.pooling import Pooling
from vlmembed.training.guards import CollapseMonitor, embedding_likeness
from vlmembed.types import Batch, EvaluationSet, ItemBatch


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
        super().__init__(Encoder(backbone, pooling), loss, losses=losses, **options)

    def collator(self) -> ItemCollator:
        """Embed items, each on its own."""
        return ItemCollator(self.preprocessor, self.loss.label_spec, self.label_specs)

    def collapse_monitor(self) -> CollapseMonitor:
        """Watch the cosines of a batch's embeddings."""
        return CollapseMonitor("Embeddings", embedding_likeness)

    def check(self) -> None:
        """Refuse Matryoshka dimensions that the embedding does not have, and losses over fewer vectors."""
        if any(loss.merging_factors for loss in (self.loss, *self.losses.values())):
            raise ValueError("MergedTokens is for vlmembed.modules.MultiVectorModule: a single vector has no others.")
        too_large = [dimension for dimension in self.dimensions if dimension > self.encoder.dimension]
        if too_large:
            raise ValueError(
                f"The loss truncates to {too_large} dimensions, but the embedding has {self.encoder.dimension}. "
                "Remove the larger ones from the Matryoshka loss's dimensions."
            )

    def gather_batch(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Join the embeddings of all processes."""
        return gather_batch(outputs, batch)

    def metric(self, evaluation: EvaluationSet) -> RetrievalMetrics:
        """Measure how well queries find their documents in the whole corpus."""
        return RetrievalMetrics(evaluation, self.dimensions)

    def measure(self, batch: ItemBatch, metric: RetrievalMetrics) -> None:
        """Embed queries or documents."""
        metric.update(batch.rows, self.encoder(batch.inputs, self.encoder.encode_images(batch.images)))

    def write_predictions(self, metric: RetrievalMetrics, folder: Path) -> None:
        """Write rankings, and ``NAME.safetensors``.

        It has the tensors ``queries`` (Q, D) and ``documents`` (P, D), not normalised, in the order of the set's files.
        """
        scores, columns = metric.top_k(DEPTH)
        embeddings = metric.gather_embeddings()
        if self.trainer.is_global_zero:
            evaluation = metric.evaluation
            write_run(evaluation, scores, columns, folder)
            queries, documents = embeddings.split([len(evaluation.queries), len(evaluation.corpus)])
            tensors = {"queries": queries.contiguous(), "documents": documents.contiguous()}
            save_file(tensors, folder / f"{evaluation.name}.safetensors")


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
