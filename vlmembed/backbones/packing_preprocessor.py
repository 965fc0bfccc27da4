"""From items to inputs without padding, for Qwen3-VL."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vlmembed.backbones.packing import PackedItems, VisionLayout
from vlmembed.backbones.preprocessing import ChatPreprocessor, Message
from vlmembed.types import Inputs, Item, Pair


class PackingPreprocessor(ChatPreprocessor):
    """Prepares items as `PackedItems`: images as bytes, to be normalised on the device.

    Args:
        layout: Of the vision tower.
        shares: Whether items that begin alike compute their beginning once.
        **options: As for `ChatPreprocessor`.
    """

    def __init__(self, layout: VisionLayout, shares: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.layout = layout
        self.shares = shares

    def prepare(self, items: Sequence[Item | Pair], draft: bool = False) -> PackedItems:
        """Read the items of a batch; see `Preprocessor.prepare`."""
        inputs = self._read(items, self._apply_once, self._resized if draft else None)
        if "pixel_values" in inputs:
            # The processor has copied every image to several moments in time.
            moments = self.processor.image_processor.temporal_patch_size
            inputs["pixel_values"] = inputs["pixel_values"].unflatten(1, (3, moments, -1))[:, :, 0].flatten(1)
        return PackedItems(inputs, self.layout, self.shares)

    def _apply_once(self, conversations: list[list[Message]]) -> Inputs:
        """Do what transformers' processor does, with each distinct image once; ``image_order`` says which is where."""
        processor: Any = self.processor
        options = {"do_rescale": False, "do_normalize": False}
        parts = [part for chat in conversations for message in chat for part in message["content"]]
        shown = [part["image"] for part in parts if part["type"] == "image"]
        if not shown or any(part["type"] == "video" for part in parts):
            return self._apply_template(conversations, **options)
        distinct = {id(image): image for image in shown}
        places = {identity: place for place, identity in enumerate(distinct)}
        order = torch.tensor([places[id(image)] for image in shown])
        pixels = processor.image_processor(images=[*distinct.values()], return_tensors="pt", **options)
        tokens = iter((pixels["image_grid_thw"].prod(dim=1) // self.layout.merge_size**2)[order].tolist())
        mark = re.compile(re.escape(processor.image_token))
        texts = processor.apply_chat_template(conversations, add_generation_prompt=self.generation_prompt)
        texts = [mark.sub(lambda found: found[0] * next(tokens), text) for text in texts]
        inputs = processor.tokenizer(texts, padding=True)
        inputs["mm_token_type_ids"] = processor.create_mm_token_type_ids(inputs["input_ids"])
        # Not by the tokenizer, which looks for ragged lists at great length.
        tensors = {name: torch.tensor(rows) for name, rows in inputs.items()}
        return {**tensors, **pixels, "image_order": order}

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        processor = self.processor.image_processor
        size, factor = processor.size, processor.patch_size * processor.merge_size
        return smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])


def check_normalisation(processor: ProcessorMixin, checkpoint: str) -> None:
    """Refuse what bytes cannot be turned into on the device: other pixels would be trained than are served."""
    names = ("do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std")
    image, video = (
        {name: np.asarray(getattr(part, name)).tolist() for name in names}
        for part in (processor.image_processor, processor.video_processor)
    )
    for name in names:
        if not image[name] or image[name] != video[name]:
            raise ValueError(
                f"The checkpoint {checkpoint!r} has {name}={image[name]} for images and {video[name]} for videos; "
                "Qwen3VL needs pixels that are rescaled and normalised, both alike."
            )
