"""Which rows make up each batch, on each process."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import islice, pairwise, repeat

import numpy as np
from torch.utils.data import Sampler

from vlmembed.data.mixture import Mixture
from vlmembed.data.sources import Source


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
