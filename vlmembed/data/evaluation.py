"""Evaluation sets: queries, a corpus, judgements and candidates, from folders, training rows and TREC runs."""

from __future__ import annotations

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmembed.data.cells import Cell, Folder, instructed, to_items
from vlmembed.data.rows import Rows
from vlmembed.data.sources import Source
from vlmembed.data.tables import JSONLines, text_lines
from vlmembed.types import EvaluationSet, Item, RerankingSet, Role

Qrels = dict[str, dict[str, int]]

#: What a cell of a table of tabs can say; not a byte order mark at its beginning, nor half of a surrogate pair.
IDS = re.compile(r"(?!\ufeff)[^\t\r\n\ud800-\udfff]+")

#: Sums of grades up to this are exact.
MOST_GRADE = 2**31


class EvaluationSource(ABC):
    """Something that a retrieval measurement can be made on. Subclass it to measure on anything."""

    @abstractmethod
    def load(self) -> EvaluationSet:
        """Read the queries, the corpus and the judgements; a ``ValueError`` names file, row and value at fault."""


class RerankingSource(ABC):
    """Something that reranking can be measured on. Subclass it to measure on anything."""

    @abstractmethod
    def load(self) -> RerankingSet:
        """Read the queries, the corpus, the judgements and the candidates; a ``ValueError`` as for retrieval."""


@dataclass(eq=False)
class EvaluationFolder(EvaluationSource):
    """A folder in the manner of BEIR and MTEB: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels.tsv``.

    A row of the two JSONL files has ``id`` (or ``_id``) and any of ``text``, ``image``, ``video``; paths are relative
    to the folder. ``title`` is put before the text, as MTEB does, ``instruction`` is what the model is told to do with
    it, and ``metadata`` is not read. ``qrels.tsv`` has query id, corpus id and an integer grade, and may have a header.
    Queries without judgements are left out.

    Args:
        path: The folder.
        name: What metrics call it; the folder's name if null.
        allow_outside: Other folders whose images and videos the rows may name; they would be refused otherwise.
        query_instruction: What the model is told to do with queries that have no ``instruction``; empty for nothing,
            null for the backbone's.
        document_instruction: The same for documents.
    """

    path: str
    name: str | None = None
    allow_outside: list[str] | None = None
    query_instruction: str | None = None
    document_instruction: str | None = None

    def load(self) -> EvaluationSet:
        """See `EvaluationSource.load`."""
        folder = Path(self.path)
        root = Folder.of(self.path, self.allow_outside)
        for name in ("qrels.tsv", "queries.jsonl", "corpus.jsonl"):
            root.locate(name, "data", self.path)
        qrels = _read_qrels(folder / "qrels.tsv")
        queries = _read_items(folder / "queries.jsonl", "query", root, self.query_instruction)
        for query in qrels.keys() - queries.keys():
            raise ValueError(f"{folder / 'qrels.tsv'}: query {query!r} is not in {folder / 'queries.jsonl'}.")
        queries = {name: item for name, item in queries.items() if name in qrels}
        corpus = _read_items(folder / "corpus.jsonl", "document", root, self.document_instruction)
        missing = {document for judged in qrels.values() for document in judged} - corpus.keys()
        if missing:
            warnings.warn(
                f"{folder}: {len(missing)} documents of qrels.tsv are not in corpus.jsonl (such as {min(missing)!r}); "
                "they count as documents that nothing can find.",
                stacklevel=2,
            )
        name = self.name or folder.resolve().name
        return EvaluationSet(name, [*queries.values()], [*corpus.values()], [*queries], [*corpus], qrels)


