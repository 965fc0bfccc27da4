"""Training runs in which something is not finite, at chosen batches."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from building import Recorder, batch, examples, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from vlmembed.modules import EmbeddingModule, RetrievalModule
from vlmembed.types import Batch

ROWS = 3


class Plant(Callback):
    """Breaks the batches of some numbers.

    Args:
        batches: Their numbers in the epoch.
        what: The embeddings, and with them all; the value of the loss alone; or the gradient of one weight alone.
        rank: In which process.
    """

    def __init__(
        self, batches: Collection[int], what: Literal["embeddings", "loss", "gradient"] = "embeddings", rank: int = 0
    ) -> None:
        self.batches, self.what, self.rank = batches, what, rank
        self.factor = 1.0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.global_rank != self.rank:
            return
        if self.what == "embeddings":
            pl_module.encoder.register_forward_hook(lambda *given: self.factor * given[-1])
        elif self.what == "loss":
            pl_module.loss.register_forward_hook(lambda *given: given[-1] + (self.factor - 1))
        else:
            weight(pl_module).register_hook(lambda gradient: self.factor * gradient)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, data: Any, batch_idx: int) -> None:
        self.factor = math.nan if batch_idx in self.batches else 1.0


def weight(model: RetrievalModule) -> Tensor:
    return model.encoder.backbone.model.language_model.norm.weight


def batches(model: EmbeddingModule, count: int, rank: int = 0) -> list[Batch]:
    """Batches of a few rows, which say where these come from."""
    rows = examples(ROWS * count)
    starts = [ROWS * number for number in range(count)]
    return [
        replace(batch(model, rows[start : start + ROWS], 2), origins=named(range(start, start + ROWS), rank))
        for start in starts
    ]


def named(rows: Collection[int], rank: int = 0) -> tuple[str, ...]:
    return tuple(f"part {rank}, row {row}" for row in rows)


def run(model: RetrievalModule, data: list[Any], *callbacks: Callback, **options: Any) -> Recorder:
    """Train on each batch once."""
    recorder = Recorder()
    fitted = trainer(callbacks=[*callbacks, recorder], log_every_n_steps=1, **options)
    fitted.fit(model, DataLoader(data, batch_size=None))
    return recorder


def skipped(folder: Path) -> list[dict[str, Any]]:
    """What the run's folder says."""
    path = folder / "non_finite.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
