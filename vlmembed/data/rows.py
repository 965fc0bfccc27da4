"""Rows of files, folders and the Hub: their columns, and the examples that they become."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlmembed.data.cells import Cell, Folder, is_content, to_items
from vlmembed.data.sources import Source, labelled
from vlmembed.data.tables import JSONLines, RawTable, open_table
from vlmembed.types import Example, Item

#: The largest score or label: losses compute in float32.
LARGEST = float(np.finfo(np.float32).max)

KNOWN = re.compile(r"query|positive|document|label|scores|negatives|negative(_\d+)?")

Row = Mapping[str, Any]


def check_columns(columns: Collection[str], origin: str) -> None:
    """Refuse columns (after renaming) that are no training rows', or that nothing would read."""
    for column in columns:
        if not KNOWN.fullmatch(column):
            what = "negatives given but unused" if "neg" in column.lower() else "nothing reads it"
            raise ValueError(
                f"{origin}: column {column!r} is unknown, {what}. Rename it with columns: {{{column}: negative_1}} "
                f"(or another known name), or drop it with columns: {{{column}: null}}."
            )
    needed = ["query", "document", "label"] if {"document", "label"} & {*columns} else ["query", "positive"]
    for column in needed:
        if column not in columns:
            raise ValueError(
                f"{origin}: column {column!r} is missing (there are {', '.join(columns)}); rename one with columns."
            )
    for column in columns:
        if needed[1] == "document" and column not in (*needed, "scores"):
            raise ValueError(f"{origin}: column {column!r} is not used beside 'document' and 'label'.")
    single = _single_negatives(columns)
    if "negatives" in columns and single:
        raise ValueError(f"{origin}: columns 'negatives' and {single[0]!r} are two forms of the same; keep one.")
    numbered = [column for column in single if column != "negative"]
    for number, column in enumerate(numbered, start=0 if "negative_0" in numbered else 1):
        if column != f"negative_{number}":
            raise ValueError(f"{origin}: column 'negative_{number}' is missing (there are {', '.join(single)}).")


def _single_negatives(columns: Collection[str]) -> list[str]:
    """Return the columns of one negative each by number, not as they stand in the file: scores follow this order."""
    names = [column for column in columns if re.fullmatch(r"negative(_\d+)?", column)]
    return sorted(names, key=lambda name: int(name.removeprefix("negative").removeprefix("_") or -1))


def to_examples(rows: Sequence[Row], folder: Folder, origins: Sequence[str]) -> list[Example]:
    """Turn rows, whose columns have been checked, into examples; a ``ValueError`` names row, column and value.

    Documents are positives where their label is above 0. The origins are file and row of each, for error messages.
    """
    # All cells of all rows are read at once: each row's query, its positives or documents, its negatives.
    cells: list[Cell] = []
    counts: list[tuple[int, int]] = []
    for row, origin in zip(rows, origins, strict=True):
        positives = _documents(row, "document" if "document" in row else "positive", origin)
        negatives = (
            _documents(row, "negatives", origin)
            if "negatives" in row
            else [_cell(row, column, origin) for column in _single_negatives(row)]
        )
        cells += [_cell(row, "query", origin), *positives, *negatives]
        counts.append((len(positives), len(negatives)))
    items = iter(to_items(cells, folder))
    examples = []
    for row, origin, (first, last) in zip(rows, origins, counts, strict=True):
        query, *documents = (next(items) for _ in range(1 + first + last))
        scores = _numbers(row, "scores", len(documents), origin) if "scores" in row else None
        if "document" in row:
            labels = _numbers(row, "label", len(documents), origin)
            examples.append(labelled(query, zip(documents, labels, scores or [None] * len(labels), strict=True)))
        else:
            examples.append(Example(query, tuple(documents[:first]), tuple(documents[first:]), scores))
    return examples


def _is_list(cell: Any) -> bool:
    return isinstance(cell, list) and not is_content(cell)


def _cell(row: Row, column: str, origin: str) -> Cell:
    origin = f"{origin}, column {column!r}"
    if row[column] is None or row[column] == "":
        hint = " Rows with fewer negatives than others need one list column 'negatives'." if "neg" in column else ""
        raise ValueError(f"{origin}: the cell is empty ({row[column]!r}).{hint}")
    return row[column], "query" if column == "query" else "document", origin


def _documents(row: Row, column: str, origin: str) -> list[Cell]:
    """Return the cells of a column of one document or of several."""
    cell = row[column]
    if column == "negatives" and not _is_list(cell):
        raise ValueError(
            f"{origin}, column {column!r}: expected a list of documents, got {type(cell).__name__} {cell!r:.100}."
        )
    if not _is_list(cell):
        return [_cell(row, column, origin)]
    if not cell and column != "negatives":
        raise ValueError(f"{origin}, column {column!r}: the list is empty; every row needs a document there.")
    return [(single, "document", f"{origin}, column {column!r}[{index}]") for index, single in enumerate(cell)]


def _numbers(row: Row, column: str, count: int, origin: str) -> tuple[float, ...]:
    """Return the labels, or a teacher's scores, of a row's documents."""
    cell, is_label = row[column], column == "label"
    is_list = not is_label or _is_list(row["document"])
    numbers = cell if isinstance(cell, list) else [cell]
    if isinstance(cell, list) != is_list or len(numbers) != count:
        expected = f"a list of {count} numbers, one per document" if is_list else "one number, as there is one document"
        raise ValueError(f"{origin}, column {column!r}: expected {expected}; got {cell!r:.100}.")
    expected = "a number of 0 (irrelevant) or above (a teacher's scores go in 'scores')" if is_label else "a number"
    for number in numbers:
        try:
            # Labels may be strings: a CSV file has nothing else.
            value = float(number) if is_label or not isinstance(number, str) else math.nan
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not (0 if is_label else -LARGEST) <= value <= LARGEST:
            raise ValueError(
                f"{origin}, column {column!r}: expected {expected}, finite in 32 bits; got {number!r:.50}."
            )
    return tuple(map(float, numbers))


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
        allow_outside: Folders outside of the file's (or the data set's) whose images, videos and audio the rows may name.
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

    def _read(self, table: RawTable, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            return table.__getitems__(list(indices)) if indices else []
        except OSError as error:  # The file's fault, and no row's.
            raise OSError(f"{self.path}, row {indices[0] + 1}: cannot be read: {error}") from error
        except UnicodeDecodeError as error:  # Of a damaged Parquet file, which says nothing of its rows.
            raise ValueError(
                f"{self.path}, row {indices[0] + 1}: not UTF-8 ({error}). Write the file again."
            ) from error

    @cached_property
    def _folder(self) -> Folder:
        return Folder.of(self.path, self.allow_outside)

    @cached_property
    def _opened(self) -> tuple[RawTable, dict[str, str]]:
        """The table, and the columns that are not dropped: the file's name → the name after renaming."""
        table, columns = open_table(self.path, self.split, self.subset, self._folder), self.columns or {}
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
