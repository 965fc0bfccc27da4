"""Steps whose loss or gradient is no number are not taken, and weights that are none are not kept."""

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
from vlmembed.losses.base import masked as cleared

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from vlmembed import distributed
from vlmembed.files import write_whole

#: Where skipped steps are written down, in the run's folder.
FILE = "non_finite.jsonl"
#: How many parameters are named.
NAMED = 5

#: A batch's loss, and where its rows came from.
_Batch = tuple[Tensor, tuple[str, ...]]

ADVICE = (
    "If it is always the same rows, look at these. Otherwise lower the learning rate or warm it up longer, clip "
    "gradients (trainer.gradient_clip_val: 1.0), raise the loss's temperature, or, with a precision of 16 bits, set "
    "trainer.precision: bf16-mixed."
)


class NonFiniteGuard:
    """Skips optimizer steps whose loss or gradient is not finite, and stops a run that has little else.

    A skipped step changes nothing: neither weights nor the optimizer's moments, which would keep a NaN for good. The
    schedule goes on, so that a run is as long as it was meant to be. Each is a line of ``non_finite.jsonl`` in the
    run's folder: the step as in ``metrics.csv``, the norm of its gradient, some of the parameters whose gradient is
    broken, and of each batch (several, where gradients are accumulated) its loss and its rows, over all processes.

    This is the one place of a step where the host waits for the device, as no optimizer can be told afterwards that it
    should not have stepped. What is asked is the norm of all gradients, which clipping needs anyway.

    With a gradient scaler (``precision: 16-mixed``) skipping is the scaler's, and so are steps too large for its scale:
    nothing is counted until the scale is down at 1, or the loss itself is not finite.

    Args:
        limit: How many steps in a row may be skipped.

    Raises:
        ValueError: If it is below 0.
    """

    def __init__(self, limit: int = 10) -> None:
        if limit < 0:
            raise ValueError(f"max_skipped_steps is 0, to stop at the first, or more; got {limit}.")
        self.limit = limit
        #: In the whole run, and without one that was taken since.
        self.skipped, self.in_a_row = 0, 0
        self._batches: list[_Batch] = []

    def add(self, loss: Tensor, origins: tuple[str, ...]) -> None:
        """Take note of a batch of the coming step.

        Args:
            loss: () of all processes' batches.
            origins: Where the rows of this process's batch came from.
        """
        self._batches.append((loss.detach(), origins))

    def check(self, module: LightningModule, optimizer: Optimizer, norm: Tensor) -> bool:
        """Say whether to step; all processes call this, and are told the same. If not, the gradients are gone.

        Args:
            module: What is trained, before the optimizer steps.
            optimizer: What is about to step.
            norm: () of all gradients together.

        Raises:
            RuntimeError: If too many steps in a row had to be skipped, or because weights are broken.
        """
        batches, self._batches = self._batches, []
        # A scaler goes by gradients alone.
        asked = [norm.float(), *(loss.float() for loss, _ in batches if module.trainer.scaler is None)]
        finite = not distributed.any_process(~torch.stack(asked).isfinite().all())
        if finite:
            self.in_a_row = 0
        else:
            self._skip(module, optimizer, float(norm), batches)
        if self.skipped:
            module.log("train/skipped_steps", float(self.skipped))
        return finite

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        """Count on from a checkpoint."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def begin(self, module: LightningModule) -> None:
        """Forget steps that a resumed run takes again; all processes call this."""
        path = _file(module)
        if path is None or not module.trainer.is_global_zero or not path.exists():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines(True) if _step(line) < module.global_step]
        write_whole(path, "".join(kept).encode())

    def _skip(self, module: LightningModule, optimizer: Optimizer, norm: float, batches: list[_Batch]) -> None:
        scaler = module.trainer.scaler
        losses = [float(loss) for loss, _ in batches]
        if scaler is None or scaler.get_scale() <= 1 or not all(map(math.isfinite, losses)):
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            self._report(module, norm, losses, [origins for _, origins in batches])
        if scaler is None:
            # Not zero: what has no gradient is left alone, moments and weight decay included.
            optimizer.zero_grad(set_to_none=True)

    def _report(self, module: LightningModule, norm: float, losses: list[float], rows: list[tuple[str, ...]]) -> None:
        """Write the step down, say so, and stop if it was one too many."""
        step, where = module.global_step, self._write(module, norm, losses, rows)
        broken = broken_weights(module)
        if broken:
            raise RuntimeError(
                f"Step {step}: weights are not finite, such as {broken[0]}, and no later step can mend them.{where} Go "
                f"on from a checkpoint. {ADVICE}"
            )
        said = ", ".join(f"{loss:.3g}" for loss in losses)
        rank_zero_warn(f"Step {step} is skipped: the norm of its gradient is {norm:.3g}, its loss {said}.{where}")
        if self.in_a_row > self.limit:
            raise RuntimeError(
                f"{self.in_a_row} optimizer steps in a row had a loss or a gradient that is not finite, and "
                f"max_skipped_steps is {self.limit}.{where} {ADVICE}"
            )

    def _write(self, module: LightningModule, norm: float, losses: list[float], rows: list[tuple[str, ...]]) -> str:
        """Append a line, and say where it is."""
        gradients = ((name, each.grad) for name, each in module.named_parameters() if each.grad is not None)
        everybodys = zip(*distributed.gather_objects(rows), strict=True)
        entry = {
            "step": module.global_step,
            "epoch": module.current_epoch,
            "gradient_norm": _number(norm),
            "parameters": _broken(gradients, lambda gradient: gradient.norm())[:NAMED],
            "batches": [
                {"loss": _number(loss), "rows": sum(parts, start=())}
                for loss, parts in zip(losses, everybodys, strict=True)
            ],
        }
        path = _file(module)
        if path is None:
            return ""
        if module.trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        return f" The rows of its batch are in {path}."


def refuse_broken_weights(module: LightningModule) -> None:
    """Refuse to keep weights that are no numbers; all processes call this.

    Raises:
        RuntimeError: With the names of parameters.
    """
    broken = broken_weights(module)
    if broken:
        raise RuntimeError(
            f"{len(broken)} parameters are not finite, such as {broken[0]} and {broken[-1]}, so no checkpoint is "
            f"written; earlier ones are as they were. {ADVICE}"
        )


def broken_weights(module: nn.Module) -> list[str]:
    """Name the trained parameters that are not finite; what is frozen stays what was read. All processes call this."""
    trained = [(name, each.detach()) for name, each in module.named_parameters() if each.requires_grad]
    # The largest number, because a sum of squares may be too large where each weight is fine.
    parts = [distributed.local_part(weight) for _, weight in trained]
    largest = nn.utils.get_total_norm([part for part in parts if part.numel()], math.inf)
    if not distributed.any_process(~largest.isfinite()):
        return []
    return _broken(trained, lambda weight: weight.abs().max())


def _broken(tensors: Iterable[tuple[str, Tensor]], size: Callable[[Tensor], Tensor]) -> list[str]:
    """Name what is not finite in any process."""
    parts = [(name, distributed.local_part(tensor)) for name, tensor in tensors]
    here = [name for name, part in parts if part.numel() and not size(part).isfinite()]
    return list(dict.fromkeys(name for names in distributed.gather_objects(here) for name in names))


def _file(module: LightningModule) -> Path | None:
    """Where to write, if the run has a folder; all processes ask, as Lightning wants it."""
    folder = module.trainer.log_dir if module.trainer.loggers else None
    return None if folder is None else Path(folder) / FILE


def _step(line: str) -> float:
    """The step of a line; a line that a killed process left unfinished has none."""
    try:
        step: int = json.loads(line)["step"]
    except ValueError:
        return math.inf
    return step


def _number(value: float) -> Any:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)




#: A step is looked at after so many, and after so many looks they are judged: 100 steps.
EVERY, LOOKS = 10, 10
#: From where on outputs count as all alike, and how close to chance a loss is at chance.
ALIKE, AT_CHANCE = 0.99, 0.01

CAUSES = (
    "Likely causes: a learning rate that is too high or too low ({rate:.3g} now), a pooling that reads the wrong "
    "tokens, adapters that freeze what should learn, a temperature that is far too high, or rows whose answers do not "
    "answer their queries."
)


class CollapseMonitor(ABC):
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
    def check(self, module: LightningModule, loss: nn.Module) -> None:
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


class _E(CollapseMonitor):
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


class _S(CollapseMonitor):
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
    return cleared(scores, mask).sum() / mask.sum()

CollapseMonitor.of_embeddings = staticmethod(lambda: _E())
CollapseMonitor.of_scores = staticmethod(lambda: _S())
