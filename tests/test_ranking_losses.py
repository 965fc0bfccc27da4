"""Losses of scores are their definition, one query's candidates at a time, and Sentence Transformers' own; so is the
distillation of a teacher's scores into an embedder: the losses, and what a batch carries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from building import batch, collated, fit, item, module, picture
from sentence_transformers.cross_encoder import CrossEncoder
from sentence_transformers.cross_encoder import losses as stock
from sentence_transformers.cross_encoder.losses.lambda_loss import LambdaRankScheme
from sentence_transformers.sentence_transformer import losses as stock_embedding
from test_collate import Letters
from test_losses import CLOSE, columns, compare, shuffled
from torch import Tensor

from vlmembed.data import ItemCollator
from vlmembed.losses import (
    BinaryCrossEntropy,
    InfoNCE,
    KLDivergence,
    LabelSpec,
    LambdaRank,
    ListNet,
    Loss,
    MarginMSE,
    Matryoshka,
    RankingLoss,
    RankNet,
    ScoreDistillation,
    SoftmaxCrossEntropy,
    WeightedSum,
)
from vlmembed.modules import ParityCheck
from vlmembed.modules.embedding import gather_batch
from vlmembed.training.parity import defined_loss
from vlmembed.types import Example

#: Candidates of each query: ragged, and with more than LambdaRank's k.
COUNTS = (4, 2, 7, 3)


def lists(kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Scores and targets of each query's candidates: binary, graded, or a teacher's; positives at any rank."""
    generator = torch.Generator().manual_seed(1)
    scores = [3 * torch.randn(count, generator=generator) for count in COUNTS]
    targets = {
        "binary": ([0, 1, 0, 1], [0, 1], [0, 0, 0, 1, 0, 0, 0], [1, 0, 0]),
        "graded": ([0, 2, 1, 0.5], [3, 1], [0, 0, 4, 1, 0, 2, 2], [1, 0, 0]),
        "teacher": ([-3.5, 2, 8, 0.1], [1, -4], [0, -2, -9, 4, 3, 3, -1], [-2, -2.5, -7]),
    }[kind]
    return scores, [torch.tensor(row, dtype=torch.float32) for row in targets]


def padded(scores: list[Tensor], targets: list[Tensor], empty: float = math.nan) -> tuple[Tensor, Tensor, Tensor]:
    """As a loss takes them, the candidates not always first."""
    width = max(map(len, scores)) + 1
    matrices = [torch.full((len(scores), width), empty, dtype=scores[0].dtype) for _ in range(2)]
    mask = torch.zeros(len(scores), width, dtype=torch.bool)
    generator = torch.Generator().manual_seed(2)
    for row, lists_of_query in enumerate(zip(scores, targets, strict=True)):
        columns = torch.randperm(width, generator=generator)[: len(lists_of_query[0])]
        mask[row, columns] = True
        for matrix, values in zip(matrices, lists_of_query, strict=True):
            matrix[row, columns] = values.to(matrix.dtype)
    return matrices[0], matrices[1], mask


# The definitions


def sigmoid(number: float) -> float:
    return 1 / (1 + math.exp(-number))


def shares(numbers: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(number / temperature) for number in numbers]
    return [power / sum(powers) for power in powers]


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


def cross_entropy(wanted: list[float], predicted: list[float]) -> float:
    return sum(-one * math.log(other) for one, other in zip(wanted, predicted, strict=True))


def slow_softmax(queries: Lists, temperature: float) -> float:
    return mean(
        cross_entropy([label / sum(labels) for label in labels], shares(scores, temperature))
        for scores, labels in queries
    )


def slow_list_net(queries: Lists) -> float:
    return mean(cross_entropy(shares(labels), shares(scores)) for scores, labels in queries)


def slow_kl_divergence(queries: Lists, temperature: float, teacher_temperature: float) -> float:
    teachers = [shares(targets, teacher_temperature) for _, targets in queries]
    return mean(
        cross_entropy(teacher, shares(scores, temperature)) - cross_entropy(teacher, teacher)
        for teacher, (scores, _) in zip(teachers, queries, strict=True)
    )


