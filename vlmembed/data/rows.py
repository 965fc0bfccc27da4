"""Rows of files, folders and the Hub: their columns, and the examples that they become."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from vlmembed.data.cells import KINDS, Cell, Folder, content_keys, instructed, is_content, to_items
from vlmembed.data.columns import Condition, Expression, Language, Read, Row, nearest
from vlmembed.data.sources import Source, labelled, read_each
from vlmembed.data.tables import Joined, RawTable, open_table, title
from vlmembed.types import Example, Item

#: The largest score or label: losses compute in float32.
LARGEST = float(np.finfo(np.float32).max)

KNOWN = re.compile(r"query|positive|document|label|scores|negatives|negative(_\d+)?|(query|document)_instruction")

#: Columns of what the model is told to do with a row's query, and with its documents.
INSTRUCTIONS = QUERY_INSTRUCTION, DOCUMENT_INSTRUCTION = "query_instruction", "document_instruction"

#: Rows of which the keys are looked at, and that are read at once.
FIRST = 256


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
        if needed[1] == "document" and column not in (*needed, "scores", *INSTRUCTIONS):
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
        (query,) = _instructed([next(items)], row, QUERY_INSTRUCTION, origin)
        documents = _instructed([next(items) for _ in range(first + last)], row, DOCUMENT_INSTRUCTION, origin)
        scores = _numbers(row, "scores", len(documents), origin) if "scores" in row else None
        if "document" in row:
            labels = _numbers(row, "label", len(documents), origin)
            examples.append(labelled(query, zip(documents, labels, scores or [None] * len(labels), strict=True)))
        else:
            examples.append(Example(query, tuple(documents[:first]), tuple(documents[first:]), scores))
    return examples


def to_queries(rows: Sequence[Row], folder: Folder, origins: Sequence[str]) -> list[Item]:
    """Return the queries of rows, as `to_examples` makes them, of rows that need not have more columns."""
    cells: list[Cell] = [
        (row.get("query"), "query", f"{origin}, column 'query'") for row, origin in zip(rows, origins, strict=True)
    ]
    items = to_items(cells, folder)
    places = zip(items, rows, origins, strict=True)
    return [query for item, row, origin in places for query in _instructed([item], row, QUERY_INSTRUCTION, origin)]


def _instructed(items: Sequence[Item], row: Row, column: str, origin: str) -> list[Item]:
    return instructed(items, row.get(column), f"{origin}, column {column!r}")


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
class Lookup:
    """A table whose rows are found by their ids, for the ``tables`` of `Table`.

    Args:
        key: The column of the ids.
        cell: What a row becomes, in the language of ``cells``; null for its text, image and video.
        path: The table, as for ``vlmembed.data.Rows``; null for the data set itself.
        split: Which split; null for that of the data set.
        subset: Which configuration; null for that of the data set, if it is the data set itself.
        revision: The Hub revision.
        media: Where the paths in its cells start, relative to the table's folder; null for that folder.
    """

    key: str
    cell: Expression = None
    path: str | list[str] | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    media: str | None = None


class LookedUp:
    """What the ids of a table stand for; the folder is that of the files in its cells, if it is another one."""

    def __init__(self, lookup: Lookup, table: Table, origin: str, folder: Folder | None) -> None:
        self.rows, self.columns, self.origin, self.folder = table.raw, table.raw_columns, origin, folder
        self.expression = lookup.cell or {key: key for key in content_keys(self.rows.column_names)}
        if not self.expression:
            raise ValueError(f"{origin}: it has none of {', '.join(KINDS)}; say with 'cell' what a row stands for.")
        language = Language(self.columns, origin)
        read = language.path(lookup.key)
        self.numbers: dict[str, int] = {}
        for number, row in _scan(self.rows, language.used):
            key = None if row is None else read(row)
            if key is not None and self.numbers.setdefault(str(key), number) != number:
                first = self.numbers[str(key)] + 1
                raise ValueError(f"{origin}, row {number + 1}: {lookup.key} {key!r} is also that of row {first}.")

    @cached_property
    def cell(self) -> Read:
        """What makes the cell of a row."""
        return Language(self.columns, self.origin, folder=self.folder).reader(self.expression)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "cell"}

    def __call__(self, key: Any) -> Any:
        """Return the content of the row with an id; a ``ValueError`` if there is none."""
        if key is None or key == "":
            return None
        if str(key) not in self.numbers:
            raise ValueError(f"the id {key!r} is in no row of {self.origin}{nearest(str(key), self.numbers)}.")
        number = self.numbers[str(key)]
        try:
            return self.cell(self.rows.__getitems__([number])[0])
        except ValueError as error:
            raise ValueError(f"{self.origin}, row {number + 1}: {error}") from error


class _Cells(NamedTuple):
    """What the rows of a table become."""

    rows: RawTable  # With the columns that are read.
    reads: dict[str, Read]
    columns: dict[str, set[str]]  # That each cell is made of.


@dataclass(eq=False)
class Table:
    """Rows of a file, a folder or the Hub, with the columns that they are given.

    Args:
        path: A JSONL, JSON, CSV, TSV, Parquet or tar file, a glob or list of these, a folder written by
            ``save_to_disk``, or a folder or Hub id that ``datasets.load_dataset`` opens.
        split: Which split of a data set that has several, or slices of them, ``train[:1%]``; of files, all are read.
        subset: Which configuration of a data set that has several; of a JSON file, the key of its rows.
        columns: New names for columns, ``{question: query}``; null drops a column.
        allow_outside: Folders outside of the file's (or the data set's) whose images, videos and audio may be named.
        revision: The Hub revision: a branch, tag or commit.
        media: Where the paths in cells start, relative to the data set's folder; null for that folder.
        cells: Instead of ``columns``, what is made of them: ``{query: {image: path, text: question}}``. The language
            is that of vlmembed/data/README.md.
        where: Which rows are read: ``{source: [docvqa, infovqa], query: {not: null}}``.
        each: A column whose lists become one row for each element.
        tables: Tables in which ``{ids: column, table: NAME}`` looks up.
    """

    path: str | list[str]
    split: str = "train"
    subset: str | None = None
    columns: dict[str, str | None] | None = None
    allow_outside: list[str] | None = None
    revision: str | None = None
    media: str | None = None
    cells: dict[str, Expression] | None = None
    where: dict[str, Condition] | None = None
    each: str | None = None
    tables: dict[str, Lookup] | None = None

    @property
    def name(self) -> str:
        """The name of the file or folder, without ending; of a glob, that of its folder."""
        path = Path(self.path if isinstance(self.path, str) else next(iter(self.path), ""))
        return (path.parent if {*"*?["} & {*path.name} and not path.exists() else path).stem

    @property
    def origin(self) -> str:
        """The path, for messages."""
        return title(self.path)

    @property
    def column_names(self) -> list[str]:
        """The names of the cells."""
        return [*self._cells.reads]

    @cached_property
    def raw_columns(self) -> list[str]:
        """The columns of these rows: of JSON, which leaves out a key where it has no value, those of the first ones."""
        table = self.raw.first if isinstance(self.raw, Joined) else self.raw
        if isinstance(table, datasets.Dataset):
            return list(table.column_names)
        first = [row for _, row in islice(_scan(table, ()), FIRST) if row is not None]
        return [*dict.fromkeys(key for row in first for key in row)] or table.column_names

    def __len__(self) -> int:
        reads = self._cells  # Which is wrong where an expression is.
        return len(reads.rows) if self._places is None else len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_cells", "_filter")}

    def read(self, indices: Sequence[int], names: Collection[str] | None = None) -> list[dict[str, Any]]:
        """Return the cells of some rows, by name; a ``ValueError`` names row, column and value."""
        table, cells, columns = self._cells
        places = self._rows_and_elements(indices)
        if names is not None:
            cells = {name: read for name, read in cells.items() if name in names}
            wanted = [*{column for name in cells for column in columns[name]}]
            table = table.select_columns(wanted)
        rows = self._rows(table, [row for row, _ in places])
        origins = self.origins(indices)
        if names is None:
            self.check_same(rows, origins)
        elements = [with_element(row, self.each, element) for row, (_, element) in zip(rows, places, strict=True)]
        return map_cells(cells, elements, origins)

    def origins(self, indices: Sequence[int]) -> list[str]:
        """Say where some rows come from, for messages."""
        places, table = self._rows_and_elements(indices), self.raw
        numbers = [row for row, _ in places]
        is_one = isinstance(table, datasets.Dataset)
        rows = [f"{self.origin}, row {row + 1}" for row in numbers] if is_one else table.origins(numbers)
        return [self.at_element(row, element) for row, (_, element) in zip(rows, places, strict=True)]

    def at_element(self, origin: str, element: int) -> str:
        """Say which element of ``each`` it is, behind where the row comes from."""
        return origin + (f", {self.each}[{element}]" if element >= 0 else "")

    @cached_property
    def folder(self) -> Folder:
        """The media root."""
        folder = _folder(self.path, self.media, self.allow_outside)
        others = [_folder(table.path, table.media).path for table in (self.tables or {}).values() if table.path]
        return replace(folder, others=(*folder.others, *others))

    def check(self, names: Collection[str]) -> None:
        """Refuse names of cells that whoever reads the table does not know."""

    def check_same(self, rows: Iterable[Row], origins: Iterable[str]) -> None:
        """Refuse rows of other columns than the first row's: a misspelt name must not lose negatives."""
        if self.cells is not None:
            return
        columns, dropped = set[str]().union(*self._cells.columns.values()), {*(self.columns or ())}
        for row, origin in zip(rows, origins, strict=True):
            missing, extra = [*(columns - row.keys())], [*(row.keys() - columns - dropped)]
            if missing or extra:
                reason = f"lacks column {missing[0]!r} of" if missing else f"has a column {extra[0]!r} that is not in"
                raise ValueError(f"{origin} {reason} row 1; every row needs the same columns.")

    def _rows_and_elements(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        places = self._places
        return [(index, -1) for index in indices] if places is None else places[list(indices)].tolist()

    def _rows(self, table: RawTable, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            return table.__getitems__(list(indices)) if indices else []
        except OSError as error:  # The file's fault, and no row's.
            raise OSError(f"{self.origin}, row {indices[0] + 1}: cannot be read: {error}") from error
        except UnicodeDecodeError as error:  # Of a damaged Parquet file, which says nothing of its rows.
            raise ValueError(
                f"{self.origin}, row {indices[0] + 1}: not UTF-8 ({error}). Write the file again."
            ) from error

    @cached_property
    def raw(self) -> RawTable:
        """The rows as they are stored, with all columns."""
        if self.columns is not None and self.cells is not None:
            raise ValueError(f"{self.origin}: give 'columns', which renames, or 'cells', which makes cells; not both.")
        return self._open()

    def _open(self) -> RawTable:
        folder = Folder.of(self.path, self.allow_outside)
        return open_table(self.path, self.split, self.subset, folder, self.revision)

    def elements(self, row: Row) -> list[int]:
        """Return the elements of ``each`` in a row that are read, -1 for the row as it is; none of one left out."""
        values = row.get(self.each) if self.each is not None else True
        elements = range(len(values)) if isinstance(values, list) else () if values is None else (-1,)
        keeps, _ = self._filter
        return [element for element in elements if keeps(with_element(row, self.each, element))]

    @cached_property
    def _found(self) -> dict[str, LookedUp]:
        return {name: self._find(name, lookup) for name, lookup in (self.tables or {}).items()}

    @cached_property
    def _cells(self) -> _Cells:
        rows = self.raw
        expressions: Mapping[str, Any] = self.cells if self.cells is not None else self._renamed(rows.column_names)
        reads, columns = {}, {}
        for name, expression in expressions.items():
            language = Language(self.raw_columns, f"{self.origin}: cells: {name}", self._found)
            reads[name] = language.reader(expression)
            columns[name] = language.used
        self.check([*reads])
        rows = rows.select_columns([*set().union(*columns.values(), [self.each] if self.each else [])])
        return _Cells(rows, reads, columns)

    def _renamed(self, names: Sequence[str]) -> dict[str, str]:
        """Return new name → old name of the columns that are not dropped."""
        columns = self.columns or {}
        if absent := [column for column in columns if column not in names]:
            raise ValueError(
                f"{self.origin}: no column {absent[0]!r} to rename or drop{nearest(absent[0], names)}; it has "
                f"{', '.join(names)}."
            )
        renamed = [(new, old) for old in names if (new := columns.get(old, old)) is not None]
        if twice := [new for new, count in Counter(new for new, _ in renamed).items() if count > 1]:
            raise ValueError(f"{self.origin}: two columns would be called {twice[0]!r}; columns is {columns}.")
        return dict(renamed)

    def _find(self, name: str, lookup: Lookup) -> LookedUp:
        """Open a table of ``tables``."""
        table: Table = self
        is_own = lookup.path is None
        if not is_own or lookup.split or lookup.subset or lookup.media:
            table = Table(
                lookup.path or self.path,
                lookup.split or self.split,
                lookup.subset or (self.subset if is_own else None),
                allow_outside=self.allow_outside,
                revision=lookup.revision or (self.revision if is_own else None),
                media=lookup.media,
            )
        folder = None if is_own and lookup.media is None else table.folder
        return LookedUp(lookup, table, f"{table.origin}: tables: {name}", folder)

    @cached_property
    def _filter(self) -> tuple[Callable[[Row], bool], set[str]]:
        """Tells which rows are read; the columns that this looks at."""
        language = Language(self.raw_columns, self.origin)
        keeps = language.where(self.where or {})
        if self.each is not None:
            language.path(self.each)
        return keeps, language.used

    @cached_property
    def _places(self) -> np.ndarray | None:
        """(N, 2) row and element of what is read; an unreadable row is among them, so that reading it says why."""
        if not self.where and self.each is None:
            return None
        rows, places = self.raw, []
        for number, row in _scan(rows, self._filter[1]):
            places += [(number, element) for element in ((-1,) if row is None else self.elements(row))]
        if not places:
            raise ValueError(
                f"{self.origin}: none of the {len(rows):,} rows is left by where: {self.where}"
                + (f", each: {self.each}." if self.each else ".")
            )
        return np.array(places)


@dataclass(eq=False)
class Rows(Table, Source):
    """Training rows from a file, a folder or the Hub.

    Columns are ``query``, ``positive`` and optionally ``negative``, ``negative_0`` … ``negative_n``, or a list
    ``negatives``; or ``query``, ``document`` and ``label``; and ``scores``, ``query_instruction`` and
    ``document_instruction``. See vlmembed/data/README.md. The arguments are those of `Table`.
    """

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        return to_examples(self.read(indices), self.folder, self.origins(indices))

    def read_queries(self, indices: Sequence[int]) -> list[Item]:
        """See `Source.read_queries`; leaves the other columns of an Arrow table undecoded."""
        return to_queries(self.read(indices, ["query", QUERY_INSTRUCTION]), self.folder, self.origins(indices))

    def check(self, names: Collection[str]) -> None:
        """Refuse columns that are no training rows'."""
        check_columns(names, self.origin)


def map_cells(cells: Mapping[str, Read], rows: Sequence[Row], origins: Sequence[str]) -> list[dict[str, Any]]:
    """Make the cells of rows; a ``ValueError`` names row and column."""
    mapped = []
    for row, origin in zip(rows, origins, strict=True):
        made = {}
        for name, read in cells.items():
            try:
                made[name] = read(row)
            except ValueError as error:
                raise ValueError(f"{origin}, column {name!r}: {error}") from error
        mapped.append(made)
    return mapped


def with_element(row: Row, column: str | None, element: int) -> Row:
    """Return a row with one element of a list in place of the list."""
    return row if column is None or element < 0 else {**row, column: row[column][element]}


def _scan(rows: RawTable, columns: Iterable[str]) -> Iterator[tuple[int, Row | None]]:
    """Go through a table with some of its columns; None stands for a row that cannot be read."""
    selected = rows.select_columns([*columns])
    for start in range(0, len(rows), FIRST):
        numbers = [*range(start, min(start + FIRST, len(rows)))]
        yield from zip(numbers, read_each(selected.__getitems__, numbers, lambda *_: None), strict=True)


def _folder(path: str | list[str], media: str | None, allow_outside: Iterable[str] | None = None) -> Folder:
    """Return where the paths in the cells of a table start."""
    folder = Folder.of(path, allow_outside)
    if media is None:
        return folder
    root = folder.path / media
    if not root.is_dir():
        raise ValueError(f"{path}: the folder of its media, {root}, does not exist; media is {media!r}.")
    return replace(folder, path=root, others=(*folder.others, folder.path))
