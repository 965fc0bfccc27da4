"""Writing the folder that stock Sentence Transformers opens: the Hugging Face checkpoint plus a few JSON files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlmembed.backbones import VisionLanguageModel
from vlmembed.encoder import Encoder
from vlmembed.export.checkpoint import return_all_layers, write_checkpoint, write_json
from vlmembed.export.code import standalone_code
from vlmembed.export.poolings import CODE, ServedModule, Sizes, dense, is_stock, pooling_modules
from vlmembed.pooling import Pooling

#: The releases that read such a folder.
REQUIREMENTS = {"sentence_transformers": ">=5.4", "transformers": ">=5.2"}


def write_folder(encoder: Encoder, folder: Path, truncate_dim: int | None = None) -> None:
    """Write an embedder as a Sentence Transformers folder.

    Adapters are merged into the encoder's weights, for good.

    Args:
        encoder: A configured encoder.
        folder: An existing, empty folder.
        truncate_dim: Keep this many leading dimensions, normalised anew; None for all.

    Raises:
        ValueError: If the pooling cannot be served, or ``truncate_dim`` exceeds the embedding's dimension.
    """
    backbone, pooling = encoder.backbone, encoder.pooling
    modules = [transformer(backbone, pooling.layers), *pooling_modules(pooling, sizes(backbone))]
    if truncate_dim is not None:
        modules.append(_truncation(encoder.dimension, truncate_dim))
    modules.append(_normalize())
    write_checkpoint(backbone, folder)
    write_served(modules, pooling, _model_config(backbone), folder)


def sizes(backbone: VisionLanguageModel) -> Sizes:
    """Return what modules have to be told of a backbone."""
    return Sizes(backbone.hidden_size, backbone.model.config.get_text_config().num_hidden_layers)


def transformer(backbone: VisionLanguageModel, layers: Sequence[int], **chat_template: Any) -> ServedModule:
    """Return the module that computes token states.

    Args:
        backbone: Computes them here.
        layers: Which are pooled. Of several, all are returned besides the last; see `return_all_layers`.
        **chat_template: How items are rendered, besides the generation prompt.
    """
    earlier = len(layers) == 1 and layers[0] != -1
    output: str | list[str | int] = ["hidden_states", layers[0]] if earlier else "last_hidden_state"
    chat_template = {"add_generation_prompt": backbone.generation_prompt, **chat_template}
    return transformer_module("feature-extraction", output, "token_embeddings", chat_template)


def transformer_module(
    task: str, output: str | list[str | int], output_name: str, chat_template: Mapping[str, Any]
) -> ServedModule:
    """Return the module that runs the checkpoint.

    Args:
        task: What transformers opens it for.
        output: What of transformers' output is wanted.
        output_name: What Sentence Transformers calls that.
        chat_template: How items are rendered.
    """
    states = {"method": "forward", "method_output_name": output}
    config = {
        "transformer_task": task,
        "modality_config": {
            "text": states,
            "image": states,
            "video": states,
            "message": {**states, "format": "structured"},
        },
        "module_output_name": output_name,
        "processing_kwargs": {"chat_template": dict(chat_template)},
        "unpad_inputs": False,
    }
    name = "sentence_transformers.base.modules.transformer.Transformer"
    return ServedModule(name, config, file_name="sentence_bert_config.json")


def _truncation(dimension: int, truncate_dim: int) -> ServedModule:
    """Cut before normalising, which Sentence Transformers' own truncate_dim does not."""
    if not 0 < truncate_dim <= dimension:
        raise ValueError(f"truncate_dim={truncate_dim} is not between 1 and the embedding's {dimension} dimensions.")
    return dense(torch.eye(dimension)[:truncate_dim])


def _normalize() -> ServedModule:
    config = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    return ServedModule("sentence_transformers.base.modules.normalize.Normalize", config)


def _model_config(backbone: VisionLanguageModel) -> dict[str, Any]:
    """Both roles need a prompt of their own: neither falls back to the default one."""
    return {
        "model_type": "SentenceTransformer",
        "prompts": {role: instruction or "" for role, instruction in backbone.instructions.items()},
        "default_prompt_name": "document",
        "similarity_fn_name": "cosine",
        "requirements": REQUIREMENTS,
    }


def write_served(
    modules: Sequence[ServedModule], pooling: Pooling, model_config: Mapping[str, Any], folder: Path
) -> None:
    """Write what makes a model of a checkpoint that is there.

    Args:
        modules: In the order of serving.
        pooling: What they pool, whose code is brought along where Sentence Transformers has none.
        model_config: Of the whole model.
        folder: Where the checkpoint is.
    """
    entries = []
    for index, module in enumerate(modules):
        path = "" if index == 0 else f"{index}_{module.type.rsplit('.', 1)[-1]}"
        (folder / path).mkdir(exist_ok=True)
        write_json(folder / path / module.file_name, module.config)
        if module.weights is not None:
            save_file(dict(module.weights), folder / path / "model.safetensors")
        entries.append({"idx": index, "name": str(index), "path": path, "type": module.type})
    write_json(folder / "modules.json", entries)
    write_json(folder / "config_sentence_transformers.json", model_config)
    if len(pooling.layers) > 1:
        return_all_layers(folder)
    if not is_stock(pooling):
        (folder / f"{CODE}.py").write_text(standalone_code(pooling), encoding="utf-8")
