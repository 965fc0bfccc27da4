"""How fast does a cross-encoder score, and train, beside Sentence Transformers with the same model?

Both sides open one exported folder, in float32, and read the same pairs: 10 queries with 50 candidates each, of 100
pictures, so that a picture is a candidate of five queries. Steps train on 8 queries with 8 candidates each.
Preprocessing is inside the time on both sides, in the one process. Contenders alternate, and scores and losses have to
agree.

    python experiments/reranker/benchmark.py            # some ten minutes; nothing else should run
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "step_time"))  # Its checkpoints, pictures and races.

import checkpoint
from data import MAX_TOKENS, MIN_TOKENS
from data import pairs as texts_and_pictures
from race import Race, race
from report import machine
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, ListNetLoss
from transformers.utils import logging

from vlmembed.adapters import Freeze
from vlmembed.backbones import DocumentFirst, QueryFirst, Qwen3VL
from vlmembed.export.sentence_transformers import write_reranker
from vlmembed.features import RecentFeatures
from vlmembed.gradcache import GradCache
from vlmembed.heads import Linear
from vlmembed.losses import BinaryCrossEntropy, ListNet
from vlmembed.modules import CrossEncoderModule
from vlmembed.pooling import LastToken
from vlmembed.types import Chunking, EvaluationSet, Example, Item, Part, RerankingSet

QUERIES, CANDIDATES, PICTURES = 10, 50, 100
TRAINED_QUERIES, TRAINED_CANDIDATES = 8, 8
BATCH_SIZES = (8, 32)
LEARNING_RATE = 1e-4
TEMPLATES = {"query first": QueryFirst, "document first": DocumentFirst}


def main() -> None:
    options = _options()
    logging.disable_progress_bar()
    lines = [
        machine(),
        f"`benchmark.py {' '.join(sys.argv[1:])}`",
        "",
        "| work | theirs | ours | ratio |",
        "|---|---|---|---|",
    ]
    with TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "fresh"
        checkpoint.write(fresh, checkpoint.configuration(options.config), MIN_TOKENS, MAX_TOKENS)
        for name, template in TEMPLATES.items():
            folder = Path(scratch) / template.__name__
            folder.mkdir()
            write_reranker(_module(fresh, template).encoder, folder)
            for what, run in _races(folder, template, options.rounds):
                lines.append(_line(f"{what}, {name}", run()))
                print(lines[-1], flush=True)
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _races(folder: Path, template: type, rounds: int) -> Iterator[tuple[str, Callable[[], Race]]]:
    yield "scoring", partial(_scoring, folder, template, rounds)
    for kind in ("binary", "listwise"):
        for frozen, trained in {True: "frozen tower", False: "all trained"}.items():
            yield f"{kind} step, {trained}", partial(_training, folder, template, frozen, kind, rounds)


def _module(folder: Path, template: type, loss: Any = None, frozen: bool = False) -> CrossEncoderModule:
    torch.manual_seed(0)
    adapters = [Freeze(["vision", "merger"])] if frozen else []
    head = Linear(LastToken())
    model = CrossEncoderModule(Qwen3VL(str(folder)), loss or BinaryCrossEntropy(), head, template(), adapters=adapters)
    model.configure_model()
    dense = folder / "2_Dense" / "model.safetensors"
    if dense.exists():
        from safetensors.torch import load_file

        head.pooling.outer.load_state_dict(
            {name.removeprefix("linear."): each for name, each in load_file(dense).items()}
        )
    return model


def _scoring(folder: Path, template: type, rounds: int) -> Race:
    draw = random.Random(0)
    texts, pictures = zip(*texts_and_pictures(PICTURES), strict=True)
    found = [draw.sample(range(PICTURES), CANDIDATES) for _ in range(QUERIES)]
    queries = [Item("query", (Part("text", text),)) for text in texts[:QUERIES]]
    corpus = [Item("document", (Part("image", picture),)) for picture in pictures]
    names = [str(number) for number in range(PICTURES)]
    evaluation = EvaluationSet("pictures", queries, corpus, names[:QUERIES], names, {})
    module = _module(folder, template).eval()
    theirs = CrossEncoder(str(folder), device="cpu")
    asked = [(texts[query], pictures[column]) for query, row in enumerate(found) for column in row]

    @torch.inference_mode()
    def ours(size: int) -> float:
        loader = module.collator().loader(RerankingSet(evaluation, found), size, 0, 1)
        recent, total = RecentFeatures(module.encoder), 0.0
        for batch in loader:
            features = recent.encode_images(batch.images)
            total += sum(module.encoder(chunk, features).abs().sum().item() for chunk in batch.chunks)
        return total / len(asked)

    def stock(size: int) -> float:
        scores = theirs.predict(asked, batch_size=size, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        return float(abs(scores).sum()) / len(asked)

    # The largest of their batches is not always the fastest, so all are in the race.
    return race({f"theirs, {size}": partial(stock, size) for size in BATCH_SIZES} | {"ours": partial(ours, 32)}, rounds)


def _training(folder: Path, template: type, frozen: bool, kind: str, rounds: int) -> Race:
    draw = random.Random(1)
    texts, pictures = zip(*texts_and_pictures(40), strict=True)
    rows = [(text, draw.sample(pictures, TRAINED_CANDIDATES)) for text in texts[:TRAINED_QUERIES]]
    return race(
        {"theirs": _their_step(folder, rows, frozen, kind), "ours": _our_step(folder, template, rows, frozen, kind)},
        rounds,
    )


def _our_step(folder: Path, template: type, rows: list, frozen: bool, kind: str) -> Callable[[], float]:
    loss = BinaryCrossEntropy() if kind == "binary" else ListNet()
    module = _module(folder, template, loss, frozen)
    examples = [
        Example(Item("query", (Part("text", text),)), _documents(shown[:1]), _documents(shown[1:]))
        for text, shown in rows
    ]
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, LEARNING_RATE)
    grad_cache = GradCache(module.encoder, graph_bytes=4 * 2**30)
    collate = module.collator()
    collate.chunking = Chunking(16, patch_cost=0.0 if frozen else 0.5)

    def step() -> float:
        batch = collate(examples)
        value = module.loss(*module.gather_batch(grad_cache.embed(batch), batch))
        value.backward()
        grad_cache.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def _documents(shown: list) -> tuple[Item, ...]:
    return tuple(Item("document", (Part("image", picture),)) for picture in shown)


def _their_step(folder: Path, rows: list, frozen: bool, kind: str) -> Callable[[], float]:
    model = CrossEncoder(str(folder), device="cpu").train()
    if frozen:
        model[0].model.visual.requires_grad_(False)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], LEARNING_RATE)
    labels = [torch.eye(1, TRAINED_CANDIDATES)[0] for _ in rows]
    listwise, binary = ListNetLoss(model, mini_batch_size=16), BinaryCrossEntropyLoss(model)

    def step() -> float:
        if kind == "listwise":
            value = listwise([[text for text, _ in rows], [shown for _, shown in rows]], labels)
        else:
            pairs = [(text, picture) for text, shown in rows for picture in shown]
            value = binary([*zip(*pairs, strict=True)], torch.cat(labels))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def _line(what: str, result: Race) -> str:
    theirs = min((name for name in result.seconds if name != "ours"), key=lambda name: median(result.seconds[name]))
    ratio, low, high = result.ratio("ours", theirs)
    seconds = [f"{median(result.seconds[name]):.2f} s" for name in (theirs, "ours")]
    return f"| {what} | {seconds[0]} ({theirs}) | {seconds[1]} | **{ratio:.2f}** ({low:.2f}–{high:.2f}) |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each contender (default: 5)")
    parser.add_argument("--config", default="wide_tower", help=f"{', '.join(checkpoint.SIZES)}, or a folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results.md", help="the results' file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