@dataclass(eq=False)
class EvaluationRows(EvaluationSource):
    """Training rows as a retrieval measurement.

    The corpus is all their documents, the queries are those with a positive, equal ones once. A document's grade is its
    label, or 1 for a positive and 0 for a negative; where rows of a query disagree, the highest counts.

    Args:
        rows: The training rows.
        name: What metrics call it; the name of the file if null.
    """

    rows: Source
    name: str | None = None

    def load(self) -> EvaluationSet:
        """See `EvaluationSource.load`; raises also for a label that is no whole number."""
        queries: dict[str, tuple[int, int]] = {}
        corpus: dict[str, tuple[int, int]] = {}
        qrels: Qrels = {}
        for row in range(len(self.rows)):
            example = self.rows[row]
            query, *documents = (f"{item.id:016x}" for item in (example.query, *example.documents))
            queries.setdefault(query, (row, 0))
            judged = qrels.setdefault(query, {})
            for number, (document, label) in enumerate(zip(documents, example.grades, strict=True), start=1):
                if not label.is_integer():
                    raise ValueError(
                        f"{example.query.origin}: label {label} is no whole number, and metrics take grades 0, 1, 2, "
                        "…: measure on rows with whole labels, or on an evaluation folder."
                    )
                corpus.setdefault(document, (row, number))
                judged[document] = max(int(label), judged.get(document, 0))
        qrels = {query: judged for query, judged in qrels.items() if any(judged.values())}
        items = RowItems(self.rows, [queries[query] for query in qrels]), RowItems(self.rows, [*corpus.values()])
        return EvaluationSet(self.name or self.rows.name, *items, [*qrels], [*corpus], qrels)


class RowItems(Sequence[Item]):
    """Items of training rows, read when asked for, so that only the images of the last row are held in memory.

    The indices are of each item its row, and its index in the row: query, positives, negatives.
    """

    def __init__(self, rows: Source, indices: Sequence[tuple[int, int]]):
        self.rows = rows
        self.indices = indices
        self._last: tuple[int, tuple[Item, ...]] = (-1, ())

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        row, number = self.indices[index]
        if self._last[0] != row:
            example = self.rows[row]
            self._last = row, (example.query, *example.documents)
        return self._last[1][number]


@dataclass(eq=False)
class RerankingRun(RerankingSource):
    """What another model found for the queries of an evaluation set, to be put in a better order.

    Metrics are reported before (``ndcg@10/before``) and after. A query that the run does not have counts 0.

    Args:
        evaluation: The queries, the corpus and the judgements: a folder, or a ``vlmembed.data.EvaluationSource``.
        run: A TREC run file, such as an embedder's ``predict`` writes: lines ``query Q0 document rank score tag``.
        depth: How many documents of each query are candidates, the highest scores first; equal ones (in float32) by
            document name, descending, as ``trec_eval`` does. The file's ranks are not read.
        name: What metrics call it; the evaluation set's name if null.
    """

    evaluation: str | EvaluationSource
    run: str
    depth: int = 100
    name: str | None = None

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth is 1 or more, got {self.depth}.")

    def load(self) -> RerankingSet:
        """See `RerankingSource.load`; raises for a query or document that the evaluation set does not have."""
        evaluation = as_evaluation(self.evaluation)
        run = read_run(Path(self.run), evaluation)
        columns = {name: column for column, name in enumerate(evaluation.document_names)}
        candidates = []
        for query in evaluation.query_names:
            scores = run.get(query, {})
            best = sorted(scores, key=lambda name: (np.float32(scores[name]), name), reverse=True)
            candidates.append([columns[document] for document in best[: self.depth]])
        return RerankingSet(replace(evaluation, name=self.name or evaluation.name), candidates)


@dataclass(eq=False)
class RerankingRows(RerankingSource):
    """Training rows as a reranking measurement: the candidates of a query are the documents of all its rows.

    They stand in the order of hashes of their content, so what is reported as ``before`` is what chance gives.

    Args:
        rows: The training rows.
        name: What metrics call it; the name of the file if null.
    """

    rows: Source
    name: str | None = None

    def load(self) -> RerankingSet:
        """See `RerankingSource.load`."""
        evaluation = EvaluationRows(self.rows, self.name).load()
        columns = {name: column for column, name in enumerate(evaluation.document_names)}
        candidates = [[columns[name] for name in sorted(evaluation.qrels[query])] for query in evaluation.query_names]
        return RerankingSet(evaluation, candidates)


def as_evaluation(value: str | Source | EvaluationSource, split: str = "test") -> EvaluationSet:
    """Load what stands for an evaluation set."""
    if isinstance(value, RerankingSource):
        raise ValueError(f"{type(value).__name__} is for a cross-encoder; an embedder searches a whole corpus.")
    if isinstance(value, str):
        value = EvaluationFolder(value) if _is_evaluation_folder(value) else Rows(value, split)
    return (EvaluationRows(value) if isinstance(value, Source) else value).load()


