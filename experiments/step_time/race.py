"""Timing contenders against each other on a machine whose speed changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import numpy as np
from scipy import stats
from work import TOLERANCE


@dataclass
class Race:
    """Seconds of every contender in every round, and how far the losses were apart.

    Args:
        seconds: By contender.
        losses: By contender, one per step, warm-up included.
    """

    seconds: dict[str, list[float]]
    losses: dict[str, list[float]]

    def ratio(self, ours: str, theirs: str) -> tuple[float, float, float]:
        """How many times as fast ours is: of medians, with a 95 % interval.

        The interval is a bootstrap's over rounds, as a slow round slows both.
        """

        def of_medians(theirs: np.ndarray, ours: np.ndarray, axis: int = -1) -> np.ndarray:
            return np.median(theirs, axis) / np.median(ours, axis)

        rounds = np.array([self.seconds[theirs], self.seconds[ours]])
        options: Any = {"paired": True, "method": "percentile", "rng": np.random.default_rng(0)}
        interval = stats.bootstrap(rounds, of_medians, **options).confidence_interval
        return float(of_medians(*rounds)), float(interval.low), float(interval.high)

    def fastest(self) -> str:
        """The contender with the smallest median."""
        return min(self.seconds, key=lambda name: median(self.seconds[name]))

    def spread(self, name: str) -> tuple[float, float, float]:
        """A contender's quartiles, in seconds."""
        low, middle, high = quantiles(self.seconds[name], n=4, method="inclusive")
        return low, middle, high


def race(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Race:
    """Let contenders take steps in turn.

    Every round starts with another one, and a first round is not counted. All start with the same weights, so at each
    step their losses have to agree: otherwise they do not do the same work.

    Args:
        contenders: Steps that return their loss.
        rounds: At least 2.

    Raises:
        RuntimeError: If losses differ.
    """
    names = list(contenders)
    result = Race({name: [] for name in names}, {name: [] for name in names})
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            loss = contenders[name]()
            if turn:
                result.seconds[name].append(time.perf_counter() - start)
            result.losses[name].append(loss)
        _check_same({name: losses[-1] for name, losses in result.losses.items()}, f"step {turn + 1}")
    return result


def _check_same(losses: Mapping[str, float], where: str) -> None:
    smallest, largest = min(losses.values()), max(losses.values())
    if not largest - smallest <= TOLERANCE * abs(largest):
        raise RuntimeError(f"Losses of {where} differ by more than {TOLERANCE} of their size: {dict(losses)}.")
