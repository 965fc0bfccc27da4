"""Lightning's trainer, with a method that exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from vlmembed.distributed import is_sharded
from vlmembed.export import Exporter, Run, push, refuse_used
from vlmembed.modules import RetrievalModule
from vlmembed.runs import CheckpointFiles, RememberConfiguration, StopSafely, read_checkpoint, refuse_changes
from vlmembed.sharding import whole_weights


class Trainer(lightning.Trainer):
    """Lightning's trainer, which can also export, and whose runs survive being stopped.

    Args:
        *args: As for Lightning's trainer.
        exporter: Writes the trained model for others to open, for ``export`` and at the end of ``fit``; null for not at
            all.
        allow_changed: Keys of the configuration that may have changed since the run began that ``fit`` goes on with,
            such as trainer.max_epochs; those below them included.
        **kwargs: As for Lightning's trainer.
    """

    fast_dev_run: bool | int
    callbacks: list[Callback]

    #: The run's whole configuration, in YAML.
    run_config = ""
    #: The steps that the run had done when `fit` went on with it.
    steps_before = 0

    def __init__(
        self, *args: Any, exporter: Exporter | None = None, allow_changed: list[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.exporter = exporter
        self.allow_changed = allow_changed or []
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = CheckpointFiles()
        # After the others, so that a step at which a run is stopped is one like any other.
        self.callbacks += [RememberConfiguration(), StopSafely()]

    def fit(
        self,
        model: lightning.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: lightning.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train.

        Args:
            model: What to train.
            train_dataloaders: As for Lightning's trainer.
            val_dataloaders: As for Lightning's trainer.
            datamodule: The data.
            ckpt_path: A checkpoint to go on from: as if it had never been interrupted, to the bit on a CPU. On the
                command line, ``last`` goes on with the newest run, in its folder, from its newest whole checkpoint; and
                begins a new one if there is none.
            weights_only: Whether to refuse a checkpoint that holds more than tensors and plain values; null for yes.

        Raises:
            ValueError: If the run began with a configuration that differs in what decides what is learned.
        """
        # What is elsewhere, or not to be read without running it, is not looked into before.
        if ckpt_path is not None and Path(ckpt_path).exists() and weights_only is not False:
            checkpoint = read_checkpoint(Path(ckpt_path))
            self.steps_before = checkpoint["global_step"]
            if checkpoint.get("config") and self.run_config:
                refuse_changes(checkpoint["config"], self.run_config, self.allow_changed)
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def _run(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Tell the data which batches the model takes, before Lightning runs anything."""
        data: Any = getattr(self, "datamodule", None)
        if hasattr(data, "collator") and hasattr(model, "collator"):
            data.collator = model.collator()
        return super()._run(model, *args, **kwargs)

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
            datamodule: Not used.
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
        checkpoint: dict[str, Any] | None = None
        if ckpt_path is None and is_sharded(model):
            checkpoint = {"state_dict": whole_weights(model)}
        folder = Path(output_dir) if output_dir else self.export_folder  # Which all processes are asked for.
        if not self.is_global_zero:
            return
        refuse_used(folder)
        if ckpt_path is not None:
            checkpoint = self._read(Path(ckpt_path), weights_only)
        model.configure_model()
        model.gather()
        if checkpoint is not None:
            model.load_checkpoint(checkpoint)
        model.to(self.strategy.root_device)
        self.exporter.export(
            model.encoder,
            folder,
            Run(
                name=(push_to_hub or output_dir or self.loggers[0].name or "model").rstrip("/").split("/")[-1],
                address=push_to_hub,
                # A cross-encoder's loss has none.
                dimensions=getattr(model.loss, "dimensions", ()),
                metrics={
                    name: float(value) for name, value in self.callback_metrics.items() if name[:4] in ("val/", "test")
                },
                config=yaml.safe_load(self.run_config) or {},
            ),
        )
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
