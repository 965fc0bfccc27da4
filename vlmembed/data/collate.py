"""Examples become a batch: each distinct item once, similar costs side by side."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from operator import add

import torch
from torch.utils.data import Dataset

from vlmembed.data.columns import candidates_of
from vlmembed.losses import LabelSpec
from vlmembed.types import (
    Batch,
    Example,
    Inputs,
    Item,
    ItemBatch,
    Pair,
    PairBatch,
    Prepared,
    Preprocessor,
    RankingBatch,
    RerankingSet,
)

#: What a patch costs where the vision tower is trained. Its activations are about half of a token's in the language
#: model, by the widths and depths of any Qwen3-VL, and of small ones alike.
PATCH_COST = 0.5


class ExampleCollator(ABC):
    """Makes a batch of examples, in a loader worker."""

    @abstractmethod
    def __call__(self, examples: Sequence[Example]) -> Batch | RankingBatch:
        """Make a batch."""

    def check(self, example: Example) -> None:
        """Find out whether an example can be in a batch, whatever the others are.

        Raises:
            ValueError: If not, naming what of it is wrong.
        """
        self([example])


class Collator(ExampleCollator):
    """Makes a ``Batch`` of examples, in a loader worker.

    Items are sorted by cost, the most expensive first, and cut into chunks of equal cost: the tokens that a chunk's
    items take when padded, and the patches of their images at half the price. So a chunk is hardly padded, short texts
    share one in larger numbers than images, and a batch that does not fit in memory fails at once.

    Args:
        preprocessor: From items to model inputs.
        chunk_size: How many items of average cost a chunk has room for, at least the most expensive one; null for one
            chunk of everything.
        chunk_cost: How many tokens a chunk has room for, instead, and how many patches a chunk of images.
        patch_cost: What a patch costs, in tokens; nothing where the tower is frozen, and keeps no activations.
        wants_scores: Whether the loss distils a teacher's scores.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        chunk_size: int | None = None,
        chunk_cost: int | None = None,
        patch_cost: float = PATCH_COST,
        wants_scores: bool = False,
    ) -> None:
        check_chunk_size(chunk_size)
        self.preprocessor = preprocessor
        self.chunk_size = chunk_size
        self.chunk_cost = chunk_cost
        self.patch_cost = patch_cost
        self.wants_scores = wants_scores

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Merge equal items, and equal queries with all their answers.

        Raises:
            ValueError: If an item cannot be preprocessed, or examples have scores that the loss does not want, or lack
                those that it wants.
        """
        queries, documents, labels = _judgements(examples)
        scores = _scores(examples, self.wants_scores)
        items = {**queries, **documents}
        ids = [*items]
        prepared = self.preprocessor.prepare([*items.values()], draft=True)
        lengths, patches = prepared.lengths, prepared.patches
        seeing = [self.patch_cost * each for each in patches]
        chunks = cut(lengths, seeing, room_of([*map(add, lengths, seeing)], self.chunk_size, self.chunk_cost))
        row = {ids[place]: row for row, place in enumerate(chain.from_iterable(chunks))}
        return Batch(
            chunks=[prepared.chunk(places) for places in chunks],
            images=prepared.images(room_of([each for each in patches if each], self.chunk_size, self.chunk_cost)),
            queries=torch.tensor([row[query] for query in queries]),
            documents=torch.tensor([row[document] for document in documents], dtype=torch.long),
            query_ids=torch.tensor([*queries]),
            document_ids=torch.tensor([*documents], dtype=torch.long),
            pairs=torch.tensor([*labels], dtype=torch.long).reshape(-1, 2),
            labels=torch.tensor([*labels.values()], dtype=torch.int8),
            scores=torch.tensor([scores[pair] for pair in labels]) if self.wants_scores else None,
            origins=tuple(example.query.origin for example in examples),
        )


def check_chunk_size(chunk_size: int | None) -> None:
    """Refuse a size that no chunk has.

    Raises:
        ValueError: If it is below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is 1 or more, or null for a single chunk; got {chunk_size}.")


def room_of(costs: Sequence[float], chunk_size: int | None, chunk_cost: int | None) -> int | None:
    """Return what a chunk has room for.

    Args:
        costs: Of the items, or of the images; there may be none.
        chunk_size: How many of average cost there is room for, at least the most expensive one.
        chunk_cost: The room, where it is known.

    Returns:
        None for a single chunk.
    """
    if chunk_cost is not None or chunk_size is None:
        return chunk_cost
    return math.ceil(max(*costs, 1, chunk_size * sum(costs) / len(costs))) if costs else 1


def cut(lengths: Sequence[int], seeing: Sequence[float], room: int | None) -> list[list[int]]:
    """Group items of similar cost into chunks.

    Args:
        lengths: Tokens of each item.
        seeing: What each item's images cost besides, in tokens.
        room: The most that a chunk may cost: tokens, each item counting as long as its longest, and images. None for a
            single chunk. An item that costs more has a chunk for itself.

    Returns:
        The items' places, the most expensive first.
    """
    chunks: list[list[int]] = []
    longest, seen = 0, 0.0
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place] + seeing[place], reverse=True):
        longest, seen = max(longest, lengths[place]), seen + seeing[place]
        if chunks and (room is None or (len(chunks[-1]) + 1) * longest + seen <= room):
            chunks[-1].append(place)
        else:
            chunks.append([place])
            longest, seen = lengths[place], seeing[place]
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
        queries.setdefault(query.id, query)
        documents |= {item.id: item for item in example.documents if item.id not in documents}
        for item in example.negatives:
            labels.setdefault((query.id, item.id), -1)
        for item in example.positives:
            # What answers a query in any example is no wrong answer to it in another.
            labels[query.id, item.id] = 1
    return queries, documents, labels


def _scores(examples: Sequence[Example], wanted: bool) -> dict[tuple[int, int], float]:
    """Return a teacher's score for each judged pair of ids: the highest, where examples disagree."""
    scores: dict[tuple[int, int], float] = {}
    for example in examples:
        query, documents = example.query, example.documents
        if wanted != (example.scores is not None):
            raise ValueError(
                f"{query.origin}: the loss distils a teacher's scores, and there are none. Add a column 'scores' (see "
                "`python -m vlmembed score`), or choose a loss of right and wrong answers."
                if wanted
                else f"{query.origin}: scores given but unused. Choose a loss that distils them, such as "
                "vlmembed.losses.ScoreDistillation, or drop the column: Rows(path, columns={scores: null})."
            )
        if wanted and len({document.id for document in documents}) < 2:
            raise ValueError(f"{query.origin}: distillation compares documents, and the row has one. Add negatives.")
        for document, score in zip(documents, example.scores or (), strict=wanted):
            key = query.id, document.id
            scores[key] = max(score, scores.get(key, -math.inf))
    return scores


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
