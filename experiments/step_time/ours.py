"""Our side. The only file that knows vlmembed's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from data import Pair
from work import LEARNING_RATE, TEMPERATURE, Work, lora

from vlmembed.adapters import Adapter, Freeze, LoRA
from vlmembed.backbones import Qwen3VL
from vlmembed.features import InMemory
from vlmembed.gradcache import GradCache
from vlmembed.losses import InfoNCE, Matryoshka
from vlmembed.modules import EmbeddingModule, RetrievalModule
from vlmembed.pooling import LastToken
from vlmembed.training import memory
from vlmembed.types import PATCH_COST, Batch, Chunking, Example, Item, Part


@dataclass(frozen=True)
class Setting:
    """What a user of the cache would choose.

    Args:
        chunk: The size of chunks, in items of average cost; None for what the cache measures.
        retain: Whether the graphs of as many chunks are kept as there is memory for, or none.
        keep_features: Whether a frozen tower's features are kept from epoch to epoch.
    """

    chunk: int | None = None
    retain: bool = True
    keep_features: bool = False


class Ours:
    """vlmembed, without Lightning around it."""

    def __init__(self, work: Work, setting: Setting) -> None:
        self.setting = setting
        # The learnt part of a LoRA starts at zero, but not all of it: the other side seeds the same.
        torch.manual_seed(0)
        self.model = self.build(work, Qwen3VL(str(work.checkpoint), dtype=work.dtype), _adapters(work))
        self.model.configure_model()
        self.model.to(work.device)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.SGD(weights, LEARNING_RATE)
        features = InMemory(limit_gib=8) if setting.keep_features else None
        if features is not None:
            features.open("this run")
        limit = memory.graph_bytes("auto" if setting.retain else "none", self.model.device)
        self.grad_cache = GradCache(self.model.encoder, limit, features, steps=1)
        self.steps = 0

    def build(self, work: Work, backbone: Qwen3VL, adapters: list[Adapter]) -> RetrievalModule:
        loss = Matryoshka(InfoNCE(TEMPERATURE), work.dimensions)
        return EmbeddingModule(backbone, LastToken(), loss, adapters=adapters)

    def prepare(self, pairs: Sequence[Pair]) -> Batch:
        examples = [
            Example(Item("query", (Part("text", text),)), (Item("document", (Part("image", picture),)),))
            for text, picture in pairs
        ]
        collate, encoder = self.model.collator(), self.model.encoder
        tokens = None if self.setting.chunk else memory.tokens_per_chunk(encoder, collate)
        collate.chunking = Chunking(self.setting.chunk, tokens, PATCH_COST if encoder.backbone.trains_vision else 0.0)
        batch = collate(examples)
        return batch.pin_memory() if self.model.device.type == "cuda" else batch

    def step(self, batch: Batch) -> float:
        peak = memory.count_peak(self.model.device) if self.setting.retain and not self.steps else None
        value = self.model.loss(*self.model.gather_batch(self.grad_cache.embed(batch), batch))
        value.backward()
        self.grad_cache.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if peak is not None and peak():  # On a GPU, where the first step shows how much is left for graphs.
            self.grad_cache.graph_bytes = memory.graph_bytes("auto", self.model.device, peak())
        self.steps += 1
        return value.item()


def _adapters(work: Work) -> list[Adapter]:
    return {"everything": [], "language": [Freeze(["vision", "merger"])], "lora": [LoRA(lora())]}[work.trained]
