"""Training runs that write a checkpoint wherever Lightning can, and what they leave behind."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ddp
import lightning
import torch
from building import module, multi_vector, ranker, trainer, write_rows
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from peft import LoraConfig
from torch.optim import AdamW

from vlmembed.adapters import Freeze, LoRA
from vlmembed.backbones import Qwen3VL
from vlmembed.data import Mixture, RetrievalDataModule, Rows
from vlmembed.features import FeatureCache, OnDisk
from vlmembed.losses import InfoNCE, MergedTokens, SoftmaxCrossEntropy
from vlmembed.modules import CosineDecay, EmbeddingModule, RetrievalModule
from vlmembed.pooling import LastToken
from vlmembed.training.checkpointing import STATE, in_window

OPTIMIZER = {"optimizer": partial(AdamW, lr=1e-3), "lr_scheduler": partial(CosineDecay, warmup=0.2)}


def dropping_lora() -> LoRA:
    return LoRA(LoraConfig(r=2, target_modules=["q_proj", "qkv"], init_lora_weights=False, lora_dropout=0.1))


def embedder(checkpoint: Path) -> RetrievalModule:
    torch.manual_seed(0)
    return module(checkpoint, InfoNCE(0.05, learnable_temperature=True), adapters=[dropping_lora()], **OPTIMIZER)


def all_weights(checkpoint: Path, **options: Any) -> RetrievalModule:
    torch.manual_seed(0)
    return module(checkpoint, InfoNCE(0.05), **OPTIMIZER, **options)


def fresh(checkpoint: Path) -> RetrievalModule:
    """Not configured: where weights are cut into shards, that is for the trainer to do."""
    torch.manual_seed(0)
    loss = InfoNCE(0.05, learnable_temperature=True)
    return EmbeddingModule(Qwen3VL(str(checkpoint)), LastToken(), loss, adapters=[Freeze(["vision"])], **OPTIMIZER)


def kept_features(checkpoint: Path, cache: FeatureCache | None = None) -> RetrievalModule:
    """With a frozen tower, whose features all runs of a test session share."""
    cache = cache or OnDisk(str(checkpoint.parent / "features"), limit_gib=0.1)
    return all_weights(checkpoint, adapters=[Freeze(["vision", "merger"])], features=cache)


def reranker(checkpoint: Path) -> RetrievalModule:
    return ranker(checkpoint, SoftmaxCrossEntropy(), adapters=[dropping_lora()], **OPTIMIZER)


def several_vectors(checkpoint: Path) -> RetrievalModule:
    loss = MergedTokens(InfoNCE(0.05, learnable_temperature=True), [1, 2])
    return multi_vector(checkpoint, loss, adapters=[dropping_lora()], **OPTIMIZER)


def watchers(folder: Path) -> list[Callback]:
    """What watches a metric that stays as it is: the rate is too low to change an order."""
    best = {"monitor": "val/ndcg@10", "mode": "max"}
    return [
        EarlyStopping(**best, patience=2),
        ModelCheckpoint(folder, "{step}", save_top_k=2, every_n_train_steps=1, enable_version_counter=False, **best),
    ]


@dataclass(frozen=True)
class Setting:
    """One kind of run.

    Args:
        model: Makes the module.
        data: Options of the data module.
        sources: How its training rows are mixed; null for the rows of one file.
        trainer: Options of Lightning's trainer.
        strategy: Makes the strategy of two processes; null for one process.
        callbacks: Makes callbacks that keep files in a folder.
    """

    model: Callable[[Path], RetrievalModule] = embedder
    data: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Any] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: Callable[[], Strategy] | None = None
    callbacks: Callable[[Path], list[Callback]] = lambda folder: []

    def data_module(self, folder: Path) -> RetrievalDataModule:
        train: Any = str(folder / "rows.jsonl")
        if self.sources is not None:
            train = Mixture([Rows(train), Rows(str(folder / "more.jsonl"))], **self.sources)
        options = {"batch_size": 2, "chunk_size": 3, "num_workers": 0, **self.data}
        return RetrievalDataModule(train, str(folder / "few.jsonl"), **options)


SETTINGS = {
    "LoRA": Setting(trainer={"val_check_interval": 2}),
    "accumulation": Setting(trainer={"accumulate_grad_batches": 2, "val_check_interval": 2}),
    "features": Setting(kept_features, trainer={"val_check_interval": 3}),
    "limited": Setting(all_weights, trainer={"limit_train_batches": 3, "check_val_every_n_epoch": 2, "max_epochs": 4}),
    "steps": Setting(trainer={"max_steps": 6, "max_epochs": -1, "val_check_interval": 2}),
    "mixture": Setting(
        partial(all_weights, graph_memory="auto"),
        data={"num_workers": 2},
        sources={"weights": [2.0, 1.0], "one_source_batches": True},
        trainer={"val_check_interval": 3},
    ),
    "reranker": Setting(
        reranker, trainer={"accumulate_grad_batches": 2, "val_check_interval": 2, "log_every_n_steps": 2}
    ),
    "several vectors": Setting(several_vectors, trainer={"val_check_interval": 2}),
    "watched": Setting(
        trainer={"accumulate_grad_batches": 2, "val_check_interval": 2, "max_epochs": 9}, callbacks=watchers
    ),
    "averaged": Setting(
        trainer={"accumulate_grad_batches": 2, "val_check_interval": 2}, callbacks=lambda _: [WeightAveraging()]
    ),
    "moving average": Setting(
        kept_features,
        trainer={"val_check_interval": 3},
        callbacks=lambda _: [EMAWeightAveraging(decay=0.7, update_every_n_steps=2, update_starting_at_step=2)],
    ),
    "two processes": Setting(
        data={"batch_size": 1},
        trainer={"accumulate_grad_batches": 2, "val_check_interval": 2},
        strategy=partial(DDPStrategy, process_group_backend="gloo"),
    ),
    "shards": Setting(
        fresh,
        data={"batch_size": 1, "chunk_size": 2},
        trainer={"val_check_interval": 3},
        strategy=partial(ModelParallelStrategy, ddp.WORLD_SIZE, 1, False, process_group_backend="gloo"),
    ),
}


def write_data(folder: Path) -> None:
    """Eight batches of two, from one file; or eleven, from two."""
    for name, count in (("few", 3), ("more", 6), ("rows", 9)):
        write_rows(folder / f"{name}.jsonl", count)


class SaveEverywhere(Checkpoint):
    """Writes a checkpoint after every step, every validation after every epoch.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Each checkpoint, and how many batches came before it.
        self.written: list[tuple[Path, int]] = []
        self.losses: list[float] = []

    def save(self, run: lightning.Trainer, when: str) -> None:
        path = self.folder / f"{run.fit_loop.epoch_loop.batch_progress.total.ready:02} {when}.ckpt"
        run.save_checkpoint(path)
        self.written.append((path, len(self.losses)))

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        if not in_window(trainer):
            self.save(trainer, "batch")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.save(trainer, "epoch")


