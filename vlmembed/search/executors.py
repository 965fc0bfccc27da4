"""Where the shards of an index are encoded: in this process, or by workers of a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vlmembed.search.shards import Encoding, Job


class Executor(ABC):
    """Encodes shards. Subclass it for another cluster: ``Encoding(job).write(shards)`` is what a worker does."""

    @abstractmethod
    def run(self, encoding: Encoding, shards: Sequence[int], progress: Callable[[int], Any]) -> None:
        """Write every one of some shards; ``progress`` is told of items as they are done."""


class Local(Executor):
    """In this process, on one device."""

    def run(self, encoding: Encoding, shards: Sequence[int], progress: Callable[[int], Any]) -> None:
        """See `Executor.run`."""
        for _ in encoding.write(shards, progress):
            pass


@dataclass
class Ray(Executor):
    """By Ray Data, on the cluster at ``RAY_ADDRESS``, or else a local one; all machines share the folders.

    A worker holds the model, and takes one shard after the other; shards of a lost worker are encoded by another.
    Needs ``pip install "vlmembed[ray]"``.

    Args:
        workers: How many; 0 for as many as the cluster has room for when the encoding starts.
        cpus: CPU cores of a worker.
        gpus: GPUs of a worker.
    """

    workers: int = 0
    cpus: float = 1
    gpus: float = 0

    def run(self, encoding: Encoding, shards: Sequence[int], progress: Callable[[int], Any]) -> None:
        """See `Executor.run`."""
        try:
            import ray
        except ImportError as error:
            raise ValueError('The executor Ray needs Ray: pip install "vlmembed[ray]".') from error

        on_sigterm = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        with suppress(ValueError):  # Of a thread that is not the main one.
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler prints a trace, and ends with another status.
        workers = min(self.workers or self._room(ray.cluster_resources()), len(shards))
        blocks = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        pool = ray.data.ActorPoolStrategy(size=workers)
        options: Any = {"num_cpus": self.cpus, "num_gpus": self.gpus, "compute": pool, "batch_size": 1}
        ray.data.DataContext.get_current().enable_progress_bars = False  # Ours counts items.
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        for row in blocks.map_batches(_Worker, fn_constructor_args=(encoding.job,), **options).iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
            progress(len(encoding.rows(int(row["shard"]))))

    def _room(self, resources: dict[str, float]) -> int:
        """Return how many workers there is room for; a ``ValueError`` says that there is none, which Ray waits for."""
        rooms = [resources.get(name, 0) // need for name, need in (("CPU", self.cpus), ("GPU", self.gpus)) if need]
        if not (room := int(min(rooms, default=1))):
            raise ValueError(
                f"Ray's cluster has no room for a worker: it has {resources.get('CPU', 0):g} CPU cores and "
                f"{resources.get('GPU', 0):g} GPUs, and a worker needs {self.cpus:g} and {self.gpus:g}. Change cpus or "
                "gpus of the executor; of a cluster that grows when it is asked to, say how many workers you want."
            )
        return room


class _Worker:
    """What Ray keeps in a process: an open model, and an open corpus."""

    def __init__(self, job: Job) -> None:
        os.chdir(job.folder)  # Where relative paths start.
        self._encoding = Encoding(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        error = ""
        try:
            for _ in self._encoding.write(batch["shard"].tolist()):
                pass
        except ValueError as reason:  # Raised here, it would come in Ray's own words.
            error = str(reason)
        return {**batch, "error": [error]}
