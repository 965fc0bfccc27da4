"""Two processes through Lightning's trainer are one process with the examples of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ddp
import pytest
import torch
import torch.distributed as dist
from building import Recorder, module, trainer, write_rows
from scenarios import (
    CLIP,
    LORA,
    OPTIMIZER,
    Scenario,
    check_clipping,
    check_trained_as_one,
    learnable,
    losses,
    mixed_steps,
    several_losses,
    split_steps,
)

from vlmembed.adapters import Freeze, LoRA
from vlmembed.data import RetrievalDataModule
from vlmembed.losses import InfoNCE, Matryoshka
from vlmembed.modules import EmbeddingModule

# Training


def train_one(scenario: Scenario, checkpoint: Path, rank: int | None, chunk_size: int | None) -> Recorder:
    """Train as one of two processes, or alone."""

    def build(scenario: Scenario) -> EmbeddingModule:
        options = {"backbone": scenario.backbone, "adapters": scenario.adapters, "optimizer": OPTIMIZER}
        options["losses"] = scenario.losses
        return module(checkpoint, scenario.loss, **options)

    return scenario.train(build, rank, chunk_size, **ddp.strategy())


SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "plain": lambda: Scenario(mixed_steps(3)),
    "accumulation": lambda: Scenario(mixed_steps(6), trainer={"accumulate_grad_batches": 2}),
    "clipping": lambda: Scenario(mixed_steps(3), trainer={"gradient_clip_val": CLIP}),
    "learnable temperature": lambda: Scenario(mixed_steps(3), learnable()),
    "LoRA": lambda: Scenario(mixed_steps(3), adapters=(LoRA(LORA),)),
    "frozen vision": lambda: Scenario(mixed_steps(3), adapters=(Freeze(["vision", "merger"]),)),
    "pictures in one process": lambda: Scenario(split_steps(3)),
    "several losses": lambda: Scenario(several_losses(3), losses=losses()),
    "several losses in one step": lambda: Scenario(
        several_losses(9), learnable(), losses=losses(), trainer={"accumulate_grad_batches": 3}
    ),
    "everything": lambda: Scenario(
        split_steps(6),
        learnable(),
        (LoRA(LORA),),
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": CLIP},
    ),
}


#: By scenario; elsewhere 4.
CHUNK_SIZES: dict[str, list[int | None]] = {"plain": [1, None], "everything": [1, 4]}


def train(checkpoint: Path) -> dict[str, list[Recorder]]:
    return {
        name: [train_one(scenario(), checkpoint, dist.get_rank(), size) for size in CHUNK_SIZES.get(name, [4])]
        for name, scenario in SCENARIOS.items()
    }


@pytest.fixture(scope="module")
def together(checkpoint: Path) -> list[dict[str, list[Recorder]]]:
    """Every scenario in two processes, one after the other, because starting them takes longer than training."""
    return ddp.run(train, checkpoint)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, Recorder]:
    """Every scenario in one process, each batch in one chunk."""
    return {name: train_one(scenario(), checkpoint, None, None) for name, scenario in SCENARIOS.items()}


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(
    together: list[dict[str, list[Recorder]]], alone: dict[str, Recorder], name: str
) -> None:
    for first, second in zip(*(records[name] for records in together), strict=True):
        check_trained_as_one(first, second, alone[name])


def test_scenarios_are_what_they_say(alone: dict[str, Recorder]) -> None:
    """Else two processes could agree with one for lack of a difference to make."""
    check_clipping(alone["clipping"])
    assert alone["learnable temperature"].update(3)["loss.log_scale"].abs() > 1e-3
    assert all("lora" in name for name in alone["LoRA"].gradients[0])
    assert not any("visual" in name for name in alone["frozen vision"].gradients[0])
    assert any("visual" in name for name in alone["pictures in one process"].gradients[0])
    assert {len(run.gradients) for run in alone.values()} == {3}
    assert len(alone["accumulation"].losses) == 6
    temperature = "losses.classes.log_scale"
    assert temperature not in alone["several losses"].gradients[0].keys() | alone["several losses"].gradients[1].keys()
    assert alone["several losses"].update(3)[temperature].abs() > 1e-4
    assert alone["several losses in one step"].update(1)[temperature].abs() > 1e-4


# Measuring


def validate(checkpoint: Path, rows: Path) -> tuple[dict[str, float], list[int]]:
    """Measure, and say which rows this process embedded."""
    model = module(checkpoint, Matryoshka(InfoNCE(), [64, 8]))
    data = RetrievalDataModule(val=str(rows), eval_batch_size=4, num_workers=0)
    (found,) = trainer(**ddp.strategy()).validate(model, data, verbose=False)
    return found, torch.cat(model.metrics[0].numbers).flatten().tolist()


def test_two_processes_measure_as_one(checkpoint: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    alone, every_row = validate(checkpoint, rows)
    found = ddp.run(validate, checkpoint, rows)
    assert [metrics for metrics, _ in found] == [alone, alone]
    shares = [set(share) for _, share in found]
    assert shares[0] | shares[1] == set(every_row)
    assert max(map(len, shares)) < len(every_row)
