"""The columns of training rows: which exist, and how one row becomes an ``Example``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlmembed.data.cells import is_content, to_item
from vlmembed.types import Example, Item

KNOWN = re.compile(r"query|positive|document|label|scores|negatives|negative(_[1-9]\d*)?")


def check_columns(columns: Collection[str], origin: str) -> None:
    """Refuse columns that cannot be read as training rows, or that nothing would read.

    Args:
        columns: Names, after renaming: ``query``; ``positive``, or ``document`` and ``label``; any number of
            ``negative``, ``negative_1`` … ``negative_n``, or one ``negatives``; ``scores``.
        origin: The file, for error messages.

    Raises:
        ValueError: Naming the column, and how to rename or drop it.
    """
    listed = ", ".join(columns)
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
            raise ValueError(f"{origin}: column {column!r} is missing (there are {listed}); rename one with columns.")
    unused = [column for column in columns if needed[1] == "document" and column not in needed]
    if unused:
        raise ValueError(f"{origin}: column {unused[0]!r} is not used beside 'document' and 'label'.")
    _check_negatives(columns, origin)


def _check_negatives(columns: Collection[str], origin: str) -> None:
    single = [column for column in columns if re.fullmatch(r"negative(_\d+)?", column)]
    if "negatives" in columns and single:
        raise ValueError(f"{origin}: columns 'negatives' and {single[0]!r} are two forms of the same; keep one.")
    count = sum(column != "negative" for column in single)
    for number in range(1, count + 1):
        if f"negative_{number}" not in columns:
            raise ValueError(f"{origin}: column 'negative_{number}' is missing (there are {', '.join(single)}).")


def to_example(row: Mapping[str, Any], folder: Path, origin: str) -> Example:
    """Turn one row, whose columns have been checked, into an example.

    A row of ``query``, ``document`` and ``label`` gives one positive (label 1) or one negative (label 0) and nothing
    else.

    Args:
        row: Column name → cell.
        folder: Where relative paths start.
        origin: File and row, for error messages.

    Raises:
        ValueError: Naming row, column and value of what cannot be read.
    """
    query = _item(row, "query", folder, origin)
    if "document" in row:
        document = (_item(row, "document", folder, origin),)
        return Example(query, document) if _is_positive(row["label"], origin) else Example(query, (), document)
    is_list = isinstance(row["positive"], list) and not is_content(row["positive"])
    positives = _items(row, "positive", folder, origin) if is_list else (_item(row, "positive", folder, origin),)
    if not positives:
        raise ValueError(f"{origin}, column 'positive': the list is empty; every row needs a right answer.")
    negatives = _negatives(row, folder, origin)
    return Example(query, positives, negatives, _scores(row, len(positives) + len(negatives), origin))


def _negatives(row: Mapping[str, Any], folder: Path, origin: str) -> tuple[Item, ...]:
    if "negatives" in row:
        return _items(row, "negatives", folder, origin)
    names = [column for column in row if column.startswith("negative")]
    # By number, not by place in the file: scores follow this order.
    return tuple(_item(row, name, folder, origin) for name in sorted(names, key=lambda name: (len(name), name)))


def _item(row: Mapping[str, Any], column: str, folder: Path, origin: str) -> Item:
    place = f"{origin}, column {column!r}"
    if row[column] is None or row[column] == "":
        hint = " Rows with fewer negatives than others need one list column 'negatives'." if "neg" in column else ""
        raise ValueError(f"{place}: the cell is empty ({row[column]!r}).{hint}")
    return to_item(row[column], "query" if column == "query" else "document", folder, place)


def _items(row: Mapping[str, Any], column: str, folder: Path, origin: str) -> tuple[Item, ...]:
    cell, place = row[column], f"{origin}, column {column!r}"
    if not isinstance(cell, list) or is_content(cell):
        raise ValueError(f"{place}: expected a list of documents, got {type(cell).__name__} {cell!r:.100}.")
    return tuple(to_item(one, "document", folder, f"{place}[{k}]") for k, one in enumerate(cell))


def _is_positive(label: Any, origin: str) -> bool:
    if label not in (0, 1, "0", "1"):
        raise ValueError(f"{origin}, column 'label': expected 0 or 1, got {label!r}; graded answers go in 'scores'.")
    return int(label) == 1


def _scores(row: Mapping[str, Any], count: int, origin: str) -> tuple[float, ...] | None:
    if "scores" not in row:
        return None
    scores, place = row["scores"], f"{origin}, column 'scores'"
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(f"{place}: expected {count} numbers (positives, then negatives), got {scores!r:.100}.")
    for score in scores:
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{place}: {score!r} is not a finite number.")
    return tuple(map(float, scores))
