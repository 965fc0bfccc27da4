from __future__ import annotations

from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import building
import numpy as np
import pytest
import torch
from building import Trainer, jsonl
from lightning import LightningModule
from test_collate import Letters, text

from vlmembed.data import EvaluationSource, ItemCollator, RetrievalDataModule
from vlmembed.data.sources import shard
from vlmembed.types import Batch, EvaluationSet, Item, ItemBatch, Part, Preprocessor


class Recorder(LightningModule):
    """Trains nothing and remembers the queries of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.preprocessor: Preprocessor = Letters()
        self.trained: list[list[int]] = []
        self.measured: list[tuple[int, list[int]]] = []

    def collator(self) -> ItemCollator:
        return ItemCollator(self.preprocessor)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.trained.append(batch.query_ids.tolist())
        return self.weight * 1.0

    def validation_step(self, batch: ItemBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.measured.append((dataloader_idx, batch.rows.tolist()))

    def test_step(self, batch: ItemBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: ItemBatch, batch_idx: int, dataloader_idx: int = 0) -> list[int]:
        return batch.rows.tolist()


def rows(path: Path, size: int, mark: str = "") -> str:
    return jsonl(path, [{"query": f"{mark}q{k}", "positive": f"{mark}answer{'!' * (k % 7)}{k}"} for k in range(size)])


@pytest.fixture
def train(tmp_path: Path) -> str:
    return rows(tmp_path / "train.jsonl", 23)


def trainer(folder: Path, **options: Any) -> Trainer:
    return building.trainer(default_root_dir=folder, enable_checkpointing="callbacks" in options, **options)


def attached(data: RetrievalDataModule, rank: int = 0, world_size: int = 1) -> RetrievalDataModule:
    """A data module as process ``rank`` sees it, without starting processes."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.collator = ItemCollator(Letters())
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=world_size, strategy=strategy, overfit_batches=0
    )
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_fit_sees_every_row_once_per_epoch_in_another_order(workers: int, train: str, tmp_path: Path) -> None:
    data, module = RetrievalDataModule(train, batch_size=5, chunk_size=3, num_workers=workers), Recorder()
    trainer(tmp_path, max_epochs=3).fit(module, datamodule=data)
    assert data.steps_per_epoch == 4
    epochs = [module.trained[start : start + 4] for start in (0, 4, 8)]
    assert len(module.trained) == 12
    assert all(len({*chain(*epoch)}) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_item_of_every_set_is_measured_once(workers: int, train: str, tmp_path: Path) -> None:
    sets = [rows(tmp_path / "small.jsonl", 4), rows(tmp_path / "large.jsonl", 9)]
    data = RetrievalDataModule(train, val=sets, eval_batch_size=3, batch_size=5, num_workers=workers)
    module = Recorder()
    runner = trainer(tmp_path)
    runner.fit(module, datamodule=data)
    runner.validate(module, datamodule=data)
    assert [evaluation.name for evaluation in data.evaluations["val"]] == ["small", "large"]
    for number, size in enumerate([8, 18]):
        seen = [row for index, batch in module.measured for row in batch if index == number]
        assert sorted(seen) == sorted([*range(size)] * 2)
    assert all(len(batch) <= 3 for _, batch in module.measured)


def test_rows_of_a_batch_are_queries_first_then_the_corpus(tmp_path: Path) -> None:
    data = attached(RetrievalDataModule(val=rows(tmp_path / "val.jsonl", 6), eval_batch_size=4, num_workers=0))
    data.setup("validate")
    (evaluation,) = data.evaluations["val"]
    items = [*evaluation.queries, *evaluation.corpus]
    (loader,) = data.val_dataloader()
    seen, widths = [], []
    for batch in loader:
        widths.append(batch.inputs["input_ids"].shape[1])
        for row, ids in zip(batch.rows.tolist(), batch.inputs["input_ids"], strict=True):
            assert "".join(map(chr, ids[ids > 0])) == text(items[row])
            seen.append(row)
    assert sorted(seen) == list(range(12))
    assert widths == sorted(widths, reverse=True)


def test_predict_takes_test_or_else_val(train: str, tmp_path: Path) -> None:
    val, test = rows(tmp_path / "val.jsonl", 4), rows(tmp_path / "test.jsonl", 7)
    for options, size in (({"val": val, "test": test}, 14), ({"val": val}, 8)):
        data = RetrievalDataModule(train, eval_batch_size=3, num_workers=0, **options)
        predicted = trainer(tmp_path).predict(Recorder(), datamodule=data)
        assert sorted(row for batch in predicted for row in batch) == list(range(size))
    module = Recorder()
    trainer(tmp_path).test(module, datamodule=RetrievalDataModule(train, val, test, num_workers=0))
    assert sorted(row for _, batch in module.measured for row in batch) == list(range(14))


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize(("size", "batch_size"), [(40, 4), (37, 4), (11, 5), (9, 1)])
def test_shards_cover_everything_with_equally_many_batches(size: int, batch_size: int, world_size: int) -> None:
    costs = np.random.default_rng(0).integers(1, 50, size).tolist()
    shards = [shard(costs, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in shards}) == 1
    batches = [batch for shard in shards for batch in shard]
    assert all(0 < len(batch) <= batch_size for batch in batches)
    seen = sorted(row for batch in batches for row in batch)
    assert sorted({*seen}) == list(range(size))
    assert len(seen) == max(size, len(batches))  # Repeats only where there are more batches than rows.
    # In turn over the processes, the batches go from the most expensive rows to the cheapest.
    dealt = [costs[row] for turn in zip(*shards, strict=True) for batch in turn for row in batch]
    assert dealt[:size] == sorted(costs, reverse=True)


def test_every_form_that_the_yaml_may_take(tmp_path: Path) -> None:
    path, other = rows(tmp_path / "a.jsonl", 8), rows(tmp_path / "b.jsonl", 12, "other ")
    source = {"class_path": "vlmembed.data.Rows", "init_args": {"path": other}}
    mixture = {"class_path": "vlmembed.data.Mixture", "init_args": {"sources": [source], "alpha": 0.5}}
    measured = {"class_path": "vlmembed.data.EvaluationRows", "init_args": {"rows": source, "name": "named"}}
    for given, size in ((path, 8), (source, 12), (mixture, 12), ([path, source], 20)):
        data = attached(building.data_module(train=given, val=[path, source, measured], batch_size=4))
        data.setup("fit")
        assert data.steps_per_epoch == size // 4
        assert [evaluation.name for evaluation in data.evaluations["val"]] == ["a", "b", "named"]


class Two(EvaluationSource):
    def __init__(self, name: str = "two") -> None:
        self.name = name

    def load(self) -> EvaluationSet:
        items = [Item(role, (Part("text", "x"),)) for role in ("query", "document")]
        return EvaluationSet(self.name, items[:1], items[1:], ["q"], ["d"], {"q": {"d": 1}})


def test_an_evaluation_source_of_ones_own() -> None:
    data = attached(RetrievalDataModule(test=Two(), num_workers=0))
    data.setup("test")
    (loader,) = data.test_dataloader()
    assert [sorted(batch.rows.tolist()) for batch in loader] == [[0, 1]]


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("fit", {}, "data.train is not given"),
        ("fit", {"train": []}, "data.train is not given"),
        ("validate", {}, "nothing to measure on"),
        ("test", {"test": []}, "nothing to measure on"),
        ("predict", {}, "nothing to measure on"),
        ("test", {"test": [Two(), Two()]}, "2 evaluation sets are called 'two'"),
        ("predict", {"test": Two("vidore/two")}, "set 'vidore/two' has no name that a file may have"),
        ("predict", {"val": Two("../two")}, "set '../two' has no name that a file may have"),
    ],
)
def test_what_a_stage_lacks_is_said(stage: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(RetrievalDataModule(**options)).setup(stage)


def test_a_bad_eval_batch_size_and_overfit_batches_are_refused(train: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_batch_size is 1 or more, got 0"):
        RetrievalDataModule(train, eval_batch_size=0)
    with pytest.raises(ValueError, match="overfit_batches is 1: Lightning would take away the sampler"):
        trainer(tmp_path, overfit_batches=1).fit(Recorder(), datamodule=RetrievalDataModule(train, batch_size=5))
