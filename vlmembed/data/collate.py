"""Examples become a batch: each distinct item once, similar costs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from vlmembed.types import Batch, Example, Item, ItemBatch, Preprocessor


class Collator:
    """Makes a ``Batch`` of examples, in a loader worker.

    Items are sorted by length, the longest first, and cut into chunks by the area that they take when padded: a chunk
    is hardly padded, short items share one in larger numbers, and a batch that does not fit in memory fails at once.

    Args:
        preprocessor: From items to model inputs.
        chunk_size: How many of the batch's largest items a chunk has room for; null for one chunk of everything.
        chunk_tokens: How many tokens a chunk has room for, instead.
    """

    def __init__(self, preprocessor: Preprocessor, chunk_size: int | None = None, chunk_tokens: int | None = None):
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is 1 or more, or null for a single chunk; got {chunk_size}.")
        self.preprocessor = preprocessor
        self.chunk_size = chunk_size
        self.chunk_tokens = chunk_tokens

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Merge equal items, and equal queries with all their answers.

        Raises:
            ValueError: If an item cannot be preprocessed, or examples have scores, which a batch does not carry.
        """
        queries, documents, labels = _judgements(examples)
        items = {**queries, **documents}
        prepared = self.preprocessor.prepare(list(items.values()), draft=True)
        room = self._room(prepared.lengths)
        chunks = cut(prepared.lengths, room)
        row = {list(items)[place]: row for row, place in enumerate(chain.from_iterable(chunks))}
        return Batch(
            chunks=[prepared.chunk(places) for places in chunks],
            images=prepared.images(room),
            queries=torch.tensor([row[query] for query in queries]),
            documents=torch.tensor([row[document] for document in documents], dtype=torch.long),
            query_ids=torch.tensor([*queries]),
            document_ids=torch.tensor([*documents], dtype=torch.long),
            pairs=torch.tensor([*labels], dtype=torch.long).reshape(-1, 2),
            labels=torch.tensor([*labels.values()], dtype=torch.int8),
        )

    def _room(self, lengths: Sequence[int]) -> int | None:
        if self.chunk_tokens is not None or self.chunk_size is None:
            return self.chunk_tokens
        return self.chunk_size * max(1, *lengths)


def cut(lengths: Sequence[int], room: int | None) -> list[list[int]]:
    """Group items of similar length into chunks.

    Args:
        lengths: Of the items.
        room: The most tokens of a chunk, counting each item as long as its longest; None for a single chunk. An item
            that is longer has a chunk for itself.

    Returns:
        The items' places, the longest first.
    """
    chunks: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not chunks or (room is not None and (len(chunks[-1]) + 1) * lengths[chunks[-1][0]] > room):
            chunks.append([])
        chunks[-1].append(place)
    return chunks


class ItemCollator:
    """Makes an ``ItemBatch`` of items and their row numbers, in a loader worker.

    Args:
        preprocessor: From items to model inputs.
    """

    def __init__(self, preprocessor: Preprocessor):
        self.preprocessor = preprocessor

    def __call__(self, rows: Sequence[tuple[int, Item]]) -> ItemBatch:
        """Preprocess items as one chunk."""
        prepared = self.preprocessor.prepare([item for _, item in rows])
        chunk = prepared.chunk(range(len(rows)))
        return ItemBatch(chunk, prepared.images(None), torch.tensor([row for row, _ in rows]))


def _judgements(
    examples: Sequence[Example],
) -> tuple[dict[int, Item], dict[int, Item], dict[tuple[int, int], int]]:
    """Return distinct queries and documents by id, and a label for each judged pair of ids."""
    queries: dict[int, Item] = {}
    documents: dict[int, Item] = {}
    labels: dict[tuple[int, int], int] = {}
    for example in examples:
        query = example.query
        if example.scores is not None:
            raise ValueError(
                f"{query.origin}: scores given but unused. Drop the column: Rows(path, columns={{scores: null}})."
            )
        queries.setdefault(query.id, query)
        documents |= {item.id: item for item in (*example.positives, *example.negatives) if item.id not in documents}
        for item in example.negatives:
            labels.setdefault((query.id, item.id), -1)
        for item in example.positives:
            # What answers a query in any example is no wrong answer to it in another.
            labels[query.id, item.id] = 1
    return queries, documents, labels
