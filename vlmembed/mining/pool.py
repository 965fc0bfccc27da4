"""What is mined: the distinct queries of training rows, and the documents that they could be answered with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from vlmembed.data import EvaluationSource, Rows, Source
from vlmembed.data.evaluation import as_evaluation
from vlmembed.mining.contents import DistinctItems, identified
from vlmembed.types import Example, Item

Corpus = str | Source | EvaluationSource


@dataclass(frozen=True)
class Pool:
    """Queries and documents, each content once, and which answers which.

    Args:
        queries: The queries.
        documents: The candidates, and then right answers that are none.
        candidates: How many of the documents are candidates.
        answers: Of each query, the numbers of its right answers: those of all rows that ask it.
        query_of_row: Of each row, the number of its query.
        given: Of each row, what identifies the negatives that it has already.
    """

    queries: DistinctItems
    documents: DistinctItems
    candidates: int
    answers: list[set[int]]
    query_of_row: list[int]
    given: list[set[str]]


def gather(rows: Source, corpus: Corpus | None) -> Pool:
    """Read all rows, and all documents, once.

    Args:
        rows: Training rows.
        corpus: Where the documents are; None for the positives and negatives of all rows.

    Raises:
        ValueError: If rows have scores or labels, which would not fit their new negatives, or an item cannot be read.
    """
    queries, documents = DistinctItems(), DistinctItems()
    if corpus is not None:
        items = as_evaluation(corpus).corpus
        for number, (content,) in enumerate(identified((item,) for item in items)):
            documents.add(content, partial(items.__getitem__, number))
    candidates = len(documents)
    pool = Pool(queries, documents, candidates, [], [], [])
    # Three groups for each row.
    found = identified(group for row in range(len(rows)) for group in _groups(plain(rows[row])))
    for row, ((asked,), right, wrong) in enumerate(zip(found, found, found, strict=True)):
        pool.query_of_row.append(queries.add(asked, partial(_item, rows, row, 0)))
        pool.answers.extend(set() for _ in range(len(queries) - len(pool.answers)))
        for place, content in enumerate(right, start=1):
            pool.answers[pool.query_of_row[row]].add(documents.add(content, partial(_item, rows, row, place)))
        if corpus is None:
            for place, content in enumerate(wrong, start=1 + len(right)):
                documents.add(content, partial(_item, rows, row, place))
        pool.given.append({content.whole for content in wrong})
    return pool if corpus is not None else replace(pool, candidates=len(documents))


def open_rows(rows: str | Source) -> Source:
    """Return training rows from a path, or as they are."""
    return Rows(rows) if isinstance(rows, str) else rows


def plain(example: Example) -> Example:
    """Return an example of right and wrong answers.

    Raises:
        ValueError: If it has scores or labels, or no right answer.
    """
    if example.scores is not None or example.labels is not None or not example.positives:
        raise ValueError(
            f"{example.query.origin}: rows to mine or to score have a query, right answers and perhaps negatives; this "
            "one has scores, labels, or no right answer. Drop 'scores': Rows(path, columns={scores: null})."
        )
    return example


def _groups(example: Example) -> tuple[tuple[Item, ...], ...]:
    return (example.query,), example.positives, example.negatives


def _item(rows: Source, row: int, place: int) -> Item:
    return [*chain(*_groups(rows[row]))][place]
