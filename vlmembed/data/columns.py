"""The columns of training rows: which exist, and how one row becomes an ``Example``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlmembed.data.cells import is_content, to_item
from vlmembed.losses import LabelSpec
from vlmembed.media import Folder
from vlmembed.types import Example, Item

#: The largest number of a score or a label: that of float32.
LARGEST = float(np.finfo(np.float32).max)

KNOWN = re.compile(r"query|positive|document|label|scores|negatives|negative(_[1-9]\d*)?")


def check_columns(columns: Collection[str], origin: str) -> None:
    """Refuse columns that cannot be read as training rows, or that nothing would read.

    Args:
        columns: Names, after renaming: ``query``; ``positive`` and any number of ``negative``, ``negative_1`` …
            ``negative_n``, or one ``negatives``; or, instead of these, ``document`` and ``label``; ``scores``.
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
    unused = [column for column in columns if needed[1] == "document" and column not in (*needed, "scores")]
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


def to_example(row: Mapping[str, Any], folder: Folder, origin: str) -> Example:
    """Turn one row, whose columns have been checked, into an example.

    The documents of a row of ``query``, ``document`` and ``label`` are positives where their label is above 0, and
    negatives where it is 0.

    Args:
        row: Column name → cell.
        folder: Where relative paths start, and what files may not leave.
        origin: File and row, for error messages.

    Raises:
        ValueError: Naming row, column and value of what cannot be read.
    """
    query = _item(row, "query", folder, origin)
    if "document" in row:
        return _labelled(query, row, folder, origin)
    positives = _one_or_more(row, "positive", folder, origin)
    negatives = _negatives(row, folder, origin)
    return Example(query, positives, negatives, _scores(row, len(positives) + len(negatives), origin))


def labels_of(example: Example) -> tuple[float, ...]:
    """Return how relevant each of the positives and then of the negatives is."""
    return example.labels or (1.0,) * len(example.positives) + (0.0,) * len(example.negatives)


def _labelled(query: Item, row: Mapping[str, Any], folder: Folder, origin: str) -> Example:
    documents = _one_or_more(row, "document", folder, origin)
    labels = _labels(row["label"], _is_list(row["document"]), len(documents), f"{origin}, column 'label'")
    scores = _scores(row, len(documents), origin)
    # Right answers first, as everywhere; otherwise in the order of the row.
    order = sorted(range(len(documents)), key=lambda place: labels[place] == 0)
    positives = sum(label > 0 for label in labels)
    ordered = tuple(documents[place] for place in order)
    return Example(
        query,
        ordered[:positives],
        ordered[positives:],
        scores and tuple(scores[place] for place in order),
        tuple(labels[place] for place in order),
    )


def _is_list(cell: Any) -> bool:
    return isinstance(cell, list) and not is_content(cell)


def _one_or_more(row: Mapping[str, Any], column: str, folder: Folder, origin: str) -> tuple[Item, ...]:
    if not _is_list(row[column]):
        return (_item(row, column, folder, origin),)
    if not row[column]:
        raise ValueError(f"{origin}, column {column!r}: the list is empty; every row needs a document there.")
    return _items(row, column, folder, origin)


def _negatives(row: Mapping[str, Any], folder: Folder, origin: str) -> tuple[Item, ...]:
    if "negatives" in row:
        return _items(row, "negatives", folder, origin)
    names = [column for column in row if column.startswith("negative")]
    # By number, not by place in the file: scores follow this order.
    return tuple(_item(row, name, folder, origin) for name in sorted(names, key=lambda name: (len(name), name)))


def _item(row: Mapping[str, Any], column: str, folder: Folder, origin: str) -> Item:
    place = f"{origin}, column {column!r}"
    if row[column] is None or row[column] == "":
        hint = " Rows with fewer negatives than others need one list column 'negatives'." if "neg" in column else ""
        raise ValueError(f"{place}: the cell is empty ({row[column]!r}).{hint}")
    return to_item(row[column], "query" if column == "query" else "document", folder, place)


