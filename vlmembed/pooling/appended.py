"""Poolings that put tokens of their own at the end of every item, where they have seen all of it, and read those."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmembed.pooling.base import Pooling, tokens_from_end, weighted_mean
from vlmembed.pooling.tokens import last_state, state_at


class EndToken(Pooling):
    """The state of an end-of-text token behind every item (E5-Mistral, arXiv:2401.00368).

    Args:
        token: A token of the checkpoint's vocabulary.
    """

    num_last_tokens = 1

    def __init__(self, token: str = "<|endoftext|>") -> None:
        super().__init__()
        self.token = token
        self.appended = (token,)

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the last position of each item, which is the token's."""
        return last_state(hidden, mask)


class LearnedTokens(Pooling):
    """The states of learned tokens behind every item, which read it out (deep prompts, arXiv:2101.00190).

    Their embeddings are learned whatever else of the backbone is frozen; an export writes them into its vocabulary.

    Args:
        tokens: How many.
        combine: Whether their states are averaged or concatenated.

    Raises:
        ValueError: If ``tokens`` is below 1.
    """

    learns_tokens = True

    def __init__(self, tokens: int = 4, combine: Literal["mean", "concatenation"] = "mean") -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"LearnedTokens: tokens is 1 or more, got {tokens}.")
        self.tokens = tokens
        self.combine = combine
        self.num_last_tokens = tokens
        self.appended = tuple(f"<|read_out_{index}|>" for index in range(tokens))
        self.learned: nn.Parameter | None = None

    @property
    def token_embeddings(self) -> Float[Tensor, "tokens H"] | None:
        """The tokens' own."""
        return self.learned

    def configure(self, hidden_size: int) -> None:
        """Draw the tokens' embeddings, at the scale at which transformers draws those of other tokens."""
        self.learned = nn.Parameter(0.02 * torch.randn(self.tokens, hidden_size))

    def dimension(self, hidden_size: int) -> int:
        """Return H, or so many times H."""
        return hidden_size * (self.tokens if self.combine == "concatenation" else 1)

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """Pool the last positions of each item."""
        place = tokens_from_end(mask)
        if self.combine == "mean":
            return weighted_mean(hidden, mask * (place <= self.tokens))
        positions = [(place == count).int().argmax(dim=1) for count in range(self.tokens, 0, -1)]
        return torch.cat([state_at(hidden, position) for position in positions], dim=-1)
