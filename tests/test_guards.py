"""Steps that are not finite, weights that are not, and warnings of outputs that are all alike or a loss at chance."""

from __future__ import annotations

import csv
import json
import math
import re
import warnings
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import ddp
import lightning
import pytest
import torch
import torch.distributed as dist
from building import (
    Recorder,
    batch,
    collated,
    examples,
    fit,
    item,
    lists,
    module,
    ranker,
    ranking_batch,
    trainer,
    write_rows,
)
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from test_losses import CROSS
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.optim import SGD, Adafactor, AdamW
from torch.utils.data import DataLoader

from vlmembed.backbones import Qwen3VL
from vlmembed.data import RetrievalDataModule
from vlmembed.losses import (
    BinaryCrossEntropy,
    InfoNCE,
    KLDivergence,
    MarginMSE,
    Matryoshka,
    RankingLoss,
    RankNet,
    ScoreDistillation,
    SoftmaxCrossEntropy,
)
from vlmembed.modules import CosineDecay, EmbeddingModule, RetrievalModule
from vlmembed.pooling import LastToken
from vlmembed.training import guards
from vlmembed.training.guards import CollapseMonitor, embedding_likeness, score_likeness
from vlmembed.types import Batch, Example

ROWS = 3


OPTIMIZERS = {
    "AdamW": partial(AdamW, lr=1e-3, weight_decay=0.1),
    "AdamW, fused": partial(AdamW, lr=1e-3, weight_decay=0.1, fused=True),
    "AdamW, one by one": partial(AdamW, lr=1e-3, weight_decay=0.1, foreach=False),
    "SGD with momentum": partial(SGD, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "Adafactor": partial(Adafactor, lr=1e-3, weight_decay=0.1),
}


class Plant(Callback):
    """Breaks the batches of some numbers.

    Args:
        batches: Their numbers in the epoch.
        what: The embeddings, and with them all; the value of the loss alone; or the gradient of one weight alone.
        rank: In which process.
    """

    def __init__(
        self, batches: Collection[int], what: Literal["embeddings", "loss", "gradient"] = "embeddings", rank: int = 0
    ) -> None:
        self.batches, self.what, self.rank = batches, what, rank
        self.factor = 1.0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.global_rank != self.rank:
            return
        if self.what == "embeddings":
            pl_module.encoder.register_forward_hook(lambda *given: self.factor * given[-1])
        elif self.what == "loss":
            pl_module.loss.register_forward_hook(lambda *given: given[-1] + (self.factor - 1))
        else:
            weight(pl_module).register_hook(lambda gradient: self.factor * gradient)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, data: Any, batch_idx: int) -> None:
        self.factor = math.nan if batch_idx in self.batches else 1.0


def weight(model: RetrievalModule) -> Tensor:
    return model.encoder.backbone.model.language_model.norm.weight


def batches(model: EmbeddingModule, count: int, rank: int = 0) -> list[Batch]:
    """Batches of a few rows, which say where these come from."""
    rows = examples(ROWS * count)
    starts = [ROWS * number for number in range(count)]
    return [
        replace(batch(model, rows[start : start + ROWS], 2), origins=named(range(start, start + ROWS), rank))
        for start in starts
    ]


def named(rows: Collection[int], rank: int = 0) -> tuple[str, ...]:
    return tuple(f"part {rank}, row {row}" for row in rows)


def skipped(folder: Path) -> list[dict[str, Any]]:
    """What the run's folder says."""
    path = folder / "non_finite.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def csv_logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="run")


