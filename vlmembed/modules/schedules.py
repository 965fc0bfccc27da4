"""Learning-rate schedules that know how long the run is."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class LinearDecay(LambdaLR):
    """Warms up linearly from zero, then decays linearly to zero.

    Args:
        optimizer: Given by the module.
        total_steps: Given by the module: the run's optimizer steps.
        warmup: The share of the steps to warm up for, 0 to 1.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.1) -> None:
        _check(warmup)
        super().__init__(
            optimizer, lambda step: _warmup(step, total_steps, warmup) * (1 - _decayed(step, total_steps, warmup))
        )


class CosineDecay(LambdaLR):
    """Warms up linearly from zero, then follows half a cosine to zero (SGDR without restarts, arXiv:1608.03983).

    Args:
        optimizer: Given by the module.
        total_steps: Given by the module: the run's optimizer steps.
        warmup: The share of the steps to warm up for, 0 to 1.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.1) -> None:
        _check(warmup)
        super().__init__(
            optimizer,
            lambda step: (
                _warmup(step, total_steps, warmup) * (1 + math.cos(math.pi * _decayed(step, total_steps, warmup))) / 2
            ),
        )


class Constant(LambdaLR):
    """Warms up linearly from zero, then stays.

    Args:
        optimizer: Given by the module.
        total_steps: Given by the module: the run's optimizer steps.
        warmup: The share of the steps to warm up for, 0 to 1.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.1) -> None:
        _check(warmup)
        super().__init__(optimizer, lambda step: _warmup(step, total_steps, warmup))


def _check(warmup: float) -> None:
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is a share of the steps, between 0 and 1; got {warmup}.")


def _warmup(step: int, total: int, warmup: float) -> float:
    """Return the share of the warm-up that is done; the first step already moves."""
    return min(1.0, (step + 1) / max(1, round(total * warmup)))


def _decayed(step: int, total: int, warmup: float) -> float:
    """Return the share of what follows the warm-up that is done."""
    start = round(total * warmup)
    return min(1.0, max(0.0, (step - start) / max(1, total - start)))
