"""Learning-rate schedules that know how long the run is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Warmup(LambdaLR, ABC):
    """Warms up linearly from zero; what comes then is the subclass's.

    Args:
        optimizer: Given by the module.
        total_steps: Given by the module: the run's optimizer steps.
        warmup: The share of the steps to warm up for, 0 to 1.

    Raises:
        ValueError: If ``warmup`` is not a share.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.1) -> None:
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup is a share of the steps, between 0 and 1; got {warmup}.")
        start = round(total_steps * warmup)

        # A function, as a checkpoint keeps neither those nor what they close over: a resumed run takes its own length.
        def factor(step: int) -> float:
            # The first step already moves.
            warmed = min(1.0, (step + 1) / max(1, start))
            done = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
            return warmed * self.decay(done)

        super().__init__(optimizer, factor)

    @abstractmethod
    def decay(self, done: float) -> float:
        """Return the share of the learning rate that is left, given the share of the steps after the warm-up done."""


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
