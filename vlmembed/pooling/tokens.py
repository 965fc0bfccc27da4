"""Poolings without weights: one token, or a mean over some of them."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from vlmembed.pooling.base import Pooling, Template, TokenWeights, is_any, state_at, tokens_from_end, weighted_sum


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
    """The mean over image and video tokens, which late interaction over pages keeps too (ColPali, arXiv:2407.01449)."""

    def part(self, input_ids: Tensor, mask: Tensor, template: Template) -> Tensor:
        return is_any(input_ids, template.visual)


class MeanOfText(MeanOfPart):
    """The mean over all tokens but those of images and videos; under causal attention later ones have seen these."""

    def part(self, input_ids: Tensor, mask: Tensor, template: Template) -> Tensor:
        return ~is_any(input_ids, template.visual)


class MeanWithoutInstruction(MeanOfPart):
    """The mean over what follows the instruction, which still influences it (INSTRUCTOR, arXiv:2212.09741)."""

    def part(self, input_ids: Tensor, mask: Tensor, template: Template) -> Tensor:
        following = torch.ones_like(input_ids, dtype=torch.bool)
        position = mask.cumsum(dim=1) * mask  # From 1, at each item's first token; 0 at padding.
        for instruction in template.instructions:
            matches = torch.ones_like(input_ids[:, 0], dtype=torch.bool)  # (B,): whether the item begins with it
            for index, token in enumerate(instruction, start=1):
                matches &= ((input_ids == token) & (position == index)).any(dim=1)
            following &= ~(matches[:, None] & (position <= len(instruction)))
        return following
