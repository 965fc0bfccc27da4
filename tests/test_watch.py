"""Warnings of outputs that are all alike, and of a loss that stays at chance."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ddp
import pytest
import torch
from building import batch, examples, lists, module, ranker, ranking_batch, trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.optim import AdamW
from torch.utils.data import DataLoader

from vlmembed.losses import BinaryCrossEntropy, InfoNCE, Matryoshka, RankingLoss, ScoreDistillation, SoftmaxCrossEntropy
from vlmembed.modules import CosineDecay, RetrievalModule
from vlmembed.training import guards
from vlmembed.training.guards import CollapseMonitor, embedding_likeness, score_likeness

COLLAPSED, AT_CHANCE = "collapsed", "The loss is at chance"


# What is measured


def test_likeness_is_the_mean_cosine_of_two_embeddings() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(3, 8, generator=generator) + 1, 5 * torch.randn(4, 8, generator=generator)
    everything = [*queries, *documents]
    cosines = [
        cosine_similarity(one, other, dim=0) for place, one in enumerate(everything) for other in everything[:place]
    ]
    expected = torch.stack(cosines).mean()
    torch.testing.assert_close(embedding_likeness(queries, documents, torch.zeros(3, 4))[0], expected)
    same = torch.ones(3, 8).bfloat16()
    torch.testing.assert_close(embedding_likeness(same, 2 * same)[0], torch.tensor(1.0))


def test_likeness_of_scores_does_not_look_at_places_without_candidate() -> None:
    scores = torch.tensor([[30.0, 33.0], [36.0, math.nan]])
    mask = torch.tensor([[True, True], [True, False]])
    # Their mean is 33, and their standard deviation the square root of 6.
    torch.testing.assert_close(score_likeness(scores, scores, mask)[0], torch.tensor(1 - math.sqrt(6) / 33))
    torch.testing.assert_close(score_likeness(scores / 100, scores, mask)[0], torch.tensor(1 - math.sqrt(6) / 100))


#: Two queries with one right answer of three documents each.
RELEVANCE = torch.tensor([[1, 0, -1], [0, 1, 0]], dtype=torch.int8)


@pytest.mark.parametrize(
    ("loss", "scores", "expected"),
    [
        (InfoNCE(0.05), None, math.log(3)),
        (InfoNCE(0.05, learnable_temperature=True), None, math.log(3)),
        (Matryoshka(InfoNCE(0.02), [8, 4], [1.0, 0.5]), None, 1.5 * math.log(3)),
        # The teacher prefers one of two by log 3, so it gives them shares of 3/4 and 1/4.
        (
            ScoreDistillation(),
            torch.tensor([[math.log(3), math.nan, 0.0], [0.0, 0.0, math.nan]]),
            (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2,
        ),
    ],
    ids=["InfoNCE", "learnable temperature", "Matryoshka", "distillation"],
)
def test_chance_is_the_loss_of_equal_embeddings(loss: nn.Module, scores: Tensor | None, expected: float) -> None:
    teacher = () if scores is None else (scores,)
    given = (torch.randn(2, 8), torch.randn(3, 8), RELEVANCE, *teacher)
    with torch.no_grad():
        assert float(loss(*embedding_likeness(*given)[1])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (SoftmaxCrossEntropy(), math.log(4)),
        # A score whose sigmoid is the share of right answers is the best that knows nothing else.
        (BinaryCrossEntropy(), -0.25 * math.log(0.25) - 0.75 * math.log(0.75)),
    ],
)
def test_chance_is_the_loss_of_equal_scores(loss: RankingLoss, expected: float) -> None:
    scores = math.log(1 / 3) + torch.tensor([[0.5, -0.5, 0.2, -0.2], [-0.7, 0.7, 0.0, 0.0]])
    targets = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    given = score_likeness(scores, targets, torch.ones(2, 4, dtype=torch.bool))[1]
    assert float(loss(*given)) == pytest.approx(expected, rel=1e-5)


# What is said


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge every two steps."""
    monkeypatch.setattr(guards, "EVERY", 1)
    monkeypatch.setattr(guards, "LOOKS", 2)


