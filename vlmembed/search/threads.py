"""Threads that compute side by side, each on its own cores: on processors, faster than one computation on all cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

#: The most threads that share a processor's cores.
LARGEST = 4


def thread_count(device: torch.device) -> int:
    """Return how many computations a device does best at the same time."""
    return min(torch.get_num_threads(), LARGEST) if device.type == "cpu" else 1


@contextmanager
def computing_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Run so many threads, among which PyTorch's cores are divided."""
    cores = torch.get_num_threads()
    try:
        # PyTorch keeps the number for each thread, and its library of products for all: it is given back at the end.
        with ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(max(1, cores // count))) as pool:
            yield pool
    finally:
        torch.set_num_threads(cores)


def in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield what a function makes of items, in their order, while threads are at work on so many behind."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()
