"""Qwen3-VL, dense and mixture-of-experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from vlmembed.backbones.attention import Bounds, Tail, install, shorten
from vlmembed.backbones.base import Features, VisionLanguageModel
from vlmembed.backbones.packing import PackedItems, VisionLayout, frame_patches
from vlmembed.backbones.prefix_sharing import Sharing, own_images
from vlmembed.backbones.preprocessing import ChatPreprocessor, PackingPreprocessor, check_normalisation
from vlmembed.types import Inputs


class Qwen3VL(VisionLanguageModel):
    """Qwen3-VL and Qwen3-VL-MoE, any size (arXiv:2511.21631).

    An image takes one token per 32 × 32 pixels, after it was resized, at its own aspect ratio, to between
    ``min_pixels`` and ``max_pixels`` pixels. Training at fewer pixels than serving is common, and much cheaper.

    Nothing is padded, and the vision tower sees each distinct image of a batch once. With ``attn_implementation``
    ``sdpa`` or ``eager`` transformers' own padded forward runs instead, image by image with its text: slower, and there
    to compare with.

    Args:
        checkpoint: A checkpoint folder or a Hub id, such as Qwen/Qwen3-VL-2B-Instruct.
        min_pixels: The fewest pixels of a resized image; null keeps the checkpoint's.
        max_pixels: The most pixels of a resized image; null keeps the checkpoint's. 600 × 600 is 360000.
        **options: As for `VisionLanguageModel`.

    Raises:
        ValueError: If ``min_pixels`` is above ``max_pixels``.
    """

    #: Parts of it are asked for that other models do not have.
    model: Any

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

    @property
    def separate_vision_pass(self) -> bool:
        """Whether nothing is padded, and images come in chunks of their own."""
        return self.attn_implementation in ("auto", "flash_attention_2")

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
        if self.separate_vision_pass:
            check_normalisation(processor, self.checkpoint)
        # In this family's processors an "edge" is a number of pixels.
        processor.image_processor.size = {"shortest_edge": shortest, "longest_edge": longest}
        return processor

    @cached_property
    def preprocessor(self) -> ChatPreprocessor:
        """The preprocessor of this backbone's inputs; see `VisionLanguageModel.preprocessor`."""
        if not self.separate_vision_pass:
            return super().preprocessor
        return PackingPreprocessor(VisionLayout.of(self.load_config()), self.shares_beginnings, **self._preprocessing)

    @property
    def shares_beginnings(self) -> bool:
        """Whether pairs that begin alike compute their beginning once: where no token sees what is behind it."""
        causal = not self.bidirectional
        return self.pair_template is not None and causal and self.attn_implementation == "auto"

    def configure(self) -> None:
        """Load the weights; see `VisionLanguageModel.configure`."""
        super().configure()
        if self.separate_vision_pass:
            install(self.model)
            shorten(self.model.language_model.layers[-1])

    def encode_images(self, images: Inputs) -> Sequence[Float[Tensor, "tokens levels H"]]:
        """Run the vision tower on a chunk of images; see `VisionLanguageModel.encode_images`.

        Returns:
            Of each image, the features that stand in for its tokens' embeddings, and those that are added behind each
            of the first layers (DeepStack, arXiv:2406.04334).
        """
        here = {name: self._here(tensor) for name, tensor in images.items()}
        bounds = Bounds.of(frame_patches(images["grid_thw"]), self.device)
        output = self.model.visual(
            self._normalised(here["pixel_values"]),
            here["grid_thw"],
            position_ids=here["position_ids"],
            interp_indices=here["taps"],
            interp_weights=here["weights"],
            cu_seqlens=bounds.ends,
            max_seqlen=bounds.longest,
            bounds=bounds,
        )
        features = torch.stack([output.pooler_output, *output.deepstack_features], dim=1)
        tokens: list[int] = (images["grid_thw"].prod(dim=1) // self.model.visual.spatial_merge_unit).tolist()
        return features.split(tokens)

    def forward(
        self, inputs: Inputs, layers: Sequence[int] = (-1,), features: Features = (), num_last_tokens: int | None = None
    ) -> Float[Tensor, "*K B L H"]:
        """Return hidden states; see `VisionLanguageModel.forward`.

        Args:
            inputs: A chunk of `PackedItems`, or what the `preprocessor` returns when it is called.
            layers: Which hidden states.
            features: Of the distinct images of the batch, from `see`; the chunk says which of them it shows.
            num_last_tokens: How many of an item's last tokens will be read; the last layer is computed for no others.
        """
        if not self.separate_vision_pass:
            return super().forward(inputs, layers)
        if "images" not in inputs:
            return self._forward_unpacked(inputs, layers, num_last_tokens)
        mask = inputs["attention_mask"]
        tokens = mask.flatten().nonzero()[:, 0]
        lengths = mask.sum(dim=1)
        sharing = Sharing.of(lengths, inputs["shared"]) if "shared" in inputs else None
        last = self._tail(lengths, layers, num_last_tokens)
        ids = inputs["input_ids"].flatten()[tokens]
        ids = ids if sharing is None else ids[sharing.own]
        hidden = self.model.language_model.embed_tokens(self._here(ids))[None]
        added = None
        if shown := [features[place] for place in own_images(inputs)]:
            hidden, added = self._with_images(hidden, ids, torch.cat([self._here(image) for image in shown]))
        states = self._read(hidden, added, inputs, layers, last, sharing)
        filled = self._here(tokens) if last is None else self._here(tokens)[last.places]
        # Where a token was left out, whoever reads it should see so.
        padded = states.new_full((len(states), mask.numel(), states.shape[-1]), math.nan if last else 0.0)
        padded = padded.index_copy(1, filled, states).unflatten(1, mask.shape)
        return padded if len(layers) > 1 else padded[0]

    def _attention(self, config: PretrainedConfig) -> str:
        # flash-attn, as transformers calls it, does not know which keys are shared; ours does.
        return "sdpa" if self.shares_beginnings else super()._attention(config)

    def _forward_unpacked(self, inputs: Inputs, layers: Sequence[int], num_last_tokens: int | None) -> Tensor:
        on_host = {name: tensor.cpu() for name, tensor in inputs.items()}
        items = PackedItems(on_host, VisionLayout.of(self.model.config))
        features = [image for images in items.images() for image in self.encode_images(images)]
        return self.forward(items.chunk(range(len(inputs["input_ids"]))), layers, features, num_last_tokens)

    def _with_images(self, hidden: Tensor, ids: Tensor, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Put features where the image tokens are; return the first level, and what later layers add."""
        image_ids = torch.tensor([self.model.config.image_token_id, self.model.config.video_token_id])
        places = self._here(torch.isin(ids, image_ids).nonzero()[:, 0])
        first, *levels = features.to(hidden.dtype).transpose(0, 1)[:, None]
        nothing = torch.zeros_like(hidden)
        return hidden.index_copy(1, places, first), [nothing.index_copy(1, places, level) for level in levels]

    def _tail(self, lengths: Tensor, layers: Sequence[int], tokens: int | None) -> Tail | None:
        """Say which tokens the last layer is needed for, if not for all."""
        config = self.model.config
        images_enter = len(config.vision_config.deepstack_visual_indexes)
        if tokens is None or tuple(layers) != (-1,) or config.text_config.num_hidden_layers <= images_enter:
            return None
        return Tail.of(lengths, tokens, self.device)

    def _read(
        self,
        hidden: Tensor,
        added: list[Tensor] | None,
        inputs: Inputs,
        layers: Sequence[int],
        tail: Tail | None,
        sharing: Sharing | None,
    ) -> Tensor:
        """Run the language model on packed tokens; return (K, T, H), or of the tail alone."""
        bounds = asking = Bounds.of(inputs["attention_mask"].sum(dim=1), self.device)
        positions, places = inputs["position_ids"], None
        if sharing is not None:
            asking, places = Bounds.of(sharing.counts, self.device), self._here(sharing.places)
            positions = positions[:, sharing.own]
            tail = tail and replace(tail, places=places[tail.places])
        output = self.model.language_model(
            inputs_embeds=hidden,
            position_ids=self._here(positions)[:, None],
            deepstack_visual_embeds=added,
            use_cache=False,
            output_hidden_states=tuple(layers) != (-1,),
            is_causal=not self.bidirectional,
            cu_seq_lens_q=asking.ends,
            cu_seq_lens_k=bounds.ends,
            max_length_q=asking.longest,
            max_length_k=bounds.longest,
            bounds=bounds,
            asking=asking,
            places=places,
            tail=tail,
        )
        states = [output.last_hidden_state if layer == -1 else output.hidden_states[layer] for layer in layers]
        # What was shared is handed out to all that share it.
        return torch.cat(states if places is None or tail else [each[:, places] for each in states])

    def _normalised(self, pixels: Tensor) -> Float[Tensor, "patches numbers"]:
        """Turn bytes into what transformers' processor returns: normalised, an image twice for two moments in time."""
        if pixels.dtype != torch.uint8:
            return pixels
        vision, processor = self.model.config.vision_config, self.preprocessor.processor.image_processor
        mean, deviation = (
            self._here(torch.tensor(values).view(3, 1, 1) * (1.0 / processor.rescale_factor))
            for values in (processor.image_mean, processor.image_std)
        )
        pixels = (pixels.view(len(pixels), 3, -1, vision.patch_size**2).float() - mean) / deviation
        return pixels.expand(-1, -1, vision.temporal_patch_size, -1).flatten(1)

    def _here(self, tensor: Tensor) -> Tensor:
        """Copy to the device; from pinned memory, while the device computes."""
        return tensor.to(self.device, non_blocking=True)
