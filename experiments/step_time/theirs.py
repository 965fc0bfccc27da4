"""Their side: Sentence Transformers' cached loss, set up as its documentation does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from data import Pair
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from torch import Tensor
from transformers.utils import is_flash_attn_2_available
from work import LEARNING_RATE, TEMPERATURE, Work, lora

Features = list[dict[str, Any]]


class Theirs:
    """Sentence Transformers, without its trainer around it.

    Args:
        work: What is trained.
        mini_batch_size: Items per mini-batch, in the loss also where there is a budget of tokens.
        mini_batch_num_tokens: Tokens per mini-batch; None to count items.
    """

    def __init__(self, work: Work, mini_batch_size: int = 32, mini_batch_num_tokens: int | None = None) -> None:
        torch.manual_seed(0)
        options = {"dtype": getattr(torch, work.dtype)}
        if work.device == "cuda" and is_flash_attn_2_available():
            options["attn_implementation"] = "flash_attention_2"
        self.model = SentenceTransformer(str(work.checkpoint), device=work.device, model_kwargs=options).train()
        transformer: Any = self.model[0]
        if work.trained == "language":
            transformer.model.visual.requires_grad_(False)
        elif work.trained == "lora":
            self.model.add_adapter(lora())
        inner = CachedMultipleNegativesRankingLoss(
            self.model,
            scale=1 / TEMPERATURE,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
        )
        self.loss = MatryoshkaLoss(self.model, inner, work.dimensions)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.SGD(weights, LEARNING_RATE)
        self.device = work.device

    def prepare(self, pairs: Sequence[Pair]) -> Features:
        texts, pictures = zip(*pairs, strict=True)
        columns = {"query": list(texts), "document": list(pictures)}
        features = [self.model.preprocess(column, prompt=self.model.prompts[role]) for role, column in columns.items()]
        # On a GPU their trainer's loader pins.
        return [_each(column, torch.Tensor.pin_memory) for column in features] if self.device == "cuda" else features

    def step(self, batch: Features) -> float:
        # The trainer moves whole batches to the device; the model changes the dictionaries that it is given.
        columns = [_each(features, lambda tensor: tensor.to(self.device, non_blocking=True)) for features in batch]
        value = self.loss(columns, torch.empty(0))
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value.item()


def _each(features: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in features.items()}
