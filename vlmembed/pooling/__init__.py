"""Poolings: from the hidden states of an item's tokens to one embedding.

A pooling is a module called with ``(hidden, mask, input_ids)``. None of them depends on the padding side or on what the
padded positions hold. To add one, subclass `Pooling` anywhere and name it by ``class_path``.
"""

from vlmembed.pooling.appended import EndToken, LearnedTokens
from vlmembed.pooling.attention import Attention, LatentAttention
from vlmembed.pooling.base import Pooling, Template
from vlmembed.pooling.combining import Concatenation, Projection
from vlmembed.pooling.layers import EarlierLayer, LayerMix
from vlmembed.pooling.means import Mean, MeanOfLast, MeanSqrtLength, WeightedMean
from vlmembed.pooling.parts import MeanOfImages, MeanOfText, MeanWithoutInstruction
from vlmembed.pooling.tokens import FirstToken, LastToken, Max

__all__ = [
    "Attention",
    "Concatenation",
    "EarlierLayer",
    "EndToken",
    "FirstToken",
    "LastToken",
    "LatentAttention",
    "LayerMix",
    "LearnedTokens",
    "Max",
    "Mean",
    "MeanOfImages",
    "MeanOfLast",
    "MeanOfText",
    "MeanSqrtLength",
    "MeanWithoutInstruction",
    "Pooling",
    "Projection",
    "Template",
    "WeightedMean",
]

#: The old YAML name, for one release.
ReadOutTokens = LearnedTokens
