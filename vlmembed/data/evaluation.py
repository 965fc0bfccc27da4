"""Queries, a corpus and judgements, from a folder or from training rows."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmembed.data.cells import to_item
from vlmembed.data.columns import labels_of
from vlmembed.data.sources import JSONLines, Rows, Source
from vlmembed.media import Folder
from vlmembed.types import EvaluationSet, Example, Item, RerankingSet, Role

Qrels = dict[str, dict[str, int]]


class EvaluationSource(ABC):
    """Something that a retrieval measurement can be made on. Subclass it to measure on anything."""

    @abstractmethod
    def load(self) -> EvaluationSet:
        """Read the queries, the corpus and the judgements."""


class EvaluationFolder(EvaluationSource):
    """A folder in the manner of BEIR and MTEB: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels.tsv``.

    A row of the two JSONL files has ``id`` (or ``_id``) and any of ``text``, ``image``, ``video``; images and videos
    are paths relative to the folder. BEIR's ``title`` is put before the text, as MTEB does, and its ``metadata`` is
    not read. ``qrels.tsv`` has query id, corpus id and an integer grade, separated by tabs, and may have a header.
    Queries without judgements are left out.

    Args:
        path: The folder.
        name: What metrics call it; the folder's name if null.
        allow_outside: Other folders whose images and videos the rows may name; they would be refused otherwise.
    """

    def __init__(self, path: str, name: str | None = None, allow_outside: list[str] | None = None):
        self.path = path
        self.allow_outside = allow_outside
        self.name = name or Path(path).resolve().name

    def load(self) -> EvaluationSet:
        """See ``EvaluationSource.load``.

        Raises:
            ValueError: Naming file, row and value: a row that cannot be read, an id given twice, a judged query that
                does not exist.
        """
        folder = Path(self.path)
        qrels = _read_qrels(folder / "qrels.tsv")
        place = Folder(folder, tuple(map(Path, self.allow_outside or ())))
        queries = _read_items(folder / "queries.jsonl", "query", place)
        for query in qrels.keys() - queries.keys():
            raise ValueError(f"{folder / 'qrels.tsv'}: query {query!r} is not in {folder / 'queries.jsonl'}.")
        queries = {name: item for name, item in queries.items() if name in qrels}
        corpus = _read_items(folder / "corpus.jsonl", "document", place)
        missing = {document for judged in qrels.values() for document in judged} - corpus.keys()
        if missing:
            warnings.warn(
                f"{folder}: {len(missing)} documents of qrels.tsv are not in corpus.jsonl (such as {min(missing)!r}); "
                "they count as answers that nothing can find.",
                stacklevel=2,
            )
        return EvaluationSet(self.name, [*queries.values()], [*corpus.values()], [*queries], [*corpus], qrels)


class EvaluationRows(EvaluationSource):
    """Training rows as a retrieval measurement.

    The corpus is all their positives and negatives, the queries are those with a positive, each distinct one once; a
    query's answers are those of all its rows. The grade of an answer is its label: 1 for a positive and 0 for a
    negative where the rows give none. Where rows disagree, the highest counts.

    Args:
        rows: The training rows.
        name: What metrics call it; the name of the file if null.
    """

    def __init__(self, rows: Source, name: str | None = None):
        self.rows = rows
        self.name = name or rows.name

    def load(self) -> EvaluationSet:
        """See ``EvaluationSource.load``.

        Raises:
            ValueError: Naming row and value of what cannot be read, or of a label that is no whole number.
        """
        queries: dict[str, tuple[int, int]] = {}
        corpus: dict[str, tuple[int, int]] = {}
        qrels: Qrels = {}
        for row in range(len(self.rows)):
            example = self.rows[row]
            query, *documents = (f"{item.id:016x}" for item in _items(example))
            queries.setdefault(query, (row, 0))
            judged = qrels.setdefault(query, {})
            for place, (document, grade) in enumerate(zip(documents, _grades(example), strict=True), start=1):
                corpus.setdefault(document, (row, place))
                judged[document] = max(grade, judged.get(document, 0))
        qrels = {query: judged for query, judged in qrels.items() if any(judged.values())}
        items = RowItems(self.rows, [queries[query] for query in qrels]), RowItems(self.rows, [*corpus.values()])
        return EvaluationSet(self.name, *items, [*qrels], [*corpus], qrels)


class RowItems(Sequence[Item]):
    """Items of training rows, read when asked for, so that open images are not all held in memory.

    Only the row that was read last is: its other items are often asked for next.

    Args:
        rows: Where they are.
        places: Of each item, its row and its place in the row: query, positives, negatives.
    """

    def __init__(self, rows: Source, places: Sequence[tuple[int, int]]):
        self.rows = rows
        self.places = places
        self._last: tuple[int, tuple[Item, ...]] = (-1, ())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        row, place = self.places[index]
        if self._last[0] != row:
            self._last = row, _items(self.rows[row])
        return self._last[1][place]


def load_evaluation(path: str, name: str | None = None, split: str = "test") -> EvaluationSet:
    """Read an evaluation folder or, where the path is none, training rows.

    Args:
        path: A folder with ``corpus.jsonl``, or what ``Rows`` takes.
        name: What metrics call it; the name of the file or folder if None.
        split: Which split of a data set that has several.

    Raises:
        ValueError: If something in it cannot be read, with file and row.
    """
    if is_evaluation_folder(path):
        return EvaluationFolder(path, name).load()
    return EvaluationRows(Rows(path, split), name).load()


def as_evaluation(given: str | Source | EvaluationSource, split: str = "test") -> EvaluationSet:
    """Read whatever stands for an evaluation set: a path, training rows, or a source of its own.

    Raises:
        ValueError: If something in it cannot be read, with file and row.
    """
    if isinstance(given, str):
        return load_evaluation(given, split=split)
    return (EvaluationRows(given) if isinstance(given, Source) else given).load()


def is_evaluation_folder(path: str) -> bool:
    """Tell an evaluation folder from training rows."""
    return (Path(path) / "corpus.jsonl").exists() or (Path(path) / "queries.jsonl").exists()


def _items(example: Example) -> tuple[Item, ...]:
    return (example.query, *example.documents)


def _grades(example: Example) -> list[int]:
    labels = labels_of(example)
    for label in labels:
        if not label.is_integer():
            raise ValueError(
                f"{example.query.origin}: label {label} is no whole number, and metrics take grades 0, 1, 2, …: "
                "measure on rows with whole labels, or on an evaluation folder."
            )
    return [int(label) for label in labels]


def _read_items(path: Path, role: Role, folder: Folder) -> dict[str, Item]:
    rows = JSONLines(path)
    items: dict[str, Item] = {}
    for index in range(len(rows)):
        row, origin = rows[index], f"{path}, row {index + 1}"
        given = [row.pop(key) for key in ("id", "_id") if key in row]
        if len(given) != 1 or not isinstance(given[0], str | int):
            raise ValueError(f"{origin}: expected one 'id' (or '_id'), a string, got {given!r}.")
        name = str(given[0])
        if name in items:
            raise ValueError(f"{origin}: id {name!r} is given twice; first at {items[name].origin}.")
        items[name] = to_item(_with_title(row), role, folder, f"{origin} (id {name!r})")
    return items


def _with_title(row: dict[str, Any]) -> dict[str, Any]:
    row.pop("metadata", None)
    title = row.pop("title", None)
    if title:
        row["text"] = f"{title} {row.get('text') or ''}".strip()
    return row


def _read_qrels(path: Path) -> Qrels:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it holds query-id, corpus-id and grade, separated by tabs.")
    qrels: Qrels = {}
    for number, line in _lines(path):
        cells = [cell.strip() for cell in line.split("\t")]
        if number == 1 and not _is_integer(cells[-1]):
            continue
        if len(cells) != 3 or not _is_integer(cells[2]):
            raise ValueError(f"{path}, row {number}: expected query-id, corpus-id, integer grade; got {line!r}.")
        query, document, grade = cells[0], cells[1], int(cells[2])
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise ValueError(f"{path}, row {number}: {query!r} and {document!r} had another grade before: {line!r}.")
    if not qrels:
        raise ValueError(f"{path}: the file has no rows.")
    return qrels


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _is_integer(cell: str) -> bool:
    return cell.removeprefix("-").isdecimal()


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
    for origin, query, document, score in _lines_reranking(path):
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


def _lines_reranking(path: Path) -> Iterator[tuple[str, str, str, float]]:
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
