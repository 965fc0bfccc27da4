"""All Matryoshka dimensions in one pass, and pairs in tiles: the same loss, in fewer operations and less memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_losses import CROSS, DIRECTIONS, HARDNESS, graded_batch, slow_infonce
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlmembed.losses import InfoNCE, Loss, Matryoshka, similarity

DIMENSIONS = [5, 2, 6]
WEIGHTS = [0.5, 2.0, 1.0]

# float32 against float64: logits reach 20 and gradients 10, so that a rounding of 1e-7 weighs some 1e-6.
EXACT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

OPTIONS: list[dict[str, Any]] = [
    *({"directions": [direction]} for direction in DIRECTIONS),
    {"directions": CROSS},
    {"directions": CROSS[::-1], "softmax": "per_direction"},
    {"directions": DIRECTIONS},
    *({"directions": CROSS, "hardness": 5.0, "hardness_on": kind} for kind in HARDNESS),
    {"directions": DIRECTIONS, "false_negative_margin": 0.1},
    {"directions": CROSS, "softmax": "per_direction", "false_negative_margin": -0.2, "hardness": 3.0},
]


def single_batch() -> tuple[Tensor, Tensor, Tensor]:
    """One positive per query, documents in another order than queries, and hard negatives."""
    relevance = torch.zeros(4, 7, dtype=torch.int8)
    relevance[range(4), [5, 0, 6, 2]] = 1
    relevance[range(3), [1, 3, 0]] = -1
    generator = torch.Generator().manual_seed(5)
    shared = torch.randn(1, 6, generator=generator)
    return shared + torch.randn(4, 6, generator=generator), shared + torch.randn(7, 6, generator=generator), relevance


def random_batch(queries: int, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Two documents per query, one a positive and one a hard negative."""
    relevance = torch.cat([torch.eye(queries), -torch.eye(queries)], dim=1).to(torch.int8)
    generator = torch.Generator().manual_seed(queries)
    return (
        torch.randn(queries, size, generator=generator),
        torch.randn(2 * queries, size, generator=generator),
        relevance,
    )


def reference(queries: Tensor, documents: Tensor, relevance: Tensor, log_scale: Tensor, **options: Any) -> Tensor:
    losses = [
        weight * slow_infonce(queries[:, :d], documents[:, :d], relevance, log_scale=log_scale, **options)
        for d, weight in zip(DIMENSIONS, WEIGHTS, strict=True)
    ]
    return torch.stack(losses).sum()


def value_and_gradients(
    loss: Callable[..., Tensor], batch: tuple[Tensor, Tensor, Tensor], *more: Tensor
) -> list[Tensor]:
    queries, documents = (each.clone().requires_grad_() for each in batch[:2])
    value = loss(queries, documents, batch[2])
    return [value.detach(), *torch.autograd.grad(value, [queries, documents, *more])]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT, check_dtype=False)


def identifier(options: dict[str, Any]) -> str:
    return "-".join(str(len(value) if isinstance(value, tuple) else value) for value in options.values())


@pytest.mark.parametrize("batch", [graded_batch, single_batch])
@pytest.mark.parametrize("options", OPTIONS, ids=identifier)
@pytest.mark.parametrize("pairs_per_tile", [1, 3, 100])
def test_every_tiling_follows_the_definition(monkeypatch, options, batch, pairs_per_tile):
    relevance = batch()[2]
    monkeypatch.setattr(similarity, "TILE_BYTES", pairs_per_tile * 4 * len(DIMENSIONS) * relevance.shape[1])
    inner = InfoNCE(0.1, learnable_temperature=True, **options)
    tiles = []
    monkeypatch.setattr(inner, "pair_losses", lambda pairs: tiles.append(pairs) or InfoNCE.pair_losses(inner, pairs))
    found = value_and_gradients(Matryoshka(inner, DIMENSIONS, WEIGHTS), batch(), inner.log_scale)
    assert len(tiles) == math.ceil((relevance == 1).sum() / pairs_per_tile)
    log_scale = torch.tensor(math.log(10), requires_grad=True)
    expected = value_and_gradients(lambda *each: reference(*each, log_scale, **options), batch(), log_scale)
    assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(Matryoshka(inner, DIMENSIONS, WEIGHTS)(*batch()), found[0])


class Own(Loss):
    """A user's loss, which says nothing of similarities."""

    def __init__(self, inner: Loss) -> None:
        super().__init__()
        self.inner = inner
        self.sizes: list[int] = []

    def forward(self, queries: Tensor, documents: Tensor, relevance: Tensor) -> Tensor:
        self.sizes.append(queries.shape[1])
        return self.inner(queries, documents, relevance) + queries.square().mean()