class Last(Callback):
    """Keeps the optimizer's state."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.state = trainer.optimizers[0].state_dict()["state"]


# Steps that are not finite


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace(checkpoint: Path, optimizer: str) -> None:
    """Neither in weights nor in moments: the run is, to the bit, one that never had these batches."""
    runs: list[tuple[Recorder, Last]] = []
    for broken, kept in (((0, 3), range(5)), ((), (1, 2, 4))):
        model = module(checkpoint, InfoNCE(0.05, learnable_temperature=True), optimizer=OPTIMIZERS[optimizer])
        data = batches(model, 5)
        last = Last()
        runs.append((fit(model, [data[number] for number in kept], Plant(broken), last, gradient_clip_val=1.0), last))
    (found, state), (expected, expected_state) = runs
    assert same(found.weights[-1], expected.weights[-1])
    torch.testing.assert_close(state.state, expected_state.state, rtol=0, atol=0)
    assert same(found.weights[0], found.weights[1])
    assert same(found.weights[3], found.weights[4])
    assert not same(found.weights[4], found.weights[5])


@pytest.mark.parametrize("what", ["embeddings", "loss", "gradient"])
def test_what_was_skipped_is_written_down(checkpoint: Path, tmp_path: Path, what: Any) -> None:
    model = module(checkpoint)
    data = batches(model, 4)
    with pytest.warns(UserWarning, match=r"Step 1 is skipped: the norm of its gradient is .*, its loss .*\. The rows"):
        fit(model, data, Plant({1, 2}, what), logger=csv_logger(tmp_path))
    found = skipped(tmp_path / "run")
    assert [(line["step"], line["epoch"]) for line in found] == [(1, 0), (2, 0)]
    assert [line["batches"][0]["rows"] for line in found] == [list(named(range(3, 6))), list(named(range(6, 9)))]
    for line in found:
        assert (line["gradient_norm"] == "nan") == (what != "loss")
        assert (line["batches"][0]["loss"] == "nan") == (what != "gradient")
        assert len(line["parameters"]) == {"embeddings": 5, "loss": 0, "gradient": 1}[what]
    if what == "gradient":
        assert found[0]["parameters"] == ["encoder.backbone.model.language_model.norm.weight"]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        logged = [(row["step"], row["train/skipped_steps"]) for row in csv.DictReader(file)]
    assert logged == [("0", ""), ("1", "1.0"), ("2", "2.0"), ("3", "2.0")]


def test_a_healthy_run_has_no_such_file_and_no_such_column(checkpoint: Path, tmp_path: Path) -> None:
    model = module(checkpoint)
    fit(model, batches(model, 2), logger=csv_logger(tmp_path))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.csv"]
    assert "skipped" not in (tmp_path / "run" / "metrics.csv").read_text()


def test_one_batch_spoils_those_that_it_is_added_to(checkpoint: Path, tmp_path: Path) -> None:
    """Of three steps of two batches, the second has a broken one."""
    runs = []
    for broken, kept in (((3,), range(6)), ((), (0, 1, 4, 5))):
        model = module(checkpoint)
        data = batches(model, 6)
        options = {"accumulate_grad_batches": 2, "logger": csv_logger(tmp_path / str(len(kept)))}
        runs.append(fit(model, [data[number] for number in kept], Plant(broken), **options))
    assert same(runs[0].weights[-1], runs[1].weights[-1])
    (line,) = skipped(tmp_path / "6" / "run")
    first, second = line["batches"]
    assert line["step"] == 1
    assert (first["rows"], second["rows"]) == (list(named(range(6, 9))), list(named(range(9, 12))))
    assert first["loss"] == pytest.approx(runs[0].losses[2])
    assert second["loss"] == "nan"


def test_the_host_asks_the_device_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question waits for all work that the device still has to do."""
    asked: list[int] = []
    configure = EmbeddingModule.configure_gradient_clipping

    def counted(self: EmbeddingModule, *given: Any, **options: Any) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            configure(self, *given, **options)
        asked.append(sum(event.name == "aten::_local_scalar_dense" for event in profile.events()))

    monkeypatch.setattr(EmbeddingModule, "configure_gradient_clipping", counted)
    model = module(checkpoint)
    fit(model, batches(model, 2), gradient_clip_val=1.0)
    assert asked == [1, 1]


