"""The command ``mine``: hard negatives of training rows, chosen by an embedder's similarities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vlmembed.data import EvaluationSource, Rows, Source
from vlmembed.data.evaluation import as_evaluation
from vlmembed.data.streaming import refuse_streams
from vlmembed.mining.choice import Choice, Pool, choose
from vlmembed.mining.embedding import Embedder, Embeddings, Entry, identify
from vlmembed.mining.indexed import IndexedCandidates
from vlmembed.mining.scoring import unscored, write_rows
from vlmembed.search.served import find_folder
from vlmembed.types import Example, Item

#: Items that are in memory at the same time.
ITEMS = 256


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
    index: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Find hard negatives of training rows with an embedder, and write the rows with them.

    For each query, the documents that the embedder finds most similar to it, without its positives, whatever shows the
    same images as one of them (the pixels count, not the files), and whatever is so similar that it probably is a
    positive that nobody labelled: see ``margin`` and ``relative_margin``, which are NV-Retriever's positive-aware
    thresholds (arXiv:2407.15831). Negatives that a row has already stay, before the new ones; a row without any is not
    written. Sentence Transformers' ``mine_hard_negatives`` does this for strings only. Instructions of rows take the
    place of the embedder's prompts, and are written with them.

    Args:
        model: The embedder: a folder written by ``export``, or anything that Sentence Transformers opens; a
            multi-vector model compares by MaxSim.
        rows: Training rows: a path or Hub id, or a ``vlmembed.data.Source``.
        output: The JSONL file to write. Images that are in no file are written beside it.
        corpus: Where to look: an evaluation folder's corpus, the documents of other rows, or a
            ``vlmembed.data.EvaluationSource``; null for the documents of ``rows``, or those of ``index``.
        negatives: How many to find for each row, at most.
        depth: How many of the most similar documents to look at.
        skip: How many that could be taken to leave out, from the most similar one on.
        margin: How much less similar than the query's (least similar) positive a negative must be; null for no limit.
        relative_margin: The same, as a share of the positive's similarity.
        max_score: The largest similarity of a negative; null for no such limit.
        batch_size: Items that go through the model at once.
        cache: A folder of embeddings: the same content is not embedded twice with the same files of a model.
        index: The folder that ``encode`` wrote of the corpus with this model: its embeddings are not computed again,
            nor held in memory, and only documents that may be taken are read. Null to embed the corpus.
        trust_remote_code: Whether to run code that the model brings.
    """
    choice = Choice(negatives, depth, skip, margin, relative_margin, max_score)
    source = Rows(rows) if isinstance(rows, str) else rows
    refuse_streams(source, "mining")
    indexed = None if index is None else IndexedCandidates(index, model, corpus)
    pool = gather(source, corpus, is_indexed=indexed is not None)
    embedder = Embedder(model if indexed is None else str(find_folder(model)), batch_size, cache, trust_remote_code)
    queries, documents = embedder.embed(pool.queries, "query"), embedder.embed(pool.documents, "document")
    if indexed is None:
        chosen, reasons = hard_negatives(pool, queries, documents, embedder.model.similarity, choice)
    else:
        chosen, reasons = indexed.hard_negatives(pool, queries, documents, choice)
    count = write_rows(Path(output), _with_negatives(source, pool, chosen))
    print(
        f"{output}: {count} of {len(source)} rows, with {sum(map(len, chosen.values()))} hard negatives of "
        f"{len(pool.queries)} queries among {pool.candidates} distinct documents."
    )
    for reason, count in reasons.most_common():
        print(f"  {count} candidates were left out: {reason}.")
    if fewer := sum(len(documents) < negatives for documents in chosen.values()):
        print(f"  {fewer} queries have fewer than {negatives}; a row without any is not written.")


def _with_negatives(rows: Source, pool: Pool, chosen: dict[str, list[str]]) -> Iterator[Example]:
    count = 0
    for row, (query, present) in enumerate(pool.rows):
        example = rows[row]
        new = tuple(pool.documents[content].read() for content in chosen[query] if content not in present)
        if example.negatives or new:
            yield replace(example, negatives=example.negatives + new)
            count += 1
    if not count:
        raise ValueError(
            f"No row of {rows.name} has a negative among {pool.candidates} documents. Lower margin and "
            "relative_margin, raise max_score or depth, or give a larger corpus."
        )


