"""Memory: how much there is, what a chunk and the graphs of a step may take, and weights in shards (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import transformers
import yaml
from jaxtyping import Float
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from vlmembed import distributed
from vlmembed.backbones import VisionLanguageModel
from vlmembed.data import Collator
from vlmembed.encoder import Encoder
from vlmembed.features import GIB, FeatureCache, fingerprint, refuse_trainable
from vlmembed.gradcache import GradCache, forward_chunks
from vlmembed.types import PATCH_COST, Batch, Chunking, Example, Item, Part, RankingBatch

#: The rest is left alone: for what an allocator cannot use, and for batches larger than the first.
SAFE_SHARE = {"cuda": 0.9, "cpu": 0.5}
#: Tokens of a chunk. A larger one is no faster: the device is busy, or the processor's caches are full.
MOST_TOKENS, FEWEST_TOKENS = {"cuda": 65_536, "cpu": 8_192}, 1_024
#: Of the free memory, what one chunk may take. The rest is for the graphs of other chunks.
CHUNK_SHARE = 0.25
PATCHES_PER_TOKEN, IMAGE_SIDE = 4, 256

GraphMemory = Literal["auto", "none"] | float


# How much there is


def free_bytes(device: torch.device) -> float:
    """Return the bytes that this process may still take on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return float(psutil.virtual_memory().available)


def graph_bytes(wanted: GraphMemory, device: torch.device, step: float | None = None) -> float:
    """Return the bytes that graphs may take: a number of GiB, ``auto`` or ``none``, else a ValueError.

    A GPU keeps no graphs until it is known what bytes a ``step`` without graphs takes at its peak. In main memory
    nobody counts, and half of what is free is safe enough.
    """
    if wanted == "none":
        return 0.0
    if wanted == "auto":
        if device.type == "cuda":
            return 0.0 if step is None else max(0.0, SAFE_SHARE["cuda"] * (free_bytes(device) - step))
        return SAFE_SHARE["cpu"] * free_bytes(device)
    if not isinstance(wanted, int | float) or wanted < 0:
        raise ValueError(f"graph_memory is auto, none, or a number of GiB, got {wanted!r}.")
    return wanted * GIB


def count_peak(device: torch.device) -> Callable[[], int]:
    """Return what says the most bytes taken on a device from now on, beyond those taken now; 0 where nobody counts."""
    if device.type != "cuda":
        return lambda: 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    return lambda: torch.cuda.max_memory_allocated(device) - before


# What a step may take


