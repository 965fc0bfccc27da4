"""Training rows that are read as they come, of what does not fit on a disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice, pairwise, repeat
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow
from datasets.table import InMemoryTable
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlmembed.data.records import parse_line
from vlmembed.data.rows import FIRST, LookedUp, Lookup, Rows, map_cells, to_examples, with_element
from vlmembed.data.sources import GroupByQuery, Mixture, ResumableLoader, read_each, seeded_generator
from vlmembed.data.tables import LINES, RawTable, open_stream, undecoded
from vlmembed.distributed import gather_objects
from vlmembed.types import BadRow, Example

#: Rows that are read at once where none are shuffled.
BLOCK = 1024
#: Where a reader is: its pass, the state of `datasets` before its block, rows before it, batches of it that are done.
Position: TypeAlias = dict[str, Any]
START: Position = {"pass": 0, "state": None, "row": 0, "batches": 0}


class Lines:
    """A block of lines of JSONL files, each of which is parsed when asked for; nothing stands for a blank one."""

    def __init__(self, lines: Any, origin: str, numbers: Sequence[int]):
        self._lines, self._origin, self._numbers = lines, origin, numbers

    def __len__(self) -> int:
        return len(self._lines)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        lines = self._lines.take(pyarrow.array(indices, pyarrow.int64())).to_pylist()
        rows = zip(lines, self.origins(indices), strict=True)
        return [parse_line(line, origin) if line.strip() else None for line, origin in rows]

    def without_blank(self) -> Lines:
        """Return the lines that are rows, with the numbers that they have."""
        rows = [index for index, line in enumerate(self._lines.to_pylist()) if line.strip()]
        lines = self._lines.take(pyarrow.array(rows, pyarrow.int64()))
        return Lines(lines, self._origin, [self._numbers[index] for index in rows])

    @cached_property
    def column_names(self) -> list[str]:
        """The keys of the first row."""
        return [*(self.__getitems__([0])[0] or ())]

    def select_columns(self, names: Iterable[str]) -> Lines:
        """Return the same block: a line is read whole."""
        return self

    def origins(self, indices: Sequence[int]) -> list[str]:
        """Say where rows stand, for messages."""
        return [f"{self._origin}, row {self._numbers[index] + 1}" for index in indices]


def as_dataset(block: pyarrow.Table, stream: datasets.IterableDataset) -> datasets.Dataset:
    """Make a data set of some columns of a stream's block."""
    features = datasets.Features({name: stream.features[name] for name in block.column_names})
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(InMemoryTable(block), info=info, fingerprint="stream")


class Views:
    """A block of rows, of which bytes are not copied: images are most of it."""

    def __init__(self, block: pyarrow.Table, stream: datasets.IterableDataset):
        media = [field.name for field in block.schema if has_bytes(field.type)]
        others = block.drop_columns(media)
        self._others = as_dataset(others, stream) if others.column_names else None
        self._media = block.select(media)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = self._others.__getitems__(indices) if self._others else [{} for _ in indices]
        for name, values in self._values.items():
            for row, index in zip(rows, indices, strict=True):
                row[name] = values[index]
        return rows

    @cached_property
    def _values(self) -> dict[str, list[Any]]:
        columns = zip(self._media.column_names, self._media.columns, strict=True)
        return {name: [*chain.from_iterable(map(uncopied, column.chunks))] for name, column in columns}


