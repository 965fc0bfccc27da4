from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling as Oracle

from vlmembed.export.sentence_transformers import POOLING_MODES
from vlmembed.pooling import Concatenation, FirstToken, LastToken, Max, Mean, MeanSqrtLength, Pooling, WeightedMean

SIMPLE = [FirstToken, LastToken, Max, Mean, MeanSqrtLength, WeightedMean]
LENGTHS = [3, 7, 1, 5]


def slow(pooling: type[Pooling], tokens: torch.Tensor) -> torch.Tensor:
    """The definition, for one item without padding: (L, H) → (H,)."""
    count = len(tokens)
    return {
        FirstToken: lambda: tokens[0],
        LastToken: lambda: tokens[-1],
        Max: lambda: torch.stack([max(feature) for feature in tokens.T]),
        Mean: lambda: sum(tokens) / count,
        MeanSqrtLength: lambda: sum(tokens) / count**0.5,
        WeightedMean: lambda: sum((at + 1) * token for at, token in enumerate(tokens)) / (count * (count + 1) / 2),
    }[pooling]()


def padded(items: list[torch.Tensor], side: str, filler: float) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, items))
    hidden = torch.full((len(items), longest, items[0].shape[1]), filler)
    mask = torch.zeros(len(items), longest, dtype=torch.long)
    for row, tokens in enumerate(items):
        place = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), longest)
        hidden[row, place], mask[row, place] = tokens, 1
    return hidden, mask


@pytest.fixture
def items() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(length, 5) for length in LENGTHS]


@pytest.mark.parametrize("filler", [0.0, 1e6, float("nan")])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", SIMPLE)
def test_equals_its_definition_whatever_the_padding(
    pooling: type[Pooling], side: str, filler: float, items: list[torch.Tensor]
) -> None:
    hidden, mask = padded(items, side, filler)
    expected = torch.stack([slow(pooling, tokens) for tokens in items])
    torch.testing.assert_close(pooling()(hidden, mask), expected, atol=1e-6, rtol=1e-6)  # float32 rounding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", SIMPLE)
def test_equals_sentence_transformers(pooling: type[Pooling], side: str, items: list[torch.Tensor]) -> None:
    hidden, mask = padded(items, side, 0.0)
    oracle = Oracle(5, POOLING_MODES[pooling])
    expected = oracle({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(pooling()(hidden, mask), expected, atol=1e-6, rtol=1e-6)


def test_concatenation_keeps_the_order_given(items: list[torch.Tensor]) -> None:
    hidden, mask = padded(items, "left", 0.0)
    pooling = Concatenation([Mean(), FirstToken(), Max()])
    expected = torch.cat([part()(hidden, mask) for part in (Mean, FirstToken, Max)], dim=1)
    assert pooling.dimension(5) == 15
    torch.testing.assert_close(pooling(hidden, mask), expected)


def test_half_precision_is_summed_in_float32() -> None:
    """In bfloat16 a running sum of ones stops growing at 256."""
    hidden = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    mask = torch.ones(1, 4096, dtype=torch.long)
    torch.testing.assert_close(MeanSqrtLength()(hidden, mask), torch.full((1, 2), 64.0))


@pytest.mark.parametrize("pooling", SIMPLE)
def test_gradient(pooling: type[Pooling], items: list[torch.Tensor]) -> None:
    hidden, mask = padded(items, "right", 0.0)
    reference = [tokens.clone().requires_grad_() for tokens in items]
    weights = torch.randn(len(items), 5)
    (torch.stack([slow(pooling, tokens) for tokens in reference]) * weights).sum().backward()
    hidden.requires_grad_()
    (pooling()(hidden, mask) * weights).sum().backward()
    expected, _ = padded([tokens.grad for tokens in reference], "right", 0.0)
    torch.testing.assert_close(hidden.grad, expected)


def test_concatenation_refuses_one_pooling() -> None:
    with pytest.raises(ValueError, match="at least two poolings, got 1"):
        Concatenation([Mean()])


def test_concatenation_refuses_poolings_of_different_layers() -> None:
    deeper = Mean()
    deeper.layers = (-2,)
    with pytest.raises(ValueError, match="same layers"):
        Concatenation([Mean(), deeper])
