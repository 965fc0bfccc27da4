from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from building import Recorder, batch, examples, fit, module, relative_difference, trainer, write_rows
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig
from torch.optim import SGD

from vlmembed.adapters import LoRA
from vlmembed.data import RetrievalDataModule
from vlmembed.losses import InfoNCE, Matryoshka
from vlmembed.metrics import METRICS

OPTIMIZER = partial(SGD, lr=0.01)

# Training in chunks


def train(checkpoint: Path, chunk_size: int | None, **options: Any) -> Recorder:
    """Train on two batches of five examples each."""
    loss = Matryoshka(InfoNCE(0.05, learnable_temperature=True), [64, 16])
    model = module(checkpoint, loss, optimizer=OPTIMIZER)
    assert model.automatic_optimization
    rows = examples(10)
    return fit(model, [batch(model, rows[start : start + 5], chunk_size) for start in (0, 5)], **options)


#: Chunks change the order of float32 sums. bfloat16 keeps 8 bits, so two sums in another order differ by up to 1/256
#: where they are stored, layer after layer, and a small temperature multiplies what the embeddings differ by.
@pytest.mark.parametrize(
    ("options", "steps", "tolerance"),
    [
        pytest.param({}, 2, 1e-5, id="plain"),
        pytest.param({"accumulate_grad_batches": 2}, 1, 1e-5, id="accumulation"),
        pytest.param({"gradient_clip_val": 0.5}, 2, 1e-5, id="clipping"),
        pytest.param({"precision": "bf16-mixed"}, 2, 2e-2, id="bf16-mixed"),
    ],
)
def test_chunks_train_as_one(checkpoint: Path, options: dict[str, Any], steps: int, tolerance: float) -> None:
    whole = train(checkpoint, None, **options)
    assert len(whole.gradients) == steps
    for chunk_size in (1, 4):
        found = train(checkpoint, chunk_size, **options)
        assert found.losses == pytest.approx(whole.losses, rel=tolerance)
        assert relative_difference(found.gradients[0], whole.gradients[0]) < tolerance
        assert relative_difference(found.update(steps), whole.update(steps)) < tolerance
        assert whole.update(steps)["loss.loss.log_scale"] != 0


def test_both_passes_run_in_the_trainer_precision(checkpoint: Path) -> None:
    """The tolerance of bfloat16 above would not notice a second pass in float32."""
    model = module(checkpoint, optimizer=OPTIMIZER)
    precisions = []
    model.encoder.register_forward_pre_hook(lambda *_: precisions.append(torch.is_autocast_enabled("cpu")))
    data = batch(model, examples(5), 4)
    fit(model, [data], precision="bf16-mixed")
    assert precisions == [True] * (2 * len(data.chunks) - 1)


def test_a_temperature_learns_in_finer_steps_than_bfloat16_weights(checkpoint: Path) -> None:
    """It starts at log 20, where bfloat16 numbers are 1/64 apart."""
    weights = train(checkpoint, 4, precision="bf16-true").weights
    assert weights[2]["encoder.backbone.model.language_model.embed_tokens.weight"].dtype == torch.bfloat16
    first, second = (weights[step]["loss.loss.log_scale"] for step in (1, 2))
    assert first.dtype == torch.float32
    assert 0 < (second - first).abs() < 1 / 128


# Configuring


def test_a_dimension_above_the_embedding_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"truncates to \[128, 96\] dimensions, and the model's vectors have 64"):
        module(checkpoint, Matryoshka(InfoNCE(), [32, 128, 96, 64]))


def test_configuring_twice_changes_nothing(checkpoint: Path) -> None:
    model = module(checkpoint, adapters=[LoRA(LoraConfig(r=2, target_modules=["q_proj"]))])
    before = dict(model.named_parameters())
    model.configure_model()
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


# What is logged


def test_names_in_metrics_csv(checkpoint: Path, tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    data = RetrievalDataModule(rows, rows, batch_size=4, chunk_size=3, num_workers=0)
    model = module(checkpoint, Matryoshka(InfoNCE(), [64, 8]), optimizer=OPTIMIZER)
    trainer(logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1).fit(model, datamodule=data)
    with (tmp_path / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    found = {name: [line[name] for line in lines if line[name]] for name in lines[0]}
    metrics = {f"val/{name}{suffix}" for name in METRICS for suffix in ("", "/64", "/8")}
    assert {"val/ndcg@10", "val/recall@1", "val/recall@10", "val/mrr@10", "val/map", "val/ndcg@10/8"} <= metrics
    assert found.keys() == metrics | {"train/loss", "epoch", "step"}
    assert len(found["train/loss"]) == 2
    assert found["val/ndcg@10"] == found["val/ndcg@10/64"]
    assert all(len(found[name]) == 1 and 0 <= float(found[name][0]) <= 1 for name in metrics)
