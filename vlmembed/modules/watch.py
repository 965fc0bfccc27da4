"""What a loss curve does not say in words: that embeddings are all alike, or that nothing is learnt."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlmembed.losses.base import masked

#: A step is looked at after so many, and after so many looks they are judged: 100 steps.
EVERY, LOOKS = 10, 10
#: From where on outputs count as all alike, and how close to chance a loss is at chance.
ALIKE, AT_CHANCE = 0.99, 0.01

CAUSES = (
    "Likely causes: a learning rate that is too high or too low ({rate:.3g} now), a pooling that reads the wrong "
    "tokens, adapters that freeze what should learn, a temperature that is far too high, or rows whose answers do not "
    "answer their queries."
)


class Watch(ABC):
    """Looks at some steps, and warns of outputs that are all alike and of a loss that stays at chance.

    Chance is what the loss itself gives for outputs that say nothing, on the same batches: the logarithm of the number
    of candidates for InfoNCE with one positive each, and whatever it is for another loss. Both are averaged over 100
    steps, of which every tenth is looked at; nobody waits for the device before the last. While the learning rate still
    rises nothing is judged. What was said is said again only if it has got better in between.

    Attributes:
        collapsed: What to say of outputs that are alike, with a place for how much.
    """

    collapsed: ClassVar[str]

    def __init__(self) -> None:
        self._noted: tuple[tuple[Tensor, ...], Tensor] | None = None
        self._seen: list[Tensor] = []
        self._rate = 0.0
        self._said: set[str] = set()

    @abstractmethod
    def likeness(self, *given: Tensor) -> Tensor:
        """Say how much alike the outputs of a batch are: 1 if they all are the same.

        Args:
            *given: What the loss is given.
        """

    @abstractmethod
    def saying_nothing(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return what the loss would be given if all outputs were the same.

        Args:
            *given: What it is given.
        """

    def note(self, step: int, given: tuple[Tensor, ...], value: Tensor) -> None:
        """Take note of a batch, if it is the turn of its step.

        Args:
            step: How many steps the optimizer has taken; this is the last batch before its next.
            given: What the loss was given.
            value: () what it made of that.
        """
        if step % EVERY == 0:
            self._noted = tuple(each.detach() for each in given), value.detach()

    @torch.no_grad()
    def look(self, module: LightningModule, loss: nn.Module) -> None:
        """Look at the batch that was noted, if one was.

        After its backward, which would fail if a loss that holds its parameters back in place, whenever it is asked,
        was asked in between.

        Args:
            module: What is trained, before its optimizer steps.
            loss: What it is trained with.
        """
        if self._noted is None:
            return
        (given, value), self._noted = self._noted, None
        likeness = self.likeness(*given)
        with module.trainer.precision_plugin.train_step_context():
            chance = self._chance(loss, given)
        self._seen.append(torch.stack([likeness, *(each.to(likeness) for each in (value, chance))]))
        if len(self._seen) == LOOKS:
            self._judge(float(module.trainer.optimizers[0].param_groups[0]["lr"]))

    def _chance(self, loss: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
        # One that keeps something from batch to batch would keep what it is asked here.
        if next(loss.buffers(), None) is not None:
            return given[0].new_full((), math.nan)
        device = given[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            chance: Tensor = loss(*self.saying_nothing(*given))
        return chance

    def _judge(self, rate: float) -> None:
        likeness, value, chance = torch.stack(self._seen).mean(0).tolist()
        self._seen.clear()
        rises, self._rate = rate > self._rate, rate
        if rises:
            return
        causes = CAUSES.format(rate=rate)
        self._say("alike", likeness > ALIKE, lambda: f"{self.collapsed.format(likeness)} {causes}")
        self._say(
            "chance",
            abs(value - chance) < AT_CHANCE * abs(chance),
            lambda: (
                f"The loss is at chance: {value:.4g} on average over the last {EVERY * LOOKS} steps, and {chance:.4g} "
                f"is what it gives if all outputs are the same. {causes}"
            ),
        )

    def _say(self, what: str, is_so: bool, sentence: Callable[[], str]) -> None:
        if is_so and what not in self._said:
            rank_zero_warn(sentence())
        self._said = self._said | {what} if is_so else self._said - {what}


class EmbeddingWatch(Watch):
    """Watches the embeddings of queries and documents; their likeness is the mean cosine of any two of them."""

    collapsed = "Embeddings have collapsed to about one point: two of a batch have a cosine of {:.4f} on average."

    def likeness(self, *given: Tensor) -> Tensor:
        """See `Watch.likeness`."""
        directions = normalize(torch.cat(given[:2]).float())
        count = len(directions)
        # All cosines together are the square of the sum of directions; each with itself is 1.
        return (directions.sum(0).square().sum() - count) / (count * (count - 1))

    def saying_nothing(self, *given: Tensor) -> tuple[Tensor, ...]:
        """See `Watch.saying_nothing`."""
        queries, documents, *judgements = given
        return torch.ones_like(queries), torch.ones_like(documents), *judgements


class ScoreWatch(Watch):
    """Watches scores; their likeness is 1 less their standard deviation, beside 1 or their mean if that is more."""

    collapsed = "Scores have collapsed: all pairs of a batch get about the same (their likeness is {:.4f} of 1)."

    def likeness(self, *given: Tensor) -> Tensor:
        """See `Watch.likeness`."""
        scores, _, mask = given
        mean = _mean(scores, mask)
        return 1 - _mean((scores - mean).square(), mask).sqrt() / mean.abs().clamp(min=1)

    def saying_nothing(self, *given: Tensor) -> tuple[Tensor, ...]:
        """See `Watch.saying_nothing`: all at their mean, as some losses care where."""
        scores, targets, mask = given
        return _mean(scores, mask).expand_as(scores), targets, mask


def _mean(scores: Tensor, mask: Tensor) -> Tensor:
    return masked(scores, mask).sum() / mask.sum()
