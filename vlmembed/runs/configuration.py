"""A run's configuration, in its folder and in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback

from vlmembed.runs.changes import RESUMING, changes

FILE = "config.yaml"


class RememberConfiguration(Callback):
    """Writes the configuration into checkpoints, so that a run cannot go on with another one unnoticed."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add it."""
        checkpoint["config"] = getattr(trainer, "run_config", "")


class SaveConfiguration(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder; one that is there, and differs, is kept beside it."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it. Only the first process is here, so nothing is asked that all would have to answer."""
        folder = Path((trainer.loggers and trainer.loggers[0].log_dir) or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        place, text = folder / FILE, self.parser.dump(self.config, skip_none=False)
        if place.exists():
            if changes(place.read_text(), text).keys() <= RESUMING:
                return
            earlier = len(list(folder.glob("config.*.yaml"))) + 1
            place.rename(place.with_name(f"config.{earlier}.yaml"))
        place.write_text(text)
