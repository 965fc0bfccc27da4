from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ddp
import pytest
import torch
import torch.distributed as dist
from building import Recorder, batch, examples, fit, item, module, picture, relative_difference, texts
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlmembed import distributed
from vlmembed.adapters import Adapter, Freeze, LoRA
from vlmembed.data import Collator, RetrievalDataModule, load_evaluation
from vlmembed.losses import InfoNCE, Loss, Matryoshka
from vlmembed.modules.embedding import joined_batch
from vlmembed.types import Example, Inputs, Item, Preprocessor

# Another order of float32 sums.
EXACT = 1e-5

# Collectives alone

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
    return {"gathered": gathered, "gradient": own.grad, "numbers": numbers, "empty": empty, "half": half}


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
        assert torch.equal(found[rank]["half"], torch.full((3, 2), 0.5, dtype=torch.bfloat16))


def test_alone_nothing_is_gathered() -> None:
    tensor = rows_of(0)
    assert distributed.world_size() == 1
    assert distributed.gather(tensor) is tensor


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
    data = Collator(Lookup(), chunk_size)(shares()[dist.get_rank()])
    return joined_batch(torch.cat([chunk["embedding"] for chunk in data.chunks]), data)


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
    data = Collator(Lookup(), chunk_size)(rows)
    alone = joined_batch(torch.cat([chunk["embedding"] for chunk in data.chunks]), data)
    for found in (alone, *ddp.run(joined, chunk_size)):
        assert torch.equal(found[0], torch.stack([embedding_of(query) for query in queries]))
        assert torch.equal(found[1], torch.stack([embedding_of(document) for document in documents]))
        assert torch.equal(found[2], relevance)


# Training


#: Far below the norm of any of these gradients, about 50.
CLIP = 0.5

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False)


@dataclass(frozen=True)
class Scenario:
    """One training run, and what it is made of.

    Args:
        steps: For each batch, the examples of the two processes.
        loss: Of the module.
        adapters: Of the module.
        trainer: Options of Lightning's trainer.
    """

    steps: list[tuple[list[Example], list[Example]]]
    loss: Loss = field(default_factory=lambda: Matryoshka(InfoNCE(0.05), [64, 16]))
    adapters: tuple[Adapter, ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)

    def train(self, checkpoint: Path, rank: int | None, chunk_size: int | None) -> Recorder:
        """Train as one of two processes, or alone on everybody's examples."""
        torch.manual_seed(0)
        model = module(checkpoint, self.loss, adapters=self.adapters, optimizer=partial(torch.optim.SGD, lr=0.01))
        rows = [[*first, *second] if rank is None else (first, second)[rank] for first, second in self.steps]
        options = dict(self.trainer)
        if rank is not None:
            options |= {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
        return fit(model, [batch(model, each, chunk_size) for each in rows], **options)


def mixed_steps(count: int) -> list[tuple[list[Example], list[Example]]]:
    """Uneven shares; a document of both, several positives, different numbers of negatives."""
    rows = examples(5 * count)
    return [(rows[start : start + 2], rows[start + 2 : start + 5]) for start in range(0, 5 * count, 5)]


def split_steps(count: int) -> list[tuple[list[Example], list[Example]]]:
    """Pictures in the first process, texts alone in the second."""
    return [(examples(3), texts(count + 1)[step:]) for step in range(count)]


def learnable() -> Loss:
    return InfoNCE(0.05, learnable_temperature=True, directions=["query_to_document", "document_to_query"])


SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "plain": lambda: Scenario(mixed_steps(3)),
    "accumulation": lambda: Scenario(mixed_steps(6), trainer={"accumulate_grad_batches": 2}),
    "clipping": lambda: Scenario(mixed_steps(3), trainer={"gradient_clip_val": CLIP}),
    "learnable temperature": lambda: Scenario(mixed_steps(3), learnable()),
    "LoRA": lambda: Scenario(mixed_steps(3), adapters=(LoRA(LORA),)),
    "frozen vision": lambda: Scenario(mixed_steps(3), adapters=(Freeze(["vision", "merger"]),)),
    "pictures in one process": lambda: Scenario(split_steps(3)),
    "everything": lambda: Scenario(
        split_steps(6), learnable(), (LoRA(LORA),), {"accumulate_grad_batches": 2, "gradient_clip_val": CLIP}
    ),
}


