"""Writing the folder that stock Sentence Transformers opens: the Hugging Face checkpoint plus a few JSON files."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

from vlmembed import adapters
from vlmembed.backbones import VisionLanguageModel
from vlmembed.backbones.appending import write_tokens
from vlmembed.encoder import Encoder
from vlmembed.export.code import standalone_code
from vlmembed.export.poolings import CODE, ServedModule, Sizes, dense, is_stock, pooling_modules


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
    sizes = Sizes(backbone.hidden_size, backbone.model.config.get_text_config().num_hidden_layers)
    modules = [_transformer(backbone, pooling.layers), *pooling_modules(pooling, sizes)]
    if truncate_dim is not None:
        modules.append(_truncation(encoder.dimension, truncate_dim))
    modules.append(_normalize())
    _write_checkpoint(backbone, folder)
    if len(pooling.layers) > 1:
        _return_all_layers(folder / "config.json")
    _write_modules(modules, folder)
    if not is_stock(pooling):
        (folder / f"{CODE}.py").write_text(standalone_code(pooling), encoding="utf-8")
    _write_json(folder / "config_sentence_transformers.json", _model_config(backbone))


def _transformer(backbone: VisionLanguageModel, layers: Sequence[int]) -> ServedModule:
    # Of several layers, all are returned besides the last; see `_return_all_layers`.
    output = ["hidden_states", layers[0]] if len(layers) == 1 and layers[0] != -1 else "last_hidden_state"
    states = {"method": "forward", "method_output_name": output}
    config = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": states,
            "image": states,
            "video": states,
            "message": {**states, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": backbone.generation_prompt}},
        "unpad_inputs": False,
    }
    name = "sentence_transformers.base.modules.transformer.Transformer"
    return ServedModule(name, config, file_name="sentence_bert_config.json")


def _return_all_layers(path: Path) -> None:
    """Have a checkpoint return the states of all layers: what Sentence Transformers itself cannot ask for."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config", {})):
        part["output_hidden_states"] = True
    _write_json(path, config)


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
        "requirements": {"sentence_transformers": ">=5.4", "transformers": ">=5.2"},
    }


def _write_checkpoint(backbone: VisionLanguageModel, folder: Path) -> None:
    """Write weights and processor under the names of the fresh checkpoint, by which other servers know it."""
    adapters.merge(backbone)
    if backbone.learned_tokens is not None:
        write_tokens(
            backbone.model, backbone.preprocessor.processor.tokenizer, backbone.appended, backbone.learned_tokens
        )
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


def _write_modules(modules: Sequence[ServedModule], folder: Path) -> None:
    entries = []
    for index, module in enumerate(modules):
        path = "" if index == 0 else f"{index}_{module.type.rsplit('.', 1)[-1]}"
        (folder / path).mkdir(exist_ok=True)
        _write_json(folder / path / module.file_name, module.config)
        if module.weights is not None:
            save_file(dict(module.weights), folder / path / "model.safetensors")
        entries.append({"idx": index, "name": str(index), "path": path, "type": module.type})
    _write_json(folder / "modules.json", entries)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
