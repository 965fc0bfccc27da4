"""Writing the folder that stock Sentence Transformers opens, of an embedder and of a reranker.

The checkpoint under its fresh names, and beside it the JSON files that make a model of it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Float
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from vlmembed import adapters
from vlmembed.backbones import VisionLanguageModel
from vlmembed.backbones.base import HEAD, label_token_ids
from vlmembed.backbones.chat_templates import NAME, write_tokens
from vlmembed.encoder import Encoder, MultiVectorEncoder, Scorer
from vlmembed.export.modules import (
    CODE,
    ModuleSpec,
    embedding_modules,
    head_modules,
    pooling_of,
    standalone_code,
    token_modules,
    yes_no_head,
)
from vlmembed.files import read_json
from vlmembed.pooling import Pooling

#: What an export adds to ``config.json``: a checkpoint that is an export has it from its own training.
WRITTEN = {"is_matryoshka", "matryoshka_dimensions", "classifier_from_token", "is_original_qwen3_reranker"}

#: ``dense`` scores a pooled state; ``logits`` takes the difference of two logits of the whole language model.
Scoring = Literal["dense", "logits"]


def write_folder(
    encoder: Encoder,
    folder: Path,
    truncate_dim: int | None = None,
    dimensions: Sequence[int] = (),
    prompts: Mapping[str, str] | None = None,
    merging_factor: int = 1,
) -> None:
    """Write an embedder or a multi-vector model into an empty folder; adapters are merged into its weights, for good.

    With ``truncate_dim``, so many leading dimensions are kept and normalised anew. Other servers are told the
    ``dimensions`` that embeddings were trained to be truncated to. ``prompts`` are instructions of data sets by name,
    beside the backbone's of each role. With a ``merging_factor`` documents get so many times fewer vectors.
    """
    backbone, pooling = encoder.backbone, encoder.pooling
    if truncate_dim is not None and not 0 < truncate_dim <= encoder.dimension:
        raise ValueError(
            f"truncate_dim={truncate_dim} is not between 1 and the embedding's {encoder.dimension} dimensions."
        )
    default_prompt: str | None
    if isinstance(encoder, MultiVectorEncoder):
        kind, default_prompt, similarity = "MultiVectorEncoder", None, encoder.similarity
        behind = token_modules(encoder, truncate_dim, merging_factor)
    else:
        kind, default_prompt, similarity = "SentenceTransformer", "document", "cosine"
        behind = embedding_modules(pooling, backbone.model.config.get_text_config(), truncate_dim)
    modules = [_transformer(backbone, pooling.layers), *behind]
    _write_checkpoint(backbone, folder)
    # A prompt of each role, as neither falls back to the default one.
    of_roles = {role: instruction or "" for role, instruction in backbone.instructions.items()}
    model_config = {
        "model_type": kind,
        "prompts": of_roles | dict(prompts or {}),
        "default_prompt_name": default_prompt,
        "similarity_fn_name": similarity,
    }
    # By these keys vLLM and SGLang know that they may cut vectors, and our search to which sizes.
    cuts = {"is_matryoshka": True, "matryoshka_dimensions": sorted(dimensions)} if dimensions else {}
    _write_modules(modules, pooling, model_config, folder, **cuts)


def write_reranker(
    scorer: Scorer, folder: Path, scoring: Scoring = "dense", prompts: Mapping[str, str] | None = None
) -> None:
    """Write a cross-encoder into an empty folder; adapters are merged into the scorer's weights, for good.

    Both forms give the same scores. The dense one never computes the logits of the whole vocabulary, and serves every
    head. The other is for those who want the whole language model too. ``prompts`` are instructions of data sets by
    name, which take the place of the template's.
    """
    backbone, head = scorer.backbone, scorer.pooling
    config = backbone.model.config.get_text_config()
    server_keys: dict[str, Any] = {}
    rows = None
    if scoring == "dense":
        modules = [_transformer(backbone, head.layers, chat_template=NAME), *head_modules(head, config)]
        last_layer = f"{len(modules) - 1}.linear"
    else:
        yes_no = yes_no_head(head)
        tokenizer = backbone.preprocessor.processor.tokenizer
        tokens = label_token_ids(tokenizer, yes_no.label_tokens)
        if backbone.model.config.model_type == "qwen3_vl":  # From these vLLM makes the same difference of two rows.
            words = tokenizer.convert_ids_to_tokens(tokens[::-1])
            server_keys = {"classifier_from_token": words, "is_original_qwen3_reranker": True}
        score = {"true_token_id": tokens[0], "false_token_id": tokens[1], "module_input_name": "causal_logits"}
        modules = [
            _transformer(backbone, None, chat_template=NAME),
            ModuleSpec("sentence_transformers.cross_encoder.modules.logit_score.LogitScore", score),
        ]
        last_layer = "0.model.lm_head"
        # The checkpoint's own head, with the two rows as they were trained; None where it is the token embeddings.
        rows = backbone.lm_head_rows(range(config.vocab_size))
        if rows is not None:
            rows[tokens] = yes_no.weights.detach().to(rows)
    _write_checkpoint(backbone, folder, rows)
    model_config: dict[str, Any] = {
        "model_type": "CrossEncoder",
        "activation_fn": "torch.nn.modules.activation.Sigmoid",
        # The instruction is the template's, unless one is named.
        "prompts": dict(prompts or {}),
        "default_prompt_name": None,
    }
    if scorer.dtype != "float32":  # The last layer answers in float32, as it did in training.
        model_config["keep_in_fp32_modules"] = [last_layer]
    _write_modules(modules, pooling_of(head), model_config, folder, **server_keys)


def _transformer(backbone: VisionLanguageModel, layers: Sequence[int] | None, **chat_template: str) -> ModuleSpec:
    """Return the module that computes the states of one layer, of several the last and all beside it; or logits."""
    task, name = ("feature-extraction", "token_embeddings") if layers else ("any-to-any", "causal_logits")
    states: Any = "last_hidden_state" if layers else "logits"
    if layers and len(layers) == 1 and layers[0] != -1:
        states = ["hidden_states", layers[0]]
    modality = {"method": "forward", "method_output_name": states}
    parts = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}
    processor = backbone.preprocessor.processor
    kinds = ["text", *(kind for kind, part in parts.items() if getattr(processor, part, None) is not None)]
    # As in training: silence behind every recording; see preprocessing._audio_options.
    silence_behind = hasattr(getattr(processor, "feature_extractor", None), "n_samples")
    audio = {"audio": {"padding": "max_length"}} if silence_behind else {}
    config = {
        "transformer_task": task,
        # Without this, everything is taken for plain text that needs no chat template.
        "modality_config": dict.fromkeys(kinds, modality) | {"message": {**modality, "format": "structured"}},
        "module_output_name": name,
        "processing_kwargs": audio
        | {"chat_template": {"add_generation_prompt": backbone.generation_prompt, **chat_template}},
        "unpad_inputs": False,
    }
    if backbone.max_length is not None:
        config["max_seq_length"] = backbone.max_length  # Sentence Transformers takes the tokenizer's; vLLM reads this.
    path = "sentence_transformers.base.modules.transformer.Transformer"
    return ModuleSpec(path, config)


def _write_checkpoint(
    backbone: VisionLanguageModel, folder: Path, language_head: Float[Tensor, "vocabulary H"] | None = None
) -> None:
    """Write weights and processor under the names of the fresh checkpoint, by which other servers know it.

    Adapters are merged, for good. Without a ``language_head``, one with weights of its own is left out.
    """
    adapters.merge(backbone)
    if backbone.learned_tokens is not None:
        tokenizer = backbone.preprocessor.processor.tokenizer
        write_tokens(backbone.model, tokenizer, backbone.preprocessor.appended, backbone.learned_tokens)
    model = _as_saved(backbone.model)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    if language_head is not None:
        weights[HEAD] = language_head
    model.save_pretrained(folder, state_dict=weights)
    preprocessor = backbone.preprocessor
    pairs, new_tokens = preprocessor.pair_template, backbone.learned_tokens is not None
    # Opened anew: a tokenizer that was used remembers how it padded.
    expansion = preprocessor.expansion
    processor: Any = backbone.make_preprocessor(pairs, preprocessor.appended, new_tokens, expansion).processor
    if pairs is not None:  # Their template stands beside the checkpoint's own, for those who chat with it.
        template = backbone.open_processor().chat_template
        templates = template if isinstance(template, dict) else {"default": template}
        processor.chat_template = {**templates, NAME: processor.chat_template}
    # Without a limit of this training, one that the checkpoint has from an earlier one does not stay.
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", VERY_LARGE_INTEGER)
    processor.tokenizer.model_max_length = backbone.max_length or max(processor.tokenizer.model_max_length, positions)
    processor.save_pretrained(folder)


def _as_saved(model: PreTrainedModel) -> PreTrainedModel:
    """Return the class that the checkpoint was saved as, around the trained base model.

    Its language-model head, where it has weights of its own, stays without storage: few exports use it.
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


