"""The items of a corpus by number, read when asked for: in memory is only where each of them lies.

A stream, for what does not fit on a disk, is read forward.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence, Sized
from dataclasses import fields
from functools import cached_property
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
from PIL import Image

from vlmembed.data import EvaluationFolder, EvaluationRows, EvaluationSource, EvaluationTables, Pages, Rows, Table
from vlmembed.data.cells import Folder
from vlmembed.data.evaluation import is_evaluation_folder
from vlmembed.data.judgements import (
    ITEM_IDS,
    Documents,
    Place,
    as_rows,
    columns_of,
    features_of,
    item_columns,
    item_id,
    read_item,
    read_rows,
    spelling,
)
from vlmembed.data.pages import visible
from vlmembed.data.rows import with_element
from vlmembed.data.sources import Source, read_each
from vlmembed.data.streaming import StreamingRows, refuse_streams
from vlmembed.data.tables import KINDS
from vlmembed.files import digest
from vlmembed.types import EvaluationSet, Example, Item, LazyImage, Role

#: What a corpus can be given as. On the command line, ``--corpus.path`` is of the first class that can be meant, and
#: `Table` cannot be told from its subclasses: those with a base come before.
CorpusSource: TypeAlias = str | Source | EvaluationSource | Table | Pages

#: Rows that are read at once.
BLOCK = 256

#: Above `Item.id`, which has 63 bits: stands for a row that cannot be read.
UNREADABLE = 2**63

#: Of features of `datasets`, those whose cells may be large.
MEDIA = re.compile(r"decode|binary")


class Corpus(ABC):
    """Items with ids, by their number."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def scan(self, rows: range) -> list[tuple[str | None, str]]:
        """Return the ids of some rows, and what else is cheaply known of them; no id of one that cannot be read.

        A ``ValueError`` names a row whose id is none.
        """

    @abstractmethod
    def read(self, row: int) -> tuple[str, Item]:
        """Return a row's id and item; a ``ValueError`` says why it has none."""

    @abstractmethod
    def origin(self, row: int) -> str:
        """Say where a row is, for messages."""

    def files(self) -> list[Path]:
        """Return the files that hold images within them; those beside them are named by the items."""
        return []

    def blocks(self) -> Iterator[list[tuple[str | None, str]]]:
        """Scan all rows."""
        yield from map(self.scan, numbered(self))


def numbered(rows: Sized, raw: Any = None) -> Iterator[range]:
    """Number rows, block by block; if they are a stream's, read it, as only its end says how many there are."""
    if isinstance(raw, Cursor):
        return raw.ranges()
    return (range(start, min(start + BLOCK, len(rows))) for start in range(0, len(rows), BLOCK))


