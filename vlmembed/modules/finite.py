"""Steps whose loss or gradient is no number are not taken, and weights that are none are not kept."""

from __future__ import annotations

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


class FiniteSteps:
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

    def allow(self, module: LightningModule, optimizer: Optimizer, norm: Tensor) -> bool:
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
        finite = not distributed.anywhere(~torch.stack(asked).isfinite().all())
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
    parts = [distributed.own_part(weight) for _, weight in trained]
    largest = nn.utils.get_total_norm([part for part in parts if part.numel()], math.inf)
    if not distributed.anywhere(~largest.isfinite()):
        return []
    return _broken(trained, lambda weight: weight.abs().max())


def _broken(tensors: Iterable[tuple[str, Tensor]], size: Callable[[Tensor], Tensor]) -> list[str]:
    """Name what is not finite in any process."""
    parts = [(name, distributed.own_part(tensor)) for name, tensor in tensors]
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
