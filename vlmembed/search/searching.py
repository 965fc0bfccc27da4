"""The command ``search``: the documents of an index that are nearest to queries, as a TREC run or on the console."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlmembed.data.judgements import trec_lines
from vlmembed.files import whole_file
from vlmembed.late_interaction import Vectors
from vlmembed.search.corpus import CorpusSource, open_corpus
from vlmembed.search.encoding import scan
from vlmembed.search.index import Documents, Index
from vlmembed.search.page import serve
from vlmembed.search.ranking import Engine, Ranking, View, device_of, ranked, rescore, search_by
from vlmembed.search.served import ServedModel, by_instruction, model_input
from vlmembed.types import Item, Pair, Part

PAGE_OPTIONS = (
    "page goes with index, model, other_index, other_model, top_k (1 or more), corpus, device and trust_remote_code, "
    "and with nothing else; other_index and other_model go with page."
)


def search(
    index: str,
    model: str,
    queries: str | None = None,
    query: str | None = None,
    output: str | None = None,
    top_k: int = 100,
    dimension: int | None = None,
    first_stage: int | str | None = None,
    depth: int = 1000,
    reranker: str | None = None,
    corpus: CorpusSource | None = None,
    engine: Engine = "exact",
    probes: int = 32,
    page: bool = False,
    other_index: str | None = None,
    other_model: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Search an index that ``encode`` wrote, in one pass over its shards whatever their size.

    Queries are encoded by the index's model, and compared as it compares; equal scores are ranked by id, descending, as
    ``trec_eval`` does. In two stages, a cheaper comparison finds ``depth`` documents of each query, and the whole
    vectors, MaxSim or a reranker rank these.

    Args:
        index: The folder that ``encode`` wrote.
        model: The model that it was encoded with.
        queries: Queries with ids: a JSONL, CSV or Parquet file (``id`` or ``_id``, and any of ``text``, ``image``,
            ``video``), or an evaluation folder.
        query: The text of one query, instead.
        output: The TREC run to write; null to print the ranking of one query.
        top_k: How many documents to find for each query.
        dimension: Cut vectors to their first numbers, as Matryoshka losses train them for; null for all.
        first_stage: What finds the documents that are ranked: a dimension, ``binary`` (the signs of vectors, with all
            numbers of the query), ``mean`` (of several vectors of an item), or the folder of another index of the same
            corpus, by any model. Null for a single stage.
        depth: How many documents of each query the first stage finds, or the reranker ranks.
        reranker: A cross-encoder that ranks the documents found, by its logits: a folder that ``export`` wrote, or
            anything that Sentence Transformers' ``CrossEncoder`` opens.
        corpus: Where the reranker or the page reads the documents; null for where the index was made from.
        engine: ``exact``, or ``faiss`` or ``lancedb`` where that is installed: they keep lists of near vectors in the
            index's folder, made the first time, and the recall against exact search is printed.
        probes: How many of their lists ``faiss`` and ``lancedb`` look at.
        page: Whether to serve a local page instead, where questions are typed and images dropped.
        other_index: A second index for the page, of any model, to show side by side.
        other_model: The model of ``other_index``.
        device: Where to encode and to compare, such as ``cuda``; null for a GPU if there is one.
        trust_remote_code: Whether to run code that a model brings.
    """
    if page or other_index is not None or other_model is not None:
        elsewhere = [queries, query, output, dimension, first_stage, reranker]
        if not page or elsewhere != [None] * 6 or engine != "exact" or top_k < 1:
            raise ValueError(PAGE_OPTIONS)
        serve([(index, model), (other_index, other_model)], top_k, corpus, device, trust_remote_code)
        return
    _check_counts(top_k, depth, probes, first_stage is not None or reranker is not None)
    if (queries is None) == (query is None) or (queries is not None and output is None):
        raise ValueError("search takes queries (a file) with output (the run to write), or query (a text).")
    opened = Index.open(index)
    if output is not None:
        if Path(output).is_dir():
            raise ValueError(f"{output} is a folder; output is the TREC run to write, a file.")
        opened.refuse_white_space()
    view = View(opened, dimension, device=device_of(device))
    cheaper = None if first_stage is None else first_view(view, first_stage)
    names, items = read_queries(queries) if queries is not None else (["query"], [_question(str(query))])
    documents = Documents(opened, corpus) if reranker is not None else None
    of_model = partial(vectors_of, items=items, device=device, trust_remote_code=trust_remote_code)
    vectors = of_model(opened, model)
    count = top_k if reranker is None else depth
    if cheaper is None:
        ranking = search_by(engine, view, vectors, count, probes)
    else:
        is_same = cheaper.index.model_digest == opened.model_digest
        of_first = vectors if is_same else of_model(cheaper.index, cheaper.index.model)
        rows = same_rows(cheaper.index, opened, search_by(engine, cheaper, of_first, depth, probes).rows)
        ranking = rescore(view, vectors, rows, count)
    if reranker is not None and documents is not None:
        scores = rerank(open_reranker(reranker, device, trust_remote_code), items, documents, ranking.rows)
        ranking = ranked(opened, scores, ranking.rows, top_k)
    if output is None:
        for rank, (name, score) in enumerate(next(ranking.named(opened)), start=1):
            print(f"{rank:4}  {score:.4f}  {name}")
    else:
        write_run(Path(output), names, opened, ranking)
        print(f"{output}: the first {ranking.rows.shape[1]} of {opened.count} documents for {len(names)} queries.")


