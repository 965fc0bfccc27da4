"""How long is a step of a multi-vector model, beside the same step by Sentence Transformers?

Both sides take the same rows, preprocessed already, through the same fresh checkpoint and projection to 128 dimensions
in float32: forward, InfoNCE over MaxSim, backward, update by SGD. Theirs is
CachedMultiVectorMultipleNegativesRankingLoss at the fastest of several mini-batches, which is found first. Steps
alternate in one process, and losses have to agree.

    python experiments/late_interaction/step_time.py         # ten minutes on two cores; nothing else should run
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "step_time"))

import checkpoint
import torch
from data import MAX_TOKENS, MIN_TOKENS, Pair, pairs
from ours import Ours, Setting
from race import race
from report import machine
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from theirs import Theirs
from transformers.utils import logging
from work import LEARNING_RATE, TEMPERATURE, Work

from vlmembed.adapters import Adapter
from vlmembed.backbones import Qwen3VL
from vlmembed.losses import InfoNCE
from vlmembed.modules import MultiVectorModule
from vlmembed.pooling import TokenProjection

SIZE = 128
MINI_BATCHES = (1, 2, 4, 8, 16, 32)


class OursLate(Ours):
    """vlmembed, without Lightning around it."""

    def build(self, work: Work, backbone: Qwen3VL, adapters: list[Adapter]) -> MultiVectorModule:
        projection = TokenProjection(SIZE, allow_larger=True)
        return MultiVectorModule(backbone, InfoNCE(TEMPERATURE), projection, adapters=adapters)


class TheirsLate(Theirs):
    """Sentence Transformers, without its trainer around it, with the projection of ours."""

    def __init__(self, work: Work, weight: torch.Tensor, mini_batch_size: int) -> None:
        opened = SentenceTransformer(str(work.checkpoint), device=work.device)
        transformer: Any = opened[0]
        dense = Dense(
            weight.shape[1],
            SIZE,
            bias=False,
            activation_function=torch.nn.Identity(),
            init_weight=weight.clone(),
            module_input_name="token_embeddings",
        )
        normalize = Normalize(module_input_name="token_embeddings", module_output_name="token_embeddings")
        modules = [transformer, dense, MultiVectorMask(), normalize]
        self.model: Any = MultiVectorEncoder(modules=modules, prompts=opened.prompts, device=work.device).train()
        if work.trained == "language":
            transformer.model.visual.requires_grad_(False)
        self.loss: Any = CachedMultiVectorMultipleNegativesRankingLoss(
            self.model, scale=1 / TEMPERATURE, mini_batch_size=mini_batch_size
        )
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], LEARNING_RATE)
        self.device = work.device

    def prepare(self, pairs: Sequence[Pair]) -> Any:
        features = super().prepare(pairs)
        return [{**column, "task": task} for column, task in zip(features, ("query", "document"), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 64], help="pairs per batch")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side")
    parser.add_argument("--config", default="wide_tower", help="of the checkpoint, as in ../step_time")
    options = parser.parse_args()
    logging.disable_progress_bar()
    print(machine())
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        config = checkpoint.configuration(options.config)
        checkpoint.write(folder, config, MIN_TOKENS, MAX_TOKENS)
        for size in options.batch_sizes:
            for trained in ("language", "everything"):
                work = Work(folder, config.get_text_config().hidden_size, trained)  # type: ignore[arg-type]
                _compare(work, pairs(size), options.rounds)


def _compare(work: Work, rows: Sequence[Pair], rounds: int) -> None:
    """Print how many times as fast our step is as theirs at its best mini-batch."""
    ours = OursLate(work, Setting())
    pooling: Any = ours.model.encoder.pooling
    weight = pooling.outer.weight.detach().clone()
    tried = {str(size): TheirsLate(work, weight, size) for size in MINI_BATCHES if size <= len(rows)}
    best = race({name: partial(side.step, side.prepare(rows)) for name, side in tried.items()}, 2).fastest()
    del tried
    theirs = TheirsLate(work, weight, int(best))
    sides = {"ours": ours, "theirs": theirs}
    result = race({name: partial(side.step, side.prepare(rows)) for name, side in sides.items()}, rounds)
    ratio, low, high = result.ratio("ours", "theirs")
    middle = {name: result.spread(name)[1] for name in sides}
    print(
        f"| {work.trained}, batch {len(rows)} | ours {middle['ours']:.3f} s | theirs {middle['theirs']:.3f} s at "
        f"mini-batch {best} | {ratio:.2f} times as fast ({low:.2f}–{high:.2f}) | losses "
        f"{result.losses['ours'][0]:.4f}, {result.losses['theirs'][0]:.4f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
