"""Embedding losses are their definition and Sentence Transformers' own, in bounded memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmembed.losses import InfoNCE, Loss, Matryoshka, infonce
from vlmembed.training.parity import defined_loss

CROSS = ("query_to_document", "document_to_query")
DIRECTIONS = (*CROSS, "query_to_query", "document_to_document")
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")

DIMENSIONS, WEIGHTS = [5, 2, 6], [0.5, 2.0, 1.0]

# Logits reach 50, gradients 10, and float32 carries 7 digits: sums in another order differ by some 1e-6.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

#: Every variant, for what has to hold in all of them.
OPTIONS: list[dict[str, Any]] = [
    *({"directions": [direction]} for direction in DIRECTIONS),
    {"directions": CROSS},
    {"directions": CROSS[::-1], "softmax": "per_direction"},
    {"directions": DIRECTIONS},
    *({"directions": CROSS, "hardness": 5.0, "hardness_on": kind} for kind in HARDNESS),
    {"directions": DIRECTIONS, "false_negative_margin": 0.1},
    {"directions": CROSS, "softmax": "per_direction", "false_negative_margin": -0.2, "hardness": 3.0},
]
every_variant = pytest.mark.parametrize(
    "options",
    OPTIONS,
    ids=lambda options: "-".join(str(len(v) if isinstance(v, tuple) else v) for v in options.values()),
)

EmbeddedBatch = tuple[Tensor, Tensor, Tensor]


# Batches


def columns(negatives: int, queries: int = 5, size: int = 12) -> list[Tensor]:
    """Embeddings as Sentence Transformers takes them: queries, positives, and each column of negatives."""
    generator = torch.Generator().manual_seed(negatives)
    query = torch.randn(queries, size, generator=generator)
    others = [query + 0.7 * torch.randn(queries, size, generator=generator) for _ in range(1 + negatives)]
    return [query, *others]


def shuffled(columns: list[Tensor]) -> EmbeddedBatch:
    """The same batch as one matrix of documents in arbitrary order, with relevance."""
    queries, *documents = columns
    relevance = torch.cat([torch.eye(len(queries)), *(-torch.eye(len(queries)) for _ in documents[1:])], dim=1)
    order = torch.randperm(len(queries) * len(documents), generator=torch.Generator().manual_seed(7))
    return queries, torch.cat(documents)[order], relevance[:, order].to(torch.int8)


def graded_batch() -> EmbeddedBatch:
    """Several positives per query, documents shared by queries, and hard negatives, in no order."""
    rows = [
        [0, 1, 0, 0, -1, 1, 0, 0],
        [1, 0, 0, -1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, -1, 0],
        [-1, 0, 1, 1, 0, 0, 0, 1],
    ]
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(1, 6, generator=generator)
    queries, documents = (shared + torch.randn(count, 6, generator=generator) for count in (4, 8))
    return queries, documents, torch.tensor(rows, dtype=torch.int8)


def value_and_gradients(loss: Callable[..., Tensor], batch: EmbeddedBatch, *parameters: Tensor) -> list[Tensor]:
    queries, documents = (tensor.clone().requires_grad_() for tensor in batch[:2])
    value = loss(queries, documents, batch[2])
    return [value.detach(), *torch.autograd.grad(value, [queries, documents, *parameters])]


def assert_as_defined(loss: Loss, batch: EmbeddedBatch) -> None:
    """In value, and in the gradient of everything."""
    ours = value_and_gradients(loss, batch, *loss.parameters())
    definition = value_and_gradients(lambda *tensors: defined_loss(loss, *tensors), batch, *loss.parameters())
    torch.testing.assert_close(ours, definition, **CLOSE, check_dtype=False)


# Sentence Transformers


def assert_equals_sentence_transformers(loss: Loss, negatives: int, temperature: float = 0.02, **options: Any) -> None:
    ours, theirs = ([column.requires_grad_() for column in columns(negatives)] for _ in range(2))
    options["directions"] = tuple(name.replace("document", "doc") for name in options["directions"])
    stock = MultipleNegativesRankingLoss(model=None, scale=1 / temperature, **options)
    reference = stock.compute_loss_from_embeddings(theirs, labels=torch.empty(0))
    compare(loss(*shuffled(ours)), ours, reference, theirs, least_gradient=0.0)  # Some batches are easy.


def compare(
    value: Tensor, ours: list[Tensor], reference: Tensor, theirs: list[Tensor], least_gradient: float = 1e-4
) -> None:
    torch.testing.assert_close(value, reference, **CLOSE)
    gradients = torch.autograd.grad(value, ours), torch.autograd.grad(reference, theirs)
    assert all(expected.abs().max() > least_gradient for expected in gradients[1])
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize(
    "directions",
    [("query_to_document", *rest) for n in range(4) for rest in combinations(DIRECTIONS[1:], n)],
    ids=lambda names: "+".join(names),
)
def test_joint_softmax_equals_sentence_transformers(directions, negatives):
    assert_equals_sentence_transformers(InfoNCE(directions=directions), negatives, directions=directions)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("directions", [CROSS[:1], CROSS, CROSS[::-1]])
def test_softmax_per_direction_equals_sentence_transformers(directions, negatives):
    loss = InfoNCE(temperature=0.05, directions=directions, softmax="per_direction")
    options = {"temperature": 0.05, "partition_mode": "per_direction"}
    assert_equals_sentence_transformers(loss, negatives, directions=directions, **options)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("hardness_on", HARDNESS)
@pytest.mark.parametrize(
    ("directions", "softmax"), [(CROSS[:1], "joint"), (CROSS, "per_direction"), (DIRECTIONS, "joint")]
)
def test_hardness_equals_sentence_transformers(directions, softmax, hardness_on, negatives):
    loss = InfoNCE(directions=directions, softmax=softmax, hardness=9.0, hardness_on=hardness_on)
    options = {"partition_mode": softmax, "hardness_mode": hardness_on, "hardness_strength": 9.0}
    assert_equals_sentence_transformers(loss, negatives, directions=directions, **options)


class Columns(nn.Module):
    """Stands in for a model of Sentence Transformers whose features are already embeddings."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return 12


