"""Limits of what comes from outside: environment variables set them, and a child process holds to those of its work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO, NoReturn

import psutil

#: The status of a child process that says why it has made nothing.
REFUSED = 3


class LimitError(ValueError):
    """What some work needs, and may not take."""


def limit(variable: str, default: int) -> int:
    """Return what an environment variable sets, a whole number above 0.

    Limits are environment variables because they hold in every process, and change no result but what is refused.
    """
    value = os.environ.get(variable, str(default))
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"The environment variable {variable} is a whole number above 0, got {value!r}.")
    return int(value)


def in_child(
    work: Callable[[], bytes], seconds: int, memory: int, lock: AbstractContextManager[object] | None = None
) -> bytes:
    """Return what some work makes in a child process of limited time and memory, where there are such (on Linux).

    A ``ValueError`` says what the work, which raises that or an ``OSError``, says of it, and a `LimitError` that it
    ended otherwise. ``lock`` is held by whoever must not be at work when the child begins.
    """
    if sys.platform != "linux":
        return work()
    with open(os.memfd_create("work"), "w+b") as shared:
        with lock or nullcontext():
            child = os.fork()
        if child == 0:
            _work_and_end(work, seconds, memory, shared)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        shared.seek(0)
        content = shared.read()
    if status == REFUSED:
        raise ValueError(content.decode())
    if status:
        needs = f"it takes more than {seconds} seconds or {memory:,} bytes of memory"
        raise LimitError(f"{needs}, or fails (status {status})")
    return content


def _work_and_end(work: Callable[[], bytes], seconds: int, memory: int, shared: BinaryIO) -> NoReturn:
    import resource  # Which Windows does not have.

    status = 1
    try:
        most_memory = psutil.Process().memory_info().vms + memory
        limits = {resource.RLIMIT_AS: most_memory, resource.RLIMIT_CPU: seconds, resource.RLIMIT_CORE: 0}
        for kind, most in limits.items():
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
        try:
            content, status = work(), 0
        except (OSError, ValueError) as error:
            content, status = str(error).encode(), REFUSED
        shared.write(content)
        shared.flush()
    finally:
        os._exit(status)
