"""Rows of one query as one list of candidates."""

from __future__ import annotations

from functools import cached_property

from vlmembed.data.columns import labels_of
from vlmembed.data.sources import Source
from vlmembed.types import Example, Item


class Lists(Source):
    """Groups the rows of each query into one, whose candidates are the documents of all of them.

    For rows ``query, document, label`` and losses that compare the candidates of a query. Documents and queries stand
    in the order in which they first come up; a document that comes up again counts once, with its highest label.

    Args:
        rows: The rows to group.
    """

    def __init__(self, rows: Source):
        self.rows = rows

    @property
    def name(self) -> str:
        """That of the rows."""
        return self.rows.name

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Example:
        """Read a query's rows, and join them.

        Raises:
            ValueError: Naming a document that two rows score differently, or that only one of them scores.
        """
        examples = [self.rows[row] for row in self._groups[index]]
        labels: dict[int, float] = {}
        scores: dict[int, float | None] = {}
        documents: dict[int, Item] = {}
        for document, label, score in (each for example in examples for each in _candidates(example)):
            documents.setdefault(document.id, document)
            labels[document.id] = max(label, labels.get(document.id, label))
            if scores.setdefault(document.id, score) != score:
                raise ValueError(f"{document.origin}: score {score}, and {scores[document.id]} in an earlier row.")
        # Right answers first, as everywhere.
        order = sorted(documents, key=lambda document: labels[document] <= 0)
        return Example(
            query=examples[0].query,
            positives=tuple(documents[document] for document in order if labels[document] > 0),
            negatives=tuple(documents[document] for document in order if labels[document] <= 0),
            scores=_scores([scores[document] for document in order], examples[0]),
            labels=tuple(labels[document] for document in order),
        )

    def query_id(self, index: int) -> int:
        """See ``Source.query_id``."""
        return self.rows.query_id(self._groups[index][0])

    @cached_property
    def _groups(self) -> list[list[int]]:
        """The rows of each query; looked for once, without reading documents where the rows allow it.

        A row whose query cannot be read is a group of its own: see ``Source.query_id``.
        """
        groups: dict[int, list[int]] = {}
        for row in range(len(self.rows)):
            groups.setdefault(self.rows.query_id(row), []).append(row)
        return [*groups.values()]


def _candidates(example: Example) -> list[tuple[Item, float, float | None]]:
    """Each document with its label and its score."""
    scores = example.scores or (None,) * len(example.documents)
    return [*zip(example.documents, labels_of(example), scores, strict=True)]


def _scores(scores: list[float | None], example: Example) -> tuple[float, ...] | None:
    given = tuple(score for score in scores if score is not None)
    if given and len(given) < len(scores):
        raise ValueError(f"{example.query.origin}: some rows of this query have scores and some have none.")
    return given or None
