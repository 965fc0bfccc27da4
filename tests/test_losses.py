from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import Tensor, nn

from vlmembed.losses import InfoNCE, Loss, Matryoshka

CROSS = ("query_to_document", "document_to_query")
DIRECTIONS = (*CROSS, "query_to_query", "document_to_document")
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")

# Logits reach 50 and float32 carries 7 digits: sums in another order differ by some 1e-6.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def columns(negatives: int, queries: int = 5, size: int = 12) -> list[Tensor]:
    """Embeddings as Sentence Transformers takes them: queries, positives, and each column of negatives."""
    generator = torch.Generator().manual_seed(negatives)
    query = torch.randn(queries, size, generator=generator)
    others = [query + 0.7 * torch.randn(queries, size, generator=generator) for _ in range(1 + negatives)]
    return [query, *others]


def shuffled(columns: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same batch as one matrix of documents in arbitrary order, and who answers whom."""
    queries, *documents = columns
    relevance = torch.cat([torch.eye(len(queries)), *(-torch.eye(len(queries)) for _ in documents[1:])], dim=1)
    order = torch.randperm(len(queries) * len(documents), generator=torch.Generator().manual_seed(7))
    return queries, torch.cat(documents)[order], relevance[:, order].to(torch.int8)


def expected(columns: list[Tensor], temperature: float = 0.02, **options: Any) -> Tensor:
    """The value according to Sentence Transformers, which says doc where we say document."""
    options["directions"] = tuple(name.replace("document", "doc") for name in options["directions"])
    loss = MultipleNegativesRankingLoss(model=None, scale=1 / temperature, **options)
    return loss.compute_loss_from_embeddings(columns, labels=torch.empty(0))


def assert_same_value_and_gradients(loss: Loss, negatives: int, **options: Any) -> None:
    ours, theirs = ([each.requires_grad_() for each in columns(negatives)] for _ in range(2))
    value, reference = loss(*shuffled(ours)), expected(theirs, **options)
    torch.testing.assert_close(value, reference, **CLOSE)
    value.backward()
    reference.backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, **CLOSE)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize(
    "directions",
    [("query_to_document", *rest) for n in range(4) for rest in combinations(DIRECTIONS[1:], n)],
    ids=lambda names: "+".join(names),
)
def test_joint_softmax_equals_sentence_transformers(directions, negatives):
    assert_same_value_and_gradients(InfoNCE(directions=directions), negatives, directions=directions)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("directions", [CROSS[:1], CROSS, CROSS[::-1]])
def test_softmax_per_direction_equals_sentence_transformers(directions, negatives):
    loss = InfoNCE(temperature=0.05, directions=directions, softmax="per_direction")
    assert_same_value_and_gradients(
        loss, negatives, temperature=0.05, directions=directions, partition_mode="per_direction"
    )


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("hardness_on", HARDNESS)
@pytest.mark.parametrize(
    ("directions", "softmax"), [(CROSS[:1], "joint"), (CROSS, "per_direction"), (DIRECTIONS, "joint")]
)
def test_hardness_equals_sentence_transformers(directions, softmax, hardness_on, negatives):
    loss = InfoNCE(directions=directions, softmax=softmax, hardness=9.0, hardness_on=hardness_on)
    assert_same_value_and_gradients(
        loss,
        negatives,
        directions=directions,
        partition_mode=softmax,
        hardness_mode=hardness_on,
        hardness_strength=9.0,
    )


def graded_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Several positives per query, documents shared by queries, and hard negatives, in no order."""
    relevance = torch.tensor(
        [
            [0, 1, 0, 0, -1, 1, 0, 0],
            [1, 0, 0, -1, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, -1, 0],
            [-1, 0, 1, 1, 0, 0, 0, 1],
        ],
        dtype=torch.int8,
    )
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(1, 6, generator=generator)
    queries = shared + torch.randn(4, 6, generator=generator)
    documents = shared + torch.randn(8, 6, generator=generator)
    return queries, documents, relevance


LOG_10 = math.log(10)


def slow_infonce(
    queries: Tensor,
    documents: Tensor,
    relevance: Tensor,
    directions: Sequence[str],
    softmax: str = "joint",
    false_negative_margin: float | None = None,
    hardness: float = 0.0,
    hardness_on: str = "all_negatives",
    log_scale: Tensor | float = LOG_10,
) -> Tensor:
    """The definition, one pair and one candidate at a time, in float64."""
    Q, P = relevance.shape
    judged = relevance.tolist()
    every = torch.cat([nn.functional.normalize(each.double(), dim=-1) for each in (queries, documents)])
    cosine = every @ every.T
    scale = torch.as_tensor(log_scale, dtype=torch.float64).exp()
    weighed = {"in_batch_negatives": [0], "hard_negatives": [-1], "all_negatives": [0, -1]}[hardness_on]

    def share_a_positive(i: int, j: int) -> bool:
        return any(judged[i][d] == judged[j][d] == 1 for d in range(P))

    def judged_together(d: int, e: int) -> bool:
        return any(judged[i][d] != 0 and judged[i][e] != 0 for i in range(Q))

    per_query = []
    for q in range(Q):
        per_positive = []
        for p in (d for d in range(P) if judged[q][d] == 1):
            negatives = {
                "query_to_document": [(q, Q + d) for d in range(P) if judged[q][d] != 1],
                "document_to_query": [(Q + p, i) for i in range(Q) if judged[i][p] != 1],
                "query_to_query": [(q, i) for i in range(Q) if not share_a_positive(q, i)],
                "document_to_document": [(Q + p, Q + d) for d in range(P) if not judged_together(p, d)],
            }
            positive = cosine[q, Q + p]
            groups = [list(directions)] if softmax == "joint" else [[direction] for direction in directions]
            losses = []
            for group in groups:
                logits = [scale * positive] * max(1, sum(direction in CROSS for direction in group))
                for direction in group:
                    for row, column in negatives[direction]:
                        if false_negative_margin is None or cosine[row, column] <= positive + false_negative_margin:
                            hard = direction == "query_to_document" and judged[q][column - Q] in weighed
                            logits.append(cosine[row, column] * scale + hard * hardness * cosine[row, column].detach())
                losses.append(torch.stack(logits).exp().sum().log() - scale * positive)
            per_positive.append(torch.stack(losses).mean())
        per_query.append(torch.stack(per_positive).mean())
    return torch.stack(per_query).mean()


@pytest.mark.parametrize("margin", [None, 0.1, -0.2])
@pytest.mark.parametrize(
    ("directions", "softmax"),
    [(names, "joint") for n in range(1, 5) for names in combinations(DIRECTIONS, n)]
    + [(names, "per_direction") for names in (CROSS[:1], CROSS[1:], CROSS)],
)
def test_several_positives_and_shared_documents_follow_the_definition(directions, softmax, margin):
    loss = InfoNCE(temperature=0.1, directions=directions, softmax=softmax, false_negative_margin=margin)
    reference = slow_infonce(*graded_batch(), directions, softmax, margin)
    assert float(loss(*graded_batch())) == pytest.approx(float(reference), abs=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_false_negative_margin_drops_something_in_every_direction(direction):
    plain, dropped = (
        slow_infonce(*graded_batch(), [direction], false_negative_margin=margin) for margin in (None, 0.1)
    )
    assert dropped < plain - 0.01


def test_document_to_query_alone_is_infonce_with_the_roles_swapped():
    queries, documents, relevance = shuffled(columns(negatives=0))
    value = InfoNCE(directions=["document_to_query"])(queries, documents, relevance)
    torch.testing.assert_close(value, InfoNCE()(documents, queries, relevance.T), **CLOSE)


def test_other_positives_are_neither_target_nor_negative():
    """Moving one positive of a query changes nothing about another one's pair."""
    queries, documents, _ = graded_batch()
    relevance = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.int8)
    loss = InfoNCE(temperature=0.1)
    first, second = (loss(queries[:1], documents[[d, *range(2, 8)]], relevance[:, 1:]) for d in (0, 1))
    torch.testing.assert_close(loss(queries[:1], documents, relevance), (first + second) / 2, **CLOSE)


@pytest.mark.parametrize("directions", [CROSS[:1], DIRECTIONS])
def test_logits_and_gradients_are_float32_under_autocast(directions):
    queries, documents, relevance = shuffled(columns(negatives=1))
    low, high = (
        [each.to(dtype).requires_grad_() for each in (queries.bfloat16(), documents.bfloat16())]
        for dtype in (torch.bfloat16, torch.float32)
    )
    loss = Matryoshka(InfoNCE(directions=directions), [12, 5])
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*low, relevance)
        value.backward()
    expected = loss(*high, relevance)
    expected.backward()
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    for one, other in zip(low, high, strict=True):
        assert torch.equal(one.grad, other.grad.bfloat16())