class MeasureChunks(Callback):
    """Tells the data module what a chunk may hold."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, where ``chunk_size`` is ``auto``, before the training loader is made; print and keep the result."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "set_chunking") or not hasattr(pl_module, "encoder"):
            return
        encoder: Any = pl_module.encoder
        tokens = data.chunk_tokens
        if data.chunk_size == "auto" and tokens is None:
            if distributed.is_sharded(encoder):
                raise ValueError("With ModelParallelStrategy, data.chunk_size is a number: processes go in step.")
            with trainer.precision_plugin.forward_context():
                tokens = tokens_per_chunk(encoder, data.collator)
            distributed.print_once(f"chunk_size: auto. A chunk may have {tokens:,} tokens.")
            folder = trainer.log_dir if trainer.loggers else None  # Which all processes are asked for.
            if trainer.is_global_zero and folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                Path(folder, "chunks.yaml").write_text(yaml.safe_dump({"tokens": tokens}))
        data.set_chunking(tokens, _patch_cost(encoder))


class MeasureGraphMemory(MeasureChunks):
    """Tells the gradient cache, too, what the first step has left free on a GPU."""

    _peak: Callable[[], int] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to count, before the first step."""
        if self._peak is None and hasattr(pl_module, "grad_cache"):
            self._peak = count_peak(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Give what the first step has left free to the graphs of later ones."""
        if self._peak is not None and (peak := self._peak()):
            module: Any = pl_module
            module.grad_cache.graph_bytes = graph_bytes(module.graph_memory, module.device, peak)
            self._peak = lambda: 0  # Later steps keep graphs, and say nothing.


def tokens_per_chunk(encoder: Encoder, collator: Collator) -> int:
    """Find how many tokens a chunk may have: measured on the user's own model, once, before training.

    Two chunks of images and words, one twice as long as the other, go forward and back; what a further token takes is
    the difference. All processes go by the one that has the least memory.
    """
    device = encoder.device
    (few, small), (many, large) = (_try(encoder, collator, tokens) for tokens in (FEWEST_TOKENS, 2 * FEWEST_TOKENS))
    bytes_per_token = max(1.0, (large - small) / (many - few))
    affordable = int(CHUNK_SHARE * free_bytes(device) / bytes_per_token)
    tokens = max(FEWEST_TOKENS, min(affordable, MOST_TOKENS[device.type]))
    return -distributed.largest(-tokens, device)


def _patch_cost(encoder: Encoder) -> float:
    """Return what a patch costs, in tokens: nothing where the tower is frozen, and keeps no activations."""
    return PATCH_COST if encoder.backbone.trains_vision else 0.0


def _try(encoder: Encoder, collator: Collator, tokens: int) -> tuple[int, float]:
    """Send a chunk of about so many tokens forward and back; return how many it had, and the bytes it took."""
    patch_cost = _patch_cost(encoder)
    batch = _batch(collator, tokens / (1 + PATCHES_PER_TOKEN * patch_cost))
    cache = GradCache(encoder, graph_bytes=math.inf)
    peak = count_peak(encoder.device)
    with torch.random.fork_rng():
        cache.embed(batch).sum().backward()
        cache.backward()
    encoder.zero_grad()
    # In main memory only what is saved for the backward is known: about half of what is there at the peak.
    taken = peak() or 2 * cache.budget.taken
    count = sum(chunk["input_ids"].numel() for chunk in batch.chunks)
    patches = sum(len(images["pixel_values"]) for images in batch.images)
    return count + int(patch_cost * patches), taken


def _batch(collator: Collator, tokens: float) -> Batch | RankingBatch:
    """Make one chunk of images and words."""
    draw = np.random.default_rng(0)
    examples: list[Example] = []
    while sum(collator.preprocessor.cost(example.positives[0]) for example in examples) < tokens:
        image = Image.fromarray(draw.integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8))
        number, origin = str(len(examples)), "measuring chunk_size: auto"
        document = Item("document", (Part("image", image), Part("text", number)), origin)
        scores = (1.0, 0.0) if collator.label_specs[None].teacher_scores else None
        negative = Item("document", (Part("text", "no"),), origin)
        examples.append(Example(Item("query", (Part("text", number),), origin), (document,), (negative,), scores))
    whole = copy(collator)
    whole.chunking = Chunking()
    return whole(examples)


# Features that are kept


def open_features(features: FeatureCache, backbone: VisionLanguageModel, precision: str) -> None:
    """Open a cache for features of this tower, these settings and this precision; refuse a tower that is trained."""
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


# Weights in shards (FSDP2)
#
# FSDP cuts weights, gradients and optimizer states of the language model into shards, one for each process. A shard is
# gathered whenever its layer computes, so all processes must go through the layers equally often: one with fewer chunks
# than another computes a filler, whose embeddings nobody reads. Gradients pile up in each process while the chunks of a
# step, and of the steps that are accumulated, come by; the last backward averages them over processes and cuts them up.
#
# The vision tower is not cut: half a billion parameters beside eight. Each process has a copy, as under DDP, so it may
# encode as many images as it happens to have, or none, and keep the features of a frozen tower as it likes.


def refuse_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which steps that go backward chunk by chunk would be wrong."""
    served = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    # DeepSpeed's is a DDPStrategy by descent alone.
    if not served or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"trainer.strategy {type(strategy).__name__} expects one backward per step, and would lose gradients of "
            "chunks. Use ddp, or lightning.pytorch.strategies.ModelParallelStrategy where the weights and the "
            "optimizer do not fit in one GPU (see configs/visual_document_retrieval_8b_fsdp.yaml)."
        )


