"""What is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmembed.types.items import Item


@dataclass(frozen=True)
class EvaluationSet:
    """Queries, a corpus, and which of its documents answer which query.

    Args:
        name: Used in metric names where a run has several sets.
        queries: The queries to measure.
        corpus: Every document that a query is ranked against.
        query_names: The data set's own query ids, in the order of ``queries``.
        document_names: The data set's own document ids, in the order of ``corpus``; equal scores are ranked by them.
        qrels: query name → document name → grade; above 0 is relevant.
    """

    name: str
    queries: Sequence[Item]
    corpus: Sequence[Item]
    query_names: Sequence[str]
    document_names: Sequence[str]
    qrels: dict[str, dict[str, int]]


@dataclass(frozen=True)
class RerankingSet:
    """An evaluation set, and the candidates that a first stage found for each of its queries.

    Args:
        evaluation: The queries, the corpus and the judgements.
        candidates: For each query, columns of the corpus, the first stage's best first.
    """

    evaluation: EvaluationSet
    candidates: Sequence[Sequence[int]]

    @property
    def name(self) -> str:
        """That of the evaluation set."""
        return self.evaluation.name
