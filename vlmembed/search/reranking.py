"""Logits of pairs of a query and a document, by any cross-encoder that Sentence Transformers opens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlmembed.search.corpus import Corpus
from vlmembed.search.index import Index
from vlmembed.search.served import by_instruction, model_input
from vlmembed.types import Item, Pair

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
    reranker: Any, queries: Sequence[Item], corpus: Corpus, index: Index, rows: Int64[Tensor, "Q C"]
) -> Float[Tensor, "Q C"]:
    """Score what a first stage has found for each query: rows of the index, or -1, by the corpus it was made of."""
    names = dict(zip(rows.unique().tolist(), index.names(rows.unique().clamp(min=0)), strict=True))
    places = _places({*names.values()}, corpus, index)
    scores = torch.full(rows.shape, -torch.inf)
    found = (rows >= 0).nonzero()
    for part in found.split(PAIRS):
        read = {row: corpus.read(places[names[row]])[1] for row in rows[tuple(part.T)].unique().tolist()}
        pairs = [Pair(queries[query], read[int(rows[query, place])]) for query, place in part.tolist()]
        scores[tuple(part.T)] = torch.tensor(logits(reranker, pairs))
    return scores


def _places(names: set[str], corpus: Corpus, index: Index) -> dict[str, int]:
    """Return where in the corpus the items of some ids are."""
    scanned = (name for block in corpus.blocks() for name, _ in block)
    places = {name: place for place, name in enumerate(scanned) if name in names}
    if missing := names - places.keys():
        raise ValueError(
            f"{index.folder}: its id {min(missing)!r} is not in the corpus any more. Give the corpus that was encoded, "
            "or encode it again."
        )
    return places