def train(name: str, checkpoint: Path, chunk_sizes: list[int | None]) -> list[Recorder]:
    return [SCENARIOS[name]().train(checkpoint, dist.get_rank(), chunk_size) for chunk_size in chunk_sizes]


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, Recorder]:
    """Every scenario in one process, each batch in one chunk."""
    return {name: scenario().train(checkpoint, None, None) for name, scenario in SCENARIOS.items()}


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(checkpoint: Path, alone: dict[str, Recorder], name: str) -> None:
    expected = alone[name]
    chunk_sizes = [1, 4, None] if name in ("plain", "everything") else [4]
    for first, second in zip(*ddp.run(train, name, checkpoint, chunk_sizes), strict=True):
        assert first.losses == second.losses
        assert all(torch.equal(tensor, second.weights[-1][name]) for name, tensor in first.weights[-1].items())
        assert first.losses == pytest.approx(expected.losses, rel=EXACT)
        assert relative_difference(first.gradients[0], expected.gradients[0]) < EXACT
        assert relative_difference(first.update(1), expected.update(1)) < EXACT
        assert relative_difference(first.update(3), expected.update(3)) < EXACT
        # From the second step on, gradients are those of weights that were rounded differently.
        assert relative_difference(first.gradients[2], expected.gradients[2]) < 10 * EXACT


def test_scenarios_are_what_they_say(alone: dict[str, Recorder]) -> None:
    """Else two processes could agree with one for lack of a difference to make."""
    for gradient in alone["clipping"].gradients:
        assert sum(tensor.square().sum() for tensor in gradient.values()).sqrt() > 4 * CLIP
    assert alone["learnable temperature"].update(3)["loss.log_scale"].abs() > 1e-3
    assert all("lora" in name for name in alone["LoRA"].gradients[0])
    assert not any("visual" in name for name in alone["frozen vision"].gradients[0])
    assert any("visual" in name for name in alone["pictures in one process"].gradients[0])
    assert {len(run.gradients) for run in alone.values()} == {3}
    assert len(alone["accumulation"].losses) == 6


# Measuring


def evaluation_rows(folder: Path) -> Path:
    """Pictures and texts, several right answers, a document that answers two queries."""
    rows = []
    for index in range(9):
        picture(32 + 32 * (index % 4), 64, index).save(folder / f"{index}.png")
        positive = {"image": f"{index}.png"} if index % 3 else f"an answer {index}"
        also = {"image": f"{(index + 1) % 9}.png"} if index % 3 == 1 else "what answers many"
        rows.append(
            {"query": f"question {index} " * (1 + index % 2), "positive": [positive, also], "negative": f"no {index}"}
        )
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def validate(checkpoint: Path, rows: Path) -> tuple[dict[str, float], list[int]]:
    """Measure, and say which rows this process embedded."""
    model = module(checkpoint, Matryoshka(InfoNCE(), [64, 8]))
    data = RetrievalDataModule(val=str(rows), eval_batch_size=4, num_workers=0)
    options = {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")} if dist.is_initialized() else {}
    (found,) = trainer(**options).validate(model, data, verbose=False)
    return found, torch.cat(model._metrics[0].rows).flatten().tolist()


def pytrec_eval_of(checkpoint: Path, rows: Path) -> dict[str, float]:
    """The same numbers from embeddings made one at a time."""
    evaluation = load_evaluation(str(rows))
    model = module(checkpoint)
    with torch.no_grad():
        queries, documents = (
            torch.cat([model.encoder(model.preprocessor([each])) for each in items])
            for items in (evaluation.queries, evaluation.corpus)
        )
    names = {"ndcg_cut_10": "val/ndcg@10", "recall_1": "val/recall@1", "recall_10": "val/recall@10", "map": "val/map"}
    expected = {}
    for suffix, dimension in (("", 64), ("/64", 64), ("/8", 8)):
        scores = normalize(queries[:, :dimension]) @ normalize(documents[:, :dimension]).T
        run = {
            query: dict(zip(evaluation.document_names, row, strict=True))
            for query, row in zip(evaluation.query_names, scores.tolist(), strict=True)
        }
        measured = pytrec_eval.RelevanceEvaluator(evaluation.qrels, {*names, "recip_rank"}).evaluate(run)
        for theirs, ours in {**names, "recip_rank": "val/mrr@10"}.items():
            values = [query[theirs] for query in measured.values()]
            # recip_rank has no cut of its own.
            cut = [value if theirs != "recip_rank" or value >= 1 / 10 else 0.0 for value in values]
            expected[ours + suffix] = sum(cut) / len(cut)
    return expected


def test_two_processes_measure_as_one(checkpoint: Path, tmp_path: Path) -> None:
    rows = evaluation_rows(tmp_path)
    alone, every_row = validate(checkpoint, rows)
    expected = pytrec_eval_of(checkpoint, rows)
    assert alone == pytest.approx(expected, abs=1e-6)
    found = ddp.run(validate, checkpoint, rows)
    assert [metrics for metrics, _ in found] == [alone, alone]
    shares = [set(share) for _, share in found]
    assert shares[0] | shares[1] == set(every_row)
    assert max(map(len, shares)) < len(every_row)