def _write_modules(
    modules: Sequence[ModuleSpec], pooling: Pooling, model_config: dict[str, Any], folder: Path, **extra: Any
) -> None:
    """Write what makes a model of the checkpoint in a folder, and the pooling's code where it is needed.

    ``extra`` are further keys of the checkpoint's configuration.
    """
    entries = []
    for index, module in enumerate(modules):
        path = "" if index == 0 else f"{index}_{module.type.rsplit('.', 1)[-1]}"
        (folder / path).mkdir(exist_ok=True)
        _write_json(folder / path / ("config.json" if path else "sentence_bert_config.json"), module.config)
        if module.weights is not None:
            save_file(dict(module.weights), folder / path / "model.safetensors")
        entries.append({"idx": index, "name": str(index), "path": path, "type": module.type})
    _write_json(folder / "modules.json", entries)
    _write_json(folder / "config_sentence_transformers.json", {**model_config, "requirements": _requirements(modules)})
    config = {key: value for key, value in read_json(folder / "config.json").items() if key not in WRITTEN} | extra
    text_config = config.get("text_config", config)
    for part in (config, text_config):
        part.pop("output_hidden_states", None)
        if len(pooling.layers) > 1:
            # Sentence Transformers cannot ask for the states of all layers; the checkpoint returns them by itself.
            part["output_hidden_states"] = True
    # vLLM reads it at both levels, transformers in the decoder's.
    config["is_causal"] = text_config.get("is_causal", True)
    _write_json(folder / "config.json", config)
    if any(module.type.startswith(f"{CODE}.") for module in modules):
        (folder / f"{CODE}.py").write_text(standalone_code(pooling), encoding="utf-8")
    # Weights are written with mode 0600, through a temporary file; others are as the process's umask has them.
    mode = (folder / "modules.json").stat().st_mode
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)