class TableCorpus(Corpus):
    """The rows of a table of items; ``prefix`` stands before the ids of one of several."""

    def __init__(self, table: Documents, role: Role, instruction: str | None = None, prefix: str = "") -> None:
        self._table, self._role, self._instruction, self._prefix = table, role, instruction, prefix
        self._columns = item_columns(columns_of(table), role)

    def __len__(self) -> int:
        return len(self._table)

    def scan(self, rows: range) -> list[tuple[str | None, str]]:
        """See `Corpus.scan`; images that are in the table are not read."""
        cells = read_each(self._scanned, rows, lambda _, error: str(error))
        return [
            (None, row)
            if isinstance(row, str)
            else (self._prefix + item_id(row, self._role, origin), json.dumps(row, default=_brief))
            for row, origin in zip(cells, self._table.origins(rows), strict=True)
        ]

    def read(self, row: int) -> tuple[str, Item]:
        """See `Corpus.read`."""
        name, item = read_item(self._table, row, self._columns, self._role, self._instruction)
        return self._prefix + name, item

    def blocks(self) -> Iterator[list[tuple[str | None, str]]]:
        """See `Corpus.blocks`."""
        yield from map(self.scan, numbered(self, getattr(self._table, "raw", None)))

    def origin(self, row: int) -> str:
        """See `Corpus.origin`."""
        return self._table.origins([row])[0]

    def files(self) -> list[Path]:
        """See `Corpus.files`."""
        table = self._table
        if not isinstance(table, Table) or features_of(table) is None:
            return []
        paths = [table.path] if isinstance(table.path, str) else table.path
        return [Path(path) for path in paths if os.path.isfile(path)]

    @cached_property
    def _light(self) -> list[str]:
        """The columns whose cells are small."""
        if isinstance(self._table, Pages):
            return ["id"]
        if (features := features_of(self._table)) is None:
            return self._columns
        always = {"title", "text", "instruction", *ITEM_IDS[self._role]}

        def is_light(name: str) -> bool:
            return spelling(name) in always or (name in features and not MEDIA.search(repr(features[name])))

        return [*filter(is_light, self._columns)]

    def _scanned(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return read_rows(self._table, rows, self._light)


def _brief(value: Any) -> str:
    """Return what stands for a cell that is no JSON, such as the bytes of a file in a tar."""
    return digest([value]) if isinstance(value, bytes) else str(value)


class MediaFolder(Pages):
    """The images, and the pages of the PDFs, of a folder, in the order of their names, which are their ids."""

    def read(self, indices: Sequence[int], names: Collection[str] | None = None) -> list[dict[str, Any]]:
        """See `Pages.read`."""
        rows = []
        for index in indices:
            file, _ = self._page(index)
            if file.suffix.lower() == ".pdf":
                rows += super().read([index], names)
            else:
                row = {"id": file.relative_to(self.folder.path).as_posix(), "image": str(file.absolute())}
                rows.append({name: cell for name, cell in row.items() if names is None or name in names})
        return rows

    def origins(self, indices: Sequence[int]) -> list[str]:
        """See `Pages.origins`."""
        return [f"{self.path}, {self.read([index], ['id'])[0]['id']}" for index in indices]

    @cached_property
    def _files(self) -> list[Path]:
        return sorted((file for file in visible(Path(self.path)) if _is_shown(file)), key=Path.as_posix)

    def _count(self, file: Path) -> int:
        self.folder.find(file.absolute(), "image or PDF", self.path)
        try:
            return super()._count(file) if file.suffix.lower() == ".pdf" else 1
        except ValueError:
            return 1  # Reading this page will say why there is none.


def _is_shown(file: Path) -> bool:
    suffix = file.suffix.lower()
    is_image = suffix in Image.registered_extensions() and suffix not in (".mpg", ".mpeg")
    return file.is_file() and (is_image or suffix == ".pdf")


def is_media_folder(path: str) -> bool:
    """Tell a folder of images and PDFs, or one PDF, from a data set."""
    root, has_media = Path(path), False
    if root.is_file():
        return root.suffix.lower() == ".pdf"
    if not root.is_dir():
        return False
    for file in visible(root):
        if {*file.suffixes} & {*KINDS, ".ndjson", ".arrow", ".lance"}:
            return False
        has_media = has_media or _is_shown(file)
    return has_media


class RowsCorpus(Corpus):
    """The distinct documents, or queries, of training rows; their ids are those of their content."""

    def __init__(self, rows: Source, role: Role) -> None:
        refuse_streams(rows, f"encoding a {type(rows).__name__}")
        self._rows, self._role = rows, role
        self._last: tuple[int, list[Item]] = -1, []
        self._ids, self._places = self._distinct()

    def _distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the N ids, in the order in which they come first; and (N, 2) row, and number in the row."""
        ids, places = array("Q"), array("q")
        for row in chain.from_iterable(numbered(self._rows, getattr(self._rows, "raw", None))):
            try:
                items = self._items(row)
            except ValueError:
                ids.append(UNREADABLE + row)
                places.extend((row, 0))
                continue
            ids.extend(item.id for item in items)
            places.extend(place for number in range(len(items)) for place in (row, number))
        if not ids:
            raise ValueError(f"{self._rows.name}: the training rows have no {self._role}.")
        _, first = np.unique(np.frombuffer(ids, np.uint64), return_index=True)
        first.sort()
        return np.frombuffer(ids, np.uint64)[first], np.frombuffer(places, np.int64).reshape(-1, 2)[first]

    def __len__(self) -> int:
        return len(self._ids)

    def scan(self, rows: range) -> list[tuple[str | None, str]]:
        """See `Corpus.scan`."""
        return [(None if self._ids[row] >= UNREADABLE else f"{self._ids[row]:016x}", "") for row in rows]

    def read(self, row: int) -> tuple[str, Item]:
        """See `Corpus.read`."""
        place, number = self._places[row].tolist()
        if self._last[0] != place:
            self._last = place, self._items(place)
        return f"{self._ids[row]:016x}", self._last[1][number]

    def origin(self, row: int) -> str:
        """See `Corpus.origin`."""
        place = int(self._places[row, 0])
        return (
            self._rows.origins([place])[0] if isinstance(self._rows, Table) else f"{self._rows.name}, row {place + 1}"
        )

    def _items(self, row: int) -> list[Item]:
        example: Example = self._rows[row]
        return [example.query] if self._role == "query" else [*example.documents]


class SetCorpus(Corpus):
    """The documents, or queries, of an evaluation set in memory."""

    def __init__(self, evaluation: EvaluationSet, role: Role) -> None:
        is_query = role == "query"
        self._name = evaluation.name
        self._items = evaluation.queries if is_query else evaluation.corpus
        self._ids = evaluation.query_names if is_query else evaluation.document_names

    def __len__(self) -> int:
        return len(self._ids)

    def scan(self, rows: range) -> list[tuple[str | None, str]]:
        """See `Corpus.scan`."""
        return [(self._ids[row], "") for row in rows]

    def read(self, row: int) -> tuple[str, Item]:
        """See `Corpus.read`."""
        return self._ids[row], self._items[row]

    def origin(self, row: int) -> str:
        """See `Corpus.origin`."""
        return f"{self._name}, item {row + 1}"


class JoinedCorpus(Corpus):
    """Several corpora, one after the other."""

    def __init__(self, parts: Sequence[Corpus]) -> None:
        self._parts = parts
        self._ends = [*accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._ends[-1]

    def scan(self, rows: range) -> list[tuple[str | None, str]]:
        """See `Corpus.scan`."""
        return [
            entry for row in rows for part, place in [self._place(row)] for entry in part.scan(range(place, place + 1))
        ]

    def read(self, row: int) -> tuple[str, Item]:
        """See `Corpus.read`."""
        part, place = self._place(row)
        return part.read(place)

    def origin(self, row: int) -> str:
        """See `Corpus.origin`."""
        part, place = self._place(row)
        return part.origin(place)

    def files(self) -> list[Path]:
        """See `Corpus.files`."""
        return [file for part in self._parts for file in part.files()]

    def blocks(self) -> Iterator[list[tuple[str | None, str]]]:
        """See `Corpus.blocks`."""
        for part in self._parts:
            yield from part.blocks()

    def _place(self, row: int) -> tuple[Corpus, int]:
        number = bisect_right(self._ends, row)
        return self._parts[number], row - self._ends[number] + len(self._parts[number])


def open_corpus(value: CorpusSource, role: Role) -> Corpus:
    """Open whatever ``data.val`` takes, or a file or folder of items; a ``ValueError`` says why that cannot be."""
    if isinstance(value, str):
        value = _source(value)
    if isinstance(value, EvaluationRows):
        value = value.rows
    if isinstance(value, StreamingRows):
        return _of_stream(value, role)
    if isinstance(value, Source):
        return RowsCorpus(value, role)
    if isinstance(value, EvaluationFolder):
        return _of_folder(value, role)
    if isinstance(value, EvaluationTables):
        table = as_rows(value.queries if role == "query" else value.corpus)
        return TableCorpus(table, role, value.query_instruction if role == "query" else value.document_instruction)
    if isinstance(value, EvaluationSource):
        return SetCorpus(value.load(), role)
    return TableCorpus(as_rows(value), role)


def _source(path: str) -> CorpusSource:
    """Return what a path or Hub id stands for."""
    if is_media_folder(path):
        return MediaFolder(path)
    if is_evaluation_folder(path):
        return EvaluationFolder(path)
    table = Table(path)
    columns = {*columns_of(table)}
    is_training = "query" in columns and bool({"positive", "label"} & columns)
    return Rows(path) if is_training and not {"id", "_id"} & columns else table


def _of_stream(stream: StreamingRows, role: Role) -> Corpus:
    """Open a stream of training rows, or of items with ids, as a table whose rows are those of a cursor."""
    if stream.rows is not None:
        raise ValueError(
            f"{stream.origin}: rows is {stream.rows}, which ends an epoch of training, but all of a stream is encoded. "
            "Leave it out; 'where' chooses rows."
        )
    cursor = Cursor(stream)
    # The cursor has only rows and elements that are read.
    options = {field.name: getattr(stream, field.name) for field in fields(Table)} | {"where": None, "each": None}
    table, rows = Table(**options), Rows(**options)
    for opened in (table, rows):
        vars(opened).update(raw=cursor, raw_columns=stream.raw_columns, _found=stream._found)
    names = {*table.column_names}
    if {"query", "positive"} <= names or {"query", "label"} <= names or not {*map(spelling, names)} & {*ITEM_IDS[role]}:
        rows.check(names)
        return RowsCorpus(rows, role)
    return TableCorpus(table, role)


def _of_folder(source: EvaluationFolder, role: Role) -> Corpus:
    """Open the corpora, or the queries, of an evaluation folder; no judgements are needed."""
    root, parts = Folder.of(source.path, source.allow_outside), dict[Place, Corpus]()
    for subset, places in source.sets().items():
        place = places["queries" if role == "query" else "corpus"]
        if place not in parts:
            instruction = source.query_instruction if role == "query" else source.document_instruction
            place.check(root)
            table = place.open(root, source.split or "test", source.revision, source.allow_outside)
            parts[place] = TableCorpus(table, role, instruction, f"{subset}/" if subset else "")
    return next(iter(parts.values())) if len(parts) == 1 else JoinedCorpus([*parts.values()])


def files_of(item: Item) -> Iterator[Path]:
    """Yield the files that an item names."""
    for part in item.parts:
        for value in part.value if isinstance(part.value, tuple) else (part.value,):
            file = getattr(value, "file", None) if isinstance(value, LazyImage) else value
            if isinstance(file, Path):
                yield file


#: Rows that are in memory together; images may be in them.
STREAM_BLOCK = 64


class Cursor:
    """The rows of a stream by their number, as a table of ``vlmembed.data`` has them.

    It goes forward, and begins again for a row before the block that is in memory. Lines that are blank, and rows that
    ``where`` leaves out, have no number; with ``each``, every element that is read has one.
    """

    _table: Any  # The block's rows.

    def __init__(self, stream: StreamingRows) -> None:
        self._stream, first = stream, stream.raw
        self.column_names = [*first.column_names]
        #: Those of Arrow's columns; None of JSON.
        self.features = first.features if isinstance(first, datasets.Dataset) else None
        # Of each row its number in the stream, and its element of `each`; and rows up to the end of each block.
        self._numbers, self._elements, self._ends = array("q"), array("i"), array("q")
        self._blocks, self._block, self._is_whole = self._read(), -1, False

    def __len__(self) -> int:
        while self._goes_to(len(self._ends)):
            pass
        return len(self._numbers)

    def ranges(self) -> Iterator[range]:
        """Number the rows of each block; those that are not known yet while they are read."""
        block, start = 0, 0
        while block < len(self._ends) or self._goes_to(block):
            yield range(start, self._ends[block])
            block, start = block + 1, self._ends[block]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        rows, each = list[Any](), self._stream.each
        for block, of_block in groupby(indices, lambda index: bisect_right(self._ends, index)):
            if not self._goes_to(block):
                raise OSError(f"{self._stream.origin} has changed since it was opened; it has fewer rows now.")
            rows += self._table.__getitems__([self._numbers[index] - self._first for index in of_block])
        return [with_element(row, each, self._elements[index]) for row, index in zip(rows, indices, strict=True)]

    def select_columns(self, names: Iterable[str]) -> Cursor:
        """Return the same table: a row is read whole."""
        return self

    def origins(self, indices: Sequence[int]) -> list[str]:
        """Say where rows stand, for messages."""
        origin, at_element = self._stream.origin, self._stream.at_element
        return [at_element(f"{origin}, row {self._numbers[index] + 1}", self._elements[index]) for index in indices]

    def _read(self) -> Iterator[tuple[int, Any]]:
        """Read from the beginning: of each block the number of its first row, and its rows."""
        read = 0
        try:
            for first, table in self._stream.blocks(STREAM_BLOCK):
                yield first, table
                read = first + len(table)
        except Exception as error:  # Of a file, of the network, of what decompresses.
            raise OSError(f"{self._stream.origin}: the stream broke off after row {read}: {error}") from error

    def _goes_to(self, block: int) -> bool:
        """Have a block in memory; False if the stream ends before, and begins again."""
        if self._is_whole and block >= len(self._ends):
            return False
        if block < self._block:
            self._blocks, self._block = self._read(), -1
        while self._block < block:
            self._first, self._table = next(self._blocks, (0, None))
            if self._table is None:
                self._blocks, self._block, self._is_whole = self._read(), -1, True
                return False
            self._block += 1
            if self._block == len(self._ends):
                self._note()
        return True

    def _note(self) -> None:
        """Write down which rows a block has that is read the first time."""
        for index in range(len(self._table)):
            for element in self._elements_of(index):
                self._numbers.append(self._first + index)
                self._elements.append(element)
        self._ends.append(len(self._numbers))

    def _elements_of(self, index: int) -> Sequence[int]:
        """See `Table.elements`; of a row that cannot be read -1, so that reading it says why; of a blank one none."""
        if self.features is not None and not self._stream.where and self._stream.each is None:
            return [-1]
        try:
            row = self._table.__getitems__([index])[0]
        except ValueError:
            return [-1]
        return [] if row is None else self._stream.elements(row)