def _items(row: Mapping[str, Any], column: str, folder: Folder, origin: str) -> tuple[Item, ...]:
    cell, place = row[column], f"{origin}, column {column!r}"
    if not isinstance(cell, list) or is_content(cell):
        raise ValueError(f"{place}: expected a list of documents, got {type(cell).__name__} {cell!r:.100}.")
    return tuple(to_item(one, "document", folder, f"{place}[{k}]") for k, one in enumerate(cell))


def _labels(cell: Any, is_list: bool, count: int, place: str) -> list[float]:
    labels = cell if isinstance(cell, list) else [cell]
    if isinstance(cell, list) != is_list or len(labels) != count:
        expected = f"a list of {count} numbers, one per document" if is_list else "one number, as there is one document"
        raise ValueError(f"{place}: expected {expected}; got {cell!r:.100}.")
    return [_label(label, place) for label in labels]


def _label(cell: Any, place: str) -> float:
    label = _finite(cell)  # A CSV file has nothing but strings.
    if label is None or label < 0:
        raise ValueError(
            f"{place}: expected a number of 0 (no answer) or above, got {cell!r}; a teacher's scores go in 'scores'."
        )
    return label


def _finite(cell: Any) -> float | None:
    """Return a cell as a number, if it is one in float32 too, in which losses compute."""
    try:
        number = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None


def _scores(row: Mapping[str, Any], count: int, origin: str) -> tuple[float, ...] | None:
    if "scores" not in row:
        return None
    scores, place = row["scores"], f"{origin}, column 'scores'"
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(f"{place}: expected {count} numbers, one per document of the row; got {scores!r:.100}.")
    for score in scores:
        if not isinstance(score, int | float) or _finite(score) is None:
            raise ValueError(f"{place}: {score!r:.50} is not a finite number of 32 bits.")
    return tuple(map(float, scores))


NO_SCORES = (
    "the loss distils a teacher's scores, and there are none. Add a column 'scores' (`python -m vlmembed score`), or "
    "take a loss of labels."
)
UNUSED_SCORES = (
    "scores given but unused: the loss wants labels. Take a loss that distils scores, or drop the column: "
    "Rows(path, columns={scores: null})."
)


def candidates_of(example: Example, wanted: LabelSpec) -> Iterator[tuple[Item, float]]:
    """Yield each candidate of a query with its target, once they are known to be what a loss wants.

    Args:
        example: The query and its candidates.
        wanted: What the loss wants to know of each.

    Raises:
        ValueError: Naming the row, and what of it the loss cannot use.
    """
    origin, documents = example.query.origin, example.documents
    if wanted.teacher_scores != (example.scores is not None):
        raise ValueError(f"{origin}: {NO_SCORES if wanted.teacher_scores else UNUSED_SCORES}")
    if wanted.needs_several and len(documents) < 2:
        raise ValueError(
            f"{origin}: the query has one candidate, and this loss compares several. Add negatives, or group the rows "
            "of a query with vlmembed.data.GroupByQuery."
        )
    labels = labels_of(example)
    if not wanted.teacher_scores:
        _check_labels(documents, labels, wanted, origin)
    yield from zip(documents, example.scores or labels, strict=True)


def _check_labels(documents: Sequence[Item], labels: Sequence[float], wanted: LabelSpec, origin: str) -> None:
    for document, label in zip(documents, labels, strict=True):
        if not 0 <= label <= wanted.largest:
            where, range_ = document.origin or origin, f"0 to {wanted.largest:g}"
            raise ValueError(f"{where}: label {label:g} is outside of what this loss takes, {range_}.")
    if wanted.needs_positive and not any(label > 0 for label in labels):
        raise ValueError(
            f"{origin}: none of the query's {len(documents)} candidates has a label above 0, and this loss needs a "
            "positive. Remove the row, group the rows of a query with vlmembed.data.GroupByQuery, or take a pointwise "
            "loss such as BinaryCrossEntropy."
        )