#: The first release that serves a folder rightly in which this is a pooling mode, a module's output, or a setting.
SERVED_SINCE = {
    "cls": "5.5",  # 5.4 takes padding on the left for the first token.
    "scores": "5.5",  # 5.4 opens no dense reranker.
    "max_seq_length": "5.6",  # Those before cut off the template's end with that of a long text.
    "weightedmean": "6.2",  # Those before count positions from the padding on the left.
}


def _requirements(modules: Sequence[ModuleSpec]) -> dict[str, str]:
    """Return the releases that serve such modules; tests/test_export.py opens folders with the lowest."""
    types = [module.type for module in modules]
    is_multi_vector = any(".multi_vector_encoder." in name or name.endswith("Selection") for name in types)
    if is_multi_vector or "audio" in modules[0].config["modality_config"]:
        return {"sentence_transformers": ">=6.2", "transformers": ">=5.24"}  # Earlier ones were not tried.
    parts: set[Any] = {*modules[0].config, *(module.config.get("module_output_name") for module in modules)}
    for module in modules:
        modes = module.config.get("pooling_mode", [])
        parts |= {modes} if isinstance(modes, str) else {*modes}
    release = max(["5.4", *(SERVED_SINCE[part] for part in parts & SERVED_SINCE.keys())], key=Version)
    # transformers before 5.4 keeps the positions of a batch with images for the texts after it, and fails on them.
    return {"sentence_transformers": f">={release}", "transformers": ">=5.4"}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
