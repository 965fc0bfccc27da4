"""Sampling of rows into batches, over processes, and a loader that resumes in the middle of an epoch."""

from __future__ import annotations

import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise, repeat
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlmembed.data.sources import Mixture

#: Stands for the id of a query that has not been read.
UNREAD = np.iinfo(np.int64).min


class Batches(Sampler[list[int]]):
    """Row numbers of every batch of an epoch, for one process.

    The global batch is drawn from seed and epoch alone and cut into one piece per process, so any number of processes
    trains on the same batches. Where ``distinct``, no query comes twice in a global batch, where it would be its own
    negative: its second row waits for a later batch. Where not, rows come as drawn, and no query is read.

    The number of batches is that of rows over the size of a global batch, rounded down: where waiting rows cannot fill
    the last one, rows of the next shuffle do. A ``ValueError`` says that a batch is larger than the rows or queries.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        distinct: bool = True,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more, got {batch_size}.")
        self.mixture, self.batch_size, self.seed, self.distinct = mixture, batch_size, seed, distinct
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        #: Batches of the epoch to leave out, because a run that is resumed has had them.
        self.skip = 0
        self._query_ids = np.full(len(mixture), UNREAD)
        self._checked: set[range] = set()
        if not len(self):
            raise ValueError(f"The {len(mixture)} training rows are fewer than one batch of {self.global_size}.")

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
        sources = [range(start, stop) for start, stop in pairwise(self.mixture.offsets)]
        rows = [_passes(source, generator) for source in sources]
        if self.mixture.one_source_batches:
            counts = self.mixture.apportion(len(self))
            streams = [self._cut(*parts) for parts in zip(rows, sources, counts, strict=True)]
            schedule = generator.permutation(np.repeat(range(len(streams)), counts))
            batches: Iterator[list[int]] = (next(streams[source]) for source in schedule)
        else:
            batches = self._cut(self._mixed(rows, generator), range(len(self.mixture)), len(self))
        start = self.rank * self.batch_size
        for batch in islice(batches, self.skip, len(self)):
            yield batch[start : start + self.batch_size]

    def _mixed(self, streams: list[Iterator[int]], generator: np.random.Generator) -> Iterator[int]:
        """Shuffle each source's share of an epoch together, epoch after epoch."""
        counts = self.mixture.apportion(len(self.mixture))
        while True:
            drawn = [row for stream, count in zip(streams, counts, strict=True) for row in islice(stream, count)]
            yield from generator.permutation(drawn).tolist()

    def _cut(self, stream: Iterator[int], rows: range, count: int) -> Iterator[list[int]]:
        """Cut an endless stream of rows into batches, ``count`` of them in an epoch.

        A row whose query is in the batch already waits for the next one.
        """
        size = self.global_size
        if not self.distinct:
            yield from (list(islice(stream, size)) for _ in repeat(None))
        waiting: OrderedDict[int, deque[int]] = OrderedDict()  # Query id → its rows, the longest wait first.
        drawn = delayed = 0
        while True:
            batch = {query: waiting[query].popleft() for query in islice(waiting, size)}
            for query in batch:
                waiting.move_to_end(query)
                if not waiting[query]:
                    del waiting[query]
            while len(batch) < size:
                more = list(islice(stream, size - len(batch)))
                for row, query in zip(more, self._queries_of(more), strict=True):
                    if query in batch:
                        waiting.setdefault(query, deque()).append(row)
                        delayed += 1
                    else:
                        batch[query] = row
                drawn += len(more)
                if delayed > drawn / 10 and rows not in self._checked:
                    self._checked.add(rows)
                    self._check_queries(rows, count)
            yield [*batch.values()]

    def _check_queries(self, rows: range, count: int) -> None:
        """Refuse rows of too few queries, and say how many of them the batches of an epoch can show, if not all."""
        queries, frequencies = np.unique(self._queries_of(rows), return_counts=True)
        if len(queries) < self.global_size:
            raise ValueError(
                f"Rows {rows.start + 1} to {rows.stop} of {self.mixture.name} ask {len(queries)} distinct queries, "
                f"fewer than the {self.global_size} rows of a batch over all processes, where each query may come "
                "once. Lower batch_size."
            )
        seen, places = int(np.minimum(frequencies, count).sum()), min(len(rows), count * self.global_size)
        if seen < 0.9 * places and not self.rank:
            warnings.warn(
                f"An epoch sees {seen:,} of the {len(rows):,} rows of {self.mixture.name}, some of them again and "
                f"again: a batch holds a query once, and {frequencies.max():,} rows ask the same. "
                "vlmembed.data.GroupByQuery makes one row of them, with several positives; an epoch then sees all.",
                stacklevel=2,
            )

    def _queries_of(self, rows: Sequence[int]) -> list[int]:
        """Return the id of each row's query; each is read once."""
        unread = [row for row in rows if self._query_ids[row] == UNREAD]
        if unread:
            self._query_ids[unread] = self.mixture.query_ids(unread)
        return self._query_ids[list(rows)].tolist()


def _passes(rows: range, generator: np.random.Generator) -> Iterator[int]:
    """Go through the rows in a new order each time, without end."""
    while True:
        yield from (rows.start + generator.permutation(len(rows))).tolist()


class RowLists(Dataset[Any]):
    """What a function reads of a list of row numbers, as a sampler of whole batches asks for them."""

    def __init__(self, read: Callable[[Sequence[Any]], list[Any]]):
        self.read = read

    def __getitem__(self, rows: Sequence[Any]) -> list[Any]:
        return self.read(rows)


class ResumableLoader(DataLoader):
    """A training loader whose position in the epoch is saved in checkpoints.

    Lightning makes the first iterator before it sets the epoch, so iteration starts with the first batch asked for.
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
        self.generator = seeded_generator(self.sampler.seed, self.sampler.epoch, self.sampler.rank)
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
        self._exhausted = bool(state.get("exhausted"))


def seeded_generator(*seeds: int) -> torch.Generator:
    """Return what a loader seeds its workers from, so that starting them draws nothing from the run's random state."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))


def shard(costs: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Cut rows into batches of similar cost, the most expensive first, and deal equally many to each process.

    Every row is in one batch of one process; only where there are fewer rows than batches does one repeat.
    """
    order = np.argsort(-np.asarray(costs), kind="stable")
    rounds = -(-len(order) // (batch_size * world_size))
    pieces = np.array_split(order, rounds * world_size)
    return [(piece if len(piece) else order[-1:]).tolist() for piece in pieces[rank::world_size]]
