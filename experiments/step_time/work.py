"""What both sides are given, and what both sides are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from data import Pair
from peft import LoraConfig

#: Small enough that the loss does not fall to that of equal embeddings at once, where any two sides would agree.
LEARNING_RATE = 1e-4
TEMPERATURE = 0.05
#: How much the losses of two sides may differ, of their size.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Work:
    """A checkpoint, and what of it is trained.

    Args:
        checkpoint: A folder that both sides open.
        hidden_size: Of its language model.
        trained: Everything; everything but vision tower and mergers; or a LoRA in the language model.
        device: Where.
        dtype: The type of the weights.
    """

    checkpoint: Path
    hidden_size: int
    trained: Literal["everything", "language", "lora"]
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def dimensions(self) -> list[int]:
        """The Matryoshka loss's seven dimensions."""
        return [self.hidden_size >> halvings for halvings in range(7)]


def lora() -> LoraConfig:
    """The LoRA of either side: every linear layer of the language model."""
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=16, lora_alpha=32, target_modules=projections)


class Contender(Protocol):
    """One side with one setting, and its own copy of the weights."""

    def prepare(self, pairs: Sequence[Pair]) -> Any:
        """Preprocess a batch, as loader workers do while the step before it runs."""

    def step(self, batch: Any) -> float:
        """Train on it: forward, loss, backward, update. Returns the loss."""
