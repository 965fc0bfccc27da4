"""Writing the folder that stock Sentence Transformers opens as a cross-encoder, in either of two forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vlmembed.backbones import VisionLanguageModel
from vlmembed.backbones.base import label_token_ids
from vlmembed.backbones.chat_templates import NAME
from vlmembed.encoder import Scorer
from vlmembed.export.checkpoint import write_checkpoint
from vlmembed.export.heads import check_head, head_modules, of_two_logits, pooling_of
from vlmembed.export.poolings import ServedModule
from vlmembed.export.sentence_transformers import REQUIREMENTS, sizes, transformer, transformer_module, write_served
from vlmembed.heads import YesNo

#: ``dense`` scores a pooled state; ``logits`` takes the difference of two logits of the whole language model.
Scoring = Literal["dense", "logits"]


def write_reranker(scorer: Scorer, folder: Path, scoring: Scoring = "dense") -> None:
    """Write a cross-encoder as a Sentence Transformers folder.

    Both forms give the same scores. The dense one computes the two rows' difference once and never all the
    vocabulary's logits, and serves every head. The other is for whoever wants a whole language model.

    Adapters are merged into the scorer's weights, for good.

    Args:
        scorer: A configured scorer.
        folder: An existing, empty folder.
        scoring: Which of the two.

    Raises:
        ValueError: If the head cannot be served so.
    """
    if scoring == "dense":
        _write_dense(scorer, folder)
    else:
        _write_logits(scorer, folder)


def _write_dense(scorer: Scorer, folder: Path) -> None:
    backbone, head = scorer.backbone, scorer.pooling
    check_head(head)
    modules = [transformer(backbone, head.layers, chat_template=NAME), *head_modules(head, sizes(backbone))]
    write_checkpoint(backbone, folder)
    write_served(modules, pooling_of(head), _model_config(scorer, f"{len(modules) - 1}.linear"), folder)


def _write_logits(scorer: Scorer, folder: Path) -> None:
    backbone, head = scorer.backbone, of_two_logits(scorer.pooling)
    tokens = label_token_ids(scorer.preprocessor.processor.tokenizer, head.label_tokens)
    write_checkpoint(backbone, folder, _language_head(backbone, head, tokens))
    template = {"add_generation_prompt": backbone.generation_prompt, "chat_template": NAME}
    score = {"true_token_id": tokens[0], "false_token_id": tokens[1], "module_input_name": "causal_logits"}
    modules = [
        transformer_module("any-to-any", "logits", "causal_logits", template),
        ServedModule("sentence_transformers.cross_encoder.modules.logit_score.LogitScore", score),
    ]
    write_served(modules, pooling_of(head), _model_config(scorer, "0.model.lm_head"), folder)


@torch.no_grad()
def _language_head(
    backbone: VisionLanguageModel, head: YesNo, tokens: list[int]
) -> Float[Tensor, "vocabulary H"] | None:
    """Return the checkpoint's language-model head with the rows that were trained; None where it has no own weights."""
    weights = backbone.lm_head_rows(range(backbone.model.config.get_text_config().vocab_size))
    if weights is not None:
        weights[tokens] = head.weights.to(weights)
    return weights


def _model_config(scorer: Scorer, last: str) -> dict[str, Any]:
    """Say what a cross-encoder is; in half precision its last layer answers in float32, as it did in training."""
    config = {
        "model_type": "CrossEncoder",
        "activation_fn": "torch.nn.modules.activation.Sigmoid",
        # The instruction is the template's.
        "prompts": {},
        "default_prompt_name": None,
        "requirements": REQUIREMENTS,
    }
    return config if scorer.dtype == "float32" else {**config, "keep_in_fp32_modules": [last]}
