"""How much memory there is, and how much of it a training step may use."""

from __future__ import annotations

from typing import Literal

import psutil
import torch

GIB = 2**30

#: The rest is left alone: for what an allocator cannot use, and for batches larger than the first.
SAFE_SHARE = {"cuda": 0.9, "cpu": 0.5}

GraphMemory = Literal["auto", "none"] | float


def free(device: torch.device) -> float:
    """Return the bytes that this process may still take on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return float(psutil.virtual_memory().available)


def graph_bytes(wanted: GraphMemory, device: torch.device, step: float | None = None) -> float:
    """Return the bytes that graphs may take.

    Args:
        wanted: A number of GiB, ``auto`` or ``none``.
        device: Where the graphs are.
        step: The bytes that a step without graphs takes for the time being; None before there was one. A GPU keeps
            no graphs until then; in main memory nobody counts, and half of what is free is safe enough.

    Raises:
        ValueError: If ``wanted`` is something else.
    """
    if wanted == "none":
        return 0.0
    if wanted == "auto":
        if device.type == "cuda":
            return 0.0 if step is None else max(0.0, SAFE_SHARE["cuda"] * (free(device) - step))
        return SAFE_SHARE["cpu"] * free(device)
    if not isinstance(wanted, int | float) or wanted < 0:
        raise ValueError(f"graph_memory is auto, none, or a number of GiB, got {wanted!r}.")
    return wanted * GIB


class StepPeak:
    """What something takes for the time being, from now on; 0 where nobody counts.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    @property
    def bytes(self) -> int:
        """The most so far."""
        return torch.cuda.max_memory_allocated(self._device) - self._before if self._device.type == "cuda" else 0
