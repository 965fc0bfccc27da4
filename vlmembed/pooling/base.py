"""What a pooling is, hidden states (B, L, H) of an item's tokens -> one embedding (B, D); and those without weights.

The files of this folder import only each other, torch and jaxtyping: an export copies them whole, and they run where
vlmembed is not installed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Template:
    """What token ids mean in a checkpoint's chat template."""

    visual: tuple[int, ...]  # Of tokens of images, videos and audio.
    instructions: tuple[tuple[int, ...], ...]  # What items with an instruction begin with, for each instruction.


class Pooling(nn.Module, ABC):
    """Turns token states into one embedding per item.

    A subclass that has weights creates them in `configure`; one that reads other layers than the last sets `layers`.
    It keeps each argument of its constructor as an attribute of the same name, because an export writes them down.
    """

    #: Which hidden states to pool: -1 is the last, after the final norm, 0 the token embeddings; of several, ``hidden``
    #: has a leading dimension K in this order.
    layers: tuple[int, ...] = (-1,)
    #: How many of an item's last tokens are read; None for all. States of other tokens may be NaN.
    num_last_tokens: int | None = None
    #: Tokens that every item gets at its end, and whether these are new ones, with learned embeddings.
    appended: tuple[str, ...] = ()
    learns_tokens: bool = False
    #: Whether `template` is needed, which the encoder sets.
    reads_template: bool = False
    template: Template | None = None

    @property
    def token_embeddings(self) -> Float[Tensor, "tokens H"] | None:
        """Learned embeddings of the appended tokens, if there are any and the pooling is configured."""
        return None

    def configure(self, hidden_size: int) -> None:
        """Create weights, once the backbone's hidden size H is known."""

    def dimension(self, hidden_size: int) -> int:
        """Return D, the dimension of the embedding, for hidden size H."""
        return hidden_size

    @abstractmethod
    def forward(
        self, hidden: Float[Tensor, "*K B L H"], mask: Int[Tensor, "B L"], input_ids: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B D"]:
        """Pool the positions where ``mask`` is 1; ``input_ids`` are for poolings that select by token."""


class TokenWeights(Pooling):
    """A mean over tokens, each with a weight: most poolings only say how much a token counts."""

    @abstractmethod
    def weights(self, mask: Int[Tensor, "B L"], input_ids: Int[Tensor, "B L"] | None) -> Int[Tensor, "B L"]:
        """Return how much each token counts; 0 at padding."""

    def forward(
        self, hidden: Float[Tensor, "B L H"], mask: Int[Tensor, "B L"], input_ids: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B H"]:
        return weighted_mean(hidden, self.weights(mask, input_ids))


class PoolingWrapper(Pooling):
    """A pooling that does something before or after another one."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        self.layers, self.num_last_tokens = pooling.layers, pooling.num_last_tokens
        self.appended, self.learns_tokens = pooling.appended, pooling.learns_tokens

    @property
    def token_embeddings(self) -> Tensor | None:
        return self.pooling.token_embeddings

    def configure(self, hidden_size: int) -> None:
        self.pooling.configure(hidden_size)

    def dimension(self, hidden_size: int) -> int:
        return self.pooling.dimension(hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        pooled: Tensor = self.pooling(hidden, mask, input_ids)
        return pooled


def at_least_float32(values: Tensor) -> Tensor:
    """Leave half precision: a sum over thousands of tokens would lose the small ones."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def mask_padding(hidden: Float[Tensor, "*K B L H"], kept: Tensor) -> Float[Tensor, "*K B L H"]:
    """Set states to 0 where ``kept`` (B, L) is, in float32: 0 × NaN is NaN, and padding may hold anything."""
    return at_least_float32(hidden.masked_fill(kept[..., None] == 0, 0.0))


def weighted_sum(hidden: Float[Tensor, "B L H"], weights: Int[Tensor, "B L"]) -> Float[Tensor, "B H"]:
    """Return the sum over tokens, each times its weight."""
    states = mask_padding(hidden, weights)
    return torch.einsum("blh,bl->bh", states, weights.to(states.dtype))


def weighted_mean(hidden: Float[Tensor, "B L H"], weights: Int[Tensor, "B L"]) -> Float[Tensor, "B H"]:
    """Return the mean over tokens, each with its weight."""
    return weighted_sum(hidden, weights) / weights.sum(dim=1, keepdim=True)


def state_at(hidden: Float[Tensor, "B L H"], position: Int[Tensor, " B"]) -> Float[Tensor, "B H"]:
    """Return the state at one position of each item; cheaper than a weighted mean, which copies all states."""
    return at_least_float32(hidden[torch.arange(len(hidden), device=hidden.device), position])


def tokens_from_end(mask: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Count from each item's last token, which is 1, whichever side is padded; 0 at padding."""
    return mask.flip(1).cumsum(dim=1).flip(1) * mask


def is_any(input_ids: Int[Tensor, "B L"], tokens: tuple[int, ...]) -> Bool[Tensor, "B L"]:
    """Say where a token is one of a few; one by one, as a tensor of them would have to be sent to the device."""
    matches = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in tokens:
        matches |= input_ids == token
    return matches


def after_instruction(
    input_ids: Int[Tensor, "B L"], mask: Int[Tensor, "B L"], template: Template
) -> Bool[Tensor, "B L"]:
    """Say which tokens follow the instruction that an item begins with; all of them where it has none."""
    following = torch.ones_like(input_ids, dtype=torch.bool)
    position = mask.cumsum(dim=1) * mask  # From 1, at each item's first token; 0 at padding.
    for instruction in template.instructions:
        matches = torch.ones_like(input_ids[:, 0], dtype=torch.bool)  # (B,): whether the item begins with it
        for index, token in enumerate(instruction, start=1):
            matches &= ((input_ids == token) & (position == index)).any(dim=1)
        following &= ~(matches[:, None] & (position <= len(instruction)))
    return following


# Poolings without weights: one token, or a mean over some of them


class FirstToken(Pooling):
    """The state of the first token, CLS pooling (BERT, arXiv:1810.04805); says little under causal attention."""

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        return state_at(hidden, mask.argmax(dim=1))


class LastToken(Pooling):
    """The state of the last token, which alone has seen the whole item under causal attention (arXiv:2401.00368)."""

    num_last_tokens = 1

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        return state_at(hidden, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1))  # Whichever side is padded.


class EndToken(LastToken):
    """The state of an end-of-text token behind every item (E5-Mistral, arXiv:2401.00368).

    Args:
        token: A token of the checkpoint's vocabulary.
    """

    def __init__(self, token: str = "<|endoftext|>") -> None:
        super().__init__()
        self.token = token
        self.appended = (token,)


class Max(Pooling):
    """The largest value of each feature over the tokens (Sentence-BERT, arXiv:1908.10084)."""

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        return hidden.masked_fill(mask[..., None] == 0, float("-inf")).amax(dim=1)


class Mean(TokenWeights):
    """The mean over the tokens (Sentence-BERT, arXiv:1908.10084)."""

    def weights(self, mask: Tensor, input_ids: Tensor | None) -> Tensor:
        return mask


class MeanSqrtLength(Pooling):
    """The sum over the tokens divided by √length (Universal Sentence Encoder, arXiv:1803.11175).

    Differs from `Mean` only where lengths matter: concatenated with another pooling, or before a layer.
    """

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        return weighted_sum(hidden, mask) / mask.sum(dim=1, keepdim=True).sqrt()


class WeightedMean(TokenWeights):
    """The mean weighted by position, 1 for the first token to n for the last (SGPT, arXiv:2202.08904)."""

    def weights(self, mask: Tensor, input_ids: Tensor | None) -> Tensor:
        return mask.cumsum(dim=1) * mask


class MeanOfLast(TokenWeights):
    """The mean over the last few tokens: a compromise between `LastToken` and `Mean`.

    Args:
        tokens: How many; an item that has fewer is averaged as a whole.
    """

    def __init__(self, tokens: int = 8) -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"MeanOfLast: tokens is 1 or more, got {tokens}.")
        self.tokens = self.num_last_tokens = tokens

    def weights(self, mask: Tensor, input_ids: Tensor | None) -> Tensor:
        return mask * (tokens_from_end(mask) <= self.tokens)


class MeanOfPart(TokenWeights):
    """The mean over some kind of token; an item that has none of the kind is averaged as a whole."""

    reads_template = True

    @abstractmethod
    def part(self, input_ids: Tensor, mask: Tensor, template: Template) -> Tensor:
        """Return (B, L), which tokens are of the kind; padding does not matter."""

    def weights(self, mask: Tensor, input_ids: Tensor | None) -> Tensor:
        if input_ids is None or self.template is None:
            raise ValueError(f"{type(self).__name__} needs input_ids, and the template that they were made with.")
        part = mask * self.part(input_ids, mask, self.template)
        return torch.where(part.any(dim=1, keepdim=True), part, mask)


class MeanOfImages(MeanOfPart):
    """The mean over tokens of images, videos, audio; late interaction over pages keeps such too (arXiv:2407.01449)."""

    def part(self, input_ids: Tensor, mask: Tensor, template: Template) -> Tensor:
        return is_any(input_ids, template.visual)


class MeanOfText(MeanOfPart):
    """The mean over all tokens but those of images, videos and audio; under causal attention later ones saw these."""

    def part(self, input_ids: Tensor, mask: Tensor, template: Template) -> Tensor:
        return ~is_any(input_ids, template.visual)


class MeanWithoutInstruction(MeanOfPart):
    """The mean over what follows the instruction, which still influences it (INSTRUCTOR, arXiv:2212.09741)."""

    def part(self, input_ids: Tensor, mask: Tensor, template: Template) -> Tensor:
        return after_instruction(input_ids, mask, template)
