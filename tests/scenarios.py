"""Training runs that two processes share, to be told from the same runs in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from building import Recorder, batch, examples, fit, item, relative_difference, texts
from peft import LoraConfig
from torch.optim import SGD

from vlmembed.adapters import Adapter
from vlmembed.losses import CoSENT, InfoNCE, Loss, Matryoshka
from vlmembed.modules import EmbeddingModule
from vlmembed.types import Example

#: Another order of float32 sums.
EXACT = 1e-5

#: Far below the norm of the gradients, as `check_clipping` makes sure.
CLIP = 0.5

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False)

#: The examples of the two processes, for one batch.
Step = tuple[list[Example], list[Example]]

OPTIMIZER = partial(SGD, lr=0.01)


@dataclass(frozen=True)
class Scenario:
    """One training run, and what it is made of.

    Args:
        steps: For each batch, the examples of the two processes.
        loss: Of the module.
        adapters: Of the module.
        backbone: Options of it.
        trainer: Options of Lightning's trainer.
        losses: Those that examples name.
    """

    steps: list[Step]
    loss: Loss = field(default_factory=lambda: Matryoshka(InfoNCE(0.05), [64, 16]))
    adapters: tuple[Adapter, ...] = ()
    backbone: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Loss] = field(default_factory=dict)

    def train(
        self, build: Callable[[Scenario], EmbeddingModule], rank: int | None, chunk_size: int | None, **strategy: Any
    ) -> Recorder:
        """Train as one of two processes, or alone on everybody's examples."""
        torch.manual_seed(0)
        model = build(self)
        rows = [[*first, *second] if rank is None else (first, second)[rank] for first, second in self.steps]
        return fit(model, [batch(model, each, chunk_size) for each in rows], **self.trainer, **strategy)


def mixed_steps(count: int) -> list[Step]:
    """Uneven shares; a document of both, several positives, different numbers of negatives."""
    rows = examples(5 * count)
    return [(rows[start : start + 1], rows[start + 1 : start + 5]) for start in range(0, 5 * count, 5)]


def split_steps(count: int) -> list[Step]:
    """Pictures in the first process, texts alone in the second."""
    return [(examples(3), texts(count + 1)[step:]) for step in range(count)]


def several_losses(count: int) -> list[Step]:
    """Batches of the module's own loss, of graded pairs, and of rows with negatives, by turns."""

    def graded(number: int, row: Example) -> Example:
        labels = tuple((number + 3 * rank) % 4 / 2 for rank in range(len(row.documents)))
        return replace(row, labels=labels, loss="graded")

    def with_negatives(number: int, row: Example) -> Example:
        return replace(row, negatives=(*row.negatives, item(f"another class {number}")), loss="classes")

    kinds: list[Callable[[int, Example], Example]] = [lambda number, row: row, graded, with_negatives]
    steps = []
    for step, (first, second) in enumerate(mixed_steps(count)):
        kind = kinds[step % 3]
        steps.append(tuple([kind(number, row) for number, row in enumerate(share)] for share in (first, second)))
    return steps  # type: ignore[return-value]


def losses() -> dict[str, Loss]:
    return {"graded": CoSENT(0.1), "classes": InfoNCE(0.05, learnable_temperature=True, in_batch_negatives=False)}


def learnable() -> Loss:
    return InfoNCE(0.05, learnable_temperature=True, directions=["query_to_document", "document_to_query"])


def check_trained_as_one(first: Recorder, second: Recorder, alone: Recorder) -> None:
    """Compare two processes with each other, and with one."""
    assert first.losses == second.losses
    assert all(torch.equal(tensor, second.weights[-1][name]) for name, tensor in first.weights[-1].items())
    assert first.losses == pytest.approx(alone.losses, rel=EXACT)
    assert relative_difference(first.gradients[0], alone.gradients[0]) < EXACT
    assert relative_difference(first.update(1), alone.update(1)) < EXACT
    assert relative_difference(first.update(3), alone.update(3)) < EXACT
    # From the second step on, gradients are those of weights that were rounded differently.
    assert relative_difference(first.gradients[2], alone.gradients[2]) < 10 * EXACT


def check_clipping(alone: Recorder) -> None:
    """Else two processes could agree with one for lack of a difference to make."""
    for gradient in alone.gradients:
        assert sum(tensor.square().sum() for tensor in gradient.values()).sqrt() > 4 * CLIP
