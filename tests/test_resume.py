"""A run that is resumed, from whatever checkpoint, ends with the bits of the one that was not interrupted.

Everything is compared: losses, the rows of metrics.csv, and all of every checkpoint that is written afterwards, which
holds weights, optimizer, schedule, random states, gradients, loops and callbacks.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ddp
import numpy as np
import pytest
import torch
from building import Recorder, trainer, weights
from interrupted import SETTINGS, Left, Setting, differences, embedder, kept_features, load, train, write_data
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from vlmembed.features import InMemory
from vlmembed.training import checkpointing
from vlmembed.training.checkpoint_files import CheckpointFiles, newest_checkpoint

#: In each setting, checkpoints with different things left to do.
CHOSEN = {
    "LoRA": ["03 batch", "04 batch", "04 validation", "04 epoch"],
    "accumulation": ["02 batch", "02 validation", "04 batch", "04 epoch"],
    "features": ["02 batch", "03 batch", "04 batch"],
    "limited": ["02 batch", "03 batch", "06 batch", "06 validation"],
    "steps": ["04 epoch", "06 batch", "06 validation"],
    "mixture": ["05 batch", "07 epoch"],
    "reranker": ["02 batch", "02 validation", "04 batch"],
    "several vectors": ["03 batch"],
    "watched": ["04 batch", "06 batch", "06 validation"],
    "averaged": ["02 batch", "04 validation", "04 epoch"],
    "moving average": ["01 batch", "03 validation", "04 batch"],
    "two processes": ["02 batch", "04 validation"],
    "shards": ["03 batch"],
}
#: From those chosen, and, in long, from all.
every_setting = pytest.mark.parametrize(
    ("name", "chosen"),
    [
        *CHOSEN.items(),
        *(pytest.param(name, None, marks=pytest.mark.exhaustive, id=f"{name}, all") for name in CHOSEN),
    ],
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def check_all(name: str, checkpoint: Path, data: Path, folder: Path, chosen: list[str] | None) -> None:
    """Resume from checkpoints of a run: those chosen, or all."""
    whole = train(SETTINGS[name], checkpoint, data, folder / "whole")
    written = [path.stem for path, _ in whole.written]
    for stem in written if chosen is None else chosen:
        check(SETTINGS[name], checkpoint, data, folder, whole, written.index(stem))


def check(setting: Setting, checkpoint: Path, data: Path, folder: Path, whole: Left, number: int) -> None:
    """Resume from one checkpoint; compare what comes after it, the checkpoints that are written then included."""
    path, batches = whole.written[number]
    rest = train(setting, checkpoint, data, folder / f"from {path.stem}", path)
    losses, rows = whole.after(path, batches)
    assert rest.losses == losses, path.stem
    assert rest.rows == rows, path.stem
    later = whole.written[number + 1 :]
    assert len(rest.written) == len(later)
    for (found, _), (expected, _) in zip(rest.written, later, strict=True):
        assert found.name == expected.name
        assert differences(comparable(found, len(whole.rows) - len(rows)), comparable(expected)) == [], path.stem


def comparable(path: Path, rows_before: int = 0) -> dict[str, Any]:
    """What a checkpoint has, if metrics.csv had begun with some rows."""
    found = load(path)
    found["resume"]["rows"] += rows_before
    del found["run"]  # Its folder.
    for state in found["resume"]["random"]:
        # Checking types at random draws from it, in tests; see below.
        del state["python"]
    for state in found["callbacks"].values():
        # Of the last save; Lightning writes it down, and neither reads nor uses it.
        state.pop("current_score", None)
    return found


@every_setting
def test_a_resumed_run_goes_on_as_if_nothing_had_been(
    checkpoint: Path, data: Path, tmp_path: Path, name: str, chosen: list[str] | None
) -> None:
    arguments = name, checkpoint, data, tmp_path, chosen
    if SETTINGS[name].strategy is None:
        check_all(*arguments)
    else:
        ddp.run(check_all, *arguments)


@pytest.mark.parametrize("monitor", [None, "val/ndcg@10"])
@pytest.mark.parametrize(
    ("place", "count", "again"),
    [("remove_checkpoint", 1, False), ("save_checkpoint", 2, False), ("save_checkpoint", 1, True)],
)
def test_a_kill_between_two_files_leaves_neither_one_more_nor_one_less(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    monitor: str | None,
    place: str,
    count: int,
    again: bool,
) -> None:
    """Between the new checkpoint and the removal of the one before, or the ``last.ckpt`` that follows it.

    And the resumed run may be killed in its turn, when it has written that.
    """
    saver = {"filename": "{step}", "monitor": monitor, "mode": "max", "save_last": True}
    saver |= {} if monitor else {"every_n_train_steps": 2}
    options = {"enable_checkpointing": True, "max_epochs": 2, "val_check_interval": 2}

    def run(resume: Path | None = None) -> dict[str, int]:
        fitted = trainer(callbacks=[ModelCheckpoint(tmp_path / "kept", **saver)], logger=CSVLogger(tmp_path), **options)
        model = embedder(checkpoint)
        fitted.fit(model, datamodule=Setting().data_module(data), ckpt_path=resume)
        return {path.name: load(path)["global_step"] for path in (tmp_path / "kept").iterdir()}

    expected = run()
    assert len(expected) == 2
    shutil.rmtree(tmp_path / "kept")
    act, seen = getattr(CheckpointFiles, place), []

    def killing(files: CheckpointFiles, *arguments: Any, **more: Any) -> None:
        path = str(next(argument for argument in arguments if isinstance(argument, str | Path)))
        seen.append(path)
        if place == "remove_checkpoint" or len([path for path in seen if path.endswith("last.ckpt")]) == count:
            raise SystemExit
        act(files, *arguments, **more)

    with monkeypatch.context() as patch, suppress(SystemExit):
        patch.setattr(CheckpointFiles, place, killing)
        run()
    newest = newest_checkpoint([tmp_path / "kept"])
    assert newest is not None
    with monkeypatch.context() as patch, suppress(SystemExit):
        if again:
            patch.setattr(checkpointing.Checkpointing, "resume", lambda *_: sys.exit())
            run(newest[0])
    newest = newest_checkpoint([tmp_path / "kept"])
    assert newest is not None
    assert newest[0].name == "last.ckpt" or not again
    assert run(newest[0]) == expected


@dataclass
class Averaging:
    """A way to average weights, and the formula for it.

    Args:
        callback: Lightning's.
        expected: From the trained weights after each step, one after another.
    """

    callback: Callable[[], WeightAveraging]
    expected: Callable[[list[Tensor]], Tensor]


def moving(weights: list[Tensor], decay: float = 0.7) -> Tensor:
    average = weights[0]
    for later in weights[1:]:
        average = decay * average + (1 - decay) * later
    return average


AVERAGING = {
    "mean": Averaging(WeightAveraging, lambda weights: torch.stack(weights).double().mean(0).float()),
    "moving": Averaging(partial(EMAWeightAveraging, decay=0.7), moving),
    "from the third step, every second": Averaging(
        partial(EMAWeightAveraging, decay=0.7, update_every_n_steps=2, update_starting_at_step=2),
        lambda weights: moving(weights[2::2]),
    ),
    "never": Averaging(partial(EMAWeightAveraging, update_starting_at_step=99), lambda weights: weights[-1]),
}


class KeepAll(Recorder):
    """Also what is measured: the weights while a validation is under way."""

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.measured = weights(pl_module)


@pytest.mark.parametrize(
    ("name", "model", "validates"),
    [
        *((name, embedder, True) for name in AVERAGING),
        ("moving", kept_features, True),
        ("moving", kept_features, False),
    ],
)
def test_measured_written_and_exported_is_one_set_of_averages(
    checkpoint: Path, data: Path, tmp_path: Path, name: str, model: Any, validates: bool
) -> None:
    recorder, writer = KeepAll(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    others = ModelCheckpoint(tmp_path, "weights", every_n_train_steps=8, save_weights_only=True)
    callbacks = [AVERAGING[name].callback(), recorder, writer, others]
    run = trainer(enable_checkpointing=True, callbacks=callbacks, max_epochs=2, logger=CSVLogger(tmp_path))
    built, rows = model(checkpoint), Setting().data_module(data)
    if not validates:
        rows.val = None
    fresh = weights(built)
    run.fit(built, datamodule=rows)
    trained = {name for name, weight in built.named_parameters() if weight.requires_grad}
    history = {name: [step[name] for step in recorder.weights[1:]] for name in trained}
    assert len(next(iter(history.values()))) == 8

    def check(found: dict[str, Tensor], steps: int = 8) -> None:
        for parameter, value in found.items():
            if parameter in trained:
                expected = AVERAGING[name].expected(history[parameter][:steps])
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(value, fresh[parameter]), parameter

    check(weights(built))  # Which is exported where no metric decides.
    for steps in (4, 8):
        check(load(tmp_path / f"step={steps}.ckpt")["state_dict"], steps)
    check(load(tmp_path / "weights.ckpt")["state_dict"])
    if validates:
        check(recorder.measured)
    # What is measured and exported of a checkpoint, after training and in a new process.
    for fitted in (True, False):
        reader = run if fitted else trainer(callbacks=[KeepAll(), AVERAGING[name].callback()])
        keeper = recorder if fitted else reader.callbacks[0]
        taken = built if fitted else model(checkpoint)
        rows.val = rows.test = str(data / "few.jsonl")
        reader.validate(taken, datamodule=rows, ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
        check(keeper.measured, 4)
        reader.test(taken, datamodule=rows, ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
        check(weights(taken), 4)


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ([WeightAveraging(), EMAWeightAveraging()], {}, "WeightAveraging and EMAWeightAveraging would"),
        ([EMAWeightAveraging()], {"precision": "bf16-true"}, "does not move. Use bf16-mixed"),
        ([WeightAveraging()], {"strategy": ModelParallelStrategy()}, "cannot average shards"),
    ],
)
def test_averages_that_would_not_be_what_is_served_are_refused(callbacks: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=callbacks, **options)


def test_a_run_that_averages_is_not_resumed_as_one_that_does_not(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    whole = train(SETTINGS["averaged"], checkpoint, data, tmp_path / "whole")
    plain = replace(SETTINGS["averaged"], callbacks=lambda _: [])
    with pytest.raises(ValueError, match=r"of a run that averages weights.* Put the callback back"):
        train(plain, checkpoint, data, tmp_path / "rest", whole.written[0][0])


def test_other_processes_are_warned_of(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """With other random numbers, a run may well be resumed."""
    whole = train(SETTINGS["accumulation"], checkpoint, data, tmp_path / "whole")
    path = next(path for path, _ in whole.written if path.stem == "02 batch")
    changed = load(path)
    changed["resume"]["random"] *= 2
    torch.save(changed, path)
    with pytest.warns(UserWarning, match="random states of 2 processes, and this run has 1"):
        train(SETTINGS["accumulation"], checkpoint, data, tmp_path / "rest", path)


def test_a_checkpoint_from_the_middle_of_a_step_says_so(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    class Breaks(ModelCheckpoint):
        def on_before_zero_grad(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "broken.ckpt")

    setting = Setting(callbacks=lambda folder: [Breaks()], trainer={"max_steps": 2})
    train(setting, checkpoint, data, tmp_path / "whole")
    with pytest.warns(UserWarning, match="in the middle of a step, whose batch is lost"):
        train(Setting(), checkpoint, data, tmp_path / "rest", tmp_path / "broken.ckpt")


def test_all_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        numbers = random.gauss(0, 1), random.random(), np.random.normal(), np.random.random(3).tolist()  # noqa: NPY002
        return *numbers, torch.randn(3).tolist(), torch.rand(20).tolist()

    # Both keep the second of two Gaussian numbers.
    draw()
    torch.save([checkpointing._random_state()], tmp_path / "state.pt")
    expected = draw()
    draw()
    checkpointing._restore_random_states(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_features_in_memory_are_computed_again_and_rounded_otherwise(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """Equal images come in other groups, whose products are sums of float32 in another order."""
    setting = Setting(lambda checkpoint: kept_features(checkpoint, InMemory(limit_gib=0.1)))
    whole = train(setting, checkpoint, data, tmp_path / "whole")
    path, batches = whole.written[2]
    rest = train(setting, checkpoint, data, tmp_path / "rest", path)
    assert rest.losses == pytest.approx(whole.losses[batches:], rel=1e-5)
