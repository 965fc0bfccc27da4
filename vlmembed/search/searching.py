"""The command ``search``: the documents of an index that are nearest to queries, as a TREC run or on the console."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Int64
from torch import Tensor

from vlmembed.data.beir import find_sets
from vlmembed.data.cells import Folder
from vlmembed.data.judgements import as_items, as_rows, read_contents
from vlmembed.data.rows import Table
from vlmembed.files import whole_file
from vlmembed.late_interaction import MultiVectors, Vectors
from vlmembed.search.index import Index
from vlmembed.search.ranking import Ranking, View, rescore, search_exact
from vlmembed.search.served import ServedModel
from vlmembed.types import Item, Part


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
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Search an index that ``encode`` wrote, exactly, in one pass over its shards whatever their size.

    Queries are encoded by the index's model, and compared as it compares; equal scores are ranked by id, descending, as
    ``trec_eval`` does. In two stages, a cheaper comparison finds ``depth`` documents of each query, and the whole
    vectors or MaxSim rank these.

    Args:
        index: The folder that ``encode`` wrote.
        model: The model that it was encoded with.
        queries: Queries with ids: a JSONL, CSV or Parquet file (``id`` or ``_id``, and any of ``text``, ``image``,
            ``video``), or an evaluation folder.
        query: The text of one query, instead.
        output: The TREC run to write; null to print, of one query, what is found.
        top_k: How many documents to find for each query.
        dimension: Cut vectors to their first numbers, as Matryoshka losses train them for; null for all.
        first_stage: What finds the documents that are ranked: a dimension, ``binary`` (the signs of vectors, with all
            numbers of the query), ``mean`` (of several vectors of an item), or the folder of another index of the same
            corpus, by any model. Null for a single stage.
        depth: How many documents of each query the first stage finds.
        device: Where to encode and to compare, such as ``cuda``; null for a GPU if there is one.
        trust_remote_code: Whether to run code that a model brings.
    """
    if top_k < 1 or (first_stage is not None and depth < top_k):
        raise ValueError(f"top_k is 1 or more, and depth at least top_k; got {top_k} and {depth}.")
    if (queries is None) == (query is None) or (queries is not None and output is None):
        raise ValueError("search takes queries (a file) with output (the run to write), or query (a text).")
    opened = Index.open(index)
    if output is not None:
        opened.refuse_white_space()
    view = View(opened, dimension, device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    cheaper = None if first_stage is None else first_view(view, first_stage)
    names, items = read_queries(queries) if queries is not None else (["query"], [_question(str(query))])
    engine = ServedModel.open(model, device=device, trust_remote_code=trust_remote_code)
    opened.refuse_other(engine.digest, model)
    vectors = encode_queries(engine, items)
    if cheaper is None:
        ranking = search_exact(view, vectors, top_k)
    else:
        of_model = cheaper.index.manifest["model"]
        of_first = vectors
        if cheaper.index.manifest["model_digest"] != engine.digest:
            first_engine = ServedModel.open(of_model, device=device, trust_remote_code=trust_remote_code)
            cheaper.index.refuse_other(first_engine.digest, of_model)
            of_first = encode_queries(first_engine, items)
        rows = same_rows(cheaper.index, opened, search_exact(cheaper, of_first, depth).rows)
        ranking = rescore(view, vectors, rows, top_k)
    if output is None:
        for rank, (name, score) in enumerate(next(found(opened, ranking)), start=1):
            print(f"{rank:4}  {score:.4f}  {name}")
    else:
        write_run(Path(output), names, opened, ranking)
        print(f"{output}: the first {ranking.rows.shape[1]} of {opened.count} documents for {len(names)} queries.")


def read_queries(path: str) -> tuple[list[str], Sequence[Item]]:
    """Read ids and contents of queries: of a file, or of all queries of an evaluation folder."""
    table: str | Table = path
    if sets := find_sets(path) if Path(path).is_dir() else {}:
        if "" not in sets:
            raise ValueError(f"{path}: it has subsets {', '.join(sets)}. Give the file of the queries of one.")
        place = sets[""]["queries"]
        table = place.open(place.choose(Folder.of(path, None), "test", is_exact=False), None, None)
    contents = read_contents(as_rows(table), "query", None)
    for name in contents.names:
        if len(name.split()) != 1:
            raise ValueError(f"{contents.origin}: id {name!r} has white space in it, which a TREC run cannot hold.")
    if not contents.names:
        raise ValueError(f"{contents.origin}: there are no queries in it.")
    return contents.names, as_items(contents.entries)


def encode_queries(engine: ServedModel, items: Sequence[Item]) -> Vectors:
    """Encode queries, in float32 on the host."""
    encoded = engine.encode(items, "query")
    if isinstance(encoded, Tensor):
        return encoded
    return MultiVectors(torch.cat(encoded), torch.tensor([*map(len, encoded)]))


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
    """Write a TREC run: lines ``query Q0 document rank score vlmembed``."""
    with whole_file(path) as draft, draft.open("w", encoding="utf-8") as file:
        for query, documents in zip(queries, found(index, ranking), strict=True):
            for rank, (name, score) in enumerate(documents, start=1):
                # Nine digits bring every float32 back: whoever reads the run gets this order from it.
                file.write(f"{query} Q0 {name} {rank} {score:.9g} vlmembed\n")


def found(index: Index, ranking: Ranking) -> Iterator[list[tuple[str, float]]]:
    """Yield ids and scores of the documents of each query."""
    for scores, rows in zip(ranking.scores, ranking.rows, strict=True):
        yield [*zip(index.ids.take(pa.array(rows[rows >= 0].numpy())).to_pylist(), scores.tolist(), strict=False)]


def _question(text: str) -> Item:
    if not text.strip():
        raise ValueError("query is empty; give the text to search for.")
    return Item("query", (Part("text", text),), "--query")
