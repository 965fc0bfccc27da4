"""Where training rows come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from vlmembed.data.cells import to_item
from vlmembed.data.columns import check_columns, to_example
from vlmembed.data.folder import Folder, folder_of
from vlmembed.data.tables import Table, open_table
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
