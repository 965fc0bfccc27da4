"""Sources of training rows, grouped by query or mixed, and the sampling of their rows into batches.

A loader of training batches resumes in the middle of an epoch.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice, pairwise, repeat
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlmembed.types import BadRow, Example, Item

T = TypeVar("T")
U = TypeVar("U")

#: Bounds the memory of reading the queries of a whole source.
ROWS_AT_ONCE = 4096
#: Stands for the id of a query that has not been read.
UNREAD = np.iinfo(np.int64).min


class Source(ABC):
    """Training rows by number; must pickle. Subclass it to train on anything.

    A ``ValueError`` of ``__getitem__`` says that the row cannot be used, and names it. Batches are read by
    ``__getitems__``, PyTorch's protocol: override it where that is faster.
    """

    @property
    def name(self) -> str:
        """What messages and metrics call it."""
        return type(self).__name__.lower()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        return [self[index] for index in indices]

    def read_queries(self, indices: Sequence[int]) -> list[Item]:
        """Return the queries of some rows; override it where that is cheaper than reading the rows."""
        return [example.query for example in self.__getitems__(indices)]

    def query_ids(self, indices: Sequence[int]) -> list[int]:
        """Return ``Item.id`` of some rows' queries, and a number below 0 for a row whose query cannot be read.

        So that row comes up in a batch, and reading it says what is wrong.
        """
        ids: list[int] = []
        for start in range(0, len(indices), ROWS_AT_ONCE):
            piece = indices[start : start + ROWS_AT_ONCE]
            ids += read_each(self._read_ids, piece, lambda index, _: -1 - index)
        return ids

    def _read_ids(self, indices: Sequence[int]) -> list[int]:
        return [query.id for query in self.read_queries(indices)]


def read_each(
    read: Callable[[Sequence[int]], Sequence[T]], rows: Sequence[int], instead: Callable[[int, ValueError], U]
) -> list[T | U]:
    """Read rows together; where one of them cannot be read, one by one, with something in the place of that one."""
    try:
        return [*read(rows)]
    except ValueError as error:
        if len(rows) == 1:
            return [instead(rows[0], error)]
        return [value for row in rows for value in read_each(read, [row], instead)]


def read_parts(places: Iterable[tuple[int, int]], read: Callable[[int, list[int]], list[Any]]) -> list[Any]:
    """Read rows of several tables, given the number of each row's table, and of the row in it; a table at once."""
    order, rows = list[int](), dict[int, list[int]]()
    for part, row in places:
        order.append(part)
        rows.setdefault(part, []).append(row)
    results = {part: iter(read(part, numbers)) for part, numbers in rows.items()}
    return [next(results[part]) for part in order]


def read_usable(source: Source, rows: Sequence[int]) -> list[tuple[int, Example] | BadRow]:
    """Read examples with their rows' numbers, and a `BadRow` in the place of one that cannot be read."""
    return read_each(lambda some: [*zip(some, source.__getitems__(some), strict=True)], rows, BadRow.of)


@dataclass(eq=False)
class GroupByQuery(Source):
    """Groups the rows of each query into one, whose candidates are the documents of all of them.

    For losses that compare the candidates of a query. Queries and documents stand in the order of their first row; a
    document that comes up again counts once, with its highest label.

    Args:
        rows: The rows to group.
    """

    rows: Source

    @property
    def name(self) -> str:
        """The name of the rows."""
        return self.rows.name

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Example:
        examples = self.rows.__getitems__(self._groups[index])
        query = examples[0].query
        candidates: dict[int, tuple[Item, float, float | None]] = {}
        for example in examples:
            scores = example.scores or (None,) * len(example.documents)
            for document, label, score in zip(example.documents, example.grades, scores, strict=True):
                first, highest, before = candidates.setdefault(document.id, (document, label, score))
                if before != score:
                    raise ValueError(f"{document.origin}: score {score}, and {before} in an earlier row.")
                candidates[document.id] = first, max(highest, label), score
        if len({score is None for _, _, score in candidates.values()}) > 1:
            raise ValueError(f"{query.origin}: some rows of this query have scores and some have none.")
        return labelled(query, candidates.values())

    def read_queries(self, indices: Sequence[int]) -> list[Item]:
        """See `Source.read_queries`."""
        return self.rows.read_queries([self._groups[index][0] for index in indices])

    @cached_property
    def _groups(self) -> list[list[int]]:
        """The rows of each query, found without reading documents where the rows allow it."""
        groups: dict[int, list[int]] = {}
        for row, query in enumerate(self.rows.query_ids(range(len(self.rows)))):
            groups.setdefault(query, []).append(row)
        return [*groups.values()]


