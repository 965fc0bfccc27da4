"""``python -m vlmembed mine``: hard negatives, found by an embedder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from vlmembed.data import EvaluationSource, Source
from vlmembed.mining.embedding import Embedder
from vlmembed.mining.negatives import Choice, hard_negatives
from vlmembed.mining.pool import Pool, gather, open_rows
from vlmembed.mining.writing import RowWriter


def mine(
    model: str,
    rows: str | Source,
    output: str,
    corpus: str | Source | EvaluationSource | None = None,
    negatives: int = 7,
    depth: int = 100,
    skip: int = 0,
    margin: float | None = 0.0,
    relative_margin: float | None = 0.05,
    max_score: float | None = None,
    batch_size: int = 32,
    cache: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Find hard negatives of training rows with an embedder, and write the rows with them.

    For each query, the documents that the embedder finds most similar to it, without its right answers, whatever shows
    the same pictures as one of them (the pixels count, not the files), and whatever is so similar that it probably is a
    right answer that nobody labelled: see ``margin`` and ``relative_margin``, which are NV-Retriever's positive-aware
    thresholds (arXiv:2407.15831). Negatives that a row has already stay, before those that are found. A row of which
    none are left is not written.

    Sentence Transformers' ``mine_hard_negatives`` does this for strings only: it compares and groups documents as keys
    of a dictionary, which mappings cannot be and open images are by identity, and its cache knows a model by its name.

    Args:
        model: The embedder: a folder written by ``export``, or anything that Sentence Transformers opens.
        rows: Training rows: a path or Hub id, or a ``vlmembed.data.Source``.
        output: The JSONL file to write. Images that are in no file are written beside it.
        corpus: Where to look: an evaluation folder's corpus, the documents of other rows, or a
            ``vlmembed.data.EvaluationSource``; null for the documents of ``rows``.
        negatives: How many to find for each row, at most.
        depth: How many of the most similar documents to look at.
        skip: How many that could be taken to leave out, from the most similar one on.
        margin: How much less similar than the query's right answer a negative must be; than the least similar one, if
            there are several. Null for no such limit.
        relative_margin: The same, as a share of the right answer's similarity.
        max_score: The largest similarity of a negative; null for no such limit.
        batch_size: Items that go through the model at once.
        cache: A folder to keep embeddings in: the same content, embedded with the same files of a model, is not
            embedded twice. Null to keep none.
        trust_remote_code: Whether to run code that the model brings.

    Raises:
        ValueError: If something cannot be read, or no row has a negative.
    """
    choice = Choice(negatives, depth, skip, margin, relative_margin, max_score)
    source = open_rows(rows)
    pool = gather(source, corpus)
    embedder = Embedder(model, batch_size, cache, trust_remote_code)
    queries, documents = embedder.embed(pool.queries, "query"), embedder.embed(pool.documents, "document")
    chosen, reasons = hard_negatives(pool, queries, documents, embedder.model.similarity, choice)
    with RowWriter(Path(output)) as writer:
        _write(writer, source, pool, chosen)
        if not writer.count:
            raise ValueError(
                f"No row of {source.name} has a negative among {pool.candidates} documents. Lower margin and "
                "relative_margin, raise max_score or depth, or give a larger corpus."
            )
    _report(writer, pool, chosen, reasons, choice)


def _write(writer: RowWriter, rows: Source, pool: Pool, chosen: list[list[int]]) -> None:
    contents = pool.documents.contents
    for row, query in enumerate(pool.query_of_row):
        example = rows[row]
        new = [number for number in chosen[query] if contents[number].whole not in pool.given[row]]
        if example.negatives or new:
            found = [pool.documents[number] for number in new]
            writer.write(example.query, example.positives, (*example.negatives, *found))


def _report(writer: RowWriter, pool: Pool, chosen: list[list[int]], reasons: Counter[str], choice: Choice) -> None:
    fewer = sum(len(each) < choice.count for each in chosen)
    print(
        f"{writer.path}: {writer.count} of {len(pool.query_of_row)} rows, with {sum(map(len, chosen))} hard negatives "
        f"of {len(pool.queries)} queries among {pool.candidates} distinct documents."
    )
    for reason, count in reasons.most_common():
        print(f"  {count} candidates were left out: {reason}.")
    if fewer:
        print(f"  {fewer} queries have fewer than {choice.count}; a row without any is not written.")