class Regularised(InfoNCE):
    """A user's change of a loss, which is to be called."""

    def forward(self, queries: Tensor, documents: Tensor, relevance: Tensor) -> Tensor:
        return super().forward(queries, documents, relevance) + queries.square().mean()


@pytest.mark.parametrize("own", [Own(InfoNCE(0.1)), Regularised(0.1)])
def test_matryoshka_calls_any_other_loss_once_per_dimension(own):
    def expected(queries: Tensor, documents: Tensor, relevance: Tensor) -> Tensor:
        squares = [w * queries[:, :d].square().mean() for d, w in zip(DIMENSIONS, WEIGHTS, strict=True)]
        infonce = reference(queries, documents, relevance, math.log(10), directions=CROSS[:1])
        return infonce + torch.stack(squares).sum()

    found = value_and_gradients(Matryoshka(own, DIMENSIONS, WEIGHTS), graded_batch())
    assert_close(found, value_and_gradients(expected, graded_batch()))
    if isinstance(own, Own):
        assert own.sizes == sorted(DIMENSIONS, reverse=True)


def test_vectors_without_length_are_treated_as_by_normalize():
    """Zero everywhere, zero in the first numbers only, and shorter than what normalize divides by."""

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        queries, documents, relevance = graded_batch()
        queries[0] = documents[4] = 0
        queries[1, :2] = documents[0, :5] = 0
        queries[2] *= 1e-14
        return queries, documents, relevance

    options = {"directions": DIRECTIONS}
    found = value_and_gradients(Matryoshka(InfoNCE(0.1, **options), DIMENSIONS, WEIGHTS), batch())
    expected = value_and_gradients(lambda *each: reference(*each, math.log(10), **options), batch())
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        # Row by row: a vector without length has a gradient 1e12 times that of its neighbours.
        size = other.norm(dim=-1, keepdim=True).clamp_min(1.0)
        torch.testing.assert_close(one / size, other / size, **EXACT, check_dtype=False)


def test_queries_without_any_negative_cost_nothing():
    queries, documents, _ = graded_batch()
    loss = Matryoshka(InfoNCE(directions=["query_to_query"]), DIMENSIONS)
    found = value_and_gradients(loss, (queries[:1], documents[:2], torch.ones(1, 2, dtype=torch.int8)))
    # A logit of 50 in float32.
    assert all(each.abs().max() < 1e-4 for each in found)


def test_gradient_reaches_what_is_trained_and_nothing_else():
    queries, documents, relevance = graded_batch()
    documents.requires_grad_()
    value = 3 * Matryoshka(InfoNCE(0.1), DIMENSIONS, WEIGHTS)(queries.bfloat16(), documents.bfloat16(), relevance)
    (found,) = torch.autograd.grad(value, documents)
    both = [each.bfloat16().float().detach().requires_grad_() for each in (queries, documents)]
    expected = 3 * reference(*both, relevance, math.log(10), directions=CROSS[:1])
    # The gradient passes through bfloat16, of 8 bits.
    torch.testing.assert_close(found, torch.autograd.grad(expected, both[1])[0], rtol=2**-8, atol=1e-5)
    assert not Matryoshka(InfoNCE(0.1), DIMENSIONS)(*graded_batch()).requires_grad


class Operations(TorchDispatchMode):
    """Names of the operations that run, and the size of the largest tensor they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result


def operations(batch: tuple[Tensor, Tensor, Tensor], **options: Any) -> Operations:
    loss = Matryoshka(InfoNCE(learnable_temperature=True, **options), [16, 8, 4])
    with Operations() as found:
        value_and_gradients(loss, batch)
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=identifier)
def test_operations_do_not_depend_on_the_batch_size(options):
    small, large = (operations(random_batch(size), **options).names for size in (4, 64))
    assert small == large


@pytest.mark.parametrize("options", OPTIONS, ids=identifier)
def test_memory_is_bounded(monkeypatch, options):
    batch = random_batch(128)
    untiled = operations(batch, **options).largest
    assert untiled >= 3 * 128 * 128 * 4
    monkeypatch.setattr(similarity, "TILE_BYTES", 48 * 1024)
    # Above all that there is one of: relevance (32 KiB), embeddings (16 KiB).
    assert operations(batch, **options).largest <= 48 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=identifier)
def test_the_device_is_asked_once_at_most(options):
    queries, documents, relevance = random_batch(8)
    loss = Matryoshka(InfoNCE(learnable_temperature=True, **options), [16, 8, 4]).cuda()
    queries, documents = queries.cuda().requires_grad_(), documents.cuda().requires_grad_()
    for asked, where in enumerate((relevance, relevance.cuda())):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                loss(queries, documents, where).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len([each for each in seen if "synchronizing" in str(each.message)]) == asked
