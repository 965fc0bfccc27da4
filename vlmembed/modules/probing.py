"""How large a chunk may be: measured on the user's own model, once, before training."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from vlmembed import distributed, memory
from vlmembed.data.collate import Collator
from vlmembed.encoder import Encoder
from vlmembed.engine import Engine
from vlmembed.types import Batch, Example, Item, Part, Preprocessor

#: More tokens than this make a chunk no faster: the device is busy, or the processor's caches are full.
MOST_TOKENS = {"cuda": 16_384, "cpu": 2_048}
LEAST_TOKENS = 256
#: Of the free memory, what one chunk may take. The rest is for the graphs of other chunks.
SHARE = 0.25
#: Of the pictures, in pixels.
SIDE = 256


def chunk_tokens(encoder: Encoder) -> int:
    """Find how many tokens a chunk may have.

    Two chunks of pictures and words, one twice as long as the other, go forward and back; what they take is made a
    straight line.

    Args:
        encoder: With weights and adapters, where it will be trained.

    Returns:
        The same number in every process, for the one that has the least memory.
    """
    device = encoder.device
    (few, small), (many, large) = (_try(encoder, tokens) for tokens in (LEAST_TOKENS, 2 * LEAST_TOKENS))
    per_token = max(1.0, (large - small) / (many - few))
    affordable = int(SHARE * memory.free(device) / per_token)
    tokens = max(LEAST_TOKENS, min(affordable, MOST_TOKENS[device.type]))
    return int(distributed.gather(torch.tensor([tokens], device=device)).min())


def _try(encoder: Encoder, tokens: int) -> tuple[int, float]:
    """Send a chunk of so many tokens or a few more forward and back; return its tokens, and the bytes it took."""
    batch = _batch(encoder.backbone.preprocessor, tokens)
    engine = Engine(encoder, graph_bytes=math.inf)
    peak = memory.StepPeak(encoder.device)
    with torch.random.fork_rng():
        engine.embed(batch).sum().backward()
        engine.replay()
    encoder.zero_grad()
    # In main memory only what is saved for the backward is known: about half of what is there for a moment.
    taken = peak.bytes or 2 * engine.room.taken
    return int(sum(chunk["attention_mask"].sum() for chunk in batch.chunks)), taken


def _batch(preprocessor: Preprocessor, tokens: int) -> Batch:
    """Make one chunk of pictures and words."""
    draw = np.random.default_rng(0)
    examples: list[Example] = []
    while sum(preprocessor.cost(example.positives[0]) for example in examples) < tokens:
        picture = Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        number = str(len(examples))
        shown = Item("document", (Part("image", picture), Part("text", number)), origin="probing for chunk_size: auto")
        examples.append(Example(Item("query", (Part("text", number),)), (shown,)))
    return Collator(preprocessor)(examples)
