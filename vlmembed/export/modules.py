"""Poolings and score heads as modules of Sentence Transformers: its own where they do the same, else one with code."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig

from vlmembed.encoder import MultiVectorEncoder
from vlmembed.heads import ScoreHead, YesNo
from vlmembed.pooling import Pooling, base, learned, tokens

#: Sentence Transformers' names of our poolings. Exact types: a subclass may pool differently.
MODES: dict[type[Pooling], str] = {
    base.EndToken: "lasttoken",
    base.FirstToken: "cls",
    base.LastToken: "lasttoken",
    base.Max: "max",
    base.Mean: "mean",
    base.MeanSqrtLength: "mean_sqrt_len_tokens",
    base.WeightedMean: "weightedmean",
}

#: The file that a folder with code brings along, without its ending.
CODE = "served_pooling"


@dataclass(frozen=True)
class ModuleSpec:
    """An entry of ``modules.json``, and the content of the module's folder."""

    type: str  # The dotted path of the class.
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor] | None = None


def is_stock(pooling: Pooling) -> bool:
    """Whether Sentence Transformers' own modules pool so; else a folder brings code and is opened with trust."""
    if type(pooling) in (learned.EarlierLayer, learned.LayerMix, learned.Projection):
        return is_stock(cast(base.PoolingWrapper, pooling).pooling)
    return _mode(pooling) is not None


def pooling_modules(pooling: Pooling, model: PretrainedConfig) -> list[ModuleSpec]:
    """Return what pools as a pooling does, in the order of serving, behind a language model of that configuration."""
    if not is_stock(pooling):
        weights = {f"layer.{name}": tensor.contiguous() for name, tensor in pooling.state_dict().items()}
        config = {"pooling": describe(pooling), "hidden_size": model.hidden_size}
        return [ModuleSpec(f"{CODE}.ServedPooling", config, weights)]
    if isinstance(pooling, learned.Projection):
        return [*pooling_modules(pooling.pooling, model), *projection_modules(pooling)]
    if isinstance(pooling, learned.LayerMix):
        layers = model.num_hidden_layers
        start = layers + 1 - pooling.count
        config = {"embedding_dimension": model.hidden_size, "num_hidden_layers": layers, "layer_start": start}
        weights = {"layer_weights": pooling.weights.detach().float().softmax(dim=0)}
        name = "sentence_transformers.sentence_transformer.modules.weighted_layer_pooling.WeightedLayerPooling"
        return [ModuleSpec(name, config, weights), *pooling_modules(pooling.pooling, model)]
    if isinstance(pooling, learned.EarlierLayer):  # The Transformer module returns that layer.
        return pooling_modules(pooling.pooling, model)
    config = {"embedding_dimension": model.hidden_size, "pooling_mode": _mode(pooling), "include_prompt": True}
    return [ModuleSpec("sentence_transformers.sentence_transformer.modules.pooling.Pooling", config)]


def embedding_modules(pooling: Pooling, model: PretrainedConfig, truncate_dim: int | None) -> list[ModuleSpec]:
    """Return what makes an embedding of length 1 of token states: the pooling's modules, fewer dimensions, length 1."""
    modules = pooling_modules(pooling, model)
    if truncate_dim is not None:
        # Before normalising, which Sentence Transformers' own truncate_dim is not.
        modules.append(dense(torch.eye(pooling.dimension(model.hidden_size))[:truncate_dim]))
    names = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    # This path is known to all releases from 5.4 on; base.modules.normalize to those from 6.0 on.
    modules.append(ModuleSpec("sentence_transformers.sentence_transformer.modules.normalize.Normalize", names))
    return modules


def _mode(pooling: Pooling) -> str | list[str] | None:
    if type(pooling) is learned.Concatenation:
        modes = [MODES.get(type(member)) for member in pooling.poolings]
        return [mode for mode in modes if mode] if all(modes) else None
    if type(pooling) is learned.LearnedTokens and pooling.tokens == 1:
        return "lasttoken"
    return MODES.get(type(pooling))


def projection_modules(pooling: learned.Projection) -> list[ModuleSpec]:
    """Return the layers of a projection, without what it projects."""
    inner = [] if pooling.inner is None else [dense(pooling.inner.weight, pooling.inner.bias, "activation.GELU")]
    return [*inner, dense(pooling.outer.weight, pooling.outer.bias)]


def dense(
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "linear.Identity",
    name: str = "sentence_embedding",
    residual: Tensor | None = None,
) -> ModuleSpec:
    """Return a layer with a weight (out, in) that maps embeddings, or what else goes by a name."""
    config = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": bias is not None,
        "activation_function": f"torch.nn.modules.{activation}",
        "module_input_name": name,
        "module_output_name": name,
    }
    if residual is not None:
        config["use_residual"] = True
    tensors = {"linear.weight": weight, "linear.bias": bias, "residual.weight": residual}
    weights = {key: tensor.detach().float().contiguous() for key, tensor in tensors.items() if tensor is not None}
    return ModuleSpec("sentence_transformers.base.modules.dense.Dense", config, weights)


