"""Stopping a run from outside without losing a step: SIGTERM, Ctrl-C, and SLURM's signal to requeue."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from vlmembed import distributed
from vlmembed.training.checkpoint_files import is_resumable, newest_checkpoint, read_checkpoint

#: SLURM's jobs get this before their time is over, if they ask for it: ``sbatch --signal=USR1@120``. Windows has none.
REQUEUE: signal.Signals | None = getattr(signal, "SIGUSR1", None)
SIGNALS = (signal.SIGTERM, signal.SIGINT, *([REQUEUE] if REQUEUE else []))
#: The checkpoint of a run that was told to stop.
STOPPED = "stopped.ckpt"


class StopSafely(Callback):
    """Ends a fit that is told to stop after the step under way, with a checkpoint of just then.

    Lightning's own handlers end it too, but write no checkpoint, or write it in the middle of a step; and they send
    messages to other processes from wherever these happen to be. Here all processes agree after a step. A validation
    that is under way is finished first; before training, and in other commands, nothing is lost, and SIGTERM ends the
    process at once. The exit status is 128 and the signal's number, as a shell has it: the run is not done. Ctrl-C a
    second time ends it at once.
    """

    def __init__(self) -> None:
        self._received = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over from Lightning's handlers, which it installs between this and the barrier before a stage runs."""
        self._received = 0
        if threading.current_thread() is not threading.main_thread():
            return
        self._handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
        barrier = trainer.strategy.barrier

        def enter(name: str | None = None) -> None:
            if name == "run-stage":
                trainer.strategy.barrier = barrier  # type: ignore[method-assign]
                signal.signal(signal.SIGTERM, self._handlers[signal.SIGTERM])
                if REQUEUE and stage == "fit":
                    signal.signal(REQUEUE, self._receive)
            barrier(name)

        trainer.strategy.barrier = enter  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on there is something to lose."""
        for number in self._handlers:
            signal.signal(number, self._receive)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop, if any process has been told to, and no gradients wait for another batch's."""
        if not getattr(pl_module, "steps_after_batch", True):
            return
        files: Any = trainer.strategy.checkpoint_io
        if getattr(files, "postponed", None):
            files.write_postponed()
        received = distributed.largest(self._received, pl_module.device)
        if received:
            self._save(trainer)
            if received == REQUEUE:
                _requeue(trainer)
            raise SystemExit(128 + received)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the checkpoint of an earlier stop, if there is another of as many steps."""
        path = _stopped_path(trainer)
        if path is not None and path.exists() and trainer.is_global_zero:
            other = newest_checkpoint(
                [path.parent], lambda place, content: place != path and is_resumable(place, content)
            )
            if other is not None and other[1]["global_step"] >= read_checkpoint(path)["global_step"]:
                path.unlink()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            os._exit(128 + number)  # Whatever is under way: Lightning would tidy up first.
        self._received = number
        # Not printed: the signal may have come in the middle of a print.
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step.\n".encode())

    @staticmethod
    def _save(trainer: Trainer) -> None:
        path = _stopped_path(trainer)
        if path is None:
            distributed.print_once("Stopped. No checkpoint was written, because the trainer writes none.")
            return
        trainer.save_checkpoint(path)
        distributed.print_once(f"Stopped after step {trainer.global_step}: {path}. Resume with --ckpt_path last.")


def end_with_parent() -> None:
    """End this process when the one that has started it is dead, if it is one of several that train.

    In a collective, or while they find each other, it would wait for the dead one for half an hour or longer. A first
    process whose child is dead ends by itself: Lightning looks after them.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if os.environ.get("LOCAL_RANK", "0") == "0" and not by_torchrun:
        return
    parent = os.getppid()
    # Whoever adopts an orphan is not in its session.
    orphaned = not by_torchrun and hasattr(os, "getsid") and os.getsid(parent) != os.getsid(0)

    def watch() -> None:
        while os.getppid() == parent and not orphaned:
            time.sleep(1)
        os.write(2, b"The process that started this one is dead: ending.\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_stopping_to_parent(worker: int) -> None:
    """Have a loader worker outlive what everybody is told, as by Ctrl-C and by SLURM, until its parent is done.

    The parent ends its workers by SIGTERM, too, so what counts is who sends it.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Elsewhere SIGTERM ends a worker, whoever sends it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _stopped_path(trainer: Trainer) -> Path | None:
    callback = trainer.checkpoint_callback
    folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
    return None if folder is None else Path(folder) / STOPPED


def _requeue(trainer: Trainer) -> None:
    """Put a SLURM job back into its queue."""
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if trainer.is_global_zero and job is not None:
        name = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
        subprocess.run(["scontrol", "requeue", name], check=False)