def has_bytes(kind: pyarrow.DataType) -> bool:
    """Tell a column type that has bytes in it, as those of images have."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return any(map(has_bytes, inner)) if inner else "binary" in str(kind)


def uncopied(array: pyarrow.Array) -> list[Any]:
    """Return the values of an Arrow array, with views of the memory in place of bytes."""
    kind = array.type
    if not has_bytes(kind):
        return array.to_pylist()
    if pyarrow.types.is_struct(kind):
        names = [field.name for field in kind]
        columns = [uncopied(array.field(name)) for name in names]
        values: list[Any] = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    elif kind.num_fields:
        values = [uncopied(value.values) if value.is_valid else None for value in array]
    else:
        width = np.int64 if pyarrow.types.is_large_binary(kind) else np.int32
        bounds = np.frombuffer(array.buffers()[1], width)[array.offset :][: len(array) + 1].tolist()
        content = memoryview(array.buffers()[2] or b"").cast("B")
        values = [content[start:end] for start, end in pairwise(bounds)]
    valid = array.is_valid().to_pylist() if array.null_count else repeat(True)
    return [value if is_there else None for value, is_there in zip(values, valid, strict=False)]


@dataclass(eq=False)
class StreamingRows(Rows):
    """Training rows that are read as they come, for data that does not fit on a disk.

    The arguments are those of ``vlmembed.data.Rows``, and three more. Checks see the first rows only.

    Args:
        shuffle_buffer: Rows that are read at once and shuffled among each other; 0 keeps the order.
        rows: Rows of an epoch, which the next one continues; null for an epoch of ``trainer.max_steps`` steps.
        seed: Draws the order.
    """

    shuffle_buffer: int = 10_000
    rows: int | None = None
    seed: int = 0

    def _open(self) -> RawTable:
        """Return the first rows: what checks look at."""
        if self.shuffle_buffer < 0 or (self.rows is not None and self.rows < 1):
            raise ValueError(f"{self.origin}: shuffle_buffer is 0 or more, rows 1 or more.")
        for _, table in self.blocks(FIRST):
            rows = table.without_blank() if isinstance(table, Lines) else table
            if len(rows):
                return rows
        raise ValueError(f"{self.origin}: the data set has no rows.")

    def blocks(self, size: int) -> Iterator[tuple[int, Any]]:
        """Read blocks in order: of each the number of its first row, and its rows as a table."""
        stream, first = self.open(), 0
        for block in stream.iter(size):
            is_json = stream.features == LINES
            yield first, self.block(block, stream, first=first) if is_json else undecoded(as_dataset(block, stream))
            first += len(block)

    def open(self) -> datasets.IterableDataset:
        """Open the stream, whose blocks are Arrow tables."""
        return open_stream(self.path, self.split, self.subset, self.allow_outside, self.revision).with_format("arrow")

    def block(self, block: Any, stream: datasets.IterableDataset, origin: str = "", first: int = 0) -> Any:
        """Make of a block of Arrow one that is read by row numbers, and whose media are as they are stored."""
        if stream.features == LINES:
            return Lines(block.column(0).combine_chunks(), origin or self.origin, range(first, first + len(block)))
        return Views(block, stream)

    def examples(self, table: Any, indices: Sequence[int], origin: str, first: int) -> list[tuple[int, Example]]:
        """Return the examples of some rows of a block, with their rows' numbers in the stream.

        A ``ValueError`` names row, column and value.
        """
        rows, origins, numbers = [], [], []
        for index, row in zip(indices, table.__getitems__([*indices]), strict=True):
            if row is None:
                continue
            place = f"{origin}, row {first + index + 1}"
            self.check_same([row], [place])
            for element in self.elements(row):
                rows.append(with_element(row, self.each, element))
                numbers.append(first + index)
                origins.append(self.at_element(place, element))
        examples = to_examples(map_cells(self._cells.reads, rows, origins), self.folder, origins)
        return [*zip(numbers, examples, strict=True)]

    def _find(self, name: str, lookup: Lookup) -> LookedUp:
        if lookup.path is None:
            raise ValueError(
                f"{self.origin}: tables: {name}: a stream is not looked up in; give the table a path of its own, or "
                "read the rows with vlmembed.data.Rows."
            )
        return super()._find(name, lookup)


class StreamedBatches(IterableDataset[Any]):
    """Batches of a stream, without end, and after each the position of its reader; see `StreamLoader`.

    A reader reads a block, shuffles it and cuts it into batches. What is left of a block, which is less than a batch
    or rows of queries that its last batch has already, is left out of this pass.
    """

    def __init__(self, rows: StreamingRows, batch_size: int, readers: int, first: int, distinct: bool, skip: bool):
        self.rows, self.batch_size, self.readers, self.first = rows, batch_size, readers, first
        self.distinct, self.skip = distinct, skip
        #: Of this process's readers.
        self.positions: list[Position] = []
        #: The reader whose turn is next.
        self.turn = 0

    def __iter__(self) -> Iterator[tuple[int, Position, list[Any]]]:
        worker = get_worker_info()
        number = (self.turn + (worker.id if worker else 0)) % len(self.positions)
        for position, batch in self._read(self.first + number, self.positions[number]):
            yield number, position, batch

    def _read(self, reader: int, position: Position) -> Iterator[tuple[Position, list[Any]]]:
        empty_passes = 0
        while empty_passes < 2:
            empty_passes += 1
            for after, batch in self._read_once(reader, position):
                empty_passes = 0
                yield after, batch
            position = {**START, "pass": position["pass"] + 1}
        raise ValueError(
            f"{self.rows.origin}: reader {reader + 1} of {self.readers} (processes times loader workers) finds no "
            f"batch of {self.batch_size} rows in the stream. Lower batch_size or num_workers, or read the rows with "
            "vlmembed.data.Rows."
        )

    def _read_once(self, reader: int, position: Position) -> Iterator[tuple[Position, list[Any]]]:
        """Read what is left of a pass."""
        rows, stream, state = self.rows, self.rows.open(), position["state"]
        origin, part, share, multiple = rows.origin, reader, slice(None), self.batch_size
        if stream.num_shards >= self.readers:
            stream = stream.shard(self.readers, reader, contiguous=False)
            origin += f", part {reader + 1} of {self.readers}" if self.readers > 1 else ""
        else:  # All read all files, and each takes its share of every block.
            part, share, multiple = 0, slice(reader, None, self.readers), self.batch_size * self.readers
        if state is not None:
            stream.load_state_dict(state)
        for block in stream.iter(-(-(rows.shuffle_buffer or BLOCK) // multiple) * multiple):
            after = stream.state_dict()
            for count, batch in enumerate(self._batches(block, stream, position, part, share, origin), start=1):
                if count > position["batches"]:
                    yield {**position, "state": state, "batches": count}, batch
            state, position = after, {**position, "row": position["row"] + len(block), "state": after, "batches": 0}

    def _batches(
        self, block: Any, stream: Any, position: Position, part: int, share: slice, origin: str
    ) -> Iterator[list[Any]]:
        first = position["row"]
        table = self.rows.block(block, stream, origin, first)
        order: Any = np.arange(len(block))
        if self.rows.shuffle_buffer:
            order = np.random.default_rng([self.rows.seed, position["pass"], part, first]).permutation(order)
        order = order[share]
        waiting: list[Any] = []
        for start in range(0, len(order), self.batch_size):
            waiting += self._examples(table, order[start : start + self.batch_size].tolist(), origin, first)
            while len(waiting) >= self.batch_size:
                batch, rest, queries = list[Any](), list[Any](), set[int | None]()
                for row in waiting:
                    query = None if isinstance(row, BadRow) or not self.distinct else row[1].query.id
                    is_next = len(batch) < self.batch_size and query not in queries
                    (batch if is_next else rest).append(row)
                    queries |= {query} - {None} if is_next else set()
                if len(batch) < self.batch_size:
                    break
                waiting = rest
                yield batch
        if len(waiting) > len(order) / 10 and len(order) > self.batch_size * 10:
            warnings.warn(
                f"{origin}: {len(waiting):,} of {len(order):,} rows are left out, whose queries are those of others. "
                "A batch holds a query once; raise shuffle_buffer.",
                stacklevel=2,
            )

    def _examples(self, table: Any, indices: list[int], origin: str, first: int) -> list[Any]:
        """Return examples with their row's number, and a `BadRow` for one that is left out."""
        read = partial(self.rows.examples, table, origin=origin, first=first)
        if not self.skip:
            return read(indices)
        return read_each(read, indices, lambda index, error: BadRow.of(first + index, error))


