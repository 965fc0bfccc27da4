"""Examples become a batch: each distinct item once, similar costs side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmembed.types import Batch, Example, Item, ItemBatch, Preprocessor


class Collator:
    """Makes a ``Batch`` of examples, in a loader worker.

    Items are sorted by cost, the most expensive first, before they are cut into chunks: a chunk is padded to its
    longest item, and a batch that does not fit in memory fails in its first chunk.

    Args:
        preprocessor: From items to model inputs.
        chunk_size: Items per chunk; null for one chunk of everything.
    """

    def __init__(self, preprocessor: Preprocessor, chunk_size: int | None = None):
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is 1 or more, or null for a single chunk; got {chunk_size}.")
        self.preprocessor = preprocessor
        self.chunk_size = chunk_size

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Merge equal items, and equal queries with all their answers.

        Raises:
            ValueError: If an item cannot be preprocessed, or examples have scores, which a batch does not carry.
        """
        queries, documents, labels = _judgements(examples)
        items = sorted({**queries, **documents}.values(), key=self.preprocessor.cost, reverse=True)
        size = self.chunk_size or len(items)
        row = {item.id: row for row, item in enumerate(items)}
        return Batch(
            chunks=[self.preprocessor(items[start : start + size]) for start in range(0, len(items), size)],
            queries=torch.tensor([row[query] for query in queries]),
            documents=torch.tensor([row[document] for document in documents], dtype=torch.long),
            query_ids=torch.tensor([*queries]),
            document_ids=torch.tensor([*documents], dtype=torch.long),
            pairs=torch.tensor([*labels], dtype=torch.long).reshape(-1, 2),
            labels=torch.tensor([*labels.values()], dtype=torch.int8),
        )


class ItemCollator:
    """Makes an ``ItemBatch`` of items and their row numbers, in a loader worker.

    Args:
        preprocessor: From items to model inputs.
    """

    def __init__(self, preprocessor: Preprocessor):
        self.preprocessor = preprocessor

    def __call__(self, rows: Sequence[tuple[int, Item]]) -> ItemBatch:
        """Preprocess items as one chunk."""
        return ItemBatch(self.preprocessor([item for _, item in rows]), torch.tensor([row for row, _ in rows]))


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
