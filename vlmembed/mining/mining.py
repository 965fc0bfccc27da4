"""The commands ``mine``, hard negatives of training rows by an embedder, and ``score``, a reranker's scores in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmembed.data import EvaluationSource, Rows, Source
from vlmembed.data.evaluation import as_evaluation
from vlmembed.data.rows import INSTRUCTIONS
from vlmembed.data.streaming import refuse_streams
from vlmembed.distributed import in_order
from vlmembed.files import clear_drafts, whole_file, write_whole
from vlmembed.media import load_image, medium_of
from vlmembed.mining.candidates import (
    BATCHES,
    Choice,
    Embedder,
    Entry,
    IndexedCandidates,
    Pool,
    hard_negatives,
    identify,
)
from vlmembed.search.searching import logits, open_reranker
from vlmembed.search.served import find_folder
from vlmembed.types import Example, Frame, Item, Pair, Part

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
        query += entry.told
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
        yield from in_order(threads, lambda item: (*identify(item), item.instruction), items, ahead=ITEMS)


def score(model: str, rows: str | Source, output: str, batch_size: int = 32, trust_remote_code: bool = False) -> None:
    """Score the documents of training rows with a reranker, and write the rows with its scores.

    Scores are logits, whatever the model applies to them when it ranks: a sigmoid would make equal what is far apart.
    Train an embedder on the rows with ``vlmembed.losses.ScoreDistillation``, or a reranker with ``KLDivergence`` or
    ``MarginMSE``. An instruction of a row's query takes the place of the reranker's.

    Args:
        model: The reranker: a folder written by ``export``, or anything that Sentence Transformers' ``CrossEncoder``
            opens and that gives one score.
        rows: Training rows, such as ``mine`` writes: a path or Hub id, or a ``vlmembed.data.Source``.
        output: The JSONL file to write. Images that are in no file are written beside it.
        batch_size: Pairs that go through the model at once.
        trust_remote_code: Whether to run code that the model brings.
    """
    source = Rows(rows) if isinstance(rows, str) else rows
    refuse_streams(source, "scoring")
    reranker = open_reranker(model, trust_remote_code=trust_remote_code)
    count = write_rows(Path(output), _scored(reranker, source, batch_size))
    print(f"{output}: {count} rows with the scores of {model}.")


def _scored(reranker: Any, source: Source, batch_size: int) -> Iterator[Example]:
    examples: list[Example] = []
    for row in tqdm(range(len(source)), desc="Scoring rows"):
        examples.append(unscored(source[row]))
        # Several batches at a time, which Sentence Transformers sorts by length.
        full = sum(len(example.documents) for example in examples) >= BATCHES * batch_size
        if full or row == len(source) - 1:
            pairs = [Pair(example.query, document) for example in examples for document in example.documents]
            scores = iter(logits(reranker, pairs, batch_size))
            for example in examples:
                yield replace(example, scores=tuple(islice(scores, len(example.documents))))
            examples = []


def unscored(example: Example) -> Example:
    """Return an example, and refuse it with a ValueError if it has scores or labels, or no positive."""
    if example.scores is not None or example.labels is not None or not example.positives:
        raise ValueError(
            f"{example.query.origin}: rows to mine or to score have a query, positives and perhaps negatives; this one "
            "has scores, labels, or no positive. Drop 'scores': Rows(path, columns={scores: null})."
        )
    return example


def write_rows(path: Path, examples: Iterable[Example]) -> int:
    """Write training rows that ``vlmembed.data.Rows`` reads, and return how many; the file is there once all are.

    Images and videos in files are named by their path relative to the written file; where one is outside of its
    folder, it is said how to allow that. Open images, and audio in tables, are written into a folder beside it, once.
    """
    images, outside, count = path.parent / f"{path.stem}_images", set[Path](), 0
    instructs: dict[str, bool] = {}  # By column, whether the first row has an instruction there.

    def cell(item: Item) -> Any:
        if [part.kind for part in item.parts] == ["text"]:
            return item.parts[0].value
        return [{"type": part.kind, part.kind: _value(part.value, path, images, outside)} for part in item.parts]

    clear_drafts(path.parent, path.name)
    clear_drafts(images)
    with whole_file(path) as draft, draft.open("w", encoding="utf-8") as lines:
        for example in examples:
            row = {"query": cell(example.query), "positive": [*map(cell, example.positives)]}
            row |= {"negatives": [*map(cell, example.negatives)]}
            row |= {} if example.scores is None else {"scores": example.scores}
            for column, item in zip(INSTRUCTIONS, (example.query, *example.positives), strict=False):
                if instructs.setdefault(column, item.instruction is not None):
                    row[column] = item.instruction
                elif item.instruction is not None:
                    raise ValueError(
                        f"{item.origin}: has an instruction, and the first row has none in {column!r}: rows of a file "
                        "have the same columns. Write one file for each."
                    )
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    if outside:
        common = os.path.commonpath(outside)
        print(f"{path} names files of {common}: read it with Rows(path, allow_outside: [{common}]).")
    return count


def _value(content: str | Frame | tuple[Frame, ...], path: Path, images: Path, outside: set[Path]) -> Any:
    """Return a text, or the path of a file relative to the written one's; note the folder of one outside of it."""
    if isinstance(content, str):
        return content
    if isinstance(content, tuple):
        return [_value(frame, path, images, outside) for frame in content]
    if isinstance(content, bytes) and (kind := medium_of(content)) in ("audio", "video"):
        ending = "wav" if kind == "audio" else "mp4"  # Files are known by what is in them.
        encoded, content = content, images / f"{Part('audio', content).digest.hex()}.{ending}"
        write_whole(content, encoded)
    elif not isinstance(content, Path):
        image, content = content, images / f"{Part('image', content).digest.hex()}.png"
        if not content.exists():
            with whole_file(content) as draft:
                load_image(image).save(draft, "PNG")  # Upright: PNG would lose which side is up.
    file, folder = content.resolve(), path.parent.resolve()
    if not file.is_relative_to(folder):
        outside.add(file.parent)
    return Path(os.path.relpath(file, folder)).as_posix()
