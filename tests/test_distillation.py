"""A teacher's scores in an embedder's training: what the losses are, what a batch carries, and over two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ddp
import pytest
import torch
import torch.distributed as dist
from building import Recorder, batch, collated, item, module, picture, trainer
from lightning.pytorch.strategies import DDPStrategy
from scenarios import OPTIMIZER, Scenario, check_trained_as_one
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MarginMSELoss
from test_collate import Letters
from torch import Tensor
from torch.utils.data import DataLoader

from vlmembed.data import ItemCollator
from vlmembed.losses import (
    BinaryCrossEntropy,
    InfoNCE,
    KLDivergence,
    Loss,
    MarginMSE,
    Matryoshka,
    ScoreDistillation,
    WeightedSum,
)
from vlmembed.losses.definition import defined_loss
from vlmembed.modules import ParityCheck
from vlmembed.modules.embedding import gather_batch
from vlmembed.types import Example

# Similarities over a temperature reach 20, in float32.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def scored_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries with different numbers of scored documents, one of them shared, and one document nobody scored."""
    nan = math.nan
    scores = torch.tensor(
        [
            [nan, 4.0, nan, -2.0, nan, 1.5, nan],
            [-6.0, nan, nan, nan, 3.0, nan, nan],
            [nan, 0.5, 2.5, -1.0, nan, 7.0, nan],
        ]
    )
    relevance = torch.zeros(3, 7, dtype=torch.int8)
    relevance[[0, 1, 2], [1, 4, 5]] = 1
    relevance[(relevance == 0) & ~scores.isnan()] = -1
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(count, 12, generator=generator) for count in (3, 7))
    return queries, documents, relevance, scores


def slow(queries: Tensor, documents: Tensor, scores: Tensor, temperature: float) -> tuple[float, float]:
    """Kullback-Leibler divergence at a teacher's temperature of 2, and margin-MSE: one query and pair at a time."""
    divergences, margins = [], []
    for query, row in zip(queries.double(), scores.double(), strict=True):
        found = [place for place, score in enumerate(row.tolist()) if not math.isnan(score)]
        cosines = [float(torch.cosine_similarity(query, documents[place].double(), dim=0)) for place in found]
        own = [cosine / temperature for cosine in cosines]
        teacher = [float(row[place]) for place in found]
        total, teachers_total = (
            math.log(sum(map(math.exp, logits))) for logits in (own, [score / 2 for score in teacher])
        )
        terms = [
            math.exp(wanted / 2 - teachers_total) * ((wanted / 2 - teachers_total) - (logit - total))
            for logit, wanted in zip(own, teacher, strict=True)
        ]
        divergences.append(sum(terms))
        squares = [
            ((own[one] - own[other]) - (teacher[one] - teacher[other])) ** 2
            for one in range(len(found))
            for other in range(one)
        ]
        margins.append(sum(squares) / len(squares))
    return sum(divergences) / len(divergences), sum(margins) / len(margins)


@pytest.mark.parametrize("dimensions", [[12], [12, 5]])
@pytest.mark.parametrize(("number", "loss"), [(0, KLDivergence(teacher_temperature=2.0)), (1, MarginMSE())])
def test_distillation_is_its_definition_at_every_dimension(number: int, loss: Any, dimensions: list[int]) -> None:
    queries, documents, relevance, scores = scored_batch()
    expected = sum(slow(queries[:, :each], documents[:, :each], scores, 0.1)[number] for each in dimensions)
    ours = Matryoshka(ScoreDistillation(loss, temperature=0.1), dimensions)
    assert float(ours(queries, documents, relevance, scores)) == pytest.approx(expected, rel=1e-5)


