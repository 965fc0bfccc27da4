"""What Lightning's callbacks and trainer flags do in a fit, row by row of the table in vlmembed/training/README.md."""

from __future__ import annotations

import csv
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from building import batch, call, examples, fit, jsonl, module, relative_difference, run_config, trainer
from lightning.pytorch import callbacks as lightning_callbacks
from torch.optim import SGD

from vlmembed.encoder import Encoder
from vlmembed.training.checkpointing import refuse_split_windows

PAGE = Path(__file__).parent.parent / "vlmembed/training/README.md"
Lightning = "lightning.pytorch.callbacks."
#: What the trainer was at the end of the last fit.
SEEN: list[SimpleNamespace] = []


def remember(run: lightning.Trainer, _: Any) -> None:
    SEEN.append(SimpleNamespace(steps=run.global_step, epochs=run.current_epoch, window=run.accumulate_grad_batches))


def rows_of(data: Any) -> int:
    return len(data.queries if hasattr(data, "queries") else data.rows)


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": Lightning + name, "init_args": arguments}


def run(checkpoint: Path, flags: dict[str, Any], callbacks: list[Any], lr: float = 1e-3) -> None:
    """A fit of three batches an epoch, as a user would start it."""
    rows = jsonl("rows.jsonl", [{"query": f"number {index}", "positive": f"answer {index}"} for index in range(12)])
    config = run_config(checkpoint, train=rows, val=rows, batch_size=4)
    config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": lr}}
    callbacks = [callback("LambdaCallback", on_fit_end="test_fit_options.remember"), *callbacks]
    config["trainer"] = {"accelerator": "cpu", "exporter": None, "max_epochs": 1, "callbacks": callbacks, **flags}
    SEEN.clear()
    call("fit", config)


def columns(folder: Path) -> list[str]:
    (log,) = folder.rglob("metrics.csv")
    with log.open() as file:
        return next(csv.reader(file))


def check_watched(folder: Path, printed: str) -> None:
    assert (SEEN[0].epochs, SEEN[0].steps) == (2, 6)  # Nothing improves: the second epoch is the last.
    names = " ".join(columns(folder))
    for part in ("DeviceStatsMonitor", "lr-SGD", "train|", "val/ndcg@10"):
        assert part in names or part.replace("|", "/") in names
    assert [path.name for path in folder.rglob("*.ckpt")] == ["best-step=3.ckpt"]
    assert next(folder.rglob("*.ckpt")).is_relative_to(folder / "root")
    assert "encoder" in printed
    assert "Epoch 1" in printed


def check_rich(folder: Path, printed: str) -> None:
    assert (SEEN[0].steps, SEEN[0].window) == (2, 2)
    assert not list(folder.rglob("metrics.csv"))
    assert "Epoch 0" in printed
    assert "encoder" in printed
    assert next(folder.glob("times/*")).stat().st_size


def check_measured(folder: Path, printed: str) -> None:
    assert SEEN[0].steps == 4
    with next(folder.rglob("metrics.csv")).open() as file:
        measured = [(row["step"], row["val/ndcg@10"]) for row in csv.DictReader(file) if row["val/ndcg@10"]]
    # Before, after every second batch, and after; gradients are clipped to nothing.
    assert len(measured) == 4
    assert len({value for _, value in measured}) == 1


def check_smoke(folder: Path, printed: str) -> None:
    assert SEEN[0].steps == 2
    assert {path.name for path in folder.iterdir()} == {"rows.jsonl", "run.yaml"}


def check_bare(folder: Path, printed: str) -> None:
    assert SEEN[0].steps == 2
    assert not list(folder.rglob("*.ckpt")) + list(folder.rglob("metrics.csv"))


def check_timed(folder: Path, printed: str) -> None:
    assert 1 <= SEEN[0].steps < 3000


def check_nothing(folder: Path, printed: str) -> None:
    assert "Nothing was trained" in printed


