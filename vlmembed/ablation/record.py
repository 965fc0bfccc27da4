"""The Lightning callback that records what a trial cost, and how every query scored."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from vlmembed.files import write_whole
from vlmembed.metrics import RerankingMetrics, RetrievalMetrics

#: Steps that are slower than the others: kernels are chosen and memory is found.
FIRST_STEPS = 2


class Record(Callback):
    """Records cost, and scores per query; ``ablate`` adds it to its trials.

    Args:
        stage: Which evaluation sets are recorded.
    """

    def __init__(self, stage: Literal["val", "test"] = "test") -> None:
        self.stage = stage
        self._has_trained = False
        self._steps: list[float] = []
        self._elapsed = 0.0

    @property
    def seconds_per_step(self) -> float:
        """The median of a step, without the first ones if there are others."""
        return statistics.median(self._steps[FIRST_STEPS:] or self._steps or [0.0])

    def now(self, device: torch.device) -> float:
        """Return seconds, once the device has done its work."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Note the first step, which is not 0 where training is resumed."""
        self._last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._start = self.now(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it; a step of several batches takes what they take together."""
        self._elapsed += self.now(pl_module.device) - self._start
        if trainer.global_step > self._last_step:
            self._steps.append(self._elapsed)
            self._elapsed, self._last_step = 0.0, trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write ``cost.json``."""
        self._has_trained = True
        encoder, device = pl_module.encoder, pl_module.device
        # Main memory: in kilobytes, but on a Mac in bytes.
        main_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        cost = {
            "seconds_per_step": self.seconds_per_step,
            "steps_per_epoch": -(-trainer.num_training_batches // trainer.accumulate_grad_batches),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else main_memory,
            "trained_parameters": sum(weight.numel() for weight in pl_module.parameters() if weight.requires_grad),
            "pooling_parameters": sum(weight.numel() for weight in encoder.pooling.parameters()),
            "embedding_dimension": encoder.dimension,
            "embedding_bytes": 4 * encoder.dimension,
        }
        folder = Path(trainer.log_dir or ".")  # All processes ask: they agree on it.
        if trainer.is_global_zero:
            write_whole(folder / "cost.json", json.dumps(cost, indent=1).encode())

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Record how the trained model scores in the validation sets."""
        if self.stage == "val" and trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module.metrics)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Record how the trained model scores in the test sets."""
        if self.stage == "test":
            self._write(trainer, pl_module.metrics)

    def _write(self, trainer: Trainer, measured: Iterable[RetrievalMetrics | RerankingMetrics]) -> None:
        """Write the scores of the trained model; those of the fresh one are not recorded."""
        folder = Path(trainer.log_dir or ".") / "measured"
        for metrics in measured if self._has_trained else ():
            values = metrics.per_query()  # (Q,) each. Each process has a share of the embeddings, so all of them ask.
            if trainer.is_global_zero:
                table = pd.DataFrame({name: column.tolist() for name, column in values.items()})
                text = table.set_index(pd.Index(metrics.evaluation.query_names, name="query")).to_csv()
                write_whole(folder / metrics.evaluation.name / "per_query.csv", text.encode())