class StreamLoader(ResumableLoader):
    """A loader of a stream, whose readers' positions are saved in checkpoints; of all processes."""

    dataset: StreamedBatches

    def __init__(self, batches: StreamedBatches, per_epoch: int, **options: Any):
        super().__init__(batches, batch_size=None, **options)
        self.per_epoch = per_epoch
        batches.positions = [START] * max(1, self.num_workers)

    def __len__(self) -> int:
        return self.per_epoch

    def _rest(self) -> Iterator[Any]:
        stream = self.dataset
        self._batch %= self.per_epoch  # At an epoch's end, Lightning asks for no batch after the last one.
        self.generator = seeded_generator(stream.rows.seed, stream.first, stream.turn)
        read = DataLoader.__iter__(self)
        for number, position, batch in islice(read, self.per_epoch - self._batch):
            stream.positions[number], stream.turn = position, (number + 1) % len(stream.positions)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Say where the readers of all processes are."""
        stream = self.dataset
        return {"positions": gather_objects(stream.positions), "turn": stream.turn, "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there; a ``ValueError`` says that there were other processes or workers."""
        stream, positions = self.dataset, state["positions"]
        shape, saved = (
            [stream.readers // len(stream.positions), len(stream.positions)],
            [len(positions), len(positions[0])],
        )
        if shape != saved:
            raise ValueError(
                f"{stream.rows.origin}: the checkpoint has a stream's position in {saved[0]} processes with {saved[1]} "
                f"readers each, and the run has {shape[0]} with {shape[1]}. "
                "Resume with the same devices and num_workers."
            )
        stream.positions, stream.turn = list(positions[stream.first // shape[1]]), state["turn"]
        self._batch, self._exhausted = state["batch"], bool(state.get("exhausted"))


def collated(collate: Any, takes_numbers: bool, read: tuple[int, Position, list[Any]]) -> tuple[int, Position, Any]:
    """Make a batch of what a reader yields, by a function of examples, or of examples with their rows' numbers."""
    number, position, rows = read
    return number, position, collate(rows if takes_numbers else [example for _, example in rows])


def streams_in(source: Any) -> list[StreamingRows]:
    """Return the streams among what a source is made of."""
    if isinstance(source, Mixture):
        return [stream for single in source.sources for stream in streams_in(single)]
    rows = source.rows if isinstance(source, GroupByQuery) else source
    return [rows] if isinstance(rows, StreamingRows) else []


def refuse_streams(source: Any, use: str) -> None:
    """Refuse a stream where all rows must be known: of one, those that stand for its columns would be taken for all."""
    for stream in streams_in(source):
        raise ValueError(
            f"{stream.origin}: a stream is for training, and {use} needs all rows. "
            "Give the path itself, or vlmembed.data.Rows, of data that fits on the disk, such as a slice of its split."
        )


def stream_of(mixture: Mixture) -> StreamingRows | None:
    """Return the stream that is trained on; a ``ValueError`` if something else is beside or around it."""
    streams = streams_in(mixture)
    if not streams:
        return None
    if [*mixture.sources] != streams[:1] or mixture.losses:
        raise ValueError(
            f"{streams[0].name}: a stream is trained on alone: not in a GroupByQuery, and not mixed with other sources "
            "or given a loss, for which all rows must be known. Read it with vlmembed.data.Rows."
        )
    return streams[0]