def _check_counts(top_k: int, depth: int, probes: int, stages: bool) -> None:
    if top_k < 1 or (stages and depth < top_k):
        raise ValueError(f"top_k is 1 or more, and depth at least top_k; got {top_k} and {depth}.")
    if probes < 1:
        raise ValueError(f"probes is 1 or more, got {probes}.")


def read_queries(path: str) -> tuple[list[str], list[Item]]:
    """Read ids and contents of all queries; a ``ValueError`` names the row of one that has none."""
    corpus = open_corpus(path, "query")
    scan(corpus)
    names, items = zip(*map(corpus.read, range(len(corpus))), strict=True)
    for row, name in enumerate(names):
        if len(name.split()) != 1:
            raise ValueError(f"{corpus.origin(row)}: id {name!r} has white space, which a TREC run cannot hold.")
    return [*names], [*items]


def vectors_of(
    index: Index, model: str, items: Sequence[Item], device: str | None = None, trust_remote_code: bool = False
) -> Vectors:
    """Encode queries by an index's model, in float32 on the host; a ``ValueError`` says that it is another one."""
    engine = ServedModel.open(model, device=device, trust_remote_code=trust_remote_code)
    index.refuse_other(engine.digest, model)
    return engine.encode(items, "query")


def first_view(view: View, first_stage: int | str) -> View:
    """Return what the first stage looks at."""
    if isinstance(first_stage, int) or first_stage.isdecimal():
        return replace(view, dimension=int(first_stage))
    if first_stage in ("binary", "mean"):
        return replace(view, signs=first_stage == "binary", means=first_stage == "mean")
    return replace(view, index=Index.open(first_stage), dimension=None)


def same_rows(source: Index, target: Index, rows: Int64[Tensor, "Q C"]) -> Int64[Tensor, "Q C"]:
    """Return the rows of the same ids in another index; -1 stays."""
    if source is target:
        return rows
    places = pc.index_in(source.ids, value_set=target.ids.combine_chunks())
    if places.null_count:
        missing = source.ids.filter(pc.is_null(places))[0].as_py()
        raise ValueError(f"{source.folder}: its id {missing!r} is not in {target.folder}: they are of other corpora.")
    return torch.from_numpy(places.to_numpy().astype(np.int64))[rows.clamp(min=0)].where(rows >= 0, -1)


def write_run(path: Path, queries: Sequence[str], index: Index, ranking: Ranking) -> None:
    """Write a TREC run of all queries, whole or not at all."""
    with whole_file(path) as draft, draft.open("w", encoding="utf-8") as file:
        for query, documents in zip(queries, ranking.named(index), strict=True):
            file.writelines(trec_lines(query, documents))


def _question(text: str) -> Item:
    if not text.strip():
        raise ValueError("query is empty; give the text to search for.")
    return Item("query", (Part("text", text),), "--query")


#: Pairs that are open at a time, which Sentence Transformers sorts by length.
PAIRS = 256


def open_reranker(model: str, device: str | None = None, trust_remote_code: bool = False) -> Any:
    """Open a cross-encoder that gives one score for a pair; a ``ValueError`` says that it gives another number."""
    from sentence_transformers import CrossEncoder  # Takes seconds.

    reranker = CrossEncoder(model, device=device, trust_remote_code=trust_remote_code)
    if reranker.num_labels != 1:
        raise ValueError(f"{model} gives {reranker.num_labels} scores for a pair; a reranker gives one.")
    return reranker


def logits(reranker: Any, pairs: Sequence[Pair], batch_size: int = 32) -> list[float]:
    """Return the logit of each pair; a ``ValueError`` names the document of one that is not finite."""
    # Each distinct item is opened once.
    opened = {item.id: item for pair in pairs for item in (pair.query, pair.document)}
    contents = {key: model_input(item) for key, item in opened.items()}
    inputs: list[Any] = [(contents[pair.query.id], contents[pair.document.id]) for pair in pairs]
    for index, (query, document) in enumerate(inputs):
        if query.keys() == document.keys() == {"text"}:
            inputs[index] = query["text"], document["text"]  # Rerankers of text take nothing else.
    options: Any = {"activation_fn": torch.nn.Identity(), "convert_to_tensor": True, "show_progress_bar": False}
    scores = [math.nan] * len(pairs)
    for prompt, places in by_instruction(pair.query for pair in pairs).items():
        of_prompt = reranker.predict(
            [inputs[place] for place in places], prompt=prompt, batch_size=batch_size, **options
        )
        for place, logit in zip(places, of_prompt.tolist(), strict=True):
            scores[place] = logit
    for pair, logit in zip(pairs, scores, strict=True):
        if not math.isfinite(logit):
            raise ValueError(f"{pair.document.origin}: the reranker's score is {logit}, not a finite number.")
    return scores


def rerank(
    reranker: Any, queries: Sequence[Item], documents: Documents, rows: Int64[Tensor, "Q C"]
) -> Float[Tensor, "Q C"]:
    """Score what a first stage has found for each query: rows of the index, or -1."""
    scores = torch.full(rows.shape, -torch.inf)
    for part in (rows >= 0).nonzero().split(PAIRS):
        read = {row: documents[row] for row in rows[tuple(part.T)].unique().tolist()}
        pairs = [Pair(queries[query], read[int(rows[query, place])]) for query, place in part.tolist()]
        scores[tuple(part.T)] = torch.tensor(logits(reranker, pairs))
    return scores