WATCHING = [
    callback("DeviceStatsMonitor"),
    callback("EarlyStopping", monitor="val/ndcg@10", mode="max", patience=1),
    callback("LearningRateMonitor"),
    callback("ModelCheckpoint", monitor="val/ndcg@10", mode="max", filename="best-{step}"),
    callback("ModelSummary", max_depth=1),
    callback("TQDMProgressBar"),
    callback("ThroughputMonitor", batch_size_fn="test_fit_options.rows_of"),
    callback("Callback"),
    callback("Checkpoint"),
]
RICH = [
    callback("RichProgressBar"),
    callback("RichModelSummary"),
    callback("GradientAccumulationScheduler", scheduling={0: 2}),
    callback("Timer", duration={"minutes": 5}),
]
RUNS: dict[str, tuple[dict[str, Any], list[Any], float, Callable[[Path, str], None]]] = {
    "watched": (
        {
            **{"max_epochs": 5, "min_epochs": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 1, "logger": True},
            **{"default_root_dir": "root", "check_val_every_n_epoch": 1, "limit_val_batches": 1.0},
            **{"enable_checkpointing": True, "enable_progress_bar": True, "enable_model_summary": True},
        },
        WATCHING,
        0.0,
        check_watched,
    ),
    "rich": (
        {
            **{"logger": False, "precision": "bf16-mixed", "benchmark": True, "inference_mode": False, "min_steps": 1},
            **{"deterministic": True, "sync_batchnorm": True, "enable_autolog_hparams": False, "detect_anomaly": True},
            "profiler": {
                "class_path": "lightning.pytorch.profilers.SimpleProfiler",
                "init_args": {"dirpath": "times", "filename": "all"},
            },
        },
        RICH,
        1e-3,
        check_rich,
    ),
    "measured": (
        {
            **{"max_steps": 4, "max_epochs": -1, "val_check_interval": 2, "accumulate_grad_batches": 1},
            **{"gradient_clip_val": 1e-12, "gradient_clip_algorithm": "value", "check_val_every_n_epoch": None},
            **{"devices": 1, "num_nodes": 1, "strategy": "auto", "use_distributed_sampler": False},
            **{"reload_dataloaders_every_n_epochs": 1, "model_registry": None, "limit_predict_batches": 0},
            "plugins": [{"class_path": "lightning.pytorch.plugins.environments.LightningEnvironment"}],
        },
        [],
        1.0,
        check_measured,
    ),
    "smoke": ({"fast_dev_run": 2, "limit_test_batches": 0}, [], 1e-3, check_smoke),
    "bare": ({"barebones": True, "limit_train_batches": 2}, [], 1e-3, check_bare),
    "timed": ({"max_epochs": 1000, "max_time": "00:00:00:01", "limit_val_batches": 0}, [], 1e-3, check_timed),
    "nothing": ({"limit_train_batches": 0}, [], 1e-3, check_nothing),
}
#: Options, or a callback, and what the refusal says.
REFUSED: list[tuple[Any, str]] = [
    (callback("BackboneFinetuning"), "vlmembed.adapters.Freeze"),
    (callback("BaseFinetuning"), "vlmembed.adapters.Freeze"),
    (callback("BasePredictionWriter"), "predict writes"),
    (callback("BatchSizeFinder"), "chunk_size: auto"),
    (callback("LearningRateFinder"), "ablate"),
    (callback("ModelPruning", pruning_fn="l1_unstructured"), "would not be pruned"),
    (callback("StochasticWeightAveraging", swa_lrs=0.01), "Use lightning.pytorch.callbacks.WeightAveraging"),
    (callback("EarlyStopping", monitor="val/ndcg@10"), "Add mode: max"),
    (callback("ModelCheckpoint", monitor="train/loss", mode="max"), "Add mode: min"),
    ({"limit_val_batches": 1}, "limit_val_batches is 1: a metric over part"),
    ({"limit_test_batches": 0.5}, "limit_test_batches is 0.5: a metric over part"),
    ({"limit_predict_batches": 3}, "limit_predict_batches is 3: a metric over part"),
    ({"overfit_batches": 1}, "Train on a small file"),
    ({"overfit_batches": 0.5}, "Train on a small file"),
    ({"val_check_interval": "00:00:00:30"}, "measured by the clock"),
    ({"val_check_interval": {"minutes": 5}}, "measured by the clock"),
    ({"gradient_clip_val": -1.0}, "gradients would be turned around"),
]
#: In tests/test_resume.py.
ELSEWHERE = {"WeightAveraging", "EMAWeightAveraging"}


