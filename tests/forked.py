"""Processes that start in no time: forked from a server that imports the package once, and never trains."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import torch

#: One server for all tests of a worker, whichever of them starts it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["vlmembed.__main__", "vlmembed.data", "pytest"])


def run_command(folder: Path, words: list[str]) -> tuple[int | None, str]:
    """Run ``python -m vlmembed`` in a folder; return the exit status and what was printed."""
    process = CONTEXT.Process(target=_command, args=(folder, words))
    process.start()
    process.join()
    return process.exitcode, (folder / "printed").read_text()


def _command(folder: Path, words: list[str]) -> None:
    os.chdir(folder)
    with Path("printed").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    as_not_forked()
    sys.path.insert(0, str(folder))
    sys.argv = ["vlmembed", *words]
    runpy.run_module("vlmembed", run_name="__main__")


def as_not_forked() -> None:
    """Have loader workers, and torch's threads, as in a process that is not itself forked from a server."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