def columns() -> tuple[list[Tensor], Tensor]:
    """As Sentence Transformers has them: queries, and each column of documents; and a teacher's scores."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 12, generator=generator) for _ in range(4)], 3 * torch.randn(4, 3, generator=generator)


def ours_from(columns: list[Tensor], teachers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    queries, *documents = columns
    order = torch.randperm(12, generator=torch.Generator().manual_seed(7))
    scores = torch.full((4, 12), math.nan)
    for column, row in ((column, row) for column in range(3) for row in range(4)):
        scores[row, 4 * column + row] = teachers[row, column]
    return queries, torch.cat(documents)[order], torch.zeros(4, 12, dtype=torch.int8), scores[:, order]


def test_kl_divergence_equals_sentence_transformers() -> None:
    given, teachers = columns()
    ours, theirs = ([each.clone().requires_grad_() for each in given] for _ in range(2))
    loss = ScoreDistillation(KLDivergence(teacher_temperature=2.0), temperature=0.2)
    stock = DistillKLDivLoss(
        None, torch.nn.functional.cosine_similarity, student_temperature=0.2, teacher_temperature=2.0
    )
    value, expected = loss(*ours_from(ours, teachers)), stock.compute_loss_from_embeddings(theirs, teachers) / 0.2**2
    torch.testing.assert_close(value, expected, **CLOSE)
    for pair in zip(torch.autograd.grad(value, ours), torch.autograd.grad(expected, theirs), strict=True):
        torch.testing.assert_close(*pair, **CLOSE)


def test_margins_of_two_documents_equal_sentence_transformers() -> None:
    given, teachers = columns()
    loss = ScoreDistillation(MarginMSE(), temperature=0.1)
    scores = torch.cat([teachers[:, :2], torch.full((4, 1), math.nan)], dim=1)
    stock = MarginMSELoss(None, lambda one, other: torch.cosine_similarity(one, other) / 0.1)
    expected = stock.compute_loss_from_embeddings(given[:3], teachers[:, :2])
    torch.testing.assert_close(loss(*ours_from(given, scores)), expected, **CLOSE)


def test_documents_without_score_get_no_gradient() -> None:
    queries, documents, relevance, scores = scored_batch()
    documents.requires_grad_()
    ScoreDistillation()(queries, documents, relevance, scores).backward()
    assert documents.grad is not None
    assert documents.grad[:6].abs().amax(1).min() > 1e-4
    assert not documents.grad[6].any()


def test_similarities_are_float32_under_autocast() -> None:
    queries, documents, relevance, scores = scored_batch()
    half = queries.bfloat16(), documents.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = ScoreDistillation()(*half, relevance, scores)
    assert torch.equal(value, ScoreDistillation()(*(each.float() for each in half), relevance, scores))


def test_a_sum_is_the_sum_of_its_losses() -> None:
    queries, documents, relevance, scores = scored_batch()
    losses: list[Loss] = [Matryoshka(InfoNCE(0.1), [12, 4]), ScoreDistillation(MarginMSE()), InfoNCE(0.5)]
    summed = WeightedSum(losses, [1.0, 0.25, 2.0])
    expected = losses[0](queries, documents, relevance) + 2 * losses[2](queries, documents, relevance)
    expected = expected + 0.25 * losses[1](queries, documents, relevance, scores)
    torch.testing.assert_close(summed(queries, documents, relevance, scores), expected, **CLOSE)
    torch.testing.assert_close(defined_loss(summed, queries, documents, relevance, scores).float(), expected, **CLOSE)
    assert summed.dimensions == (12, 4)
    assert summed.wants_scores
    assert Matryoshka(summed, [12]).wants_scores
    assert not WeightedSum([InfoNCE()]).wants_scores
    assert not Matryoshka(InfoNCE(), [12]).wants_scores


def test_a_sum_trains_what_its_losses_learn() -> None:
    summed = WeightedSum([InfoNCE(learnable_temperature=True), ScoreDistillation()])
    summed(*scored_batch()).backward()
    (parameter,) = summed.parameters()
    assert parameter.grad is not None
    assert parameter.grad != 0


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one per loss \(1\), got \[1.0, 2.0\]"):
        WeightedSum([InfoNCE()], [1.0, 2.0])
    with pytest.raises(ValueError, match="one or more, got none"):
        WeightedSum([])
    with pytest.raises(ValueError, match="BinaryCrossEntropy wants labels"):
        ScoreDistillation(BinaryCrossEntropy())
    with pytest.raises(ValueError, match=r"temperature.*0\.0"):
        ScoreDistillation(temperature=0.0)
    with pytest.raises(ValueError, match="needs a teacher's scores"):
        ScoreDistillation()(*scored_batch()[:3])


# The batch


def scored(number: int, negatives: int = 2) -> Example:
    """A query, a picture or a text that answers it, and what does not; no two scores are the same."""
    query = item(f"query number {number}", role="query")
    answer = item(picture(32, 64, number)) if number % 2 else item(f"answer {number}")
    wrong = (*(item(f"wrong {number} {place}") for place in range(negatives - 1)), item("wrong for all"))
    return Example(
        query, (answer,), wrong, scores=(3.0 + number / 7, *(-1.0 - number - k / 3 for k in range(negatives)))
    )


ROWS = [scored(number, 1 + number % 3) for number in range(5)]


def check_scores(joined: tuple[Tensor, ...], rows: list[Example]) -> None:
    queries, documents, relevance, scores = joined
    query_ids = sorted({row.query.id for row in rows})
    document_ids = sorted({each.id for row in rows for each in (*row.positives, *row.negatives)})
    assert scores.shape == relevance.shape == (len(queries), len(documents)) == (len(query_ids), len(document_ids))
    expected = torch.full(scores.shape, math.nan)
    for row in rows:
        assert row.scores is not None
        for document, score in zip((*row.positives, *row.negatives), row.scores, strict=True):
            expected[query_ids.index(row.query.id), document_ids.index(document.id)] = score
    torch.testing.assert_close(scores, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(scores.isnan(), relevance == 0)


def test_a_batch_carries_the_scores_of_its_pairs() -> None:
    rows = [scored(number) for number in (0, 2, 4)]
    found = collated(ItemCollator(Letters(), True), rows, 2)
    assert found.scores is not None
    assert found.scores.shape == found.labels.shape
    check_scores(gather_batch(torch.zeros(len(found.queries) + len(found.documents), 3), found), rows)
    assert ItemCollator(Letters())([Example(rows[0].query, rows[0].positives)]).scores is None


def test_of_two_scores_for_a_pair_the_higher_counts() -> None:
    row = scored(0)
    other = Example(row.query, row.positives, row.negatives, scores=(9.0, -9.0, -9.0))
    for rows in ([row, other], [other, row]):
        found = ItemCollator(Letters(), True)(rows)
        assert found.scores is not None
        assert sorted(found.scores.tolist()) == pytest.approx([-4 / 3, -1.0, 9.0])


def test_rows_that_do_not_fit_the_loss_are_refused() -> None:
    query, right, wrong = item("q", role="query"), item("right"), item("wrong")
    asked = type(query)(query.role, query.parts, "rows.jsonl, row 3, column 'query'")
    with pytest.raises(ValueError, match=r"rows.jsonl, row 3.*there are none. Add a column 'scores'"):
        ItemCollator(Letters(), True)([Example(asked, (right,), (wrong,))])
    with pytest.raises(ValueError, match=r"rows.jsonl, row 3.*scores given but unused"):
        ItemCollator(Letters())([Example(asked, (right,), (wrong,), scores=(1.0, 0.0))])
    with pytest.raises(ValueError, match=r"rows.jsonl, row 3.*the row has one"):
        ItemCollator(Letters(), True)([Example(asked, (right,), scores=(1.0,))])


# Training


def combined() -> Loss:
    # Warm, as steps of a steep loss multiply what is rounded otherwise.
    distillation = ScoreDistillation(KLDivergence(teacher_temperature=2.0), temperature=0.5)
    return Matryoshka(WeightedSum([InfoNCE(0.2), distillation], [1.0, 0.5]), [64, 16])


def train(checkpoint: Path, rank: int | None, chunk_size: int | None) -> Recorder:
    """Train three steps as one of two processes, or alone."""
    steps = [([scored(step)], [scored(step + 1, 3), scored(step + 2, 1)]) for step in range(3)]

    def build(scenario: Scenario) -> Any:
        return module(checkpoint, scenario.loss, optimizer=OPTIMIZER)

    parallel = {} if rank is None else {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
    return Scenario(steps, combined()).train(build, rank, chunk_size, **parallel)


def train_as_one_of_two(checkpoint: Path, chunk_size: int) -> Recorder:
    return train(checkpoint, dist.get_rank(), chunk_size)


def test_two_processes_distil_as_one(checkpoint: Path) -> None:
    alone = train(checkpoint, None, None)
    check_trained_as_one(*ddp.run(train_as_one_of_two, checkpoint, 2), alone)


def test_the_step_of_a_distillation_is_its_gradient(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = module(checkpoint, combined())
    trainer(callbacks=[ParityCheck()]).fit(model, DataLoader([batch(model, ROWS, 2)], batch_size=None))
    assert "(ScoreDistillation is taken as it is)" in capsys.readouterr().out
