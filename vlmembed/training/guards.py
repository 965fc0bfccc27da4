"""Guards of a run, against rows that cannot be read, steps that are not finite, and models that do not learn."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim import Optimizer

from vlmembed import distributed
from vlmembed.files import write_whole
from vlmembed.late_interaction import MultiVectors, Vectors
from vlmembed.types import BadRow, Example

if TYPE_CHECKING:
    from vlmembed.backbones import VisionLanguageModel

ADVICE = (
    "If it is always the same rows, look at these. Otherwise lower the learning rate or warm it up longer, clip "
    "gradients (trainer.gradient_clip_val: 1.0), raise the loss's temperature, or set trainer.precision: bf16-mixed."
)
CAUSES = (
    "Likely causes: a learning rate that is too high or too low ({:.3g} now), a pooling that reads the wrong tokens, "
    "adapters that freeze what should learn, a temperature that is too high, or rows whose positives do not answer."
)
NOTHING_TO_LEARN = (
    "There is nothing to learn: the loss is 0 if all outputs are the same, so no query has a negative, or a teacher "
    "scores all alike. Raise data.batch_size, give rows negatives, and look whether all documents are the same."
)
#: Steps between two looks at the outputs, and looks until they are judged: at step 40, and every 50 steps from there.
EVERY, LOOKS = 10, 5


# Steps that are not finite, and weights that are not reached


class NonFiniteGuard:
    """Skips optimizer steps whose loss or gradient is not finite, on all processes, and stops a run of little else.

    A skipped step changes neither weights nor moments. Each is a line of ``non_finite.jsonl`` in the run's folder. With
    a gradient scaler (``16-mixed``) a step counts once the scale is down at 1 or the loss is broken.
    """

    def __init__(self, max_skipped_steps: int = 10) -> None:
        if max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps is 0, to stop at the first, or more; got {max_skipped_steps}.")
        self.max_skipped_steps = max_skipped_steps
        #: In the whole run, and since the last step that was taken; a checkpoint keeps them.
        self.counts = {"skipped": 0, "in_a_row": 0}
        self._batches: list[tuple[Tensor, tuple[str, ...]]] = []

    def add(self, loss: Tensor, origins: tuple[str, ...]) -> None:
        """Remember a batch of the coming step: its loss () of all processes, and where this one's rows are from."""
        self._batches.append((loss.detach(), origins))

    def check(self, module: LightningModule, optimizer: Optimizer, norm: Tensor) -> bool:
        """Say whether to step, given the norm () of all gradients; otherwise remove the gradients. Collective."""
        batches, self._batches = self._batches, []
        scaler = module.trainer.scaler  # Decides by gradients alone, and skips by itself.
        numbers = [norm.float(), *(loss.float() for loss, _ in batches if scaler is None)]
        # The only place of a step where the host waits for the device: an optimizer cannot undo its step.
        is_finite = not distributed.largest(int(~torch.stack(numbers).isfinite().all()), norm.device)
        if is_finite:
            self.counts["in_a_row"] = 0
        elif scaler is None or scaler.get_scale() <= 1 or not all(loss.isfinite() for loss, _ in batches):
            self.counts = {name: count + 1 for name, count in self.counts.items()}
            self._report(module, float(norm), [(float(loss), origins) for loss, origins in batches])
        if not is_finite and scaler is None:
            optimizer.zero_grad(set_to_none=True)  # Without a gradient not even weight decay touches a weight.
        if self.counts["skipped"]:
            module.log("train/skipped_steps", float(self.counts["skipped"]))
        return is_finite

    def begin(self, module: LightningModule) -> None:
        """Drop the lines of steps that a resumed run takes again, and a line that a killed one left unfinished."""
        path = _log_path(module)
        if path is not None and module.trainer.is_global_zero and path.exists():
            *lines, _ = path.read_text(encoding="utf-8").split("\n")
            earlier = [f"{line}\n" for line in lines if json.loads(line)["step"] < module.global_step]
            write_whole(path, "".join(earlier).encode())

    def _report(self, module: LightningModule, norm: float, batches: list[tuple[float, tuple[str, ...]]]) -> None:
        """Write the step down, warn, and stop if it was one too many or nothing can mend the weights."""
        path = _log_path(module)
        gradients = ((name, weight.grad) for name, weight in module.named_parameters() if weight.grad is not None)
        ranks = distributed.gather_objects([origins for _, origins in batches])
        rows = [sum(parts, start=()) for parts in zip(*ranks, strict=True)]  # Of each batch, over all processes.
        entry = {
            "step": module.global_step,  # As in ``metrics.csv``.
            "epoch": module.current_epoch,
            "gradient_norm": _json(norm),
            "parameters": _not_finite(gradients, order=2)[:5],
            "batches": [{"loss": _json(loss), "rows": parts} for (loss, _), parts in zip(batches, rows, strict=True)],
        }
        if path is not None and module.trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        where = "" if path is None else f" The rows of its batch are in {path}."
        refuse_broken_weights(module)  # No later step can mend them.
        losses = ", ".join(f"{loss:.3g}" for loss, _ in batches)
        skipped = f"Step {module.global_step} is skipped: the norm of its gradient is {norm:.3g}, its loss {losses}."
        rank_zero_warn(skipped + where)
        if self.counts["in_a_row"] > self.max_skipped_steps:
            raise RuntimeError(
                f"{self.counts['in_a_row']} optimizer steps in a row had a loss or a gradient that is not finite, and "
                f"max_skipped_steps is {self.max_skipped_steps}.{where} {ADVICE}"
            )


