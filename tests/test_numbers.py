"""Steps that are not finite, and weights that are not."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ddp
import pytest
import torch
import torch.distributed as dist
from building import Recorder, lists, module, ranker, ranking_batch, trainer, write_rows
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from planted import Plant, batches, named, run, same, skipped, weight
from torch.optim import SGD, Adafactor, AdamW
from torch.utils.data import DataLoader

from vlmembed.backbones import Qwen3VL
from vlmembed.data import RetrievalDataModule
from vlmembed.losses import InfoNCE
from vlmembed.modules import EmbeddingModule
from vlmembed.pooling import LastToken
from vlmembed.training.guards import CollapseMonitor

OPTIMIZERS = {
    "AdamW": partial(AdamW, lr=1e-3, weight_decay=0.1),
    "AdamW, fused": partial(AdamW, lr=1e-3, weight_decay=0.1, fused=True),
    "AdamW, one by one": partial(AdamW, lr=1e-3, weight_decay=0.1, foreach=False),
    "SGD with momentum": partial(SGD, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "Adafactor": partial(Adafactor, lr=1e-3, weight_decay=0.1),
}


def csv_logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="run")


class Last(Callback):
    """Keeps the optimizer's state."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.state = trainer.optimizers[0].state_dict()["state"]


# One step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace(checkpoint: Path, optimizer: str) -> None:
    """Neither in weights nor in moments: the run is, to the bit, one that never had these batches."""
    runs: list[tuple[Recorder, Last]] = []
    for broken, kept in (((0, 3), range(5)), ((), (1, 2, 4))):
        model = module(checkpoint, InfoNCE(0.05, learnable_temperature=True), optimizer=OPTIMIZERS[optimizer])
        data = batches(model, 5)
        last = Last()
        runs.append((run(model, [data[number] for number in kept], Plant(broken), last, gradient_clip_val=1.0), last))
    (found, state), (expected, expected_state) = runs
    assert same(found.weights[-1], expected.weights[-1])
    torch.testing.assert_close(state.state, expected_state.state, rtol=0, atol=0)
    assert same(found.weights[0], found.weights[1])
    assert same(found.weights[3], found.weights[4])
    assert not same(found.weights[4], found.weights[5])


@pytest.mark.parametrize("what", ["embeddings", "loss", "gradient"])
def test_what_was_skipped_is_written_down(checkpoint: Path, tmp_path: Path, what: Any) -> None:
    model = module(checkpoint)
    data = batches(model, 4)
    with pytest.warns(UserWarning, match=r"Step 1 is skipped: the norm of its gradient is .*, its loss .*\. The rows"):
        run(model, data, Plant({1, 2}, what), logger=csv_logger(tmp_path))
    found = skipped(tmp_path / "run")
    assert [(line["step"], line["epoch"]) for line in found] == [(1, 0), (2, 0)]
    assert [line["batches"][0]["rows"] for line in found] == [list(named(range(3, 6))), list(named(range(6, 9)))]
    for line in found:
        assert (line["gradient_norm"] == "nan") == (what != "loss")
        assert (line["batches"][0]["loss"] == "nan") == (what != "gradient")
        assert len(line["parameters"]) == {"embeddings": 5, "loss": 0, "gradient": 1}[what]
    if what == "gradient":
        assert found[0]["parameters"] == ["encoder.backbone.model.language_model.norm.weight"]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        logged = [(row["step"], row["train/skipped_steps"]) for row in csv.DictReader(file)]
    assert logged == [("0", ""), ("1", "1.0"), ("2", "2.0"), ("3", "2.0")]


def test_a_healthy_run_has_no_such_file_and_no_such_column(checkpoint: Path, tmp_path: Path) -> None:
    model = module(checkpoint)
    run(model, batches(model, 2), logger=csv_logger(tmp_path))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.csv"]
    assert "skipped" not in (tmp_path / "run" / "metrics.csv").read_text()


