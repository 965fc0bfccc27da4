"""Checkpoints: exact, small, and there whole or not at all.

*Exact*: a run resumed from a checkpoint that was written after an optimizer step, a validation or an epoch is equal to
one that was not interrupted; on a CPU to the bit. `Checkpointing` keeps what Lightning does not: the random state of
every process, the metrics that callbacks watch, what `ModelCheckpoint` keeps to itself, and the row of ``metrics.csv``
that is written after the checkpoint. Not covered are a source that draws at random in a loader's worker, features that
are kept in memory (computed anew, they are rounded otherwise), and a GPU, whose sums come in any order.

*Small*: frozen weights are left out, and recognised by a sum over their bytes.

*Averaged*: with Lightning's ``WeightAveraging``, what is measured, written, exported and resumed is one set of
averages; before the first update, and for frozen weights, that is the weights themselves.

All that is known of Lightning from inside is in this file: five private attributes, and its loops' state.
"""

from __future__ import annotations

import csv
import math
import os
import random
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning import LightningModule
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from vlmembed import distributed
from vlmembed.files import whole_file
from vlmembed.training.checkpoint_files import read_checkpoint

#: Where a checkpoint has what `Checkpointing` adds, and what it left out: name → sum, and the type it was used in.
STATE, FROZEN = "resume", "frozen"
#: The folder of the run that a checkpoint is of.
RUN = "run"
#: Where WeightAveraging puts the weights that are trained, and what it counts; their averages are the ``state_dict``.
TRAINED, AVERAGING = "current_model_state", "averaging_state"
#: What ModelCheckpoint does not say of itself: the step it saved at, whether it waits for a validation, and where to.
HIDDEN = ("_last_global_step_saved", "_defer_save_until_validation", "_last_checkpoint_saved")


