"""A tiny fresh Qwen3-VL: the real architecture and files with random weights, for the quick start and the tests.

Nothing is downloaded. ``from_pretrained`` opens the folder like any other, which knows nothing until it is trained.

    python -m vlmembed.backbones.tiny checkpoints/tiny
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

#: The special tokens of Qwen3-VL that its processor and template use.
NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in NAMES)

#: Every message, also an empty one, is one turn. A video stands without vision markers: the processor writes its own
#: pair around every frame.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' -%}
                {{- '<|video_pad|>' -}}
            {%- else -%}
                {{- raise_exception('A content part is a text, an image or a video, not ' + part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

#: Whatever is not in here still has tokens: its bytes.
VOCABULARY_TEXT = [
    *(" ".join(pair) for pair in product(NUMBER_WORDS, repeat=2)),
    *["system\n", "user\n", "assistant\n", "query\n", "document\n", "yes", "no", " yes", " no"] * 20,
    *["Represent the user's input. Judge whether the document answers the query. <0.5 seconds>"] * 20,
]

PATCH, MERGE, FRAMES = 16, 2, 2
TOKEN_PIXELS = (PATCH * MERGE) ** 2
MIN_TOKENS, MAX_TOKENS = 1, 256


def create(
    folder: Path,
    *,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    vision_hidden_size: int = 128,
    vision_layers: int = 3,
    tie_word_embeddings: bool = True,
    seed: int = 0,
) -> bool:
    """Write a fresh Qwen3-VL checkpoint; return False where the folder held the same one already.

    ``hidden_size`` is a multiple of ``2 * heads``, ``vision_hidden_size`` of ``4 * heads``; MLPs are twice as wide.
    All vision layers but the last also feed the language model directly (DeepStack).
    """
    processor = fresh_processor()
    head_dim = hidden_size // heads
    third = head_dim // 6  # A rotary table has head_dim / 2 frequencies, shared by time, height and width.
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": head_dim,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_interleaved": True,
                "mrope_section": [head_dim // 2 - 2 * third, third, third],
            },
            "vocab_size": len(processor.tokenizer),
            "eos_token_id": processor.tokenizer.eos_token_id,
            "tie_word_embeddings": tie_word_embeddings,
        },
        vision_config={
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "depth": vision_layers,
            "num_heads": heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": list(range(vision_layers - 1)),
            "out_hidden_size": hidden_size,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as scratch:
        torch.random.default_generator.manual_seed(seed)
        Qwen3VLForConditionalGeneration(config).save_pretrained(scratch)
        processor.save_pretrained(scratch)
        fresh = not folder.is_dir() or not any(folder.iterdir())
        if fresh:
            shutil.copytree(scratch, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        _, differing, missing = filecmp.cmpfiles(scratch, folder, os.listdir(scratch), shallow=False)
    if differing or missing:
        raise FileExistsError(
            f"{folder} is not empty and does not hold this checkpoint ({', '.join(sorted(differing + missing))} would "
            "change): name another folder, or delete this one"
        )
    return fresh


def fresh_processor() -> Qwen3VLProcessor:
    """Return a processor with a small byte-level BPE, our chat template and limits that suit little images."""
    vision: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": FRAMES}
    vision |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"shortest_edge": MIN_TOKENS * TOKEN_PIXELS, "longest_edge": MAX_TOKENS * TOKEN_PIXELS}
    frames_size = {name: FRAMES * pixels for name, pixels in size.items()}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **vision),
        video_processor=Qwen3VLVideoProcessor(size=frames_size, cap_pixels_per_frame=False, **vision),
        tokenizer=fresh_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )


def fresh_tokenizer() -> Qwen2Tokenizer:
    """Return a byte-level BPE for ``VOCABULARY_TEXT``; "yes" and "no" are one token each, as a reranker needs."""
    blank = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=list(SPECIAL_TOKENS))
    return blank.train_new_from_iterator(VOCABULARY_TEXT, vocab_size=512, show_progress=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the default checkpoint where the command line says."""
    parser = argparse.ArgumentParser(prog="python -m vlmembed.backbones.tiny", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write it; made if it is not there")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    options = parser.parse_args(arguments)
    try:
        wrote = create(options.folder, seed=options.seed)
    except FileExistsError as error:
        parser.exit(1, f"{error}\n")
    print(
        f"Wrote a fresh Qwen3-VL to {options.folder}." if wrote else f"{options.folder} holds this checkpoint already."
    )


if __name__ == "__main__":
    main()
