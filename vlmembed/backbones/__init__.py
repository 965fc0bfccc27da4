"""Backbones: vision-language models, read as hidden states."""

from vlmembed.backbones.base import VisionLanguageModel
from vlmembed.backbones.qwen3_vl import Qwen3VL

__all__ = ["Qwen3VL", "VisionLanguageModel"]
