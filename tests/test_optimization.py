from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from building import batch, examples, fit, module, texts, trainer
from lightning import LightningDataModule, LightningModule
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from vlmembed.adapters import Freeze, LoRA
from vlmembed.losses import InfoNCE
from vlmembed.modules import EmbeddingModule
from vlmembed.modules.optimization import parameter_groups, total_steps
from vlmembed.pooling import Mean

# Parameter groups


def groups_of(model: EmbeddingModule, learning_rates: dict[str, float]) -> list[tuple[float | None, set[str]]]:
    """Each group's own rate, and the names in it; every trainable weight must be there once."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = parameter_groups(model, model.encoder.backbone, learning_rates)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(found) == len(names)
    assert set(found) == set(names)
    return [(group.get("lr"), {names[id(parameter)] for parameter in group["params"]}) for group in groups]


def test_one_rate_is_one_group(checkpoint: Path) -> None:
    ((rate, names),) = groups_of(module(checkpoint, InfoNCE(learnable_temperature=True)), {})
    assert rate is None
    assert "loss.log_scale" in names


def test_rates_of_named_groups(checkpoint: Path) -> None:
    model = module(checkpoint, InfoNCE(learnable_temperature=True))
    rest, vision, merger, language = groups_of(model, {"vision": 1e-5, "merger": 1e-4, "language": 1e-3})
    names = [name for name, _ in model.named_parameters()]
    assert rest == (None, {"loss.log_scale"})
    assert merger == (1e-4, {name for name in names if "merger" in name})
    assert vision == (1e-5, {name for name in names if "visual" in name and "merger" not in name})
    assert language == (1e-3, {name for name in names if "language_model" in name})


def test_first_matching_pattern_decides(checkpoint: Path) -> None:
    model = module(checkpoint)
    rest, second_layer, language = groups_of(model, {r"language_model\.layers\.1\.": 2.0, "language": 3.0})
    expected = {name for name, _ in model.named_parameters() if "language_model.layers.1." in name}
    assert second_layer == (2.0, expected)
    assert language[1] & expected == set()
    assert all("visual" in name for name in rest[1])


def test_groups_that_cover_everything_leave_no_empty_one(checkpoint: Path) -> None:
    groups = groups_of(module(checkpoint), {"vision": 1.0, "merger": 2.0, "language": 3.0})
    assert [rate for rate, _ in groups] == [1.0, 2.0, 3.0]


def test_rates_with_adapters(checkpoint: Path) -> None:
    lora = LoRA(LoraConfig(r=2, target_modules=["q_proj", "qkv"]))
    rest, vision = groups_of(module(checkpoint, adapters=[lora]), {"vision": 1.0})
    assert all("visual" in name and "lora" in name for name in vision[1])
    assert all("language_model" in name and "lora" in name for name in rest[1])


def test_rates_reach_the_optimizer(checkpoint: Path) -> None:
    model = module(checkpoint, optimizer=partial(SGD, lr=0.5), learning_rates={"vision": 0.25})
    assert [group["lr"] for group in model.configure_optimizers().param_groups] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("learning_rates", "frozen", "message"),
    [
        ({"nonsense": 1e-5}, [], "1e-05 for 'nonsense' applies to no trainable parameter"),
        ({"vision": 1e-5}, ["vision"], "1e-05 for 'vision' applies to no trainable parameter"),
        ({"language": 1e-4, "q_proj": 1e-5}, [], "1e-05 for 'q_proj' applies to no trainable parameter"),
        ({}, ["vision", "merger", "language"], "Nothing is trainable"),
    ],
)
def test_refused(checkpoint: Path, learning_rates: dict[str, float], frozen: list[str], message: str) -> None:
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


def test_steps_are_enough_where_epochs_have_no_known_length() -> None:
    """What the refusal advises works, with plain loaders too."""
    model, lightning = OneWeight(), trainer(max_epochs=None, max_steps=16)
    lightning.fit(model, Numbers().train_dataloader())
    assert model.expected_steps == lightning.global_step == 16


# What the loss does not reach


class MeanWithUnused(Mean):
    """Has a weight that it does not use."""

    def configure(self, hidden_size: int) -> None:
        self.unused = nn.Parameter(torch.zeros(hidden_size))


def test_a_weight_the_loss_does_not_reach_stops_the_run(checkpoint: Path) -> None:
    model = module(checkpoint, pooling=MeanWithUnused(), optimizer=partial(SGD, lr=0.01))
    with pytest.raises(RuntimeError, match=r"^1 trainable parameters .*encoder\.pooling\.unused"):
        fit(model, [batch(model, examples(4), 3)])


def test_texts_alone_do_not_blame_the_vision_tower(checkpoint: Path) -> None:
    model = module(checkpoint, pooling=MeanWithUnused(), optimizer=partial(SGD, lr=0.01))
    with pytest.raises(RuntimeError, match=r"^1 trainable parameters .*encoder\.pooling\.unused"):
        fit(model, [batch(model, texts(4), 3)])


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
