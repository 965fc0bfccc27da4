"""A run that goes on from a checkpoint as if it had not been interrupted."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from vlmembed import distributed
from vlmembed.modules.randomness import random_state, restore_random_state
from vlmembed.modules.saving import restore_saving_state, saving_state
from vlmembed.modules.unfinished import accumulates, finish, moment, settle, unwritten_row

#: Where a checkpoint has what this file is about.
KEY = "resuming"


class Resumption:
    """Keeps in every checkpoint what Lightning does not, and takes it up again.

    That is: the random state of every process; accumulated gradients, where the checkpoint is written before the step
    that they are for; the values that callbacks watch; whether the run was about to stop; the row of ``metrics.csv``
    that had not been written, and how many had; and that a validation, or the end of an epoch, was still to come. With
    what Lightning keeps (weights, optimizer, schedule, callbacks, the loader's place in the epoch), a run on the CPU
    that is resumed from any checkpoint written after a batch, a validation or an epoch goes on to the bit as it would
    have.

    Not covered are a source that draws at random in a loader's worker (let it depend on the row alone), features that
    are kept in memory (computed anew, they are rounded otherwise; `vlmembed.features.OnDisk` keeps them), and a GPU,
    whose sums come in any order, and whose memory may run out at another step.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._step_was_taken_off = False

    def write(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint. Every process calls it."""
        trainer = module.trainer
        checkpoint[KEY] = {
            "moment": moment(trainer),
            "step": trainer.global_step,
            "random": distributed.collect(random_state()),
            "gradients": _gradients(module) if accumulates(trainer) else None,
            "metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
            "stops": trainer.should_stop,
            "saving": saving_state(trainer),
            "row": unwritten_row(trainer),
            "rows": _rows(trainer),
        }

    def read(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what to take up, if it is training that goes on.

        Raises:
            ValueError: If other processes accumulated gradients than there are now.
        """
        self._state = checkpoint.get(KEY, {}) if module.trainer.training else {}
        if self._state:
            _refuse_other_processes(self._state)
            loops = checkpoint["loops"]["fit_loop"]
            self._step_was_taken_off = settle(loops, self._state["moment"], module.trainer.max_steps)

    def take_up(self, module: LightningModule) -> None:
        """Take it up, and do what was left to do, as training begins."""
        state, self._state = self._state, {}
        if not state:
            return
        trainer = module.trainer
        _restore_random_state(state["random"])
        if state["gradients"] is not None:
            _restore_gradients(module, state["gradients"])
        trainer._logger_connector._callback_metrics.update(state["metrics"])
        trainer.should_stop = state["stops"]
        restore_saving_state(trainer, state["saving"], state["step"])
        if state["moment"] == "elsewhere":
            warnings.warn(
                "The checkpoint was written in the middle of a step, whose batch is lost: the run goes on, but not "
                "exactly as it would have.",
                stacklevel=2,
            )
        finish(trainer, state["moment"], state["row"], self._step_was_taken_off)


def rows_written(checkpoint: dict[str, Any]) -> int | None:
    """Say how many rows ``metrics.csv`` had when a checkpoint was written; what came after will come again.

    Args:
        checkpoint: As it is in its file.

    Returns:
        The rows without the header; None if there was no such file, or the checkpoint does not say.
    """
    rows: int | None = checkpoint.get(KEY, {}).get("rows")
    return rows


def _rows(trainer: Trainer) -> int | None:
    """Write out what was logged, which will not be logged again, and count the rows in the first process's file."""
    for logger in trainer.loggers:
        logger.save()
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, CSVLogger):
            path = Path(logger.experiment.metrics_file_path)
            if not path.exists():
                return 0
            with path.open(newline="") as file:
                return sum(1 for _ in csv.DictReader(file))
    return None


def _gradients(module: LightningModule) -> dict[str, list[torch.Tensor | None]] | None:
    """Collect each parameter's gradient in every process."""
    if distributed.is_sharded(module):
        if distributed.rank() == 0:
            warnings.warn(
                "A checkpoint is written between batches whose gradients are added up, and ModelParallelStrategy does "
                "not give them out: a run that is resumed from it takes a smaller batch for its next step. Let "
                "val_check_interval be a multiple of accumulate_grad_batches.",
                stacklevel=2,
            )
        return None
    return {
        name: distributed.collect(None if parameter.grad is None else parameter.grad.cpu())
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _restore_gradients(module: LightningModule, gradients: dict[str, list[torch.Tensor | None]]) -> None:
    for name, parameter in module.named_parameters():
        gradient = gradients[name][distributed.rank()] if parameter.requires_grad else None
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def _restore_random_state(states: list[Any]) -> None:
    if len(states) == distributed.world_size():
        restore_random_state(states[distributed.rank()])
    elif distributed.rank() == 0:
        warnings.warn(
            f"The checkpoint has the random states of {len(states)} processes, and this run has "
            f"{distributed.world_size()}: what it draws at random (dropout) is not what it would have been.",
            stacklevel=2,
        )


def _refuse_other_processes(state: dict[str, Any]) -> None:
    processes = len(state["random"])
    if state["gradients"] is not None and processes != distributed.world_size():
        raise ValueError(
            f"The checkpoint was written between batches whose gradients are added up, by {processes} processes; this "
            f"run has {distributed.world_size()}. Resume it with as many, or from a checkpoint written after a step."
        )
