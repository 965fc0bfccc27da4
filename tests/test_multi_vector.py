"""Training several vectors an item: losses, the gradient cache, two processes, Sentence Transformers' own step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import ddp
import pytest
import torch
import torch.distributed as dist
from building import (
    allocated,
    batch,
    difference,
    examples,
    fit,
    item,
    multi_vector,
    picture,
    relative_difference,
    step_gradients,
    trainer,
    weights,
)
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig
from scenarios import EXACT, LORA, OPTIMIZER, Scenario, check_trained_as_one, learnable, mixed_steps, split_steps
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder import losses as stock
from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_scores
from test_gradcache import ordinary_autograd
from test_losses import OPTIONS, graded_batch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from vlmembed import gradcache
from vlmembed.adapters import Freeze, LoRA
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.gradcache import GradCache
from vlmembed.late_interaction import MultiVectors
from vlmembed.losses import CoSENT, InfoNCE, Loss, MarginMSE, Matryoshka, MergedTokens, ScoreDistillation, WeightedSum
from vlmembed.modules import MultiVectorModule, ParityCheck
from vlmembed.pooling import TokenProjection, TokenSelection
from vlmembed.training.parity import defined_loss
from vlmembed.types import Example

# Losses

QUERY_LENGTHS, DOCUMENT_LENGTHS = [3, 1, 4, 2], [5, 1, 8, 2, 3, 6, 4, 7]


def ragged(lengths: list[int], seed: int, length_normalized: bool = True) -> MultiVectors:
    vectors = torch.randn(sum(lengths), 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return MultiVectors(vectors, torch.tensor(lengths), length_normalized)


def value_and_gradients(loss: Callable[..., Tensor], parameters: list[nn.Parameter], *rest: Tensor) -> list[Tensor]:
    """Of the batch of `graded_batch`, with several vectors an item."""
    sides = ragged(QUERY_LENGTHS, 1), ragged(DOCUMENT_LENGTHS, 2)
    leaves = [side.vectors.requires_grad_() for side in sides]
    value = loss(*sides, graded_batch()[2], *rest)
    return [value.detach(), *torch.autograd.grad(value, [*leaves, *parameters])]


@pytest.mark.parametrize("options", [*OPTIONS, {"false_negative_margin": -0.1, "hardness": 2.0}], ids=str)
def test_infonce_follows_its_definition(options: dict[str, Any]) -> None:
    """At several dimensions and numbers of vectors, with several positives, shared documents and hard negatives."""
    plain = InfoNCE(0.1, learnable_temperature=True, **options)
    parts = [Matryoshka(MergedTokens(plain, [1, 2, 3], [1.0, 0.5, 2.0]), [6, 4]), plain]
    loss = WeightedSum(parts, [1.0, 0.3])
    parameters = [*loss.parameters()]
    definition = value_and_gradients(partial(defined_loss, loss), parameters)
    # float64; the temperature is a float32 number, and the mean over pairs has float32 weights.
    torch.testing.assert_close(value_and_gradients(loss, parameters), definition, rtol=1e-6, atol=1e-7)


def slow_scores(queries: MultiVectors, documents: MultiVectors) -> Tensor:
    """MeanMaxSim, a pair of items at a time."""
    unit = [[normalize(part) for part in side.split()] for side in (queries, documents)]
    return torch.stack(
        [torch.stack([(query @ document.T).amax(1).mean() for document in unit[1]]) for query in unit[0]]
    )


def slow_cosent(queries: MultiVectors, documents: MultiVectors, relevance: Tensor, scores: Tensor) -> Tensor:
    similar, total = slow_scores(queries, documents) / 0.1, torch.ones((), dtype=torch.float64)
    pairs = (~scores.isnan()).nonzero().tolist()
    for low in pairs:
        for high in pairs:
            if scores[*low] < scores[*high]:
                total = total + (similar[*low] - similar[*high]).exp()
    return total.log()


def slow_distillation(
    kind: str, queries: MultiVectors, documents: MultiVectors, relevance: Tensor, scores: Tensor
) -> Tensor:
    parts = []
    for row, teacher in zip(slow_scores(queries, documents) / 0.1, scores, strict=True):
        judged = ~teacher.isnan()
        model, teacher = row[judged], teacher[judged]
        if kind == "kl":
            share = teacher.softmax(0)
            parts.append((share * (share.log() - model.log_softmax(0))).sum())
        else:
            pairs = [(i, j) for i in range(len(model)) for j in range(i)]
            errors = [(model[i] - model[j] - (teacher[i] - teacher[j])) ** 2 for i, j in pairs]
            parts.append(torch.stack(errors).mean())
    return torch.stack(parts).mean()


@pytest.mark.parametrize(
    ("loss", "slow"),
    [
        (CoSENT(0.1), slow_cosent),
        (ScoreDistillation(temperature=0.1), partial(slow_distillation, "kl")),
        (ScoreDistillation(MarginMSE(), 0.1), partial(slow_distillation, "margins")),
    ],
    ids=["CoSENT", "KL", "MarginMSE"],
)
def test_losses_of_scores_are_slow_loops(loss: Loss, slow: Callable[..., Tensor]) -> None:
    scores = torch.randn(4, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    scores[torch.rand(4, 8, generator=torch.Generator().manual_seed(6)) < 0.4] = math.nan
    torch.testing.assert_close(value_and_gradients(loss, [], scores), value_and_gradients(slow, [], scores))


class Given(nn.Module):
    """Sentence Transformers' side of a model: vectors that are there already."""

    def forward(self, features: dict[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
        return features


Columns = list[list[Tensor]]


def stock_value(loss: Callable[[Any, Any], Tensor], columns: Columns, labels: Tensor | None) -> Tensor:
    """Their loss of columns of items: queries, positives, and each column of negatives."""
    features = []
    for column in columns:
        mask = pad_sequence([torch.ones(len(item)) for item in column], batch_first=True)
        unit = pad_sequence([normalize(item) for item in column], batch_first=True)
        features.append({"token_embeddings": unit, "attention_mask": mask})
    return loss(features, labels)


@pytest.mark.parametrize("kind", ["sum", "mean", "KL", "margins"])
def test_losses_are_sentence_transformers(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    columns: Columns = [
        [torch.randn(1 + (row * step) % 4, 8, generator=generator).requires_grad_() for row in range(5)]
        for step in (1, 2, 3)
    ]
    teacher = torch.randn(5, 2, generator=generator)
    model: Any = Given()
    theirs: dict[str, tuple[Any, Tensor | None]] = {
        "sum": (stock.MultiVectorMultipleNegativesRankingLoss(model, scale=5.0), None),
        "mean": (
            stock.MultiVectorMultipleNegativesRankingLoss(model, scale=5.0, similarity_fct=mean_colbert_scores),
            None,
        ),
        "KL": (stock.MultiVectorDistillKLDivLoss(model), teacher),
        "margins": (stock.MultiVectorMarginMSELoss(model), teacher),
    }
    ours: dict[str, Loss] = {
        "sum": InfoNCE(0.2),
        "mean": InfoNCE(0.2),
        "KL": ScoreDistillation(temperature=1.0),
        "margins": ScoreDistillation(MarginMSE(), temperature=1.0),
    }
    queries, *documents = (
        MultiVectors(torch.cat(column), torch.tensor([len(item) for item in column]), kind == "mean")
        for column in columns
    )
    vectors, lengths = (torch.cat([getattr(side, name) for side in documents]) for name in ("vectors", "lengths"))
    both = MultiVectors(vectors, lengths)
    eye = torch.eye(5, dtype=torch.int8)
    scores = torch.full((5, 10), math.nan)
    scores[range(5), range(5)], scores[range(5), range(5, 10)] = teacher.T
    value = ours[kind](queries, both, torch.cat([eye, -eye], 1), scores)
    reference = stock_value(*theirs[kind][:1], columns, theirs[kind][1])
    torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    leaves = [item for column in columns for item in column]
    torch.testing.assert_close(
        torch.autograd.grad(value, leaves), torch.autograd.grad(reference, leaves), rtol=1e-4, atol=1e-5
    )


# One step of Sentence Transformers

QUERIES = [f"query number {index} " * (index % 3 + 1) for index in range(7)]
POSITIVES = [picture(32 + 32 * (index % 3), 64, index) for index in range(7)]
NEGATIVES = [picture(64, 32 + 32 * (index % 2), 100 + index) for index in range(7)]
INSTRUCTIONS = {"query_instruction": "Find the picture.", "document_instruction": "Represent the picture."}
LEARNING_RATE = 0.01


def their_step(folder: Path, temperature: float, scoring: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step by Sentence Transformers, and what it changed, by our names."""
    model = MultiVectorEncoder(str(folder), device="cpu").train()
    loss_of = stock.CachedMultiVectorMultipleNegativesRankingLoss(
        model, scale=1 / temperature, similarity_fct=scoring, mini_batch_size=3
    )
    columns: list[tuple[list[Any], str]] = [(QUERIES, "query"), (POSITIVES, "document"), (NEGATIVES, "document")]
    features = [model.preprocess(column, prompt=model.prompts[role], task=role) for column, role in columns]
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    before = weights(model)
    loss = loss_of(features, torch.zeros(len(QUERIES)))
    loss.backward()
    optimizer.step()
    names = {"0.model.": "encoder.backbone.model.", "1.linear.": "encoder.pooling.outer."}
    update = {}
    for name, tensor in difference(weights(model), before).items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        update[names[prefix] + name.removeprefix(prefix)] = tensor
    return loss.item(), update


@pytest.mark.parametrize(
    ("similarity", "temperature", "scoring"), [("maxsim", 1.0, None), ("meanmaxsim", 0.05, mean_colbert_scores)]
)
def test_one_step_is_sentence_transformers(
    checkpoint: Path, tmp_path: Path, similarity: Any, temperature: float, scoring: Any
) -> None:
    options: dict[str, Any] = {"backbone": INSTRUCTIONS, "similarity": similarity}
    write_folder(multi_vector(checkpoint, **options).encoder, tmp_path)
    their_loss, their_update = their_step(tmp_path, temperature, scoring)
    model = multi_vector(
        checkpoint, InfoNCE(temperature), optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE), **options
    )
    rows = [
        Example(item(query, role="query"), (item(positive),), (item(negative),))
        for query, positive, negative in zip(QUERIES, POSITIVES, NEGATIVES, strict=True)
    ]
    run = fit(model, [batch(model, [rows[index] for index in (4, 0, 6, 2, 5, 1, 3)], 5)])
    assert run.losses == pytest.approx([their_loss], rel=1e-5)
    # Other chunks, other padding, other order of float32 sums; weights round the update once more.
    assert relative_difference(run.update(1), their_update) < 1e-4


# The gradient cache

DROPPING = {"r": 4, "target_modules": ["q_proj", "qkv"], "init_lora_weights": False, "lora_dropout": 0.3}
SELECTIONS = {"query_tokens": TokenSelection("without_instruction"), "document_tokens": TokenSelection(skip=["Ġ", "e"])}


def trained(**options: Any) -> Loss:
    return Matryoshka(MergedTokens(InfoNCE(0.05, **options), [1, 2]), [32, 16])


@pytest.mark.parametrize("graph_bytes", [0.0, 2e6, math.inf], ids=["no graphs", "some graphs", "all graphs"])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="full"),
        pytest.param({"adapters": [LoRA(LoraConfig(**DROPPING))], "similarity": "meanmaxsim"}, id="LoRA with dropout"),
        pytest.param({"adapters": [Freeze(["vision", "merger"])], **SELECTIONS}, id="frozen vision"),
        pytest.param({"projection": TokenProjection(32, inner_size=48, residual=True)}, id="residual MLP"),
    ],
)
def test_a_step_in_chunks_is_one_without(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], size: int, graph_bytes: float
) -> None:
    model = multi_vector(checkpoint, trained(), **options)
    data = batch(model, examples(), size)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(3)
        return step_gradients(model, GradCache(model.encoder, graph_bytes), data)

    vectors, actual = step()
    assert len(vectors) > len(data.queries) + len(data.documents)
    monkeypatch.setattr(gradcache, "forward_chunks", ordinary_autograd)
    assert relative_difference(actual, step()[1]) < EXACT
    # And, where nothing drops, it is one of a single chunk.
    if options.get("similarity") != "meanmaxsim":
        data = batch(model, examples())
        assert relative_difference(actual, step()[1]) < EXACT


def test_halved_chunks_keep_the_order_of_items(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the loss gives their vectors to the same items, of which each has other numbers of them."""
    model = multi_vector(checkpoint, trained(), **SELECTIONS)
    data = batch(model, examples(), 5)
    expected = step_gradients(model, GradCache(model.encoder), data)
    forward, failures = model.encoder.backbone.forward, [torch.OutOfMemoryError("CUDA out of memory.")]

    def short(inputs: Any, *arguments: Any) -> Tensor:
        if len(inputs["input_ids"]) == 5 and failures:
            raise failures.pop()
        return forward(inputs, *arguments)

    monkeypatch.setattr(model.encoder.backbone, "forward", short)
    vectors, gradients = step_gradients(model, GradCache(model.encoder, math.inf), data)
    assert not failures
    torch.testing.assert_close(vectors, expected[0], rtol=0, atol=1e-5)
    assert relative_difference(gradients, expected[1]) < EXACT


def test_memory_hardly_grows_with_the_batch(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the vectors, and the row of the nearest; no graphs are kept, and chunks have the same size."""
    monkeypatch.setattr(import_module("vlmembed.late_interaction"), "TILE", 2**14)
    model, left = multi_vector(checkpoint), {}
    for size in (8, 32):
        documents = [item(f"page {number:03} {'of many words ' * 12}") for number in range(size)]
        rows = [Example(item(f"query {number:03}", role="query"), (page,)) for number, page in enumerate(documents)]
        data = batch(model, rows, 4)
        bytes_allocated = allocated(lambda data=data: step_gradients(model, GradCache(model.encoder), data))
        lengths = torch.cat([chunk["kept"].sum(1) for chunk in data.chunks])
        nearest = 4 * int(lengths[data.queries].sum()) * size
        # The vectors by chunk, of the batch, and as the loss takes them; and their gradients.
        left[size] = bytes_allocated - 4 * int(lengths.sum()) * 4 * model.encoder.dimension - nearest
    assert left[32] < 1.1 * left[8]


# Two processes


def train_one(scenario: Scenario, checkpoint: Path, rank: int | None) -> Any:
    """Train as one of two processes, or alone in one chunk."""

    def build(scenario: Scenario) -> MultiVectorModule:
        # Sums over 20 vectors would magnify the rounding of the weights as much, from the second step on.
        options = {"adapters": scenario.adapters, "optimizer": OPTIMIZER, "similarity": "meanmaxsim"}
        return multi_vector(checkpoint, scenario.loss, **options)

    # In float32 another vector may be the nearest, by the last bit, once weights were rounded otherwise by an update.
    options: dict[str, Any] = {"precision": "64-true"}
    options |= {} if rank is None else {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
    return scenario.train(build, rank, None if rank is None else 3, **options)


SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "ragged": lambda: Scenario(mixed_steps(3), trained()),
    "pictures in one process": lambda: Scenario(split_steps(3), learnable(), (LoRA(LORA),)),
}


def train_together(checkpoint: Path) -> dict[str, Any]:
    """All scenarios, and a check of a first step, because starting processes takes longer than training."""
    records = {name: train_one(scenario(), checkpoint, dist.get_rank()) for name, scenario in SCENARIOS.items()}
    first, second = mixed_steps(1)[0]
    model = multi_vector(checkpoint, trained(directions=["query_to_document", "document_to_query"]))
    data = DataLoader([batch(model, second if dist.get_rank() else first, 3)], batch_size=None)
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer(callbacks=[ParityCheck()], devices=2, strategy=strategy).fit(model, data)
    return records


@pytest.fixture(scope="module")
def together(checkpoint: Path) -> list[dict[str, Any]]:
    return ddp.run(train_together, checkpoint)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(checkpoint: Path, together: list[dict[str, Any]], name: str) -> None:
    alone = train_one(SCENARIOS[name](), checkpoint, None)
    check_trained_as_one(together[0][name], together[1][name], alone)


# The check before training


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_check_passes_right_steps(checkpoint: Path, precision: Any, capsys: pytest.CaptureFixture[str]) -> None:
    loss = WeightedSum([trained(directions=["query_to_document", "query_to_query"]), InfoNCE(0.05, hardness=2.0)])
    model = multi_vector(checkpoint, loss, **SELECTIONS, similarity="meanmaxsim")
    data = DataLoader([batch(model, examples(), 4)], batch_size=None)
    trainer(callbacks=[ParityCheck()], precision=precision).fit(model, data)
    printed = capsys.readouterr().out
    assert "Parity check passed" in printed
    assert "taken as it is" not in printed


def test_the_check_finds_vectors_of_other_items(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = multi_vector(checkpoint)
    gather = model.gather_batch
    monkeypatch.setattr(model, "gather_batch", lambda outputs, data: gather(outputs.roll(1, dims=0), data))
    data = DataLoader([batch(model, examples(), 4)], batch_size=None)
    with pytest.raises(RuntimeError, match="not that of its loss"):
        trainer(callbacks=[ParityCheck()]).fit(model, data)