#: What the vectors of tokens go by, from the Transformer module on.
TOKENS = "token_embeddings"


def token_modules(encoder: MultiVectorEncoder, truncate_dim: int | None, merging_factor: int) -> list[ModuleSpec]:
    """Return what makes vectors of token states: projection, which tokens are kept, length 1, merging of documents'."""
    projection = encoder.pooling
    layers = [(projection.inner, projection.inner_residual, "activation.GELU")] if projection.inner else []
    layers.append((projection.outer, projection.outer_residual, "linear.Identity"))
    modules = [
        dense(layer.weight, layer.bias, activation, TOKENS, None if residual is None else residual.weight)
        for layer, residual, activation in layers
    ]
    if truncate_dim is not None:
        modules.append(dense(torch.eye(projection.size)[:truncate_dim], name=TOKENS))
    modules.append(selection_module(encoder))
    names = {"module_input_name": TOKENS, "module_output_name": TOKENS}
    modules.append(ModuleSpec("sentence_transformers.base.modules.normalize.Normalize", names))
    if merging_factor > 1:
        # Without normalize_embeddings in the file, means stay shorter than 1.
        config = {
            "pool_factor": merging_factor,
            "num_protected_tokens": 0,
            "normalize_embeddings": True,
            "tasks": ["document"],
        }
        modules.append(
            ModuleSpec("sentence_transformers.multi_vector_encoder.modules.HierarchicalTokenPooling", config)
        )
    return modules


def selection_module(encoder: MultiVectorEncoder) -> ModuleSpec:
    """Return what says which tokens of an item have a vector."""
    query, document = encoder.selections["query"], encoder.selections["document"]
    template = encoder.preprocessor.template
    if not has_stock_selection(encoder):
        selections = {role: asdict(selection) for role, selection in encoder.selections.items()}
        described = [template.visual, template.instructions]
        config = {
            "selections": selections,
            "skipped": encoder.preprocessor.skipped,
            "template": described,
            "num_expansion_tokens": len(encoder.preprocessor.expansion),
        }
        return ModuleSpec(f"{CODE}.ServedSelection", config)
    skipping = [role for role, selection in encoder.selections.items() if selection.skip]
    config = {
        "skiplist_words": list(document.skip or query.skip),
        "skiplist_tasks": skipping or ["document"],
        "keep_only_token_ids": list(template.visual) if document.part == "images" else None,
    }
    return ModuleSpec("sentence_transformers.multi_vector_encoder.modules.MultiVectorMask", config)


def has_stock_selection(encoder: MultiVectorEncoder) -> bool:
    """Whether Sentence Transformers' mask keeps these tokens; else a folder brings code and is opened with trust."""
    query, document = encoder.selections["query"], encoder.selections["document"]
    same_skip = set(query.skip) == set(document.skip) or not (query.skip and document.skip)
    return query.part == "all" and document.part in ("all", "images") and same_skip


def head_modules(head: ScoreHead, model: PretrainedConfig) -> list[ModuleSpec]:
    """Return what scores as a head does, from the states of its backbone, in the order of serving."""
    if isinstance(head, YesNo):
        last = [dense(head.direction[None])]
    elif type(head.pooling) is learned.Projection:
        last = projection_modules(head.pooling)
    else:
        last = [dense(torch.ones(1, 1))]  # The pooled number is the score already, under another name.
    last[-1] = replace(last[-1], config={**last[-1].config, "module_output_name": "scores"})
    return [*pooling_modules(pooling_of(head), model), *last]


def pooling_of(head: ScoreHead) -> Pooling:
    """Return what a head pools with, without the layers that make a score of it."""
    return cast(Pooling, head.pooling.pooling if type(head.pooling) is learned.Projection else head.pooling)


def check_head(head: ScoreHead) -> None:
    """Refuse a head that computes its score in a way of its own, or whose pooling's code cannot be copied."""
    ours = YesNo if isinstance(head, YesNo) else ScoreHead
    for method in ("forward", "score"):
        if getattr(type(head), method) is not getattr(ours, method):
            raise ValueError(
                f"{type(head).__name__} cannot be exported: it has a {method} of its own, and a folder brings along "
                "the code of poolings only. Let a pooling compute the number, and give it to vlmembed.heads.ScoreHead; "
                "or set trainer.exporter to null."
            )
    check_servable(pooling_of(head))