def test_matryoshka_equals_sentence_transformers():
    model = Columns()
    ours, theirs = ([column.requires_grad_() for column in columns(negatives=2)] for _ in range(2))
    stock = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=50.0), [4, 12, 7], [0.5, 2.0, 1.0])
    reference = stock([{"sentence_embedding": column} for column in theirs], torch.empty(0))
    loss = Matryoshka(InfoNCE(temperature=0.02), [4, 12, 7], [0.5, 2.0, 1.0])
    compare(loss(*shuffled(ours)), ours, reference, theirs)
    assert loss.dimensions == (12, 7, 4)
    assert InfoNCE().dimensions == ()


# The definition


@pytest.mark.parametrize("margin", [None, 0.1, -0.2])
@pytest.mark.parametrize(
    ("directions", "softmax"),
    [(names, "joint") for n in range(1, 5) for names in combinations(DIRECTIONS, n)]
    + [(names, "per_direction") for names in (CROSS[:1], CROSS[1:], CROSS)],
)
def test_several_positives_and_shared_documents_follow_the_definition(directions, softmax, margin):
    assert_as_defined(InfoNCE(0.1, False, directions, softmax, false_negative_margin=margin), graded_batch())


@every_variant
@pytest.mark.parametrize("pairs_per_block", [1, 3, 100])
def test_every_block_size_follows_the_definition(monkeypatch, options, pairs_per_block):
    monkeypatch.setattr(infonce, "BLOCK_BYTES", pairs_per_block * 4 * 8)
    loss = Matryoshka(InfoNCE(0.1, learnable_temperature=True, **options), DIMENSIONS, WEIGHTS)
    assert_as_defined(loss, graded_batch())
    with torch.no_grad():
        torch.testing.assert_close(loss(*graded_batch()), defined_loss(loss, *graded_batch()).float(), **CLOSE)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_false_negative_margin_drops_something_in_every_direction(direction):
    plain, dropped = (
        InfoNCE(0.1, directions=[direction], false_negative_margin=margin)(*graded_batch()) for margin in (None, 0.1)
    )
    assert dropped < plain - 0.01


class Quadratic(Loss):
    """A user's loss, which knows nothing of Matryoshka."""

    def forward(self, queries: Tensor, documents: Tensor, relevance: Tensor) -> Tensor:
        return (queries @ documents.T - relevance).square().mean()


@pytest.mark.parametrize("name", ["wants_scores", "wants_grades", "wants_negatives"])
def test_a_loss_that_says_in_the_old_way_what_it_needs_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine\.{name} is not read any more: set label_spec"):
        type("Mine", (Quadratic,), {name: True})


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_matryoshka_is_the_weighted_sum_of_any_loss(weights):
    queries, documents, relevance = graded_batch()
    parts = [Quadratic()(queries[:, :d], documents[:, :d], relevance) for d in DIMENSIONS]
    expected = torch.stack(parts) @ torch.tensor(weights or [1.0, 1.0, 1.0])
    value = Matryoshka(Quadratic(), DIMENSIONS, weights)(queries, documents, relevance)
    torch.testing.assert_close(value, expected, **CLOSE)


