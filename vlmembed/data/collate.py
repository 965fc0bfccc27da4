"""Collators: from examples to a batch of distinct items, or pairs, in chunks of equal cost."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from vlmembed.data.evaluation import as_evaluation, as_reranking
from vlmembed.data.sources import RowLists, shard
from vlmembed.losses.base import LabelSpec
from vlmembed.types import (
    Batch,
    Chunking,
    EvaluationSet,
    Example,
    Inputs,
    Item,
    ItemBatch,
    Pair,
    PairBatch,
    Prepared,
    Preprocessor,
    RankingBatch,
)

#: So many chunks of pairs are read at once: an image that several of them show is preprocessed, and encoded, once.
CHUNKS_PER_BATCH = 8


class Collator(ABC):
    """Makes batches of one kind, in loader workers; and loads what such a model is measured on.

    Args:
        preprocessor: From items, or pairs, to model inputs.
        label_spec: What the loss wants to know of each document, or candidate.
        named: The same of further losses, by name.
    """

    chunking: Chunking = Chunking()
    distinct_queries: bool  # Whether no query may come twice in a batch, where it would be its own negative.
    #: Loads an evaluation set from a path, training rows, or a source of evaluation sets, and the name of a split.
    load: Callable[[Any, str], Any]

    def __init__(
        self,
        preprocessor: Preprocessor,
        label_spec: LabelSpec | None = None,
        named: Mapping[str, LabelSpec] | None = None,
    ) -> None:
        self.preprocessor = preprocessor
        #: Of each loss, by name; None for the module's own.
        self.label_specs: dict[str | None, LabelSpec] = {None: label_spec or LabelSpec()} | dict(named or {})

    def loss_of(self, examples: Sequence[Example]) -> tuple[str | None, LabelSpec]:
        """Return the loss that examples are trained with, by name, and what it wants to know; refuse several."""
        first = examples[0]
        for example in examples:
            if example.loss != first.loss:
                raise ValueError(
                    f"{example.query.origin}: its loss is {example.loss!r}, and {first.loss!r} that of another row of "
                    "its batch. Give vlmembed.data.Mixture the losses, which makes batches of one."
                )
        if first.loss not in self.label_specs:
            known = ", ".join(map(repr, filter(None, self.label_specs))) or "none"
            raise ValueError(f"{first.query.origin}: its loss is {first.loss!r}, and model.losses has {known}.")
        return first.loss, self.label_specs[first.loss]

    @abstractmethod
    def __call__(self, examples: Sequence[Example]) -> Batch | RankingBatch:
        """Make a batch; a ``ValueError`` names an item that cannot be read, or an example that the loss cannot use."""

    def check(self, example: Example) -> None:
        """Raise a ``ValueError`` if an example cannot be in a batch, whatever the others are."""
        self([example])

    @abstractmethod
    def loader(self, evaluation: Any, batch_size: int, rank: int, world_size: int, **options: Any) -> DataLoader:
        """Return the loader of a process's share: ``batch_size`` items go through the model at once.

        All processes get equally many batches, so that none waits for another that has no more.
        """


def cut(prepared: Prepared, chunking: Chunking) -> tuple[list[int], list[Inputs], list[Inputs]]:
    """Cut items into chunks of about equal cost, so that a batch that does not fit in memory fails at once.

    An item costs its tokens and its patches, without what it shares with the beginning of the one before; where chunks
    are padded, as many tokens as the longest, which comes first. An item that costs too much has a chunk for itself.
    Returns the items' rows in the order of the chunks, the chunks, and the chunks of the distinct images.
    """
    order, lengths, patches = prepared.order, prepared.lengths, prepared.patches
    shared = prepared.shared(order)
    costs = [lengths[row] + chunking.patch_cost * patches[row] for row in order]
    room = chunking.room([cost - common for cost, common in zip(costs, shared, strict=True)])
    chunks: list[list[int]] = []
    taken = 0.0
    for row, cost, common in zip(order, costs, shared, strict=True):
        padding = lengths[chunks[-1][0]] - lengths[row] if chunks and prepared.padded else 0
        if chunks and (room is None or taken + cost - common + padding <= room):
            chunks[-1].append(row)
            taken += cost - common + padding
        else:
            chunks.append([row])
            taken = cost
    # Images, which several items may show, have chunks of their own.
    image_room = chunking.room([count for count in patches if count])
    flat = [row for chunk in chunks for row in chunk]
    return flat, [prepared.chunk(chunk) for chunk in chunks], prepared.images(image_room)


class ItemCollator(Collator):
    """Makes batches for embedders. The arguments are those of `Collator`."""

    distinct_queries = True
    load = staticmethod(as_evaluation)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Merge equal items, and equal queries with all their documents."""
        queries: dict[int, Item] = {}
        documents: dict[int, Item] = {}
        labels: dict[tuple[int, int], int] = {}
        scores: dict[tuple[int, int], float] = {}
        loss, spec = self.loss_of(examples)
        if not spec.grades or spec.teacher_scores:
            check_scores(examples, spec.teacher_scores)
        for example in examples:
            query = example.query
            queries.setdefault(query.id, query)
            values = example.grades if spec.grades and example.scores is None else example.scores
            for number, item in enumerate(example.documents):
                documents.setdefault(item.id, item)
                pair = query.id, item.id
                # Where examples disagree about a pair, it is a positive, with the highest score.
                labels[pair] = max(1 if number < len(example.positives) else -1, labels.get(pair, -1))
                if values is not None:
                    scores[pair] = max(values[number], scores.get(pair, -math.inf))
            if spec.teacher_scores and len({item.id for item in example.documents}) < 2:
                raise ValueError(
                    f"{query.origin}: distillation compares documents, and the row has one. Add negatives."
                )
            if spec.needs_negative and not example.negatives:
                raise ValueError(
                    f"{query.origin}: the loss has in_batch_negatives: false, so that there is nothing to tell the "
                    "positive from where a row has no negatives of its own. Add some."
                )
        distinct = {**queries, **documents}
        order, chunks, images = cut(self.preprocessor.prepare([*distinct.values()], draft=True), self.chunking)
        # Items are encoded in the order of the chunks: the row of each id in the embeddings.
        ids = [*distinct]
        row = {ids[number]: row for row, number in enumerate(order)}
        return Batch(
            chunks=chunks,
            images=images,
            queries=torch.tensor([row[query] for query in queries]),
            documents=torch.tensor([row[document] for document in documents], dtype=torch.long),
            query_ids=torch.tensor([*queries]),
            document_ids=torch.tensor([*documents], dtype=torch.long),
            pairs=torch.tensor([*labels], dtype=torch.long).reshape(-1, 2),
            labels=torch.tensor([*labels.values()], dtype=torch.int8),
            scores=torch.tensor([scores[pair] for pair in labels]) if spec.teacher_scores or spec.grades else None,
            origins=tuple(example.query.origin for example in examples),
            loss=loss,
        )

    def loader(self, evaluation: Any, batch_size: int, rank: int, world_size: int, **options: Any) -> DataLoader:
        """See `Collator.loader`: queries and corpus, sorted by cost."""
        read = partial(_read_items, evaluation)
        costs = [
            self.preprocessor.cost(item) for _, item in read(range(len(evaluation.queries) + len(evaluation.corpus)))
        ]
        batches = shard(costs, batch_size, rank, world_size)
        return DataLoader(RowLists(read), batch_size=None, sampler=batches, collate_fn=self.collate_items, **options)

    def collate_items(self, rows: Sequence[tuple[int, Item]]) -> ItemBatch:
        """Preprocess items as one chunk."""
        prepared = self.preprocessor.prepare([item for _, item in rows])
        chunk = prepared.chunk(range(len(rows)))
        return ItemBatch([chunk], prepared.images(None), torch.tensor([row for row, _ in rows]))