def yes_no_head(head: ScoreHead) -> YesNo:
    """Return a head whose score is the difference of two logits of the last token; refuse another one."""
    check_head(head)
    if not isinstance(head, YesNo) or type(head.pooling) is not base.LastToken:
        raise ValueError(
            f"reranker_scoring: logits is the difference of two words' logits at the last token, which "
            f"{type(head).__name__} does not score by. Use vlmembed.heads.YesNo, or reranker_scoring: dense."
        )
    return head


def check_servable(pooling: Pooling) -> None:
    """Refuse a pooling for which Sentence Transformers has no module, and whose code cannot be copied."""
    if not is_stock(pooling):
        describe(pooling)
        standalone_code(pooling)


def describe(pooling: Pooling) -> dict[str, Any]:
    """Return a pooling's class, arguments and template, as JSON has them.

    Each argument is an attribute of the same name, and of a kind that JSON has; else a ``ValueError`` names it.
    """
    arguments = {}
    for name, parameter in inspect.signature(type(pooling).__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not hasattr(pooling, name):
            raise ValueError(
                f"{type(pooling).__name__} cannot be exported: its constructor should keep the argument {name!r} as "
                f"self.{name}, for the export to write it down."
            )
        arguments[name] = _as_json(getattr(pooling, name), f"{type(pooling).__name__}.{name}")
    template = pooling.template and [pooling.template.visual, pooling.template.instructions]
    return {"class": type(pooling).__name__, "arguments": arguments, "template": template}


def _as_json(value: Any, name: str) -> Any:
    if isinstance(value, Pooling):
        return describe(value)
    if isinstance(value, list | tuple):
        return [_as_json(item, name) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{name} cannot be exported: it is a {type(value).__name__}, not a number, text, list or pooling.")


HEADER = '"""The poolings that this model was trained with, and the module that serves them."""\n\n'
FUTURE_IMPORT = re.compile(r"^from __future__ import .*\n", re.MULTILINE)
#: For our annotations only, which are never evaluated in the file.
JAXTYPING_IMPORT = re.compile(r"^from jaxtyping import .*\n", re.MULTILINE)
#: Imports that the file could not resolve: of vlmembed, and relative ones.
FOREIGN_IMPORT = re.compile(r"^[ \t]*((?:from|import)[ \t]+(?:vlmembed\b|\.).*)$", re.MULTILINE)


def standalone_code(pooling: Pooling) -> str:
    """Return one Python file with our poolings, the whole files of a user's own, and the module that serves them."""
    from vlmembed.export import served_pooling  # Sentence Transformers takes seconds to import.

    ours = [base, learned, tokens, served_pooling]
    # Classes that a pooling extends come before it, since its file may need theirs.
    classes = [cls for part in pooling.modules() for cls in reversed(type(part).__mro__) if issubclass(cls, Pooling)]
    names = {cls.__module__: cls.__name__ for cls in classes}
    for name, cls in names.items():
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is None or name == "__main__" or not Path(path).is_file():
            raise ValueError(f"{cls} cannot be exported: its module {name} is no file that can be imported.")
    users = [module for name in names if (module := sys.modules[name]) not in ours]
    sources = [base, learned, tokens, *users, served_pooling]
    _refuse_clashes(sources)
    copied = "|".join(["vlmembed\\.pooling[\\w.]*", *(re.escape(module.__name__) for module in users)])
    own_import = re.compile(rf"^([ \t]*)from (?:{copied}) import (\([^)]*\)|[^\n(]*)\n", re.MULTILINE)
    pieces = []
    for module in sources:
        text = FUTURE_IMPORT.sub("", Path(str(module.__file__)).read_text(encoding="utf-8"))
        text = own_import.sub(_without_import, JAXTYPING_IMPORT.sub("", text) if module in ours else text)
        foreign = FOREIGN_IMPORT.search(text)
        if foreign:
            raise ValueError(
                f"The pooling cannot be exported: {module.__file__} needs `{foreign[1]}`, and a folder can bring along "
                "no more of vlmembed than `from vlmembed.pooling import …`, without renaming. Move the pooling into a "
                "file of its own that imports nothing else of vlmembed, and nothing relative."
            )
        pieces.append(text)
    return HEADER + "from __future__ import annotations\n\n" + "\n\n".join(pieces)


def _without_import(line: re.Match[str]) -> str:
    """Drop an import of what stands in the file itself, unless it gives it another name."""
    if re.search(r"\bas\b", line[2]):
        return line[0]
    return f"{line[1]}pass\n" if line[1] else ""  # An indented import may be all that its block has.


def _refuse_clashes(modules: list[ModuleType]) -> None:
    bound: dict[str, tuple[Any, str]] = {}
    for module in modules:
        for name, value in vars(module).items():
            other, origin = bound.setdefault(name, (value, module.__name__))
            if not name.startswith("__") and other is not value:
                raise ValueError(
                    f"The pooling cannot be exported: {name} is something else in {origin} than in {module.__name__}, "
                    "and both go into one file. Rename one."
                )
