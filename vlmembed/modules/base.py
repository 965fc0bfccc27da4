"""Training an encoder through a gradient cache, and measuring it: what embedders and cross-encoders have in common.

Five hooks carry the training, in this order: `configure_model` loads the weights, `configure_optimizers` builds what
steps, `training_step` embeds a batch and computes the loss of all processes' batches, `backward` sends its gradient
through the gradient cache, and `configure_gradient_clipping` looks at the gradients once before the optimizer steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import Metric

from vlmembed import distributed
from vlmembed.adapters import Adapter
from vlmembed.data import Collator, ItemCollator
from vlmembed.data.columns import nearest
from vlmembed.data.judgements import trec_lines
from vlmembed.encoder import Encoder
from vlmembed.features import FeatureCache
from vlmembed.gradcache import GradCache
from vlmembed.metrics import MEAN, mean_over
from vlmembed.modules.optimization import (
    SchedulerCallable,
    batches_per_epoch,
    build_schedule,
    parameter_groups,
    try_schedule,
)
from vlmembed.training.checkpointing import (
    Checkpointing,
    follow_weights,
    is_last_of_epoch,
    prepare_averages,
    refuse_split_windows,
)
from vlmembed.training.guards import (
    CollapseMonitor,
    NonFiniteGuard,
    refuse_broken_weights,
    refuse_untouched_parameters,
)
from vlmembed.training.memory import ShardedGradCache, graph_bytes, open_features, refuse_strategy, shard
from vlmembed.types import Preprocessor


class RetrievalModule(LightningModule, ABC):
    """Trains an encoder through a gradient cache, and measures it.

    Args:
        encoder: What is trained, without weights.
        loss: What to train with.
        monitor: Warns of outputs that are all alike, and of a loss that stays at chance.
        adapters: What of the backbone is trained, and through what: LoRA, Freeze; applied in this order. Empty for all.
        optimizer: Any torch optimizer; null for AdamW with torch's defaults.
        lr_scheduler: Any torch schedule that goes by steps; null for a constant rate. A parameter that means the number
            of steps (total_steps, num_training_steps) is given the run's own where the YAML gives none.
        learning_rates: Learning rates other than the optimizer's: for ``vision``, ``merger``, ``audio`` or
            ``language``, for ``pooling``, ``projection`` or ``head``, or for parameters whose name contains a match of
            a regular expression. The first that matches decides.
        graph_memory: How much memory the graphs of chunks may take, so that their chunks are not computed twice: a
            number of GiB, ``none``, or ``auto`` for what a step leaves free. Never changes the gradient.
        features: Keeps what a frozen vision tower makes of each image for the next epochs:
            ``vlmembed.features.InMemory`` or ``OnDisk``; null to run the tower once per image and step.
        max_skipped_steps: How many optimizer steps in a row may be skipped because their loss or gradient is not
            finite; one more stops the run. They are listed in ``non_finite.jsonl`` in the run's folder.
        losses: Further losses by name, for training sources that name one; see ``vlmembed.data.Mixture``.
    """

    loss: Any  # A subclass says of which kind.

    def __init__(
        self,
        encoder: Encoder,
        loss: nn.Module,
        monitor: CollapseMonitor,
        adapters: Sequence[Adapter] = (),
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: SchedulerCallable | None = None,
        learning_rates: Mapping[str, float] | None = None,
        graph_memory: Literal["auto", "none"] | float = "auto",
        features: FeatureCache | None = None,
        max_skipped_steps: int = 10,
        losses: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss
        self.losses = _named(losses or {})
        self.adapters = adapters
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.learning_rates = learning_rates or {}
        self.graph_memory = graph_memory
        self.features = features
        self.guard = NonFiniteGuard(max_skipped_steps)
        self.monitor = monitor
        self.checkpointing = Checkpointing()
        self._configured = False
        self._reached_everything = False
        self._inputs: set[str] = set()
        #: What the batch under way is trained with; None for ``loss``.
        self._loss_name: str | None = None
        #: Batches since the optimizer's last step.
        self._accumulated = 0
        self._metrics = nn.ModuleList()

    # What differs between kinds of models

    def collator(self) -> Collator:
        """Return what makes batches for this model; it needs no weights."""
        return ItemCollator(self.preprocessor, self.loss.label_spec, self.label_specs)

    @abstractmethod
    def gather_batch(self, outputs: Tensor, batch: Any) -> tuple[Any, ...]:
        """Join all processes' batches into what the loss takes; outputs (N, D) are in the order of its chunks."""

    @abstractmethod
    def metric(self, evaluation: Any) -> Metric:
        """Return what measures on an evaluation set."""

    def measure(self, batch: Any, metric: Any) -> None:
        """Encode a batch of an evaluation set, and update its metric."""
        outputs = self.encoder(batch.inputs, self.encoder.encode_images(batch.images))
        metric.update(batch.rows, self.encoder.by_item(outputs, batch.chunks))

    def predictions(self, metric: Any) -> dict[str, Tensor]:
        """Return what ``predict`` writes beside the rankings, as ``NAME.safetensors``. All processes call it."""
        return {}

    def check(self) -> None:
        """Refuse what does not fit together, once weights are there."""
        too_large = [dimension for dimension in self.dimensions if dimension > self.encoder.dimension]
        if too_large:
            raise ValueError(
                f"The loss truncates to {too_large} dimensions, and the model's vectors have {self.encoder.dimension}. "
                "Remove the larger ones from the Matryoshka loss's dimensions, or give the model a larger projection."
            )

    def loss_of(self, name: str | None) -> nn.Module:
        """Return a loss by the name that sources give it; None for the module's own."""
        return self.loss if name is None else self.losses[name]

    @property
    def label_specs(self) -> dict[str, Any]:
        """What each of the further losses needs to know of a row, by name."""
        losses: Any = self.losses.items()
        return {name: loss.label_spec for name, loss in losses}

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Truncated dimensions that a loss trains, largest first; none of a cross-encoder."""
        losses = (self.loss, *self.losses.values())
        return tuple(sorted({size for loss in losses for size in getattr(loss, "dimensions", ())}, reverse=True))

    @property
    def preprocessor(self) -> Preprocessor:
        """The preprocessor of this model's inputs."""
        return self.encoder.preprocessor

    # Set-up

    def setup(self, stage: str) -> None:
        """Refuse to train in a way that would lose gradients, before weights are loaded."""
        if stage == "fit":
            refuse_strategy(self.trainer.strategy)
            data = getattr(self.trainer, "datamodule", None)
            refuse_split_windows(self.trainer, getattr(data, "steps_per_epoch", None))
            self._check_losses(getattr(data, "loss_names", None))
            if self.lr_scheduler is not None and not self.learning_rates:
                try_schedule(self.lr_scheduler, self.optimizer or AdamW, self.trainer)
            prepare_averages(self.trainer)

    def _check_losses(self, names: Collection[str] | None) -> None:
        """Refuse losses that sources name and the model lacks, and those that no source names."""
        for name in names or ():
            if name not in self.losses:
                raise ValueError(
                    f"A source of data.train has the loss {name!r}{nearest(name, [*self.losses])}, and model.losses "
                    f"has {', '.join(self.losses) or 'none'}."
                )
        if names is not None and (unused := [name for name in self.losses if name not in names]):
            raise ValueError(
                f"model.losses has {unused[0]!r}, which no source of data.train is trained with. Remove it, or name it "
                "in the losses of vlmembed.data.Mixture."
            )

    def configure_model(self) -> None:
        """Load the weights and apply the adapters. Does nothing the second time."""
        if self._configured:
            return
        self._load_weights()
        if self.device_mesh is not None:
            shard(self.encoder, self.device_mesh)
        else:
            self.checkpointing.recognise_frozen(self)
        self._configured = True

    def gather(self) -> None:
        """Become whole in this process, with fresh weights, where the model was in shards."""
        if distributed.is_sharded(self.encoder):
            self.encoder = self.encoder.fresh()
            self._load_weights()
            self.checkpointing.recognise_frozen(self)

    def _load_weights(self) -> None:
        self.encoder.configure()
        for adapter in self.adapters:
            adapter.apply(self.encoder.backbone)
        self.check()

    def configure_optimizers(self) -> Any:
        """Build the optimizer over what is trainable, and the schedule."""
        optimizer = (self.optimizer or AdamW)(parameter_groups(self, self.encoder.backbone, self.learning_rates))
        if self.lr_scheduler is None:
            return optimizer
        schedule = build_schedule(self.lr_scheduler, optimizer, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Make the gradient cache, and take over the gradient reduction from data-parallel training."""
        self.checkpointing.tidy(self.trainer)
        steps = 0
        if self.features is not None:
            open_features(self.features, self.encoder.backbone, str(self.trainer.precision))
            steps = batches_per_epoch(self.trainer.datamodule)  # type: ignore[attr-defined]
        if distributed.is_sharded(self.encoder):
            if self.graph_memory not in ("auto", "none"):
                raise ValueError("With ModelParallelStrategy graph_memory is auto or none: no graphs are kept.")
            self.grad_cache: GradCache = ShardedGradCache(self.encoder, self.features, steps)
        else:
            limit = graph_bytes(self.graph_memory, self.device)
            self.grad_cache = GradCache(self.encoder, limit, self.features, steps)
        self._reduce_gradients = distributed.defer_gradient_reduction(self.trainer.strategy.model)

    # Training

    @property
    def steps_after_batch(self) -> bool:
        """Whether the optimizer steps after the batch under way, not after another whose gradient is added to its."""
        return self.grad_cache.before_step

    def on_train_start(self) -> None:
        """Resume a run as if it had not been interrupted."""
        self.checkpointing.resume(self)
        self.guard.begin(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Encode the batch and compute the loss of all processes' batches."""
        window_ends = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        self.grad_cache.before_step = window_ends or is_last_of_epoch(self.trainer, batch_idx)
        outputs = self.grad_cache.embed(batch)  # (N, D) of this process
        arguments = self.gather_batch(outputs, batch)  # embeddings (Q, D), (P, D) or scores (Q, C), of all processes
        self._loss_name = batch.loss
        loss: Tensor = self.loss_of(batch.loss)(*arguments)
        self._accumulated += 1
        self._inputs.update(*batch.chunks, *batch.images)
        self.guard.add(loss, batch.origins)
        if self.grad_cache.before_step:
            self.monitor.note(self.global_step, arguments, loss)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.queries))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Send the loss's gradient to the embeddings, and from there through the encoder; complete it before a step."""
        super().backward(loss, *args, **kwargs)
        self.grad_cache.backward()
        if self.grad_cache.before_step:
            self.monitor.check(self, self.loss_of(self._loss_name))
            if self._reduce_gradients:
                distributed.mean_gradients(self.parameters())
            self._average_partial_window()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Skip a step that is not finite, and clip any other, by one norm of all gradients."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = distributed.gradient_norm(parameters)  # () of all gradients together, shards included.
        inputs, self._inputs = self._inputs, set()
        if not self.guard.check(self, optimizer, norm):
            return
        # After the first step, and the first with images or audio, refuse to train on if something got no gradient.
        if not self._reached_everything:
            self._reached_everything = refuse_untouched_parameters(self, self.encoder.backbone, inputs)
        by_norm, sharded = gradient_clip_algorithm in (None, "norm"), distributed.is_sharded(self)
        if gradient_clip_val and sharded and not by_norm:
            raise ValueError(f"ModelParallelStrategy clips by norm: gradient_clip_algorithm={gradient_clip_algorithm}.")
        if gradient_clip_val and by_norm and (sharded or self.trainer.scaler is None):
            distributed.clip_gradients(parameters, gradient_clip_val, norm)
        elif gradient_clip_val:  # Lightning knows which optimizers cannot be clipped under a gradient scaler.
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _average_partial_window(self) -> None:
        """Make the gradient the mean of the batches there were: Lightning divides by accumulate_grad_batches always."""
        window, self._accumulated = self._accumulated, 0
        factor = self.trainer.accumulate_grad_batches / max(1, window)
        if factor != 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def on_train_epoch_end(self) -> None:
        """Refuse to keep features that nobody asks for again."""
        self.checkpointing.end_resumed(self.trainer)
        follow_weights(self.trainer)
        if self.features is not None:
            self.features.end_epoch(distributed.total)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to write weights that are not finite; add what a resumed run needs."""
        refuse_broken_weights(self)
        checkpoint["config"] = getattr(self.trainer, "run_config", "")  # So that another one is noticed on resuming.
        checkpoint["non_finite"] = dict(self.guard.counts)
        self.checkpointing.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take weights and state from a checkpoint; see `Checkpointing.load`."""
        self.checkpointing.load(self, checkpoint)
        self.guard.counts |= checkpoint.get("non_finite", {})

    # Measuring: validation, test and predict alike

    @property
    def metrics(self) -> list[Any]:
        """What is being measured: one for each evaluation set of the running stage."""
        return [*self._metrics]

    def on_validation_start(self) -> None:
        """Before averages take the weights' place: see `follow_weights`."""
        follow_weights(self.trainer)

    def start_metrics(self) -> None:
        """Start measuring every evaluation set of the stage."""
        self.checkpointing.end_resumed(self.trainer)
        sets = self.trainer.datamodule.evaluations[self._stage]  # type: ignore[attr-defined]
        if self._stage == "predict":
            for evaluation in sets:
                _refuse_names_with_spaces(evaluation)
        self._names = [evaluation.name for evaluation in sets]
        self._metrics = nn.ModuleList(map(self.metric, sets)).to(self.device)

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = start_metrics

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Encode a batch of an evaluation set."""
        self.measure(batch, self.metrics[dataloader_idx])

    test_step = predict_step = validation_step

    def log_metrics(self) -> None:
        """Rank, and log every metric of every set; not where a smoke test has cut the sets short."""
        if getattr(self.trainer, "fast_dev_run", False) or self.trainer.sanity_checking:
            return
        sets = {name: metric.compute() for name, metric in zip(self._names, self.metrics, strict=True)}
        if len(sets) > 1:
            sets[MEAN] = mean_over(sets)
        for name, values in sets.items():
            prefix = f"{self._stage}/{name}/" if len(sets) > 1 else f"{self._stage}/"
            # Equal on all processes; the largest of equal values is exact, a mean may round.
            self.log_dict({prefix + label: value for label, value in values.items()}, sync_dist=True, reduce_fx="max")

    on_validation_epoch_end = on_test_epoch_end = log_metrics

    def on_predict_epoch_end(self) -> None:
        """Write what was predicted into the run's folder."""
        if getattr(self.trainer, "fast_dev_run", False):
            return
        folder = Path(self.trainer.log_dir or ".") / "predictions"
        for metric in self.metrics:
            scores, columns = metric.top_k(metric.depth)
            tensors = {name: tensor.contiguous() for name, tensor in self.predictions(metric).items()}
            if self.trainer.is_global_zero:
                write_run(metric.evaluation, scores, columns, folder)
                if tensors:
                    save_file(tensors, folder / f"{metric.evaluation.name}.safetensors")
        distributed.print_once(f"Predictions are in {folder}")

    @property
    def _stage(self) -> str:
        """val, test or predict."""
        stage = self.trainer.state.stage
        return "" if stage is None else str(stage.dataloader_prefix)


