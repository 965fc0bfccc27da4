"""Training and measuring an embedder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import ModuleList
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vlmembed import distributed
from vlmembed.adapters import Adapter
from vlmembed.backbones import VisionLanguageModel
from vlmembed.encoder import Encoder
from vlmembed.features import FeatureCache
from vlmembed.losses import Loss
from vlmembed.memory import StepPeak, graph_bytes
from vlmembed.metrics import RetrievalMetrics
from vlmembed.modules.optimization import parameter_groups, refuse_untouched_parameters, total_steps
from vlmembed.modules.prediction import write_predictions
from vlmembed.modules.preparation import start_engine
from vlmembed.pooling import Pooling
from vlmembed.sharding import refuse_strategy, shard
from vlmembed.types import Batch, ItemBatch, Preprocessor

SchedulerCallable = Callable[[Optimizer, int], LRScheduler]


class EmbeddingModule(LightningModule):
    """Turns a vision-language model into an embedder.

    Args:
        backbone: The vision-language model.
        pooling: From its hidden states to an embedding.
        loss: What to train with, such as InfoNCE, or Matryoshka around it.
        adapters: What of the backbone is trained, and through what: LoRA, Freeze; applied in this order. Empty for all.
        optimizer: Any torch optimizer.
        lr_scheduler: A schedule called with the optimizer and the number of steps; null for a constant rate.
        learning_rates: Learning rates other than the optimizer's: for ``vision``, ``merger`` or ``language``, or for
            parameters whose name contains a match of a regular expression. The first that matches decides.
        graph_memory: How much memory the graphs of chunks may take, so that their chunks are not computed twice: a
            number of GiB, ``none``, or ``auto`` for what a step leaves free. Never changes the gradient.
        features: Keeps what a frozen vision tower makes of each image for the next epochs:
            ``vlmembed.features.InMemory`` or ``OnDisk``; null to run the tower once per image and step.
    """

    def __init__(
        self,
        backbone: VisionLanguageModel,
        pooling: Pooling,
        loss: Loss,
        adapters: Sequence[Adapter] = (),
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: SchedulerCallable | None = None,
        learning_rates: Mapping[str, float] | None = None,
        graph_memory: Literal["auto", "none"] | float = "auto",
        features: FeatureCache | None = None,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(backbone, pooling)
        self.loss = loss
        self.adapters = adapters
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._learning_rates = learning_rates or {}
        self._graph_memory = graph_memory
        self._features = features
        self._configured = False
        self._gradients_checked = False
        self._metrics = ModuleList()

    @property
    def metrics(self) -> list[RetrievalMetrics]:
        """What is being measured: one for each evaluation set of the running stage."""
        return [metrics for metrics in self._metrics if isinstance(metrics, RetrievalMetrics)]

    @property
    def preprocessor(self) -> Preprocessor:
        """The preprocessor of this model's inputs."""
        return self.encoder.backbone.preprocessor

    def setup(self, stage: str) -> None:
        """Refuse to train in a way that would lose gradients, before weights are loaded."""
        if stage == "fit":
            refuse_strategy(self.trainer.strategy)

    def configure_model(self) -> None:
        """Load the weights and apply the adapters. Does nothing the second time."""
        if self._configured:
            return
        self.encoder.configure()
        for adapter in self.adapters:
            adapter.apply(self.encoder.backbone)
        too_large = [dimension for dimension in self.loss.dimensions if dimension > self.encoder.dimension]
        if too_large:
            raise ValueError(
                f"The loss truncates to {too_large} dimensions, but the embedding has {self.encoder.dimension}. "
                "Remove the larger ones from the Matryoshka loss's dimensions."
            )
        if self.device_mesh is not None:
            shard(self.encoder, self.device_mesh)
        self._configured = True

    def gather(self) -> None:
        """Stand whole in this process, with fresh weights, where the model was in shards."""
        if distributed.is_sharded(self.encoder):
            self.encoder = Encoder(self.encoder.backbone, self.encoder.pooling)
            self._device_mesh = None
            self._configured = False
            self.configure_model()

    def configure_optimizers(self) -> Any:
        """Build the optimizer over what is trainable, and the schedule."""
        optimizer = self._optimizer(parameter_groups(self, self.encoder.backbone, self._learning_rates))
        if self._lr_scheduler is None:
            return optimizer
        schedule = self._lr_scheduler(optimizer, total_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Training

    def on_fit_start(self) -> None:
        """Decide what a step may take, and take over the gradient reduction from data-parallel training."""
        self.engine = start_engine(self, self.encoder, self._graph_memory, self._features)
        self._reduce_gradients = distributed.defer_gradient_reduction(self.trainer.strategy.model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Watch what the first step takes on a GPU."""
        self.engine.before_step = False
        self._first_step = None if self._gradients_checked else StepPeak(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Embed the batch's items and compute the loss on the embeddings of all processes."""
        loss = self.loss(*joined_batch(self.engine.embed(batch), batch))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.queries))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Send the loss's gradient to the embeddings, and from there through the encoder."""
        super().backward(loss, *args, **kwargs)
        self.engine.replay()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, after reducing the gradients once over processes."""

        def closure() -> Any:
            self.engine.before_step = True
            loss = optimizer_closure()
            if self._reduce_gradients:
                distributed.mean_gradients(self.parameters())
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip what is in shards and what is not by one norm, which PyTorch does not."""
        if not gradient_clip_val or not distributed.is_sharded(self.encoder):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm in (None, "norm"):
            distributed.clip_gradients(self.parameters(), gradient_clip_val)
        else:
            raise ValueError(f"ModelParallelStrategy clips by norm: gradient_clip_algorithm={gradient_clip_algorithm}.")

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """After the first step, and the first with images, refuse to train on if something got no gradient."""
        if self._first_step is not None and self._first_step.bytes:
            self.engine.graph_bytes = graph_bytes(self._graph_memory, self.device, self._first_step.bytes)
        if self.engine.before_step and not self._gradients_checked:
            saw_images = any("pixel_values" in name for chunk in [*batch.chunks, *batch.images] for name in chunk)
            self._gradients_checked = refuse_untouched_parameters(self, self.encoder.backbone, saw_images)

    def on_train_epoch_end(self) -> None:
        """Refuse to keep features that nobody asks for again."""
        if self._features is not None:
            self._features.end_epoch(distributed.total)

    # Measuring

    def on_validation_epoch_start(self) -> None:
        """Start measuring every validation set."""
        self._start_metrics("val")

    def validation_step(self, batch: ItemBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed queries or documents of a validation set."""
        embeddings = self.encoder(batch.inputs, self.encoder.see(batch.images))
        self.metrics[dataloader_idx].update(batch.rows, embeddings)

    def on_validation_epoch_end(self) -> None:
        """Rank and log."""
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Start measuring every test set."""
        self._start_metrics("test")

    def test_step(self, batch: ItemBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed queries or documents of a test set."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Rank and log."""
        self._log_metrics("test")

    def on_predict_epoch_start(self) -> None:
        """Start collecting what to predict."""
        self._start_metrics("predict")

    def predict_step(self, batch: ItemBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed queries or documents to predict."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self) -> None:
        """Write rankings and embeddings into the run's folder."""
        for metrics in self.metrics:
            write_predictions(metrics, Path(self.trainer.log_dir or ".") / "predictions", self.trainer.is_global_zero)

    def _start_metrics(self, stage: str) -> None:
        sets = self.trainer.datamodule.evaluations[stage]  # type: ignore[attr-defined]
        metrics = [RetrievalMetrics(evaluation, self.loss.dimensions) for evaluation in sets]
        self._metrics = ModuleList(metrics).to(self.device)

    def _log_metrics(self, stage: str) -> None:
        for metrics in self.metrics:
            prefix = f"{stage}/{metrics.evaluation.name}/" if len(self._metrics) > 1 else f"{stage}/"
            values = {prefix + name: value for name, value in metrics.compute().items()}
            # Equal on all processes; the largest of equal values is exact, a mean may round.
            self.log_dict(values, sync_dist=True, reduce_fx="max")


def joined_batch(embeddings: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Join all processes' batches into what a loss takes.

    A document, or a query, that several processes hold is kept once, so that the loss is that of one process with
    all their examples.

    Args:
        embeddings: (N, D) of this process's items, in the order of its chunks.
        batch: This process's batch.

    Returns:
        Queries (Q, D), documents (P, D) and relevance (Q, P), the same on every process. Who belongs to whom stays on
        the host, which knows it already: nobody waits for the device.
    """
    queries, query_ids = _distinct(embeddings, batch.queries, batch.query_ids)
    documents, document_ids = _distinct(embeddings, batch.documents, batch.document_ids)
    pairs = distributed.gather_on_host(batch.pairs, embeddings.device)
    labels = distributed.gather_on_host(batch.labels, embeddings.device)
    relevance = torch.zeros(len(queries), len(documents), dtype=torch.int8)
    rows = torch.searchsorted(query_ids, pairs[:, 0].contiguous())
    columns = torch.searchsorted(document_ids, pairs[:, 1].contiguous())
    # Right answers last: where examples disagree about a pair, it is one.
    for label in (-1, 1):
        relevance[rows[labels == label], columns[labels == label]] = label
    return queries, documents, relevance


def _distinct(embeddings: Tensor, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Gather some rows, and keep the first of each id; they come back in the order of ids."""
    device = embeddings.device
    gathered = distributed.gather(embeddings[rows.to(device, non_blocking=True)])
    distinct, inverse = distributed.gather_on_host(ids, device).unique(return_inverse=True)
    first = torch.full_like(distinct, len(inverse))
    first = first.scatter_reduce(0, inverse, torch.arange(len(inverse)), "amin")
    return gathered[first.to(device, non_blocking=True)], distinct
