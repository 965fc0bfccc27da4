"""Two processes that share the language model's weights are one process with the examples of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ddp
import pytest
import torch
import torch.distributed as dist
from building import (
    Recorder,
    batch,
    examples,
    item,
    multi_vector,
    picture,
    relative_difference,
    texts,
    trainer,
    weights,
    write_rows,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from scenarios import (
    CLIP,
    EXACT,
    LORA,
    OPTIMIZER,
    Scenario,
    check_clipping,
    check_trained_as_one,
    learnable,
    mixed_steps,
    split_steps,
)
from torch.optim import AdamW
from torch.utils.data import DataLoader

from vlmembed.adapters import Freeze, LoRA
from vlmembed.backbones import Qwen3VL
from vlmembed.data import ItemCollator, RetrievalDataModule
from vlmembed.encoder import Encoder
from vlmembed.export import Exporter
from vlmembed.losses import InfoNCE
from vlmembed.modules import EmbeddingModule, MultiVectorModule
from vlmembed.pooling import LastToken, TokenProjection, TokenSelection
from vlmembed.trainer import Trainer
from vlmembed.training.memory import ShardedGradCache, refuse_strategy


def strategy(**options: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(ddp.WORLD_SIZE, 1, process_group_backend="gloo", **options)


def train_one(scenario: Scenario, checkpoint: Path, rank: int | None, chunk_size: int | None) -> Recorder:
    """Train as one of two processes that share the weights, or alone."""

    def build(scenario: Scenario) -> EmbeddingModule:
        # Not configured: that is for the trainer to do, once it has a strategy.
        backbone = Qwen3VL(str(checkpoint), **scenario.backbone)
        return EmbeddingModule(backbone, LastToken(), scenario.loss, adapters=scenario.adapters, optimizer=OPTIMIZER)

    sharded = {} if rank is None else {"devices": ddp.WORLD_SIZE, "strategy": strategy()}
    return scenario.train(build, rank, chunk_size, **sharded)


SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "plain": lambda: Scenario(mixed_steps(3)),
    "pictures in one process": lambda: Scenario(split_steps(3)),
    "accumulation": lambda: Scenario(mixed_steps(6), trainer={"accumulate_grad_batches": 2}),
    "clipping": lambda: Scenario(mixed_steps(3), trainer={"gradient_clip_val": CLIP}),
    "learnable temperature": lambda: Scenario(mixed_steps(3), learnable()),
    "frozen vision": lambda: Scenario(mixed_steps(3), adapters=(Freeze(["vision", "merger"]),)),
    "frozen language": lambda: Scenario(split_steps(3), adapters=(Freeze(["language"]),)),
    "LoRA": lambda: Scenario(split_steps(3), adapters=(LoRA(LORA),)),
    "checkpointing": lambda: Scenario(mixed_steps(3), backbone={"gradient_checkpointing": True}),
    "everything": lambda: Scenario(
        split_steps(6), learnable(), trainer={"accumulate_grad_batches": 2, "gradient_clip_val": CLIP}
    ),
}


#: By scenario: many fillers, or none at all. Elsewhere some.
CHUNK_SIZES: dict[str, list[int | None]] = {"plain": [1, None], "everything": [1]}

Records = dict[str, list[Recorder]]


def train(checkpoint: Path) -> Records:
    return {
        name: [train_one(scenario(), checkpoint, dist.get_rank(), size) for size in CHUNK_SIZES.get(name, [2])]
        for name, scenario in SCENARIOS.items()
    }


@pytest.fixture(scope="module")
def together(checkpoint: Path) -> list[Records]:
    """Every scenario in two processes, one after the other, because starting them takes longer than training."""
    return ddp.run(train, checkpoint)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, Recorder]:
    """Every scenario in one process, each batch in one chunk."""
    return {name: train_one(scenario(), checkpoint, None, None) for name, scenario in SCENARIOS.items()}


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(together: list[Records], alone: dict[str, Recorder], name: str) -> None:
    for first, second in zip(*(records[name] for records in together), strict=True):
        check_trained_as_one(first, second, alone[name])


def test_scenarios_are_what_they_say(checkpoint: Path, alone: dict[str, Recorder]) -> None:
    """Else two processes could agree with one for lack of a difference to make."""
    check_clipping(alone["clipping"])
    assert alone["learnable temperature"].update(3)["loss.log_scale"].abs() > 1e-3
    assert not any("visual" in name for name in alone["frozen vision"].gradients[0])
    assert not any("language_model.layers" in name for name in alone["frozen language"].gradients[0])
    assert any("visual" in name for name in alone["pictures in one process"].gradients[0])
    model = EmbeddingModule(Qwen3VL(str(checkpoint)), LastToken(), InfoNCE())
    for first, second in mixed_steps(3):
        assert len(batch(model, first, 2).chunks) < len(batch(model, second, 2).chunks)


def train_in_half_precision(checkpoint: Path) -> list[Recorder]:
    rank = dist.get_rank() if dist.is_initialized() else None
    precisions = ("bf16-mixed", "bf16-true")
    runs = [Scenario(mixed_steps(1), trainer={"precision": each}) for each in precisions]
    return [train_one(run, checkpoint, rank, 4) for run in runs]


def test_half_precision_is_that_of_one_process(checkpoint: Path) -> None:
    found = ddp.run(train_in_half_precision, checkpoint)
    for first, second, expected in zip(*found, train_in_half_precision(checkpoint), strict=True):
        assert first.losses == second.losses
        # bfloat16 keeps 8 bits, and sums of other chunks round differently.
        assert first.losses == pytest.approx(expected.losses, rel=2e-2)
        assert relative_difference(first.gradients[0], expected.gradients[0]) < 5e-2
        for name, gradient in expected.gradients[0].items():
            assert first.gradients[0][name].dtype == gradient.dtype


def count_reductions(checkpoint: Path) -> int:
    # What FSDP calls is called otherwise in PyTorch before 2.15.
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    with mock.patch.object(dist, name, wraps=getattr(dist, name)) as reduce_scatter:
        train_one(SCENARIOS["accumulation"](), checkpoint, dist.get_rank(), 2)
    return reduce_scatter.call_count


def test_gradients_are_reduced_once_per_optimizer_step(checkpoint: Path) -> None:
    """Two layers and the rest, in three steps of two batches of several chunks."""
    assert ddp.run(count_reductions, checkpoint) == [3 * 3] * 2


class Seeded(MultiVectorModule):
    """Has the same projection whenever it is made."""

    def configure_model(self) -> None:
        torch.manual_seed(0)
        super().configure_model()


def train_several_vectors(checkpoint: Path) -> Recorder:
    """Fillers for chunks that are missing have vectors, too, though they are texts where only images have any."""

    def build(scenario: Scenario) -> MultiVectorModule:
        # Means: sums over 20 vectors over a temperature make steps so large that rounding grows.
        options: dict[str, Any] = {"similarity": "meanmaxsim", "optimizer": OPTIMIZER}
        options["query_tokens"] = TokenSelection("images")
        return Seeded(Qwen3VL(str(checkpoint)), scenario.loss, TokenProjection(32), **options)

    rank = dist.get_rank() if dist.is_initialized() else None
    sharded = {} if rank is None else {"devices": ddp.WORLD_SIZE, "strategy": strategy()}
    shown = [
        replace(row, query=item(picture(64, 32 + 32 * (n % 2), n), role="query")) for n, row in enumerate(examples(15))
    ]
    scenario = Scenario([(shown[start : start + 1], shown[start + 1 : start + 5]) for start in (0, 5, 10)], learnable())
    return scenario.train(build, rank, None if rank is None else 2, **sharded)  # type: ignore[arg-type]


def test_a_filler_has_vectors_where_only_images_have_any(checkpoint: Path) -> None:
    encoder = multi_vector(checkpoint, query_tokens=TokenSelection("images")).encoder
    assert len(encoder(ShardedGradCache(encoder)._filler))


@pytest.mark.exhaustive
def test_several_vectors_an_item(checkpoint: Path) -> None:
    check_trained_as_one(*ddp.run(train_several_vectors, checkpoint), train_several_vectors(checkpoint))


class Keep(Exporter):
    """Keeps the weights, and an embedding, in place of writing them."""

    def export(self, encoder: Encoder, folder: Path, run: Any) -> Any:
        (chunk,) = batch_of_texts(encoder)
        self.kept = {"embeddings": encoder(chunk).detach(), **encoder.state_dict()}


def batch_of_texts(encoder: Encoder) -> list[Any]:
    return ItemCollator(encoder.backbone.preprocessor)(texts(2)).chunks


def train_and_export(checkpoint: Path, folder: Path, shards: bool) -> dict[str, Any]:
    """Train with AdamW, measure, save; then go on as the command line does, from the checkpoint and without."""
    data = RetrievalDataModule(str(folder / "rows.jsonl"), str(folder / "rows.jsonl"), batch_size=2, chunk_size=2)
    data.num_workers = 0
    model = EmbeddingModule(Qwen3VL(str(checkpoint)), LastToken(), learnable(), optimizer=partial(AdamW, lr=1e-3))
    save = ModelCheckpoint(folder / f"shards={shards}", monitor="val/ndcg@10", mode="max")
    exporter = Keep()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(
        accelerator="cpu",
        devices=ddp.WORLD_SIZE,
        strategy=strategy(save_distributed_checkpoint=shards),
        max_epochs=1,
        callbacks=[save],
        exporter=exporter,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **quiet,
    )
    run.fit(model, data)
    trained = weights(model)
    (measured,) = run.validate(model, data, ckpt_path=save.best_model_path, verbose=False)
    embeddings = model.encoder(*batch_of_texts(model.encoder)).detach()
    found = {"trained": trained, "embeddings": embeddings, "path": save.best_model_path, "measured": measured}
    if shards and dist.get_rank() == 0:
        with pytest.raises(ValueError, match="consolidate_checkpoint"):
            run.export(model, ckpt_path=save.best_model_path, output_dir=str(folder / "never"))
    run.export(model, ckpt_path=None if shards else save.best_model_path, output_dir=str(folder / "export"))
    return {**found, "exported": getattr(exporter, "kept", None)}


@pytest.mark.parametrize("shards", [False, True])
def test_checkpoints_are_saved_measured_and_exported(checkpoint: Path, tmp_path: Path, shards: bool) -> None:
    write_rows(tmp_path / "rows.jsonl")
    first, second = ddp.run(train_and_export, checkpoint, tmp_path, shards)
    assert second["exported"] is None
    assert first["measured"] == second["measured"]
    assert torch.equal(first["embeddings"], second["embeddings"])
    embeddings = first["exported"].pop("embeddings")
    torch.testing.assert_close(embeddings, first["embeddings"], rtol=EXACT, atol=EXACT)
    assert {f"encoder.{name}" for name in first["exported"]} == first["trained"].keys() - {"loss.log_scale"}
    for name, tensor in first["exported"].items():
        assert torch.equal(tensor, first["trained"][f"encoder.{name}"]), name
    if not shards:
        saved = torch.load(first["path"], weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name], tensor) for name, tensor in first["trained"].items())


def test_strategies_that_would_lose_gradients_are_refused() -> None:
    for served in (SingleDeviceStrategy(), DDPStrategy(), ModelParallelStrategy()):
        refuse_strategy(served)
    with pytest.raises(ValueError, match=r"FSDPStrategy .* Use ddp"):
        refuse_strategy(FSDPStrategy())
    # Stands in for one: it cannot be made without its package.
    with pytest.raises(ValueError, match=r"DeepSpeedStrategy .* Use ddp"):
        refuse_strategy(DeepSpeedStrategy.__new__(DeepSpeedStrategy))


#: Options of the strategy's sizes, the backbone, the module and the trainer, and what the refusal says.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sizes": (1, 2)}, "tensor_parallel_size: 1"),
    ({"backbone": {"attn_implementation": "sdpa"}}, "attn_implementation: auto"),
    ({"module": {"graph_memory": 1.0}}, "graph_memory is auto or none"),
    ({"trainer": {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}}, "clips by norm"),
]


def refusals(checkpoint: Path) -> list[str]:
    found = []
    for options, _ in REFUSED:
        sharded = ModelParallelStrategy(*options.get("sizes", (2, 1)), process_group_backend="gloo")
        run = trainer(devices=2, strategy=sharded, **options.get("trainer", {}))
        backbone = Qwen3VL(str(checkpoint), **options.get("backbone", {}))
        model = EmbeddingModule(backbone, LastToken(), InfoNCE(), **options.get("module", {}))
        with pytest.raises(ValueError, match=r".") as refusal:
            run.fit(model, DataLoader([batch(model, examples(1))], batch_size=None))
        found.append(str(refusal.value))
    return found


def test_what_cannot_be_served_is_refused(checkpoint: Path) -> None:
    for found in ddp.run(refusals, checkpoint):
        for refusal, (_, message) in zip(found, REFUSED, strict=True):
            assert message in refusal
