"""Before the first step: how large chunks may be, what is kept of frozen towers, and the engine that uses both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from lightning import LightningModule

from vlmembed import distributed, memory
from vlmembed.backbones import VisionLanguageModel
from vlmembed.encoder import Encoder
from vlmembed.engine import Engine
from vlmembed.features import FeatureCache, fingerprint, refuse_trainable
from vlmembed.memory import GraphMemory
from vlmembed.modules.optimization import batches_per_epoch
from vlmembed.modules.probing import chunk_cost, patch_cost
from vlmembed.sharding import ShardedEngine


def start_engine(
    module: LightningModule, encoder: Encoder, graph_memory: GraphMemory, features: FeatureCache | None
) -> Engine:
    """Return the engine for a fit that is about to begin.

    Args:
        module: What is trained; its data module's ``chunk_size: auto`` becomes a cost.
        encoder: Its encoder.
        graph_memory: What graphs may take; see `memory.graph_bytes`.
        features: Keeps a frozen tower's features.

    Raises:
        ValueError: If an option cannot be served.
    """
    data: Any = getattr(module.trainer, "datamodule", None)
    sharded = distributed.is_sharded(encoder)
    if sharded:
        _refuse_for_shards(getattr(data, "chunk_size", None), graph_memory)
    limit = memory.graph_bytes(graph_memory, module.device)
    if hasattr(data, "set_chunking"):
        data.set_chunking(data.chunk_tokens, patch_cost(encoder))
    if getattr(data, "chunk_size", None) == "auto" and data.chunk_tokens is None:
        with module.trainer.precision_plugin.forward_context():
            data.set_chunking(chunk_cost(encoder), patch_cost(encoder))
        _tell(module, f"chunk_size: auto. A chunk has room for {data.chunk_tokens:,} tokens.")
    steps = 0
    if features is not None:
        _open(features, encoder.backbone, str(module.trainer.precision))
        steps = batches_per_epoch(data)
    return ShardedEngine(encoder, features, steps) if sharded else Engine(encoder, limit, features, steps)


def _refuse_for_shards(chunk_size: int | str | None, graph_memory: GraphMemory) -> None:
    if chunk_size == "auto" or graph_memory not in ("auto", "none"):
        raise ValueError(
            f"With ModelParallelStrategy, data.chunk_size is a number (got {chunk_size}) and graph_memory is auto or "
            f"none (got {graph_memory}): processes go through the layers in step."
        )


def _tell(module: LightningModule, sentence: str) -> None:
    """Print what was chosen, and keep it in the run's folder."""
    trainer = module.trainer
    place = trainer.log_dir if trainer.loggers else None  # Which all processes are asked for.
    if trainer.is_global_zero:
        print(sentence)
        if place is not None:
            folder = Path(place)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "chunks.yaml").write_text(yaml.safe_dump({"chunk_cost": trainer.datamodule.chunk_tokens}))  # type: ignore[attr-defined]


def _open(features: FeatureCache, backbone: VisionLanguageModel, precision: str) -> None:
    """Open the cache for features of this tower, these settings and this precision."""
    if not backbone.separate_vision_pass:
        raise ValueError(
            f"features: {type(backbone).__name__} reads images together with their text, so there is nothing to keep. "
            "Use vlmembed.backbones.Qwen3VL with attn_implementation: auto, or set features: null."
        )
    refuse_trainable(backbone.vision_parameters())
    settings = {
        "processor": backbone.preprocessor.processor.image_processor.to_dict(),
        "precision": precision,
        "device": backbone.device.type,
        "versions": [torch.__version__, transformers.__version__],
    }
    # A LoRA in the language model gives the tower's weights longer names, and nothing else.
    weights = ((name.replace("base_model.model.", ""), weight) for name, weight in backbone.vision_parameters())
    features.open(fingerprint(weights, settings))
