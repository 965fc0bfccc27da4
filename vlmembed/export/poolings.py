"""A pooling as modules of Sentence Transformers: its own where they do the same, else one with code of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlmembed.export.code import describe, standalone_code
from vlmembed.pooling import (
    Concatenation,
    EarlierLayer,
    EndToken,
    FirstToken,
    LastToken,
    LayerMix,
    LearnedTokens,
    Max,
    Mean,
    MeanSqrtLength,
    Pooling,
    Projection,
    WeightedMean,
)

#: What Sentence Transformers calls our poolings. Exact types: a subclass may pool differently.
MODES: dict[type[Pooling], str] = {
    EndToken: "lasttoken",
    FirstToken: "cls",
    LastToken: "lasttoken",
    Max: "max",
    Mean: "mean",
    MeanSqrtLength: "mean_sqrt_len_tokens",
    WeightedMean: "weightedmean",
}

#: The file that a folder brings along, without its ending, and the class in it.
CODE = "trained_pooling"


@dataclass(frozen=True)
class ServedModule:
    """A line of ``modules.json``, and what is in the module's folder.

    Args:
        type: Where the class is.
        config: The module's configuration.
        weights: By name.
        file_name: Of the configuration.
    """

    type: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor] | None = None
    file_name: str = "config.json"


@dataclass(frozen=True)
class Sizes:
    """What of a backbone a module has to be told.

    Args:
        hidden: H.
        layers: Of the language model.
    """

    hidden: int
    layers: int


def pooling_modules(pooling: Pooling, sizes: Sizes) -> list[ServedModule]:
    """Return what pools as a pooling does, in the order of serving.

    Raises:
        ValueError: If no module of Sentence Transformers does, and the pooling's code cannot be brought along.
    """
    return _stock(pooling, sizes) or [_custom(pooling, sizes)]


def check_servable(pooling: Pooling) -> None:
    """Refuse a pooling that no folder could serve.

    Raises:
        ValueError: If no module of Sentence Transformers pools so, and the pooling's code cannot be brought along.
    """
    if not is_stock(pooling):
        describe(pooling)
        standalone_code(pooling)


def is_stock(pooling: Pooling) -> bool:
    """Whether modules of Sentence Transformers pool so; else a folder brings code, and is opened with trust."""
    inside = {EarlierLayer, LayerMix, Projection}
    return is_stock(pooling.pooling) if type(pooling) in inside else _mode(pooling) is not None  # type: ignore[arg-type]


def _stock(pooling: Pooling, sizes: Sizes) -> list[ServedModule]:
    """Return modules of Sentence Transformers, or none."""
    if not is_stock(pooling):
        return []
    if isinstance(pooling, Projection):
        return [*_stock(pooling.pooling, sizes), *projection_modules(pooling)]
    if isinstance(pooling, LayerMix):
        return [_layer_mix(pooling, sizes), *_stock(pooling.pooling, sizes)]
    if isinstance(pooling, EarlierLayer):
        return _stock(pooling.pooling, sizes)
    config = {"embedding_dimension": sizes.hidden, "pooling_mode": _mode(pooling), "include_prompt": True}
    return [ServedModule("sentence_transformers.sentence_transformer.modules.pooling.Pooling", config)]


def _mode(pooling: Pooling) -> str | list[str] | None:
    if type(pooling) is Concatenation:
        modes = [MODES.get(type(each)) for each in pooling.poolings]
        return [mode for mode in modes if mode] if all(modes) else None
    if type(pooling) is LearnedTokens and pooling.tokens == 1:
        return "lasttoken"
    return MODES.get(type(pooling))


def _layer_mix(pooling: LayerMix, sizes: Sizes) -> ServedModule:
    config = {
        "embedding_dimension": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "layer_start": sizes.layers + 1 - pooling.count,
    }
    weights = {"layer_weights": pooling.weights.detach().float().softmax(dim=0)}
    name = "sentence_transformers.sentence_transformer.modules.weighted_layer_pooling.WeightedLayerPooling"
    return ServedModule(name, config, weights)


def projection_modules(pooling: Projection) -> list[ServedModule]:
    """Return what projects as a projection does, once its pooling has pooled."""
    if pooling.inner is None:
        return [dense(pooling.outer.weight, pooling.outer.bias)]
    first = dense(pooling.inner.weight, pooling.inner.bias, "torch.nn.modules.activation.GELU")
    return [first, dense(pooling.outer.weight, pooling.outer.bias)]


def dense(
    weight: Tensor, bias: Tensor | None = None, activation: str = "torch.nn.modules.linear.Identity"
) -> ServedModule:
    """Return a layer (out, in) that maps embeddings."""
    config = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": bias is not None,
        "activation_function": activation,
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    }
    weights = {"linear.weight": weight.detach().float().contiguous()}
    if bias is not None:
        weights["linear.bias"] = bias.detach().float()
    return ServedModule("sentence_transformers.base.modules.dense.Dense", config, weights)


def _custom(pooling: Pooling, sizes: Sizes) -> ServedModule:
    weights = {f"layer.{name}": tensor.contiguous() for name, tensor in pooling.state_dict().items()}
    config = {"pooling": describe(pooling), "hidden_size": sizes.hidden}
    return ServedModule(f"{CODE}.TrainedPooling", config, weights)
