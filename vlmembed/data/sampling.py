"""Which rows make up each batch, on each process."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import islice, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset, Sampler

from vlmembed.data.collate import ExampleCollator
from vlmembed.data.sources import Mixture, Source
from vlmembed.types import BadRow, Batch, EvaluationSet, Example, Item, RankingBatch


class Batches(Sampler[list[int]]):
    """Row numbers of every batch of an epoch, for one process.

    The global batch is drawn from seed and epoch alone and cut into one piece per process, so any number of processes
    trains on the same batches. Where ``distinct``, no query comes twice in a global batch, where it would be its own
    negative: its second row waits for a later batch. The number of batches is the number of rows over the size of a
    global batch, rounded down, whatever the duplicates: where waiting rows alone cannot fill a last batch, rows of the
    next shuffle do.

    Args:
        source: Where the rows are; a mixture decides about shares.
        batch_size: Rows per process.
        seed: Draws the order, together with the epoch.
        rank: Which process this is.
        world_size: How many there are.
        distinct: Whether no query may come twice in a global batch; if false, rows come as drawn and no query is read.

    Raises:
        ValueError: If there are fewer rows, or (when iterating) fewer distinct queries, than one global batch has.
    """

    def __init__(
        self, source: Source, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, distinct: bool = True
    ):
        self.mixture = source if isinstance(source, Mixture) else Mixture([source])
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.distinct = distinct
        self.epoch = 0
        #: Batches of the epoch to leave out, because a run that is resumed has had them.
        self.skip = 0
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more, got {batch_size}.")
        if not len(self):
            raise ValueError(f"The {len(source)} training rows are fewer than one batch of {self.global_size}.")

    @property
    def global_size(self) -> int:
        """Rows per batch over all processes."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        return len(self.mixture) // self.global_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws. Lightning calls it."""
        if epoch != self.epoch:
            self.skip = 0
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        draw = self._of_one_source if self.mixture.one_source_batches else self._of_all_sources
        start = self.rank * self.batch_size
        for batch in islice(draw(generator), self.skip, len(self)):
            yield batch[start : start + self.batch_size]

    def _of_all_sources(self, generator: np.random.Generator) -> Iterator[list[int]]:
        counts = self.mixture.apportion(len(self.mixture))
        streams = [_passes(rows, generator) for rows in self._rows()]

        def epochs() -> Iterator[int]:
            while True:
                drawn = [row for stream, count in zip(streams, counts, strict=True) for row in islice(stream, count)]
                yield from generator.permutation(drawn).tolist()

        return self._cut(epochs(), range(len(self.mixture)))

    def _of_one_source(self, generator: np.random.Generator) -> Iterator[list[int]]:
        streams = [self._cut(_passes(rows, generator), rows) for rows in self._rows()]
        schedule = np.repeat(range(len(streams)), self.mixture.apportion(len(self)))
        for source in generator.permutation(schedule):
            yield next(streams[source])

    def _cut(self, stream: Iterator[int], rows: range) -> Iterator[list[int]]:
        if self.distinct:
            return distinct_batches(stream, self.mixture, rows, self.global_size)
        return (list(islice(stream, self.global_size)) for _ in repeat(None))

    def _rows(self) -> list[range]:
        return [range(start, stop) for start, stop in pairwise(self.mixture.offsets)]


def _passes(rows: range, generator: np.random.Generator) -> Iterator[int]:
    """Go through the rows in a new order each time, without end."""
    while True:
        yield from (rows.start + generator.permutation(len(rows))).tolist()


def distinct_batches(stream: Iterator[int], source: Source, rows: range, size: int) -> Iterator[list[int]]:
    """Cut an endless stream of rows into batches without a query twice.

    A row whose query is in the batch already waits, and has precedence in the next one.

    Args:
        stream: Row numbers, each coming up again and again.
        source: Says which query a row asks.
        rows: The rows that come up.
        size: Rows per batch.

    Raises:
        ValueError: If they have fewer distinct queries than a batch has rows.
    """
    waiting: OrderedDict[int, deque[int]] = OrderedDict()
    while True:
        batch = _take_waiting(waiting, size)
        in_vain = 0
        while len(batch) < size:
            row = next(stream)
            query = source.query_id(row)
            if query not in batch:
                batch[query] = row
                in_vain = 0
                continue
            waiting.setdefault(query, deque()).append(row)
            in_vain += 1
            if in_vain > len(rows):
                _check_queries(source, rows, size)
                in_vain = 0
        yield [*batch.values()]


