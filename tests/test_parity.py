"""The check of a step's gradient before training: right steps pass, wrong ones do not, and nothing is left behind."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ddp
import pytest
import torch
import torch.distributed as dist
from building import Recorder, batch, examples, fit, module, texts, trainer, write_rows
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig
from test_losses import CROSS, DIRECTIONS
from torch import Tensor, nn

from vlmembed import distributed, gradcache
from vlmembed.adapters import Freeze, LoRA
from vlmembed.data import RetrievalDataModule
from vlmembed.features import InMemory
from vlmembed.gradcache import CachedForward
from vlmembed.losses import InfoNCE, Loss, Matryoshka
from vlmembed.modules import EmbeddingModule, ParityCheck, embedding
from vlmembed.pooling import LastToken, Pooling
from vlmembed.types import Batch, Example

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "qkv"]}
FRESH_LORA = LoRA(LoraConfig(**LORA, lora_dropout=0.3))
USED_LORA = LoRA(LoraConfig(**LORA, lora_dropout=0.3, init_lora_weights=False))

#: Where rounding explains more, an error could hide behind it.
FLOAT32, BFLOAT16 = 1e-3, 0.25


class Scaled(Pooling):
    """The last token, times a learned number, over a running mean of norms: a parameter, and a buffer that moves."""

    def configure(self, hidden_size: int) -> None:
        self.inner = LastToken()
        self.factor = nn.Parameter(torch.full((hidden_size,), 1.5))
        self.register_buffer("norm", torch.ones(()))

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        pooled = self.inner(hidden, mask)
        with torch.no_grad():
            self.norm.lerp_(pooled.norm(dim=1).mean(), 0.1)
        return pooled * self.factor + pooled.tanh()


class Squared(Loss):
    """Not one of ours."""

    def forward(self, queries: Tensor, documents: Tensor, relevance: Tensor) -> Tensor:
        return (torch.tanh(queries @ documents.T / 10) - relevance).square().mean()


class Bounded(Squared):
    """Holds a parameter back, as InfoNCE does with its temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, queries: Tensor, documents: Tensor, relevance: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(max=1.0)
        return self.weight * super().forward(queries, documents, relevance)


def nested(**options: Any) -> Loss:
    return Matryoshka(InfoNCE(0.05, **options), [64, 16])


def check(model: EmbeddingModule, rows: list[Example] | None = None, size: int | None = 3, **options: Any) -> Recorder:
    """Train for one step, with a check before."""
    return fit(model, [batch(model, examples(8) if rows is None else rows, size)], ParityCheck(), **options)


def table(printed: str) -> dict[str, tuple[float, float]]:
    """Read what was printed: of each group the difference, and what is tolerated."""
    rows = re.findall(r"^  (\w+) +(\d\S+) +(\d\S+)$", printed, re.MULTILINE)
    return {group: (float(difference), float(tolerated)) for group, difference, tolerated in rows}


# Right steps


TOWER_AND_TEXT, BF16 = "vision merger language", {"precision": "bf16-mixed"}
EVERY_OPTION = {"learnable_temperature": True, "directions": DIRECTIONS, "false_negative_margin": 0.1, "hardness": 5.0}

