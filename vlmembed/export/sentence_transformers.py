"""Writing the folder that stock Sentence Transformers opens: the Hugging Face checkpoint plus a few JSON files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

from vlmembed import adapters
from vlmembed.backbones import VisionLanguageModel
from vlmembed.encoder import Encoder
from vlmembed.pooling import Concatenation, FirstToken, LastToken, Max, Mean, MeanSqrtLength, Pooling, WeightedMean

#: What Sentence Transformers calls our poolings. Exact types: a subclass may pool differently.
POOLING_MODES: dict[type[Pooling], str] = {
    FirstToken: "cls",
    LastToken: "lasttoken",
    Max: "max",
    Mean: "mean",
    MeanSqrtLength: "mean_sqrt_len_tokens",
    WeightedMean: "weightedmean",
}

Module = tuple[str, str, dict[str, Any]]


def write_folder(encoder: Encoder, folder: Path, truncate_dim: int | None = None) -> None:
    """Write an embedder as a Sentence Transformers folder.

    Adapters are merged into the encoder's weights, for good.

    Args:
        encoder: A configured encoder.
        folder: An existing, empty folder.
        truncate_dim: Keep this many leading dimensions, normalised anew; None for all.

    Raises:
        ValueError: If the pooling has no counterpart, or ``truncate_dim`` exceeds the embedding's dimension.
    """
    modules = [_transformer(encoder.backbone), _pooling(encoder)]
    if truncate_dim is not None:
        modules.append(_truncation(encoder.dimension, truncate_dim))
    modules.append(_normalize())
    _write_checkpoint(encoder.backbone, folder)
    _write_modules(modules, folder)
    if truncate_dim is not None:
        # Sentence Transformers' own truncate_dim cuts after normalising; a layer before it does not.
        weight = torch.eye(encoder.dimension)[:truncate_dim].contiguous()
        save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")
    _write_json(folder / "config_sentence_transformers.json", _model_config(encoder.backbone))


def _transformer(backbone: VisionLanguageModel) -> Module:
    last_hidden_state = {"method": "forward", "method_output_name": "last_hidden_state"}
    config = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": last_hidden_state,
            "image": last_hidden_state,
            "video": last_hidden_state,
            "message": {**last_hidden_state, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": backbone.generation_prompt}},
        "unpad_inputs": False,
    }
    return "sentence_transformers.base.modules.transformer.Transformer", "sentence_bert_config.json", config


def _pooling(encoder: Encoder) -> Module:
    members = encoder.pooling.poolings if isinstance(encoder.pooling, Concatenation) else [encoder.pooling]
    unknown = [type(pooling).__name__ for pooling in members if type(pooling) not in POOLING_MODES]
    if unknown:
        raise ValueError(
            f"No Sentence Transformers module pools as {', '.join(unknown)} does. Export one of "
            f"{', '.join(pooling.__name__ for pooling in POOLING_MODES)}, or train with trainer.exporter: null."
        )
    modes = [POOLING_MODES[type(pooling)] for pooling in members]
    config = {
        "embedding_dimension": encoder.backbone.hidden_size,
        "pooling_mode": modes[0] if len(modes) == 1 else modes,
        "include_prompt": True,
    }
    return "sentence_transformers.sentence_transformer.modules.pooling.Pooling", "config.json", config


def _truncation(dimension: int, truncate_dim: int) -> Module:
    if not 0 < truncate_dim <= dimension:
        raise ValueError(f"truncate_dim={truncate_dim} is not between 1 and the embedding's {dimension} dimensions.")
    config = {
        "in_features": dimension,
        "out_features": truncate_dim,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    }
    return "sentence_transformers.base.modules.dense.Dense", "config.json", config


def _normalize() -> Module:
    config = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    return "sentence_transformers.base.modules.normalize.Normalize", "config.json", config


def _model_config(backbone: VisionLanguageModel) -> dict[str, Any]:
    """Both roles need a prompt of their own: neither falls back to the default one."""
    return {
        "model_type": "SentenceTransformer",
        "prompts": {role: instruction or "" for role, instruction in backbone.instructions.items()},
        "default_prompt_name": "document",
        "similarity_fn_name": "cosine",
        "requirements": {"sentence_transformers": ">=5.4", "transformers": ">=5.2"},
    }


def _write_checkpoint(backbone: VisionLanguageModel, folder: Path) -> None:
    """Write weights and processor under the names of the fresh checkpoint, by which other servers know it."""
    adapters.merge(backbone)
    whole = _with_head(backbone.model)
    weights = {name: tensor for name, tensor in whole.state_dict().items() if not tensor.is_meta}
    whole.save_pretrained(folder, state_dict=weights)
    processor = backbone.load_processor()
    if backbone.max_length is not None:
        processor.tokenizer.model_max_length = backbone.max_length
    processor.save_pretrained(folder)


def _with_head(model: PreTrainedModel) -> PreTrainedModel:
    """Return the class that the checkpoint was saved as, around the trained base model.

    Its language-model head, where it has weights of its own, stays without storage: embeddings do not use it.
    """
    architecture = getattr(transformers, (model.config.architectures or [""])[0], type(model))
    if isinstance(model, architecture):
        return model
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"  # Ours is not one that a model can be made with.
    with torch.device("meta"):
        whole: PreTrainedModel = architecture(config)
    setattr(whole, whole.base_model_prefix, model)
    whole.tie_weights()
    return whole


def _write_modules(modules: list[Module], folder: Path) -> None:
    entries = []
    for index, (type_name, file_name, config) in enumerate(modules):
        path = "" if index == 0 else f"{index}_{type_name.rsplit('.', 1)[-1]}"
        (folder / path).mkdir(exist_ok=True)
        _write_json(folder / path / file_name, config)
        entries.append({"idx": index, "name": str(index), "path": path, "type": type_name})
    _write_json(folder / "modules.json", entries)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
