"""Every pooling is what a slow loop over an item's tokens says it is, whatever the padding; and so is its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling as Oracle
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import gelu, layer_norm

from vlmembed.export.modules import MODES
from vlmembed.pooling import (
    Attention,
    Concatenation,
    EarlierLayer,
    EndToken,
    FirstToken,
    LastToken,
    LatentAttention,
    LayerMix,
    LearnedTokens,
    Max,
    Mean,
    MeanOfImages,
    MeanOfLast,
    MeanOfText,
    MeanSqrtLength,
    MeanWithoutInstruction,
    Pooling,
    Projection,
    Template,
    WeightedMean,
)

SIZE = 6
TEMPLATE = Template(visual=(7, 8), instructions=((1, 2), (1, 3, 4)))
#: With the first instruction and an image; with the second and a video; with neither; with half of the first.
IDS = [[1, 2, 5, 7, 7, 9], [1, 3, 4, 8, 5, 8, 9, 9], [5, 9, 5], [1, 5, 2, 7]]

Slow = Callable[[Pooling, Tensor, list[int]], Tensor]


@dataclass(frozen=True)
class Case:
    """A pooling, and its definition: for one item without padding, (L, H), or (K, L, H), and L ids → (D,)."""

    build: Callable[[], Pooling]
    slow: Slow
    layers: int = 1


def mean(tokens: list[Tensor]) -> Tensor:
    return sum(tokens[1:], tokens[0]) / len(tokens)


def mean_where(keep: Callable[[int], bool]) -> Slow:
    def slow(_: Pooling, tokens: Tensor, ids: list[int]) -> Tensor:
        return mean([token for token, number in zip(tokens, ids, strict=True) if keep(number)] or list(tokens))

    return slow


def behind_the_instruction(_: Pooling, tokens: Tensor, ids: list[int]) -> Tensor:
    begins = [len(each) for each in TEMPLATE.instructions if tuple(ids[: len(each)]) == each]
    return mean(list(tokens)[max(begins, default=0) :])


def attention(pooling: Attention, tokens: Tensor, _: list[int]) -> Tensor:
    found = []
    for query in pooling.query:
        weights = [torch.exp(query @ token / sqrt(SIZE)) for token in tokens]
        found.append(sum(weight * token for weight, token in zip(weights, tokens, strict=True)) / sum(weights))
    return torch.cat(found)


def latent_attention(pooling: LatentAttention, tokens: Tensor, _: list[int]) -> Tensor:
    def normed(values: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
        return layer_norm(values, (SIZE,), norm.weight, norm.bias)

    width, answers = SIZE // pooling.heads, []
    latents = normed(pooling.dictionary, pooling.norm_latents)
    keys, values = latents @ pooling.to_key_value.weight[:SIZE].T, latents @ pooling.to_key_value.weight[SIZE:].T
    for token in tokens:
        query, heads = pooling.to_query.weight @ normed(token, pooling.norm_states), []
        for start in range(0, SIZE, width):
            head = slice(start, start + width)
            weights = torch.stack([key[head] @ query[head] / sqrt(width) for key in keys]).softmax(0)
            heads.append(sum(weight * value[head] for weight, value in zip(weights, values, strict=True)))
        token = token + pooling.to_output.weight @ torch.cat(heads)
        inner = gelu(pooling.widen.weight @ normed(token, pooling.norm_inner) + pooling.widen.bias)
        answers.append(token + pooling.narrow.weight @ inner + pooling.narrow.bias)
    return mean(answers)


def mlp(pooling: Projection, tokens: Tensor, _: list[int]) -> Tensor:
    inner = gelu(pooling.inner.weight @ tokens[-1] + pooling.inner.bias)
    return pooling.outer.weight @ inner + pooling.outer.bias


def mixed(pooling: LayerMix, tokens: Tensor, _: list[int]) -> Tensor:
    shares = pooling.weights.exp() / pooling.weights.exp().sum()
    layers = [share * layer for share, layer in zip(shares, tokens, strict=True)]
    return mean([sum(states) for states in zip(*layers, strict=True)])


CASES = {
    "first": Case(FirstToken, lambda _, tokens, __: tokens[0]),
    "last": Case(LastToken, lambda _, tokens, __: tokens[-1]),
    "max": Case(Max, lambda _, tokens, __: torch.stack([max(feature) for feature in tokens.T])),
    "mean": Case(Mean, lambda _, tokens, __: mean(list(tokens))),
    "mean of √length": Case(MeanSqrtLength, lambda _, tokens, __: sum(tokens) / sqrt(len(tokens))),
    "weighted mean": Case(
        WeightedMean,
        lambda _, tokens, __: sum((at + 1) * each for at, each in enumerate(tokens)) / sum(range(1, len(tokens) + 1)),
    ),
    "mean of the last": Case(lambda: MeanOfLast(4), lambda _, tokens, __: mean(list(tokens[-4:]))),
    "images": Case(MeanOfImages, mean_where(lambda number: number in (7, 8))),
    "text": Case(MeanOfText, mean_where(lambda number: number not in (7, 8))),
    "without instruction": Case(MeanWithoutInstruction, behind_the_instruction),
    "end token": Case(EndToken, lambda _, tokens, __: tokens[-1]),
    "read-outs, mean": Case(lambda: LearnedTokens(2), lambda _, tokens, __: (tokens[-1] + tokens[-2]) / 2),
    "read-outs, concatenated": Case(
        lambda: LearnedTokens(3, "concatenation"), lambda _, tokens, __: torch.cat(list(tokens[-3:]))
    ),
    "earlier layer": Case(lambda: EarlierLayer(Max(), -2), lambda _, tokens, __: tokens.amax(0)),
    "layer mix": Case(lambda: LayerMix(Mean(), 3), mixed, layers=3),
    "attention": Case(Attention, attention),
    "attention, 3 queries": Case(lambda: Attention(3), attention),
    "latent attention": Case(lambda: LatentAttention(5, 2, 2), latent_attention),
    "concatenation": Case(
        lambda: Concatenation([Mean(), FirstToken(), Max()]),
        lambda _, tokens, __: torch.cat([mean(list(tokens)), tokens[0], tokens.amax(0)]),
    ),
    "linear projection": Case(
        lambda: Projection(LastToken(), 4),
        lambda pooling, tokens, __: pooling.outer.weight @ tokens[-1] + pooling.outer.bias,
    ),
    "MLP": Case(lambda: Projection(LastToken(), 4, 5), mlp),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def built(case: Case) -> Pooling:
    """In float64, with random weights: those that start at zero would hide mistakes."""
    torch.manual_seed(0)
    pooling = case.build()
    pooling.configure(SIZE)
    pooling.template = TEMPLATE
    for weight in pooling.parameters():
        torch.nn.init.normal_(weight)
    return pooling.double()


def items(case: Case) -> list[Tensor]:
    torch.manual_seed(1)
    drawn = [torch.randn(case.layers, len(ids), SIZE, dtype=torch.float64) for ids in IDS]
    return drawn if case.layers > 1 else [tokens[0] for tokens in drawn]


def padded(tokens: list[Tensor], side: str, filler: float, other: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, mask and ids; where padding is, a filler and the id of an image."""
    longest = max(map(len, IDS))
    hidden = torch.full((*tokens[0].shape[:-2], len(IDS), longest, SIZE), filler, dtype=tokens[0].dtype)
    mask, ids = torch.zeros(len(IDS), longest, dtype=torch.long), torch.full((len(IDS), longest), other)
    for row, (each, numbers) in enumerate(zip(tokens, IDS, strict=True)):
        place = slice(0, len(numbers)) if side == "right" else slice(longest - len(numbers), longest)
        hidden[..., row, place, :], mask[row, place], ids[row, place] = each, 1, torch.tensor(numbers)
    return hidden, mask, ids