@dataclass
class Left:
    """What a run leaves behind.

    Args:
        losses: Of each batch.
        rows: Of metrics.csv.
        written: The checkpoints, and how many batches of this run came before each.
    """

    losses: list[float]
    rows: list[dict[str, str]]
    written: list[tuple[Path, int]]

    def after(self, path: Path, batches: int) -> tuple[list[float], list[dict[str, str]]]:
        """Return the losses and rows that came after a checkpoint."""
        return self.losses[batches:], self.rows[load(path)[STATE]["rows"] :]


def train(setting: Setting, checkpoint: Path, data: Path, folder: Path, resume: Path | None = None) -> Left:
    """Train, or go on from a checkpoint, and write into a folder."""
    folder.mkdir(exist_ok=True)
    saver = SaveEverywhere(folder)
    logger = CSVLogger(folder, name="run")
    options = {"enable_checkpointing": True, "max_epochs": 2, "log_every_n_steps": 1, **setting.trainer}
    if setting.strategy is not None:
        options |= {"devices": ddp.WORLD_SIZE, "strategy": setting.strategy()}
    callbacks = [*setting.callbacks(folder.parent / "best"), saver]
    run = trainer(logger=logger, callbacks=callbacks, **options)
    model = setting.model(checkpoint)
    # Processes draw different numbers, and one that resumes has drawn others before.
    torch.manual_seed(run.global_rank + (10 if resume is None else 20))
    run.fit(model, datamodule=setting.data_module(data), ckpt_path=resume)
    return Left(saver.losses, read_rows(Path(logger.log_dir)), saver.written)


def read_rows(folder: Path) -> list[dict[str, str]]:
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Say where two checkpoints differ by as much as a bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [place]
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{place}/{key}" for key in one.keys() ^ other.keys()]
        return missing + [
            found for key in one.keys() & other.keys() for found in differences(one[key], other[key], f"{place}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            found
            for index, pair in enumerate(zip(one, other, strict=True))
            for found in differences(*pair, f"{place}/{index}")
        ]
    return [] if one == other else [f"{place}: {one} and {other}"]
