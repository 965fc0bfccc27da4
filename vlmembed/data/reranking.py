"""Queries with the candidates that a reranker puts in order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlmembed.data.evaluation import EvaluationRows, EvaluationSource, as_evaluation, is_evaluation_folder
from vlmembed.data.sources import Rows, Source
from vlmembed.types import EvaluationSet, RerankingSet

Run = dict[str, dict[str, float]]


class RerankingSource(ABC):
    """Something that reranking can be measured on. Subclass it to measure on anything."""

    @abstractmethod
    def load(self) -> RerankingSet:
        """Read the queries, the corpus, the judgements and the candidates."""


class RerankingRun(RerankingSource):
    """What another model found for the queries of an evaluation set, to be put in a better order.

    Metrics are reported before (``ndcg@10/before``) and after. A relevant document that the run does not have counts
    against both, and a query that it does not have counts 0.

    Args:
        evaluation: The queries, the corpus and the judgements: a folder, or a ``vlmembed.data.EvaluationSource``.
        run: A TREC run file, such as an embedder's ``predict`` writes: lines ``query Q0 document rank score tag``.
        depth: How many documents of each query are candidates: those of the highest scores, compared in float32 and
            equal ones by document name, both descending, as ``trec_eval`` does. The file's ranks are not read.
        name: What metrics call it; the evaluation set's name if null.
    """

    def __init__(self, evaluation: str | EvaluationSource, run: str, depth: int = 100, name: str | None = None):
        if depth < 1:
            raise ValueError(f"depth is 1 or more, got {depth}.")
        self.evaluation = evaluation
        self.run = run
        self.depth = depth
        self.name = name

    def load(self) -> RerankingSet:
        """See ``RerankingSource.load``.

        Raises:
            ValueError: Naming file, row and value: a line that cannot be read, a query or document that the
                evaluation set does not have, a document that a query has twice.
        """
        evaluation = as_evaluation(self.evaluation)
        evaluation = replace(evaluation, name=self.name or evaluation.name)
        run = read_run(Path(self.run), evaluation)
        columns = {name: column for column, name in enumerate(evaluation.document_names)}
        best = (_best(run.get(query, {}), self.depth) for query in evaluation.query_names)
        return RerankingSet(evaluation, [[columns[document] for document in found] for found in best])


class RerankingRows(RerankingSource):
    """Training rows as a reranking measurement.

    The queries are those with a document of a label above 0, the candidates of each are the documents of all its rows,
    and grades are labels. Rows know no first stage: candidates stand in the order of their names, which are hashes of
    the content, and what is reported as ``before`` is what chance gives.

    Args:
        rows: The training rows.
        name: What metrics call it; the name of the file if null.
    """

    def __init__(self, rows: Source, name: str | None = None):
        self.rows = rows
        self.name = name

    def load(self) -> RerankingSet:
        """See ``RerankingSource.load``.

        Raises:
            ValueError: Naming row and value of what cannot be read, or of a label that is no whole number.
        """
        evaluation = EvaluationRows(self.rows, self.name).load()
        columns = {name: column for column, name in enumerate(evaluation.document_names)}
        judged = (sorted(evaluation.qrels[query]) for query in evaluation.query_names)
        return RerankingSet(evaluation, [[columns[document] for document in found] for found in judged])


def load_reranking(given: str | Source | EvaluationSource | RerankingSource, split: str) -> RerankingSet:
    """Load one set of queries and candidates, from what the YAML says.

    Args:
        given: Training rows (a path or a source), or a source of queries with candidates.
        split: Which split of a data set that has several.

    Raises:
        ValueError: If it says nothing about candidates, or something in it cannot be read.
    """
    if isinstance(given, RerankingSource):
        return given.load()
    if isinstance(given, EvaluationSource) or (isinstance(given, str) and is_evaluation_folder(given)):
        what = given if isinstance(given, str) else type(given).__name__
        raise ValueError(
            f"{what}: a cross-encoder reads each query with each of its candidates, and an evaluation set says of none "
            "which they are. Give {class_path: vlmembed.data.RerankingRun, init_args: {evaluation: …, run: FILE.trec}} "
            "with what an embedder's `predict` found, or training rows."
        )
    return RerankingRows(Rows(given, split) if isinstance(given, str) else given).load()


def read_run(path: Path, evaluation: EvaluationSet) -> Run:
    """Read a TREC run: query name → document name → score.

    Args:
        path: Lines ``query Q0 document rank score tag``, separated by white space.
        evaluation: Must have the queries and documents.

    Raises:
        ValueError: Naming file, row and value of what cannot be read.
    """
    queries, documents = {*evaluation.query_names}, {*evaluation.document_names}
    run: Run = {}
    for origin, query, document, score in _lines(path):
        if query not in queries:
            raise ValueError(
                f"{origin}: query {query!r} is none of the {len(queries)} judged queries of {evaluation.name!r}; "
                "remove its lines, or give the evaluation set that the run was made on."
            )
        if document not in documents:
            raise ValueError(f"{origin}: document {document!r} is not in the corpus of {evaluation.name!r}.")
        if document in run.setdefault(query, {}):
            raise ValueError(f"{origin}: query {query!r} has document {document!r} twice.")
        run[query][document] = score
    if not run:
        raise ValueError(f"{path}: the file has no rows.")
    return run


def _lines(path: Path) -> Iterator[tuple[str, str, str, float]]:
    """Yield origin, query, document and score of each line."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it holds lines 'query Q0 document rank score tag', a TREC run.")
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            cells = line.split()
            if not cells:
                continue
            origin = f"{path}, row {number}"
            if len(cells) != 6:
                raise ValueError(f"{origin}: expected 'query Q0 document rank score tag', got {line.strip()!r:.200}.")
            yield origin, cells[0], cells[2], _score(cells[4], origin)


def _score(cell: str, origin: str) -> float:
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{origin}: score {cell!r} is not a finite number.")
    return score


def _best(found: dict[str, float], depth: int) -> Sequence[str]:
    return sorted(found, key=lambda name: (np.float32(found[name]), name), reverse=True)[:depth]