def test_guards_change_no_bit(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gradients that Lightning would clip by itself, among other things."""
    runs = []
    for guarded in (True, False):
        model = module(checkpoint, InfoNCE(0.05, learnable_temperature=True))
        if not guarded:
            monkeypatch.setattr(
                EmbeddingModule, "configure_gradient_clipping", LightningModule.configure_gradient_clipping
            )
            monkeypatch.setattr(CollapseMonitor, "note", lambda *_: None)
        runs.append(fit(model, batches(model, 4), gradient_clip_val=0.5))
    one, other = runs
    assert one.losses == other.losses
    assert same(one.weights[-1], other.weights[-1])


def test_too_many_in_a_row_stop_the_run(checkpoint: Path, tmp_path: Path) -> None:
    model = module(checkpoint, max_skipped_steps=2)
    data = batches(model, 7)
    stops = pytest.raises(RuntimeError, match=r"3 optimizer steps in a row .* max_skipped_steps is 2. The rows .*bf16")
    with stops:
        fit(model, data, Plant({0, 1, 3, 4, 5}), logger=csv_logger(tmp_path))
    assert [line["step"] for line in skipped(tmp_path / "run")] == [0, 1, 3, 4, 5]


def test_the_limit_is_a_count(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="max_skipped_steps is 0, to stop at the first, or more; got -1"):
        module(checkpoint, max_skipped_steps=-1)
    model = module(checkpoint, max_skipped_steps=0)
    with pytest.raises(RuntimeError, match="1 optimizer steps in a row"):
        fit(model, batches(model, 2), Plant({1}))


def test_a_resumed_run_counts_on(checkpoint: Path, tmp_path: Path) -> None:
    """And takes back what it had written of steps that it takes again."""

    def go_on(broken: set[int], resume: Path | None = None) -> None:
        model = module(checkpoint, max_skipped_steps=2)
        saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        options = {"enable_checkpointing": True, "callbacks": [Plant(broken), saver], "logger": csv_logger(tmp_path)}
        loader = DataLoader(batches(model, 6), batch_size=None)
        trainer(**options).fit(model, loader, ckpt_path=resume, weights_only=True)

    go_on({1, 2})
    go_on({1, 2, 4, 5})
    assert [line["step"] for line in skipped(tmp_path / "run")] == [1, 2, 4, 5]
    with (tmp_path / "run" / "non_finite.jsonl").open("a") as file:
        file.write('{"step": 2, "ep')  # As a killed process leaves it.
    go_on({1, 2, 5}, tmp_path / "step=3.ckpt")
    assert [line["step"] for line in skipped(tmp_path / "run")] == [1, 2, 5]
    with pytest.raises(RuntimeError, match="3 optimizer steps in a row"):
        go_on({3}, tmp_path / "step=3.ckpt")


def train_together(checkpoint: Path, folder: Path) -> dict[str, tuple[Recorder, int]]:
    """Break batches of the second process alone."""
    rank, found = dist.get_rank(), {}
    sharded = ModelParallelStrategy(ddp.WORLD_SIZE, 1, process_group_backend="gloo")
    for name, what, strategy in (
        ("embeddings", "embeddings", DDPStrategy(process_group_backend="gloo")),
        ("gradient", "gradient", DDPStrategy(process_group_backend="gloo")),
        ("shards", "embeddings", sharded),
    ):
        options = {"devices": ddp.WORLD_SIZE, "strategy": strategy, "logger": csv_logger(folder / name)}
        model = EmbeddingModule(Qwen3VL(str(checkpoint)), LastToken(), InfoNCE(0.05), optimizer=partial(SGD, lr=0.01))
        data = batches(module(checkpoint), 4, rank)
        recorder = fit(model, data[2 * rank :] + data[: 2 * rank], Plant({1}, what, rank=1), **options)
        found[name] = recorder, model.guard.counts["skipped"]
    return found


def test_all_processes_skip_what_is_broken_in_one(checkpoint: Path, tmp_path: Path) -> None:
    first, second = ddp.run(train_together, checkpoint, tmp_path)
    for name, (recorder, count) in first.items():
        other, others_count = second[name]
        assert count == others_count == 1
        for step, (one, two) in enumerate(zip(recorder.weights, other.weights, strict=True)):
            assert same(one, two)
            assert same(one, recorder.weights[step - 1]) == (step == 2)
        (line,) = skipped(tmp_path / name / "run")
        assert line["step"] == 1
        assert line["batches"][0]["rows"] == [*named(range(3, 6)), *named(range(9, 12), rank=1)]


# Weights that are not finite


class Breaks(Callback):
    """Breaks a weight after a step, as a step that is too large may, and has the step look like the best so far."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *given: Any) -> None:
        if trainer.global_step == self.step:
            trainer.callback_metrics["train/loss"].zero_()
            with torch.no_grad():
                weight(pl_module)[3] = self.value


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_no_checkpoint_holds_weights_that_are_not_finite(checkpoint: Path, tmp_path: Path, value: float) -> None:
    model = module(checkpoint, optimizer=partial(SGD, lr=1e-3))
    options = {"monitor": "train/loss", "save_top_k": 2, "every_n_train_steps": 1, "save_last": True}
    saver = ModelCheckpoint(tmp_path, "{step}", **options)
    refuses = pytest.raises(RuntimeError, match=r"1 parameters are not finite, such as .*language_model.norm.weight")
    with refuses:
        fit(model, batches(model, 6), Breaks(4, value), saver, enable_checkpointing=True)
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept if "last" in path.name] == ["last.ckpt"]
    assert len(kept) == 3
    for path in kept:
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_run_whose_weights_broke_stops_at_once(checkpoint: Path) -> None:
    """However many steps it may skip."""
    model = module(checkpoint, optimizer=partial(SGD, lr=1e-3))
    data = batches(model, 4)
    with pytest.raises(RuntimeError, match=r"Step 2: 1 parameters are not finite, such as .*norm.weight"):
        fit(model, data, Breaks(2, math.inf))