def test_one_batch_spoils_those_that_it_is_added_to(checkpoint: Path, tmp_path: Path) -> None:
    """Of three steps of two batches, the second has a broken one."""
    runs = []
    for broken, kept in (((3,), range(6)), ((), (0, 1, 4, 5))):
        model = module(checkpoint)
        data = batches(model, 6)
        options = {"accumulate_grad_batches": 2, "logger": csv_logger(tmp_path / str(len(kept)))}
        runs.append(run(model, [data[number] for number in kept], Plant(broken), **options))
    assert same(runs[0].weights[-1], runs[1].weights[-1])
    (line,) = skipped(tmp_path / "6" / "run")
    first, second = line["batches"]
    assert line["step"] == 1
    assert (first["rows"], second["rows"]) == (list(named(range(6, 9))), list(named(range(9, 12))))
    assert first["loss"] == pytest.approx(runs[0].losses[2])
    assert second["loss"] == "nan"


def test_a_cross_encoder_skips_too(checkpoint: Path, tmp_path: Path) -> None:
    model = ranker(checkpoint)
    data = [replace(ranking_batch(model, lists(4), 3), origins=named(range(number, number + 4))) for number in range(3)]
    recorder = run(model, data, Plant({1}), logger=csv_logger(tmp_path))
    assert [line["batches"][0]["rows"] for line in skipped(tmp_path / "run")] == [list(named(range(1, 5)))]
    assert same(recorder.weights[1], recorder.weights[2])


def test_the_host_asks_the_device_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question waits for all work that the device still has to do."""
    asked: list[int] = []
    configure = EmbeddingModule.configure_gradient_clipping

    def counted(self: EmbeddingModule, *given: Any, **options: Any) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            configure(self, *given, **options)
        asked.append(sum(event.name == "aten::_local_scalar_dense" for event in profile.events()))

    monkeypatch.setattr(EmbeddingModule, "configure_gradient_clipping", counted)
    model = module(checkpoint)
    run(model, batches(model, 2), gradient_clip_val=1.0)
    assert asked == [1, 1]


def test_guards_change_no_bit(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gradients that Lightning would clip by itself, among other things."""
    runs = []
    for guarded in (True, False):
        model = module(checkpoint, InfoNCE(0.05, learnable_temperature=True))
        if not guarded:
            monkeypatch.setattr(
                EmbeddingModule, "configure_gradient_clipping", LightningModule.configure_gradient_clipping
            )
            monkeypatch.setattr(CollapseMonitor, "note", lambda *_: None)
        runs.append(run(model, batches(model, 4), gradient_clip_val=0.5))
    one, other = runs
    assert one.losses == other.losses
    assert same(one.weights[-1], other.weights[-1])


# Too many


def test_too_many_in_a_row_stop_the_run(checkpoint: Path, tmp_path: Path) -> None:
    model = module(checkpoint, max_skipped_steps=2)
    data = batches(model, 7)
    stops = pytest.raises(RuntimeError, match=r"3 optimizer steps in a row .* max_skipped_steps is 2. The rows .*bf16")
    with stops:
        run(model, data, Plant({0, 1, 3, 4, 5}), logger=csv_logger(tmp_path))
    assert [line["step"] for line in skipped(tmp_path / "run")] == [0, 1, 3, 4, 5]


def test_the_limit_is_a_count(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="max_skipped_steps is 0, to stop at the first, or more; got -1"):
        module(checkpoint, max_skipped_steps=-1)
    model = module(checkpoint, max_skipped_steps=0)
    with pytest.raises(RuntimeError, match="1 optimizer steps in a row"):
        run(model, batches(model, 2), Plant({1}))


def test_a_resumed_run_counts_on(checkpoint: Path, tmp_path: Path) -> None:
    """And takes back what it had written of steps that it takes again."""

    def go_on(broken: set[int], resume: Path | None = None) -> None:
        model = module(checkpoint, max_skipped_steps=2)
        saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        options = {"enable_checkpointing": True, "callbacks": [Plant(broken), saver], "logger": csv_logger(tmp_path)}
        loader = DataLoader(batches(model, 6), batch_size=None)
        trainer(**options).fit(model, loader, ckpt_path=resume, weights_only=True)

    go_on({1, 2})
    go_on({1, 2, 4, 5})
    assert [line["step"] for line in skipped(tmp_path / "run")] == [1, 2, 4, 5]
    with (tmp_path / "run" / "non_finite.jsonl").open("a") as file:
        file.write('{"step": 2, "ep')  # As a killed process leaves it.
    go_on({1, 2, 5}, tmp_path / "step=3.ckpt")
    assert [line["step"] for line in skipped(tmp_path / "run")] == [1, 2, 5]
    with pytest.raises(RuntimeError, match="3 optimizer steps in a row"):
        go_on({3}, tmp_path / "step=3.ckpt")


