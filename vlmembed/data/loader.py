"""Loaders: whole batches of rows at once, and a training loader that resumes where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlmembed.data.batches import Batches
from vlmembed.data.sources import Source
from vlmembed.types import EvaluationSet, Example, Item


class ExampleLists(Dataset[list[Example]]):
    """Training rows by lists of row numbers.

    Args:
        source: The rows.
    """

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, rows: Sequence[int]) -> list[Example]:
        return [self.source[row] for row in rows]


class ItemLists(Dataset[list[tuple[int, Item]]]):
    """The items of an evaluation set, queries first, by lists of row numbers; each comes with its number.

    Args:
        evaluation: The evaluation set.
    """

    def __init__(self, evaluation: EvaluationSet):
        self.evaluation = evaluation

    def __len__(self) -> int:
        return len(self.evaluation.queries) + len(self.evaluation.corpus)

    def __getitem__(self, rows: Sequence[int]) -> list[tuple[int, Item]]:
        return [(row, self.item(row)) for row in rows]

    def item(self, row: int) -> Item:
        """Return one item: a query, or a document at ``row - len(queries)``."""
        queries = self.evaluation.queries
        return queries[row] if row < len(queries) else self.evaluation.corpus[row - len(queries)]


class ResumableLoader(DataLoader):
    """A training loader whose place in the epoch is saved in checkpoints.

    Lightning makes the first iterator of a run before it sets the epoch. Iteration here starts with the first batch
    that is asked for, so the epoch is the right one.
    """

    sampler: Batches
    _batch = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._batch = self.sampler.skip
        # The same in every run that comes to this epoch, resumed or not.
        self.generator = own_generator(self.sampler.seed, self.sampler.epoch, self.sampler.rank)
        for batch in super().__iter__():
            # Counted when handed out, not when a worker reads ahead; a checkpoint is written after the batch's step.
            self._batch += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Say which rows of which epoch have been handed out, over all processes."""
        return {"epoch": self.sampler.epoch, "rows": self._batch * self.sampler.global_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after them, in the same order if the global batch is of the same size."""
        self.sampler.set_epoch(state["epoch"])
        # Of both: another checkpoint may be written before a batch is asked for.
        self._batch = self.sampler.skip = state["rows"] // self.sampler.global_size


def own_generator(*seeds: int) -> torch.Generator:
    """Return what a loader seeds its workers from, so that starting them draws nothing from the run's random state.

    Args:
        *seeds: Numbers that make it another one.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))


def shard(costs: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Cut rows into batches of similar cost, the most expensive first, and deal them to the processes.

    All processes get equally many batches, so that none waits for another that has no more. Every row is in one batch
    of one process; only where there are fewer rows than batches does one repeat.

    Args:
        costs: Of each row.
        batch_size: Rows per batch, at most.
        rank: Which process this is.
        world_size: How many there are.
    """
    order = np.argsort(-np.asarray(costs), kind="stable")
    rounds = -(-len(order) // (batch_size * world_size))
    pieces = np.array_split(order, rounds * world_size)
    return [(piece if len(piece) else order[-1:]).tolist() for piece in pieces[rank::world_size]]
