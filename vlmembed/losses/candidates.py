"""What is computed over the candidates that a query has, whatever stands where it has none."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def cleared(values: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"], filling: float = 0.0) -> Float[Tensor, "Q C"]:
    """Return values in float32 at least, and a number where there is no candidate.

    Filled, not multiplied by zero: what is there may be no number, and must get no gradient that is none.

    Args:
        values: Scores, labels or a teacher's scores.
        mask: Which candidates there are.
        filling: What to put where there is none.
    """
    precise = values.to(torch.promote_types(values.dtype, torch.float32))
    return precise.masked_fill(~mask, filling)


def log_shares(
    logits: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"], temperature: float = 1.0
) -> Float[Tensor, "Q C"]:
    """Return the logarithm of each candidate's share in a softmax over its query's; 0 where there is no candidate.

    Args:
        logits: Scores, or a teacher's scores.
        mask: Which candidates there are, at least one of each query.
        temperature: Logits are divided by it.
    """
    return (cleared(logits, mask, -math.inf) / temperature).log_softmax(1).masked_fill(~mask, 0.0)


def check_temperature(**temperatures: float) -> None:
    """Refuse what nothing can be divided by.

    Args:
        **temperatures: By the name of the argument.

    Raises:
        ValueError: If one is not above 0 and finite.
    """
    for name, temperature in temperatures.items():
        if not 0 < temperature < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {temperature}")
