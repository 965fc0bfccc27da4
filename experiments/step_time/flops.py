"""Floating-point operations that a step cannot do without.

A forward pass takes 2 for each weight and token: in the language model's layers for each token of a text, in the tower
for each patch (four times as many as an image's tokens), in the mergers for each of an image's tokens; looking up the
vocabulary takes none. To that comes attention, with 4 for each pair of positions and each number of a head: in the
tower all pairs of an image's patches, in the language model the pairs that a causal mask leaves, half of them.
A backward pass takes twice as many: as many for the gradient of the activations as for that of the weights. Frozen
weights below a LoRA need the first only, what lies below all trained weights neither. The LoRA itself is not counted.
Padding and second forward passes are no useful work either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from data import Pair
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLConfig

from vlmembed.backbones.base import DEFAULT_INSTRUCTION

#: Times a forward pass, in the language model and in the tower, by what is trained.
PASSES = {"everything": (3, 3), "language": (3, 1), "lora": (2, 1)}


def parameters(config: Qwen3VLConfig) -> dict[str, int]:
    """Count weights of ``vocabulary``, ``layers`` (of the language model), ``tower`` and ``mergers``."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config).model
    counts = dict.fromkeys(("vocabulary", "layers", "tower", "mergers"), 0)
    for name, weight in model.named_parameters():
        vision = "mergers" if "merger" in name else "tower"
        language = "vocabulary" if "embed_tokens" in name else "layers"
        counts[vision if name.startswith("visual.") else language] += weight.numel()
    return counts


def features(checkpoint: Path, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Preprocess texts, and pictures, as both sides do, each with an instruction."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    system = {"role": "system", "content": [{"type": "text", "text": DEFAULT_INSTRUCTION}]}
    return [
        processor.apply_chat_template(
            [[system, {"role": "user", "content": [{"type": kind, kind: value}]}] for value in column],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            processor_kwargs={"text_kwargs": {"padding": True}, "common_kwargs": {"return_tensors": "pt"}},
        )
        for kind, column in zip(("text", "image"), zip(*pairs, strict=True), strict=True)
    ]


def forward(config: Qwen3VLConfig, batch: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Count the operations of one forward pass, in the language model and in the tower.

    Args:
        config: The model's.
        batch: A batch's, from `features`.
    """
    counts = parameters(config)
    text: Any = config.text_config
    vision: Any = config.vision_config
    tokens = torch.cat([column["attention_mask"].sum(1) for column in batch]).double()
    patches = torch.cat([column["image_grid_thw"].prod(1) for column in batch if "image_grid_thw" in column]).double()
    merged = patches.sum() / vision.spatial_merge_size**2
    language = 2 * counts["layers"] * tokens.sum()
    language += 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * tokens.square().sum()
    tower = 2 * counts["tower"] * patches.sum() + 2 * counts["mergers"] * merged
    tower += 4 * vision.depth * vision.hidden_size * patches.square().sum()
    return float(language), float(tower)


def step(config: Qwen3VLConfig, batch: Sequence[dict[str, Any]], trained: str) -> float:
    """Count the operations of one training step."""
    return sum(times * count for times, count in zip(PASSES[trained], forward(config, batch), strict=True))


def summary(config: Qwen3VLConfig, batch: Sequence[dict[str, Any]]) -> str:
    """Say how large the model is, and what of it the tower is."""
    counts, (language, tower) = parameters(config), forward(config, batch)
    total, vision = sum(counts.values()), counts["tower"] + counts["mergers"]
    tokens = [column["attention_mask"].sum(1) for column in batch]
    lengths = ", ".join(f"{int(each.min())} to {int(each.max())} (mean {each.float().mean():.0f})" for each in tokens)
    return (
        f"{total / 1e6:.1f} M parameters, {vision / 1e6:.1f} M of them in the vision tower, which takes "
        f"{tower / (language + tower):.0%} of a forward pass's operations. Tokens of texts and of pictures: {lengths}."
    )
