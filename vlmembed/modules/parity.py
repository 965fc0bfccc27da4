"""Whether a step's gradient is right: asked once, of the user's own run, before it trains."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from vlmembed import distributed
from vlmembed.losses import InfoNCE, Loss, Matryoshka, WeightedSum
from vlmembed.modules.embedding import EmbeddingModule
from vlmembed.modules.gradients import StepGradients
from vlmembed.modules.reduction import reduced
from vlmembed.types import Batch

#: What is tolerated: so many times what that changes, and this share of the gradient in any case.
FACTOR, FLOOR = 10.0, 1e-5
#: Where this share is tolerated, a factor of two in the gradient may go unseen.
BLIND = 0.5


class ParityCheck(Callback):
    """Compares a step's gradient with ordinary autograd's before training, and refuses to train if they differ.

    A few items of the first batch go through the step as it will be run: in chunks, some of them embedded twice, over
    all processes, in the run's precision. The same items also go through the encoder with every graph kept, and through
    the loss as its documentation defines it, pair by pair and in float64 (InfoNCE, and Matryoshka or WeightedSum around
    it; any other loss is taken as it is, and what is printed says so).

    How far apart the two gradients may be is measured as well. The second one is taken three times more, with all that
    can be rounded otherwise rounded otherwise: the loss in float32, on embeddings of a pass without graphs that are
    changed by as much as a similarity is rounded, and their gradient sent back in two random parts. Ten times what this
    changes (root mean square) is tolerated, and 1e-5 of the gradient in any case, for each group of parameters by
    itself: ``vision``, ``merger``, ``language``, ``pooling`` and ``loss``.

    Everything is left as it was: gradients, random states, buffers, logged values, kept features. The time is that of a
    dozen passes over ``items`` items, the memory that of all their graphs and of three gradients.

    Args:
        items: The most queries and documents to take of each process's batch. Where the backbone reads images together
            with their text, the whole chunks that these are in.
        on_failure: ``raise`` to stop, ``warn`` to train all the same.

    Raises:
        ValueError: If ``items`` has no room for two queries, each with something right and something wrong.
    """

    def __init__(self, items: int = 8, on_failure: Literal["raise", "warn"] = "raise") -> None:
        if items < 6:
            raise ValueError(f"items is 6 or more: two queries, each with something right and wrong; got {items}.")
        self.items = items
        self.on_failure = on_failure

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Check, before the first step.

        Raises:
            RuntimeError: If the step's gradient is another one.
        """
        if trainer.global_step or batch_idx:
            return
        if not isinstance(pl_module, EmbeddingModule):
            raise TypeError(f"ParityCheck knows the step of an EmbeddingModule, not of a {type(pl_module).__name__}.")
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"ParityCheck needs whole weights, and {type(trainer.strategy).__name__} may shard them. Check the run "
                "on one device or with trainer.strategy: ddp, and remove the callback here."
            )
        few = reduced(batch, self.items)
        step = StepGradients(trainer, pl_module, few)
        expected, noise, graph_bytes = step.unchunked()
        # Less than all graphs take: what is embedded twice is checked, whatever there is room for.
        found = step.chunked(min(pl_module.engine.graph_bytes, graph_bytes / 2))
        difference = step.norms(map(torch.sub, found, expected))
        table, complaint = _compared(step.norms(found), step.norms(expected), difference, noise)
        chunks = f"{len(few.chunks)} chunks" if len(few.chunks) > 1 else "a single chunk (so nothing is chunked)"
        distributed.print_once(
            f"Parity check {'failed' if complaint else 'passed'}, of {len(few.queries)} queries and "
            f"{len(few.documents)} documents in {chunks}{_taken_as_it_is(pl_module.loss)}:\n{table}"
        )
        if complaint and self.on_failure == "raise":
            raise RuntimeError(complaint)
        if complaint:
            warnings.warn(complaint, stacklevel=2)


def _compared(
    found: dict[str, float], expected: dict[str, float], difference: dict[str, float], noise: dict[str, float]
) -> tuple[str, str]:
    """Return a table, and what is wrong: nothing if all is right. All arguments are norms of each group."""
    lines = [f"  {'gradient of':<12}{'difference':>12}{'tolerated':>12}"]
    wrong: dict[float, str] = {}
    for group, norm in expected.items():
        # A gradient may be nothing.
        size = norm or torch.finfo(torch.float32).tiny
        apart, tolerated = difference[group] / size, FLOOR + FACTOR * noise[group] / size
        blind = "" if tolerated < BLIND else "  rounding hides errors"
        lines.append(f"  {group:<12}{apart:>12.1e}{tolerated:>12.1e}{blind}")
        # Also if it is not a number.
        if not apart <= tolerated:
            along = (found[group] ** 2 + size**2 - difference[group] ** 2) / (2 * size**2)
            aside = math.sqrt(max(0.0, (found[group] / size) ** 2 - along**2))
            wrong[size] = (
                f"The step's gradient is not that of its loss. Of {group} parameters it differs by {apart:.2g} of its "
                f"size, and rounding explains {tolerated:.2g}. "
                + _advice(along, straight=aside <= max(1e-3, tolerated) * abs(along))
            )
    return "\n".join(lines), wrong[max(wrong)] if wrong else ""


def _advice(along: float, straight: bool) -> str:
    if straight:
        return (
            f"It is {along:.3g} times what it should be: look for a factor that is missing or there twice, such as the "
            "number of processes."
        )
    return (
        "It points elsewhere: look at what the step does with the temperature and with the negatives, and whether "
        "dropout falls the same way when a chunk is embedded again."
    )


def _taken_as_it_is(loss: Loss) -> str:
    names = ", ".join(sorted({type(inner).__name__ for inner in _innermost(loss) if type(inner) is not InfoNCE}))
    return f" ({names} is taken as it is)" if names else ""


def _innermost(loss: Loss) -> Iterator[Loss]:
    inside = (
        [loss.loss]
        if type(loss) is Matryoshka
        else [each for each, _ in loss.terms]
        if type(loss) is WeightedSum
        else []
    )
    if not inside:
        yield loss
    for each in inside:
        yield from _innermost(each)