class Checkpointing:
    """Writes into every checkpoint what a resumed run needs, and takes it from there."""

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._sums: dict[str, int] = {}
        self._kept: set[str] = set()  # What each ModelCheckpoint keeps, as of the last checkpoint.
        self._step_taken_off = self._stops = False

    def recognise_frozen(self, module: nn.Module) -> None:
        """Remember which weights are frozen, and what they are. Call it when the weights are loaded."""
        self._sums = {name: _sum(weight) for name, weight in _parameters(module) if not weight.requires_grad}

    def save(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out of a checkpoint, and add what Lightning leaves out. All processes call it."""
        trainer, for_others = module.trainer, "optimizer_states" not in checkpoint  # No run is resumed from those.
        checkpoint[RUN] = str(Path(trainer.log_dir).resolve()) if trainer.log_dir else ""
        for callback, average in averages(trainer):
            if for_others:  # Lightning leaves the callback out, and these weights would not be the averages.
                callback.on_save_checkpoint(trainer, module, checkpoint)
            if not average.n_averaged:
                checkpoint["state_dict"] = checkpoint[TRAINED]
            if for_others:
                del checkpoint[TRAINED], checkpoint[AVERAGING]
        if not distributed.is_sharded(module):
            _leave_out_frozen(checkpoint, module, self._sums)
        if for_others:
            return
        for logger in trainer.loggers:
            logger.save()
        before, self._kept = self._kept, _kept_checkpoints(trainer)
        moment, index = moment_of(trainer), trainer.fit_loop.epoch_loop.batch_idx
        checkpoint[STATE] = {
            "moment": moment,
            "validation_due": moment == "batch" and _is_validation_due(trainer),
            "epoch_ends": moment == "batch" and is_last_of_epoch(trainer, index),
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "random": distributed.gather_objects(_random_state()),
            "metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
            "stops": trainer.should_stop,
            "callbacks": {
                callback.state_key: {name: getattr(callback, name) for name in HIDDEN}
                for callback in model_checkpoints(trainer)
            },
            "row": _unwritten_row(trainer) if moment == "batch" else {},
            "rows": _count_rows(trainer),
            # What ModelCheckpoint removes once this one is there, if nobody kills it before.
            "superseded": sorted(before - self._kept),
        }

    def load_weights(self, module: nn.Module, checkpoint: dict[str, Any], prefix: str = "") -> None:
        """Let a module have the weights of a checkpoint, by names that begin with a prefix; see `complete_frozen`."""
        module.load_state_dict(complete_frozen(checkpoint, module, self._sums, prefix), strict=False)

    def load(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint's weights by frozen ones, and put its loops into a form that Lightning resumes rightly.

        A ValueError says that they are another model's, or were averaged and will not be.
        """
        trainer = module.trainer
        if trainer.training and TRAINED in checkpoint:
            if not averages(trainer):
                raise ValueError(
                    "The checkpoint is of a run that averages weights: it cannot be resumed without WeightAveraging in "
                    "trainer.callbacks. Put the callback back, or begin a new run."
                )
            # WeightAveraging takes up all weights or none.
            trained = complete_frozen(checkpoint | {"state_dict": checkpoint[TRAINED]}, module, self._sums)
            checkpoint[TRAINED] = module.state_dict() | trained
            checkpoint["state_dict"] = module.state_dict() | complete_frozen(checkpoint, module, self._sums)
            checkpoint.pop(FROZEN, None)
        # Where weights were left out, they are compared by name here, and not by torch.
        module.strict_loading = FROZEN not in checkpoint
        if FROZEN in checkpoint:
            checkpoint["state_dict"] = complete_frozen(checkpoint, module, self._sums)
        self._state = checkpoint.get(STATE, {}) if trainer.training else {}
        if self._state:
            self._step_taken_off = _settle(checkpoint["loops"]["fit_loop"], self._state, trainer.max_steps)

    def tidy(self, trainer: lightning.Trainer) -> None:
        """Do what the killed run had no time for, once callbacks have their state; a finished run trains no more."""
        if not self._state:
            return
        for callback in model_checkpoints(trainer):
            _write_last(trainer, callback, self._state)
        self._kept = _kept_checkpoints(trainer)
        if trainer.is_global_zero:
            _remove_left(trainer, self._state, self._kept)

    def resume(self, module: LightningModule) -> None:
        """Take the state of a checkpoint, as training begins."""
        state, self._state = self._state, {}
        if not state:
            return
        trainer, loop = module.trainer, module.trainer.fit_loop.epoch_loop
        _restore_random_states(state["random"])
        trainer.callback_metrics.update(state["metrics"])
        # In the middle of an epoch it would keep even the end of the epoch from coming.
        trainer.should_stop, self._stops = state["stops"] and state["moment"] == "epoch", state["stops"]
        _restore_callbacks(trainer, state)
        if state["moment"] == "elsewhere":
            warnings.warn(
                "The checkpoint was written in the middle of a step, whose batch is lost: the run is resumed, but not "
                "exactly.",
                stacklevel=2,
            )
        elif state["moment"] == "epoch":
            loop.restarting = False
        elif state["moment"] == "batch":
            # See `_settle`: a validation that is due has been made to look interrupted, and begins anew.
            loop.val_loop.batch_progress.total.ready -= 1
            loop.val_loop.batch_progress.total.started -= 1  # type: ignore[attr-defined]
            loop.val_loop.restarting = False
        for logger in trainer.loggers if state["row"] else []:
            logger.log_metrics(state["row"] | {"epoch": trainer.current_epoch}, step=state["step"] - 1)
            logger.save()
        # Else ModelCheckpoint would never remove the file that the run was resumed from.
        trainer.ckpt_path = None

    def end_resumed(self, trainer: lightning.Trainer) -> None:
        """Let a run end that was resumed at its end: training is under way by now, and what was due is being done."""
        optimization = trainer.fit_loop.epoch_loop.automatic_optimization
        optimization.optim_progress.optimizer.step.total.completed += self._step_taken_off
        trainer.should_stop |= self._stops
        self._step_taken_off = self._stops = False


def refuse_split_windows(trainer: lightning.Trainer, batches: int | None) -> None:
    """Refuse validations between batches whose gradients are added up: no checkpoint there could be resumed exactly.

    ``batches`` are those of an epoch, where known; a ValueError says which interval would do.
    """
    schedulers = [callback for callback in trainer.callbacks if isinstance(callback, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    # A multiple of it is one of every epoch's window.
    window = math.lcm(
        trainer.accumulate_grad_batches, *(size for one in schedulers for size in one.scheduling.values())
    )
    interval = trainer.val_check_interval
    if window == 1 or not isinstance(interval, int | float) or not trainer.limit_val_batches:
        return
    if isinstance(interval, float):
        if batches is None or interval == 1.0:
            return
        interval = max(1, int(batches * interval))
    across_epochs = trainer.check_val_every_n_epoch is None and batches is not None and batches % window
    if (interval % window and interval != batches) or across_epochs:
        raise ValueError(
            f"trainer.val_check_interval is {trainer.val_check_interval} ({interval} batches), and "
            "accumulate_grad_batches, or its schedule, would have a validation come inside a window of batches whose "
            f"gradients are added up: no checkpoint there resumes exactly. Let it be a multiple of {window}."
        )


# Where a run is


def moment_of(trainer: lightning.Trainer) -> str:
    """Say when a checkpoint is being written.

    Returns:
        ``batch`` after an optimizer step; ``validation`` after a validation; ``epoch`` after an epoch, or when no
        training is under way; ``elsewhere`` in the middle of something, where nothing can be resumed exactly.
    """
    fit = trainer.fit_loop
    epoch, batch = fit.epoch_progress.total, fit.epoch_loop.batch_progress.total
    if epoch.processed == epoch.ready:  # type: ignore[attr-defined]
        return "epoch"
    if epoch.started < epoch.ready or batch.processed < batch.ready:  # type: ignore[attr-defined]
        return "elsewhere"
    if batch.completed < batch.processed:  # type: ignore[attr-defined]
        return "batch"
    validation = fit.epoch_loop.val_loop.batch_progress
    measured = validation.is_last_batch and validation.current.completed == validation.current.ready
    return "validation" if measured else "elsewhere"


def is_last_of_epoch(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Whether no other training batch follows in the epoch."""
    return trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches


def in_window(trainer: lightning.Trainer) -> bool:
    """Whether gradients of the last batch wait for those of the next; `RetrievalModule` knows."""
    waits = not getattr(trainer.lightning_module, "steps_after_batch", True)
    return bool(trainer.training) and moment_of(trainer) == "batch" and waits


def _is_validation_due(trainer: lightning.Trainer) -> bool:
    """Whether a validation follows the batch that has just been trained on; what Lightning's loop asks afterwards."""
    loop, every = trainer.fit_loop.epoch_loop, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
        return False
    if trainer.should_stop or trainer.val_check_batch == math.inf:
        return trainer.should_stop or trainer.is_last_batch
    index = loop.total_batch_idx if every is None else loop.batch_idx
    return trainer.val_check_batch is not None and (index + 1) % trainer.val_check_batch == 0


def _settle(loops: dict[str, Any], state: dict[str, Any], max_steps: int) -> bool:
    """Put the loops' state into a form from which Lightning does what was still to do, and counts nothing twice.

    After a batch, its row of the log, a validation and the end of the epoch may be due. Lightning 2.6 would continue
    with the next batch and leave these out. It goes back to a validation that looks interrupted, if one is due; so it
    is made to look so, before its first batch. Where the epoch or the run ends, the loader is made to have no more.
    ``loops`` is the fit loop's state in a checkpoint, changed in place, and ``state`` what `Checkpointing.save` added.
    Returns whether the last step of the run was taken off, because nothing would run at all.
    """
    moment = state["moment"]
    if moment == "elsewhere":
        return False
    for progress in loops["epoch_progress" if moment == "epoch" else "epoch_loop.batch_progress"].values():
        if isinstance(progress, dict):
            progress["completed"] = progress["processed"]
    if moment == "batch":
        validation = loops["epoch_loop.val_loop.batch_progress"]
        done = validation["total"]["completed"]
        validation["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
        # Counted after a validation, or here.
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += not state["validation_due"]
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
    run_ends = moment != "epoch" and steps["completed"] == max_steps
    steps["completed"] -= run_ends
    if run_ends or state["stops"] or (state["epoch_ends"] and not state["validation_due"]):
        for loader in loops["state_dict"]["combined_loader"]:
            loader["exhausted"] = True
    return bool(run_ends)


def _unwritten_row(trainer: lightning.Trainer) -> dict[str, float]:
    """Return what the step that has just been taken will log once the checkpoint is written."""
    if trainer.global_step % trainer.log_every_n_steps and not trainer.should_stop:  # type: ignore[attr-defined]
        return {}
    return {name: float(value) for name, value in trainer.logged_metrics.items() if not name.startswith("val/")}


def _count_rows(trainer: lightning.Trainer) -> int:
    """Count the rows in the first process's ``metrics.csv``; those that come later will come again."""
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, CSVLogger):
            path = Path(logger.experiment.metrics_file_path)
            if path.exists():
                with path.open(newline="") as file:
                    return sum(1 for _ in csv.DictReader(file))
    return 0


def _restore_callbacks(trainer: lightning.Trainer, state: dict[str, Any]) -> None:
    """Tell each ModelCheckpoint what it does not keep; the one whose file this is was saving it at this step."""
    file = Path(str(trainer.ckpt_path)).resolve()
    for callback in model_checkpoints(trainer):
        if callback.state_key not in state["callbacks"]:
            continue
        step, waits, path = (state["callbacks"][callback.state_key][name] for name in HIDDEN)
        if any(Path(kept).resolve() == file for kept in (callback.last_model_path, *callback.best_k_models) if kept):
            step, path = state["step"], str(trainer.ckpt_path)
        # After a validation nobody waits for one: a callback that is just saving forgets it a moment later.
        waits &= state["moment"] != "validation"
        vars(callback).update(zip(HIDDEN, (step, waits, path), strict=True))


def _kept_checkpoints(trainer: lightning.Trainer) -> set[str]:
    """Return the paths of what ModelCheckpoints keep, and will remove once they keep others."""
    paths: list[str] = []
    for callback in model_checkpoints(trainer):
        # Without a metric, this is the newest of all that are kept, or the only one.
        newest = [callback.best_model_path] if callback.save_top_k == 1 else []
        paths += [callback.last_model_path, *newest, *callback.best_k_models]
    return {path for path in paths if path}


def _write_last(trainer: lightning.Trainer, callback: ModelCheckpoint, state: dict[str, Any]) -> None:
    """Write the ``last.ckpt`` that follows the checkpoint that the run is resumed from, if it was killed before it."""
    file, before = Path(str(trainer.ckpt_path)).resolve(), callback.last_model_path
    best = [Path(path).resolve() for path in (callback.best_model_path, *callback.best_k_models) if path]
    numbers = {name: torch.tensor(state[name]) for name in ("epoch", "step") if name in state}
    path = callback.format_checkpoint_name(state["metrics"] | numbers, callback.CHECKPOINT_NAME_LAST)
    is_there = Path(path).resolve() == file  # Written here already, by a resumed run that was killed in its turn.
    if not callback.save_last or not (is_there or file in best) or (before and Path(before).resolve() == file):
        return
    callback.last_model_path = path
    if not trainer.is_global_zero or file.is_dir():
        return
    if not is_there:
        with whole_file(Path(path)) as draft:
            if callback.save_last == "link":
                draft.symlink_to(os.path.relpath(file, draft.parent))
            else:
                shutil.copyfile(file, draft)
    if before and before != path:
        Path(before).unlink(missing_ok=True)


def _remove_left(trainer: lightning.Trainer, state: dict[str, Any], kept: set[str]) -> None:
    """Remove what the killed run had no time to remove, and weights of later steps, which will be written again."""
    resumed = Path(str(trainer.ckpt_path))
    for callback in model_checkpoints(trainer):
        folder = Path(callback.dirpath or ".").absolute()
        left = [path for path in map(Path, state.get("superseded", [])) if folder in path.absolute().parents]
        if callback.save_weights_only:
            run = str(Path(trainer.log_dir or "").resolve())
            later = [path for path in folder.rglob("*.ckpt") if path.stat().st_mtime > resumed.stat().st_mtime]
            contents = ((path, read_checkpoint(path)) for path in later)
            left += [path for path, content in contents if content.get(RUN) == run and STATE not in content]
        for path in left:
            if str(path) not in kept:
                path.unlink(missing_ok=True)


def model_checkpoints(trainer: lightning.Trainer) -> Iterator[ModelCheckpoint]:
    """Yield the callbacks that say where checkpoints are, and keep the best."""
    return (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint))


# Averages of weights


def refuse_averaging(trainer: lightning.Trainer) -> None:
    """Refuse averages that would not be what is measured, exported and resumed, before weights are loaded."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    averaging = [type(callback).__name__ for callback in callbacks if isinstance(callback, WeightAveraging)]
    if len(averaging) > 1:
        raise ValueError(f"{' and '.join(averaging)} would each average the other's averages. Keep one of them.")
    if averaging and trainer.precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"{averaging[0]} with trainer.precision {trainer.precision}: an average of such weights is rounded back to "
            "where it was, and does not move. Use bf16-mixed."
        )
    if averaging and isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(f"{averaging[0]} cannot average shards (ModelParallelStrategy). Use trainer.strategy: ddp.")


def averages(trainer: lightning.Trainer) -> list[tuple[WeightAveraging, AveragedModel]]:
    """Return the callback that averages weights during a fit, and its averages; nothing where there is none."""
    return [
        (callback, callback._average_model)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None
    ]


def prepare_averages(trainer: lightning.Trainer) -> None:
    """Let the averages of what does not change be what it is, to the bit: 0.9 x + 0.1 x is rounded, step by step."""
    for _, average in averages(trainer):
        several, single = average.multi_avg_fn, average.avg_fn
        if several is None and single is None:
            several = get_swa_multi_avg_fn()

        def update(averaged: Any, current: Any, count: Any, several: Any = several, single: Any = single) -> None:
            pairs = [pair for pair in zip(averaged, current, strict=True) if not torch.equal(*pair)]
            if several is not None and pairs:
                several(*map(list, zip(*pairs, strict=True)), count)
            elif single is not None:
                for mean, value in pairs:
                    mean.copy_(single(mean, value, count))

        average.multi_avg_fn = update


def follow_weights(trainer: lightning.Trainer) -> None:
    """Until something is averaged, take the weights themselves for it: before validations, and as an epoch ends."""
    for _, average in averages(trainer):
        if not average.n_averaged:
            average.module.load_state_dict(trainer.lightning_module.state_dict())


def finish_averages(trainer: lightning.Trainer) -> None:
    """After a fit: leave the averages in the module, and none beside it, which measuring would take for it."""
    for callback, average in averages(trainer):
        if not average.n_averaged:
            rank_zero_warn(f"{type(callback).__name__} has averaged nothing: the weights are those of the last step.")
        # Lightning has not called it where nothing was left to train.
        callback.on_train_end(trainer, trainer.lightning_module)
        callback._average_model = None


# Random numbers


def _random_state() -> dict[str, Any]:
    """Return the state of all generators that a run may draw from, as a checkpoint can hold it."""
    version, words, next_gauss = random.getstate()
    # The global one: what a user's own part may draw from.
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        # This process's own device.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(words), next_gauss],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
    }


def _restore_random_states(states: list[dict[str, Any]]) -> None:
    if len(states) != distributed.world_size():
        rank_zero_warn(
            f"The checkpoint has the random states of {len(states)} processes, and this run has "
            f"{distributed.world_size()}: what it draws at random (dropout) is not what it would have been."
        )
        return
    state = states[distributed.rank()]
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002


# Frozen weights


def _leave_out_frozen(checkpoint: dict[str, Any], module: nn.Module, sums: Mapping[str, int]) -> None:
    """Take frozen weights out of a checkpoint, in place, and write down which they were."""
    frozen = {
        name: [sums[name], str(weight.dtype).removeprefix("torch.")]
        for name, weight in _parameters(module)
        if name in sums and not weight.requires_grad
    }
    if frozen:
        for key in {"state_dict", TRAINED} & checkpoint.keys():
            weights = checkpoint[key]
            checkpoint[key] = {name: weights[name] for name in weights if not _belongs(name, frozen)}
        checkpoint[FROZEN] = frozen


def complete_frozen(
    checkpoint: Mapping[str, Any], module: nn.Module, sums: Mapping[str, int], prefix: str = ""
) -> dict[str, Tensor]:
    """Return a checkpoint's weights, and those frozen ones of a module that have to be rounded as in training.

    Of all, only those whose names begin with the prefix. A ValueError says that it has weights that the module lacks,
    or lacks what is trained, or that the module's frozen weights, by their sums, are not those it was trained with.
    """
    weights, frozen, present = (
        {name: value for name, value in values.items() if name.startswith(prefix)}
        for values in (checkpoint["state_dict"], checkpoint.get(FROZEN, {}), module.state_dict())
    )
    complaints = {
        "lacks weights": [name for name in present if name not in weights and not _belongs(name, frozen)],
        "has weights that this model lacks": [name for name in (*weights, *frozen) if name not in present],
        "has weights of other sizes": [
            name for name, value in weights.items() if name in present and value.shape != present[name].shape
        ],
        "was trained with other frozen weights": [name for name in frozen if sums.get(name) != frozen[name][0]],
    }
    for complaint, names in complaints.items():
        if names:
            raise ValueError(
                f"The checkpoint {complaint}: {len(names)} of them, such as {names[0]}. It belongs to a run with "
                "another model, or with other adapters; give the config.yaml of its own run, and the model that this "
                "one names."
            )
    types = {name: getattr(torch, used) for name, (_, used) in frozen.items()}
    return weights | {name: present[name].to(used) for name, used in types.items() if present[name].dtype != used}


def _parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    # Tied weights come under each of their names, as they do in a checkpoint.
    return module.named_parameters(remove_duplicate=False)


def _sum(tensor: Tensor) -> int:
    """Add up a tensor's bytes, eight at a time: a gigabyte takes some hundredths of a second."""
    content = tensor.detach().reshape(-1).view(torch.uint8)
    words = len(content) // 8 * 8
    return int(content[:words].view(torch.int64).sum() + content[words:].sum())


def _belongs(name: str, frozen: Mapping[str, Any]) -> bool:
    """Whether a name is a frozen parameter's, or of something that goes with one: 4-bit weights come with scales."""
    return any(start in frozen for start in accumulate(name.split("."), "{}.{}".format))


def has_version(logger: CSVLogger) -> bool:
    """Whether a logger was given the version whose folder it writes to, or has chosen it already."""
    return logger._version is not None


def set_version(logger: CSVLogger, version: int | str) -> None:
    """Let a logger write into the folder of a version, which it chooses by itself otherwise."""
    logger._version = version
