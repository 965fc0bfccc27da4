"""Poolings: from the hidden states of an item's tokens to one embedding. To add one, see README.md."""

# ruff: noqa: F401

from vlmembed.pooling.base import (
    EndToken,
    FirstToken,
    LastToken,
    Max,
    Mean,
    MeanOfImages,
    MeanOfLast,
    MeanOfText,
    MeanSqrtLength,
    MeanWithoutInstruction,
    Pooling,
    PoolingWrapper,
    Template,
    TokenWeights,
    WeightedMean,
)
from vlmembed.pooling.learned import (
    Attention,
    Concatenation,
    EarlierLayer,
    LatentAttention,
    LayerMix,
    LearnedTokens,
    Projection,
    ReadOutTokens,
)
from vlmembed.pooling.tokens import TokenProjection, TokenSelection
