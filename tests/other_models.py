"""Tiny fresh checkpoints of other vision-language models: real architectures and files, random weights, no download."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PretrainedConfig,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    WhisperFeatureExtractor,
)

from vlmembed.backbones import tiny

HIDDEN_SIZE = 64
HEAD_DIM = 32

LANGUAGE: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": HIDDEN_SIZE // HEAD_DIM,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    # Fresh weights this large make the attention uneven, so that a wrong mask or position shows in the numbers.
    "initializer_range": 0.1,
}
#: Time, height and width share the frequencies of a rotary table, HEAD_DIM / 2 in all.
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}


#: The language model of Qwen3-VL-MoE and Qwen3-Omni: four experts in every layer, two of them for each token.
MIXTURE = LANGUAGE | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": HEAD_DIM,
    "rope_parameters": ROTARY | {"mrope_interleaved": True},
}
#: Their vision tower.
DEEPSTACK_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "depth": 2,
    "num_heads": 2,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [0],
    "out_hidden_size": HIDDEN_SIZE,
}
#: The vision tower of Qwen2.5-VL and Qwen2.5-Omni.
WINDOWED_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "depth": 2,
    "num_heads": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1],
    "out_hidden_size": HIDDEN_SIZE,
}


def qwen2_5_vl(folder: Path) -> Path:
    """Write a Qwen2.5-VL: patches of 14 pixels, attention in windows, no DeepStack."""
    vision = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 28 * 28, "longest_edge": 64 * 28 * 28}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **vision),
        video_processor=Qwen2VLVideoProcessor(size=size, **vision),
        tokenizer=tiny.fresh_tokenizer(),
        # Here the template, not the processor, sets a video between vision markers.
        chat_template=tiny.CHAT_TEMPLATE.replace("<|video_pad|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    )
    config = Qwen2_5_VLConfig(
        text_config=LANGUAGE | _tokens(processor) | {"rope_parameters": ROTARY},
        vision_config=WINDOWED_TOWER,
        **_vision_tokens(processor),
    )
    return _save(Qwen2_5_VLForConditionalGeneration, config, processor, folder)


def qwen3_vl_moe(folder: Path) -> Path:
    """Write a Qwen3-VL-MoE."""
    processor = tiny.fresh_processor()
    language = MIXTURE | _tokens(processor)
    config = Qwen3VLMoeConfig(text_config=language, vision_config=DEEPSTACK_TOWER, **_vision_tokens(processor))
    return _save(Qwen3VLMoeForConditionalGeneration, config, processor, folder)


def idefics3(folder: Path) -> Path:
    """Write an Idefics3, the family of SmolVLM: a SigLIP tower, a connector, a Llama; large images in tiles."""
    tokenizer = tiny.fresh_tokenizer()
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=tiny.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>"),
    )
    config = Idefics3Config(
        text_config=LANGUAGE | _tokens(processor) | {"model_type": "llama", "head_dim": HEAD_DIM},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        scale_factor=2,
        image_token_id=processor.image_token_id,
    )
    return _save(Idefics3ForConditionalGeneration, config, processor, folder)


#: Marks of sound, and the names under which a tokenizer has the tokens that a processor of Qwen's Omni asks for.
AUDIO_TOKENS = ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>")
OMNI_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_token": "<|audio_pad|>",
    "audio_eos_token": "<|audio_end|>",
}
HEARING = "{%- elif part.type == 'audio' -%}{{- '<|audio_start|><|audio_pad|><|audio_end|>' -}}"
#: The longest recording that a tiny model reads; a real one reads 300 seconds.
SECONDS = 3


def qwen2_5_omni(folder: Path, whole: bool = False) -> Path:
    """Write the thinker of a Qwen2.5-Omni, or a whole one, of whose other parts there are a few weights."""
    processor = _omni_processor(Qwen2_5OmniProcessor, patch=14)
    thinker = {
        "text_config": LANGUAGE | _tokens(processor) | {"rope_parameters": ROTARY},
        "vision_config": WINDOWED_TOWER,
        "audio_config": AUDIO_TOWER | {"n_window": 20},
        **{f"{name}_token_index": getattr(processor, f"{name}_token_id") for name in ("image", "video", "audio")},
        **_omni_tokens(processor),
    }
    if whole:
        omni = Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
        return _add_talker(_save(Qwen2_5OmniForConditionalGeneration, omni, processor, folder))
    config = Qwen2_5OmniThinkerConfig(**thinker)
    return _save(Qwen2_5OmniThinkerForConditionalGeneration, config, processor, folder)


def qwen3_omni(folder: Path, whole: bool = False) -> Path:
    """Write the thinker of a Qwen3-Omni, or a whole one: experts, DeepStack, convolutions over time and pitch."""
    processor = _omni_processor(Qwen3OmniMoeProcessor, patch=16)
    thinker = {
        "text_config": MIXTURE | _tokens(processor),
        "vision_config": DEEPSTACK_TOWER,
        "audio_config": AUDIO_TOWER | {"n_window": 50, "downsample_hidden_size": 16},
        **{f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in ("image", "video", "audio")},
        **_omni_tokens(processor),
    }
    if whole:
        omni = Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
        return _add_talker(_save(Qwen3OmniMoeForConditionalGeneration, omni, processor, folder))
    config = Qwen3OmniMoeThinkerConfig(**thinker)
    return _save(Qwen3OmniMoeThinkerForConditionalGeneration, config, processor, folder)


AUDIO_TOWER: dict[str, Any] = {
    "num_mel_bins": 128,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "d_model": 32,
    "output_dim": HIDDEN_SIZE,
    "initializer_range": 0.1,
}


def _omni_processor(processor_class: Any, patch: int) -> Any:
    vision = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 64 * (2 * patch) ** 2}
    tokenizer = tiny.fresh_tokenizer()
    tokenizer.add_tokens([*AUDIO_TOKENS], special_tokens=True)
    with TemporaryDirectory() as saved:  # Names of tokens are given where a tokenizer is opened.
        tokenizer.save_pretrained(saved)
        tokenizer = Qwen2Tokenizer.from_pretrained(saved, extra_special_tokens=OMNI_TOKENS)
    return processor_class(
        image_processor=Qwen2VLImageProcessor(size=size, **vision),
        video_processor=Qwen2VLVideoProcessor(size=size, **vision),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=SECONDS, return_attention_mask=True),
        tokenizer=tokenizer,
        chat_template=tiny.CHAT_TEMPLATE.replace(
            "<|video_pad|>", "<|vision_start|><|video_pad|><|vision_end|>"
        ).replace("{%- elif part.type == 'video' -%}", f"{HEARING}{{%- elif part.type == 'video' -%}}"),
    )


def _add_talker(folder: Path) -> Path:
    file = folder / "model.safetensors"
    others = {name: torch.ones(4) for name in ("talker.model.norm.weight", "token2wav.bias", "code2wav.bias")}
    save_file(load_file(file) | others, file, {"format": "pt"})
    return folder


def _omni_tokens(processor: Any) -> dict[str, int]:
    names = {
        "vision_start": "vision_bos",
        "vision_end": "vision_eos",
        "audio_start": "audio_bos",
        "audio_end": "audio_eos",
    }
    token_id = processor.tokenizer.convert_tokens_to_ids
    return {f"{name}_token_id": token_id(OMNI_TOKENS[f"{token}_token"]) for name, token in names.items()}


def _tokens(processor: ProcessorMixin) -> dict[str, int]:
    tokenizer = processor.tokenizer
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _vision_tokens(processor: ProcessorMixin) -> dict[str, int]:
    tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    tokens |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    return {f"{name}_token_id": processor.tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _save(architecture: type, config: PretrainedConfig, processor: ProcessorMixin, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        architecture(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
