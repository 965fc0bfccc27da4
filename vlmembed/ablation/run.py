"""One trial of an ablation, from its plan to its result on disk, and the executors that run many.

``python -m vlmembed.ablation.run FOLDER FIT`` performs one trial in a process of its own, so that it can run on another
machine. That process loads no model: it starts ``fit`` as its child, and waits for it. On disk::

    OUTPUT/ablation.yaml, report.html, report.md, report.csv, documents/
    OUTPUT/settings/<setting>/seed-<n>/
        planned.json   what is to run            result.json   what came of it; there once the trial has ended
        run.yaml       the configuration of fit  metrics.csv   Lightning's log
        log.txt        what fit printed          cost.json, measured/<set>/   from the `Record` callback
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import yaml

from vlmembed.files import read_json, write_whole

#: The command that trains and measures; the path of a configuration comes after it.
FIT = shlex.join([sys.executable, "-m", "vlmembed", "fit", "--config"])

#: Lines of its log that a failed trial keeps as its error.
ERROR_LINES = 20


@dataclass(frozen=True)
class Trial:
    """One setting with one seed: what is planned and, once it has ended, what came of it."""

    folder: Path  # settings/<setting>/seed-<n> of the output folder
    setting: Mapping[str, str]  # axis → label
    seed: int
    metric: str  # the name that it must have logged
    config: dict[str, Any]  # of `fit`, without what depends on the folder
    status: Literal["planned", "finished", "failed"] = "planned"
    error: str | None = None  # the last lines of what a failed trial printed
    seconds: float = 0.0  # of the whole trial
    metrics: Mapping[str, float] = field(default_factory=dict)  # logged name → value of the trained model
    cost: Mapping[str, float] = field(default_factory=dict)  # what `Record` writes at the end of training

    def __str__(self) -> str:
        return ", ".join([*(f"{axis}={label}" for axis, label in self.setting.items()), f"seed {self.seed}"])

    def write(self) -> None:
        """Write ``planned.json`` or, once it has ended, ``result.json``: whole or not at all."""
        outcome = ("status", "error", "seconds", "metrics", "cost")
        name, keys = ("planned.json", ("metric", "config")) if self.status == "planned" else ("result.json", outcome)
        fields = {key: getattr(self, key) for key in ("setting", "seed", *keys)}
        write_whole(self.folder / name, json.dumps(fields, indent=1).encode())

    @staticmethod
    def read(folder: Path) -> Trial:
        """Read what was planned for a folder."""
        return Trial(folder, **read_json(folder / "planned.json"))

    def ended(self) -> Trial:
        """Return this trial with what came of it; as it is, if it has not ended."""
        path = self.folder / "result.json"
        return replace(self, **read_json(path)) if path.exists() else self

    def configuration(self) -> dict[str, Any]:
        """Return the configuration of ``fit`` with the log in this folder, and with a `Record` of what is measured."""
        trainer = self.config.get("trainer") or {}
        loggers = [logger for logger in _listed(trainer.get("logger")) if "CSVLogger" not in str(logger)]
        options = {"documents": str(self.folder.parents[2] / "documents"), "stage": self.metric.split("/")[0]}
        record = {"class_path": "vlmembed.ablation.record.Record", "init_args": options}
        changes = {"logger": [csv_logger(self.folder), *loggers]}
        changes["callbacks"] = [*_listed(trainer.get("callbacks")), record]
        return self.config | {"trainer": trainer | changes}


def read_trials(output: Path) -> list[Trial]:
    """Read every trial of an output folder that has ended, sorted by setting and seed."""
    trials = [Trial.read(path.parent).ended() for path in output.glob("settings/*/seed-*/result.json")]
    return sorted(trials, key=lambda trial: (trial.folder.parent.name, trial.seed))


def csv_logger(folder: Path) -> dict[str, Any]:
    """Return the configuration of the logger that makes a run's folder this one."""
    names = {"save_dir": str(folder.parents[1]), "name": folder.parent.name, "version": folder.name}
    return {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": names}


def _listed(value: Any) -> list[Any]:
    """Make a list of what Lightning takes as one or as several; true and false name none."""
    return value if isinstance(value, list) else [] if value is None or isinstance(value, bool) else [value]


def perform(folder: Path, fit: str = FIT) -> Trial:
    """Perform the planned trial of a folder from its start, unless it has finished; raises as `locked`."""
    with locked(folder) as lock:
        trial = Trial.read(folder)
        if trial.ended().status == "finished":
            return trial.ended()
        # An interrupted attempt leaves nothing behind; its result goes first, because it vouches for the rest.
        (folder / "result.json").unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("planned.json", ".lock"):
                path.unlink()
        config, log = folder / "run.yaml", folder / "log.txt"
        config.write_text(yaml.safe_dump(trial.configuration(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        print(f"{trial}: started, see {log}", flush=True)
        start = time.monotonic()
        with log.open("wb") as output:
            # The child inherits the lock: if this process is killed, no other starts before the training has ended.
            command = [*shlex.split(fit), str(config)]
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            status = subprocess.run(command, pass_fds=[lock], check=False, **streams).returncode
        trial = replace(trial, seconds=time.monotonic() - start, **_outcome(trial, status))
        trial.write()
    return trial


@contextmanager
def locked(folder: Path, patience: float = 60.0) -> Iterator[int]:
    """Hold the lock of a folder, and yield its file descriptor; wait some seconds for killed processes to end.

    It is not `filelock`'s, because a child process must be able to inherit it: this one is free when the last process
    that has it has ended. A ``TimeoutError`` says that another process still holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, deadline = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT), time.monotonic() + patience
    try:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{folder}: another process is at work here; let it finish, or end it.")
            time.sleep(0.2)
        yield lock
    finally:
        os.close(lock)


def _outcome(trial: Trial, status: int) -> dict[str, Any]:
    """Judge a trial by its exit status and by what it logged."""
    path, cost, error = trial.folder / "metrics.csv", trial.folder / "cost.json", None
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    logged = [pair for row in csv.DictReader(lines) for pair in row.items()]
    # The last value of a name is the trained model's.
    metrics = {name: float(value) for name, value in logged if value and name.startswith(("val/", "test/"))}
    if status:
        cause = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        log = (trial.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        # Progress bars return to the start of their line.
        error = "\n".join([cause, *re.split(r"[\r\n]+", log.strip())[-ERROR_LINES:]])
    elif trial.metric not in metrics:
        error = f"{trial.metric!r} was not logged, only {sorted(metrics)}; change the metric, or what is measured."
    costs = read_json(cost) if cost.exists() else {}
    return {"status": "failed" if error else "finished", "error": error, "metrics": metrics, "cost": costs}


class Executor(ABC):
    """Runs commands, several at a time, and waits for all of them. Subclass it for another cluster."""

    @abstractmethod
    def run(self, commands: Sequence[Sequence[str]], jobs: int) -> None:
        """Run each command in the current folder, ``jobs`` at a time; each writes its own result, or fails alone."""


class Local(Executor):
    """On this machine. With several GPUs and several trials at a time, each trial sees one of them."""

    def run(self, commands: Sequence[Sequence[str]], jobs: int) -> None:
        """See ``Executor.run``."""
        shares: SimpleQueue[dict[str, str]] = SimpleQueue()
        for share in shares_of_machine(jobs):
            shares.put(share)

        # The ties are inside: an interrupt ends the trials before the pool waits for its threads.
        with ThreadPoolExecutor(jobs) as pool, ExitStack() as ties:

            def work(command: Sequence[str]) -> None:
                share = shares.get()
                run_tied(command, ".", share, ties)
                shares.put(share)

            list(pool.map(work, commands))


class Slurm(Executor):
    """As one SLURM job array, by submitit (``pip install "vlmembed[slurm]"``); all machines share the folder.

    Args:
        options: More options of ``sbatch``, such as ``[--partition=gpu, --gpus=1, --cpus-per-task=8]``.
        logs: Where submitit keeps its scripts and logs.
    """

    def __init__(self, options: Sequence[str] = (), logs: str = "runs/slurm") -> None:
        self.options = list(options)
        self.logs = logs

    def run(self, commands: Sequence[Sequence[str]], jobs: int) -> None:
        """See ``Executor.run``."""
        import submitit

        options = dict(option.removeprefix("--").partition("=")[::2] for option in self.options)
        executor = submitit.SlurmExecutor(self.logs)
        executor.update_parameters(
            job_name="vlmembed-ablate",
            time=None,  # The cluster's own limit, not submitit's five minutes.
            use_srun=False,
            array_parallelism=jobs,
            additional_parameters={name: value or True for name, value in options.items()},
        )
        for job in executor.map_array(run_tied, commands, [os.getcwd()] * len(commands)):
            try:
                job.result()
            except submitit.core.utils.UncompletedJobError as error:
                print(error)


class Ray(Executor):
    """As tasks of a Ray cluster, whose machines share the folder: the one at ``RAY_ADDRESS``, or else a local one.

    Needs ``pip install "vlmembed[ray]"``.

    Args:
        cpus: CPU cores of a trial. Ray starts as many trials as it has cores and GPUs for, whatever ``jobs`` says.
        gpus: GPUs of a trial.
    """

    def __init__(self, cpus: float = 1, gpus: float = 0) -> None:
        self.cpus = cpus
        self.gpus = gpus

    def run(self, commands: Sequence[Sequence[str]], jobs: int) -> None:
        """See ``Executor.run``."""
        import ray

        ray.init(ignore_reinit_error=True)
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(run_tied)
        for reference in [task.remote(list(command), os.getcwd()) for command in commands]:
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                print(error)


def start(trials: Sequence[Trial], executor: Executor, jobs: int, fit: str = FIT) -> None:
    """Perform trials, ``jobs`` at a time, each in a process of its own, and wait for them."""
    for trial in trials:
        trial.write()
    commands = [[sys.executable, "-m", "vlmembed.ablation.run", str(trial.folder), fit] for trial in trials]
    if commands:
        executor.run(commands, jobs)


def shares_of_machine(jobs: int) -> list[dict[str, str]]:
    """Return the environment variables that divide threads and GPUs among several trials; one alone has them all."""
    import torch  # Not above: the processes that only wait would load it too.

    if jobs == 1:
        return [{}]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // jobs))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    gpus = [{"CUDA_VISIBLE_DEVICES": devices[job % len(devices)]} if len(devices) > 1 else {} for job in range(jobs)]
    return [{"OMP_NUM_THREADS": threads, **gpu} for gpu in gpus]


def run_tied(
    command: Sequence[str], folder: str, share: Mapping[str, str] | None = None, ties: ExitStack | None = None
) -> None:
    """Run a trial in a session of its own; it ends with this process, or with ``ties``, and whatever it leaves too."""
    environment = {**os.environ, **(share or {})}
    # A trial is one process that starts its others itself; Lightning would take SLURM's count of tasks for theirs.
    environment.pop("SLURM_NTASKS", None)
    # Standard input is a pipe, which closes when this process ends, even if it is killed.
    options: Any = {"stdin": subprocess.PIPE, "env": environment, "cwd": folder, "start_new_session": True}
    process = subprocess.Popen([*command, "tied"], **options)
    (ties or ExitStack()).enter_context(process)
    process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main(folder: str, fit: str, tied: str = "") -> None:
    """Perform the trial of a folder; the exit status is 1 if it fails."""
    if tied:
        # Standard input closes when the parent ends, however it does: then this whole process group does too.
        def end_with_parent() -> None:
            os.read(0, 1)
            os.killpg(os.getpgrp(), signal.SIGKILL)

        threading.Thread(target=end_with_parent, daemon=True).start()
    trial = perform(Path(folder), fit)
    if trial.error is not None:
        sys.exit(f"{trial}: failed after {trial.seconds:.0f} s: {trial.error.splitlines()[-1]}")
    print(f"{trial}: {trial.metric} {trial.metrics[trial.metric]:.4f}, {trial.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