def refuse_untouched_parameters(
    module: LightningModule, backbone: VisionLanguageModel, inputs: Collection[str]
) -> bool:
    """Refuse to train on if a backward did not reach a trainable parameter, by a RuntimeError with the names.

    ``inputs`` are the names of what the model was given: a batch without images says nothing about the vision tower,
    one without audio nothing about the audio tower, one of a loss nothing about other losses. Returns whether
    everything was reached; otherwise the next batch is to be checked too.
    """
    untouched = [
        name for name, parameter in module.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    saw_images = any("pixel_values" in name for name in inputs)
    reached = {"vision": saw_images, "merger": saw_images, "audio": "input_features" in inputs}
    blamed = [name for name in untouched if reached.get(backbone.group_of(name), True)]
    if getattr(module, "losses", None):
        blamed = [name for name in blamed if not name.startswith(("loss.", "losses."))]
    if blamed:
        raise RuntimeError(
            f"{len(blamed)} trainable parameters got no gradient from this batch, such as {blamed[0]} and "
            f"{blamed[-1]}: its loss does not depend on them. Freeze them with vlmembed.adapters.Freeze."
        )
    return not untouched


def refuse_broken_weights(module: LightningModule) -> None:
    """Refuse trained weights that are not finite, as before a checkpoint is written, by a RuntimeError. Collective."""
    trained = ((name, weight.detach()) for name, weight in module.named_parameters() if weight.requires_grad)
    # The largest number, as a sum of squares may overflow where every weight is fine.
    if broken := _not_finite(trained, order=math.inf):
        raise RuntimeError(
            f"Step {module.global_step}: {len(broken)} parameters are not finite, such as {broken[0]}, and no later "
            f"step can mend them. No checkpoint is written; resume from an earlier one. {ADVICE}"
        )


def _not_finite(tensors: Iterable[tuple[str, Tensor]], order: float) -> list[str]:
    """Name the tensors whose norm of that order is not finite in any process."""
    parts = [(name, distributed.local_part(tensor)) for name, tensor in tensors]
    here = [name for name, part in parts if part.numel() and not torch.linalg.vector_norm(part, order).isfinite()]
    return list(dict.fromkeys(name for names in distributed.gather_objects(here) for name in names))


def _json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)  # JSON has no NaN.


def _log_path(module: LightningModule) -> Path | None:
    """Return ``non_finite.jsonl`` in the run's folder, if there is one. Collective, as Lightning's ``log_dir`` is."""
    folder = module.trainer.log_dir if module.trainer.loggers else None
    return None if folder is None else Path(folder) / "non_finite.jsonl"


# Models that do not learn