@pytest.mark.parametrize("filler", [0.0, 1e6, float("nan")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_its_definition_whatever_the_padding(case: Case, side: str, filler: float) -> None:
    pooling, tokens = built(case), items(case)
    expected = torch.stack([case.slow(pooling, each, ids) for each, ids in zip(tokens, IDS, strict=True)])
    found = pooling(*padded(tokens, side, filler))
    assert found.shape[1] == pooling.dimension(SIZE)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_are_those_of_finite_differences(case: Case, side: str) -> None:
    """With respect to the states and to every weight."""
    pooling = built(case)
    hidden, mask, ids = padded(items(case), side, 0.0)
    weights = dict(pooling.named_parameters())

    def pooled(states: Tensor, *values: Tensor) -> Tensor:
        return functional_call(pooling, dict(zip(weights, values, strict=True)), (states, mask, ids))

    # Read-outs' embeddings go into the backbone, not into the pooling.
    assert torch.autograd.gradcheck(pooled, (hidden.requires_grad_(), *weights.values()))


def test_states_before_the_tail_are_not_read(case: Case) -> None:
    pooling = built(case)
    hidden, mask, ids = padded(items(case), "right", 0.0)
    expected = pooling(hidden, mask, ids)
    if pooling.num_last_tokens is not None:
        behind = mask.flip(1).cumsum(1).flip(1)
        hidden = hidden.masked_fill((behind > pooling.num_last_tokens)[..., None], float("nan"))
    assert torch.equal(pooling(hidden, mask, ids), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", MODES)
def test_equals_sentence_transformers(pooling: type[Pooling], side: str) -> None:
    hidden, mask, ids = padded(items(CASES["mean"]), side, 0.0)
    oracle = Oracle(SIZE, MODES[pooling])
    expected = oracle({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(pooling()(hidden, mask, ids), expected, atol=1e-6, rtol=1e-6)  # float32 rounding


def test_half_precision_is_summed_in_float32() -> None:
    """In bfloat16 a running sum of ones stops growing at 256."""
    hidden = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    mask = torch.ones(1, 4096, dtype=torch.long)
    torch.testing.assert_close(MeanSqrtLength()(hidden, mask), torch.full((1, 2), 64.0))


def test_half_precision_weights(case: Case) -> None:
    """As with ``precision: bf16-true``."""
    pooling = built(case).bfloat16()
    hidden, mask, ids = padded([each.bfloat16() for each in items(case)], "right", 0.0)
    expected = built(case)(hidden.double(), mask, ids)
    # bfloat16 keeps 8 bits; cancellation in sums of products of normal numbers loses some more.
    assert (pooling(hidden, mask, ids).double() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Concatenation([Mean()]), "at least two poolings, got 1"),
        (lambda: Concatenation([Mean(), EarlierLayer(Mean())]), "same layers"),
        (lambda: Concatenation([Mean(), EndToken()]), "EndToken"),
        (lambda: MeanOfLast(0), "1 or more, got 0"),
        (lambda: LearnedTokens(0), "1 or more, got 0"),
        (lambda: Attention(0), "1 or more, got 0"),
        (lambda: LayerMix(Mean(), 1), "2 or more, got 1"),
        (lambda: LayerMix(EarlierLayer(Mean())), r"reads layers \(-2,\)"),
        (lambda: Projection(Mean(), 0), "size=0"),
        (lambda: LatentAttention(heads=4).configure(6), "4 heads do not divide the hidden size 6"),
    ],
)
def test_what_makes_no_sense_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_parts_need_ids_and_their_meaning() -> None:
    hidden, mask, _ = padded(items(CASES["mean"]), "right", 0.0)
    with pytest.raises(ValueError, match="MeanOfText needs input_ids"):
        MeanOfText()(hidden, mask)
