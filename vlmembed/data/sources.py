"""Sources of training rows: files, folders and the Hub; mixtures of sources, and rows grouped by query."""

from __future__ import annotations

import csv
import json
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import datasets
import numpy as np
import pyarrow

from vlmembed.data.cells import Cell, Folder, to_items
from vlmembed.data.columns import check_columns, labelled, to_examples
from vlmembed.media import limit
from vlmembed.types import Example, Item

#: The most bytes that a line of a JSONL or TSV file may have.
MAX_LINE_BYTES = limit("VLMEMBED_MAX_LINE_BYTES", 2**26)
#: Bounds the memory of reading the queries of a whole source.
ROWS_AT_ONCE = 1024


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
            try:
                ids += [query.id for query in self.read_queries(piece)]
            except ValueError:
                for index in piece:  # One of them cannot be read.
                    ids += [-1 - index] if len(piece) == 1 else self.query_ids([index])
        return ids


@dataclass(eq=False)
class Rows(Source):
    """Training rows from a file, a folder or the Hub.

    Columns are ``query``, ``positive`` and optionally ``negative``, ``negative_0`` … ``negative_n``, or a list
    ``negatives``; or ``query``, ``document`` and ``label``; and ``scores``. See vlmembed/data/README.md.

    Args:
        path: A JSONL, CSV or Parquet file, a folder written by ``save_to_disk``, or a folder or Hub id that
            ``datasets.load_dataset`` opens.
        split: Which split of a data set that has several; a file, or one saved data set, is read whole.
        subset: Which configuration of a data set that has several.
        columns: New names for columns, ``{question: query}``; null drops a column.
        allow_outside: Folders outside of the file's (or the data set's) whose images and videos the rows may name.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    columns: dict[str, str | None] | None = None
    allow_outside: list[str] | None = None

    @property
    def name(self) -> str:
        """The file or folder name, without ending."""
        return Path(self.path).stem

    def __len__(self) -> int:
        return len(self._opened[0])

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        table, names = self._opened
        dropped, renamed = {*(self.columns or ())}, []
        origins = [f"{self.path}, row {index + 1}" for index in indices]
        for origin, row in zip(origins, self._read(table, indices), strict=True):
            missing, extra = [*(names.keys() - row.keys())], [*(row.keys() - names.keys() - dropped)]
            if missing or extra:
                reason = f"lacks column {missing[0]!r} of" if missing else f"has a column {extra[0]!r} that is not in"
                raise ValueError(f"{origin} {reason} row 1; every row needs the same columns.")
            renamed.append({new: row[old] for old, new in names.items()})
        return to_examples(renamed, self._folder, origins)

    def read_queries(self, indices: Sequence[int]) -> list[Item]:
        """See `Source.read_queries`; leaves the other columns of an Arrow table undecoded."""
        table, names = self._opened
        column = next(old for old, new in names.items() if new == "query")
        selected = table if isinstance(table, JSONLines) else table.select_columns([column])
        rows = zip(indices, self._read(selected, indices), strict=True)
        cells: list[Cell] = [(row.get(column), "query", f"{self.path}, row {k + 1}, column 'query'") for k, row in rows]
        return to_items(cells, self._folder)

    def _read(self, table: Table, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            return table.__getitems__(list(indices)) if indices else []
        except OSError as error:  # The file's fault, and no row's.
            raise OSError(f"{self.path}, row {indices[0] + 1}: cannot be read: {error}") from error

    @cached_property
    def _folder(self) -> Folder:
        return Folder.of(self.path, self.allow_outside)

    @cached_property
    def _opened(self) -> tuple[Table, dict[str, str]]:
        """The table, and the columns that are not dropped: the file's name → the name after renaming."""
        table, columns = open_table(self.path, self.split, self.subset), self.columns or {}
        if absent := [column for column in columns if column not in table.column_names]:
            raise ValueError(
                f"{self.path}: no column {absent[0]!r} to rename or drop; it has {', '.join(table.column_names)}."
            )
        names = {old: new for old in table.column_names if (new := columns.get(old, old)) is not None}
        renamed = [*names.values()]
        if twice := [name for name in renamed if renamed.count(name) > 1]:
            raise ValueError(f"{self.path}: two columns would be called {twice[0]!r}; columns is {columns}.")
        check_columns(renamed, self.path)
        return table if isinstance(table, JSONLines) else table.select_columns([*names]), names


def read_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Read a file line by line; a line above ``MAX_LINE_BYTES`` is refused before it is in memory."""
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(
                f"{path}, row {number}: the line has more than {MAX_LINE_BYTES:,} bytes; VLMEMBED_MAX_LINE_BYTES sets "
                "the limit. Are there line ends between the rows?"
            )
        yield line


class JSONLines:
    """A JSONL file, read when asked for; only the offset of each line is in memory.

    Not through Arrow, which wants one type per column: a cell may be a string in one row and a mapping in the next.
    Raises an ``OSError`` when the file has changed: its rows would be others, unnoticed.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
        self.path = path
        offsets: list[int] = []
        position, blank = 0, 0
        with path.open("rb") as file:
            self._version = _version(file)
            for line in read_lines(path, file):
                if not line.strip():
                    blank = blank or len(offsets) + 1
                elif blank:  # Row numbers in messages are line numbers, so no line may be skipped.
                    raise ValueError(f"{path}, row {blank}: a blank line; remove it.")
                else:
                    offsets.append(position)
                position += len(line)
        if not offsets:
            raise ValueError(f"{path}: the file has no rows.")
        self._offsets = np.array(offsets)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = []
        with self.path.open("rb") as file:
            if _version(file) != self._version:
                raise OSError(f"{self.path} has changed since it was opened. Write a new version to another file.")
            for index in indices:
                file.seek(int(self._offsets[index]))
                line = file.readline()
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{self.path}, row {index + 1}: not JSON ({error}): {line[:100]!r}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{self.path}, row {index + 1}: expected a JSON object, got {line[:100]!r}.")
                rows.append(row)
        return rows

    @cached_property
    def column_names(self) -> list[str]:
        """The keys of the first row."""
        return list(self.__getitems__([0])[0])