# Edges


def test_vectors_without_length_are_treated_as_by_normalize():
    """Zero everywhere, zero in the first numbers only, and shorter than what normalize divides by."""
    queries, documents, relevance = graded_batch()
    queries[0] = documents[4] = 0
    queries[1, :2] = documents[0, :5] = 0
    queries[2] *= 1e-14
    loss = Matryoshka(InfoNCE(0.1, directions=DIRECTIONS), DIMENSIONS, WEIGHTS)
    ours, definition = (
        value_and_gradients(function, (queries, documents, relevance))
        for function in (loss, lambda *tensors: defined_loss(loss, *tensors))
    )
    for tensor, expected in zip(ours, definition, strict=True):
        assert tensor.isfinite().all()
        # Row by row: a vector without length has a gradient 1e12 times that of its neighbours.
        size = expected.norm(dim=-1, keepdim=True).clamp_min(1.0)
        torch.testing.assert_close(tensor / size, expected / size, **CLOSE, check_dtype=False)


def test_queries_without_any_negative_cost_nothing():
    queries, documents, _ = graded_batch()
    loss = Matryoshka(InfoNCE(directions=["query_to_query"]), DIMENSIONS)
    tensors = value_and_gradients(loss, (queries[:1], documents[:2], torch.ones(1, 2, dtype=torch.int8)))
    # A logit of 50 in float32.
    assert all(tensor.abs().max() < 1e-4 for tensor in tensors)


def test_gradient_reaches_what_is_trained_and_nothing_else():
    queries, documents, relevance = graded_batch()
    documents.requires_grad_()
    loss = Matryoshka(InfoNCE(0.1), DIMENSIONS, WEIGHTS)
    (gradient,) = torch.autograd.grad(3 * loss(queries.bfloat16(), documents.bfloat16(), relevance), documents)
    rounded = [tensor.bfloat16().float().detach().requires_grad_() for tensor in (queries, documents)]
    expected = torch.autograd.grad(3 * defined_loss(loss, *rounded, relevance), rounded[1])[0]
    # The gradient passes through bfloat16, of 8 bits.
    torch.testing.assert_close(gradient, expected, rtol=2**-8, atol=1e-5)
    assert not loss(*graded_batch()).requires_grad


@pytest.mark.parametrize("directions", [CROSS[:1], DIRECTIONS])
def test_logits_and_gradients_are_float32_under_autocast(directions):
    queries, documents, relevance = shuffled(columns(negatives=1))
    low, high = (
        [tensor.to(dtype).requires_grad_() for tensor in (queries.bfloat16(), documents.bfloat16())]
        for dtype in (torch.bfloat16, torch.float32)
    )
    loss = Matryoshka(InfoNCE(directions=directions), [12, 5])
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*low, relevance)
    value.backward()  # Outside, as Lightning has it: autocast would convert what the gradient multiplies.
    expected = loss(*high, relevance)
    expected.backward()
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    for tensor, reference in zip(low, high, strict=True):
        assert torch.equal(tensor.grad, reference.grad.bfloat16())


# The learnable temperature


def test_learnable_temperature_is_trained_by_its_logarithm():
    loss = InfoNCE(temperature=0.05, learnable_temperature=True)
    batch = shuffled(columns(negatives=1))
    loss(*batch).backward()
    step = 1e-3
    up, down = (InfoNCE(temperature=0.05 * math.exp(-sign * step))(*batch) for sign in (1, -1))
    # A central difference in float32: 1e-6 of rounding over a step of 2e-3.
    assert float(loss.log_scale.grad) == pytest.approx(float(up - down) / (2 * step), abs=2e-3)
    assert loss.temperature == pytest.approx(0.05)
    assert not list(InfoNCE().parameters())


def test_learnable_temperature_stays_at_clips_bound_and_can_leave_it():
    loss = InfoNCE(temperature=0.02, learnable_temperature=True)
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    batch = shuffled(columns(negatives=1))
    value = loss(*batch)
    torch.testing.assert_close(value, InfoNCE(temperature=0.01)(*batch), **CLOSE)
    assert loss.temperature == pytest.approx(0.01)
    value.backward()
    assert loss.log_scale.grad != 0