def labelled(query: Item, candidates: Iterable[tuple[Item, float, float | None]]) -> Example:
    """Make an example of documents with their labels and scores: positives first, otherwise in their order."""
    ordered = sorted(candidates, key=lambda candidate: candidate[1] <= 0)
    documents, labels, scores = (tuple(values) for values in zip(*ordered, strict=True))
    positives = sum(label > 0 for label in labels)
    return Example(query, documents[:positives], documents[positives:], None if None in scores else scores, labels)


@dataclass(eq=False)
class Mixture(Source):
    """Several sources, each with its share of every epoch.

    An epoch is as many rows as the sources have together: a source with more than its natural share repeats rows, one
    with less shows another random part of them each epoch.

    Args:
        sources: What to mix.
        weights: Shares of the sources, in their order, in any unit. Null for shares by size.
        alpha: Without weights, shares are proportional to size to this power: 1 keeps the natural shares, 0 makes them
            equal, values between favour small sources (multilingual BERT used 0.7, XLM-R 0.3).
        one_source_batches: Whether every batch, over all processes, holds rows of a single source; or for each source
            whether it has batches of its own.
        losses: For each source the name of its loss in the model's ``losses``, or null for the model's ``loss``; null
            for that of all sources. A batch holds rows of one loss.
    """

    sources: list[Source]
    weights: list[float] | None = None
    alpha: float = 1.0
    one_source_batches: bool | list[bool] = False
    losses: list[str | None] | None = None

    def __post_init__(self) -> None:
        sources, weights, alpha = self.sources, self.weights, self.alpha
        if not sources:
            raise ValueError("A mixture needs at least one source.")
        if any(isinstance(source, Mixture) for source in sources):
            raise ValueError("A mixture inside a mixture would lose its shares; list all sources in one.")
        if weights is not None and alpha != 1.0:
            raise ValueError(f"Give weights or alpha, not both: weights is {weights}, alpha is {alpha}.")
        if weights is not None and (len(weights) != len(sources) or not all(0 < weight < np.inf for weight in weights)):
            raise ValueError(f"weights needs one number above 0 for each of the {len(sources)} sources, got {weights}.")
        if not 0 <= alpha < np.inf:
            raise ValueError(f"alpha is 0 or more, got {alpha}.")
        for name in ("one_source_batches", "losses"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(sources):
                raise ValueError(f"{name} needs one entry for each of the {len(sources)} sources, got {value}.")

    @property
    def groups(self) -> list[list[int]]:
        """The sources whose rows may share a batch: those of one loss, without those that have their own batches."""
        own, groups = self.one_source_batches, dict[Any, list[int]]()
        for source in range(len(self.sources)):
            is_alone = own[source] if isinstance(own, list) else own
            loss = self.losses[source] if self.losses else None
            groups.setdefault(source if is_alone else ("mixed", loss), []).append(source)
        return [*groups.values()]

    @property
    def name(self) -> str:
        """The names of the sources."""
        return self.title(range(len(self.sources)))

    def __len__(self) -> int:
        return self.offsets[-1]

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        return self._read(indices, self._examples)

    def _examples(self, source: int, rows: list[int]) -> list[Example]:
        """Read rows of a source; they get its loss, and an origin where they have none."""
        examples = [*self.sources[source].__getitems__(rows)]
        if self.losses:
            examples = [replace(example, loss=self.losses[source]) for example in examples]
        for number, (row, example) in enumerate(zip(rows, examples, strict=True)):
            items = example.query, *example.positives, *example.negatives
            if not all([item.origin for item in items]):
                origin = f"{self.sources[source].name}, row {row + 1}"
                query, *documents = (replace(item, origin=item.origin or origin) for item in items)
                count = len(example.positives)
                positives, negatives = tuple(documents[:count]), tuple(documents[count:])
                examples[number] = replace(example, query=query, positives=positives, negatives=negatives)
        return examples

    def read_queries(self, indices: Sequence[int]) -> list[Item]:
        """See `Source.read_queries`."""
        return self._read(indices, lambda source, rows: self.sources[source].read_queries(rows))

    @property
    def offsets(self) -> list[int]:
        """The index of each source's first row, and the number of rows."""
        return [0, *accumulate(map(len, self.sources))]

    def apportion(self, count: int, groups: Sequence[Sequence[int]] | None = None) -> list[int]:
        """Divide a number of rows (or batches) among the sources by their shares, largest remainders first.

        Or among some groups of sources.
        """
        of_sources = np.array(self.weights or [len(source) ** self.alpha for source in self.sources], dtype=float)
        groups = groups or [[source] for source in range(len(self.sources))]
        shares = np.array([of_sources[[*group]].sum() for group in groups])
        exact = shares / shares.sum() * count
        parts = np.floor(exact).astype(int)
        for source in np.argsort(parts - exact, kind="stable")[: count - parts.sum()]:
            parts[source] += 1
        if not parts.all():
            which = self.title(groups[int(parts.argmin())])
            raise ValueError(
                f"Source {which!r} gets none of the {count} rows or batches of an epoch; raise its weight."
            )
        return parts.tolist()

    def title(self, group: Sequence[int]) -> str:
        """Return the names of some sources."""
        return " + ".join(self.sources[source].name for source in group)

    def _read(self, indices: Sequence[int], read: Callable[[int, list[int]], list[Any]]) -> list[Any]:
        offsets, places = self.offsets, []
        for index in indices:
            if not 0 <= index < offsets[-1]:
                raise IndexError(f"row {index} of {offsets[-1]}")
            source = bisect_right(offsets, index) - 1
            places.append((source, index - offsets[source]))
        return read_parts(places, read)


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
        self._checked: set[tuple[int, ...]] = set()
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
        mixture, count = self.mixture, len(self)
        rows = [_passes(range(start, stop), generator) for start, stop in pairwise(mixture.offsets)]
        groups = mixture.groups
        batches: Iterator[list[int]]
        if mixture.one_source_batches is True or len(groups) > 1:
            counts = mixture.apportion(count, groups)
            streams = []
            for group, share in zip(groups, counts, strict=True):
                mixed = self._mixed(group, rows, share * self.global_size, generator)
                streams.append(self._cut(mixed if len(group) > 1 else rows[group[0]], group, share))
            schedule = generator.permutation(np.repeat(range(len(streams)), counts))
            batches = (next(streams[group]) for group in schedule)
        else:
            batches = self._cut(self._mixed(groups[0], rows, len(mixture), generator), groups[0], count)
        start = self.rank * self.batch_size
        for batch in islice(batches, self.skip, len(self)):
            yield batch[start : start + self.batch_size]

    def _mixed(
        self, group: Sequence[int], streams: Sequence[Iterator[int]], total: int, generator: np.random.Generator
    ) -> Iterator[int]:
        """Shuffle the share that each source of a group has in its rows of an epoch together, epoch after epoch."""
        counts = dict(zip(group, self.mixture.apportion(total, [[source] for source in group]), strict=True))
        while True:
            drawn = [row for source, count in counts.items() for row in islice(streams[source], count)]
            yield from generator.permutation(drawn).tolist()

    def _cut(self, stream: Iterator[int], group: Sequence[int], count: int) -> Iterator[list[int]]:
        """Cut an endless stream of a group's rows into batches, ``count`` of them in an epoch.

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
                if delayed > drawn / 10 and tuple(group) not in self._checked:
                    self._checked.add(tuple(group))
                    self._check_queries(group, count)
            yield [*batch.values()]

    def _check_queries(self, group: Sequence[int], count: int) -> None:
        """Refuse rows of too few queries, and say how many of them the batches of an epoch can show, if not all."""
        offsets, name = self.mixture.offsets, self.mixture.title(group)
        rows = [row for source in group for row in range(*offsets[source : source + 2])]
        queries, frequencies = np.unique(self._queries_of(rows), return_counts=True)
        if len(queries) < self.global_size:
            raise ValueError(
                f"The {len(rows):,} rows of {name} ask {len(queries)} distinct queries, "
                f"fewer than the {self.global_size} rows of a batch over all processes, where each query may come "
                "once. Lower batch_size."
            )
        seen, places = int(np.minimum(frequencies, count).sum()), min(len(rows), count * self.global_size)
        if seen < 0.9 * places and not self.rank:
            warnings.warn(
                f"An epoch sees {seen:,} of the {len(rows):,} rows of {name}, some of them again and "
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
    """A training loader whose position is saved in checkpoints, which are written after a batch's step."""

    bad_rows: Any = None  # Takes the rows that are left out of batches.
    _batch = 0  # Of the epoch, so many are handed out; a worker reads ahead.
    _exhausted = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches, self._exhausted = () if self._exhausted else self._rest(), False
        for batch in batches:
            self._batch += 1
            if batch.bad_rows and self.bad_rows is not None:
                self.bad_rows.add(batch.bad_rows)
            yield batch

    def _rest(self) -> Iterable[Any]:
        """The batches of the epoch that are left."""
        raise NotImplementedError


class RowLoader(ResumableLoader):
    """A loader of rows by number.

    Lightning makes the first iterator before it sets the epoch, so iteration starts with the first batch asked for.
    """

    sampler: Batches

    def _rest(self) -> Iterable[Any]:
        self._batch = self.sampler.skip
        # The same in every run that comes to this epoch, resumed or not.
        self.generator = seeded_generator(self.sampler.seed, self.sampler.epoch, self.sampler.rank)
        return DataLoader.__iter__(self)

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
