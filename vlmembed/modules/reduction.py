"""A batch of a few items, cut from a larger one."""

from __future__ import annotations

from itertools import accumulate

import torch

from vlmembed.backbones.packing import select, take
from vlmembed.types import Batch, Inputs


def reduced(batch: Batch, items: int) -> Batch:
    """Keep some queries and documents of a batch, in the chunks that they are in, and the images that they show.

    Args:
        batch: Of this process.
        items: How many queries and documents to keep, at most. There are two chunks of them if the batch has two.
    """
    sizes = [len(chunk["attention_mask"]) for chunk in batch.chunks]
    places = dict(zip(batch.query_ids.tolist(), batch.queries.tolist(), strict=True))
    places |= zip(batch.document_ids.tolist(), batch.documents.tolist(), strict=True)
    chunk_of_row = [number for number, size in enumerate(sizes) for _ in range(size)]
    chosen = _chosen(batch, items, {item: chunk_of_row[row] for item, row in places.items()})
    kept: list[tuple[Inputs, list[int]]] = []
    rows: list[int] = []
    for chunk, here in zip(batch.chunks, torch.arange(sum(sizes)).split(sizes), strict=True):
        own = [index for index, row in enumerate(here.tolist()) if any(places[item] == row for item in chosen)]
        if own:
            # Where texts hold their images, nothing says which pixels are whose.
            own = own if "images" in chunk else list(range(len(here)))
            kept.append((chunk, own))
            rows += here[own].tolist()
    shown = sorted(set().union(*(_shown(chunk, own) for chunk, own in kept)))
    starts = accumulate((len(group["keys"]) for group in batch.images), initial=0)
    images = [
        (group, [place - start for place in shown if 0 <= place - start < len(group["keys"])])
        for group, start in zip(batch.images, starts, strict=False)
    ]
    queries, documents = (
        {item: rows.index(places[item]) for item in ids.tolist() if item in chosen}
        for ids in (batch.query_ids, batch.document_ids)
    )
    inside = [index for index, pair in enumerate(batch.pairs.tolist()) if chosen.issuperset(pair)]
    return Batch(
        chunks=[_cut(chunk, own, shown) for chunk, own in kept],
        images=[select(group, own) for group, own in images if own],
        queries=torch.tensor([*queries.values()]),
        documents=torch.tensor([*documents.values()]),
        query_ids=torch.tensor([*queries]),
        document_ids=torch.tensor([*documents]),
        pairs=batch.pairs[inside],
        labels=batch.labels[inside],
        scores=None if batch.scores is None else batch.scores[inside],
        origins=batch.origins,
    )


def _chosen(batch: Batch, items: int, chunk_of: dict[int, int]) -> set[int]:
    """Choose queries, each with a right answer and other judged documents, so that they are in several chunks."""
    families = {query: [query] for query in batch.query_ids.tolist()}
    for _, (query, document) in sorted(zip(batch.labels.tolist(), batch.pairs.tolist(), strict=True), reverse=True):
        families[query].append(document)
    widest = max(families.values(), key=lambda family: len({chunk_of[item] for item in family}))
    home = chunk_of[widest[0]]
    chosen: set[int] = set()
    for family in sorted(
        families.values(), key=lambda family: (family is not widest, all(chunk_of[item] == home for item in family))
    ):
        family[2:] = sorted(family[2:], key=lambda item: chunk_of[item] == home)
        room = min(items - len(chosen), items // 2)
        chosen.update(family[:room] if room >= 2 else [])
    return chosen


def _shown(chunk: Inputs, rows: list[int]) -> set[int]:
    images = chunk["images"].tolist() if "images" in chunk else []
    return {place for row, place in images if row in rows}


def _cut(chunk: Inputs, rows: list[int], shown: list[int]) -> Inputs:
    """Keep some items of a chunk, and number the images anew."""
    if "images" not in chunk:
        return chunk
    kept = take(chunk, rows)
    images = [(row, shown.index(place)) for row, place in kept["images"].tolist()]
    return kept | {"images": torch.tensor(images, dtype=torch.long).reshape(-1, 2)}
