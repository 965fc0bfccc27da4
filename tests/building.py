"""What many tests build: items, pictures, examples, encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmembed.backbones import Qwen3VL
from vlmembed.data import Collator
from vlmembed.encoder import Encoder
from vlmembed.losses import InfoNCE, Loss
from vlmembed.modules import EmbeddingModule
from vlmembed.pooling import LastToken, Pooling
from vlmembed.types import Batch, Example, Item, Part, Role


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def item(*content: str | Image.Image, role: Role = "document") -> Item:
    return Item(role, tuple(Part("text" if isinstance(value, str) else "image", value) for value in content))


def mixed_items() -> list[Item]:
    """Every kind of content, of very different lengths."""
    frames = tuple(picture(64, 64, seed) for seed in range(4))
    return [
        item("a question", role="query"),
        item(picture(96, 64, 1)),
        item(picture(32, 96, 2), "with a caption"),
        item("before", picture(64, 64, 3), "between", picture(96, 32, 4), "after"),
        Item("document", (Part("video", frames),)),
        item("many words " * 30),
    ]


def examples(count: int = 6) -> list[Example]:
    """Texts and pictures, with a shared document, a second positive, and different numbers of hard negatives."""
    shared = item(picture(64, 64, 99))
    rows = []
    for index in range(count):
        query = item(f"query number {index} " * (index % 3 + 1), role="query")
        positive = item(picture(32 + 32 * (index % 3), 64, index), *(["caption"] * (index % 2)))
        positives = (shared, positive) if index % 3 == 0 else (positive,)
        negatives = tuple(item(f"wrong answer {index} {number}") for number in range(index % 3))
        rows.append(Example(query, positives, negatives))
    return rows


def encoder(checkpoint: Path, pooling: Pooling | None = None, **options: Any) -> Encoder:
    built = Encoder(Qwen3VL(str(checkpoint), **options), pooling or LastToken())
    built.configure()
    return built


def module(checkpoint: Path, loss: Loss | None = None, **options: Any) -> EmbeddingModule:
    backbone = options.pop("backbone", {})
    pooling = options.pop("pooling", LastToken())
    built = EmbeddingModule(Qwen3VL(str(checkpoint), **backbone), pooling, loss or InfoNCE(0.05), **options)
    built.configure_model()
    return built


def batch(model: EmbeddingModule, rows: list[Example], chunk_size: int | None = None) -> Batch:
    return Collator(model.preprocessor, chunk_size)(rows)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The size of the difference over the size of the second, all tensors taken together."""
    assert one.keys() == other.keys()
    difference = sum(((one[name] - other[name]).double() ** 2).sum() for name in one)
    size = sum((other[name].double() ** 2).sum() for name in one)
    return float((difference / size).sqrt())
