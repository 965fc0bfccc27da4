"""Shards of an index, Parquet files of ids and vectors; and where they are encoded: here, or on a Ray cluster."""

from __future__ import annotations

import json
import logging
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vlmembed.files import whole_file
from vlmembed.late_interaction import MultiVectors, Vectors
from vlmembed.search.corpus import Corpus, CorpusSource, open_corpus
from vlmembed.search.index import Precision
from vlmembed.search.served import Encoded, ServedModel
from vlmembed.types import Item, Role

#: In a shard's metadata: the items that could not be read, as JSON.
UNREADABLE = b"unreadable"


@dataclass(frozen=True)
class Job:
    """What every process of an encoding is told; it is pickled."""

    model: str
    corpus: CorpusSource
    output: str
    role: Role
    precision: Precision
    shard_size: int
    window: int
    batch_tokens: int | None
    num_workers: int
    device: str | None
    dtype: str | None
    trust_remote_code: bool
    folder: str  # Where relative paths start.

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return Path(self.folder, self.output, f"shard-{shard:05d}.parquet")


class Window(Sequence[Item]):
    """Items that are encoded together, each read when asked for; their ids are known then, also of unreadable ones."""

    def __init__(self, corpus: Corpus, rows: range) -> None:
        self._corpus, self.rows = corpus, rows
        self.ids: dict[int, str | None] = {}  # None where a row says none.

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        try:
            self.ids[index], item = self._corpus.read(self.rows[index])
        except ValueError:  # Later, a stream would have to begin again to say the id.
            self.ids[index] = self._corpus.scan(self.rows[index : index + 1])[0][0]
            raise
        return item

    def origin(self, index: int) -> str:
        """Say where an item is."""
        return self._corpus.origin(self.rows[index])


class Encoding:
    """An open model and corpus, which writes shards."""

    def __init__(self, job: Job, corpus: Corpus | None = None) -> None:
        self.job = job
        self.corpus = open_corpus(job.corpus, job.role) if corpus is None else corpus
        self.model = ServedModel.open(job.model, job.device, job.dtype, job.trust_remote_code)

    def rows(self, shard: int) -> range:
        """Return the rows of the corpus that are in a shard."""
        first = shard * self.job.shard_size
        return range(first, min(first + self.job.shard_size, len(self.corpus)))

    def _windows(self, shard: int) -> list[range]:
        """Return the rows of a shard that are encoded together."""
        rows, size = self.rows(shard), self.job.window
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def write(self, shards: Iterable[int], progress: Callable[[int], Any] = int) -> Iterator[int]:
        """Write shards, each whole or not at all, and yield the number of each; ``progress`` is told of items."""
        shards = [*shards]
        # One stream for all: its workers read the next shard while this one is encoded. A window ends with its shard,
        # so that what is in a file does not depend on where the encoding began.
        windows = (Window(self.corpus, rows) for shard in shards for rows in self._windows(shard))
        options: Any = {
            "num_workers": self.job.num_workers,
            "batch_tokens": self.job.batch_tokens,
            "group_of": lambda window: window.rows.start // self.job.shard_size,
        }
        encoded = self.model.stream(windows, self.job.role, **options)
        for shard in shards:
            self._write(shard, encoded, progress)
            yield shard

    def _write(self, shard: int, encoded: Iterator[Encoded], progress: Callable[[int], Any]) -> None:
        unreadable: list[dict[str, Any]] = []
        schema = schema_of(self.job.precision, self.model.is_multi_vector)
        options: Any = {"compression": "none", "use_dictionary": bytes_in(schema)}
        with whole_file(self.job.path(shard)) as draft, pq.ParquetWriter(draft, schema, **options) as writer:
            for _ in self._windows(shard):
                made = next(encoded)
                window: Window = made.window
                check_finite(window, made)
                if made.rows:
                    ids = [window.ids[row] for row in made.rows]
                    writer.write_table(table_of(ids, made.vectors, self.job.precision, schema))
                for row, reason in made.unreadable.items():
                    named = {"id": window.ids[row], "origin": window.origin(row), "error": reason}
                    unreadable.append({**named, "row": window.rows[row], "shard": shard})  # From 0.
                progress(len(window))
            writer.add_key_value_metadata({UNREADABLE: json.dumps(unreadable)})


