"""The signals by which a run is told to stop."""

from __future__ import annotations

import signal

#: SLURM's jobs get the last one before their time is over, if they ask for it: ``sbatch --signal=USR1@120``.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def ignore_signals(worker: int) -> None:
    """Leave it to the training process to stop: Ctrl-C and SLURM tell its loader workers as well.

    Args:
        worker: Which one this is; not used.
    """
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
