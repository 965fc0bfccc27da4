"""Checkpoints without what is frozen: small, and refused where something else is frozen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from building import module, trainer, write_rows
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import AdamW

from vlmembed.ablation.probe import Probe
from vlmembed.adapters import Freeze, LoRA
from vlmembed.backbones import tiny
from vlmembed.data import RetrievalDataModule
from vlmembed.losses import InfoNCE
from vlmembed.modules import EmbeddingModule
from vlmembed.training.checkpointing import FROZEN, Checkpointing, complete_frozen

FAST = partial(AdamW, lr=0.01)


def model(checkpoint: Path, targets: tuple[str, ...] = ("q_proj",)) -> EmbeddingModule:
    adapters = [LoRA(LoraConfig(r=2, target_modules=list(targets)))]
    return module(checkpoint, InfoNCE(0.05, learnable_temperature=True), adapters=adapters, optimizer=FAST)


def trained(built: EmbeddingModule, folder: Path, **options: Any) -> Path:
    """Train a little; return the checkpoint."""
    rows = write_rows(folder / "rows.jsonl")
    data = RetrievalDataModule(str(rows), batch_size=3, num_workers=0)
    saver = ModelCheckpoint(folder)
    trainer(enable_checkpointing=True, callbacks=[saver], **options).fit(built, datamodule=data)
    return Path(saver.best_model_path)


def load(built: EmbeddingModule, file: Path) -> None:
    built.checkpointing.load_weights(built, torch.load(file, weights_only=True))


def test_a_checkpoint_of_a_lora_has_the_lora_alone(checkpoint: Path, tmp_path: Path) -> None:
    built = model(checkpoint)
    file = trained(built, tmp_path)
    trainable = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert torch.load(file, weights_only=True)["state_dict"].keys() == trainable
    assert file.stat().st_size < (checkpoint / "model.safetensors").stat().st_size / 10


def test_a_fresh_model_takes_it_up(checkpoint: Path, tmp_path: Path) -> None:
    built = model(checkpoint)
    file = trained(built, tmp_path)
    fresh = model(checkpoint)
    load(fresh, file)
    expected = built.state_dict()
    assert fresh.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in fresh.state_dict().items())


def test_frozen_weights_are_rounded_as_they_were_in_training(checkpoint: Path, tmp_path: Path) -> None:
    built = model(checkpoint)
    file = trained(built, tmp_path, precision="bf16-true")
    fresh = model(checkpoint)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    load(fresh, file)
    name = next(name for name in built.checkpointing._sums if "embed_tokens" in name)
    used, loaded = built.state_dict()[name], fresh.state_dict()[name]
    assert used.dtype == torch.bfloat16
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, used.float())
    assert not torch.equal(loaded, before[name])


@pytest.mark.parametrize("command", ["fit", "test"])
def test_the_trainer_takes_it_up(checkpoint: Path, tmp_path: Path, command: str) -> None:
    built = model(checkpoint)
    file = trained(built, tmp_path)
    rows = str(tmp_path / "rows.jsonl")
    data = RetrievalDataModule(rows, test=rows, batch_size=3, num_workers=0)
    fresh = model(checkpoint)
    if command == "fit":
        trainer().fit(fresh, datamodule=data, ckpt_path=file)
        weights = fresh.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in built.state_dict().items())
    else:
        run = partial(trainer().test, datamodule=data, verbose=False)
        assert run(fresh, ckpt_path=file) == run(built)


def test_other_frozen_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = trained(model(checkpoint), tmp_path)
    tiny.create(tmp_path / "other", hidden_size=64, layers=2, heads=2, vision_hidden_size=32, vision_layers=2, seed=1)
    with pytest.raises(ValueError, match=r"was trained with other frozen weights: \d+ of them, such as encoder\."):
        trainer().fit(model(tmp_path / "other"), torch.utils.data.DataLoader([]), ckpt_path=file)


def test_other_adapters_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = trained(model(checkpoint), tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights: .* another model, or with other adapters"):
        load(model(checkpoint, ("q_proj", "v_proj")), file)


def test_weights_that_nobody_asks_for_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = trained(model(checkpoint), tmp_path)
    fixed = model(checkpoint)
    fixed.loss = InfoNCE(0.05)
    with pytest.raises(ValueError, match=r"has weights that this model lacks: 1 of them, such as loss\.log_scale"):
        load(fixed, file)


def test_a_probe_reads_the_lora_of_a_run(checkpoint: Path, tmp_path: Path) -> None:
    built = model(checkpoint)
    file = trained(built, tmp_path)
    probe = Probe(model(checkpoint), checkpoint=str(file))
    probe.configure_model()
    expected = built.encoder.backbone.state_dict()
    found = probe.model.encoder.backbone.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_all_weights_are_kept_where_all_are_trained(checkpoint: Path, tmp_path: Path) -> None:
    built = module(checkpoint)
    saved = torch.load(trained(built, tmp_path), weights_only=True)
    assert saved["state_dict"].keys() == built.state_dict().keys()
    assert FROZEN not in saved


def test_a_frozen_tower_is_left_out(checkpoint: Path, tmp_path: Path) -> None:
    built = module(checkpoint, adapters=[Freeze(["vision", "merger"])])
    saved = torch.load(trained(built, tmp_path), weights_only=True)
    assert saved["state_dict"].keys() | saved[FROZEN].keys() == built.state_dict().keys()
    assert all("visual" in name for name in saved[FROZEN])


class Parts(nn.Module):
    """Tied weights, running statistics, and a weight in four bits, which keeps its scales beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(2, 2, bias=False)
        self.normed = nn.BatchNorm1d(2).requires_grad_(False)
        self.tied = nn.Linear(2, 2, bias=False).requires_grad_(False)
        self.tied_too = self.tied

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().state_dict(*args, **kwargs), "tied.weight.quant_state.nf4": torch.ones(1)}


def test_what_goes_with_frozen_weights_is_left_out_and_what_changes_is_not() -> None:
    parts = Parts()
    checkpoint = {"state_dict": parts.state_dict()}
    checkpointing = Checkpointing()
    checkpointing.recognise_frozen(parts)
    checkpointing.save(parts, checkpoint)
    left = {"trained.weight", "normed.running_mean", "normed.running_var", "normed.num_batches_tracked"}
    assert checkpoint["state_dict"].keys() == left
    assert checkpoint["frozen"].keys() == {"normed.weight", "normed.bias", "tied.weight", "tied_too.weight"}
    assert complete_frozen(checkpoint, parts, checkpointing._sums) == checkpoint["state_dict"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_sum_changes_with_any_bit(dtype: torch.dtype, size: int) -> None:
    def sum_of(tensor: Tensor) -> int:
        part = nn.Module()
        part.register_parameter("weight", nn.Parameter(tensor, requires_grad=False))
        checkpointing = Checkpointing()
        checkpointing.recognise_frozen(part)
        return checkpointing._sums["weight"]

    tensor = (torch.rand(size) * 100).to(dtype)
    changed = tensor.clone()
    changed.view(torch.uint8)[-1] ^= 1
    assert sum_of(tensor) == sum_of(tensor.clone())
    assert sum_of(tensor) != sum_of(changed)
