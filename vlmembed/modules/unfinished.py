"""What was left to do when a checkpoint was written, and doing it.

A checkpoint is written in the middle of things: after a step, before what the step is followed by (its row in
``metrics.csv``, a validation, the end of the epoch), or after a validation, or at the end of an epoch. Lightning 2.6
takes up such a run with the next batch, or the next epoch, and leaves out what was due in between. Here the loops do
what was left to do first, as they would have done it.

All that is known of Lightning's loops from inside is in this file.
"""

from __future__ import annotations

from typing import Any, Literal

from lightning import Trainer

#: When a checkpoint is written: after a batch, in the middle of a validation or after it, after an epoch (or when no
#: training is under way). ``elsewhere`` is in the middle of a step, where nothing can be taken up again exactly.
Moment = Literal["batch", "validating", "validation", "epoch", "elsewhere"]


def moment(trainer: Trainer) -> Moment:
    """Say where in its loops a trainer is."""
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
    return "validation" if measured else "validating"


def accumulates(trainer: Trainer) -> bool:
    """Say whether the next step adds to gradients that are there already."""
    return moment(trainer) in ("batch", "validating", "validation") and trainer.fit_loop._should_accumulate()


def unwritten_row(trainer: Trainer) -> dict[str, float]:
    """Return what the step that has just been taken will log once the checkpoint is written."""
    logger = trainer._logger_connector
    if moment(trainer) != "batch" or trainer.fit_loop._should_accumulate() or not logger.should_update_logs:
        return {}
    return {name: float(value) for name, value in logger.metrics["log"].items()}


def settle(loops: dict[str, Any], when: Moment, max_steps: int) -> bool:
    """Put the loops' state in a form that Lightning takes up without doing, or counting, anything by itself.

    Args:
        loops: The state of the fit loop in a checkpoint; changed in place.
        when: The moment of the checkpoint.
        max_steps: Where the run ends; -1 for nowhere.

    Returns:
        Whether the last step of the run was taken off, for else nothing would run at all; `finish` adds it again.
    """
    if when == "elsewhere":
        return False
    for progress in (loops["epoch_progress"] if when == "epoch" else loops["epoch_loop.batch_progress"]).values():
        if isinstance(progress, dict):
            progress["completed"] = progress["processed"]
    if when == "validating":
        begun = loops["epoch_loop.val_loop.batch_progress"]
        begun["total"] = {name: count - begun["current"][name] for name, count in begun["total"].items()}
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
    ends = when != "epoch" and steps["completed"] == max_steps
    steps["completed"] -= ends
    return ends


def finish(trainer: Trainer, when: Moment, row: dict[str, float], step_was_taken_off: bool) -> None:
    """Do what was left to do, and leave the loops ready for the next batch.

    Args:
        trainer: At the start of training, its loops loaded from what `settle` made.
        when: The moment of the checkpoint.
        row: What the last step was about to log.
        step_was_taken_off: What `settle` returned.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    loop.val_loop.restarting = False
    if when in ("epoch", "elsewhere"):
        # With max_steps, Lightning takes a finished epoch for one to go on with.
        loop._restarting = loop.restarting and when == "elsewhere"
        return
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed += step_was_taken_off
    trainer._logger_connector.log_metrics(row)  # type: ignore[arg-type]
    fetcher: Any = fit._data_fetcher
    if when != "validation":
        loop.on_advance_end(fetcher)
    elif not loop._should_accumulate():
        loop._batches_that_stepped += 1
    loop._restarting = False
    if loop.done:
        fit.on_advance_end()
        fit.on_iteration_done()
        return
    loop._restarting = True
    if loop._should_check_val_fx(fetcher) and not loop._should_accumulate():
        # Lightning will leave that validation out, as it should, and count its step once more.
        loop._batches_that_stepped -= 1