def _version(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


Table: TypeAlias = JSONLines | datasets.Dataset


def open_table(path: str, split: str, subset: str | None = None) -> Table:
    """Open what a path or a Hub id stands for; a ``ValueError`` if there is no such file or split, or no row."""
    file = Path(path)
    if file.suffix in (".jsonl", ".ndjson"):
        return JSONLines(file)
    if file.suffix in (".csv", ".parquet", ".json") and not file.is_file():
        raise ValueError(f"{path}: no such file.")
    if file.suffix in (".csv", ".parquet", ".json"):
        try:
            kind = file.suffix[1:]
            table = _read_csv(file) if kind == "csv" else datasets.load_dataset(kind, data_files=path, split="train")
        except (csv.Error, UnicodeError, OSError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"{path}: cannot be read as {kind} ({type(error).__name__}: {error.__cause__ or error}). Write the "
                "file again."
            ) from error
    elif (file / "dataset_dict.json").exists() or (file / "state.json").exists():
        table = datasets.load_from_disk(path)
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"{path}: no split {split!r}; it has {', '.join(table)}. Choose with Rows(split=…).")
            table = table[split]
    else:
        table = datasets.load_dataset(path, subset, split=split)
    # Images and the like come as they are stored: opened by `datasets`, they could be of any size, or a URL.
    table.info.features = datasets.Features({name: _encoded(feature) for name, feature in table.features.items()})
    if not len(table):
        raise ValueError(f"{path}: the data set has no rows.")
    return table


def _read_csv(path: Path) -> datasets.Dataset:
    # Not datasets' reader: it guesses types, so the text "None" becomes nothing and "1984" a number.
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    names = rows[0] if rows else []
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(names):
            raise ValueError(f"{path}, row {number}: {len(row)} cells under {len(names)} columns: {row!r:.200}")
    return datasets.Dataset.from_dict({name: [row[k] for row in rows[1:]] for k, name in enumerate(names)})


def _encoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _encoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_encoded(feature.feature))
    is_medium = hasattr(feature, "decode") and not isinstance(feature, datasets.Json)
    return replace(feature, decode=False) if is_medium else feature


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
        one_source_batches: Whether every batch, over all processes, holds rows of a single source.
    """

    sources: list[Source]
    weights: list[float] | None = None
    alpha: float = 1.0
    one_source_batches: bool = False

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

    @property
    def name(self) -> str:
        """The names of the sources."""
        return " + ".join(source.name for source in self.sources)

    def __len__(self) -> int:
        return self.offsets[-1]

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        examples = self._read(indices, lambda source, rows: source.__getitems__(rows))
        for number, (index, example) in enumerate(zip(indices, examples, strict=True)):
            items = example.query, *example.positives, *example.negatives
            if not all([item.origin for item in items]):
                source = bisect_right(self.offsets, index) - 1
                origin = f"{self.sources[source].name}, row {index - self.offsets[source] + 1}"
                query, *documents = (replace(item, origin=item.origin or origin) for item in items)
                count = len(example.positives)
                positives, negatives = tuple(documents[:count]), tuple(documents[count:])
                examples[number] = replace(example, query=query, positives=positives, negatives=negatives)
        return examples

    def read_queries(self, indices: Sequence[int]) -> list[Item]:
        """See `Source.read_queries`."""
        return self._read(indices, lambda source, rows: source.read_queries(rows))

    @property
    def offsets(self) -> list[int]:
        """The index of each source's first row, and the number of rows."""
        return [0, *accumulate(map(len, self.sources))]

    def apportion(self, count: int) -> list[int]:
        """Divide a number of rows (or batches) among the sources by their shares, largest remainders first."""
        shares = np.array(self.weights or [len(source) ** self.alpha for source in self.sources], dtype=float)
        exact = shares / shares.sum() * count
        parts = np.floor(exact).astype(int)
        for source in np.argsort(parts - exact, kind="stable")[: count - parts.sum()]:
            parts[source] += 1
        if not parts.all():
            which = self.sources[int(parts.argmin())].name
            raise ValueError(
                f"Source {which!r} gets none of the {count} rows or batches of an epoch; raise its weight."
            )
        return parts.tolist()

    def _read(self, indices: Sequence[int], read: Callable[[Source, list[int]], list[Any]]) -> list[Any]:
        """Read all rows of a source at once."""
        offsets = self.offsets
        rows: dict[int, list[int]] = {}
        order = [bisect_right(offsets, index) - 1 for index in indices]
        for index, source in zip(indices, order, strict=True):
            if not 0 <= index < offsets[-1]:
                raise IndexError(f"row {index} of {offsets[-1]}")
            rows.setdefault(source, []).append(index - offsets[source])
        results = {source: iter(read(self.sources[source], numbers)) for source, numbers in rows.items()}
        return [next(results[source]) for source in order]
