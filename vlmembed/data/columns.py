"""Columns of training rows, and the examples that rows become."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlmembed.data.cells import Cell, Folder, is_content, to_items
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


def labelled(query: Item, candidates: Iterable[tuple[Item, float, float | None]]) -> Example:
    """Make an example of documents with their labels and scores: positives first, otherwise in their order."""
    ordered = sorted(candidates, key=lambda candidate: candidate[1] <= 0)
    documents, labels, scores = (tuple(values) for values in zip(*ordered, strict=True))
    positives = sum(label > 0 for label in labels)
    return Example(query, documents[:positives], documents[positives:], None if None in scores else scores, labels)


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