def slow_margin_mse(queries: Lists) -> float:
    return mean(
        mean(
            ((scores[one] - scores[other]) - (teachers[one] - teachers[other])) ** 2
            for one, other in combinations(range(len(scores)), 2)
        )
        for scores, teachers in queries
    )


def slow_lambda_rank(queries: Lists, k: int | None) -> float:
    """RankNet where k is None."""
    losses = []
    for scores, labels in queries:
        ranking = sorted(range(len(scores)), key=lambda row: -scores[row])
        ideal = sum((2**label - 1) / math.log2(2 + r) for r, label in enumerate(sorted(labels, reverse=True)[:k]))
        for better, worse in permutations(range(len(scores)), 2):
            first, second = ranking.index(better), ranking.index(worse)
            if labels[better] > labels[worse] and (k is None or min(first, second) < k):
                gain = (2 ** labels[better] - 2 ** labels[worse]) / ideal
                discount = abs(1 / math.log2(2 + first) - 1 / math.log2(2 + second))
                weight = 1.0 if k is None else gain * discount
                losses.append(-weight * math.log2(sigmoid(scores[better] - scores[worse])))
    return mean(losses)


Case = tuple[RankingLoss, str, Callable[[Lists], float]]

CASES: dict[str, Case] = {
    "binary cross-entropy": (BinaryCrossEntropy(), "binary", lambda queries: slow_binary_cross_entropy(queries, 1.0)),
    "weighted": (BinaryCrossEntropy(3.5), "binary", lambda queries: slow_binary_cross_entropy(queries, 3.5)),
    "softmax": (SoftmaxCrossEntropy(), "binary", lambda queries: slow_softmax(queries, 1.0)),
    "graded softmax": (SoftmaxCrossEntropy(0.3), "graded", lambda queries: slow_softmax(queries, 0.3)),
    "ListNet": (ListNet(), "graded", slow_list_net),
    "RankNet": (RankNet(), "graded", lambda queries: slow_lambda_rank(queries, None)),
    "LambdaRank": (LambdaRank(), "graded", lambda queries: slow_lambda_rank(queries, 10)),
    "LambdaRank at 2": (LambdaRank(2), "graded", lambda queries: slow_lambda_rank(queries, 2)),
    "LambdaRank at 1": (LambdaRank(1), "binary", lambda queries: slow_lambda_rank(queries, 1)),
    "margin-MSE": (MarginMSE(), "teacher", slow_margin_mse),
    "KL": (KLDivergence(0.5, 2.0), "teacher", lambda queries: slow_kl_divergence(queries, 0.5, 2.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_their_definition(name: str) -> None:
    loss, kind, slow = CASES[name]
    scores, targets = lists(kind)
    expected = slow([(one.tolist(), other.tolist()) for one, other in zip(scores, targets, strict=True)])
    assert float(loss(*padded(scores, targets))) == pytest.approx(expected, rel=1e-5)


# Sentence Transformers


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


LISTWISE: dict[str, Callable[[Any], Any]] = {
    "ListNet": stock.ListNetLoss,
    "RankNet": stock.RankNetLoss,
    "LambdaRank": lambda model: stock.LambdaLoss(model, LambdaRankScheme(), k=10),
    "LambdaRank at 2": lambda model: stock.LambdaLoss(model, LambdaRankScheme(), k=2),
    "LambdaRank at 1": lambda model: stock.LambdaLoss(model, LambdaRankScheme(), k=1),
}


@pytest.mark.parametrize("name", LISTWISE)
def test_listwise_losses_and_gradients_equal_sentence_transformers(name: str) -> None:
    loss, kind, _ = CASES[name]
    scores, targets = lists(kind)
    ours, theirs = ([row.clone().requires_grad_() for row in scores] for _ in range(2))
    expected = LISTWISE[name](GivenScores())([["a query"] * len(scores), [[*row] for row in theirs]], targets)
    compare(loss(*padded(ours, targets)), ours, expected, theirs)


@pytest.mark.parametrize("weight", [1.0, 3.5])
def test_binary_cross_entropy_equals_sentence_transformers(weight: float) -> None:
    scores, targets = lists("binary")
    ours, theirs = ([row.clone().requires_grad_() for row in scores] for _ in range(2))
    their_loss = stock.BinaryCrossEntropyLoss(GivenScores(), pos_weight=torch.tensor(weight))
    documents = [*torch.cat(theirs)]
    expected = their_loss([["a query"] * len(documents), documents], torch.cat(targets))
    compare(BinaryCrossEntropy(weight)(*padded(ours, targets)), ours, expected, theirs)


def test_margin_mse_of_two_candidates_equals_sentence_transformers() -> None:
    scores, targets = ([row[:2] for row in kind] for kind in lists("teacher"))
    ours, theirs = ([row.clone().requires_grad_() for row in scores] for _ in range(2))
    columns = [[row[column] for row in theirs] for column in range(2)]
    expected = stock.MarginMSELoss(GivenScores())([["a query"] * 4, *columns], torch.stack(targets))
    compare(MarginMSE()(*padded(ours, targets)), ours, expected, theirs)


def test_softmax_of_one_positive_is_torchs_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(4)
    scores, positives = torch.randn(5, 6, generator=generator), torch.tensor([3, 0, 5, 5, 2])
    labels = torch.nn.functional.one_hot(positives, 6).float()
    value = SoftmaxCrossEntropy(0.1)(scores, labels, torch.ones(5, 6, dtype=torch.bool))
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(scores / 0.1, positives), **CLOSE)


# What holds for every loss of scores


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_function(name: str) -> None:
    loss, kind, _ = CASES[name]
    scores, targets, mask = padded(*lists(kind), empty=0.0)
    scores = scores.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda leaf: loss(leaf, targets.double(), mask), (scores,))


@pytest.mark.parametrize("empty", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", CASES)
def test_what_stands_where_there_is_no_candidate_does_nothing(name: str, empty: float) -> None:
    loss, kind, _ = CASES[name]
    results = []
    for filling in (0.0, empty):
        scores, targets, mask = padded(*lists(kind), empty=filling)
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
    matrix, targets, mask = padded([1e4 * row.sign() for row in scores], targets)
    value = loss(matrix.requires_grad_(), targets * 1e3 if kind == "teacher" else targets, mask)
    value.backward()
    assert value.isfinite()
    assert matrix.grad is not None
    assert matrix.grad.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    loss, kind, _ = CASES[name]
    scores, targets, mask = padded(*lists(kind))
    half = scores.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(half, targets, mask)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(half.float(), targets, mask))


# At small k it depends on the scores how many pairs of a query count.
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
        (lambda: WeightedSum([InfoNCE()], [1.0, 2.0]), r"one per loss \(1\), got \[1.0, 2.0\]"),
        (lambda: WeightedSum([]), "one or more, got none"),
        (lambda: ScoreDistillation(BinaryCrossEntropy()), "BinaryCrossEntropy wants labels"),
        (lambda: ScoreDistillation(temperature=0.0), r"temperature.*0\.0"),
        (lambda: ScoreDistillation()(*scored_batch()[:3]), "needs a teacher's scores"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Distillation into an embedder


def scored_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries with different numbers of scored documents, one of them shared, and one document that is not scored."""
    scores = torch.full((3, 7), math.nan)
    rows, columns = [0, 0, 0, 1, 1, 2, 2, 2, 2], [1, 3, 5, 0, 4, 1, 2, 3, 5]
    scores[rows, columns] = torch.tensor([4.0, -2.0, 1.5, -6.0, 3.0, 0.5, 2.5, -1.0, 7.0])
    relevance = torch.zeros(3, 7, dtype=torch.int8)
    relevance[[0, 1, 2], [1, 4, 5]] = 1
    relevance[(relevance == 0) & ~scores.isnan()] = -1
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(count, 12, generator=generator) for count in (3, 7))
    return queries, documents, relevance, scores


@pytest.mark.parametrize("dimensions", [[12], [12, 5]])
@pytest.mark.parametrize(
    ("loss", "slow"),
    [
        (KLDivergence(teacher_temperature=2.0), lambda queries: slow_kl_divergence(queries, 1.0, 2.0)),
        (MarginMSE(), slow_margin_mse),
    ],
)
def test_distillation_is_its_definition_at_every_dimension(loss: Any, slow: Any, dimensions: list[int]) -> None:
    queries, documents, relevance, scores = scored_batch()

    def expected(size: int) -> float:
        cosines = torch.cosine_similarity(queries[:, None, :size].double(), documents[None, :, :size].double(), dim=2)
        pairs = zip(cosines / 0.1, scores, ~scores.isnan(), strict=True)
        return slow([(logits[scored].tolist(), teacher[scored].tolist()) for logits, teacher, scored in pairs])

    ours = Matryoshka(ScoreDistillation(loss, temperature=0.1), dimensions)
    value = float(ours(queries, documents, relevance, scores))
    assert value == pytest.approx(sum(map(expected, dimensions)), rel=1e-5)


def scored_columns(embeddings: list[Tensor], teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sentence Transformers' columns as a loss takes them, with a teacher's score of each query's documents."""
    queries, documents, relevance = shuffled(embeddings)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(7))  # As in `shuffled`.
    scores = torch.cat([torch.diag(column) for column in teacher.T], dim=1)[:, order]
    return queries, documents, relevance, scores.masked_fill(relevance == 0, math.nan)


def test_distillation_equals_sentence_transformers() -> None:
    teacher = 3 * torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    ours, theirs = ([column.requires_grad_() for column in columns(2, 4)] for _ in range(2))
    loss: Loss = ScoreDistillation(KLDivergence(teacher_temperature=2.0), temperature=0.2)
    temperatures = {"student_temperature": 0.2, "teacher_temperature": 2.0}
    divergence = stock_embedding.DistillKLDivLoss(None, torch.cosine_similarity, **temperatures)
    expected = divergence.compute_loss_from_embeddings(theirs, teacher) / 0.2**2
    compare(loss(*scored_columns(ours, teacher)), ours, expected, theirs)
    # Their margin-MSE is of two documents.
    loss = ScoreDistillation(MarginMSE(), temperature=0.1)
    margins = stock_embedding.MarginMSELoss(None, lambda one, other: torch.cosine_similarity(one, other) / 0.1)
    expected = margins.compute_loss_from_embeddings(theirs[:3], teacher[:, :2])
    compare(loss(*scored_columns(ours[:3], teacher[:, :2])), ours[:3], expected, theirs[:3])


def test_documents_without_score_get_no_gradient() -> None:
    queries, documents, relevance, scores = scored_batch()
    documents.requires_grad_()
    ScoreDistillation()(queries, documents, relevance, scores).backward()
    assert documents.grad is not None
    assert documents.grad[:6].abs().amax(1).min() > 1e-4
    assert not documents.grad[6].any()


def test_similarities_are_float32_under_autocast() -> None:
    queries, documents, *rest = scored_batch()
    half = queries.bfloat16(), documents.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = ScoreDistillation()(*half, *rest)
    assert torch.equal(value, ScoreDistillation()(*(tensor.float() for tensor in half), *rest))


def test_a_sum_is_the_sum_of_its_losses() -> None:
    queries, documents, relevance, scores = scored_batch()
    learnable = InfoNCE(0.5, learnable_temperature=True)
    losses: list[Loss] = [Matryoshka(InfoNCE(0.1), [12, 4]), ScoreDistillation(MarginMSE()), learnable]
    summed = WeightedSum(losses, [1.0, 0.25, 2.0])
    expected = losses[0](queries, documents, relevance) + 2 * losses[2](queries, documents, relevance)
    expected = expected + 0.25 * losses[1](queries, documents, relevance, scores)
    for function in (summed, partial(defined_loss, summed)):
        value = function(queries, documents, relevance, scores).float()
        torch.testing.assert_close(value, expected, **CLOSE)
        (gradient,) = torch.autograd.grad(value, learnable.log_scale)
        assert gradient != 0
    assert [*summed.parameters()] == [learnable.log_scale]
    assert summed.dimensions == (12, 4)
    assert summed.label_spec.teacher_scores
    assert Matryoshka(summed, [12]).label_spec.teacher_scores
    assert not WeightedSum([InfoNCE()]).label_spec.teacher_scores
    assert not Matryoshka(InfoNCE(), [12]).label_spec.teacher_scores


# The batch


def scored(number: int, negatives: int = 2) -> Example:
    """A query, an image or a text as positive, and negatives; no two scores are the same."""
    query = item(f"query number {number}", role="query")
    positive = item(picture(32, 64, number)) if number % 2 else item(f"answer {number}")
    others = (*(item(f"wrong {number} {index}") for index in range(negatives - 1)), item("wrong for all"))
    scores = (3.0 + number / 7, *(-1.0 - number - index / 3 for index in range(negatives)))
    return Example(query, (positive,), others, scores=scores)


def test_a_batch_carries_the_scores_of_its_pairs() -> None:
    rows = [scored(number) for number in (0, 2, 4)]
    data = collated(ItemCollator(Letters(), LabelSpec(teacher_scores=True)), rows, 2)
    assert data.scores is not None
    assert data.scores.shape == data.labels.shape
    *_, relevance, scores = gather_batch(torch.zeros(len(data.queries) + len(data.documents), 3), data)
    query_ids = sorted({row.query.id for row in rows})
    document_ids = sorted({document.id for row in rows for document in row.documents})
    expected = torch.full((len(query_ids), len(document_ids)), math.nan)
    for row in rows:
        for document, score in zip(row.documents, row.scores or (), strict=True):
            expected[query_ids.index(row.query.id), document_ids.index(document.id)] = score
    torch.testing.assert_close(scores, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(scores.isnan(), relevance == 0)
    assert ItemCollator(Letters())([Example(rows[0].query, rows[0].positives)]).scores is None


def test_of_two_scores_for_a_pair_the_higher_counts() -> None:
    row = scored(0)
    other = Example(row.query, row.positives, row.negatives, scores=(9.0, -9.0, -9.0))
    for rows in ([row, other], [other, row]):
        scores = ItemCollator(Letters(), LabelSpec(teacher_scores=True))(rows).scores
        assert scores is not None
        assert sorted(scores.tolist()) == pytest.approx([-4 / 3, -1.0, 9.0])


def test_rows_that_do_not_fit_the_loss_are_refused() -> None:
    query = replace(item("q", role="query"), origin="rows.jsonl, row 3, column 'query'")
    positive, negative = (item("positive"),), (item("negative"),)
    for example, wants_scores, message in (
        (Example(query, positive, negative), True, "there are none. Add a column 'scores'"),
        (Example(query, positive, negative, scores=(1.0, 0.0)), False, "scores given but unused"),
        (Example(query, positive, scores=(1.0,)), True, "the row has one"),
    ):
        with pytest.raises(ValueError, match=f"rows.jsonl, row 3.*{message}"):
            ItemCollator(Letters(), LabelSpec(teacher_scores=wants_scores))([example])


# Training


def test_the_step_of_a_distillation_is_its_gradient(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Warm, as steps of a steep loss multiply what is rounded otherwise.
    distillation = ScoreDistillation(KLDivergence(teacher_temperature=2.0), temperature=0.5)
    model = module(checkpoint, Matryoshka(WeightedSum([InfoNCE(0.2), distillation], [1.0, 0.5]), [64, 16]))
    rows = [scored(number, 1 + number % 3) for number in range(5)]
    fit(model, [batch(model, rows, 2)], ParityCheck())
    assert "(ScoreDistillation is taken as it is)" in capsys.readouterr().out