class CollapseMonitor:
    """Warns of batches with nothing to learn from, of outputs that are all alike, and of a loss that stays at chance.

    Chance is the loss of the same batches if all outputs were the same. Means over 50 steps are judged, of which every
    tenth is looked at; not while the learning rate rises. A warning comes again only after it was better in between.
    ``likeness`` makes, of the loss's arguments, how alike outputs are (1 if all are the same), and equal outputs;
    ``cause`` is a likely one besides the usual.
    """

    def __init__(self, outputs: str, likeness: Callable[..., tuple[Tensor, tuple[Any, ...]]], cause: str = "") -> None:
        self.outputs, self.likeness, self.cause = outputs, likeness, cause
        self._noted: tuple[tuple[Any, ...], Tensor] | None = None
        self._looks: list[Tensor] = []
        self._rate = 0.0
        self._warned: set[str] = set()

    def note(self, step: int, arguments: tuple[Any, ...], value: Tensor) -> None:
        """Keep the loss's arguments and value () of the last batch before a step, if it is the step's turn."""
        if step % EVERY == 0:
            self._noted = tuple(argument.detach() for argument in arguments), value.detach()

    @torch.no_grad()
    def check(self, module: LightningModule, loss: nn.Module) -> None:
        """Look at the batch that was noted: after its backward, because a loss may change its parameters in place."""
        if self._noted is None:
            return
        (arguments, value), self._noted = self._noted, None
        likeness, constant = self.likeness(*arguments)
        chance = torch.full_like(likeness, math.nan)
        if next(loss.buffers(), None) is None:  # Otherwise it may keep what it is asked here.
            undone = torch.random.fork_rng([likeness.device] if likeness.device.type == "cuda" else [])
            with undone, module.trainer.precision_plugin.train_step_context():
                chance = loss(*constant)
        rate = max(float(group["lr"]) for group in module.trainer.optimizers[0].param_groups)
        self._rate = self._rate if self._looks else rate  # Of the first look.
        self._looks.append(torch.stack([likeness, value.to(likeness), chance.to(likeness)]))
        # Only now the host waits for the device; once early, for a short run with nothing to learn.
        if len(self._looks) == LOOKS or module.global_step == EVERY:
            self._judge(torch.stack(self._looks).mean(0).tolist(), rate)
            self._looks = self._looks[: len(self._looks) % LOOKS]

    def _judge(self, means: list[float], rate: float) -> None:
        likeness, value, chance = means
        steps, causes = (
            f"over the last {EVERY * (len(self._looks) - 1) + 1} steps",
            f"{CAUSES.format(rate)} {self.cause}".rstrip(),
        )
        is_empty = abs(chance) < 1e-6
        self._warn(is_empty, f"{NOTHING_TO_LEARN} It was {value:.3g} {steps}.")
        self._warn(rate == self._rate == 0, f"The learning rate was 0 {steps}.")
        if len(self._looks) == LOOKS and rate <= self._rate:
            message = f"{self.outputs} have collapsed: {steps} the likeness of two of a batch was {likeness:.4f} of 1."
            self._warn(likeness > 0.99 and not is_empty, f"{message} {causes}")
            message = f"The loss is at chance: {value:.4g} {steps}, and {chance:.4g} if all outputs are the same."
            self._warn(abs(value - chance) < 0.01 * abs(chance) and not is_empty, f"{message} {causes}")

    def _warn(self, is_so: bool, message: str) -> None:
        kind = message[:20]
        if is_so and kind not in self._warned:
            rank_zero_warn(message)
        self._warned = self._warned | {kind} if is_so else self._warned - {kind}


