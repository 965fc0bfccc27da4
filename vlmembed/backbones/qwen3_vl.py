"""Qwen3-VL, dense and mixture-of-experts, without padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from vlmembed.backbones.base import Features, VisionLanguageModel
from vlmembed.backbones.chat_templates import PairTemplate
from vlmembed.backbones.packing import Bounds, LastTokens, Packed, PackedItems, Sharing, computed_images, install
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
    """

    #: Parts of it are asked for that other models do not have.
    model: Any

    def __init__(
        self, checkpoint: str, min_pixels: int | None = None, max_pixels: int | None = None, **options: Any
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
        """Read the checkpoint's configuration."""
        config = super().load_config()
        if not config.model_type.startswith("qwen3_vl"):
            raise ValueError(
                f"The checkpoint {self.checkpoint!r} is a {config.model_type!r}, not a Qwen3-VL. "
                "Use vlmembed.backbones.VisionLanguageModel for other vision-language models."
            )
        return config

    def open_processor(self) -> ProcessorMixin:
        """Open the checkpoint's processor, with this backbone's pixel limits."""
        processor = super().open_processor()
        size = processor.image_processor.size
        shortest, longest = self.min_pixels or size["shortest_edge"], self.max_pixels or size["longest_edge"]
        if shortest > longest:
            raise ValueError(f"min_pixels={shortest} is above max_pixels={longest} (where null, the checkpoint's own).")
        if self.separate_vision_pass:
            check_normalisation(processor, self.checkpoint)
        # In this family's processors an "edge" is a number of pixels.
        processor.image_processor.size = {"shortest_edge": shortest, "longest_edge": longest}
        return processor

    def _preprocessor_class(self, template: PairTemplate | None) -> Any:
        if not self.separate_vision_pass:
            return ChatPreprocessor
        # A beginning can be shared where no token sees what is behind it, by an attention that knows of it.
        shares = template is not None and not self.bidirectional and self.attn_implementation == "auto"
        return partial(PackingPreprocessor, self.load_config().vision_config, shares)

    def _attention(self, config: PretrainedConfig) -> str:
        # flash-attn, as transformers calls it, does not know which keys are shared; ours does.
        return "sdpa" if getattr(self.preprocessor, "shares", False) else super()._attention(config)

    def adopt(self, model: Any, preprocessor: ChatPreprocessor) -> None:
        """Compute with a model that is loaded already; it reads packed sequences from now on."""
        super().adopt(model, preprocessor)
        if self.separate_vision_pass:
            install(model)

    def _load_model(self) -> None:
        super()._load_model()
        if self.separate_vision_pass:
            install(self.model)

    def encode_images(self, images: Inputs) -> Sequence[Float[Tensor, "tokens levels H"]]:
        """Return what stands in for each image's tokens, and what later layers add (DeepStack, arXiv:2406.04334)."""
        device = self.device
        here = {name: tensor.to(device, non_blocking=True) for name, tensor in images.items()}
        frames, height, width = images["grid_thw"].T
        # Frames attend to themselves alone. (patches, numbers) → (tokens, H), one for 2 × 2 patches.
        bounds = Bounds.of((height * width).repeat_interleave(frames), device)
        output = self.model.visual(
            self._normalised(here["pixel_values"]),
            here["grid_thw"],
            position_ids=here["position_ids"],
            interp_indices=here["taps"],
            interp_weights=here["weights"],
            cu_seqlens=bounds.ends,
            max_seqlen=bounds.longest,
            # Handed on by transformers from layer to layer; comes out in attention.packed_attention.
            packed=Packed(bounds, bounds),
        )
        features = torch.stack([output.pooler_output, *output.deepstack_features], dim=1)  # (tokens, levels, H)
        tokens: list[int] = (images["grid_thw"].prod(dim=1) // self.model.visual.spatial_merge_unit).tolist()
        return features.split(tokens)

    def forward(
        self, inputs: Inputs, layers: Sequence[int] = (-1,), features: Features = (), num_last_tokens: int | None = None
    ) -> Float[Tensor, "*K B L H"]:
        """Return hidden states of a chunk of `PackedItems`, or of what the preprocessor returns when it is called."""
        if not self.separate_vision_pass:
            return super().forward(inputs, layers)
        if "images" not in inputs:
            items = PackedItems(
                {name: tensor.cpu() for name, tensor in inputs.items()}, self.model.config.vision_config
            )
            features = [image for images in items.images() for image in self.encode_images(images)]
            inputs = items.chunk(range(len(inputs["input_ids"])))
        # (B, L) with padding → (T,) real tokens, end to end, of which those of shared beginnings are not computed.
        mask, device = inputs["attention_mask"], self.device
        lengths, tokens = mask.sum(dim=1), mask.flatten().nonzero()[:, 0]
        here = partial(Tensor.to, device=device, non_blocking=True)  # From pinned memory, while the device computes.
        computed: Tensor | slice = slice(None)
        index, counts = None, lengths
        if "shared" in inputs:
            sharing = Sharing.of(lengths, inputs["shared"])
            computed, index, counts = sharing.computed, here(sharing.index), sharing.counts
        language = self.model.language_model
        ids = inputs["input_ids"].flatten()[tokens][computed]
        hidden = language.embed_tokens(here(ids))[None]  # (1, computed, H)
        hidden, added = self._insert_images(hidden, ids, [features[image] for image in computed_images(inputs)])
        deepstack = self.model.config.vision_config.deepstack_visual_indexes
        # The last layer computes the tokens that are read, if it is the only one, and no features are added behind it.
        last = None
        if num_last_tokens and tuple(layers) == (-1,) and len(language.layers) > len(deepstack):
            last = LastTokens.of(lengths, num_last_tokens, device)
        read = last if last is None or index is None else replace(last, index=index[last.index])
        packed = Packed(Bounds.of(counts, device), Bounds.of(lengths, device), index, read)
        output = language(
            inputs_embeds=hidden,
            position_ids=here(inputs["position_ids"][:, computed])[:, None],  # (3, 1, computed)
            # Comes out in attention._add_features, behind each of the first layers.
            deepstack_visual_embeds=added,
            use_cache=False,
            output_hidden_states=tuple(layers) != (-1,),
            is_causal=not self.bidirectional,
            # Handed on by transformers from layer to layer; comes out in attention._forward_last and packed_attention.
            packed=packed,
            **packed.flash_arguments,
        )
        states = [output.last_hidden_state if layer == -1 else output.hidden_states[layer] for layer in layers]
        if index is not None and last is None:
            # What was shared is handed out to all that share it: (1, computed, H) → (1, T, H).
            states = [state[:, index] for state in states]
        # Back to (K, B, L, H). Where a token was left out, whoever reads it should see so.
        target = here(tokens) if last is None else here(tokens)[last.index]
        stacked = torch.cat(states)
        padded = stacked.new_full((len(layers), mask.numel(), stacked.shape[-1]), math.nan if last else 0.0)
        padded = padded.index_copy(1, target, stacked).unflatten(1, mask.shape)
        return padded if len(layers) > 1 else padded[0]

    def _insert_images(
        self, hidden: Tensor, ids: Int[Tensor, " T"], images: Sequence[Float[Tensor, "tokens levels H"]]
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Put the first level of features where the image tokens are; return what later layers add there, too."""
        if not images:
            return hidden, None
        visual = torch.tensor([self.model.config.image_token_id, self.model.config.video_token_id])
        index = torch.isin(ids, visual).nonzero()[:, 0].to(hidden.device, non_blocking=True)
        features = torch.cat([image.to(hidden.device, hidden.dtype, non_blocking=True) for image in images])
        first, *levels = features.transpose(0, 1)[:, None]  # Each (1, tokens, H).
        zeros = torch.zeros_like(hidden)
        return hidden.index_copy(1, index, first), [zeros.index_copy(1, index, level) for level in levels]

    def _normalised(self, pixels: Tensor) -> Float[Tensor, "patches numbers"]:
        """Turn bytes into normalised pixels, of an image once for all moments in time."""
        if pixels.dtype != torch.uint8:
            return pixels
        vision, processor = self.model.config.vision_config, self.preprocessor.processor.image_processor
        mean, deviation = (
            (torch.tensor(values).view(3, 1, 1) * (1.0 / processor.rescale_factor)).to(pixels.device, non_blocking=True)
            for values in (processor.image_mean, processor.image_std)
        )
        pixels = pixels.view(len(pixels), 3, -1, vision.patch_size**2).float()
        return pixels.sub_(mean).div_(deviation).flatten(1)