#: Options of the module, those of the trainer and the chunk size, and the groups of trained parameters.
RIGHT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "full": ({}, {}, TOWER_AND_TEXT),
    "graphs kept": ({"graph_memory": "auto"}, {}, TOWER_AND_TEXT),
    "chunks of one": ({"loss": InfoNCE(0.02)}, {"size": 1}, TOWER_AND_TEXT),
    "fresh LoRA with dropout": ({"adapters": [FRESH_LORA]}, {}, "vision language"),
    "LoRA with dropout": ({"adapters": [USED_LORA]}, {}, "vision language"),
    "graphs with dropout": ({"adapters": [USED_LORA], "graph_memory": "auto"}, {}, "vision language"),
    "frozen tower": ({"adapters": [Freeze(["vision", "merger"])]}, {}, "language"),
    "tower alone": ({"adapters": [Freeze(["language"])]}, {}, "vision merger"),
    "checkpointing": ({"backbone": {"gradient_checkpointing": True}}, {}, TOWER_AND_TEXT),
    "padded chunks": ({"backbone": {"attn_implementation": "sdpa"}}, {}, TOWER_AND_TEXT),
    "trained pooling": ({"pooling": Scaled()}, {}, f"{TOWER_AND_TEXT} pooling"),
    "loss": ({"loss": nested(**EVERY_OPTION)}, {"accumulate_grad_batches": 2}, f"{TOWER_AND_TEXT} loss"),
    "bf16-mixed": ({}, BF16, TOWER_AND_TEXT),
    "bf16-true": ({}, {"precision": "bf16-true"}, TOWER_AND_TEXT),
    "bf16 with dropout": ({"adapters": [USED_LORA]}, BF16, "vision language"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_steps_pass(checkpoint: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    torch.manual_seed(0)
    options, settings, groups = RIGHT[name]
    check(module(checkpoint, **{"loss": nested(), "graph_memory": "none", **options}), **settings)
    printed = capsys.readouterr().out
    assert re.search(r"Parity check passed, of \d+ queries and \d+ documents, chunks: \d+:", printed)
    assert sorted(table(printed)) == sorted(groups.split())
    most = BFLOAT16 if "precision" in settings else FLOAT32
    assert all(tolerated < most for _, tolerated in table(printed).values())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_right_steps_pass_on_a_gpu(checkpoint: Path, precision: Any) -> None:
    torch.manual_seed(0)
    check(module(checkpoint, nested(), adapters=[USED_LORA]), accelerator="gpu", devices=1, precision=precision)


# Wrong steps


def ignored_temperature(patch: pytest.MonkeyPatch) -> None:
    forward = InfoNCE.forward
    patch.setattr(InfoNCE, "forward", lambda self, *batch: forward(InfoNCE(temperature=1.0), *batch))


def dropped_columns(patch: pytest.MonkeyPatch) -> None:
    """The loss does not see documents that answer nobody."""
    gather_batch = embedding.gather_batch

    def without_hard_negatives(embeddings: Tensor, data: Batch) -> tuple[Tensor, Tensor, Tensor]:
        queries, documents, relevance = gather_batch(embeddings, data)
        kept = (relevance == 1).any(0)
        assert not kept.all()
        return queries, documents[kept], relevance[:, kept]

    patch.setattr(embedding, "gather_batch", without_hard_negatives)


def dropped_negatives(patch: pytest.MonkeyPatch) -> None:
    """Other queries' documents do not count."""
    forward = InfoNCE.forward

    def alone(self: InfoNCE, queries: Tensor, documents: Tensor, relevance: Tensor) -> Tensor:
        judged = relevance != 0
        rows = zip(queries.split(1), judged, relevance.split(1), strict=True)
        return torch.stack([forward(self, query, documents[row], grades[:, row]) for query, row, grades in rows]).mean()

    patch.setattr(InfoNCE, "forward", alone)


def wrong_scale(patch: pytest.MonkeyPatch, factor: float = 2.0) -> None:
    replay = CachedForward.backward

    def scaled(self: CachedForward) -> None:
        if self.outputs[0].shape[-1:] == (64,) and self.outputs[0].ndim == 2:
            for leaf in self.outputs:
                leaf.grad *= factor
        replay(self)

    patch.setattr(CachedForward, "backward", scaled)


def other_dropout(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gradcache, "restored", lambda state: nullcontext())


def skipped_chunk(patch: pytest.MonkeyPatch) -> None:
    replay = CachedForward.backward

    def without_the_first(self: CachedForward) -> None:
        if len(self.pending) > 1:
            del self.pending[0]
        replay(self)

    patch.setattr(CachedForward, "backward", without_the_first)


def not_a_number(patch: pytest.MonkeyPatch) -> None:
    wrong_scale(patch, float("nan"))


ELSEWHERE = "look at what the step does with the temperature"


PLANTED = [
    (ignored_temperature, {}, ELSEWHERE),
    (dropped_columns, {}, ELSEWHERE),
    (dropped_negatives, {}, ELSEWHERE),
    (wrong_scale, {}, "is 2 times what it should be"),
    (other_dropout, {"adapters": [FRESH_LORA]}, ELSEWHERE),
    (ignored_temperature, {"loss": nested(learnable_temperature=True)}, ELSEWHERE),
    (partial(wrong_scale, factor=0.5), {"adapters": [Freeze(["vision"])]}, "is 0.5 times what it should be"),
    (other_dropout, {"adapters": [USED_LORA], "graph_memory": "auto"}, ELSEWHERE),
    (skipped_chunk, {"graph_memory": "auto"}, ELSEWHERE),
    (not_a_number, {}, "differs by nan of its size"),
]


@pytest.mark.parametrize(
    ("precision", "plant", "options", "advice"),
    [("32-true", *planted) for planted in PLANTED] + [("bf16-mixed", *planted) for planted in PLANTED[:5]],
    ids=lambda value: getattr(value, "__name__", value if value == "bf16-mixed" else None),
)
def test_a_planted_error_is_caught(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Any,
    plant: Callable[[pytest.MonkeyPatch], None],
    options: dict[str, Any],
    advice: str,
) -> None:
    torch.manual_seed(0)
    model = module(checkpoint, **{"loss": nested(), "graph_memory": "none", **options})
    plant(monkeypatch)
    with pytest.raises(RuntimeError, match=rf"^The step's gradient is not that of its loss\. Of \w+ param.*{advice}"):
        check(model, precision=precision)


# Two processes


def check_here(checkpoint: Path, plant: Callable[[pytest.MonkeyPatch], None] | None, *names: str) -> list[str]:
    """Check as one of two processes, and say how it went: pictures in the first, texts alone in the second."""
    found = []
    adapters = {"LoRA": [USED_LORA], "full": []}
    # A document of both processes, and a query that both ask.
    rows = [*examples(4)[1:], examples(1)[0]] if dist.get_rank() == 0 else [*texts(5), examples(1)[0]]
    for name in names:
        torch.manual_seed(0)
        loss = nested(learnable_temperature=True, directions=CROSS)
        model = module(checkpoint, loss, adapters=adapters[name], graph_memory="none")
        with pytest.MonkeyPatch.context() as patch:
            if plant is not None:
                plant(patch)
            try:
                check(model, rows, devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
            except RuntimeError as error:
                found.append(str(error))
    return found


def unscaled_gather(patch: pytest.MonkeyPatch) -> None:
    gather = distributed.gather

    def unscaled(tensor: Tensor) -> Tensor:
        own = tensor.view_as(tensor)
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient / distributed.world_size())
        return gather(own)

    patch.setattr(distributed, "gather", unscaled)


def own_negatives(patch: pytest.MonkeyPatch) -> None:
    """Every process computes the loss of its own examples."""
    alone = {"gather": lambda tensor: tensor, "gather_on_host": lambda tensor, device: tensor}
    patch.setattr(embedding, "distributed", SimpleNamespace(**{**vars(distributed), **alone}))


def no_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(embedding.distributed, "mean_gradients", lambda parameters: None)


BETWEEN = {unscaled_gather: "is 0.5 times", own_negatives: ELSEWHERE, no_mean: ELSEWHERE}


def check_between(checkpoint: Path) -> list[list[str]]:
    """Of right steps, and with each error, because starting processes takes longer than checking."""
    return [check_here(checkpoint, None, "full", "LoRA"), *(check_here(checkpoint, plant, "LoRA") for plant in BETWEEN)]


def test_right_steps_of_two_processes_pass_and_errors_between_them_are_caught(checkpoint: Path) -> None:
    for right, *caught in ddp.run(check_between, checkpoint):
        assert right == []
        for (said,), advice in zip(caught, BETWEEN.values(), strict=True):
            assert advice in said


# What it leaves behind


class Tail(Callback):
    """Draws a random number behind everything else."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.drawn = torch.rand(())


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_training_goes_on_as_without_it(checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """With dropout, a learned temperature, and a buffer that moves."""

    def run(*callbacks: Callback) -> tuple[Recorder, Tail, EmbeddingModule, dict[str, Tensor]]:
        torch.manual_seed(0)
        loss = InfoNCE(0.02, learnable_temperature=True)
        model = module(checkpoint, loss, pooling=Scaled(), adapters=[FRESH_LORA])
        recorder, tail = Recorder(), Tail()
        data = RetrievalDataModule(str(tmp_path / "rows.jsonl"), batch_size=4, chunk_size=3, num_workers=0)
        fitted = trainer(callbacks=[recorder, *callbacks, tail], log_every_n_steps=1, **options)
        fitted.fit(model, datamodule=data)
        return recorder, tail, model, fitted.logged_metrics

    write_rows(tmp_path / "rows.jsonl")
    plain, drawn, model, logged = run()
    checked, drawn_then, same, logged_then = run(ParityCheck())
    assert checked.losses == plain.losses
    for one, other in zip(checked.gradients, plain.gradients, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(checked.weights[-1][name], weight) for name, weight in plain.weights[-1].items())
    assert torch.equal(same.encoder.pooling.norm, model.encoder.pooling.norm)
    assert torch.equal(drawn.drawn, drawn_then.drawn)
    assert logged == logged_then
    assert same.training
    assert "log" not in vars(same)


def test_nothing_is_changed_before_the_first_step(checkpoint: Path) -> None:
    """The test above would not notice what training sets right again."""
    seen: list[Any] = []

    class Witness(Callback):
        def on_train_batch_start(self, trainer: Any, module: EmbeddingModule, data: Batch, number: int) -> None:
            assert all(parameter.grad is None for parameter in module.parameters())
            state = {name: value.clone() for name, value in module.state_dict().items()}
            seen.append((state, torch.get_rng_state(), copy.deepcopy(vars(data))))

    model = module(checkpoint, Bounded(), pooling=Scaled(), adapters=[FRESH_LORA])
    fit(model, [batch(model, examples(8), 3)], Witness(), ParityCheck(), Witness())
    assert float(seen[0][0]["loss.weight"]) == 3.0
    assert all(torch.equal(seen[1][0][name], value) for name, value in seen[0][0].items())
    assert torch.equal(seen[0][1], seen[1][1])
    before, after = ({**data, "origins": None} for _, _, data in seen)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_kept_features_are_neither_read_nor_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*callbacks: Callback) -> tuple[list[str], int, int]:
        cache = InMemory(1.0)
        model = module(checkpoint, adapters=[Freeze(["vision", "merger"])], features=cache)
        data = RetrievalDataModule(str(tmp_path / "rows.jsonl"), batch_size=4, chunk_size=3, num_workers=0)
        trainer(callbacks=[*callbacks], max_steps=1).fit(model, datamodule=data)
        announced = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Feature cache")]
        return announced, cache.hits, cache.misses

    write_rows(tmp_path / "rows.jsonl")
    plain = run()
    assert len(plain[0]) == 1
    assert run(ParityCheck()) == plain


def test_only_the_first_step_is_checked(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With all batches whose gradients are added up for it."""
    model = module(checkpoint)
    batches = [batch(model, examples(8)[start : start + 4], 3) for start in (0, 4)]
    fit(model, batches, ParityCheck(), max_epochs=2, accumulate_grad_batches=2)
    assert capsys.readouterr().out.count("Parity check passed") == 1


def test_a_step_that_a_scaler_skips_is_not_the_one_checked(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    model, plugin = module(checkpoint, InfoNCE(0.5)), MixedPrecision("16-mixed", "cpu", scaler)
    fit(model, [batch(model, examples(6), 3)] * 2, ParityCheck(), plugins=[plugin])
    assert "Parity check" not in capsys.readouterr().out


# What it is given


def test_it_is_one_line_of_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    read = parser.parse_string("callbacks: [{class_path: vlmembed.modules.ParityCheck}]")
    (callback,) = parser.instantiate_classes(read).callbacks
    assert isinstance(callback, ParityCheck)


def test_what_it_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    about_to_train: Any = SimpleNamespace(global_step=0)
    with pytest.raises(TypeError, match="not of a BoringModel"):
        ParityCheck().on_train_start(about_to_train, BoringModel())
    monkeypatch.setattr(distributed, "is_sharded", lambda encoder: True)
    with pytest.raises(ValueError, match="needs whole weights, not shards"):
        ParityCheck().on_train_start(about_to_train, SimpleNamespace(loss=InfoNCE(), encoder=None))
