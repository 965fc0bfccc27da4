"""What Lightning's ``ModelCheckpoint`` keeps to itself, and would need to know after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from vlmembed.modules.unfinished import moment

#: Of each callback: whether it waits for a validation, and the step at which it saved last.
SavingState = dict[str, tuple[bool, int]]


def saving_state(trainer: Trainer) -> SavingState:
    """Return what the callbacks that save checkpoints do not say of themselves."""
    # After a validation nobody waits for one: a callback that is just saving forgets it a moment later.
    waits = moment(trainer) != "validation"
    return {
        callback.state_key: (waits and callback._defer_save_until_validation, callback._last_global_step_saved)
        for callback in _callbacks(trainer)
    }


def restore_saving_state(trainer: Trainer, state: SavingState, now: int) -> None:
    """Tell them again. The callback whose file the run goes on from has saved at this step, whose number is ``now``."""
    file = Path(str(trainer.ckpt_path)).resolve()
    for callback in _callbacks(trainer):
        if callback.state_key in state:
            callback._defer_save_until_validation, step = state[callback.state_key]
            own: list[Any] = [callback.last_model_path, *callback.best_k_models]
            saved = any(path and Path(path).resolve() == file for path in own)
            callback._last_global_step_saved = now if saved else step
            # One that has saved nothing writes a last checkpoint when training ends.
            callback._last_checkpoint_saved = next(filter(None, own), "")


def _callbacks(trainer: Trainer) -> Iterator[ModelCheckpoint]:
    return (each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint))
