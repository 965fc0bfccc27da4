"""Late interaction: which tokens of an item keep a vector, and the projection of their states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu

from vlmembed.pooling.base import (
    Pooling,
    Template,
    after_instruction,
    at_least_float32,
    is_any,
    tokens_from_end,
)


@dataclass(frozen=True)
class TokenSelection:
    """Which tokens of an item keep a vector.

    Args:
        part: All of them, those of images (and videos and audio) or of texts only, or those behind the instruction.
        skip: Tokens that have no vector wherever they stand, such as punctuation: each a token of the vocabulary.
    """

    part: Literal["all", "images", "texts", "without_instruction"] = "all"
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.part not in ("all", "images", "texts", "without_instruction") or isinstance(self.skip, str):
            raise ValueError(
                "TokenSelection: part is all, images, texts or without_instruction, and skip a list of tokens; got "
                f"part={self.part!r}, skip={self.skip!r}."
            )

    def select(
        self,
        input_ids: Int[Tensor, "B L"],
        mask: Int[Tensor, "B L"],
        template: Template,
        skipped: Sequence[int] = (),
        num_expansion_tokens: int = 0,
    ) -> Bool[Tensor, "B L"]:
        """Return which of the tokens where ``mask`` is 1 are kept; ``skipped`` are the ids of those to skip.

        An item's last ``num_expansion_tokens`` are kept whatever the part.
        """
        kept = mask.bool()
        if self.part == "images":
            kept = kept & is_any(input_ids, template.visual)
        elif self.part == "texts":
            kept = kept & ~is_any(input_ids, template.visual)
        elif self.part == "without_instruction":
            kept = kept & after_instruction(input_ids, mask, template)
        kept = kept & ~is_any(input_ids, tuple(skipped))
        return kept | (mask.bool() & (tokens_from_end(mask) <= num_expansion_tokens))


class TokenProjection(Pooling):
    """A learned map of each token's state to a vector: late interaction (ColBERT, arXiv:2004.12832; 2407.01449).

    Args:
        size: D, the dimension of the vectors.
        inner_size: The width of an MLP's inner layer, with a GELU behind it; null for a linear map.
        residual: Whether each layer of an MLP adds a linear map of what it is given to what it returns.
        allow_larger: Whether vectors may be larger than the states that they are made of.
    """

    def __init__(
        self, size: int = 128, inner_size: int | None = None, residual: bool = False, allow_larger: bool = False
    ) -> None:
        super().__init__()
        if size < 1 or (inner_size is not None and inner_size < 1):
            raise ValueError(f"TokenProjection: sizes are 1 or more, got size={size}, inner_size={inner_size}.")
        if residual and inner_size is None:
            raise ValueError(
                "TokenProjection: residual is for an MLP, and a linear map is one by itself: set inner_size."
            )
        self.size, self.inner_size, self.residual, self.allow_larger = size, inner_size, residual, allow_larger

    def configure(self, hidden_size: int) -> None:
        if self.size > hidden_size and not self.allow_larger:
            raise ValueError(
                f"TokenProjection: size={self.size} is above the backbone's hidden size, {hidden_size}: vectors would "
                "take more room and hold no more. Lower it, or set allow_larger: true if it is meant."
            )
        self.inner = nn.Linear(hidden_size, self.inner_size) if self.inner_size else None
        width = self.inner_size or hidden_size
        self.outer = nn.Linear(width, self.size, bias=self.inner_size is not None)
        self.inner_residual = nn.Linear(hidden_size, width, bias=False) if self.residual else None
        self.outer_residual = nn.Linear(width, self.size, bias=False) if self.residual else None

    def dimension(self, hidden_size: int) -> int:
        return self.size

    def project(self, states: Float[Tensor, "T H"]) -> Float[Tensor, "T D"]:
        """Project the states of some tokens; vectors are not normalised."""
        states = states.to(self.outer.weight.dtype)
        if self.inner is not None:
            inner = gelu(self.inner(states))
            states = inner if self.inner_residual is None else inner + self.inner_residual(states)
        projected: Tensor = self.outer(states)
        return projected if self.outer_residual is None else projected + self.outer_residual(states)

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """Project the tokens where ``mask`` is 1, one item's after the other's: (B, L, H) → (T, D)."""
        return self.project(at_least_float32(hidden[mask.bool()]))