def _take_waiting(waiting: OrderedDict[int, deque[int]], size: int) -> dict[int, int]:
    """Take one row of each query that waits, those first that have waited longest."""
    batch = {}
    for query in [*islice(waiting, size)]:
        batch[query] = waiting[query].popleft()
        waiting.move_to_end(query)
        if not waiting[query]:
            del waiting[query]
    return batch


def _check_queries(source: Source, rows: range, size: int) -> None:
    distinct = len({source.query_id(row) for row in rows})
    if distinct < size:
        raise ValueError(
            f"Rows {rows.start + 1} to {rows.stop} of {source.name} ask {distinct} distinct queries, fewer than the "
            f"{size} rows of a batch over all processes, where each query may come once. Lower batch_size."
        )


class ExampleLists(Dataset[list[Example]]):
    """Training rows by lists of row numbers.

    Args:
        source: The rows.
    """

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, rows: Sequence[int]) -> list[Example]:
        return [self.source[row] for row in rows]


class ItemLists(Dataset[list[tuple[int, Item]]]):
    """The items of an evaluation set, queries first, by lists of row numbers; each comes with its number.

    Args:
        evaluation: The evaluation set.
    """

    def __init__(self, evaluation: EvaluationSet):
        self.evaluation = evaluation

    def __len__(self) -> int:
        return len(self.evaluation.queries) + len(self.evaluation.corpus)

    def __getitem__(self, rows: Sequence[int]) -> list[tuple[int, Item]]:
        return [(row, self.item(row)) for row in rows]

    def item(self, row: int) -> Item:
        """Return one item: a query, or a document at ``row - len(queries)``."""
        queries = self.evaluation.queries
        return queries[row] if row < len(queries) else self.evaluation.corpus[row - len(queries)]


class ResumableLoader(DataLoader):
    """A training loader whose place in the epoch is saved in checkpoints.

    Lightning makes the first iterator of a run before it sets the epoch. Iteration here starts with the first batch
    that is asked for, so the epoch is the right one.
    """

    sampler: Batches
    _batch = 0
    _exhausted = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._batch = self.sampler.skip
        if self._exhausted:
            self._exhausted = False
            return
        # The same in every run that comes to this epoch, resumed or not.
        self.generator = own_generator(self.sampler.seed, self.sampler.epoch, self.sampler.rank)
        for batch in super().__iter__():
            # Counted when handed out, not when a worker reads ahead; a checkpoint is written after the batch's step.
            self._batch += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Say which rows of which epoch have been handed out, over all processes."""
        return {"epoch": self.sampler.epoch, "rows": self._batch * self.sampler.global_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after them, in the same order if the global batch is of the same size."""
        self.sampler.set_epoch(state["epoch"])
        # Of both: another checkpoint may be written before a batch is asked for.
        self._batch = self.sampler.skip = state["rows"] // self.sampler.global_size
        self._exhausted = state.get("exhausted", False)