def as_reranking(value: str | Source | EvaluationSource | RerankingSource, split: str = "test") -> RerankingSet:
    """Load what stands for queries and their candidates."""
    if isinstance(value, EvaluationSource) or (isinstance(value, str) and _is_evaluation_folder(value)):
        what = value if isinstance(value, str) else type(value).__name__
        raise ValueError(
            f"{what}: a cross-encoder reads each query with each of its candidates, and an evaluation set says of none "
            "which they are. Give {class_path: vlmembed.data.RerankingRun, init_args: {evaluation: …, run: FILE.trec}} "
            "with what an embedder's `predict` found, or training rows."
        )
    if isinstance(value, str):
        value = Rows(value, split)
    reranking = (RerankingRows(value) if isinstance(value, Source) else value).load()
    if not any(map(len, reranking.candidates)):
        raise ValueError(f"{reranking.name}: no query has a candidate, so there is nothing to put in order.")
    return reranking


def _is_evaluation_folder(path: str) -> bool:
    return (Path(path) / "corpus.jsonl").exists() or (Path(path) / "queries.jsonl").exists()


def _read_items(path: Path, role: Role, root: Folder, default: str | None) -> dict[str, Item]:
    table = JSONLines(path)
    names: dict[str, str] = {}
    cells: list[Cell] = []
    instructions: list[Any] = []
    for number, row in enumerate(table.__getitems__(range(len(table))), start=1):
        origin = f"{path}, row {number}"
        ids = [row.pop(key) for key in ("id", "_id") if key in row]
        if len(ids) != 1 or not isinstance(ids[0], str | int) or isinstance(ids[0], bool):
            raise ValueError(f"{origin}: expected one 'id' (or '_id'), a string, got {ids!r}.")
        name = str(ids[0])
        if not IDS.fullmatch(name) or name != name.strip():
            raise ValueError(
                f"{origin}: id {name!r} cannot stand in qrels.tsv: it is empty, begins or ends with white space, or "
                "has a tab, a line end or what is no character in it. Replace it in all files of the folder."
            )
        if name in names:
            raise ValueError(f"{origin}: id {name!r} is given twice; first at {names[name]}.")
        row.pop("metadata", None)
        if title := row.pop("title", None):
            body = row.get("text") or ""
            if not isinstance(title, str) or not isinstance(body, str):
                raise ValueError(
                    f"{origin}: 'title' and 'text' are strings where both are given; got {title!r:.100}, {body!r:.100}."
                )
            row["text"] = f"{title} {body}".strip()
        names[name] = f"{origin} (id {name!r})"
        instruction = row.pop("instruction", None)
        instructions.append(default if instruction is None else instruction)
        cells.append((row, role, names[name]))
    items = zip(to_items(cells, root), instructions, strict=True)
    told = (instructed([item], instruction, f"{item.origin}, key 'instruction'")[0] for item, instruction in items)
    return dict(zip(names, told, strict=True))


def _read_qrels(path: Path) -> Qrels:
    qrels: Qrels = {}
    for number, line in _text_lines(path, "query-id, corpus-id and grade, separated by tabs"):
        cells = [cell.strip() for cell in line.split("\t")]
        grade = _number(cells[-1])
        if number == 1 and len(cells) == 3 and math.isnan(grade):  # A header.
            continue
        if len(cells) != 3 or not grade.is_integer() or abs(grade) > MOST_GRADE:
            raise ValueError(f"{path}, row {number}: expected query-id, corpus-id, integer grade; got {line!r:.200}.")
        query, document, grade = cells[0], cells[1], int(grade)
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise ValueError(f"{path}, row {number}: {query!r} and {document!r} had another grade before: {line!r}.")
    if not qrels:
        raise ValueError(f"{path}: the file has no rows.")
    return qrels


def read_run(path: Path, evaluation: EvaluationSet) -> dict[str, dict[str, float]]:
    """Read a TREC run of an evaluation set: query name → document name → score."""
    queries, documents = {*evaluation.query_names}, {*evaluation.document_names}
    run: dict[str, dict[str, float]] = {}
    for number, line in _text_lines(path, "lines 'query Q0 document rank score tag', a TREC run"):
        cells, origin = line.split(), f"{path}, row {number}"
        if len(cells) != 6:
            raise ValueError(f"{origin}: expected 'query Q0 document rank score tag', got {line.strip()!r:.200}.")
        query, document, score = cells[0], cells[2], _number(cells[4])
        if not math.isfinite(score):
            raise ValueError(f"{origin}: score {cells[4]!r} is not a finite number.")
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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _text_lines(path: Path, content: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines that are not blank."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it holds {content}.")
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            yield number, line.rstrip("\r\n")
