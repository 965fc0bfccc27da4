"""How long is a training step, beside the same step by Sentence Transformers?

Both take the same rows, preprocessed already, through the same fresh checkpoint: forward, Matryoshka loss over seven
dimensions, backward, SGD. Their steps alternate in one process, so that both see the same machine.

    python experiments/step_time/benchmark.py [--steps 7] [--batch_size 32] [--chunk_size 8] [--train_vision]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss

from vlmembed import gradcache
from vlmembed.adapters import Freeze
from vlmembed.backbones import Qwen3VL, tiny
from vlmembed.data import Collator
from vlmembed.data.digits import HandwrittenNumbers
from vlmembed.encoder import Encoder
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.losses import InfoNCE, Matryoshka
from vlmembed.modules import EmbeddingModule
from vlmembed.modules.embedding import joined_batch
from vlmembed.pooling import LastToken
from vlmembed.types import Example, Item, Part

DIMENSIONS = [320, 256, 192, 128, 64, 32, 16]
#: Pictures of 3 to 48 tokens.
SCALES = (1, 2, 3, 4)


def rows(count: int) -> list[tuple[str, Image.Image]]:
    source, found = HandwrittenNumbers(), []
    for index in range(count):
        example = source[index]
        picture = example.positives[0].parts[0].frames[0]
        scale = SCALES[index % len(SCALES)]
        found.append((str(example.query.parts[0].value), picture.resize((96 * scale, 32 * scale))))
    return found


def our_step(folder: Path, data: list[tuple[str, Image.Image]], chunk_size: int, frozen: bool) -> Callable[[], float]:
    loss = Matryoshka(InfoNCE(0.05), DIMENSIONS)
    adapters = [Freeze(["vision", "merger"])] if frozen else []
    model = EmbeddingModule(Qwen3VL(str(folder)), LastToken(), loss, adapters)
    model.configure_model()
    examples = [
        Example(Item("query", (Part("text", text),)), (Item("document", (Part("image", picture),)),))
        for text, picture in data
    ]
    batch = Collator(model.preprocessor, chunk_size)(examples)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 1e-3)

    def step() -> float:
        cached = gradcache.embed(model.encoder, batch.chunks)
        value = model.loss(*joined_batch(cached.embeddings, batch))
        value.backward()
        cached.replay()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def their_step(folder: Path, data: list[tuple[str, Image.Image]], chunk_size: int, frozen: bool) -> Callable[[], float]:
    model = SentenceTransformer(str(folder), device="cpu").train()
    if frozen:
        model[0].model.visual.requires_grad_(False)
    inner = CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=chunk_size)
    loss = MatryoshkaLoss(model, inner, DIMENSIONS)
    columns = [([text for text, _ in data], "query"), ([picture for _, picture in data], "document")]
    prepared = [model.preprocess(column, prompt=model.prompts[role]) for column, role in columns]
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 1e-3)

    def step() -> float:
        value = loss([dict(features) for features in prepared], torch.zeros(len(data)))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--chunk_size", type=int, default=8)
    parser.add_argument("--train_vision", action="store_true")
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        fresh, folder = Path(scratch) / "fresh", Path(scratch) / "folder"
        tiny.create(fresh, hidden_size=320, layers=6, heads=4, vision_hidden_size=256, vision_layers=4)
        encoder = Encoder(Qwen3VL(str(fresh)), LastToken())
        encoder.configure()
        folder.mkdir()
        write_folder(encoder, folder)
        data = rows(options.batch_size)
        sides = {
            name: build(folder, data, options.chunk_size, not options.train_vision)
            for name, build in (("vlmembed", our_step), ("Sentence Transformers", their_step))
        }
        losses, seconds = {}, {name: [] for name in sides}
        for turn in range(options.steps + 1):
            for name, step in sides.items():
                start = time.perf_counter()
                losses[name] = step()
                if turn:  # The first is a warm-up.
                    seconds[name].append(time.perf_counter() - start)
    print(f"{sum(weight.numel() for weight in encoder.parameters()) / 1e6:.1f} M parameters, {vars(options)}")
    for name, found in seconds.items():
        print(
            f"{name:22} {median(found):.3f} s (from {min(found):.3f} to {max(found):.3f}), last loss {losses[name]:.5f}"
        )
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    print(f"ratio, median of pairs  {median(ratios):.2f}")


if __name__ == "__main__":
    main()
