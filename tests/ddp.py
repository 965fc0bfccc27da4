"""Runs a function in two processes that talk over gloo, on the CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from lightning.pytorch.strategies import DDPStrategy

WORLD_SIZE = 2


def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function of a module in both processes, and return what each returned, by rank.

    An error in one is raised here and ends the other.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawned = (Path(folder), function, arguments)
        method = forked.CONTEXT.get_start_method()
        multiprocessing.start_processes(_process, spawned, nprocs=WORLD_SIZE, start_method=method)
        return [torch.load(_result(Path(folder), rank), weights_only=False) for rank in range(WORLD_SIZE)]


def strategy() -> dict[str, Any]:
    """What a trainer is told where both processes train together."""
    if not dist.is_initialized():
        return {}
    return {"devices": WORLD_SIZE, "strategy": DDPStrategy(process_group_backend="gloo")}


def _process(rank: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # What torchrun sets: Lightning takes these processes for its own instead of starting more.
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE}
    os.environ.update({name: str(value) for name, value in ranks.items()}, TORCHELASTIC_RUN_ID="test")
    # A file to meet at, because a port that is free now may be taken a moment later.
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD_SIZE)
    torch.save(function(*arguments), _result(folder, rank))
    dist.destroy_process_group()


def _result(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.pt"