def shard(encoder: Encoder, mesh: DeviceMesh) -> None:
    """Cut an encoder into shards, in place: each layer of its language model, and the rest of it as one.

    It has its weights, adapters applied, which every process has read into its main memory. A ValueError says that its
    backbone, or the mesh of Lightning's ``ModelParallelStrategy``, is not made for it.
    """
    backbone = encoder.backbone
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"ModelParallelStrategy(tensor_parallel_size={mesh['tensor_parallel'].size()}): layers are not cut, only "
            "their weights are. Set tensor_parallel_size: 1, and data_parallel_size to the number of processes."
        )
    if not backbone.separate_vision_pass or backbone.load_in_4bit:
        raise ValueError(
            f"ModelParallelStrategy cannot shard this {type(backbone).__name__}: it takes a vlmembed.backbones.Qwen3VL "
            "with attn_implementation: auto and load_in_4bit: false. Or set trainer.strategy: ddp."
        )
    copied = {parameter for _, parameter in backbone.vision_parameters()}
    language_model: Any = backbone.model.language_model
    for layer in language_model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    # Not the backbone: poolings have weights, too, and only what is called as a whole gathers them.
    fully_shard(encoder, mesh=mesh["data_parallel"], ignored_params=copied)
    # FSDP would copy a call's arguments to the device, where nobody expects the chunk yet, and take the arrival of a
    # gradient at the features for the end of the backward. So they are hidden from its hook, and unpacked behind it.
    encoder.register_forward_pre_hook(
        lambda _, args, kwargs: ((lambda: (args, kwargs),), {}), prepend=True, with_kwargs=True
    )
    encoder.register_forward_pre_hook(lambda _, args, kwargs: args[0](), with_kwargs=True)
    # FSDP reduces where the gradient passes: let it pass all layers, whatever this process trains below them.
    language_model.embed_tokens.register_forward_hook(lambda _, args, embeddings: embeddings.requires_grad_())


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Gather all weights, on the first process's CPU; the others get nothing. Call in every process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(module, options=options)
    return weights


class ShardedGradCache(GradCache):
    """The gradient cache of an encoder in shards.

    No graphs are kept: which ones would depend on the memory of each process.
    """

    def __init__(self, encoder: Encoder, features: FeatureCache | None = None, steps: int = 0) -> None:
        super().__init__(encoder, 0.0, features, steps)
        preprocessor = copy(encoder.preprocessor)
        preprocessor.selections = None  # All tokens have a vector: of images only, a text would have none.
        text = Item("query", (Part("text", "filler"),), origin="filler")
        self._filler = preprocessor.prepare([text]).chunk([0])

    def embed(self, batch: Batch | RankingBatch) -> Float[Tensor, "N D"]:
        """Embed a batch's items in the order of its chunks; see `GradCache.embed`."""
        self.graph_bytes = 0.0  # Whatever memory this process alone has free since.
        missing = distributed.largest(len(batch.chunks), self.encoder.device) - len(batch.chunks)
        # Copies: the graph of the last chunk is kept, and only of that one.
        fillers = [dict(self._filler) for _ in range(missing)]
        self._texts = forward_chunks(self._text_encoder(batch), [*batch.chunks, *fillers])
        rows = sum(len(output) for output in self._texts.outputs[: len(batch.chunks)])
        return self._texts.embeddings[:rows]

    def backward(self) -> None:
        """Send the gradient of the embeddings through the encoder; see `GradCache.backward`."""
        if self._texts is None:
            raise RuntimeError("Call embed before backward.")
        first, self._texts.pending = self._texts.pending[:1], self._texts.pending[1:]
        self._average_gradients(False)
        self._texts.backward()
        # The first chunk goes backward last, and its backward is the one that averages over processes.
        self._texts.pending = first
        self._average_gradients(self.before_step)
        self._texts.backward()
        self._texts = None

    def _average_gradients(self, now: bool) -> None:
        """Say whether the next backward averages gradients and cuts them into shards; until then they pile up."""
        if isinstance(self.encoder, FSDPModule):
            self.encoder.set_requires_gradient_sync(now)
