"""The candidates of a query, and whether a loss can learn from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlmembed.data.columns import labels_of
from vlmembed.losses import LabelSpec
from vlmembed.types import Example, Item

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
            "of a query with vlmembed.data.Lists."
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
            "right answer. Remove the row, group the rows of a query with vlmembed.data.Lists, or take a pointwise "
            "loss such as BinaryCrossEntropy."
        )