def _read_items(evaluation: EvaluationSet, rows: Sequence[int]) -> list[tuple[int, Item]]:
    """Read items by number, queries first; they come with their numbers."""
    queries, corpus = evaluation.queries, evaluation.corpus
    return [(row, queries[row] if row < len(queries) else corpus[row - len(queries)]) for row in rows]


def check_scores(examples: Sequence[Example], wanted: bool) -> None:
    """Refuse examples that have scores which the loss does not want, or lack those that it wants."""
    for example in examples:
        if wanted and example.scores is None:
            raise ValueError(
                f"{example.query.origin}: the loss distils a teacher's scores, and there are none. Add a column "
                "'scores' (`python -m vlmembed score`), or choose a loss of labels."
            )
        if not wanted and example.scores is not None:
            raise ValueError(
                f"{example.query.origin}: scores given but unused. Choose a loss that distils them, such as "
                "vlmembed.losses.ScoreDistillation, or drop the column: Rows(path, columns={scores: null})."
            )


#: The number of a pair's query and of its document in the evaluation set, and the pair.
NumberedPair = tuple[int, int, Pair]


class PairCollator(Collator):
    """Makes batches for cross-encoders: the pairs of each query and its candidates.

    Args, besides those of `Collator`:
        in_batch_negatives: How many documents of other examples each query gets as negatives, besides those of its row.
        by_document: Whether pairs of one document are scored together when measuring, instead of those of one query.
    """

    distinct_queries = False
    load = staticmethod(as_reranking)

    def __init__(
        self,
        preprocessor: Preprocessor,
        label_spec: LabelSpec,
        in_batch_negatives: int = 0,
        by_document: bool = False,
        named: Mapping[str, LabelSpec] | None = None,
    ) -> None:
        super().__init__(preprocessor, label_spec, named)
        if in_batch_negatives and any(spec.teacher_scores for spec in self.label_specs.values()):
            raise ValueError(
                f"in_batch_negatives={in_batch_negatives}: the loss distils a teacher's scores, and it has none of "
                "other rows' documents. Set in_batch_negatives: 0."
            )
        self.in_batch_negatives = in_batch_negatives
        self.by_document = by_document

    def __call__(self, examples: Sequence[Example]) -> RankingBatch:
        """Pair each query with its candidates, equal pairs once."""
        targets: dict[tuple[int, int], float] = {}
        pairs: dict[tuple[int, int], Pair] = {}
        extended = self._with_negatives(examples) if self.in_batch_negatives else examples
        loss, spec = self.loss_of(examples)
        _check_labels(extended, spec)
        for example in extended:
            for document, target in zip(example.documents, example.scores or example.grades, strict=True):
                key = example.query.id, document.id
                pairs.setdefault(key, Pair(example.query, document))
                # Where examples disagree about a pair, the highest counts: a positive is no negative.
                targets[key] = max(target, targets.get(key, -math.inf))
        order, chunks, images = cut(self.preprocessor.prepare([*pairs.values()], draft=True), self.chunking)
        keys = [*pairs]  # (query id, document id) of each of the N pairs.
        return RankingBatch(
            chunks=chunks,
            images=images,
            queries=torch.tensor([keys[row][0] for row in order]),
            documents=torch.tensor([keys[row][1] for row in order]),
            targets=torch.tensor([targets[keys[row]] for row in order]),
            origins=tuple(example.query.origin for example in examples),
            loss=loss,
        )

    def check(self, example: Example) -> None:
        """See `Collator.check`: a query that has one candidate by itself gets others from the batch."""
        _, spec = self.loss_of([example])
        several = spec.needs_several and not self.in_batch_negatives
        PairCollator(self.preprocessor, replace(spec, needs_several=several))([replace(example, loss=None)])

    def _with_negatives(self, examples: Sequence[Example]) -> list[Example]:
        """Give each example documents of the others, the same ones whenever the batch is made."""
        documents: dict[int, Item] = {}
        candidates: dict[int, set[int]] = {}
        for example in examples:
            documents |= {item.id: item for item in example.documents}
            candidates.setdefault(example.query.id, set()).update(item.id for item in example.documents)
        extended = []
        for example in examples:
            query = example.query.id
            others = [document for document in documents if document not in candidates[query]]
            drawn = random.Random(query).sample(others, min(self.in_batch_negatives, len(others)))
            labels = None if example.labels is None else example.labels + (0.0,) * len(drawn)
            negatives = example.negatives + tuple(documents[document] for document in drawn)
            extended.append(replace(example, negatives=negatives, labels=labels))
        return extended

    def loader(self, evaluation: Any, batch_size: int, rank: int, world_size: int, **options: Any) -> DataLoader:
        """See `Collator.loader`: pairs that share a query, or a document, one after the other."""
        pairs = [(query, column) for query, row in enumerate(evaluation.candidates) for column in row]
        if self.by_document:
            pairs.sort(key=lambda pair: pair[1])
        count = world_size * -(-len(pairs) // (batch_size * CHUNKS_PER_BATCH * world_size))
        edges = [len(pairs) * number // count for number in range(count + 1)]
        batches = [pairs[slice(*edges[number : number + 2])] or pairs[:1] for number in range(rank, count, world_size)]
        read = RowLists(partial(read_pairs, evaluation.evaluation))
        collate = partial(self.collate_pairs, chunking=Chunking(batch_size, patch_cost=0.0))
        return DataLoader(read, batch_size=None, sampler=batches, collate_fn=collate, **options)

    def collate_pairs(self, pairs: Sequence[NumberedPair], chunking: Chunking) -> PairBatch:
        """Preprocess pairs, and their distinct images once."""
        order, chunks, images = cut(self.preprocessor.prepare([pair for _, _, pair in pairs]), chunking)
        return PairBatch(chunks, images, torch.tensor([pairs[row][:2] for row in order]))


def _check_labels(examples: Sequence[Example], spec: LabelSpec) -> None:
    """Refuse examples that do not say what the loss wants to know."""
    check_scores(examples, spec.teacher_scores)
    for example in examples:
        origin, documents, labels = example.query.origin, example.documents, example.grades
        if spec.needs_several and len(documents) < 2:
            raise ValueError(
                f"{origin}: the query has one candidate, and this loss compares several. Add negatives, or group "
                "the rows of a query with vlmembed.data.GroupByQuery."
            )
        if spec.teacher_scores:
            continue
        for document, label in zip(documents, labels, strict=True):
            if not 0 <= label <= spec.largest:
                takes = f"what this loss takes, 0 to {spec.largest:g}"
                raise ValueError(f"{document.origin or origin}: label {label:g} is outside of {takes}.")
        if spec.needs_positive and max(labels) <= 0:
            raise ValueError(
                f"{origin}: none of the query's {len(documents)} candidates has a label above 0, and this loss "
                "needs a positive. Use vlmembed.data.GroupByQuery, or a pointwise loss such as BinaryCrossEntropy."
            )


def read_pairs(evaluation: EvaluationSet, numbers: Sequence[tuple[int, int]]) -> list[NumberedPair]:
    """Read the pairs of a query's number and a document's; an item is read once, whatever it is paired with."""
    queries = {query: evaluation.queries[query] for query in {query for query, _ in numbers}}
    documents = {column: evaluation.corpus[column] for column in {column for _, column in numbers}}
    return [(query, column, Pair(queries[query], documents[column])) for query, column in numbers]
