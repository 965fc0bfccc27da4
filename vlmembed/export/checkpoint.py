"""Writing the Hugging Face checkpoint within an exported folder: weights and processor, under their fresh names."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from vlmembed import adapters
from vlmembed.backbones import VisionLanguageModel
from vlmembed.backbones.base import HEAD
from vlmembed.backbones.chat_templates import NAME, write_tokens


def write_checkpoint(
    backbone: VisionLanguageModel, folder: Path, language_head: Float[Tensor, "vocabulary H"] | None = None
) -> None:
    """Write weights and processor under the names of the fresh checkpoint, by which other servers know it.

    Adapters are merged, for good.

    Args:
        backbone: Configured.
        folder: An existing folder.
        language_head: Weights of the language-model head, where it has its own; None to leave it out.
    """
    adapters.merge(backbone)
    if backbone.learned_tokens is not None:
        preprocessor = backbone.preprocessor
        write_tokens(backbone.model, preprocessor.processor.tokenizer, preprocessor.appended, backbone.learned_tokens)
    whole = _with_head(backbone.model)
    weights = {name: tensor for name, tensor in whole.state_dict().items() if not tensor.is_meta}
    if language_head is not None:
        weights[HEAD] = language_head
    whole.save_pretrained(folder, state_dict=weights)
    _write_processor(backbone, folder)


def _write_processor(backbone: VisionLanguageModel, folder: Path) -> None:
    """Write the processor; a template for pairs stands beside the checkpoint's own, for those who chat with it."""
    preprocessor = backbone.preprocessor
    # Opened anew: a tokenizer that was used remembers how it padded.
    options = (preprocessor.pair_template, preprocessor.appended, backbone.learned_tokens is not None)
    processor: Any = backbone.make_preprocessor(*options).processor
    if preprocessor.pair_template is not None:
        template = backbone.open_processor().chat_template
        templates = template if isinstance(template, dict) else {"default": template}
        processor.chat_template = {**templates, NAME: processor.chat_template}
    if backbone.max_length is not None:
        processor.tokenizer.model_max_length = backbone.max_length
    processor.save_pretrained(folder)


def _with_head(model: PreTrainedModel) -> PreTrainedModel:
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


def return_all_layers(folder: Path) -> None:
    """Have a written checkpoint return the states of all layers: what Sentence Transformers itself cannot ask for."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config", {})):
        part["output_hidden_states"] = True
    write_json(path, config)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