def own_generator(*seeds: int) -> torch.Generator:
    """Return what a loader seeds its workers from, so that starting them draws nothing from the run's random state.

    Args:
        *seeds: Numbers that make it another one.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))


def shard(costs: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Cut rows into batches of similar cost, the most expensive first, and deal them to the processes.

    All processes get equally many batches, so that none waits for another that has no more. Every row is in one batch
    of one process; only where there are fewer rows than batches does one repeat.

    Args:
        costs: Of each row.
        batch_size: Rows per batch, at most.
        rank: Which process this is.
        world_size: How many there are.
    """
    order = np.argsort(-np.asarray(costs), kind="stable")
    rounds = -(-len(order) // (batch_size * world_size))
    pieces = np.array_split(order, rounds * world_size)
    return [(piece if len(piece) else order[-1:]).tolist() for piece in pieces[rank::world_size]]


#: What was read of a row: its number, from 0 on, and the example.
NumberedExample = tuple[int, Example]

#: The most characters of a reason that are kept; a library's own message may quote what it could not read.
LONGEST_REASON = 1000


class ReadableRows(Dataset[list[NumberedExample | BadRow]]):
    """Training rows by lists of row numbers, and a `BadRow` in place of each that cannot be read.

    Only a ``ValueError`` is a row's fault. A file that is gone, or a bug, is not.

    Args:
        examples: The rows, without mercy.
    """

    def __init__(self, examples: ExampleLists) -> None:
        self.examples = examples

    def __getitem__(self, rows: Sequence[int]) -> list[NumberedExample | BadRow]:
        return [self._read(row) for row in rows]

    def _read(self, row: int) -> NumberedExample | BadRow:
        try:
            (example,) = self.examples[[row]]
        except ValueError as error:
            return _bad(row, error)
        return row, example


class SkipBadRows:
    """Makes a batch of the rows that can be used, in a loader worker.

    Where the batch of all that were read fails, each is tried by itself. So which rows are left out depends on nothing
    but the rows: a resumed run, and any number of processes, leaves out the same.

    Args:
        collate: Makes batches of examples.
    """

    def __init__(self, collate: ExampleCollator) -> None:
        self.collate = collate

    def __call__(self, found: Sequence[NumberedExample | BadRow]) -> Batch | RankingBatch:
        """Make a batch.

        Raises:
            ValueError: If no row is left, or what is wrong is no single row's fault.
        """
        bad = [each for each in found if isinstance(each, BadRow)]
        good = [each for each in found if not isinstance(each, BadRow)]
        try:
            return self._batch(good, bad)
        except ValueError:
            refused = [each for row, example in good if (each := self._refusal(row, example)) is not None]
            if not refused:
                raise
        left_out = {each.row for each in refused}
        return self._batch([each for each in good if each[0] + 1 not in left_out], bad + refused)

    def _batch(self, good: Sequence[NumberedExample], bad: Sequence[BadRow]) -> Batch | RankingBatch:
        if not good:
            raise ValueError(
                f"None of the {len(bad)} rows of a batch can be used, and there is nothing to train on. Repair or "
                f"remove them, or raise batch_size. The first: {bad[0].reason}"
            )
        return replace(self.collate([example for _, example in good]), bad_rows=tuple(bad))

    def _refusal(self, row: int, example: Example) -> BadRow | None:
        try:
            self.collate.check(example)
        except ValueError as error:
            # An error that names nothing of the row is about the configuration.
            if any(item.origin and item.origin in str(error) for item in (example.query, *example.documents)):
                return _bad(row, error)
            raise
        return None


class BadRowFile:
    """``bad_rows.jsonl`` of a run: which training rows were left out, each once, and why.

    All processes write to it, each what its own batches lack. A run that is resumed in its folder goes on with the
    file, so that it does not start to count again.

    Args:
        folder: The run's.
        limit: How many rows may be left out.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.path = folder / "bad_rows.jsonl"
        self.limit = limit
        self._known: set[int] = set()

    def add(self, rows: Sequence[BadRow]) -> None:
        """Write down and warn of the rows that are not there yet.

        Raises:
            ValueError: If they are more than the limit now.
        """
        new = {each.row: each for each in rows if each.row not in self._known}
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(".bad_rows.lock")).acquire(poll_interval=0.002):
            written = self._append(new)
        self._known = written | new.keys()
        if len(self._known) > self.limit:
            raise ValueError(
                f"{len(self._known)} training rows cannot be used, more than max_bad_rows={self.limit}. {self.path} "
                "has them all. Repair or remove them, or raise data.init_args.max_bad_rows. "
                f"The last: {rows[-1].reason}"
            )

    def _append(self, new: dict[int, BadRow]) -> set[int]:
        """Add what other processes, and the run before, have not; return what was there."""
        content = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        written: set[int] = set()
        for line in content.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # Cut short, when a process or the disk had its end.
                written.add(json.loads(line)["row"])
        with self.path.open("a", encoding="utf-8") as file:
            if content and not content.endswith("\n"):
                file.write("\n")
            for row, each in new.items():
                if row not in written:
                    file.write(json.dumps(asdict(each)) + "\n")
                    warnings.warn(f"Left out of training: {each.reason} ({self.path})", stacklevel=4)
        return written


def _bad(row: int, error: ValueError) -> BadRow:
    return BadRow(row + 1, str(error)[:LONGEST_REASON])
