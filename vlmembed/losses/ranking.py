"""What every loss of a cross-encoder is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Targets:
    """What a ranking loss wants to know of each candidate.

    Args:
        scores: Whether a teacher's score, instead of a label.
        largest: The largest label that means something; the least is 0.
        positive: Whether each query needs a candidate with a label above 0.
        several: Whether each query needs two candidates.
    """

    scores: bool = False
    largest: float = math.inf
    positive: bool = False
    several: bool = False


class RankingLoss(nn.Module, ABC):
    """A number to minimise, from the scores of some queries' candidates.

    A loss sees the whole batch, of all processes together, and knows nothing of how the scores were made.

    Attributes:
        targets: What it wants to know of each candidate; who makes batches checks it, and names the row.
    """

    targets: ClassVar[Targets] = Targets()

    @abstractmethod
    def forward(
        self, scores: Float[Tensor, "Q C"], targets: Float[Tensor, "Q C"], mask: Bool[Tensor, "Q C"]
    ) -> Float[Tensor, ""]:
        """Compute the loss.

        Args:
            scores: Logits as the model made them, in float32; anything where the mask is false.
            targets: Of each candidate a label, or a teacher's score; anything where the mask is false.
            mask: Which candidates there are: queries may have different numbers of them, and each has one at least.
        """
