"""Qwen3-VL, dense and mixture-of-experts."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, ProcessorMixin

from vlmembed.backbones.base import VisionLanguageModel


class Qwen3VL(VisionLanguageModel):
    """Qwen3-VL and Qwen3-VL-MoE, any size (arXiv:2511.21631).

    An image takes one token per 32 × 32 pixels, after it was resized, at its own aspect ratio, to between
    ``min_pixels`` and ``max_pixels`` pixels. Training at fewer pixels than serving is common, and much cheaper.

    Args:
        checkpoint: A checkpoint folder or a Hub id, such as Qwen/Qwen3-VL-2B-Instruct.
        min_pixels: The fewest pixels of a resized image; null keeps the checkpoint's.
        max_pixels: The most pixels of a resized image; null keeps the checkpoint's. 600 × 600 is 360000.
        **options: As for `VisionLanguageModel`.

    Raises:
        ValueError: If ``min_pixels`` is above ``max_pixels``.
    """

    def __init__(
        self,
        checkpoint: str,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint, **options)
        if min_pixels and max_pixels and min_pixels > max_pixels:
            raise ValueError(f"min_pixels={min_pixels} is above max_pixels={max_pixels}.")
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels

    def load_config(self) -> PretrainedConfig:
        """Read the checkpoint's configuration; see `VisionLanguageModel.load_config`."""
        config = super().load_config()
        if not config.model_type.startswith("qwen3_vl"):
            raise ValueError(
                f"The checkpoint {self.checkpoint!r} is a {config.model_type!r}, not a Qwen3-VL. "
                "Use vlmembed.backbones.VisionLanguageModel for other vision-language models."
            )
        return config

    def load_processor(self) -> ProcessorMixin:
        """Open the checkpoint's processor, with this backbone's pixel limits."""
        processor = super().load_processor()
        size = processor.image_processor.size
        shortest, longest = self.min_pixels or size["shortest_edge"], self.max_pixels or size["longest_edge"]
        if shortest > longest:
            raise ValueError(
                f"min_pixels={shortest} is above max_pixels={longest} (one of them is the checkpoint's own). Set both."
            )
        # In this family's processors an "edge" is a number of pixels.
        processor.image_processor.size = {"shortest_edge": shortest, "longest_edge": longest}
        return processor