def gather(rows: Source, corpus: str | Source | EvaluationSource | None, is_indexed: bool = False) -> Pool:
    """Read all rows once, and the corpus; without one, the rows' documents are the candidates.

    Where the candidates are those of an index, of documents only the positives are read.
    """

    def read(row: int, rank: int) -> Item:
        return _items(rows[row])[rank]

    pool = Pool()
    if corpus is not None and not is_indexed:
        sequence = as_evaluation(corpus).corpus
        items = (sequence[index] for index in range(len(sequence)))
        for index, (content, images, instruction) in enumerate(_identities(items)):
            pool.documents.setdefault(content, Entry(partial(sequence.__getitem__, index), images, instruction))
        pool.candidates = len(pool.documents)
    examples, ahead = tee(unscored(rows[row]) for row in range(len(rows)))
    identities = _identities(item for example in ahead for item in _items(example))
    for row, example in enumerate(examples):
        # Of the query and of each document: its content, and how to read it again.
        (query, entry), *documents = (
            (content, Entry(partial(read, row, rank), images, instruction))
            for rank, (content, images, instruction) in enumerate(islice(identities, 1 + len(example.documents)))
        )
        count = len(example.positives)
        # Under another instruction a query seeks other documents; a document is the same one.
        query += "" if entry.instruction is None else f" {entry.instruction}"
        pool.queries.setdefault(query, entry)
        pool.positives.setdefault(query, set()).update(content for content, _ in documents[:count])
        pool.rows.append((query, {content for content, _ in documents[count:]}))
        for content, entry in documents if corpus is None and not is_indexed else documents[:count]:
            pool.documents.setdefault(content, entry)
    pool.candidates = pool.candidates or len(pool.documents)
    return pool


def _items(example: Example) -> tuple[Item, ...]:
    return (example.query, *example.documents)


def _identities(items: Iterator[Item]) -> Iterator[tuple[str, str, str | None]]:
    """Identify items in order, some at a time: decoding images leaves Python's lock to others.

    Yields each item's content, its images, and its instruction.
    """
    with ThreadPoolExecutor() as threads:
        while block := list(islice(items, ITEMS)):
            for item, identity in zip(block, threads.map(identify, block), strict=True):
                yield *identity, item.instruction


def hard_negatives(
    pool: Pool,
    queries: Embeddings,
    documents: Embeddings,
    similarity: Callable[[Any, Any], Float[Tensor, "Q P"]],
    choice: Choice,
    tile_bytes: int = 2**28,
) -> tuple[dict[str, list[str]], Counter[str]]:
    """Choose hard negatives of each query, by content; and count the candidates that were left out, by reason."""
    names, contents = [*pool.queries], [*pool.documents]
    indices = {content: index for index, content in enumerate(contents)}
    chosen, reasons = dict[str, list[str]](), Counter[str]()
    height = max(1, tile_bytes // (4 * len(contents)))
    for start in range(0, len(names), height):
        asked, ceilings = names[start : start + height], list[float]()
        similarities = similarity(queries[start : start + height], documents)
        for query, row in zip(asked, similarities, strict=True):
            positives = [indices[content] for content in pool.positives[query]]
            # Below the least similar positive: a candidate above it would be ranked above a positive.
            ceilings.append(choice.ceiling(float(row[positives].min())))
            row[positives] = -math.inf
        top = similarities[:, : pool.candidates].topk(min(pool.candidates, choice.depth))  # (tile, depth)
        for query, ceiling, *ranked in zip(asked, ceilings, top.values.tolist(), top.indices.tolist(), strict=True):
            candidates = (
                (score, contents[index], pool.documents[contents[index]].images)
                for score, index in zip(*ranked, strict=True)
                if score > -math.inf  # Only positives are left.
            )
            chosen[query], left_out = choose(pool, query, ceiling, candidates, choice)
            reasons += left_out
    return chosen, reasons