def test_the_table_has_every_callback_and_flag_and_all_are_tried() -> None:
    section = PAGE.read_text().split("## Lightning's callbacks and flags\n")[1].split("\n## ")[0]
    callbacks, flags = (
        {name for cell in re.findall(r"^\|([^|]+)\|", part, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)}
        for part in section.split("| flag |")
    )
    assert callbacks == set(lightning_callbacks.__all__)
    assert flags == {*inspect.signature(lightning.Trainer).parameters}
    tried = [part["class_path"] for _, parts, *_ in RUNS.values() for part in parts]
    tried += [part["class_path"] for part, _ in REFUSED if "class_path" in part]
    tried += [Lightning + name for name in ("LambdaCallback", "OnExceptionCheckpoint", "SpikeDetection", "ProgressBar")]
    assert callbacks == {path.removeprefix(Lightning) for path in tried} | ELSEWHERE
    options = {name for options, *_ in RUNS.values() for name in options} | {"accelerator", "callbacks"}
    assert flags == options | {name for part, _ in REFUSED for name in part if "class_path" not in part}


@pytest.mark.parametrize("name", RUNS)
def test_a_fit_with(
    name: str, checkpoint: Path, here: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags, callbacks, lr, check = RUNS[name]
    run(checkpoint, flags, callbacks, lr)
    check(here, "".join([*capfd.readouterr(), caplog.text]))


def test_a_spike_stops_the_run_and_what_stops_it_leaves_a_checkpoint(checkpoint: Path, here: Path) -> None:
    spikes = callback("SpikeDetection", warmup=1, rtol=1e-9, mode="max", window=2)
    parts = [spikes, callback("OnExceptionCheckpoint", dirpath="oops"), callback("ProgressBar")]
    with pytest.raises(Exception, match="Training spike detected"):
        run(checkpoint, {"max_epochs": 3}, parts, lr=10.0)
    assert (here / "oops/on_exception.ckpt").exists()


@pytest.mark.parametrize(("part", "message"), REFUSED)
def test_what_would_not_do_what_it_says_is_refused_before_weights_are_loaded(
    checkpoint: Path, here: Path, monkeypatch: pytest.MonkeyPatch, part: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(Encoder, "configure", lambda _: pytest.fail("weights were loaded"))
    flags, callbacks = ({}, [part]) if "class_path" in part else (part, [])
    with pytest.raises(ValueError, match=message):
        run(checkpoint, flags, callbacks)


@pytest.mark.parametrize(
    ("monitor", "flags", "message"),
    [
        ("val/accuracy", {}, "does not measure that. It measures val/ndcg@10"),
        ("test/ndcg@10", {}, "does not measure that. It measures val/ndcg@10"),
        ("val/ndcg@10", {"limit_val_batches": 0}, "It measures nothing: give data.val"),
    ],
)
def test_waiting_for_what_is_not_measured_is_refused_before_training(
    checkpoint: Path, here: Path, monitor: str, flags: dict[str, Any], message: str
) -> None:
    stops = callback("EarlyStopping", monitor=monitor, mode="max")
    with pytest.raises(ValueError, match=message):
        run(checkpoint, flags, [stops])
    assert not list(here.rglob("*.ckpt"))


def test_a_window_that_the_epoch_cuts_short_is_the_mean_of_its_batches(checkpoint: Path) -> None:
    rows = examples(8)

    def step(window: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = module(checkpoint, optimizer=partial(SGD, lr=0.01))
        batches = [batch(model, rows[start : start + 2]) for start in range(0, 8, 2)]
        recorder = fit(model, batches, accumulate_grad_batches=window)
        assert len(recorder.gradients) == 1
        return recorder.gradients[0]

    assert relative_difference(step(8), step(4)) < 1e-5


def test_a_validation_between_batches_of_a_window_is_refused() -> None:
    for interval, batches in ((3, 8), (0.375, 8)):
        with pytest.raises(ValueError, match=r"accumulate_grad_batches, .* Let it be a multiple of 2"):
            refuse_split_windows(trainer(accumulate_grad_batches=2, val_check_interval=interval), batches)
    for interval in (4, 1.0, 0.5):
        refuse_split_windows(trainer(accumulate_grad_batches=2, val_check_interval=interval), 8)
    scheduled = [lightning_callbacks.GradientAccumulationScheduler({0: 1, 2: 4, 5: 6})]
    with pytest.raises(ValueError, match="Let it be a multiple of 12"):
        refuse_split_windows(trainer(callbacks=scheduled, val_check_interval=8), 24)
    refuse_split_windows(trainer(callbacks=scheduled, val_check_interval=12), 24)
