"""MaxSim, its gradient and its memory, against slow loops and finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import pytest
import torch
from building import slow_maxsim
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmembed.late_interaction import MultiVectors, maxsim
from vlmembed.losses import InfoNCE, MergedTokens

#: Lengths of queries and of documents.
RAGGED = [
    ([3, 1, 5], [4, 1, 7, 2]),
    ([1, 1], [1, 1, 1]),
    ([4], [6]),
    ([2], [3, 9, 1]),
    ([5, 2, 1], [8]),
    ([3, 3], [5, 5, 5]),
    ([1], [1]),
]
#: Not what the package calls so, which is the function.
MODULE = import_module("vlmembed.late_interaction")


def items(lengths: Sequence[int], seed: int = 0, size: int = 6, **options: bool) -> MultiVectors:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(sum(lengths), size, generator=generator, dtype=torch.float64)
    return MultiVectors(3 * vectors, torch.tensor(lengths), **options)


def slow(queries: MultiVectors, documents: MultiVectors) -> Tensor:
    return slow_maxsim(queries.split(), documents.split(), queries.length_normalized)


def with_gradient(score: object, queries: MultiVectors, documents: MultiVectors) -> list[Tensor]:
    """Scores, and the gradients of a weighted sum of them."""
    leaves = [side.vectors.clone().requires_grad_() for side in (queries, documents)]
    sides = [side.map(lambda _, leaf=leaf: leaf) for side, leaf in zip((queries, documents), leaves, strict=True)]
    scores = score(*sides)  # type: ignore[operator]
    weights = torch.linspace(-1, 2, scores.numel(), dtype=scores.dtype).view_as(scores)
    return [scores.detach(), *torch.autograd.grad((scores * weights).sum(), leaves)]


@pytest.mark.parametrize("tile", [1, 8, 30, 2**22])
@pytest.mark.parametrize("height", [1, 2, 2**13])
@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize(("query_lengths", "document_lengths"), RAGGED)
def test_scores_and_gradients_are_those_of_a_loop(
    monkeypatch: pytest.MonkeyPatch,
    query_lengths: list[int],
    document_lengths: list[int],
    length_normalized: bool,
    height: int,
    tile: int,
) -> None:
    monkeypatch.setattr(MODULE, "TILE", tile)
    monkeypatch.setattr(MODULE, "MAXIMUM_HEIGHT", height)
    sides = items(query_lengths, 1, length_normalized=length_normalized), items(document_lengths, 2)
    for actual, expected in zip(with_gradient(maxsim, *sides), with_gradient(slow, *sides), strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("query_lengths", "document_lengths"), RAGGED[:3])
def test_gradients_are_those_of_finite_differences(query_lengths: list[int], document_lengths: list[int]) -> None:
    queries, documents = items(query_lengths, 1), items(document_lengths, 2)

    def scores(of_queries: Tensor, of_documents: Tensor) -> Tensor:
        return maxsim(queries.map(lambda _: of_queries), documents.map(lambda _: of_documents))

    assert gradcheck(scores, [side.vectors.requires_grad_() for side in (queries, documents)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_left_whatever_is_around(dtype: torch.dtype) -> None:
    """Under autocast, in the backward pass as well, which may be inside of it."""
    sides = [items(lengths, seed, 64).map(lambda rows: rows.to(dtype)) for lengths, seed in (([3, 1], 1), ([4, 9], 2))]
    expected = with_gradient(slow, *[side.map(Tensor.double) for side in sides])
    with torch.autocast("cpu", torch.bfloat16):
        scores, *gradients = with_gradient(maxsim, *sides)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected[0], rtol=0, atol=1e-5)  # float32's sums of 64.
    for gradient, wanted in zip(gradients, expected[1:], strict=True):
        # Rounded once, to the type of the vectors.
        torch.testing.assert_close(gradient, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("trained", [0, 1])
def test_one_side_may_be_frozen(trained: int) -> None:
    sides = items([3, 1], 1), items([4, 2], 2)
    expected = with_gradient(slow, *sides)[1 + trained]
    sides[trained].vectors.requires_grad_()
    weights = torch.linspace(-1, 2, 4, dtype=torch.float64).view(2, 2)
    (maxsim(*sides) * weights).sum().backward()
    torch.testing.assert_close(sides[trained].vectors.grad, expected)
    assert sides[1 - trained].vectors.grad is None


def test_a_tie_goes_to_one_vector_and_every_run_is_the_same() -> None:
    """The gradient adds up to that of one vector, wherever it goes."""
    queries = items([2, 3], 1)
    documents = MultiVectors(torch.ones(5, 6, dtype=torch.float64), torch.tensor([3, 2]))
    _, _, to_documents = with_gradient(maxsim, queries, documents)
    weights = torch.linspace(-1, 2, 4, dtype=torch.float64).view(2, 2)
    sums = torch.stack([query.sum(0) for query in queries.map(normalize).split()])
    across = weights.T @ sums
    across -= across.mean(dim=1, keepdim=True)  # What points along the ones changes no cosine.
    parts = torch.stack([part.sum(0) for part in to_documents.split([3, 2])])
    torch.testing.assert_close(parts, across / 6**0.5)
    again = with_gradient(maxsim, queries, documents)
    assert torch.equal(again[2], to_documents)


@pytest.mark.parametrize("side", ["query", "document"])
def test_an_item_without_vectors_is_refused(side: str) -> None:
    whole, empty = items([2, 1]), MultiVectors(items([3]).vectors, torch.tensor([2, 0, 1]))
    with pytest.raises(ValueError, match=rf"every {side} needs a vector, and of 3 numbers \[1\] have none"):
        maxsim(*((empty, whole) if side == "query" else (whole, empty)))
    nothing = MultiVectors(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=f"every {side} needs a vector, and of 0"):
        maxsim(*((nothing, whole) if side == "query" else (whole, nothing)))
    wrong = MultiVectors(items([3]).vectors, torch.tensor([2, 2]))
    with pytest.raises(ValueError, match=f"the lengths of {side} items add up to 4, but there are 3 vectors"):
        maxsim(*((wrong, whole) if side == "query" else (whole, wrong)))


class Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that anything makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        made = function(*arguments, **(options or {}))
        sizes = [tensor.untyped_storage().nbytes() // 4 for tensor in tree_leaves(made) if isinstance(tensor, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return made


def test_no_tensor_grows_with_queries_times_vectors_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "TILE", 2**10)
    queries, documents = (items([length] * 16, length, 8).map(Tensor.float) for length in (4, 32))
    with Largest() as largest:
        with_gradient(maxsim, queries, documents)
    # The vectors of documents themselves: 16 × 32 × 8. All products would be 64 × 512.
    assert largest.numbers <= max(len(documents.vectors) * 8, 64 * 32)


def test_vectors_that_are_not_finite_make_a_loss_that_is_not() -> None:
    """Of which the step is skipped, and the run goes on."""
    documents = items([3, 4], 3)
    documents.vectors[1] = torch.nan
    losses = [InfoNCE(), MergedTokens(InfoNCE(), [2, 3])]
    assert not any(loss(items([2, 1]), documents, torch.eye(2, dtype=torch.int8)).isfinite() for loss in losses)
