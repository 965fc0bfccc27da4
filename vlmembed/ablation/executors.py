"""Where the runs of an ablation run: on this machine, on a Ray cluster, or as a SLURM array."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch


class Executor(ABC):
    """Runs commands, several at a time, and waits for all of them. Subclass it for another cluster."""

    @abstractmethod
    def run(self, commands: Sequence[Sequence[str]], jobs: int) -> None:
        """Run each command in the current folder. One that fails does not stop the others.

        Args:
            commands: The commands, one for each run. Each writes its own result.
            jobs: How many run at the same time.
        """


class Local(Executor):
    """On this machine. With several GPUs and several runs at a time, each run sees one of them."""

    def run(self, commands: Sequence[Sequence[str]], jobs: int) -> None:
        """See ``Executor.run``."""
        waiting, free = list(commands), shares(jobs)
        running: dict[subprocess.Popen[bytes], dict[str, str]] = {}
        try:
            while waiting or running:
                while waiting and free:
                    share = free.pop(0)
                    running[start_tied(waiting.pop(0), share)] = share
                for process in [process for process in running if process.poll() is not None]:
                    end(process)
                    free.append(running.pop(process))
                time.sleep(0.1)
        finally:
            for process in running:
                end(process)


class Ray(Executor):
    """As tasks of a Ray cluster, whose machines share the folder: the one at ``RAY_ADDRESS``, or else a local one.

    Needs ``pip install "vlmembed[ray]"``.

    Args:
        cpus: CPU cores of a run. Ray starts as many runs as it has cores and GPUs for, whatever ``jobs`` says.
        gpus: GPUs of a run.
    """

    def __init__(self, cpus: float = 1, gpus: float = 0) -> None:
        self.cpus = cpus
        self.gpus = gpus

    def run(self, commands: Sequence[Sequence[str]], jobs: int) -> None:
        """See ``Executor.run``."""
        import ray

        ray.init(ignore_reinit_error=True)
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(_run_there)
        for reference in [task.remote(list(command), os.getcwd()) for command in commands]:
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                print(error)


class Slurm(Executor):
    """As one SLURM job array, waited for with ``sbatch --wait``; all machines share the folder.

    Args:
        options: What ``sbatch`` is told besides, such as ``[--partition=gpu, --gpus=1, --cpus-per-task=8]``.
    """

    def __init__(self, options: Sequence[str] = ()) -> None:
        self.options = list(options)

    def run(self, commands: Sequence[Sequence[str]], jobs: int) -> None:
        """See ``Executor.run``."""
        array = f"--array=0-{len(commands) - 1}%{jobs}"
        submit = ["sbatch", "--wait", "--job-name=vlmembed-ablate", array, *self.options]
        # Its exit status is that of the worst run, which has written so itself.
        subprocess.run(submit, input=array_script(commands), text=True, check=False)


def array_script(commands: Sequence[Sequence[str]]) -> str:
    """Write the script of a job array whose n-th task runs the n-th command."""
    cases = [f"{index}) exec {shlex.join(command)} ;;" for index, command in enumerate(commands)]
    # A run is one process that starts its others itself; Lightning would take SLURM's count of tasks for theirs.
    return "\n".join(["#!/bin/bash", "unset SLURM_NTASKS", 'case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", ""])


def shares(jobs: int) -> list[dict[str, str]]:
    """Return what each of several runs at a time is told to use: all of the machine if it is alone."""
    if jobs == 1:
        return [{}]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // jobs))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    own = [{"CUDA_VISIBLE_DEVICES": devices[job % len(devices)]} if len(devices) > 1 else {} for job in range(jobs)]
    return [{"OMP_NUM_THREADS": threads, **each} for each in own]


def start_tied(command: Sequence[str], environment: Mapping[str, str], folder: str = ".") -> subprocess.Popen[bytes]:
    """Start a run that ends when this process does, however it ends.

    The run sees its standard input close; a signal would not tell it that this process was killed.
    """
    return subprocess.Popen(
        [*command, "--tied"],
        stdin=subprocess.PIPE,
        env={**os.environ, **environment},
        cwd=folder,
        start_new_session=True,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a run, and whatever it has started."""
    if process.stdin is not None:
        process.stdin.close()
    process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _run_there(command: Sequence[str], folder: str) -> None:
    """Run a command in a Ray worker, and end it with the worker."""
    process = start_tied(command, {}, folder)
    try:
        process.wait()
    finally:
        end(process)
