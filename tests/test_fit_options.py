"""What a fit does with options of Lightning's trainer that would lose gradients, models or time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from building import batch, examples, fit, module, relative_difference, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD

from vlmembed.training.checkpoint_files import newest_checkpoint
from vlmembed.training.checkpointing import refuse_split_windows


def test_a_window_that_the_epoch_cuts_short_is_the_mean_of_its_batches(checkpoint: Path) -> None:
    rows = examples(8)

    def step(window: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = module(checkpoint, optimizer=partial(SGD, lr=0.01))
        batches = [batch(model, rows[start : start + 2]) for start in range(0, 8, 2)]
        recorder = fit(model, batches, accumulate_grad_batches=window)
        assert len(recorder.gradients) == 1
        return recorder.gradients[0]

    assert relative_difference(step(8), step(4)) < 1e-5


def test_a_validation_between_batches_of_a_window_is_refused() -> None:
    for interval, batches in ((3, 8), (0.375, 8)):
        with pytest.raises(ValueError, match=r"accumulate_grad_batches 2: .* Let it be a multiple of 2"):
            refuse_split_windows(trainer(accumulate_grad_batches=2, val_check_interval=interval), batches)
    for interval in (4, 1.0, 0.5):
        refuse_split_windows(trainer(accumulate_grad_batches=2, val_check_interval=interval), 8)


def test_keeping_the_worst_model_is_refused(tmp_path: Path) -> None:
    options = {"enable_checkpointing": True}
    with pytest.raises(ValueError, match=r"mode: min, .* Add mode: max"):
        trainer(callbacks=[ModelCheckpoint(tmp_path, monitor="val/ndcg@10")], **options)
    trainer(callbacks=[ModelCheckpoint(tmp_path, monitor="val/ndcg@10", mode="max")], **options)


def test_a_checkpoint_whose_name_has_a_slash_is_found(tmp_path: Path) -> None:
    path = tmp_path / "0-3-val" / "ndcg@10=0.500.ckpt"
    path.parent.mkdir()
    torch.save({"optimizer_states": [], "global_step": 3}, path)
    newest = newest_checkpoint([tmp_path])
    assert newest is not None
    assert newest[0] == path