@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: Matryoshka(loss, [12, 5])])
def test_learnable_temperature_follows_to_a_device_but_never_to_half_precision(wrap):
    inner = InfoNCE(temperature=0.07, learnable_temperature=True)
    module = nn.ModuleDict({"encoder": nn.Linear(2, 2), "loss": wrap(inner)})
    before, parameter = inner.log_scale.detach().clone(), inner.log_scale
    module.to(torch.bfloat16).half()
    assert module["encoder"].weight.dtype == torch.float16
    assert inner.log_scale is parameter
    assert torch.equal(parameter, before)
    assert before.dtype == torch.float32
    module.to("meta", torch.bfloat16)
    assert inner.log_scale.device.type == "meta"
    assert inner.log_scale.dtype == torch.float32


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"temperature": -0.02}, "temperature.*-0.02"),
        ({"temperature": 0.001, "learnable_temperature": True}, "0.001"),
        ({"directions": []}, "directions"),
        ({"directions": "query_to_document"}, "query_to_document"),
        ({"directions": ["query_to_doc"]}, "query_to_doc"),
        ({"directions": ["query_to_document"] * 2}, "once"),
        ({"softmax": "both"}, "both"),
        ({"directions": DIRECTIONS, "softmax": "per_direction"}, "document_to_document.*query_to_query"),
        ({"hardness": -1.0}, "-1.0"),
        ({"hardness_on": "positives"}, "positives"),
        ({"hardness": 5.0, "directions": ["document_to_query"]}, "document_to_query"),
        ({"false_negative_margin": math.nan}, "nan"),
    ],
)
def test_infonce_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        InfoNCE(**options)


@pytest.mark.parametrize(
    ("dimensions", "weights", "message"),
    [([], None, r"\[\]"), ([8, 8], None, "8, 8"), ([8, 0], None, "8, 0"), ([8, 4], [1.0], r"one per dimension \(2\)")],
)
def test_matryoshka_refuses(dimensions, weights, message):
    with pytest.raises(ValueError, match=message):
        Matryoshka(InfoNCE(), dimensions, weights)


def test_batches_that_do_not_fit_are_refused():
    queries, documents, relevance = graded_batch()
    with pytest.raises(ValueError, match=r"16.*6"):
        Matryoshka(InfoNCE(), [4, 16])(queries, documents, relevance)
    relevance[1] = relevance[3] = -1
    with pytest.raises(ValueError, match=r"rows \[1, 3\]"):
        InfoNCE()(queries, documents, relevance)


# Time and memory


class Operations(TorchDispatchMode):
    """Names of the operations that run, and the most bytes that their results take at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        storages = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.alive.update({StorageWeakRef(storage): storage.nbytes() for storage in storages})
        self.alive = {reference: size for reference, size in self.alive.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def operations(queries: int, dimensions: list[int], options: dict[str, Any]) -> Operations:
    loss, batch = (
        Matryoshka(InfoNCE(learnable_temperature=True, **options), dimensions),
        shuffled(columns(1, queries, 4)),
    )
    with Operations() as seen:
        value_and_gradients(loss, batch)
    return seen


@every_variant
def test_operations_do_not_depend_on_the_batch_size(options):
    assert operations(4, [4, 3, 2], options).names == operations(64, [4, 3, 2], options).names


@every_variant
def test_memory_is_bounded(monkeypatch, options):
    """Neither all similarities are stored, nor those of one dimension beside another's."""
    matrix = 4 * 128 * 256
    assert operations(128, [4], options).peak > 3 * matrix
    monkeypatch.setattr(infonce, "BLOCK_BYTES", matrix // 24)
    one, several = (operations(128, dimensions, options).peak for dimensions in ([4], [4, 3, 2]))
    # Relevance in float32, for directions that compare queries with queries or documents with documents.
    assert one < (1 if set(options["directions"]) <= set(CROSS) else 3) * matrix
    assert several < one + matrix / 4  # Embeddings of two more dimensions, no matrix.


@pytest.mark.gpu
@every_variant
@pytest.mark.parametrize("block_bytes", [64, 2**20])
def test_the_device_is_asked_once_at_most(monkeypatch, options, block_bytes):
    monkeypatch.setattr(infonce, "BLOCK_BYTES", block_bytes)
    queries, documents, relevance = shuffled(columns(1, 8, 4))
    queries, documents = queries.cuda().requires_grad_(), documents.cuda().requires_grad_()
    inner = InfoNCE(learnable_temperature=True, **options).cuda()
    cases = [(inner, relevance, 0), (Matryoshka(inner, [4, 3, 2]), relevance, 0), (inner, relevance.cuda(), 1)]
    for loss, grades, questions in cases:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                loss(queries, documents, grades).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len([warning for warning in seen if "synchronizing" in str(warning.message)]) == questions
