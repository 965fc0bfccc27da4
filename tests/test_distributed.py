from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import ddp
import pytest
import torch
import torch.distributed as dist
from building import collated, examples, item, texts
from torch import Tensor, nn

from vlmembed import distributed
from vlmembed.data import ItemCollator
from vlmembed.modules.embedding import gather_batch
from vlmembed.types import Example, Inputs, Item, Preprocessor

# Collectives

ROWS = [3, 5]


def rows_of(rank: int) -> Tensor:
    return torch.randn(ROWS[rank], 4, generator=torch.Generator().manual_seed(rank))


def some_loss(joined: Tensor) -> Tensor:
    """No row and no column is like another."""
    weight = torch.arange(joined.numel()).reshape(joined.shape).cos()
    return (joined.tanh() * weight).sum() + (joined @ joined.flip(0).T).pow(2).mean()


def gather_and_differentiate() -> dict[str, Any]:
    own = rows_of(dist.get_rank()).requires_grad_()
    gathered = distributed.gather(own)
    some_loss(gathered).backward()
    numbers = distributed.gather(torch.arange(ROWS[dist.get_rank()]).to(torch.int8))
    empty = distributed.gather(torch.ones(2 * dist.get_rank(), 3))
    half = distributed.gather(torch.full((1 + dist.get_rank(), 2), 0.5, dtype=torch.bfloat16))
    largest = distributed.largest(ROWS[dist.get_rank()], torch.device("cpu"))
    found = {"gathered": gathered, "gradient": own.grad, "numbers": numbers, "empty": empty, "half": half}
    return {**found, "largest": largest}


def test_gather_joins_uneven_rows_and_returns_their_gradient() -> None:
    found = ddp.run(gather_and_differentiate)
    joined = torch.cat([rows_of(0), rows_of(1)]).requires_grad_()
    some_loss(joined).backward()
    assert joined.grad is not None
    for rank, gradient in enumerate(joined.grad.split(ROWS)):
        assert torch.equal(found[rank]["gathered"], joined)
        torch.testing.assert_close(found[rank]["gradient"], gradient * ddp.WORLD_SIZE)
        assert found[rank]["numbers"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
        assert found[rank]["numbers"].dtype == torch.int8
        assert torch.equal(found[rank]["empty"], torch.ones(2, 3))
        assert found[rank]["largest"] == max(ROWS)
        assert torch.equal(found[rank]["half"], torch.full((3, 2), 0.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("limit", [0.1, 1e6])
def test_gradients_are_clipped_as_pytorch_does(limit: float) -> None:
    """Where nothing is in shards; `test_sharding` has the rest."""
    found, expected = ([each for each in parameters_of(0) if each.dtype == torch.float32] for _ in range(2))
    distributed.clip_gradients(found, limit, distributed.gradient_norm(found))
    nn.utils.clip_grad_norm_(expected, limit)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


#: Shape and dtype of each parameter, and which ranks have a gradient for it.
PARAMETERS: list[tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]] = [
    ((3, 5), torch.float32, (0, 1)),
    ((7,), torch.bfloat16, (0, 1)),
    ((2, 2), torch.float32, (1,)),
    ((), torch.float32, (0, 1)),
    ((4,), torch.float32, ()),
    ((6, 2), torch.float64, (0,)),
    ((9,), torch.float32, (0, 1)),
]


def parameters_of(rank: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(10 + rank)
    parameters = []
    for shape, dtype, ranks in PARAMETERS:
        parameter = nn.Parameter(torch.ones(shape, dtype=dtype))
        # Eighths: their means are exact in every dtype.
        gradient = torch.randint(-8, 9, shape, generator=generator).to(dtype) / 8
        parameter.grad = gradient if rank in ranks else None
        parameters.append(parameter)
    return parameters


def average(bucket_bytes: int) -> tuple[list[Tensor | None], int]:
    distributed.BUCKET_BYTES = bucket_bytes
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    distributed.mean_gradients([frozen])
    parameters = [frozen, *parameters_of(dist.get_rank())]
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        distributed.mean_gradients(parameters)
    assert frozen.grad is None
    # The first message is about who has which gradient.
    return [parameter.grad for parameter in parameters[1:]], all_reduce.call_count - 1


@pytest.mark.parametrize(("bucket_bytes", "messages"), [(1, 6), (60, 4), (2**20, 3)])
def test_gradients_become_their_mean(bucket_bytes: int, messages: int) -> None:
    """One message per bucket: alone; float32's 60, then 16 + 4 + 36 bytes, and two other dtypes; one per dtype."""
    for gradients, sent in ddp.run(average, bucket_bytes):
        assert sent == messages
        for index, (shape, dtype, ranks) in enumerate(PARAMETERS):
            given = [parameters_of(rank)[index].grad for rank in ranks]
            if not given:
                assert gradients[index] is None
                continue
            expected = torch.stack(given).sum(0) / ddp.WORLD_SIZE
            assert (expected.shape, expected.dtype) == (shape, dtype)
            torch.testing.assert_close(gradients[index], expected, rtol=0, atol=0)


# Batches of several processes


class Lookup(Preprocessor):
    """An item's embedding, drawn from its id."""

    def __call__(self, items: Sequence[Item]) -> Inputs:
        return {"embedding": torch.stack([embedding_of(each) for each in items])}

    def cost(self, item: Item) -> int:
        return item.id % 7


def embedding_of(item: Item) -> Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(item.id % 2**31))


def shares() -> list[list[Example]]:
    """What each process holds: both a certain query, and a wrong answer of the one is a right one of the other."""
    rows = examples(5)
    contested = rows[2].negatives[0]
    return [rows[:3], [*rows[3:], Example(rows[2].query, (contested,), (item("one more wrong answer"),)), *texts(2)]]


def joined(chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    data = collated(ItemCollator(Lookup()), shares()[dist.get_rank()], chunk_size)
    return gather_batch(torch.cat([chunk["embedding"] for chunk in data.chunks]), data)


def judged(rows: list[Example]) -> tuple[list[Item], list[Item], Tensor]:
    """Distinct queries and documents by id, and for each pair of them whether any row says right, or else wrong."""
    queries = {row.query.id: row.query for row in rows}
    documents = {each.id: each for row in rows for each in (*row.positives, *row.negatives)}
    relevance = torch.zeros(len(queries), len(documents), dtype=torch.int8)
    for row in rows:
        for document in row.negatives:
            relevance[sorted(queries).index(row.query.id), sorted(documents).index(document.id)] = -1
    for row in rows:
        for document in row.positives:
            relevance[sorted(queries).index(row.query.id), sorted(documents).index(document.id)] = 1
    return [queries[key] for key in sorted(queries)], [documents[key] for key in sorted(documents)], relevance


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_joined_batches_are_the_batch_of_all_examples(chunk_size: int) -> None:
    rows = [row for share in shares() for row in share]
    queries, documents, relevance = judged(rows)
    assert len(queries) == len(rows) - 1
    data = collated(ItemCollator(Lookup()), rows, chunk_size)
    alone = gather_batch(torch.cat([chunk["embedding"] for chunk in data.chunks]), data)
    for found in (alone, *ddp.run(joined, chunk_size)):
        assert torch.equal(found[0], torch.stack([embedding_of(query) for query in queries]))
        assert torch.equal(found[1], torch.stack([embedding_of(document) for document in documents]))
        assert torch.equal(found[2], relevance)
