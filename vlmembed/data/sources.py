"""Where training rows come from."""

from __future__ import annotations

import csv
import json
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import datasets
import numpy as np

from vlmembed.data.cells import to_item
from vlmembed.data.columns import check_columns, labels_of, to_example
from vlmembed.media import Folder, folder_of
from vlmembed.types import Example, Item

#: Stands for the id of a query that has not been read. Ids are 0 or more.
UNREAD = -1


class Source(ABC):
    """Training rows by number. Goes to loader workers: it must pickle. Subclass it to train on anything.

    A ``ValueError`` of ``__getitem__`` says that the row cannot be used, and names it; see ``on_bad_row`` of the data
    module.
    """

    @property
    def name(self) -> str:
        """What messages and metrics call it."""
        return type(self).__name__.lower()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    def query_id(self, index: int) -> int:
        """Return ``Item.id`` of the row's query: no batch asks one query twice. Override it where that is cheaper.

        A row whose query cannot be read asks something of its own, so that it comes up, and reading it says what is
        wrong.
        """
        try:
            return self[index].query.id
        except ValueError:
            return own_id(index)


def own_id(index: int) -> int:
    """Return a number that no query has, and no other row of the source."""
    return UNREAD - 1 - index


def read(source: Source, index: int) -> Example:
    """Read a row whose items all say where they came from, whether the source says it or not."""
    example = source[index]
    if all(item.origin for item in (example.query, *example.documents)):
        return example

    def named(item: Item) -> Item:
        return replace(item, origin=item.origin or f"{source.name}, row {index + 1}")

    positives, negatives = (tuple(map(named, items)) for items in (example.positives, example.negatives))
    return replace(example, query=named(example.query), positives=positives, negatives=negatives)


class Rows(Source):
    """Training rows from a file, a folder or the Hub.

    Columns are ``query``, ``positive`` (a list is several right answers) and optionally ``negative``, ``negative_1``
    … ``negative_n``, or a list ``negatives``; or ``query``, ``document`` and ``label``: 0 for a wrong answer and 1, or
    any grade above 0, for a right one; or a list of documents with a list of as many labels. ``scores`` is a list of a
    teacher's scores of the row's documents (positives and then negatives). A cell is a string, an image, a mapping
    with any of ``text``, ``image``, ``video``, or a list of chat content parts. In a file, an image or video is a path
    relative to it.

    Args:
        path: A JSONL, CSV or Parquet file, a folder written by ``save_to_disk``, or a folder or Hub id that
            ``datasets.load_dataset`` opens.
        split: Which split of a data set that has several; a file, or one saved data set, is read whole.
        subset: Which configuration of a data set that has several.
        columns: New names for columns, ``{question: query}``; null drops a column.
        allow_outside: Folders outside of the file's own (or the data set's) whose images and videos the rows may name;
            they would be refused otherwise.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        subset: str | None = None,
        columns: dict[str, str | None] | None = None,
        allow_outside: list[str] | None = None,
    ):
        self.path = path
        self.split = split
        self.subset = subset
        self.columns = columns or {}
        self.allow_outside = allow_outside

    @property
    def name(self) -> str:
        """The file or folder name, without ending."""
        return Path(self.path).stem

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Example:
        row = self._read(self._table, index)
        missing = [column for column in self._names if column not in row]
        extra = [column for column in row if column not in self._names and column not in self.columns]
        if missing or extra:
            which = (
                f"lacks column {missing[0]!r} of row 1" if missing else f"has a column {extra[0]!r} that row 1 lacks"
            )
            raise ValueError(f"{self._origin(index)} {which}; every row needs the same columns.")
        renamed = {new: row[old] for old, new in self._names.items()}
        return to_example(renamed, self._folder, self._origin(index))

    def query_id(self, index: int) -> int:
        """See ``Source.query_id``; read once, and without the other columns where the file allows it."""
        if self._query_ids[index] == UNREAD:
            self._query_ids[index] = self._ask(index)
        return int(self._query_ids[index])

    def _ask(self, index: int) -> int:
        try:
            cell = self._read(self._queries, index).get(self._query_column)
            return to_item(cell, "query", self._folder, f"{self._origin(index)}, column 'query'").id
        except ValueError:
            return own_id(index)

    def _origin(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"

    def _read(self, table: Table, index: int) -> Mapping[str, Any]:
        try:
            return table[index]
        except OSError as error:
            # The file's fault, and no row's.
            raise OSError(f"{self._origin(index)}: cannot be read: {error}") from error

    @cached_property
    def _folder(self) -> Folder:
        return folder_of(Path(self.path), self.allow_outside)

    @cached_property
    def _table(self) -> Table:
        table = open_table(self.path, self.split, self.subset)
        names = table.column_names
        absent = [column for column in self.columns if column not in names]
        if absent:
            raise ValueError(f"{self.path}: no column {absent[0]!r} to rename or drop; it has {', '.join(names)}.")
        kept = [column for column in names if self.columns.get(column, column) is not None]
        renamed = [self.columns.get(column, column) or "" for column in kept]
        for name in renamed:
            if renamed.count(name) > 1:
                raise ValueError(f"{self.path}: two columns would be called {name!r}; columns is {self.columns}.")
        check_columns(renamed, self.path)
        return _select(table, kept)

    @cached_property
    def _names(self) -> dict[str, str]:
        """The file's name → the name in ``Example``, of the columns that are not dropped."""
        names = {column: self.columns.get(column, column) for column in self._table.column_names}
        return {old: new for old, new in names.items() if new is not None}

    @cached_property
    def _query_column(self) -> str:
        return next(old for old, new in self._names.items() if new == "query")

    @cached_property
    def _queries(self) -> Table:
        return _select(self._table, [self._query_column])

    @cached_property
    def _query_ids(self) -> np.ndarray:
        return np.full(len(self), UNREAD)


