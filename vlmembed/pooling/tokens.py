"""Poolings that take one token's state, or one token's value for each feature."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmembed.pooling.base import Pooling, at_least_float32


class FirstToken(Pooling):
    """The state of the first token, CLS pooling (BERT, arXiv:1810.04805); says little under causal attention."""

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the first position of each item that is not padding."""
        return state_at(hidden, mask.argmax(dim=1))


class LastToken(Pooling):
    """The state of the last token, which alone has seen the whole item under causal attention (arXiv:2401.00368)."""

    num_last_tokens = 1

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the last position of each item that is not padding."""
        return last_state(hidden, mask)


class Max(Pooling):
    """The largest value of each feature over the tokens (Sentence-BERT, arXiv:1908.10084)."""

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool each feature's maximum."""
        return hidden.masked_fill(mask[..., None] == 0, float("-inf")).amax(dim=1)


def last_state(hidden: Float[Tensor, "B L H"], mask: Int[Tensor, "B L"]) -> Float[Tensor, "B H"]:
    """Return the state of each item's last token, whichever side is padded."""
    return state_at(hidden, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1))


def state_at(hidden: Float[Tensor, "B L H"], position: Int[Tensor, " B"]) -> Float[Tensor, "B H"]:
    """Return the state at one position of each item."""
    return at_least_float32(hidden[torch.arange(len(hidden), device=hidden.device), position])
