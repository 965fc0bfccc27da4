"""Losses of a cross-encoder are their definition, one query's candidates at a time, and Sentence Transformers' own."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from sentence_transformers.cross_encoder import CrossEncoder
from sentence_transformers.cross_encoder import losses as stock
from sentence_transformers.cross_encoder.losses.lambda_loss import LambdaRankScheme
from torch import Tensor

from vlmembed.losses import (
    BinaryCrossEntropy,
    KLDivergence,
    LambdaRank,
    ListNet,
    MarginMSE,
    RankingLoss,
    RankNet,
    SoftmaxCrossEntropy,
)

# Sums of some ten float32 numbers of size 10 or less, in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

#: Candidates of each query: ragged, and with more than LambdaRank's k.
COUNTS = (4, 2, 7, 3)


def lists(kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Scores and targets of each query's candidates: binary, graded, or a teacher's; right answers at any place."""
    generator = torch.Generator().manual_seed(1)
    scores = [3 * torch.randn(count, generator=generator) for count in COUNTS]
    targets = {
        "binary": ([0, 1, 0, 1], [0, 1], [0, 0, 0, 1, 0, 0, 0], [1, 0, 0]),
        "graded": ([0, 2, 1, 0.5], [3, 1], [0, 0, 4, 1, 0, 2, 2], [1, 0, 0]),
        "teacher": ([-3.5, 2, 8, 0.1], [1, -4], [0, -2, -9, 4, 3, 3, -1], [-2, -2.5, -7]),
    }[kind]
    return scores, [torch.tensor(each, dtype=torch.float32) for each in targets]


def side_by_side(scores: list[Tensor], targets: list[Tensor], empty: float = math.nan) -> tuple[Tensor, Tensor, Tensor]:
    """As a loss takes them, the candidates not always first."""
    width = max(map(len, scores)) + 1
    matrices = [torch.full((len(scores), width), empty, dtype=scores[0].dtype) for _ in range(2)]
    mask = torch.zeros(len(scores), width, dtype=torch.bool)
    generator = torch.Generator().manual_seed(2)
    for row, each in enumerate(zip(scores, targets, strict=True)):
        places = torch.randperm(width, generator=generator)[: len(each[0])]
        mask[row, places] = True
        for matrix, values in zip(matrices, each, strict=True):
            matrix[row, places] = values.to(matrix.dtype)
    return matrices[0], matrices[1], mask


def sigmoid(number: float) -> float:
    return 1 / (1 + math.exp(-number))


def shares(numbers: list[float]) -> list[float]:
    return [math.exp(number) / sum(map(math.exp, numbers)) for number in numbers]


def mean(numbers: Any) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


Lists = list[tuple[list[float], list[float]]]


def slow_binary_cross_entropy(queries: Lists, weight: float) -> float:
    return mean(
        -weight * label * math.log(sigmoid(score)) - (1 - label) * math.log(1 - sigmoid(score))
        for scores, labels in queries
        for score, label in zip(scores, labels, strict=True)
    )


def slow_softmax(queries: Lists, temperature: float) -> float:
    return mean(
        sum(
            -label / sum(labels) * math.log(share)
            for share, label in zip(shares([score / temperature for score in scores]), labels, strict=True)
        )
        for scores, labels in queries
    )


def slow_list_net(queries: Lists) -> float:
    return mean(
        sum(-wanted * math.log(share) for share, wanted in zip(shares(scores), shares(labels), strict=True))
        for scores, labels in queries
    )


def slow_lambda_rank(queries: Lists, k: int | None) -> float:
    """RankNet where k is None."""
    losses = []
    for scores, labels in queries:
        ranking = sorted(range(len(scores)), key=lambda place: -scores[place])
        ideal = sum((2**label - 1) / math.log2(2 + r) for r, label in enumerate(sorted(labels, reverse=True)[:k]))
        for better, worse in permutations(range(len(scores)), 2):
            first, second = ranking.index(better), ranking.index(worse)
            if labels[better] > labels[worse] and (k is None or min(first, second) < k):
                gain = (2 ** labels[better] - 2 ** labels[worse]) / ideal
                discount = abs(1 / math.log2(2 + first) - 1 / math.log2(2 + second))
                weight = 1.0 if k is None else gain * discount
                losses.append(-weight * math.log2(sigmoid(scores[better] - scores[worse])))
    return mean(losses)


def slow_margin_mse(queries: Lists) -> float:
    return mean(
        mean(
            ((scores[one] - scores[other]) - (teachers[one] - teachers[other])) ** 2
            for one, other in combinations(range(len(scores)), 2)
        )
        for scores, teachers in queries
    )


