"""Backbones: vision-language models, read as hidden states."""

from vlmembed.backbones.base import VisionLanguageModel
from vlmembed.backbones.chat_templates import DocumentFirst, PairTemplate, QueryFirst, TemplateFile
from vlmembed.backbones.qwen3_vl import Qwen3VL

__all__ = ["DocumentFirst", "PairTemplate", "QueryFirst", "Qwen3VL", "TemplateFile", "VisionLanguageModel"]