def said(model: RetrievalModule, data: list[Any], epochs: int | None = 1, **options: Any) -> list[str]:
    """Train, and return what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_epochs=epochs, **options).fit(model, DataLoader(data, batch_size=None))
    return [str(each.message) for each in caught if "Likely causes" in str(each.message)]


def flatten(model: RetrievalModule, spread: float) -> None:
    """Have the encoder say about the same of everything."""
    model.encoder.register_forward_hook(lambda *given: 1 + spread * given[-1])


def batches(model: Any) -> list[Any]:
    rows = examples(12)
    return [batch(model, rows[start : start + 4], 3) for start in (0, 4, 8)]


def test_collapse_is_said_once(checkpoint: Path) -> None:
    model = module(checkpoint, InfoNCE(1.0))
    flatten(model, 1e-4)
    found = said(model, batches(model), epochs=4)
    assert len(found) == 2
    assert COLLAPSED in found[0]
    assert "was 1.0000 of 1" in found[0]
    assert AT_CHANCE in found[1]
    assert "(0.001 now)" in found[1]


def test_a_loss_with_nothing_to_learn_from_is_said_at_once(checkpoint: Path) -> None:
    """One row in a batch, and rows whose documents are all the same: even while the learning rate rises."""
    rows = examples(3)[:2]
    same = [replace(row, positives=rows[0].positives[:1], negatives=()) for row in rows]
    for batch_rows in (same[:1], same):
        model = module(checkpoint, lr_scheduler=lambda optimizer: CosineDecay(optimizer, 12, warmup=0.9))
        with pytest.warns(UserWarning, match=r"The loss was exactly 0 over the last 2 steps.*no query has a negative"):
            trainer(max_epochs=None, max_steps=2).fit(
                model, DataLoader([batch(model, batch_rows)] * 2, batch_size=None)
            )


def test_a_healthy_run_is_not_warned(checkpoint: Path) -> None:
    model = module(checkpoint, InfoNCE(0.05), optimizer=partial(AdamW, lr=3e-3))
    assert not said(model, batches(model), epochs=4)
    other = ranker(checkpoint, SoftmaxCrossEntropy(), optimizer=partial(AdamW, lr=3e-3))
    assert not said(other, [ranking_batch(other, lists(4), 3)] * 3, epochs=4)


def test_nothing_is_judged_while_the_rate_rises(checkpoint: Path) -> None:
    model = module(checkpoint, InfoNCE(1.0), lr_scheduler=lambda optimizer: CosineDecay(optimizer, 12, warmup=0.9))
    flatten(model, 1e-4)
    assert not said(model, batches(model), epochs=None, max_steps=9)


def test_scores_that_are_all_alike_are_named(checkpoint: Path) -> None:
    model = ranker(checkpoint, BinaryCrossEntropy())
    flatten(model, 1e-4)
    found = said(model, [ranking_batch(model, lists(4), 3)] * 6)
    assert [COLLAPSED in sentence for sentence in found] == [True, False]
    assert "Scores have collapsed" in found[0]


def test_it_is_said_again_after_it_was_better() -> None:
    watched, said = CollapseMonitor.of_embeddings(), []
    fitting: Any = SimpleNamespace(
        trainer=SimpleNamespace(
            optimizers=[SimpleNamespace(param_groups=[{"lr": 0.0}])],
            precision_plugin=SimpleNamespace(train_step_context=lambda: warnings.catch_warnings()),
        )
    )
    far, near = torch.eye(4), torch.ones(4, 4)
    for step, documents in enumerate([near, near, near, near, far, far, near, near]):
        queries = documents[:2]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watched.note(step, (queries, documents, torch.eye(2, 4, dtype=torch.int8)), torch.tensor(0.1))
            watched.check(fitting, InfoNCE())
        said.append(len(caught))
    assert said == [0, 1, 0, 0, 0, 0, 0, 1]


class Queue(InfoNCE):
    """Remembers how often it was asked."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.register_buffer("asked", torch.tensor(0))

    def forward(self, *given: Tensor) -> Tensor:
        self.asked += 1
        return super().forward(*given)


def test_a_loss_that_remembers_is_not_asked_for_chance(checkpoint: Path) -> None:
    model = module(checkpoint, Queue())
    flatten(model, 1e-4)
    (sentence,) = said(model, batches(model), epochs=2)
    assert COLLAPSED in sentence
    assert int(model.loss.asked) == 6


class Dice(InfoNCE):
    """Draws a number whenever it is asked."""

    def forward(self, *given: Tensor) -> Tensor:
        return super().forward(*given) + 0 * torch.rand(())


def test_looking_draws_no_random_number(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for every in (1, 1000):
        monkeypatch.setattr(guards, "EVERY", every)
        torch.manual_seed(0)
        model = module(checkpoint, Dice())
        said(model, batches(model))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def collapse_together(checkpoint: Path) -> list[str]:
    guards.EVERY, guards.LOOKS = 1, 2
    model = module(checkpoint, InfoNCE(1.0))
    flatten(model, 1e-4)
    data = batches(model)[torch.distributed.get_rank() :]
    return said(model, data[:2] * 2, devices=2, strategy=DDPStrategy(process_group_backend="gloo"))


def test_one_process_speaks_for_all(checkpoint: Path) -> None:
    first, second = ddp.run(collapse_together, checkpoint)
    assert len(first) == 2
    assert not second