def test_hardness_takes_no_gradient():
    """Gradient of a hardened softmax: the softmax weights change, the path through the penalty is cut."""
    queries, documents, relevance = shuffled(columns(negatives=0, queries=2))
    documents.requires_grad_()
    InfoNCE(temperature=0.5, hardness=3.0)(queries, documents, relevance).backward()
    copy = documents.detach().clone().requires_grad_()
    cosine = torch.cosine_similarity(queries[:, None], copy[None], dim=-1)
    logits = cosine / 0.5 + 3.0 * cosine.detach() * (relevance != 1)
    nn.functional.cross_entropy(logits, relevance.argmax(1).long()).backward()
    torch.testing.assert_close(documents.grad, copy.grad, **CLOSE)


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


def test_infonce_refuses_queries_without_positive():
    queries, documents, relevance = graded_batch()
    relevance[1] = relevance[3] = -1
    with pytest.raises(ValueError, match=r"rows \[1, 3\]"):
        InfoNCE()(queries, documents, relevance)


class Columns(nn.Module):
    """Stands in for a model of Sentence Transformers whose features are already embeddings."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return 12


def test_matryoshka_equals_sentence_transformers():
    model = Columns()
    ours, theirs = ([each.requires_grad_() for each in columns(negatives=2)] for _ in range(2))
    their_loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=50.0), [4, 12, 7], [0.5, 2.0, 1.0])
    reference = their_loss([{"sentence_embedding": each} for each in theirs], torch.empty(0))
    our_loss = Matryoshka(InfoNCE(temperature=0.02), [4, 12, 7], [0.5, 2.0, 1.0])
    value = our_loss(*shuffled(ours))
    torch.testing.assert_close(value, reference, **CLOSE)
    value.backward()
    reference.backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, **CLOSE)
    assert our_loss.dimensions == (12, 7, 4)
    assert InfoNCE().dimensions == ()


def test_matryoshka_weights_default_to_one_and_the_wrapped_temperature_learns():
    queries, documents, relevance = shuffled(columns(negatives=1))
    inner = InfoNCE(learnable_temperature=True)
    value = Matryoshka(inner, [12, 5])(queries, documents, relevance)
    parts = [InfoNCE()(queries[:, :d], documents[:, :d], relevance) for d in (12, 5)]
    torch.testing.assert_close(value, parts[0] + parts[1], **CLOSE)
    (gradient,) = torch.autograd.grad(value, inner.log_scale)
    separate = [inner(queries[:, :d], documents[:, :d], relevance) for d in (12, 5)]
    torch.testing.assert_close(gradient, torch.autograd.grad(separate[0] + separate[1], inner.log_scale)[0], **CLOSE)


@pytest.mark.parametrize(
    ("dimensions", "weights", "message"),
    [([], None, r"\[\]"), ([8, 8], None, "8, 8"), ([8, 0], None, "8, 0"), ([8, 4], [1.0], r"one per dimension \(2\)")],
)
def test_matryoshka_refuses(dimensions, weights, message):
    with pytest.raises(ValueError, match=message):
        Matryoshka(InfoNCE(), dimensions, weights)


def test_matryoshka_refuses_a_dimension_above_the_embeddings():
    with pytest.raises(ValueError, match=r"16.*12"):
        Matryoshka(InfoNCE(), [8, 16])(*shuffled(columns(negatives=0)))


@pytest.mark.parametrize("loss", [InfoNCE(directions=DIRECTIONS), Matryoshka(InfoNCE(), [4, 2])])
def test_shapes_are_as_annotated(loss):
    forward = jaxtyped(typechecker=beartype)(type(loss).forward)
    assert forward(loss, *graded_batch()).shape == ()
