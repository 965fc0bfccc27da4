"""What a model is given: items, each on its own, or queries together with their candidates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch.utils.data import DataLoader

from vlmembed.data.collate import (
    Collator,
    EvaluationPairCollator,
    ExampleCollator,
    ItemCollator,
    PairCollator,
    PairLists,
)
from vlmembed.data.evaluation import EvaluationSource, RerankingSource, as_evaluation, load_reranking
from vlmembed.data.sampling import ItemLists, shard
from vlmembed.data.sources import Source
from vlmembed.losses import LabelSpec
from vlmembed.types import EvaluationSet, Preprocessor, RerankingSet

#: So many chunks of pairs are read at once: an image that several of them show is preprocessed, and seen, once.
CHUNKS_PER_BATCH = 8


class Task(ABC):
    """How batches are made for a model.

    Attributes:
        distinct_queries: Whether no query may come twice in a batch, where it would be its own negative.
    """

    distinct_queries = True

    @abstractmethod
    def collator(
        self, preprocessor: Preprocessor, chunk_size: int | None, chunk_cost: int | None, patch_cost: float
    ) -> ExampleCollator:
        """Return what makes a batch of examples."""

    @abstractmethod
    def load(self, given: Any, split: str) -> Any:
        """Load one evaluation set: from a path, training rows, or a source of its own."""

    @abstractmethod
    def loader(
        self, evaluation: Any, preprocessor: Preprocessor, size: int, rank: int, world_size: int, **options: Any
    ) -> DataLoader:
        """Return the loader of an evaluation set, for one process.

        Args:
            evaluation: The set.
            preprocessor: From items to model inputs.
            size: How many items go through the model at once.
            rank: Which process this is.
            world_size: How many there are.
            **options: Of the loader.
        """


class Embedding(Task):
    """To embed queries and documents, each on its own.

    Args:
        wants_scores: Whether the loss distils a teacher's scores.
    """

    def __init__(self, wants_scores: bool = False) -> None:
        self.wants_scores = wants_scores

    def collator(
        self, preprocessor: Preprocessor, chunk_size: int | None, chunk_cost: int | None, patch_cost: float
    ) -> Collator:
        """See `Task.collator`."""
        return Collator(preprocessor, chunk_size, chunk_cost, patch_cost, self.wants_scores)

    def load(self, given: str | Source | EvaluationSource | RerankingSource, split: str) -> EvaluationSet:
        """See `Task.load`.

        Raises:
            ValueError: If the source says what to put in order, and not what to search.
        """
        if isinstance(given, RerankingSource):
            raise ValueError(f"{type(given).__name__} is for a cross-encoder; an embedder searches a whole corpus.")
        return as_evaluation(given, split)

    def loader(
        self,
        evaluation: EvaluationSet,
        preprocessor: Preprocessor,
        size: int,
        rank: int,
        world_size: int,
        **options: Any,
    ) -> DataLoader:
        """See `Task.loader`: queries and corpus, sorted by cost."""
        items = ItemLists(evaluation)
        costs = [preprocessor.cost(items.item(row)) for row in range(len(items))]
        batches = shard(costs, size, rank, world_size)
        return DataLoader(items, sampler=batches, collate_fn=ItemCollator(preprocessor), **options)


class Reranking(Task):
    """To score queries together with their candidates.

    Args:
        targets: What the loss wants to know of each candidate.
        by_document: Whether pairs of one document are scored together, instead of those of one query.
        in_batch_negatives: How many documents of other rows each query gets as wrong answers besides its own.

    Raises:
        ValueError: If there are to be such documents, and a teacher has to have scored every one.
    """

    distinct_queries = False

    def __init__(self, targets: LabelSpec, by_document: bool = False, in_batch_negatives: int = 0) -> None:
        if in_batch_negatives and targets.teacher_scores:
            raise ValueError(
                f"in_batch_negatives={in_batch_negatives}: the loss distils a teacher's scores, and it has none of "
                "other rows' documents. Set in_batch_negatives: 0."
            )
        self.targets = targets
        self.by_document = by_document
        self.in_batch_negatives = in_batch_negatives

    def collator(
        self, preprocessor: Preprocessor, chunk_size: int | None, chunk_cost: int | None, patch_cost: float
    ) -> PairCollator:
        """See `Task.collator`."""
        return PairCollator(preprocessor, self.targets, chunk_size, chunk_cost, patch_cost, self.in_batch_negatives)

    def load(self, given: str | Source | EvaluationSource | RerankingSource, split: str) -> RerankingSet:
        """See `Task.load`.

        Raises:
            ValueError: If no query has a candidate.
        """
        loaded = load_reranking(given, split)
        if not any(map(len, loaded.candidates)):
            raise ValueError(f"{loaded.name}: no query has a candidate, so there is nothing to put in order.")
        return loaded

    def loader(
        self,
        evaluation: RerankingSet,
        preprocessor: Preprocessor,
        size: int,
        rank: int,
        world_size: int,
        **options: Any,
    ) -> DataLoader:
        """See `Task.loader`: pairs that share a query, or a document, one after the other."""
        pairs = PairLists(evaluation, self.by_document)
        block = size * CHUNKS_PER_BATCH
        rounds = -(-len(pairs) // (block * world_size))
        # All processes get equally many batches, so that none waits for another that has no more.
        edges = [len(pairs) * number // (rounds * world_size) for number in range(rounds * world_size + 1)]
        batches = [[*range(*edges[place : place + 2])] or [0] for place in range(rank, rounds * world_size, world_size)]
        return DataLoader(pairs, sampler=batches, collate_fn=EvaluationPairCollator(preprocessor, size), **options)
