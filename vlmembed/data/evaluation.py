"""Evaluation sets: queries, a corpus, judgements and candidates, from tables, folders, training rows and TREC runs."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmembed.data.cells import Folder
from vlmembed.data.columns import nearest
from vlmembed.data.judgements import (
    Contents,
    Entry,
    LazyItems,
    Place,
    Places,
    Qrels,
    as_items,
    as_rows,
    columns_of,
    find_sets,
    first_documents,
    read_contents,
    read_judgements,
    read_run,
    to_id,
)
from vlmembed.data.pages import Pages
from vlmembed.data.rows import Rows, Table
from vlmembed.data.sources import Source
from vlmembed.data.streaming import refuse_streams
from vlmembed.data.tables import configurations
from vlmembed.types import EvaluationSet, Item, RerankingSet

#: Suffixes of files: a path with one of these, if there is none, is no Hub id.
FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".tar", ".arrow", ".lance")

#: Columns of queries: ids of the documents that answer them, and of those that they are ranked against.
POSITIVES, CANDIDATES = "positives", "candidates"


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
class EvaluationTables(EvaluationSource):
    """Queries, a corpus and judgements, each in a table of its own.

    The columns of a corpus are an id (``id``, ``_id``, ``corpus-id``, ``corpus_id``, ``did``, ``docid``) and
    ``document``, or any of ``title``, ``text``, ``image``, ``video``, ``audio``, ``pdf``; those of queries an id (also
    ``query-id``, ``qid``) and ``query``, or the same others. Name them with ``columns`` or ``cells``; others are not
    read. Queries without judgements are left out. ``instruction`` is what the model is told to do with an item.

    Args:
        corpus: The documents: a ``vlmembed.data.Table``, the path of a file, or ``vlmembed.data.Pages``.
        queries: The queries. A column ``candidates`` has ids of documents: the query is ranked against them alone.
        qrels: Query id, corpus id and grade, which is 1 where there is no such column; or a ``.tsv``, ``.txt``,
            ``.trec`` or ``.qrels`` file of such lines, also as TREC has them (``query 0 document grade``). Null where
            the queries have a column ``positives``, the id of a document or a list of them.
        name: What metrics call it; the name of the queries' file if null.
        group_by: A column of the queries, such as ``language``: metrics are the mean over its values, and those of each
            value by itself, ``english/ndcg@10``.
        query_instruction: What the model is told to do with queries that have no ``instruction``; empty for nothing,
            null for the backbone's.
        document_instruction: The same for documents.
    """

    corpus: str | Table | Pages
    queries: str | Table
    qrels: str | Table | None = None
    name: str | None = None
    group_by: str | None = None
    query_instruction: str | None = None
    document_instruction: str | None = None

    def load(self) -> EvaluationSet:
        """See `EvaluationSource.load`."""
        table = as_rows(self.queries)
        queries = read_contents(table, "query", self.query_instruction, [POSITIVES, CANDIDATES], self.group_by)
        corpus = read_contents(as_rows(self.corpus), "document", self.document_instruction)
        columns = columns_of(table)
        has_positives = POSITIVES in columns
        if has_positives == (self.qrels is not None):
            what = "both in qrels and" if has_positives else "neither in qrels nor"
            raise ValueError(f"{queries.origin}: judgements are {what} in a column {POSITIVES!r} of the queries.")
        qrels, origin = _positives(queries, corpus) if self.qrels is None else read_judgements(self.qrels)
        if isinstance(table, Table) and table.where:  # Judgements of the queries that are left out are none of ours.
            qrels = {query: judged for query, judged in qrels.items() if query in queries.entries}
        evaluation = _judged(self.name or table.name, queries, corpus, qrels, origin)
        if CANDIDATES not in columns:
            return evaluation
        return replace(evaluation, candidates=_candidates(queries, corpus, evaluation.query_names))


@dataclass(eq=False)
class EvaluationFolder(EvaluationSource):
    """A folder or Hub id in the manner of BEIR, MTEB and ViDoRe: a corpus, queries and judgements.

    In a folder they are ``corpus.jsonl``, ``queries.jsonl`` and ``qrels.tsv``, or other files and folders of these
    names, or ``qrels/test.tsv``; on the Hub, configurations ``corpus``, ``queries`` (``query``) and ``qrels``
    (``default``). The columns are those of `EvaluationTables`; paths are relative to the folder, ``title`` is put
    before the text, as MTEB does. ``qrels.tsv`` has query id, corpus id and an integer grade, and may have a header.
    Queries without judgements are left out. Configurations such as ``english-queries`` make a subset ``english``:
    metrics are the mean over subsets, and those of each by itself, ``english/ndcg@10``.

    Args:
        path: The folder, or Hub id.
        name: What metrics call it; the folder's name if null.
        allow_outside: Other folders whose images, videos and audio the rows may name; they would be refused otherwise.
        split: Which split of the judgements, such as ``dev``; null for ``test``, or the only one.
        subset: Which subset; null for all.
        revision: The Hub revision: a branch, tag or commit.
        group_by: A column of the queries, such as ``language``, whose values are subsets.
        query_instruction: What the model is told to do with queries that have no ``instruction``; empty for nothing,
            null for the backbone's.
        document_instruction: The same for documents.
    """

    path: str
    name: str | None = None
    allow_outside: list[str] | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    group_by: str | None = None
    query_instruction: str | None = None
    document_instruction: str | None = None

    def load(self, usual_split: str = "test") -> EvaluationSet:
        """Load the split that was asked for, or the usual one, or the only one that there is."""
        name, sets = self.name or Path(self.path).resolve().name, self.sets()
        if "" in sets:
            return self._load(name, sets[""], usual_split, {})
        if self.group_by is not None:
            raise ValueError(f"{self.path}: it has subsets {', '.join(sets)}; choose one, or drop group_by.")
        corpora: dict[Place, Contents] = {}
        loaded = {subset: self._load(subset, places, usual_split, corpora) for subset, places in sets.items()}
        return _joined(name, loaded, {subset: corpora[places["corpus"]] for subset, places in sets.items()})

    def sets(self) -> dict[str, Places]:
        """Return where all subsets are, by name, or a single set, whose name is empty."""
        sets = find_sets(self.path, self.revision)
        if not sets:
            known = ", ".join(configurations(self.path, self.revision))
            raise ValueError(
                f"{self.path}: no evaluation set. A folder has corpus.jsonl, queries.jsonl and qrels.tsv, or folders "
                "corpus, queries and qrels; a Hub id configurations of these names"
                + (f", and this one has {known}." if known else ".")
            )
        if self.subset is not None and self.subset not in sets:
            known = ", ".join(filter(None, sets)) or "none, but is a single set"
            raise ValueError(f"{self.path}: no subset {self.subset!r}{nearest(self.subset, sets)}; it has {known}.")
        if self.subset is not None or "" in sets:
            return {"": sets[self.subset or ""]}
        return sets

    def _load(self, name: str, places: Places, usual_split: str, corpora: dict[Place, Contents]) -> EvaluationSet:
        """Load one set; a corpus that several have is read once."""
        root = Folder.of(self.path, self.allow_outside)
        for place in places.values():
            place.check(root)
        split = places["qrels"].choose(root, self.split or usual_split, self.split is not None)

        def table(role: str) -> Table:
            return places[role].open(root, split, self.revision, self.allow_outside)

        lines = places["qrels"].file_of(split)
        qrels, origin = read_judgements(str(lines) if lines else table("qrels"))
        queries = read_contents(table("queries"), "query", self.query_instruction, group_by=self.group_by)
        if places["corpus"] not in corpora:
            corpora[places["corpus"]] = read_contents(table("corpus"), "document", self.document_instruction)
        return _judged(name, queries, corpora[places["corpus"]], qrels, origin)


@dataclass(eq=False)
class EvaluationRows(EvaluationSource):
    """Training rows as a retrieval measurement.

    The corpus is all their documents, the queries are those with a positive, equal ones once. A document's grade is its
    label, or 1 for a positive and 0 for a negative; where rows of a query disagree, the highest counts.

    Args:
        rows: The training rows.
        name: What metrics call it; the name of the file if null.
        within_row: Whether each row is a query of its own, ranked against the documents of its row alone.
    """

    rows: Source
    name: str | None = None
    within_row: bool = False

    def load(self) -> EvaluationSet:
        """See `EvaluationSource.load`; raises also for a label that is no whole number."""
        refuse_streams(self.rows, "a measurement")
        queries: dict[str, tuple[int, int]] = {}
        corpus: dict[str, tuple[int, int]] = {}
        qrels: Qrels = {}
        for row in range(len(self.rows)):
            example = self.rows[row]
            query, *documents = (f"{item.id:016x}" for item in (example.query, *example.documents))
            if self.within_row:
                query = str(row + 1)
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
        evaluation = EvaluationSet(self.name or self.rows.name, *items, [*qrels], [*corpus], qrels)
        if not self.within_row:
            return evaluation
        columns = {name: column for column, name in enumerate(corpus)}
        return replace(evaluation, candidates=[[*map(columns.__getitem__, judged)] for judged in qrels.values()])


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
            candidates.append([columns[document] for document in first_documents(run.get(query, {}), self.depth)])
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
    if isinstance(value, str) and is_evaluation_folder(value):
        return EvaluationFolder(value).load(split)
    value = Rows(value, split) if isinstance(value, str) else value
    return (EvaluationRows(value) if isinstance(value, Source) else value).load()


def as_reranking(value: str | Source | EvaluationSource | RerankingSource, split: str = "test") -> RerankingSet:
    """Load what stands for queries and their candidates."""
    source = value
    if isinstance(source, str):
        source = EvaluationFolder(source) if is_evaluation_folder(source) else Rows(source, split)
    if isinstance(source, EvaluationSource):
        # Not those of a folder's subsets, which are whole corpora.
        evaluation = None if isinstance(source, EvaluationFolder) else source.load()
        if evaluation is None or evaluation.candidates is None:
            what = value if isinstance(value, str) else type(value).__name__
            raise ValueError(
                f"{what}: a cross-encoder reads each query with each of its candidates, and an evaluation set says of "
                "none which they are. Give {class_path: vlmembed.data.RerankingRun, init_args: {evaluation: …, run: "
                "FILE.trec}} with what an embedder's `predict` found, or training rows."
            )
        return RerankingSet(evaluation, evaluation.candidates)
    reranking = (RerankingRows(source) if isinstance(source, Source) else source).load()
    if not any(map(len, reranking.candidates)):
        raise ValueError(f"{reranking.name}: no query has a candidate, so there is nothing to put in order.")
    return reranking


def is_evaluation_folder(path: str) -> bool:
    """Tell a folder or Hub id with a corpus and queries from other data sets."""
    if Path(path).exists() or Path(path).suffix.lower() in FILES:
        return Path(path).is_dir() and bool(find_sets(path))
    try:
        return bool(find_sets(path))
    except ValueError:  # It is no Hub id either; opening it as rows says so.
        return False


def _positives(queries: Contents, corpus: Contents) -> tuple[Qrels, str]:
    """Return the judgements that a column of the queries is; a query without any has none."""
    listed = _listed(queries, corpus, POSITIVES, queries.entries)
    qrels = {query: dict.fromkeys(names, 1) for query, names in listed.items() if names}
    return qrels, f"{queries.origin}, column {POSITIVES!r}"


def _candidates(queries: Contents, corpus: Contents, names: Collection[str]) -> list[list[int]]:
    """Return the columns of the candidates of some queries."""
    columns = {document: column for column, document in enumerate(corpus.entries)}
    listed = _listed(queries, corpus, CANDIDATES, names)
    for query, found in listed.items():
        origin = f"{queries.origin}, query {query!r}, column {CANDIDATES!r}"
        if not found:
            raise ValueError(f"{origin}: the query has no candidates; give it some, or leave it out by where.")
        if twice := [name for name, count in Counter(found).items() if count > 1]:
            raise ValueError(f"{origin}: {twice[0]!r} is there twice.")
    return [[columns[name] for name in found] for found in listed.values()]


def _listed(queries: Contents, corpus: Contents, column: str, names: Collection[str]) -> dict[str, list[str]]:
    """Return the ids of documents in a column of some queries, by query."""
    known, listed = corpus.entries, {}
    for query in names:
        value, origin = queries.more[query][column], f"{queries.origin}, query {query!r}, column {column!r}"
        values = value if isinstance(value, list) else [] if value is None or value == "" else [value]
        listed[query] = [to_id(single, origin) for single in values]
        for name in listed[query]:
            if name not in known:
                raise ValueError(f"{origin}: the id {name!r} is not in {corpus.origin}{nearest(name, known)}.")
    return listed


def _judged(name: str, queries: Contents, corpus: Contents, qrels: Qrels, origin: str) -> EvaluationSet:
    """Put an evaluation set together."""
    if unknown := qrels.keys() - queries.entries.keys():
        query = min(unknown)
        raise ValueError(f"{origin}: query {query!r} is not in {queries.origin}{nearest(query, queries.entries)}.")
    names = [name for name in queries.entries if name in qrels]
    if not names:
        raise ValueError(f"{origin}: no query is judged.")
    judged = {document for documents in qrels.values() for document in documents}
    if missing := judged - corpus.entries.keys():
        some = f"(such as {min(missing)!r})"
        if len(missing) == len(judged):
            raise ValueError(
                f"{origin}: none of the {len(judged)} judged documents {some} is in {corpus.origin}, whose ids are "
                f"such as {next(iter(corpus.entries))!r}."
            )
        warnings.warn(
            f"{origin}: {len(missing)} documents {some} are not in {corpus.origin}; they count as documents that "
            "nothing can find.",
            stacklevel=4,
        )
    items = as_items(map(queries.entries.__getitem__, names)), as_items(corpus.entries.values())
    subsets = [queries.groups[query] for query in names] if queries.groups else None
    return EvaluationSet(name, *items, names, [*corpus.entries], qrels, subsets=subsets)


def _joined(name: str, sets: Mapping[str, EvaluationSet], corpora: Mapping[str, Contents]) -> EvaluationSet:
    """Make one set of several, each a subset with a corpus of its own, or with one that several share."""
    queries: dict[str, Entry] = {}
    documents: dict[str, Entry] = {}
    qrels: Qrels = {}
    candidates: list[range] = []
    subsets: list[str] = []
    columns: dict[int, tuple[str, range]] = {}  # Of each corpus, what its names begin with, and its columns.
    for subset, one in sets.items():
        corpus = corpora[subset].entries
        if id(corpus) not in columns:
            columns[id(corpus)] = subset, range(len(documents), len(documents) + len(corpus))
            documents |= {f"{subset}/{document}": entry for document, entry in corpus.items()}
        prefix, own = columns[id(corpus)]
        entries = one.queries.entries if isinstance(one.queries, LazyItems) else one.queries
        queries |= zip((f"{subset}/{query}" for query in one.query_names), entries, strict=True)
        for query, judged in one.qrels.items():
            qrels[f"{subset}/{query}"] = {f"{prefix}/{document}": grade for document, grade in judged.items()}
        candidates += [own] * len(one.queries)
        subsets += [subset] * len(one.queries)
    items = as_items(queries.values()), as_items(documents.values())
    ranked = candidates if len(columns) > 1 else None
    return EvaluationSet(name, *items, [*queries], [*documents], qrels, ranked, subsets)