# Several processes


def train_together(checkpoint: Path, folder: Path) -> dict[str, tuple[Recorder, int]]:
    """Break batches of the second process alone."""
    rank, found = dist.get_rank(), {}
    sharded = ModelParallelStrategy(ddp.WORLD_SIZE, 1, process_group_backend="gloo")
    for name, what, strategy in (
        ("embeddings", "embeddings", DDPStrategy(process_group_backend="gloo")),
        ("gradient", "gradient", DDPStrategy(process_group_backend="gloo")),
        ("shards", "embeddings", sharded),
    ):
        options = {"devices": ddp.WORLD_SIZE, "strategy": strategy, "logger": csv_logger(folder / name)}
        model = EmbeddingModule(Qwen3VL(str(checkpoint)), LastToken(), InfoNCE(0.05), optimizer=partial(SGD, lr=0.01))
        data = batches(module(checkpoint), 4, rank)
        recorder = run(model, data[2 * rank :] + data[: 2 * rank], Plant({1}, what, rank=1), **options)
        found[name] = recorder, model.guard.skipped
    return found


def test_all_processes_skip_what_is_broken_in_one(checkpoint: Path, tmp_path: Path) -> None:
    first, second = ddp.run(train_together, checkpoint, tmp_path)
    for name, (recorder, count) in first.items():
        other, others_count = second[name]
        assert count == others_count == 1
        for step, (one, two) in enumerate(zip(recorder.weights, other.weights, strict=True)):
            assert same(one, two)
            assert same(one, recorder.weights[step - 1]) == (step == 2)
        (line,) = skipped(tmp_path / name / "run")
        assert line["step"] == 1
        assert line["batches"][0]["rows"] == [*named(range(3, 6)), *named(range(9, 12), rank=1)]


# Weights


class Breaks(Callback):
    """Breaks a weight after a step, as a step that is too large may, and has the step look like the best so far."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *given: Any) -> None:
        if trainer.global_step == self.step:
            trainer.callback_metrics["train/loss"].zero_()
            with torch.no_grad():
                weight(pl_module)[3] = self.value


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_no_checkpoint_holds_weights_that_are_not_finite(checkpoint: Path, tmp_path: Path, value: float) -> None:
    model = module(checkpoint, optimizer=partial(SGD, lr=1e-3))
    options = {"monitor": "train/loss", "save_top_k": 2, "every_n_train_steps": 1, "save_last": True}
    saver = ModelCheckpoint(tmp_path, "{step}", **options)
    refuses = pytest.raises(RuntimeError, match=r"1 parameters are not finite, such as .*language_model.norm.weight")
    with refuses:
        run(model, batches(model, 6), Breaks(4, value), saver, enable_checkpointing=True)
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept if "last" in path.name] == ["last.ckpt"]
    assert len(kept) == 3
    for path in kept:
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_run_whose_weights_broke_stops_at_once(checkpoint: Path) -> None:
    """However many steps it may skip."""
    model = module(checkpoint, optimizer=partial(SGD, lr=1e-3))
    data = batches(model, 4)
    with pytest.raises(RuntimeError, match=r"Step 2: 1 parameters are not finite, such as .*norm.weight"):
        run(model, data, Breaks(2, math.inf))


def test_broken_weights_are_not_measured(checkpoint: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    model = module(checkpoint)
    with torch.no_grad():
        weight(model)[3] = torch.nan
    data = RetrievalDataModule(val=str(rows), num_workers=0)
    with pytest.raises(ValueError, match=rf"embeddings of document '.*' \({rows}, row \d+.* are not finite: look at"):
        trainer().validate(model, data)


# Half precision


def test_a_scaler_looks_for_its_scale_undisturbed(checkpoint: Path, tmp_path: Path) -> None:
    """Gradients overflow until it has found one; a loss that is not finite has nothing to do with it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    model = module(checkpoint, max_skipped_steps=0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    data = batches(model, 4)
    recorder = run(model, data, plugins=[plugin], logger=csv_logger(tmp_path))
    assert scaler.get_scale() == 2.0**116
    assert same(recorder.weights[0], recorder.weights[-1])
    assert not skipped(tmp_path / "run")
    with pytest.raises(RuntimeError, match="1 optimizer steps in a row"):
        run(model, data, Plant({2}), plugins=[plugin], logger=csv_logger(tmp_path))