def embedding_likeness(queries: Vectors, documents: Vectors, *labels: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """Return the mean cosine () of any two vectors of queries and documents, and equal ones for the loss."""
    sides = [side.vectors if isinstance(side, MultiVectors) else side for side in (queries, documents)]  # (n, D)
    directions = normalize(torch.cat(sides).float())
    count = len(directions)
    # All cosines together are the square of the sum of directions; each with itself is 1.
    cosine = (directions.sum(0).square().sum() - count) / (count * (count - 1))
    equal = [
        side.map(torch.ones_like) if isinstance(side, MultiVectors) else torch.ones_like(side)
        for side in (queries, documents)
    ]
    return cosine, (*equal, *labels)


def score_likeness(scores: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return 1 less the deviation of scores (Q, C) over their mean, or 1; and scores that are all their mean."""
    real = scores.float().masked_fill(~mask, 0.0)
    mean = real.sum() / mask.sum()
    deviation = (((real - mean) * mask).square().sum() / mask.sum()).sqrt()
    return 1 - deviation / mean.abs().clamp(min=1), (mean.expand_as(scores), targets, mask)


# Rows that cannot be read

#: What was read of a row: its number, from 0 on, and the example.
NumberedExample = tuple[int, Example]


class SkipBadRows:
    """Makes a batch (by ``collate``) of the rows that can be used, in a loader worker.

    Where that fails, ``check`` tries the rows one by one: which are left out depends on nothing but the rows.
    """

    def __init__(self, collate: Callable[[list[Example]], Any], check: Callable[[Example], None]) -> None:
        self.collate = collate
        self.check = check

    def __call__(self, rows: Sequence[NumberedExample | BadRow]) -> Any:
        """Make a batch; a ``ValueError`` says that no row is left, or what is no single row's fault."""
        bad = [row for row in rows if isinstance(row, BadRow)]
        good = [row for row in rows if not isinstance(row, BadRow)]
        try:
            return self._batch(good, bad)
        except ValueError:
            refused = []
            for index, example in good:
                try:
                    self.check(example)
                except ValueError as error:
                    # An error that names nothing of the row is about the configuration.
                    if not any(
                        item.origin and item.origin in str(error) for item in (example.query, *example.documents)
                    ):
                        raise
                    refused.append(BadRow.of(index, error))
            if not refused:
                raise
        left_out = {row.row for row in refused}
        return self._batch([row for row in good if row[0] + 1 not in left_out], bad + refused)

    def _batch(self, good: Sequence[NumberedExample], bad: Sequence[BadRow]) -> Any:
        if not good:
            raise ValueError(
                f"None of the {len(bad)} rows of a batch can be used, and there is nothing to train on. Repair or "
                f"remove them, or raise batch_size. The first: {bad[0].reason}"
            )
        return replace(self.collate([example for _, example in good]), bad_rows=tuple(bad))


class BadRowFile:
    """``bad_rows.jsonl`` of a run: which training rows were left out, once each, and why.

    All processes write to it, and a resumed run appends to it, so that it does not start to count again.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.path = folder / "bad_rows.jsonl"
        self.limit = limit
        self._known: set[tuple[int, str]] = set()  # Of a stream's parts, rows have the same numbers.

    def add(self, rows: Sequence[BadRow]) -> None:
        """Write down and warn of rows that are not there yet; a ``ValueError`` if they are more than the limit now."""
        new = {key: row for row in rows if (key := (row.row, row.reason)) not in self._known}
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(".bad_rows.lock")).acquire(poll_interval=0.002):
            self._known = self._append(new) | new.keys()
        if len(self._known) > self.limit:
            raise ValueError(
                f"{len(self._known)} training rows cannot be used, more than max_bad_rows={self.limit}. {self.path} "
                "has them all. Repair or remove them, or raise data.init_args.max_bad_rows. "
                f"The last: {rows[-1].reason}"
            )

    def _append(self, new: dict[tuple[int, str], BadRow]) -> set[tuple[int, str]]:
        """Add what other processes, and the run before, have not; return what was there."""
        content = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        written: set[tuple[int, str]] = set()
        for line in content.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # Cut short, when a process or the disk had its end.
                row = json.loads(line)
                written.add((row["row"], row["reason"]))
        with self.path.open("a", encoding="utf-8") as file:
            if content and not content.endswith("\n"):
                file.write("\n")
            for key, bad in new.items():
                if key not in written:
                    file.write(json.dumps(asdict(bad)) + "\n")
                    warnings.warn(f"Left out of training: {bad.reason} ({self.path})", stacklevel=4)
        return written
