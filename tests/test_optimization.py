"""Which parameters learn, at which rate, on which schedule, over how many steps; and what the loss does not reach."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from building import batch, examples, fit, module, texts, trainer
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers import (
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_scheduler,
    get_wsd_schedule,
)

from vlmembed.adapters import Freeze, LoRA
from vlmembed.backbones import Qwen3VL
from vlmembed.cli import Parser
from vlmembed.losses import InfoNCE
from vlmembed.modules import Constant, CosineDecay, EmbeddingModule, LinearDecay
from vlmembed.modules.optimization import SchedulerCallable, build_schedule, parameter_groups, total_steps
from vlmembed.pooling import Mean

SCHEDULES = [LinearDecay, CosineDecay, Constant]

# Parameter groups


def groups_of(model: EmbeddingModule, learning_rates: dict[str, float]) -> list[tuple[float | None, set[str]]]:
    """Each group's own rate, and the names in it; every trainable weight must be there once."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = parameter_groups(model, model.encoder.backbone, learning_rates)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(found) == len(names)
    assert set(found) == set(names)
    return [(group.get("lr"), {names[id(parameter)] for parameter in group["params"]}) for group in groups]


def test_rates_of_named_groups(checkpoint: Path) -> None:
    model = module(checkpoint, InfoNCE(learnable_temperature=True))
    ((rate, names),) = groups_of(model, {})
    assert rate is None
    assert "loss.log_scale" in names
    rest, vision, merger, language = groups_of(model, {"vision": 1e-5, "merger": 1e-4, "language": 1e-3})
    assert rest == (None, {"loss.log_scale"})
    assert merger == (1e-4, {name for name in names if "merger" in name})
    assert vision == (1e-5, {name for name in names if "visual" in name and "merger" not in name})
    assert language == (1e-3, {name for name in names if "language_model" in name})
    # Groups that cover everything leave no empty one.
    without = groups_of(module(checkpoint), {"vision": 1.0, "merger": 2.0, "language": 3.0})
    assert [rate for rate, _ in without] == [1.0, 2.0, 3.0]


def test_first_matching_pattern_decides(checkpoint: Path) -> None:
    model = module(checkpoint)
    rest, second_layer, language = groups_of(model, {r"language_model\.layers\.1\.": 2.0, "language": 3.0})
    expected = {name for name, _ in model.named_parameters() if "language_model.layers.1." in name}
    assert second_layer == (2.0, expected)
    assert language[1] & expected == set()
    assert all("visual" in name for name in rest[1])


def test_rates_with_adapters(checkpoint: Path) -> None:
    lora = LoRA(LoraConfig(r=2, target_modules=["q_proj", "qkv"]))
    rest, vision = groups_of(module(checkpoint, adapters=[lora]), {"vision": 1.0})
    assert all("visual" in name and "lora" in name for name in vision[1])
    assert all("language_model" in name and "lora" in name for name in rest[1])


@pytest.mark.parametrize(
    ("learning_rates", "frozen", "message"),
    [
        ({"nonsense": 1e-5}, [], "1e-05 for 'nonsense' applies to no trainable parameter"),
        ({"vision": 1e-5}, ["vision"], "1e-05 for 'vision' applies to no trainable parameter"),
        ({"language": 1e-4, "q_proj": 1e-5}, [], "1e-05 for 'q_proj' applies to no trainable parameter"),
        ({}, ["vision", "merger", "language"], "Nothing is trainable"),
    ],
)
def test_rates_of_nothing_are_refused(
    checkpoint: Path, learning_rates: dict[str, float], frozen: list[str], message: str
) -> None:
    model = module(checkpoint, adapters=[Freeze(frozen)] if frozen else [])
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, model.encoder.backbone, learning_rates)


# The length of a run


class Numbers(LightningDataModule):
    """Seven batches."""

    steps_per_epoch = 7

    def train_dataloader(self) -> DataLoader:
        return DataLoader([torch.ones(1)] * self.steps_per_epoch, batch_size=None)


