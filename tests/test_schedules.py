from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from building import batch, examples, fit, module, trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, PolynomialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from vlmembed.modules import Constant, CosineDecay, LinearDecay


def rates(schedule: Any, total: int, **options: Any) -> list[float]:
    """The learning rate of each step, the optimizer's own being 1."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler: LRScheduler = schedule(optimizer, total, **options)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_linear_decay_by_hand() -> None:
    expected = [1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    assert rates(LinearDecay, 10, warmup=0.3) == pytest.approx(expected)


def test_cosine_decay_by_hand() -> None:
    decayed = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates(CosineDecay, 10, warmup=0.2) == pytest.approx([1 / 2, 1, *decayed])


def test_constant_by_hand() -> None:
    assert rates(Constant, 8, warmup=0.5) == pytest.approx([1 / 4, 1 / 2, 3 / 4, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("warmup", [0, 3, 5, 20])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(LinearDecay, get_linear_schedule_with_warmup), (CosineDecay, get_cosine_schedule_with_warmup)],
)
def test_decays_are_those_of_transformers_one_step_ahead_in_the_warmup(ours: Any, theirs: Any, warmup: int) -> None:
    """Theirs spends its first step at a rate of zero."""
    expected = rates(lambda optimizer, total: theirs(optimizer, warmup, total), 20)
    assert rates(ours, 20, warmup=warmup / 20)[warmup:] == pytest.approx(expected[warmup:], abs=1e-12)
    assert rates(ours, 20, warmup=warmup / 20)[:warmup] == pytest.approx([*expected[1:warmup], 1.0][:warmup])


@pytest.mark.parametrize("schedule", [LinearDecay, CosineDecay, Constant])
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.5, 1.0])
def test_no_step_is_wasted(schedule: Any, warmup: float) -> None:
    assert all(0 < rate <= 1 for rate in rates(schedule, 10, warmup=warmup))


@pytest.mark.parametrize("schedule", [LinearDecay, CosineDecay, Constant])
@pytest.mark.parametrize("warmup", [-0.1, 1.5, 100])
def test_warmup_is_a_share(schedule: Any, warmup: float) -> None:
    with pytest.raises(ValueError, match=f"between 0 and 1; got {warmup}"):
        rates(schedule, 10, warmup=warmup)


@pytest.mark.parametrize("schedule", [LinearDecay, CosineDecay, Constant])
def test_a_resumed_run_goes_on_at_its_place_and_takes_its_own_length(schedule: Any, tmp_path: Path) -> None:
    """What a checkpoint keeps is how many steps were taken; a run that is resumed to be longer decays later."""
    optimizers = [SGD([nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2)]
    short, longer = schedule(optimizers[0], 10, warmup=0.2), schedule(optimizers[1], 20, warmup=0.2)
    for _ in range(7):
        optimizers[0].step()
        short.step()
    torch.save(short.state_dict(), tmp_path / "schedule.pt")
    longer.load_state_dict(torch.load(tmp_path / "schedule.pt", weights_only=True))
    optimizers[1].step()
    longer.step()
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(rates(schedule, 20, warmup=0.2)[8])


def test_the_first_step_trains_at_the_schedule_rate(checkpoint: Path) -> None:
    """The rate of a fit's first step is what it moved, over the gradient."""
    schedule = partial(LinearDecay, warmup=0.5)
    model = module(checkpoint, optimizer=partial(SGD, lr=0.1), lr_scheduler=schedule)
    run = fit(model, [batch(model, examples(4))], max_epochs=-1, max_steps=8)
    name = "encoder.backbone.model.language_model.embed_tokens.weight"
    moved, gradient = run.update(1)[name], run.gradients[0][name].double()
    # Weights are float32: what they moved by is rounded.
    torch.testing.assert_close(moved, -0.1 / 4 * gradient, rtol=0, atol=1e-7)
    assert gradient.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (partial(OneCycleLR, max_lr=0.5), "total_steps"),
        (partial(PolynomialLR, total_iters=3), None),
        (partial(CosineAnnealingLR, T_max=5), None),
        (CosineAnnealingLR, "T_max"),
        (partial(CosineDecay, warmup=0.5), "total"),
    ],
)
def test_any_schedule_gets_the_steps_where_a_parameter_means_them(checkpoint: Path, schedule: Any, steps: Any) -> None:
    model = module(checkpoint, optimizer=partial(SGD, lr=0.1), lr_scheduler=schedule)
    seen: list[Any] = []
    record = LambdaCallback(on_train_start=lambda run, _: seen.append(run.lr_scheduler_configs[0].scheduler))
    trainer(max_epochs=-1, max_steps=8, callbacks=[record]).fit(
        model, DataLoader([batch(model, examples(4))] * 8, batch_size=None)
    )
    if steps in ("total_steps", "T_max"):
        assert getattr(seen[0], steps) == 8
    if isinstance(seen[0], OneCycleLR):
        assert max(group["max_lr"] for group in seen[0].optimizer.param_groups) == 0.5
    if isinstance(seen[0], CosineAnnealingLR) and steps is None:
        assert seen[0].T_max == 5


def test_a_schedule_that_goes_by_a_metric_is_refused(checkpoint: Path) -> None:
    model = module(checkpoint, lr_scheduler=ReduceLROnPlateau)
    with pytest.raises(ValueError, match="ReduceLROnPlateau goes by a metric"):
        fit(model, [batch(model, examples(4))], max_epochs=-1, max_steps=8)
