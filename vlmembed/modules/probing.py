"""How large a chunk may be: measured on the user's own model, once, before training."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from vlmembed import distributed, memory
from vlmembed.data.collate import PATCH_COST, Collator, PairCollator
from vlmembed.encoder import Encoder, Scorer
from vlmembed.engine import Engine
from vlmembed.losses import Targets
from vlmembed.types import Batch, Example, Item, Part, RankingBatch

#: A larger chunk is no faster: the device is busy, or the processor's caches are full.
MOST = {"cuda": 65_536, "cpu": 8_192}
LEAST = 1_024
#: Of the free memory, what one chunk may take. The rest is for the graphs of other chunks.
SHARE = 0.25
PATCHES_PER_TOKEN = 4
#: Of the pictures, in pixels.
SIDE = 256


def chunk_cost(encoder: Encoder) -> int:
    """Find how many tokens a chunk may have, patches counted as `patch_cost` says.

    Two chunks of pictures and words, one twice as long as the other, go forward and back; what they take is made a
    straight line.

    Args:
        encoder: With weights and adapters, where it will be trained.

    Returns:
        The same number in every process, for the one that has the least memory.
    """
    device = encoder.device
    (few, small), (many, large) = (_try(encoder, cost) for cost in (LEAST, 2 * LEAST))
    each = max(1.0, (large - small) / (many - few))
    affordable = int(SHARE * memory.free(device) / each)
    cost = max(LEAST, min(affordable, MOST[device.type]))
    return int(distributed.gather(torch.tensor([cost], device=device)).min())


def patch_cost(encoder: Encoder) -> float:
    """Return what a patch costs, in tokens: nothing where the tower keeps no activations."""
    return PATCH_COST if encoder.backbone.trains_vision else 0.0


def _try(encoder: Encoder, cost: int) -> tuple[int, float]:
    """Send a chunk of such a cost forward and back; return its cost, and the bytes it took."""
    of_patch = patch_cost(encoder)
    batch = _batch(encoder, cost / (1 + PATCHES_PER_TOKEN * of_patch))
    engine = Engine(encoder, graph_bytes=math.inf)
    peak = memory.StepPeak(encoder.device)
    with torch.random.fork_rng():
        engine.embed(batch).sum().backward()
        engine.replay()
    encoder.zero_grad()
    # In main memory only what is saved for the backward is known: about half of what is there for a moment.
    taken = peak.bytes or 2 * engine.room.taken
    tokens = sum(chunk["input_ids"].numel() for chunk in batch.chunks)
    patches = sum(len(images["pixel_values"]) for images in batch.images)
    return tokens + int(of_patch * patches), taken


def _batch(encoder: Encoder, tokens: float) -> Batch | RankingBatch:
    """Make one chunk of pictures and words."""
    preprocessor = encoder.preprocessor
    draw = np.random.default_rng(0)
    examples: list[Example] = []
    while sum(preprocessor.cost(example.positives[0]) for example in examples) < tokens:
        picture = Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        number = str(len(examples))
        shown = Item("document", (Part("image", picture), Part("text", number)), origin="probing for chunk_size: auto")
        examples.append(Example(Item("query", (Part("text", number),)), (shown,)))
    if isinstance(encoder, Scorer):
        return PairCollator(preprocessor, Targets())(examples)
    return Collator(preprocessor)(examples)
