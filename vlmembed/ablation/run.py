"""One run of an ablation, from what was planned to its result: ``python -m vlmembed.ablation.run FOLDER``.

A process of its own, so that it can run on another machine; it loads no model, and waits for the one that does.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from vlmembed.ablation.planned import PLANNED, Run
from vlmembed.ablation.results import Result, cost_path, last_values, read_json, read_result, result_path

#: What is trained and measured with, if nothing else is said; the path of a configuration comes after it.
FIT = shlex.join([sys.executable, "-m", "vlmembed", "fit", "--config"])

#: In a folder: whoever has locked it is at work there.
LOCK = ".lock"

#: Lines of its log that a failed run keeps as its error.
ERROR_LINES = 20


def perform(folder: Path, fit: str = FIT) -> Result:
    """Do a run afresh, unless it has finished already.

    Args:
        folder: The run's folder, with what was planned.
        fit: The command that trains and measures.

    Raises:
        TimeoutError: If somebody else is at work in the folder.
    """
    with locked(folder) as lock:
        before = read_result(folder)
        if before and before.status == "finished":
            return before
        run = Run.read(folder)
        _clean(folder)
        config = folder / "run.yaml"
        config.write_text(yaml.safe_dump(run.located(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        print(f"{run}: started, see {folder / 'log.txt'}", flush=True)
        start = time.monotonic()
        with (folder / "log.txt").open("wb") as log:
            # The lock goes along: whatever becomes of this process, nobody else starts before that one has ended.
            status = subprocess.run(
                [*shlex.split(fit), str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                check=False,
            ).returncode
        result = _result(run, status, time.monotonic() - start)
        result.write()
    return result


@contextmanager
def locked(folder: Path, patience: float = 60.0) -> Iterator[int]:
    """Keep everybody else out of a folder, whom the lock is gone with, however they end.

    Args:
        folder: The folder.
        patience: Seconds to wait: those who were killed may take some to go.

    Raises:
        TimeoutError: If somebody else is still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + patience
    try:
        while not _is_locked(lock):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{folder}: another process is at work here; let it finish, or end it.")
            time.sleep(0.2)
        yield lock
    finally:
        os.close(lock)


def _is_locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _clean(folder: Path) -> None:
    """Remove what an earlier attempt has left; its result first, which speaks for the rest."""
    result_path(folder).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (PLANNED, LOCK):
            path.unlink()


def _result(run: Run, status: int, seconds: float) -> Result:
    metrics = last_values(run.folder / "metrics.csv")
    error = None
    if status:
        cause = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        error = f"{cause}\n{_last_lines(run.folder / 'log.txt')}"
    elif run.metric not in metrics:
        error = f"{run.metric!r} was not logged, only {sorted(metrics)}; change the metric, or what is measured."
    cost = read_json(cost_path(run.folder))
    return Result(run.setting, run.seed, "failed" if error else "finished", error, seconds, metrics, cost, run.folder)


def _last_lines(log: Path) -> str:
    # Progress bars return to the start of their line.
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace").strip())
    return "\n".join(lines[-ERROR_LINES:])


def _end_with_parent() -> None:
    """Wait for the other end of standard input to be closed, be it by the parent's death, and end all of us."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Do the run of a folder; the exit status is 1 if it fails."""
    parser = argparse.ArgumentParser(prog="python -m vlmembed.ablation.run", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="the run's folder")
    parser.add_argument("--fit", default=FIT, help="the command that trains, before the path of its configuration")
    parser.add_argument("--tied", action="store_true", help="end, and the training with it, when standard input closes")
    options = parser.parse_args()
    if options.tied:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    result = perform(options.folder, options.fit)
    run = Run.read(options.folder)
    if result.error is None:
        print(f"{run}: {run.metric} {result.metrics[run.metric]:.4f}, {result.seconds:.0f} s", flush=True)
    else:
        print(f"{run}: failed after {result.seconds:.0f} s: {result.error.splitlines()[-1]}", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
