"""Weights, gradients and optimizer states of the language model cut into shards, one for each process (FSDP2).

A shard is gathered whenever its layer computes, so all processes must go through the layers equally often: one with
fewer chunks than another computes a filler, whose embeddings nobody reads. Gradients pile up in each process while the
chunks of a step, and of the steps that are accumulated, come by; the last backward averages them over processes and
cuts them up.

The vision tower is not cut: half a billion parameters beside eight. Each process has a copy, as under DDP, so it may
encode as many images as it happens to have, or none, and keep the features of a frozen tower as it likes.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from jaxtyping import Float
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from vlmembed import distributed
from vlmembed.encoder import Encoder
from vlmembed.features import FeatureCache
from vlmembed.gradcache import GradCache, forward_chunks
from vlmembed.types import Batch, Item, Part, RankingBatch


def shard(encoder: Encoder, mesh: DeviceMesh) -> None:
    """Cut an encoder into shards, in place: each layer of its language model, and the rest of it as one.

    Args:
        encoder: With weights, and adapters applied; every process has read all of them into its main memory.
        mesh: Of Lightning's ``ModelParallelStrategy``.

    Raises:
        ValueError: If the backbone or the mesh is not made for it.
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


def refuse_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which steps that go backward chunk by chunk would be wrong.

    Raises:
        ValueError: If it is another than one device, DDP, or `ModelParallelStrategy`.
    """
    served = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    # DeepSpeed's is a DDPStrategy by descent alone.
    if not served or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"trainer.strategy {type(strategy).__name__} expects one backward per step, and would lose gradients of "
            "chunks. Use ddp, or lightning.pytorch.strategies.ModelParallelStrategy where the weights and the "
            "optimizer do not fit in one GPU (see configs/visual_document_retrieval_8b_fsdp.yaml)."
        )


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Gather all weights, on the first process's CPU; the others get nothing. Call in every process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(module, options=options)
    return weights


class ShardedGradCache(GradCache):
    """The gradient cache of an encoder in shards.

    No graphs are kept: which ones would depend on the memory of each process.

    Args:
        encoder: In shards.
        features: As for `GradCache`.
        steps: As for `GradCache`.
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
