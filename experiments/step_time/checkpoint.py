"""Fresh Qwen3-VL checkpoints of a stated size, that both sides of the comparison open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig, Qwen3VLProcessor

from vlmembed.backbones import Qwen3VL
from vlmembed.backbones.tiny import TOKEN_PIXELS, fresh_processor
from vlmembed.encoder import Encoder
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.pooling import LastToken


@dataclass(frozen=True)
class Sizes:
    """What decides the cost of a Qwen3-VL.

    Args:
        language: Width, MLP width, layers, attention heads, key-value heads, width of a head.
        vision: Width, MLP width, layers, attention heads.
        deepstack: The tower's layers that feed the language model directly; each has a merger of its own.
        vocabulary: Tokens; the processor uses the first 512.
        positions: Learnt positions of the tower.
    """

    language: tuple[int, int, int, int, int, int]
    vision: tuple[int, int, int, int]
    deepstack: tuple[int, ...]
    vocabulary: int = 512
    positions: int = 256


SIZES = {
    # For trying the scripts out.
    "tiny": Sizes((64, 128, 2, 4, 2, 16), (64, 128, 2, 4), (0,)),
    # The 2B made smaller, 13.4 M parameters: MLPs, mergers and key-value heads in its proportions. Not counting the
    # vocabulary, the tower has 26 % of the parameters (22 % in the 2B) and per image token, which is four patches, as
    # many operations as the language model (0.94). But with little pictures that is 26 % of a forward pass.
    "balanced": Sizes((320, 960, 8, 4, 2, 80), (160, 640, 6, 4), (2,)),
    # A wide tower with a merger behind every layer, 13.8 M parameters, to balance the work instead: with
    # little pictures the tower takes 49 % of a forward pass's operations, as in the 2B at 600 × 600 pixels.
    "wide_tower": Sizes((320, 640, 6, 4, 2, 80), (256, 512, 4, 4), (0, 1, 2)),
    # The released ones.
    "2B": Sizes((2048, 6144, 28, 16, 8, 128), (1024, 4096, 24, 16), (5, 11, 17), 151_936, 2304),
    "8B": Sizes((4096, 12288, 36, 32, 8, 128), (1152, 4304, 27, 16), (8, 16, 24), 151_936, 2304),
}


def configuration(name: str) -> Qwen3VLConfig:
    """Return one of ``SIZES`` by name, or the ``config.json`` of a folder."""
    if name not in SIZES:
        return Qwen3VLConfig.from_pretrained(name)
    sizes = SIZES[name]
    width, mlp, layers, heads, key_value_heads, head = sizes.language
    vision_width, vision_mlp, depth, vision_heads = sizes.vision
    third = head // 6  # A rotary table has head / 2 frequencies, shared by time, height and width.
    return Qwen3VLConfig(
        text_config={
            **{"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "head_dim": head},
            **{"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "vocab_size": sizes.vocabulary},
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True},
                "mrope_section": [head // 2 - 2 * third, third, third],
            },
        },
        vision_config={
            **{"hidden_size": vision_width, "intermediate_size": vision_mlp, "depth": depth, "num_heads": vision_heads},
            **{"out_hidden_size": width, "deepstack_visual_indexes": list(sizes.deepstack)},
            "num_position_embeddings": sizes.positions,
        },
        tie_word_embeddings=True,
    )


def write(
    folder: Path,
    config: Qwen3VLConfig,
    min_tokens: int,
    max_tokens: int,
    dtype: str = "float32",
    device: str = "cpu",
) -> None:
    """Write a checkpoint with random weights, as a folder that Sentence Transformers opens too.

    Args:
        folder: Where; must not exist.
        config: Its sizes; token ids are replaced by the processor's.
        min_tokens: The fewest tokens of an image.
        max_tokens: The most.
        dtype: The type of the weights.
        device: Where the random numbers are drawn; billions of them take long on a CPU.
    """
    processor = fresh_processor()
    processor.image_processor.size = {
        "shortest_edge": min_tokens * TOKEN_PIXELS,
        "longest_edge": max_tokens * TOKEN_PIXELS,
    }
    _use_tokens_of(processor, config)
    with TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(scratch)
        del model
        processor.save_pretrained(scratch)
        encoder = Encoder(Qwen3VL(scratch, dtype=dtype), LastToken())
        encoder.configure()
        folder.mkdir(parents=True)
        write_folder(encoder, folder)


def _use_tokens_of(processor: Qwen3VLProcessor, config: Qwen3VLConfig) -> None:
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(processor, name))
    config.get_text_config().eos_token_id = processor.tokenizer.eos_token_id
