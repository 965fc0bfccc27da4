"""``python -m vlmembed score``: a reranker's scores of the documents of training rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from tqdm import tqdm

from vlmembed.data import Source
from vlmembed.mining.contents import BATCHES, opened
from vlmembed.mining.pool import open_rows, plain
from vlmembed.mining.writing import RowWriter
from vlmembed.types import Example


def score(model: str, rows: str | Source, output: str, batch_size: int = 32, trust_remote_code: bool = False) -> None:
    """Score the documents of training rows with a reranker, and write the rows with its scores.

    Scores are logits, whatever the model applies to them when it ranks: a sigmoid would make equal what is far apart.
    Train an embedder on the rows with ``vlmembed.losses.ScoreDistillation``, or a reranker with ``KLDivergence`` or
    ``MarginMSE``.

    Args:
        model: The reranker: a folder written by ``export``, or anything that Sentence Transformers' ``CrossEncoder``
            opens and that gives one score.
        rows: Training rows, such as ``mine`` writes: a path or Hub id, or a ``vlmembed.data.Source``.
        output: The JSONL file to write. Images that are in no file are written beside it.
        batch_size: Pairs that go through the model at once.
        trust_remote_code: Whether to run code that the model brings.

    Raises:
        ValueError: If something cannot be read, the model gives several scores, or one that is no finite number.
    """
    source = open_rows(rows)
    reranker = CrossEncoder(model, trust_remote_code=trust_remote_code)
    if reranker.num_labels != 1:
        raise ValueError(f"{model} gives {reranker.num_labels} scores for a pair; a teacher gives one.")
    with RowWriter(Path(output)) as writer:
        examples = (plain(source[row]) for row in tqdm(range(len(source)), desc="Scoring rows"))
        for some in _groups(examples, BATCHES * batch_size):
            scores = iter(_score(reranker, some, batch_size))
            for example in some:
                own = [next(scores) for _ in example.documents]
                writer.write(example.query, example.positives, example.negatives, own)
    print(f"{writer.path}: {writer.count} rows with the scores of {model}.")


def _groups(examples: Iterator[Example], pairs: int) -> Iterator[list[Example]]:
    """Gather examples until they have so many pairs."""
    some: list[Example] = []
    for example in examples:
        some.append(example)
        if sum(len(each.documents) for each in some) >= pairs:
            yield some
            some = []
    if some:
        yield some


def _score(reranker: CrossEncoder, examples: Sequence[Example], batch_size: int) -> list[float]:
    """Return the logit of each example's documents, one example after the other."""
    pairs = [(example.query, document) for example in examples for document in example.documents]
    shown = {item.id: opened(item) for pair in pairs for item in pair}
    logits = reranker.predict(
        [_pair(shown[query.id], shown[document.id]) for query, document in pairs],
        batch_size=batch_size,
        activation_fn=torch.nn.Identity(),
        convert_to_tensor=True,
        show_progress_bar=False,
    )
    numbers: list[float] = logits.tolist()
    for (_, document), number in zip(pairs, numbers, strict=True):
        if not math.isfinite(number):
            raise ValueError(f"{document.origin}: the reranker's score is {number}, not a finite number.")
    return numbers


def _pair(query: dict[str, Any], document: dict[str, Any]) -> tuple[Any, Any]:
    """Two texts as such, which rerankers of text want."""
    if query.keys() == document.keys() == {"text"}:
        return query["text"], document["text"]
    return query, document
