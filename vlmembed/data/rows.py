"""Rows of files, folders and the Hub: their columns, and the examples that they become."""

from __future__ import annotations

import csv
import glob
import json
import math
import os
import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import yaml
from huggingface_hub import hf_hub_download, metadata_load

from vlmembed.data.cells import URL, Cell, Folder, is_content, to_items
from vlmembed.data.sources import Source, labelled
from vlmembed.media import limit
from vlmembed.types import Example, Item

#: The most bytes that a line of a JSONL or TSV file may have.
MAX_LINE_BYTES = limit("VLMEMBED_MAX_LINE_BYTES", 2**26)

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
        except UnicodeDecodeError as error:  # Of a damaged Parquet file, which says nothing of its rows.
            raise ValueError(
                f"{self.path}, row {indices[0] + 1}: not UTF-8 ({error}). Write the file again."
            ) from error

    @cached_property
    def _folder(self) -> Folder:
        return Folder.of(self.path, self.allow_outside)

    @cached_property
    def _opened(self) -> tuple[Table, dict[str, str]]:
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


def read_lines(path: Path) -> Iterator[bytes]:
    """Read a file line by line; a line above ``MAX_LINE_BYTES`` is refused before it is in memory."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), start=1):
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}, row {number}: the line has more than {MAX_LINE_BYTES:,} bytes; VLMEMBED_MAX_LINE_BYTES "
                    "sets the limit. Are there line ends between the rows?"
                )
            yield line


def text_lines(path: Path) -> Iterator[str]:
    """Read a text file line by line; a ``ValueError`` names a line that is too long or not UTF-8."""
    for number, line in enumerate(read_lines(path), start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, row {number}: not UTF-8 ({error}): {line[:100]!r}") from error


class JSONLines:
    """A JSONL file, read when asked for; only the offset of each line is in memory.

    Not through Arrow, which wants one type per column: a cell may be a string in one row and a mapping in the next.
    Raises an ``OSError`` when the file has changed: its rows would be others, unnoticed.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
        self.path, self._version = path, _version(path.stat())
        offsets: list[int] = []
        position, blank = 0, 0
        for line in read_lines(path):
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
            if _version(os.fstat(file.fileno())) != self._version:
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


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


Table: TypeAlias = JSONLines | datasets.Dataset


def open_table(path: str, split: str, subset: str | None, folder: Folder) -> Table:
    """Open what a path or a Hub id stands for; a ``ValueError`` if there is no such file or split, or no row."""
    file = Path(path)
    kind = file.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        return JSONLines(file)
    if kind in (".csv", ".json", ".parquet") and not file.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        if file.is_file():
            table = _read_file(file, kind)
        elif (file / "dataset_dict.json").exists() or (file / "state.json").exists():
            table = _open_saved(path, split, folder)
        else:
            table = _load(path, split, subset, folder)
    except Exception as error:  # Of many kinds, and often raised from what is the reason.
        if isinstance(error, ValueError) and str(error).startswith(path):
            raise
        raise ValueError(f"{path}: cannot be opened: {error.__cause__ or error}") from error
    # Images and the like come as they are stored: opened by `datasets`, they could be of any size, or a URL.
    table.info.features = datasets.Features({name: _encoded(feature) for name, feature in table.features.items()})
    if not len(table):
        raise ValueError(f"{path}: the data set has no rows.")
    return table


def _read_file(path: Path, kind: str) -> datasets.Dataset:
    if kind == ".csv":
        return _read_csv(path)
    if kind not in (".json", ".parquet"):
        raise ValueError(
            f"{path}: unknown kind of file {kind!r}. Rows are in .jsonl, .ndjson, .csv, .json or .parquet files, not "
            "compressed, or in a folder that datasets.load_dataset opens."
        )
    if kind == ".json":
        _refuse_long_lines(path)
    return datasets.load_dataset(kind[1:], data_files=glob.escape(str(path)), split="train")


def _read_csv(path: Path) -> datasets.Dataset:
    # Not datasets' reader: it guesses types, so the text "None" becomes nothing and "1984" a number.
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(text_lines(path), strict=True)
    try:
        names, *rows = [*reader] or [[]]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}; is a quote left open?") from error
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}.")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise ValueError(f"{path}, row {number}: {len(row)} cells under {len(names)} columns: {row!r:.200}")
    return datasets.Dataset.from_dict({name: [row[k] for row in rows] for k, name in enumerate(names)})


def _open_saved(path: str, split: str, folder: Folder) -> datasets.Dataset:
    """Open what ``save_to_disk`` wrote; its own files name those that hold the rows."""
    table = datasets.load_from_disk(path, keep_in_memory=False)
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise ValueError(f"{path}: no split {split!r}; it has {', '.join(table)}. Choose with Rows(split=…).")
        table = table[split]
    for file in table.cache_files:
        folder.locate(os.path.abspath(file["filename"]), "data", path)
    return table


def _load(path: str, split: str, subset: str | None, folder: Folder) -> datasets.Dataset:
    """Open a folder or a Hub id as ``load_dataset`` does, of whose files none lies elsewhere."""
    _refuse_other_files(path, folder)
    builder = datasets.load_dataset_builder(path, subset)
    files = [file for files in (builder.config.data_files or {}).values() for file in files]
    local = [file for file in files if not file.startswith(f"hf://datasets/{path.removeprefix('hf://datasets/')}@")]
    prepared = Path(builder.cache_dir).exists()
    for file in local:  # Also links, and what the pages of older releases say.
        located = folder.locate(file if URL.match(file) else os.path.abspath(file), "data", path)
        if not prepared and located.suffix in (".json", ".jsonl", ".ndjson"):
            _refuse_long_lines(located)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _refuse_other_files(path: str, folder: Folder) -> None:
    """Refuse a data set whose page names files elsewhere before they are looked for: an address would be asked."""
    for name in ("README.md", ".huggingface.yaml"):
        try:
            page, offline = Path(path, name), datasets.config.HF_HUB_OFFLINE
            if not Path(path).is_dir():
                page = Path(hf_hub_download(path, name, repo_type="dataset", local_files_only=offline))
            metadata = metadata_load(page) if name == "README.md" else yaml.safe_load(page.read_text())
        except OSError:  # There is none, or no Hub; the data set may be in a cache.
            continue
        for config in (metadata or {}).get("configs") or ():
            for pattern in _strings([config.get("data_files"), config.get("data_dir")]):
                # Chained, as in zip://x::http://y, any part may be an address.
                folder.locate(pattern.replace("::", "://"), "data", f"{path}, {name}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(inner)


def _refuse_long_lines(path: Path) -> None:
    """Refuse a file that a library would take into memory whole; a file within the limit has no such line."""
    if path.stat().st_size > MAX_LINE_BYTES:
        deque(read_lines(path), maxlen=0)


def _encoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _encoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_encoded(feature.feature))
    is_medium = hasattr(feature, "decode") and not isinstance(feature, datasets.Json)
    return replace(feature, decode=False) if is_medium else feature