def _select(table: Table, columns: list[str]) -> Table:
    """Leave the other columns of an Arrow table undecoded; a JSON line is read whole in any case."""
    return table.select_columns(columns) if isinstance(table, datasets.Dataset) else table


class JSONLines:
    """A JSONL file, read line by line when asked for.

    Not read through Arrow, which wants one type per column: here a cell may be a string in one row and a mapping in the
    next. Only the offset of each line is kept in memory.

    Args:
        path: One JSON object per line, UTF-8.

    Raises:
        ValueError: If the file does not exist, has no rows, or has a blank line between rows.
        OSError: When reading a row of a file that is another one by now: its rows would be others, unnoticed.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
        self.path = path
        self._offsets = self._scan()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            self._refuse_changes(file)
            file.seek(int(self._offsets[index]))
            line = file.readline()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}, row {index + 1}: not JSON ({error}): {line[:100]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, row {index + 1}: expected a JSON object, got {line[:100]!r}.")
        return row

    @cached_property
    def column_names(self) -> list[str]:
        """The keys of the first row."""
        return list(self[0])

    def _scan(self) -> np.ndarray:
        offsets: list[int] = []
        position, lines = 0, 0
        with self.path.open("rb") as file:
            self._version = _version(file)
            for line in file:
                lines += 1
                if line.strip():
                    offsets.append(position)
                    if len(offsets) != lines:
                        # Row numbers in messages are line numbers, so no line may be skipped.
                        raise ValueError(f"{self.path}, row {lines - 1}: a blank line; remove it.")
                position += len(line)
        if not offsets:
            raise ValueError(f"{self.path}: the file has no rows.")
        return np.array(offsets)

    def _refuse_changes(self, file: BinaryIO) -> None:
        if _version(file) != self._version:
            raise OSError(
                f"{self.path} has changed since it was opened. Write a new version of a data set to another file, and "
                "start again."
            )


def _version(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


Table: TypeAlias = JSONLines | datasets.Dataset


def open_table(path: str, split: str, subset: str | None = None) -> Table:
    """Open a JSONL, CSV or Parquet file, a folder saved with ``save_to_disk``, or what ``load_dataset`` opens.

    Args:
        path: A file, a folder, or a Hub id.
        split: Which part of a data set that has several; a file has only one.
        subset: Which configuration of a data set that has several.

    Raises:
        ValueError: If there is no such file or split, or it has no rows.
    """
    place = Path(path)
    if place.suffix in (".jsonl", ".ndjson"):
        return JSONLines(place)
    if place.suffix in (".csv", ".parquet", ".json") and not place.is_file():
        raise ValueError(f"{path}: no such file.")
    if place.suffix == ".csv":
        table = _read_csv(place)
    elif place.suffix in (".parquet", ".json"):
        table = datasets.load_dataset(place.suffix[1:], data_files=path, split="train")
    elif (place / "dataset_dict.json").exists() or (place / "state.json").exists():
        table = _choose(datasets.load_from_disk(path), split, path)
    else:
        table = datasets.load_dataset(path, subset, split=split)
    _leave_encoded(table)
    if not len(table):
        raise ValueError(f"{path}: the data set has no rows.")
    return table


def _read_csv(path: Path) -> datasets.Dataset:
    # Not datasets' own reader: it guesses types, so the text "None" becomes nothing and "1984" a number.
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    names = rows[0] if rows else []
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(names):
            raise ValueError(f"{path}, row {number}: {len(row)} cells under {len(names)} columns: {row!r:.200}")
    return datasets.Dataset.from_dict({name: [row[k] for row in rows[1:]] for k, name in enumerate(names)})


def _leave_encoded(table: datasets.Dataset) -> None:
    """Have images and the like come as they are stored: opened by `datasets`, they could be of any size, or a URL."""
    table.info.features = datasets.Features({name: _encoded(feature) for name, feature in table.features.items()})


def _encoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _encoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_encoded(feature.feature))
    is_medium = hasattr(feature, "decode") and not isinstance(feature, datasets.Json)
    return replace(feature, decode=False) if is_medium else feature


def _choose(saved: datasets.Dataset | datasets.DatasetDict, split: str, path: str) -> datasets.Dataset:
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"{path}: no split {split!r}; it has {', '.join(saved)}. Choose with Rows(path, split=…).")
    return saved[split]


class GroupByQuery(Source):
    """Groups the rows of each query into one, whose candidates are the documents of all of them.

    For rows ``query, document, label`` and losses that compare the candidates of a query. Documents and queries stand
    in the order in which they first come up; a document that comes up again counts once, with its highest label.

    Args:
        rows: The rows to group.
    """

    def __init__(self, rows: Source):
        self.rows = rows

    @property
    def name(self) -> str:
        """That of the rows."""
        return self.rows.name

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Example:
        """Read a query's rows, and join them.

        Raises:
            ValueError: Naming a document that two rows score differently, or that only one of them scores.
        """
        examples = [self.rows[row] for row in self._groups[index]]
        labels: dict[int, float] = {}
        scores: dict[int, float | None] = {}
        documents: dict[int, Item] = {}
        for document, label, score in (each for example in examples for each in _candidates(example)):
            documents.setdefault(document.id, document)
            labels[document.id] = max(label, labels.get(document.id, label))
            if scores.setdefault(document.id, score) != score:
                raise ValueError(f"{document.origin}: score {score}, and {scores[document.id]} in an earlier row.")
        # Right answers first, as everywhere.
        order = sorted(documents, key=lambda document: labels[document] <= 0)
        return Example(
            query=examples[0].query,
            positives=tuple(documents[document] for document in order if labels[document] > 0),
            negatives=tuple(documents[document] for document in order if labels[document] <= 0),
            scores=_scores([scores[document] for document in order], examples[0]),
            labels=tuple(labels[document] for document in order),
        )

    def query_id(self, index: int) -> int:
        """See ``Source.query_id``."""
        return self.rows.query_id(self._groups[index][0])

    @cached_property
    def _groups(self) -> list[list[int]]:
        """The rows of each query; looked for once, without reading documents where the rows allow it.

        A row whose query cannot be read is a group of its own: see ``Source.query_id``.
        """
        groups: dict[int, list[int]] = {}
        for row in range(len(self.rows)):
            groups.setdefault(self.rows.query_id(row), []).append(row)
        return [*groups.values()]


def _candidates(example: Example) -> list[tuple[Item, float, float | None]]:
    """Each document with its label and its score."""
    scores = example.scores or (None,) * len(example.documents)
    return [*zip(example.documents, labels_of(example), scores, strict=True)]


def _scores(scores: list[float | None], example: Example) -> tuple[float, ...] | None:
    given = tuple(score for score in scores if score is not None)
    if given and len(given) < len(scores):
        raise ValueError(f"{example.query.origin}: some rows of this query have scores and some have none.")
    return given or None


class Mixture(Source):
    """Several sources, each with its share of every epoch.

    An epoch is as many rows as the sources have together; a source with more than its natural share repeats rows within
    it, one with less shows another random part of its rows each epoch.

    Args:
        sources: What to mix.
        weights: Shares of the sources, in their order, in any unit. Null for shares by size.
        alpha: Without weights, shares are proportional to size to this power: 1 keeps the natural shares, 0 makes them
            equal, values between favour small sources (multilingual BERT used 0.7, XLM-R 0.3).
        one_source_batches: Whether every batch, over all processes, holds rows of a single source, so that negatives in
            the batch are of the same kind as the positives.
    """

    def __init__(
        self,
        sources: list[Source],
        weights: list[float] | None = None,
        alpha: float = 1.0,
        one_source_batches: bool = False,
    ):
        _check_mixture(sources, weights, alpha)
        self.sources = sources
        self.weights = weights
        self.alpha = alpha
        self.one_source_batches = one_source_batches

    @property
    def name(self) -> str:
        """The names of the sources."""
        return " + ".join(source.name for source in self.sources)

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Example:
        return read(*self._locate(index))

    def query_id(self, index: int) -> int:
        """See ``Source.query_id``."""
        source, row = self._locate(index)
        return source.query_id(row)

    @property
    def offsets(self) -> list[int]:
        """The index of each source's first row, and the number of rows."""
        return [0, *accumulate(map(len, self.sources))]

    def apportion(self, count: int) -> list[int]:
        """Divide a number of rows (or batches) among the sources by their shares, largest remainders first.

        Raises:
            ValueError: If a source gets none, so that it would never be seen.
        """
        given = np.array(self.weights or [len(source) ** self.alpha for source in self.sources], dtype=float)
        exact = given / given.sum() * count
        parts = np.floor(exact).astype(int)
        for source in np.argsort(parts - exact, kind="stable")[: count - parts.sum()]:
            parts[source] += 1
        if not parts.all():
            which = self.sources[int(parts.argmin())].name
            raise ValueError(
                f"Source {which!r} gets none of the {count} rows or batches of an epoch; raise its weight."
            )
        return parts.tolist()

    def _locate(self, index: int) -> tuple[Source, int]:
        offsets = self.offsets
        if not 0 <= index < offsets[-1]:
            raise IndexError(f"row {index} of {offsets[-1]}")
        source = bisect_right(offsets, index) - 1
        return self.sources[source], index - offsets[source]


def _check_mixture(sources: Sequence[Source], weights: Sequence[float] | None, alpha: float) -> None:
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