def test_broken_weights_are_not_measured(checkpoint: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    model = module(checkpoint)
    with torch.no_grad():
        weight(model)[3] = torch.nan
    data = RetrievalDataModule(val=str(rows), num_workers=0)
    with pytest.raises(ValueError, match=rf"embeddings of document '.*' \({rows}, row \d+.* are not finite: look at"):
        trainer().validate(model, data)


def test_a_scaler_looks_for_its_scale_undisturbed(checkpoint: Path, tmp_path: Path) -> None:
    """Gradients overflow until it has found one; a loss that is not finite has nothing to do with it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    model = module(checkpoint, max_skipped_steps=0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    data = batches(model, 4)
    recorder = fit(model, data, plugins=[plugin], logger=csv_logger(tmp_path))
    assert scaler.get_scale() == 2.0**116
    assert same(recorder.weights[0], recorder.weights[-1])
    assert not skipped(tmp_path / "run")
    with pytest.raises(RuntimeError, match="1 optimizer steps in a row"):
        fit(model, data, Plant({2}), plugins=[plugin], logger=csv_logger(tmp_path))


# Outputs that are all alike, and a loss at chance


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


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge every two steps."""
    monkeypatch.setattr(guards, "EVERY", 1)
    monkeypatch.setattr(guards, "LOOKS", 2)


def said(model: RetrievalModule, data: list[Any], epochs: int | None = 1, **options: Any) -> list[str]:
    """Train, and return what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_epochs=epochs, **options).fit(model, DataLoader(data, batch_size=None))
    sentences = [str(each.message) for each in caught]
    return [text for text in sentences if re.search("Likely causes|nothing to learn|rate was 0", text)]


def flatten(model: RetrievalModule, spread: float) -> None:
    """Have the encoder say about the same of everything."""
    model.encoder.register_forward_hook(lambda *given: 1 + spread * given[-1])


@pytest.mark.usefixtures("_often")
def test_collapse_is_said_once(checkpoint: Path) -> None:
    model = module(checkpoint, InfoNCE(1.0))
    flatten(model, 1e-4)
    found = said(model, batches(model, 3), epochs=4)
    assert len(found) == 2
    assert "collapsed" in found[0]
    assert "was 1.0000 of 1" in found[0]
    assert "The loss is at chance" in found[1]
    assert "(0.001 now)" in found[1]


NOTHING = r"There is nothing to learn: the loss is 0 if all outputs are the same.* over the last 2 steps"
AT_CHANCE = r"The loss is at chance: 0\.69\d+ over the last 2 steps, and 0\.6931 if all outputs are the same"  # log 2
ROW, OTHER = (Example(item(f"query {number}", role="query"), (item("a document"),)) for number in range(2))
EQUAL_SCORES = replace(ROW, negatives=(item("another"),), scores=(1.0, 1.0))
EQUAL_LABELS = replace(ROW, positives=(item("one"), item("other")))


@pytest.mark.usefixtures("_often")
@pytest.mark.parametrize(
    ("loss", "rows", "message"),
    [
        pytest.param(InfoNCE(), [ROW], NOTHING, id="one row"),
        pytest.param(InfoNCE(), [ROW, OTHER], NOTHING, id="equal documents"),
        pytest.param(InfoNCE(), [ROW, replace(ROW, positives=(item("other"),))], NOTHING, id="equal queries"),
        pytest.param(InfoNCE(), [replace(ROW, negatives=ROW.positives)], NOTHING, id="a positive as negative"),
        pytest.param(InfoNCE(directions=["query_to_query"]), [ROW, OTHER], NOTHING, id="nothing in one direction"),
        pytest.param(InfoNCE(directions=CROSS), [ROW], AT_CHANCE, id="one row in two directions"),
        pytest.param(Matryoshka(InfoNCE(learnable_temperature=True), [64, 16]), [ROW], NOTHING, id="Matryoshka"),
        pytest.param(ScoreDistillation(), [EQUAL_SCORES], NOTHING, id="equal scores"),
        pytest.param(ScoreDistillation(MarginMSE()), [EQUAL_SCORES], NOTHING, id="equal margins"),
        pytest.param(KLDivergence(), [EQUAL_SCORES], NOTHING, id="a reranker's equal scores"),
        pytest.param(RankNet(), [EQUAL_LABELS], NOTHING, id="a reranker's equal labels"),
        pytest.param(SoftmaxCrossEntropy(), [EQUAL_LABELS], AT_CHANCE, id="all positive"),
    ],
)
def test_a_run_that_cannot_learn_is_said(checkpoint: Path, loss: Any, rows: list[Example], message: str) -> None:
    """Where constant outputs have the smallest loss: even while the learning rate rises."""
    schedule = {"lr_scheduler": lambda optimizer: CosineDecay(optimizer, 12, warmup=0.9)} if message == NOTHING else {}
    model: Any = (ranker if isinstance(loss, RankingLoss) else module)(checkpoint, loss, **schedule)
    data = collated(model.collator(), rows)
    with pytest.warns(UserWarning, match=message):
        trainer(max_epochs=None, max_steps=2).fit(model, DataLoader([data] * 2, batch_size=None))


def test_a_short_run_is_told_that_there_is_nothing_to_learn(checkpoint: Path) -> None:
    """And no more than that, so early."""
    for rows, count in (([ROW], 1), (examples(2), 0)):
        model = module(checkpoint)
        flatten(model, 1e-4)
        assert len(said(model, [batch(model, rows)] * 12)) == count


@pytest.mark.usefixtures("_often")
def test_a_rate_of_zero_is_said(checkpoint: Path) -> None:
    model = module(checkpoint, optimizer=partial(SGD, lr=0.0))
    assert "The learning rate was 0 over the last 2 steps." in said(model, batches(model, 2))


@pytest.mark.usefixtures("_often")
def test_a_healthy_run_is_not_warned(checkpoint: Path) -> None:
    model = module(checkpoint, InfoNCE(0.05), optimizer=partial(AdamW, lr=3e-3))
    assert not said(model, batches(model, 3), epochs=4)
    other = ranker(checkpoint, SoftmaxCrossEntropy(), optimizer=partial(AdamW, lr=3e-3))
    assert not said(other, [ranking_batch(other, lists(4), 3)] * 3, epochs=4)


@pytest.mark.usefixtures("_often")
def test_nothing_is_judged_while_the_rate_rises(checkpoint: Path) -> None:
    model = module(checkpoint, InfoNCE(1.0), lr_scheduler=lambda optimizer: CosineDecay(optimizer, 12, warmup=0.9))
    flatten(model, 1e-4)
    assert not said(model, batches(model, 3), epochs=None, max_steps=9)


@pytest.mark.usefixtures("_often")
def test_scores_that_are_all_alike_are_named(checkpoint: Path) -> None:
    model = ranker(checkpoint, BinaryCrossEntropy())
    flatten(model, 1e-4)
    found = said(model, [ranking_batch(model, lists(4), 3)] * 6)
    assert ["collapsed" in sentence for sentence in found] == [True, False]
    assert "Scores have collapsed" in found[0]


@pytest.mark.usefixtures("_often")
def test_it_is_said_again_after_it_was_better() -> None:
    watched, said = CollapseMonitor("Embeddings", embedding_likeness), []
    fitting: Any = SimpleNamespace(
        global_step=0,
        trainer=SimpleNamespace(
            optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])],
            precision_plugin=SimpleNamespace(train_step_context=lambda: warnings.catch_warnings()),
        ),
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


@pytest.mark.usefixtures("_often")
def test_a_loss_that_remembers_is_not_asked_for_chance(checkpoint: Path) -> None:
    model = module(checkpoint, Queue())
    flatten(model, 1e-4)
    (sentence,) = said(model, batches(model, 3), epochs=2)
    assert "collapsed" in sentence
    assert int(model.loss.asked) == 6


class Dice(InfoNCE):
    """Draws a number whenever it is asked."""

    def forward(self, *given: Tensor) -> Tensor:
        return super().forward(*given) + 0 * torch.rand(())


@pytest.mark.usefixtures("_often")
def test_looking_draws_no_random_number(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for every in (1, 1000):
        monkeypatch.setattr(guards, "EVERY", every)
        torch.manual_seed(0)
        model = module(checkpoint, Dice())
        said(model, batches(model, 3))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def collapse_together(checkpoint: Path) -> list[str]:
    guards.EVERY, guards.LOOKS = 1, 2
    model = module(checkpoint, InfoNCE(1.0))
    flatten(model, 1e-4)
    data = batches(model, 3)[torch.distributed.get_rank() :]
    return said(model, data[:2] * 2, devices=2, strategy=DDPStrategy(process_group_backend="gloo"))


def test_one_process_speaks_for_all(checkpoint: Path) -> None:
    first, second = ddp.run(collapse_together, checkpoint)
    assert len(first) == 2
    assert not second
