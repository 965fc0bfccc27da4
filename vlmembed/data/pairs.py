"""Queries with their candidates become batches of pairs, for a cross-encoder."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.utils.data import Dataset

from vlmembed.data.candidates import candidates_of
from vlmembed.data.collate import PATCH_COST, ExampleCollator, check_chunk_size, room_of
from vlmembed.losses import LabelSpec
from vlmembed.types import Example, Inputs, Pair, PairBatch, Prepared, Preprocessor, RankingBatch, RerankingSet

#: Of each pair in a list of some, the number of its query and of its document in the evaluation set.
NumberedPair = tuple[int, int, Pair]


class PairCollator(ExampleCollator):
    """Makes a ``RankingBatch`` of examples, in a loader worker.

    A chunk holds pairs that begin alike, and what they share of their beginning costs nothing again.

    Args:
        preprocessor: From pairs to model inputs.
        targets: What the loss wants to know of each candidate.
        chunk_size: How many pairs of average cost a chunk has room for; null for one chunk of everything.
        chunk_cost: How many tokens a chunk has room for, instead, and how many patches a chunk of images.
        patch_cost: What a patch costs, in tokens; nothing where the tower is frozen, and keeps no activations.
        in_batch_negatives: How many documents of other examples each query gets as wrong answers besides its own.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        targets: LabelSpec,
        chunk_size: int | None = None,
        chunk_cost: int | None = None,
        patch_cost: float = PATCH_COST,
        in_batch_negatives: int = 0,
    ) -> None:
        check_chunk_size(chunk_size)
        self.preprocessor = preprocessor
        self.targets = targets
        self.chunk_size = chunk_size
        self.chunk_cost = chunk_cost
        self.patch_cost = patch_cost
        self.in_batch_negatives = in_batch_negatives

    def __call__(self, examples: Sequence[Example]) -> RankingBatch:
        """Pair each query with its candidates, equal pairs once.

        Raises:
            ValueError: If a pair cannot be preprocessed, or an example does not say what the loss wants to know.
        """
        targets: dict[tuple[int, int], float] = {}
        pairs: dict[tuple[int, int], Pair] = {}
        for example in self._with_negatives(examples):
            for document, target in candidates_of(example, self.targets):
                key = example.query.id, document.id
                pairs.setdefault(key, Pair(example.query, document))
                # What answers a query in any example is no wrong answer to it in another.
                targets[key] = max(target, targets.get(key, -math.inf))
        prepared = self.preprocessor.prepare([*pairs.values()], draft=True)
        rows = _cut(prepared, self.chunk_size, self.chunk_cost, self.patch_cost)
        keys = [*pairs]
        order = [keys[row] for chunk in rows for row in chunk]
        return RankingBatch(
            chunks=[prepared.chunk(chunk) for chunk in rows],
            images=_images(prepared, self.chunk_size, self.chunk_cost),
            queries=torch.tensor([query for query, _ in order]),
            documents=torch.tensor([document for _, document in order]),
            targets=torch.tensor([targets[key] for key in order]),
            origins=tuple(example.query.origin for example in examples),
        )

    def check(self, example: Example) -> None:
        """See `ExampleCollator.check`: a query that has one candidate by itself gets others from the batch."""
        several = self.targets.needs_several and not self.in_batch_negatives
        PairCollator(self.preprocessor, replace(self.targets, needs_several=several))([example])

    def _with_negatives(self, examples: Sequence[Example]) -> Iterator[Example]:
        """Give each example documents of the others, the same ones whenever the batch is made."""
        if not self.in_batch_negatives:
            yield from examples
            return
        documents = {document.id: document for example in examples for document in example.documents}
        answers: dict[int, set[int]] = {}
        for example in examples:
            answers.setdefault(example.query.id, set()).update(document.id for document in example.documents)
        for example in examples:
            others = [each for each in documents if each not in answers[example.query.id]]
            draw = random.Random(example.query.id)
            drawn = draw.sample(others, min(self.in_batch_negatives, len(others)))
            labels = None if example.labels is None else example.labels + (0.0,) * len(drawn)
            negatives = example.negatives + tuple(documents[each] for each in drawn)
            yield replace(example, negatives=negatives, labels=labels)


class EvaluationPairCollator:
    """Makes a ``PairBatch`` of numbered pairs, in a loader worker.

    Args:
        preprocessor: From pairs to model inputs.
        chunk_size: How many pairs of average cost a chunk has room for.
    """

    def __init__(self, preprocessor: Preprocessor, chunk_size: int) -> None:
        self.preprocessor = preprocessor
        self.chunk_size = chunk_size

    def __call__(self, pairs: Sequence[NumberedPair]) -> PairBatch:
        """Preprocess pairs, and their distinct images once."""
        prepared = self.preprocessor.prepare([pair for _, _, pair in pairs])
        chunks = _cut(prepared, self.chunk_size, None, 0.0)
        rows = [pairs[row][:2] for chunk in chunks for row in chunk]
        images = _images(prepared, self.chunk_size, None)
        return PairBatch([prepared.chunk(chunk) for chunk in chunks], images, torch.tensor(rows))


class PairLists(Dataset[list[NumberedPair]]):
    """The pairs of a reranking set by lists of numbers.

    Args:
        reranking: The queries and their candidates.
        by_document: Whether pairs of one document stand together, instead of those of one query.
    """

    def __init__(self, reranking: RerankingSet, by_document: bool = False) -> None:
        self.evaluation = reranking.evaluation
        self.pairs = [(query, column) for query, found in enumerate(reranking.candidates) for column in found]
        if by_document:
            self.pairs.sort(key=lambda pair: pair[1])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, numbers: Sequence[int]) -> list[NumberedPair]:
        chosen = [self.pairs[number] for number in numbers]
        # Each item is read once, whatever it is paired with.
        queries = {query: self.evaluation.queries[query] for query in {query for query, _ in chosen}}
        documents = {column: self.evaluation.corpus[column] for column in {column for _, column in chosen}}
        return [(query, column, Pair(queries[query], documents[column])) for query, column in chosen]


def _cut(prepared: Prepared, chunk_size: int | None, chunk_cost: int | None, patch_cost: float) -> list[list[int]]:
    """Group neighbours into chunks of about equal cost; see `PairCollator`."""
    order, lengths, patches = prepared.order, prepared.lengths, prepared.patches
    whole = [lengths[row] + patch_cost * patches[row] for row in order]
    new = [cost - shared for cost, shared in zip(whole, prepared.shared(order), strict=True)]
    room = room_of(new, chunk_size, chunk_cost)
    chunks: list[list[int]] = []
    taken = 0.0
    for place, row in enumerate(order):
        if chunks and (room is None or taken + new[place] <= room):
            chunks[-1].append(row)
            taken += new[place]
        else:
            chunks.append([row])
            taken = whole[place]
    return chunks


def _images(prepared: Prepared, chunk_size: int | None, chunk_cost: int | None) -> list[Inputs]:
    return prepared.images(room_of([each for each in prepared.patches if each], chunk_size, chunk_cost))
