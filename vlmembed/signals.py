"""The signals by which a run is told to stop, and what its loader workers make of them."""

from __future__ import annotations

import os
import signal
import threading

#: SLURM's jobs get this before their time is over, if they ask for it: ``sbatch --signal=USR1@120``. Windows has none.
REQUEUE: signal.Signals | None = getattr(signal, "SIGUSR1", None)
SIGNALS = (signal.SIGTERM, signal.SIGINT, *([REQUEUE] if REQUEUE else []))


def leave_stopping_to_parent(worker: int) -> None:
    """Have a loader worker go on where everybody is told to stop, as by Ctrl-C and by SLURM, until its parent is done.

    The parent ends its workers by SIGTERM, too, so what counts is who sends it.

    Args:
        worker: Which one this is; not used.
    """
    for each in SIGNALS:
        if each != signal.SIGTERM:
            signal.signal(each, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Elsewhere SIGTERM ends a worker, whoever sends it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
