"""Poolings that average over some kinds of token: those of images, those of texts, those behind the instruction."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmembed.pooling.base import Pooling, Template, weighted_mean


class MeanOfPart(Pooling, ABC):
    """The mean over some kind of token."""

    reads_template = True

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        mask: Int[Tensor, "B L"],
        input_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Pool the mean of the part, or of everything in an item that has no such tokens.

        Raises:
            ValueError: If there are no ids, or nobody said what they mean.
        """
        if input_ids is None or self.template is None:
            raise ValueError(f"{type(self).__name__} needs input_ids, and the template that they were made with.")
        part = mask * self.part(input_ids, mask, self.template)
        return weighted_mean(hidden, torch.where(part.any(dim=1, keepdim=True), part, mask))

    @abstractmethod
    def part(self, input_ids: Int[Tensor, "B L"], mask: Int[Tensor, "B L"], template: Template) -> Bool[Tensor, "B L"]:
        """Say which tokens belong to the part; padding does not matter."""


class MeanOfImages(MeanOfPart):
    """The mean over the tokens of images and videos; an item without any is averaged as a whole.

    Image tokens alone are what late-interaction models of pages keep (ColPali, arXiv:2407.01449).
    """

    def part(self, input_ids: Int[Tensor, "B L"], mask: Int[Tensor, "B L"], template: Template) -> Bool[Tensor, "B L"]:
        """Say where images are."""
        return _are(input_ids, template.visual)


class MeanOfText(MeanOfPart):
    """The mean over the tokens that are not of images or videos: texts, instruction and template.

    Under causal attention those behind an image have seen it.
    """

    def part(self, input_ids: Int[Tensor, "B L"], mask: Int[Tensor, "B L"], template: Template) -> Bool[Tensor, "B L"]:
        """Say where texts are."""
        return ~_are(input_ids, template.visual)


class MeanWithoutInstruction(MeanOfPart):
    """The mean over what follows the instruction, which still influences it (INSTRUCTOR, arXiv:2212.09741)."""

    def part(self, input_ids: Int[Tensor, "B L"], mask: Int[Tensor, "B L"], template: Template) -> Bool[Tensor, "B L"]:
        """Say what follows."""
        following = torch.ones_like(input_ids, dtype=torch.bool)
        place = mask.cumsum(dim=1)  # From 1, at each item's first token.
        for instruction in template.instructions:
            matches = torch.ones_like(input_ids[:, 0], dtype=torch.bool)
            for index, token in enumerate(instruction, start=1):
                # Anything at padding counts as no token.
                matches &= ((input_ids == token) & (place == index) & (mask == 1)).any(dim=1)
            following &= ~(matches[:, None] & (place <= len(instruction)))
        return following


def _are(input_ids: Int[Tensor, "B L"], tokens: tuple[int, ...]) -> Bool[Tensor, "B L"]:
    # One by one: a tensor of ids would have to be sent to the device.
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in tokens:
        found |= input_ids == token
    return found
