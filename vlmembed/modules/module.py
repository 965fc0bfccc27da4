"""What training and measuring an embedder and a cross-encoder have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from vlmembed import distributed
from vlmembed.adapters import Adapter
from vlmembed.data import Task
from vlmembed.encoder import Encoder
from vlmembed.features import FeatureCache
from vlmembed.memory import StepPeak, graph_bytes
from vlmembed.modules.finite import FiniteSteps, refuse_broken_weights
from vlmembed.modules.optimization import (
    clip,
    parameter_groups,
    parameters_of,
    refuse_untouched_parameters,
    total_steps,
)
from vlmembed.modules.preparation import start_engine
from vlmembed.modules.resumable import Resumable
from vlmembed.modules.watch import Watch
from vlmembed.sharding import refuse_strategy, shard
from vlmembed.types import Preprocessor

SchedulerCallable = Callable[[Optimizer, int], LRScheduler]


class RetrievalModule(Resumable, ABC):
    """Trains an encoder through a gradient cache, and measures it.

    Args:
        make_encoder: Makes what is trained, without weights.
        loss: What to train with.
        adapters: What of the backbone is trained, and through what: LoRA, Freeze; applied in this order. Empty for all.
        optimizer: Any torch optimizer.
        lr_scheduler: A schedule called with the optimizer and the number of steps; null for a constant rate.
        learning_rates: Learning rates other than the optimizer's: for ``vision``, ``merger`` or ``language``, or for
            parameters whose name contains a match of a regular expression. The first that matches decides.
        graph_memory: How much memory the graphs of chunks may take, so that their chunks are not computed twice: a
            number of GiB, ``none``, or ``auto`` for what a step leaves free. Never changes the gradient.
        features: Keeps what a frozen vision tower makes of each image for the next epochs:
            ``vlmembed.features.InMemory`` or ``OnDisk``; null to run the tower once per image and step.
        max_skipped_steps: How many optimizer steps in a row may be skipped because their loss or gradient is not
            finite; one more stops the run. They are listed in ``non_finite.jsonl`` in the run's folder.

    Attributes:
        watches: What warns of outputs that are all alike and of a loss that stays at chance.
    """

    watches: ClassVar[type[Watch]]

    def __init__(
        self,
        make_encoder: Callable[[], Encoder],
        loss: nn.Module,
        adapters: Sequence[Adapter] = (),
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: SchedulerCallable | None = None,
        learning_rates: Mapping[str, float] | None = None,
        graph_memory: Literal["auto", "none"] | float = "auto",
        features: FeatureCache | None = None,
        max_skipped_steps: int = 10,
    ) -> None:
        super().__init__()
        self._make_encoder = make_encoder
        self.encoder = make_encoder()
        self.loss = loss
        self.adapters = adapters
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._learning_rates = learning_rates or {}
        self._graph_memory = graph_memory
        self._features = features
        self.steps = FiniteSteps(max_skipped_steps)
        self._watch = self.watches()
        self._configured = False
        self._gradients_checked = False
        self._metrics = nn.ModuleList()

    @property
    @abstractmethod
    def task(self) -> Task:
        """What the data module makes batches for."""

    @abstractmethod
    def gather_batch(self, outputs: Tensor, batch: Any) -> tuple[Tensor, ...]:
        """Join all processes' batches into what the loss takes.

        Args:
            outputs: (N, D) what the encoder made of this process's batch, in the order of its chunks.
            batch: This process's batch.
        """

    @abstractmethod
    def measurement(self, evaluation: Any) -> Metric:
        """Return what measures on an evaluation set."""

    @abstractmethod
    def measure(self, batch: Any, metrics: Any) -> None:
        """Encode a batch of an evaluation set, and take it into account."""

    @abstractmethod
    def write_predictions(self, metrics: Any, folder: Path) -> None:
        """Write what was predicted. All processes call it."""

    @property
    def metrics(self) -> list[Metric]:
        """What is being measured: one for each evaluation set of the running stage."""
        return [metrics for metrics in self._metrics if isinstance(metrics, Metric)]

    @property
    def preprocessor(self) -> Preprocessor:
        """The preprocessor of this model's inputs."""
        return self.encoder.preprocessor

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
        self.check()
        if self.device_mesh is not None:
            shard(self.encoder, self.device_mesh)
        else:
            self.recognise_frozen()
        self._configured = True

    def check(self) -> None:
        """Refuse what does not fit together, once weights are there."""

    def gather(self) -> None:
        """Stand whole in this process, with fresh weights, where the model was in shards."""
        if distributed.is_sharded(self.encoder):
            self.encoder = self._make_encoder()
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

    def on_train_start(self) -> None:
        """Go on as if nothing had been: what a resumed run does again is forgotten."""
        super().on_train_start()
        self.steps.begin(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Watch what the first step takes on a GPU."""
        self.engine.before_step = False
        self._first_step = None if self._gradients_checked else StepPeak(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Encode the batch and compute the loss of all processes' batches."""
        given = self.gather_batch(self.engine.embed(batch), batch)
        loss: Tensor = self.loss(*given)
        self.steps.add(loss, batch.origins)
        if self.engine.before_step:
            self._watch.note(self.global_step, given, loss)
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
            self._watch.look(self, self.loss)
            if self._reduce_gradients:
                distributed.mean_gradients(self.parameters())
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Skip a step that is not finite, and clip any other, asking once for the norm of all gradients."""
        norm = distributed.gradient_norm(parameters_of(optimizer))
        if self.steps.allow(self, optimizer, norm) and gradient_clip_val:
            clip(self, optimizer, gradient_clip_val, gradient_clip_algorithm, norm)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the first step, and the first with images, refuse to train on if something got no gradient."""
        if self._first_step is not None and self._first_step.bytes:
            self.engine.graph_bytes = graph_bytes(self._graph_memory, self.device, self._first_step.bytes)
        if self.engine.before_step and not self._gradients_checked and not self.steps.in_a_row:
            saw_images = any("pixel_values" in name for chunk in [*batch.chunks, *batch.images] for name in chunk)
            self._gradients_checked = refuse_untouched_parameters(self, self.encoder.backbone, saw_images)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to keep weights that are not finite; keep count of skipped steps, and what a run goes on from."""
        refuse_broken_weights(self)
        checkpoint["finite_steps"] = self.steps.state()
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from it; see `Resumable`."""
        super().on_load_checkpoint(checkpoint)
        self.steps.restore(checkpoint.get("finite_steps", self.steps.state()))

    def on_train_epoch_end(self) -> None:
        """Refuse to keep features that nobody asks for again."""
        if self._features is not None:
            self._features.end_epoch(distributed.total)

    # Measuring

    def on_validation_epoch_start(self) -> None:
        """Start measuring every validation set."""
        self._start_metrics("val")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Encode a batch of an evaluation set."""
        self.measure(batch, self.metrics[dataloader_idx])

    test_step = predict_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Rank and log."""
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Start measuring every test set."""
        self._start_metrics("test")

    def on_test_epoch_end(self) -> None:
        """Rank and log."""
        self._log_metrics("test")

    def on_predict_epoch_start(self) -> None:
        """Start collecting what to predict."""
        self._start_metrics("predict")

    def on_predict_epoch_end(self) -> None:
        """Write what was predicted into the run's folder."""
        for metrics in self.metrics:
            self.write_predictions(metrics, Path(self.trainer.log_dir or ".") / "predictions")

    def _start_metrics(self, stage: str) -> None:
        sets = self.trainer.datamodule.evaluations[stage]  # type: ignore[attr-defined]
        self._names = [evaluation.name for evaluation in sets]
        self._metrics = nn.ModuleList(map(self.measurement, sets)).to(self.device)

    def _log_metrics(self, stage: str) -> None:
        for name, metrics in zip(self._names, self.metrics, strict=True):
            prefix = f"{stage}/{name}/" if len(self._names) > 1 else f"{stage}/"
            values = {prefix + name: value for name, value in metrics.compute().items()}
            # Equal on all processes; the largest of equal values is exact, a mean may round.
            self.log_dict(values, sync_dist=True, reduce_fx="max")