class OneWeight(LightningModule):
    """Asks for the length of the run where a module does: while its optimizers are built."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def configure_optimizers(self) -> Optimizer:
        self.expected_steps = total_steps(self.trainer)
        return SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).sum()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 5, "max_epochs": -1}, 5),
        ({"max_steps": 16, "max_epochs": None}, 16),
        ({"max_epochs": 2}, 14),
        ({"max_epochs": 3, "max_steps": 4}, 4),
        ({"max_epochs": 1, "max_steps": 100}, 7),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
        ({"max_epochs": 2, "limit_train_batches": 100}, 14),
        ({"max_epochs": 2, "limit_train_batches": 1}, 2),
        ({"max_epochs": 2, "limit_train_batches": 1.0}, 14),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.75, "accumulate_grad_batches": 2}, 6),
        ({"max_epochs": 3, "callbacks": [GradientAccumulationScheduler({0: 3, 1: 2})]}, 3 + 4 + 4),
        ({"fast_dev_run": True}, 1),
    ],
)
def test_total_steps_are_the_steps_taken(options: dict[str, Any], steps: int) -> None:
    model, lightning = OneWeight(), trainer(**options)
    lightning.fit(model, datamodule=Numbers())
    assert model.expected_steps == lightning.global_step == steps


def test_a_schedule_for_an_endless_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_epochs or max_steps"):
        trainer(max_epochs=-1).fit(OneWeight(), datamodule=Numbers())


@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_epochs": 2, "max_steps": 5}])
def test_epochs_of_unknown_length_are_refused(options: dict[str, Any]) -> None:
    loader = Numbers().train_dataloader()
    lacking = LightningDataModule.from_datasets(loader.dataset)
    advice = "steps_per_epoch.*or set trainer.max_steps and leave trainer.max_epochs unset"
    with pytest.raises(ValueError, match=f"the data module LightningDataModule does not say how many.*{advice}"):
        trainer(**options).fit(OneWeight(), datamodule=lacking)
    with pytest.raises(ValueError, match=f"a fit without a data module does not say how many.*{advice}"):
        trainer(**options).fit(OneWeight(), loader)


# Schedules


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


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        (LinearDecay, 0.3, [1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        (CosineDecay, 0.2, [1 / 2, 1, *((1 + math.cos(math.pi * step / 8)) / 2 for step in range(8))]),
        (Constant, 0.5, [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_schedules_by_hand(schedule: Any, warmup: float, expected: list[float]) -> None:
    assert rates(schedule, 10, warmup=warmup) == pytest.approx(expected)


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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_a_share_and_no_step_is_wasted(schedule: Any) -> None:
    for warmup in (0.0, 0.01, 0.5, 1.0):
        assert all(0 < rate <= 1 for rate in rates(schedule, 10, warmup=warmup))
    for warmup in (-0.1, 1.5, 100):
        with pytest.raises(ValueError, match=f"between 0 and 1; got {warmup}"):
            rates(schedule, 10, warmup=warmup)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_run_continues_where_it_was_and_takes_its_own_length(schedule: Any, tmp_path: Path) -> None:
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


# Schedules that the YAML names

TORCH = "torch.optim.lr_scheduler."
WARM_AND_COOL = [{"class_path": f"{TORCH}LinearLR"}, {"class_path": f"{TORCH}CosineAnnealingLR"}]
FALLING = {"class_path": f"{TORCH}ExponentialLR", "init_args": {"gamma": 0.9}}


def from_yaml(class_path: str, arguments: dict[str, Any]) -> SchedulerCallable:
    parser = Parser()
    parser.add_argument("--schedule", type=SchedulerCallable)
    values = {"schedule": {"class_path": class_path, "init_args": arguments}}
    made: SchedulerCallable = parser.instantiate(parser.parse_object(values)).schedule
    return made


@pytest.mark.parametrize(
    ("name", "arguments", "by_hand"),
    [
        ("CosineAnnealingLR", {}, lambda it: schedules.CosineAnnealingLR(it, 12)),
        ("CosineAnnealingLR", {"T_max": 5}, lambda it: schedules.CosineAnnealingLR(it, 5)),
        ("PolynomialLR", {"power": 2.0}, lambda it: schedules.PolynomialLR(it, 12, 2.0)),
        # What is written counts, even where it is torch's default.
        ("PolynomialLR", {"total_iters": 5}, lambda it: schedules.PolynomialLR(it, 5)),
        ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0}, lambda it: schedules.LinearLR(it, 1.0, 0.0, 12)),
        ("ConstantLR", {"factor": 0.5, "total_iters": 4}, lambda it: schedules.ConstantLR(it, 0.5, 4)),
        ("OneCycleLR", {"max_lr": 0.5}, lambda it: schedules.OneCycleLR(it, 0.5, 12)),
        ("OneCycleLR", {"max_lr": 0.5, "total_steps": 20}, lambda it: schedules.OneCycleLR(it, 0.5, 20)),
        ("OneCycleLR", {"max_lr": 0.5, "epochs": 3}, lambda it: schedules.OneCycleLR(it, 0.5, 18)),
        ("MultiStepLR", {"milestones": [3, 6]}, lambda it: schedules.MultiStepLR(it, [3, 6])),
        ("CosineAnnealingWarmRestarts", {"T_0": 4}, lambda it: schedules.CosineAnnealingWarmRestarts(it, 4)),
        ("LambdaLR", {"lr_lambda": "math.sqrt"}, lambda it: schedules.LambdaLR(it, math.sqrt)),
        (
            "SequentialLR",
            {"schedulers": WARM_AND_COOL, "milestones": [3]},
            lambda it: schedules.SequentialLR(
                it, [schedules.LinearLR(it, total_iters=3), schedules.CosineAnnealingLR(it, 9)], [3]
            ),
        ),
        (
            "ChainedScheduler",
            {"schedulers": [{"class_path": f"{TORCH}PolynomialLR"}, FALLING]},
            lambda it: schedules.ChainedScheduler(
                [schedules.PolynomialLR(it, 12), schedules.ExponentialLR(it, 0.9)], optimizer=it
            ),
        ),
        (
            "transformers.get_linear_schedule_with_warmup",
            {"num_warmup_steps": 3},
            lambda it: get_linear_schedule_with_warmup(it, 3, 12),
        ),
        (
            "transformers.get_cosine_schedule_with_warmup",
            {"num_warmup_steps": 3, "num_training_steps": 8},
            lambda it: get_cosine_schedule_with_warmup(it, 3, 8),
        ),
        (
            "transformers.get_wsd_schedule",
            {"num_warmup_steps": 2, "num_decay_steps": 4},
            lambda it: get_wsd_schedule(it, 2, 4, 12),
        ),
        (
            "transformers.get_scheduler",
            {"name": "polynomial", "num_warmup_steps": 2},
            lambda it: get_scheduler("polynomial", it, 2, 12),
        ),
    ],
)
def test_a_schedule_has_the_arguments_of_the_yaml_and_the_steps_of_the_run(
    name: str, arguments: dict[str, Any], by_hand: Any
) -> None:
    """Steps go to the parameter that means them, where it is left out."""
    schedule = from_yaml(name if "." in name else TORCH + name, arguments)
    run: Any = SimpleNamespace(max_epochs=2, max_steps=-1, datamodule=Numbers(), limit_train_batches=6, callbacks=[])
    run.accumulate_grad_batches = 1
    ours = rates(lambda optimizer, _: build_schedule(schedule, optimizer, run), 12)
    assert ours == pytest.approx(rates(lambda optimizer, _: by_hand(optimizer), 12))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ReduceLROnPlateau, "ReduceLROnPlateau goes by a metric"),
        (partial(get_scheduler, "reduce_lr_on_plateau"), "ReduceLROnPlateau goes by a metric"),
        (partial(schedules.LambdaLR, lr_lambda=math.sqrt), "LambdaLR cannot be written into a checkpoint"),
        (from_yaml(f"{TORCH}SequentialLR", {"schedulers": WARM_AND_COOL, "milestones": [3, 6]}), "need 1 milestones"),
        (partial(schedules.OneCycleLR, max_lr=1.0, pct_start=2.0), "pct_start"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_before_weights_are_loaded(schedule: Any, message: str) -> None:
    model = EmbeddingModule(Qwen3VL("nowhere"), Mean(), InfoNCE(), lr_scheduler=schedule)
    with pytest.raises(ValueError, match=message):
        trainer(max_epochs=-1, max_steps=8).fit(model, DataLoader([]))


# What the loss does not reach


class MeanWithUnused(Mean):
    """Has a weight that it does not use."""

    def configure(self, hidden_size: int) -> None:
        self.unused = nn.Parameter(torch.zeros(hidden_size))


@pytest.mark.parametrize("rows", [examples(4), texts(4)], ids=["images", "texts alone"])
def test_a_weight_the_loss_does_not_reach_stops_the_run(checkpoint: Path, rows: list[Any]) -> None:
    """Texts alone do not blame the vision tower."""
    model = module(checkpoint, pooling=MeanWithUnused(), optimizer=partial(SGD, lr=0.01))
    with pytest.raises(RuntimeError, match=r"^1 trainable parameters .*encoder\.pooling\.unused"):
        fit(model, [batch(model, rows, 3)])


def test_the_vision_tower_is_checked_when_the_first_picture_comes(checkpoint: Path) -> None:
    model = module(checkpoint, optimizer=partial(SGD, lr=0.01))
    visual = model.encoder.backbone.model.visual
    assert isinstance(visual, nn.Module)
    visual.unused = nn.Parameter(torch.zeros(1))
    fit(model, [batch(model, texts(4))])
    with pytest.raises(RuntimeError, match=r"^1 trainable parameters got no gradient from this batch.*visual\.unused"):
        fit(model, [batch(model, texts(4)), batch(model, examples(4))])


def test_a_fit_that_reaches_everything_goes_on(checkpoint: Path) -> None:
    """Texts first, then pictures, then texts, after which nobody asks again."""
    model = module(checkpoint, optimizer=partial(SGD, lr=0.01))
    steps = [batch(model, texts(4)), batch(model, examples(4)), batch(model, texts(3))]
    assert len(fit(model, steps).losses) == 3
