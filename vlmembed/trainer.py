"""Lightning's trainer, which can also export, and whose runs survive being stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)

from vlmembed.distributed import is_sharded
from vlmembed.export import Exporter, ModelInfo, push, refuse_used
from vlmembed.modules import RetrievalModule
from vlmembed.training.checkpoint_files import CheckpointFiles, read_checkpoint
from vlmembed.training.checkpointing import finish_averages, in_window, model_checkpoints, refuse_averaging
from vlmembed.training.memory import MeasureChunks, MeasureGraphMemory, whole_weights
from vlmembed.training.run_folder import name_changes, refuse_changes
from vlmembed.training.signals import StopSafely


def _is_part(limit: float) -> bool:
    return limit > 0 and not (isinstance(limit, float) and limit == 1)


PART = "a metric over part of a corpus is another metric. Give 0 not to measure, or a smaller evaluation set."
#: Options that are refused: for which values, and why.
OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{f"limit_{stage}_batches": (_is_part, PART) for stage in ("val", "test", "predict")},
    "overfit_batches": (bool, "Lightning would take away the sampler that makes batches. Train on a small file."),
    "gradient_clip_val": (lambda value: value < 0, "gradients would be turned around. Give 0 for none, or more."),
    "val_check_interval": (
        lambda value: not isinstance(value, int | float),
        "a run that is measured by the clock cannot be resumed exactly. Give batches, or a share of the epoch.",
    ),
    "use_distributed_sampler": (bool, "the data module shards by itself, in whole batches. Leave it out, or false."),
}
#: Callbacks that are refused, and what to use.
CALLBACKS: dict[type[Callback], str] = {
    BaseFinetuning: "it freezes weights before they are loaded. Use vlmembed.adapters.Freeze and model.learning_rates.",
    BasePredictionWriter: "predict writes rankings and embeddings into the run's folder, and hands no batches on.",
    BatchSizeFinder: "the batch size decides what is learned. Choose it; data.chunk_size: auto makes it fit.",
    LearningRateFinder: "it steps before training begins. Compare rates with the command ablate.",
    ModelPruning: "it looks for weights before they are loaded, and an export would not be pruned. Prune the export.",
    StochasticWeightAveraging: (
        "it measures and writes weights that are not averaged, takes the schedule's place, and is not resumed exactly. "
        "Use lightning.pytorch.callbacks.WeightAveraging, which takes the mean of all steps, or EMAWeightAveraging."
    ),
}


class Trainer(lightning.Trainer):
    """Lightning's trainer, which can also export, and whose runs survive being stopped.

    Args:
        *args: As for Lightning's trainer.
        exporter: Writes the trained model for others to open, for ``export`` and at the end of ``fit``; null for not at
            all.
        allow_changed: Keys of the configuration that may have changed since the run that is resumed began, such as
            trainer.max_epochs; those below them included.
        **kwargs: As for Lightning's trainer.
    """

    fast_dev_run: bool | int
    callbacks: list[Callback]

    #: The run's whole configuration, in YAML.
    run_config = ""
    #: The steps that the run had done when it was resumed.
    steps_before = 0

    def __init__(
        self, *args: Any, exporter: Exporter | None = None, allow_changed: list[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        _refuse(self, kwargs)
        refuse_averaging(self)
        self.exporter = exporter
        self.allow_changed = allow_changed or []
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = CheckpointFiles()
        measure = MeasureGraphMemory if isinstance(self.accelerator, CUDAAccelerator) else MeasureChunks
        # After the others, so that a step at which a run is stopped is one like any other.
        self.callbacks += [measure(), StopSafely()]

    # The data module is handed what makes batches before Lightning sets anything up; it never reads the module.

    def fit(
        self,
        model: lightning.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: lightning.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train, measuring before and after, and export.

        Args:
            model: What to train.
            train_dataloaders: As for Lightning's trainer.
            val_dataloaders: As for Lightning's trainer.
            datamodule: The data.
            ckpt_path: A checkpoint to resume from: as if there had been no interruption, to the bit on a CPU. On the
                command line, ``last`` resumes the newest run, in its folder, from its newest whole checkpoint; and
                begins a new one if there is none.
            weights_only: Whether to refuse a checkpoint that holds more than tensors and plain values; null for yes.

        Raises:
            ValueError: If the run began with a configuration that differs in what decides what is learned.
        """
        _connect(model, datamodule or train_dataloaders)
        savers = [*model_checkpoints(self)]
        if savers and all(saver.save_weights_only for saver in savers):
            rank_zero_warn(
                "Every ModelCheckpoint has save_weights_only: true, and from weights alone no run is resumed. Add one "
                "with save_last: true."
            )
        # What is elsewhere, or not to be read without running it, is not looked into before.
        if ckpt_path is not None and Path(ckpt_path).exists() and weights_only is not False:
            checkpoint = read_checkpoint(Path(ckpt_path))
            self.steps_before = checkpoint["global_step"]
            if checkpoint.get("config") and self.run_config:
                refuse_changes(checkpoint["config"], self.run_config, self.allow_changed)
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
        finish_averages(self)

    def validate(self, model: Any = None, dataloaders: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Measure on ``data.val``; see Lightning's trainer."""
        _connect(model, kwargs.get("datamodule", dataloaders))
        return super().validate(model, dataloaders, *args, **kwargs)

    def test(self, model: Any = None, dataloaders: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Measure on ``data.test``; see Lightning's trainer."""
        _connect(model, kwargs.get("datamodule", dataloaders))
        return super().test(model, dataloaders, *args, **kwargs)

    def predict(self, model: Any = None, dataloaders: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Write rankings of ``data.test`` as a TREC run, and the embeddings; see Lightning's trainer."""
        _connect(model, kwargs.get("datamodule", dataloaders))
        return super().predict(model, dataloaders, *args, **kwargs)

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """Write a checkpoint; between batches whose gradients are added up, after the step that ends them."""
        files = self.strategy.checkpoint_io
        if isinstance(files, CheckpointFiles) and in_window(self):
            files.postponed.append(partial(super().save_checkpoint, filepath, weights_only, storage_options))
        else:
            super().save_checkpoint(filepath, weights_only, storage_options)

    @property
    def export_folder(self) -> Path:
        """Where ``export`` writes if nothing else is said: into the run's folder."""
        return Path(self.log_dir or self.default_root_dir) / "export"

    def best_checkpoint(self) -> str | None:
        """Return the best checkpoint of the run, or None where no metric decides which one is."""
        callback = self.checkpoint_callback
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            return str(callback.best_model_path)
        return None

    def export(
        self,
        model: RetrievalModule,
        datamodule: lightning.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        output_dir: str | None = None,
        push_to_hub: str | None = None,
        private: bool = False,
        revision: str | None = None,
    ) -> None:
        """Write a trained model as a folder that others open, verify it, and perhaps upload it.

        Args:
            model: The module. Its adapters are merged, for good.
            datamodule: Names the instructions that it was trained with.
            ckpt_path: A checkpoint; null exports the weights as they are.
            weights_only: Whether to refuse a checkpoint that holds more than tensors and plain values; null for yes.
            output_dir: A folder that is empty or not there yet; null for ``export`` in the run's folder.
            push_to_hub: Upload to this Hub repository, ``ORG/NAME``.
            private: Whether to make that repository private.
            revision: The branch to upload to; null for main.

        Raises:
            ValueError: If there is no exporter, or the checkpoint is a folder of shards.
            FileExistsError: If the folder is not empty.
            ExportError: If what the folder serves is not what was trained.
        """
        if self.exporter is None:
            raise ValueError("There is nothing to export with: set trainer.exporter.")
        checkpoint: dict[str, Any] = {}
        if ckpt_path is None and is_sharded(model):
            checkpoint = {"state_dict": whole_weights(model)}
        # All processes are asked for the run's folder, unless it is not needed.
        in_run = Path() if ckpt_path and output_dir else self.export_folder
        folder = Path(output_dir) if output_dir else in_run
        if not self.is_global_zero:
            return
        refuse_used(folder)
        if ckpt_path is not None:
            checkpoint = self._read(Path(ckpt_path), weights_only)
            if checkpoint.get("config") and self.run_config:
                name_changes(checkpoint["config"], self.run_config)
        model.configure_model()
        model.gather()
        if checkpoint:
            model.checkpointing.load_weights(model, checkpoint)
        model.to(self.strategy.root_device)
        # Of the data module when it trained: to export, no training rows need be there.
        state = checkpoint.get(type(datamodule).__qualname__, {})
        info = ModelInfo(
            name=(push_to_hub or output_dir or (self.loggers and self.loggers[0].name) or "model")
            .rstrip("/")
            .split("/")[-1],
            address=push_to_hub,
            dimensions=model.dimensions,
            metrics={
                name: float(value) for name, value in self.callback_metrics.items() if name[:4] in ("val/", "test")
            },
            config=yaml.safe_load(self.run_config) or {},
            prompts=getattr(datamodule, "prompts", None) or state.get("prompts", {}),
            rows=getattr(datamodule, "rows", None) or state.get("rows"),
            steps=checkpoint.get("global_step", self.global_step),
            log=(Path(ckpt_path).resolve().parents[1] if ckpt_path else in_run.parent) / "metrics.csv",
        )
        self.exporter.export(model.encoder, folder, info)
        if push_to_hub is not None:
            print(f"Uploaded: {push(folder, push_to_hub, private, revision)}")

    def _read(self, checkpoint: Path, weights_only: bool | None) -> dict[str, Any]:
        if checkpoint.is_dir():
            raise ValueError(
                f"The checkpoint {checkpoint} is a folder of shards. Make it one file with `python -m "
                f"lightning.pytorch.utilities.consolidate_checkpoint {checkpoint}`, or train with "
                "ModelParallelStrategy(save_distributed_checkpoint=False)."
            )
        content: dict[str, Any] = self.strategy.checkpoint_io.load_checkpoint(checkpoint, weights_only=weights_only)
        return content


def _connect(model: Any, data: Any) -> None:
    """Hand the data module what makes this model's batches."""
    if hasattr(model, "collator") and hasattr(data, "collator"):
        data.collator = model.collator()


def _refuse(trainer: Trainer, options: Mapping[str, Any]) -> None:
    """Refuse options and callbacks that would not do here what they say, before anything is loaded."""
    exempt = [name for name in OPTIONS if name.startswith("limit")] if trainer.fast_dev_run else []
    exempt += ["use_distributed_sampler"] if trainer.world_size == 1 else []
    for name, (is_refused, advice) in OPTIONS.items():
        value = options.get(name)
        if value is not None and is_refused(value) and name not in exempt:
            raise ValueError(f"trainer.{name} is {value}: {advice}")
    for callback in trainer.callbacks:
        for kind, advice in CALLBACKS.items():
            if isinstance(callback, kind):
                raise ValueError(f"trainer.callbacks: {type(callback).__name__} is not supported: {advice}")
        _refuse_worst(callback, str(getattr(callback, "monitor", None)), getattr(callback, "mode", None))


def _refuse_worst(callback: Callback, monitor: str, mode: str | None) -> None:
    """Refuse a callback that would keep the worst model."""
    right = "max" if monitor.startswith(("val/", "test/")) else "min" if monitor.startswith("train/") else mode
    if mode != right:
        raise ValueError(
            f"{type(callback).__name__}(monitor: {monitor}) has mode: {mode}, which would prefer the worst model: a "
            f"metric is better when larger, a loss when smaller; Lightning's default is min. Add mode: {right}."
        )