def slow_kl_divergence(queries: Lists, temperature: float, teacher_temperature: float) -> float:
    return mean(
        sum(
            wanted * math.log(wanted / share)
            for share, wanted in zip(
                shares([score / temperature for score in scores]),
                shares([teacher / teacher_temperature for teacher in teachers]),
                strict=True,
            )
        )
        for scores, teachers in queries
    )


Case = tuple[RankingLoss, str, Callable[[Lists], float]]

CASES: dict[str, Case] = {
    "binary cross-entropy": (BinaryCrossEntropy(), "binary", lambda lists: slow_binary_cross_entropy(lists, 1.0)),
    "weighted": (BinaryCrossEntropy(3.5), "binary", lambda lists: slow_binary_cross_entropy(lists, 3.5)),
    "softmax": (SoftmaxCrossEntropy(), "binary", lambda lists: slow_softmax(lists, 1.0)),
    "graded softmax": (SoftmaxCrossEntropy(0.3), "graded", lambda lists: slow_softmax(lists, 0.3)),
    "ListNet": (ListNet(), "graded", slow_list_net),
    "RankNet": (RankNet(), "graded", lambda lists: slow_lambda_rank(lists, None)),
    "LambdaRank": (LambdaRank(), "graded", lambda lists: slow_lambda_rank(lists, 10)),
    "LambdaRank at 2": (LambdaRank(2), "graded", lambda lists: slow_lambda_rank(lists, 2)),
    "LambdaRank at 1": (LambdaRank(1), "binary", lambda lists: slow_lambda_rank(lists, 1)),
    "margin-MSE": (MarginMSE(), "teacher", slow_margin_mse),
    "KL": (KLDivergence(0.5, 2.0), "teacher", lambda lists: slow_kl_divergence(lists, 0.5, 2.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_their_definition(name: str) -> None:
    loss, kind, slow = CASES[name]
    scores, targets = lists(kind)
    expected = slow([(one.tolist(), other.tolist()) for one, other in zip(scores, targets, strict=True)])
    assert float(loss(*side_by_side(scores, targets))) == pytest.approx(expected, rel=1e-5)


class GivenScores(CrossEncoder):
    """Stands in for a model of Sentence Transformers whose inputs are already scores."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    num_labels = 1
    device = torch.device("cpu")

    def preprocess(self, inputs: list[tuple[str, Tensor]], **_: Any) -> dict[str, Tensor]:
        return {"scores": torch.stack([document for _, document in inputs])}

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        return features


LISTWISE: dict[str, tuple[RankingLoss, str, Callable[[Any], Any]]] = {
    "ListNet": (ListNet(), "graded", stock.ListNetLoss),
    "RankNet": (RankNet(), "graded", stock.RankNetLoss),
    "LambdaRank": (LambdaRank(), "graded", lambda model: stock.LambdaLoss(model, LambdaRankScheme(), k=10)),
    "LambdaRank at 2": (LambdaRank(2), "graded", lambda model: stock.LambdaLoss(model, LambdaRankScheme(), k=2)),
    "LambdaRank at 1": (LambdaRank(1), "binary", lambda model: stock.LambdaLoss(model, LambdaRankScheme(), k=1)),
}


def check_equal(ours: Tensor, leaves: list[Tensor], theirs: Tensor, their_leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, **CLOSE)
    gradients = torch.autograd.grad(ours, leaves)
    for one, other in zip(gradients, torch.autograd.grad(theirs, their_leaves), strict=True):
        assert one.abs().max() > 1e-4
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("name", LISTWISE)
def test_listwise_losses_and_gradients_equal_sentence_transformers(name: str) -> None:
    loss, kind, make = LISTWISE[name]
    scores, targets = lists(kind)
    ours, theirs = ([each.clone().requires_grad_() for each in scores] for _ in range(2))
    expected = make(GivenScores())([["a query"] * len(scores), [[*each] for each in theirs]], targets)
    check_equal(loss(*side_by_side(ours, targets)), ours, expected, theirs)


@pytest.mark.parametrize("weight", [1.0, 3.5])
def test_binary_cross_entropy_equals_sentence_transformers(weight: float) -> None:
    scores, targets = lists("binary")
    ours, theirs = ([each.clone().requires_grad_() for each in scores] for _ in range(2))
    their_loss = stock.BinaryCrossEntropyLoss(GivenScores(), pos_weight=torch.tensor(weight))
    documents = [*torch.cat(theirs)]
    expected = their_loss([["a query"] * len(documents), documents], torch.cat(targets))
    check_equal(BinaryCrossEntropy(weight)(*side_by_side(ours, targets)), ours, expected, theirs)


def test_margin_mse_of_two_candidates_equals_sentence_transformers() -> None:
    scores, targets = ([each[:2] for each in kind] for kind in lists("teacher"))
    ours, theirs = ([each.clone().requires_grad_() for each in scores] for _ in range(2))
    columns = [[each[place] for each in theirs] for place in range(2)]
    expected = stock.MarginMSELoss(GivenScores())([["a query"] * 4, *columns], torch.stack(targets))
    check_equal(MarginMSE()(*side_by_side(ours, targets)), ours, expected, theirs)


def test_softmax_of_one_right_answer_is_torchs_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(4)
    scores, right = torch.randn(5, 6, generator=generator), torch.tensor([3, 0, 5, 5, 2])
    labels = torch.nn.functional.one_hot(right, 6).float()
    value = SoftmaxCrossEntropy(0.1)(scores, labels, torch.ones(5, 6, dtype=torch.bool))
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(scores / 0.1, right), **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_function(name: str) -> None:
    loss, kind, _ = CASES[name]
    scores, targets, mask = side_by_side(*lists(kind), empty=0.0)
    scores = scores.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda given: loss(given, targets.double(), mask), (scores,))


@pytest.mark.parametrize("empty", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", CASES)
def test_what_stands_where_there_is_no_candidate_does_nothing(name: str, empty: float) -> None:
    loss, kind, _ = CASES[name]
    results = []
    for filling in (0.0, empty):
        scores, targets, mask = side_by_side(*lists(kind), empty=filling)
        value = loss(scores.requires_grad_(), targets, mask)
        value.backward()
        assert scores.grad is not None
        assert not scores.grad[~mask].any()
        results.append((value, scores.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", CASES)
def test_large_logits_give_numbers(name: str) -> None:
    loss, kind, _ = CASES[name]
    scores, targets = lists(kind)
    matrix, targets, mask = side_by_side([1e4 * each.sign() for each in scores], targets)
    value = loss(matrix.requires_grad_(), targets * 1e3 if kind == "teacher" else targets, mask)
    value.backward()
    assert value.isfinite()
    assert matrix.grad is not None
    assert matrix.grad.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    loss, kind, _ = CASES[name]
    scores, targets, mask = side_by_side(*lists(kind))
    half = scores.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(half, targets, mask)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(half.float(), targets, mask))


# At small k it depends on the scores how many pairs of a query count.
@pytest.mark.parametrize("name", [name for name in CASES if "at" not in name.split()])
def test_a_batch_is_the_mean_of_its_queries(name: str) -> None:
    """Of queries with equally many candidates and right answers, as losses of pairs average over pairs."""
    loss, kind, _ = CASES[name]
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(3, 4, generator=generator)
    targets = {"binary": [0.0, 1.0, 0.0, 0.0], "graded": [0.0, 2.0, 1.0, 3.0], "teacher": [0.5, -2.0, 1.0, 3.0]}[kind]
    rows = torch.stack([torch.tensor(targets)[torch.randperm(4, generator=generator)] for _ in range(3)])
    mask = torch.ones(3, 4, dtype=torch.bool)
    parts = [loss(scores[row : row + 1], rows[row : row + 1], mask[:1]) for row in range(3)]
    torch.testing.assert_close(loss(scores, rows, mask), torch.stack(parts).mean(), **CLOSE)


@pytest.mark.parametrize("loss", [RankNet(), LambdaRank()])
def test_labels_without_difference_give_no_gradient(loss: RankingLoss) -> None:
    scores = torch.randn(2, 3, requires_grad=True)
    value = loss(scores, torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert scores.grad is not None
    assert not scores.grad.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BinaryCrossEntropy(0.0), "positive_weight.*0.0"),
        (lambda: BinaryCrossEntropy(math.inf), "positive_weight.*inf"),
        (lambda: SoftmaxCrossEntropy(-1.0), "temperature.*-1.0"),
        (lambda: KLDivergence(math.nan), "^temperature.*nan"),
        (lambda: KLDivergence(teacher_temperature=0.0), "teacher_temperature.*0.0"),
        (lambda: LambdaRank(0), "k is 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], RankingLoss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_losses_say_what_they_want() -> None:
    assert BinaryCrossEntropy.targets.largest == 1
    assert all(loss.targets.positive and loss.targets.several for loss in (SoftmaxCrossEntropy, ListNet, LambdaRank))
    assert all(loss.targets.scores and loss.targets.several for loss in (KLDivergence, MarginMSE))