def _named(losses: Mapping[str, nn.Module]) -> nn.ModuleDict:
    try:
        return nn.ModuleDict(losses)
    except (KeyError, TypeError) as error:
        raise ValueError(f"losses: {[*losses]}: not all are names that a loss can have ({error}).") from error


def write_run(evaluation: Any, scores: Tensor, columns: Tensor, folder: Path) -> None:
    """Write rankings as a TREC run, ``NAME.trec``: lines ``query Q0 document rank score vlmembed``.

    Scores (Q, K) come with their documents' columns (Q, K) in the corpus, the best first, up to the first column of -1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{evaluation.name}.trec").open("w", encoding="utf-8") as file:
        for query, row, documents in zip(evaluation.query_names, scores.tolist(), columns.tolist(), strict=True):
            names = [evaluation.document_names[column] for column in takewhile(lambda column: column >= 0, documents)]
            file.writelines(trec_lines(query, zip(names, row, strict=False)))


def _refuse_names_with_spaces(evaluation: Any) -> None:
    evaluation = getattr(evaluation, "evaluation", evaluation)
    for kind, names in (("query", evaluation.query_names), ("document", evaluation.document_names)):
        for name in names:
            if len(name.split()) != 1:
                raise ValueError(
                    f"{evaluation.name}: {kind} id {name!r} has white space in it, which a TREC run cannot hold. "
                    "Replace it in the data set before predicting."
                )
