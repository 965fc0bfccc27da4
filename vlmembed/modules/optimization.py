"""Optimizers: which parameters, at which rate, on which schedule, and whether the gradient reaches them all."""

from __future__ import annotations

import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from vlmembed.adapters import matching_parameters
from vlmembed.backbones import VisionLanguageModel

SchedulerCallable = Callable[[Optimizer], LRScheduler]

#: Parameters of schedules that mean a number of optimizer steps: the run's, where the YAML does not say.
STEP_PARAMETERS = ("total_steps", "T_max", "total_iters", "num_training_steps", "max_iters", "max_steps")


#: What stands behind the backbone, as each kind of module calls it, and how its parameters' names begin.
BEHIND, PREFIX = ("pooling", "projection", "head"), "encoder.pooling."


def parameter_groups(
    module: LightningModule, backbone: VisionLanguageModel, learning_rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Split a module's trainable parameters by learning rate: the first group name or expression that matches decides.

    ``pooling``, ``projection`` and ``head`` are the module's own, whatever parameters of the backbone are called.
    The group without ``lr`` takes the optimizer's own.
    """
    remaining = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not remaining:
        raise ValueError("Nothing is trainable: the adapters freeze every parameter.")
    groups = []
    for pattern, rate in learning_rates.items():
        if pattern in backbone.groups:
            members = {id(parameter) for _, parameter in matching_parameters(backbone, pattern)}
            names = [name for name, parameter in remaining.items() if id(parameter) in members]
        elif pattern in BEHIND:
            names = [name for name in remaining if name.startswith(PREFIX)]
        else:
            names = [name for name in remaining if re.search(pattern, name)]
        if not names:
            raise ValueError(f"The learning rate {rate} for {pattern!r} applies to no trainable parameter.")
        groups.append({"params": [remaining.pop(name) for name in names], "lr": rate})
    return [{"params": list(remaining.values())}, *groups] if remaining else groups


# Schedules


def try_schedule(make: SchedulerCallable, optimizer: Callable[..., Optimizer], trainer: Trainer) -> None:
    """Build a schedule, and save its state, with a weight of its own, so that mistakes show before any is loaded."""
    schedule = build_schedule(make, optimizer([nn.Parameter(torch.zeros(1, 1))]), trainer)
    try:
        schedule.state_dict()
    except AttributeError as error:
        raise ValueError(
            f"lr_scheduler: {type(schedule).__name__} cannot be written into a checkpoint: {error}. Name a function "
            "that is written in Python."
        ) from error


def build_schedule(
    make: SchedulerCallable, optimizer: Optimizer, trainer: Trainer, length: Callable[[], int] | None = None
) -> LRScheduler:
    """Build a schedule, and tell it its number of steps if one of its parameters means that.

    ``make`` is a class or function, or one with arguments of its own; the schedules of SequentialLR are made likewise,
    each for its ``length``. Null is the run's.
    """
    length = length or partial(total_steps, trainer)
    # jsonargparse makes partials of a function of its own, and the class is its last argument.
    bound = make if isinstance(make, partial) else partial(make)
    target = next((part for part in reversed(bound.args) if callable(part)), bound.func)
    names, given = inspect.signature(target).parameters, bound.keywords
    missing = {name for name in names if given.get(name) is None}
    values: dict[str, Any] = {name: length() for name in missing & {*STEP_PARAMETERS}}
    if given.get("epochs"):  # OneCycleLR takes these or total_steps.
        values = {name: steps_of_epoch(trainer, 0) for name in missing & {"steps_per_epoch"}}
    if "schedulers" in given:
        lengths = _lengths(len(given["schedulers"]), given.get("milestones"), length)
        parts = zip(given["schedulers"], lengths, strict=True)
        values["schedulers"] = [build_schedule(part, optimizer, trainer, steps) for part, steps in parts]
    build: Any = make
    # By its name, as ChainedScheduler has it second.
    schedule: LRScheduler = build(optimizer=optimizer, **values) if "optimizer" in names else build(optimizer, **values)
    if isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(
            "lr_scheduler: ReduceLROnPlateau goes by a metric, and schedules here go by steps. Use another."
        )
    return schedule


def _lengths(count: int, milestones: list[int] | None, length: Callable[[], int]) -> list[Callable[[], int]]:
    """Return for how many steps each of several schedules is: all, or those between two milestones."""
    if milestones is None:
        return [length] * count
    if len(milestones) != count - 1:
        raise ValueError(f"lr_scheduler: {count} schedules need {count - 1} milestones between them; got {milestones}.")
    starts = [0, *milestones]
    return [*(partial(int, end - start) for start, end in pairwise(starts)), lambda: max(1, length() - starts[-1])]


def total_steps(trainer: Trainer) -> int:
    """Return the run's optimizer steps.

    ``trainer.estimated_stepping_batches`` says the same, but a module that reads it while its optimizers are built
    makes Lightning 2.6 forget a stateful loader's position in the epoch when the run is resumed.
    """
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        if trainer.max_steps < 0:
            raise ValueError("A learning-rate schedule needs the run's length: set trainer.max_epochs or max_steps.")
        return trainer.max_steps
    steps = sum(steps_of_epoch(trainer, epoch) for epoch in range(trainer.max_epochs))
    return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps


def steps_of_epoch(trainer: Trainer, epoch: int) -> int:
    """Return the optimizer steps of an epoch."""
    batches = batches_per_epoch(trainer.datamodule)  # type: ignore[attr-defined]
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    window = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            window = callback.get_accumulate_grad_batches(epoch)
    return -(-batches // window)


def batches_per_epoch(data: Any) -> int:
    """Ask a data module for its training batches per epoch and process."""
    batches: int | None = getattr(data, "steps_per_epoch", None)
    if batches is None:
        silent = "a fit without a data module" if data is None else f"the data module {type(data).__name__}"
        raise ValueError(
            f"A learning-rate schedule needs the run's length, and {silent} does not say how many batches an epoch "
            "has. Give the data module a property steps_per_epoch (training batches per epoch and process), or set "
            "trainer.max_steps and leave trainer.max_epochs unset."
        )
    return batches


class Warmup(LambdaLR, ABC):
    """Warms up linearly from zero; what comes then is the subclass's.

    Args:
        optimizer: Given by the module.
        total_steps: The run's optimizer steps; given by the module where null.
        warmup: The share of the steps to warm up for, 0 to 1.

    Raises:
        ValueError: If ``warmup`` is not a share, or ``total_steps`` is not given by anyone.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int | None = None, warmup: float = 0.1) -> None:
        if total_steps is None:
            raise ValueError(f"{type(self).__name__} needs total_steps, the run's optimizer steps.")
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup is a share of the steps, between 0 and 1; got {warmup}.")
        length, start = total_steps, round(total_steps * warmup)

        # A function, as a checkpoint keeps neither those nor what they close over: a resumed run takes its own length.
        def factor(step: int) -> float:
            # The first step already moves.
            warmed = min(1.0, (step + 1) / max(1, start))
            done = min(1.0, max(0.0, (step - start) / max(1, length - start)))
            return warmed * self.decay(done)

        super().__init__(optimizer, factor)

    @abstractmethod
    def decay(self, done: float) -> float:
        """Return the factor of the learning rate, given the share of the steps after the warm-up that are done."""


class LinearDecay(Warmup):
    """Warms up linearly from zero, then decays linearly to zero."""

    def decay(self, done: float) -> float:
        """Fall linearly."""
        return 1 - done


class CosineDecay(Warmup):
    """Warms up linearly from zero, then follows half a cosine to zero (SGDR without restarts, arXiv:1608.03983)."""

    def decay(self, done: float) -> float:
        """Fall as a cosine does from its top to its bottom."""
        return (1 + math.cos(math.pi * done)) / 2


class Constant(Warmup):
    """Warms up linearly from zero, then stays."""

    def decay(self, done: float) -> float:
        """Stay."""
        return 1.0