def check_finite(window: Window, made: Encoded) -> None:
    """Raise a ``ValueError`` that names the first item whose vectors have a number that is none."""
    items = made.vectors.split() if isinstance(made.vectors, MultiVectors) else made.vectors
    for row, vectors in zip(made.rows, items, strict=True):
        if not torch.isfinite(vectors).all():
            raise ValueError(
                f"{window.origin(row)} (id {window.ids[row]!r}): its embedding has NaN or infinite numbers. Is the "
                "model whole, and made for this dtype? Try --dtype float32. Shards that are written stay."
            )


def schema_of(precision: Precision, is_multi_vector: bool) -> pa.Schema:
    """Return the columns of a shard."""
    vector = _required(pa.uint8() if precision == "binary" else pa.from_numpy_dtype(precision))
    embedding = pa.field("embedding", _required(vector) if is_multi_vector else vector, nullable=False)
    scale = [("scale", pa.float32())] if precision == "int8" else []
    return pa.schema([("id", pa.string()), embedding, *scale])


def _required(element: pa.DataType) -> pa.DataType:
    """Return the type of lists without nulls, which are read nearly twice as fast."""
    return pa.list_(pa.field("element", element, nullable=False))


def bytes_in(schema: pa.Schema) -> list[str]:
    """Return the column whose numbers are bytes: without a dictionary, Parquet takes four for each of them."""
    stored, path = schema.field("embedding").type, "embedding"
    while pa.types.is_list(stored):
        stored, path = stored.value_type, f"{path}.list.element"
    return [path] if stored in (pa.int8(), pa.uint8()) else []


def table_of(ids: Sequence[str | None], vectors: Vectors, precision: Precision, schema: pa.Schema) -> pa.Table:
    """Return rows of a shard."""
    lengths = vectors.lengths.tolist() if isinstance(vectors, MultiVectors) else None
    matrix = (vectors.vectors if isinstance(vectors, MultiVectors) else vectors).numpy()  # (N, D) or (T, D)
    columns: list[Any] = [pa.array(ids, pa.string())]
    if precision == "int8":
        scales = _scales(matrix, lengths)
        matrix = np.rint(matrix / (scales if lengths is None else np.repeat(scales, lengths))[:, None]).astype(np.int8)
        columns.append(pa.array(scales, pa.float32()))
    elif precision == "binary":
        matrix = np.packbits(matrix > 0, axis=1)
    else:
        matrix = matrix.astype(precision)
    columns.insert(1, _lists(pa.array(matrix.ravel()), [matrix.shape[1]] * len(matrix)))
    if lengths is not None:
        columns[1] = _lists(columns[1], lengths)
    return pa.Table.from_arrays(columns, schema=schema)


def _scales(matrix: np.ndarray, lengths: Sequence[int] | None) -> np.ndarray:
    """Return what each item's int8 are multiplied by (N,): the largest number becomes 127."""
    largest = np.abs(matrix).max(axis=1)  # Of each vector.
    if lengths is not None:
        largest = np.array([piece.max(initial=0) for piece in np.split(largest, np.cumsum(lengths)[:-1])])
    return np.where(largest > 0, largest / 127, 1).astype(np.float32)


def _lists(values: pa.Array, lengths: Sequence[int]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), values, _required(values.type))


@dataclass(frozen=True)
class Shard:
    """What a shard that is whole says of itself."""

    rows: int
    unreadable: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Shard | None:
        """Return it; None where there is none, or none that is whole."""
        try:
            metadata = pq.read_metadata(path)
        except (FileNotFoundError, pa.ArrowInvalid):
            return None
        return cls(metadata.num_rows, json.loads(metadata.metadata[UNREADABLE]))


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
