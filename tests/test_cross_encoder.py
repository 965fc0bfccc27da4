"""A step of a cross-encoder is the plain one: of Sentence Transformers, of autograd without chunks, of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ddp
import pytest
import torch
import torch.distributed as dist
from building import (
    Recorder,
    difference,
    fit,
    gradients,
    item,
    lists,
    picture,
    ranker,
    ranking_batch,
    relative_difference,
    trainer,
    weights,
    write_rows,
)
from scenarios import EXACT, LORA, OPTIMIZER, check_trained_as_one
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, ListNetLoss
from torch import Tensor
from torch.optim import SGD

from vlmembed.adapters import Adapter, Freeze, LoRA
from vlmembed.backbones import DocumentFirst
from vlmembed.data import RetrievalDataModule
from vlmembed.export.sentence_transformers import write_reranker
from vlmembed.features import InMemory
from vlmembed.heads import Linear
from vlmembed.losses import BinaryCrossEntropy, LambdaRank, ListNet, RankingLoss, SoftmaxCrossEntropy
from vlmembed.metrics import METRICS
from vlmembed.modules import CrossEncoderModule
from vlmembed.modules.cross_encoder import gather_candidates
from vlmembed.pooling import LastToken
from vlmembed.types import Example, Inputs, Pair, RankingBatch

# Against Sentence Transformers

LEARNING_RATE = 0.01

Content = tuple[Any, ...]

#: Each query with its candidates and their labels: text–text, text–image, image–text, image–image.
ROWS: list[tuple[Content, list[Content], list[float]]] = [
    (("one " * 9,), [("an answer",), (picture(64, 96, 1),), (picture(32, 64, 2),)], [0.0, 1.0, 0.0]),
    ((picture(64, 64, 3),), [(picture(96, 64, 4),), ("a caption " * 7,)], [1.0, 0.0]),
    (("three",), [(picture(32, 64, 2),), ("another",), ("a third",), (picture(64, 64, 3),)], [0.0, 0.0, 1.0, 1.0]),
]


def pointwise(model: CrossEncoder) -> Tensor:
    pairs = [
        (query, found, label) for (query,), many, labels in ROWS for (found,), label in zip(many, labels, strict=True)
    ]
    queries, documents, labels = zip(*pairs, strict=True)
    loss: Tensor = BinaryCrossEntropyLoss(model)([list(queries), list(documents)], torch.tensor(labels))
    return loss


def listwise(model: CrossEncoder) -> Tensor:
    documents = [[found for (found,) in many] for _, many, _ in ROWS]
    labels = [torch.tensor(labels) for _, _, labels in ROWS]
    loss: Tensor = ListNetLoss(model, mini_batch_size=2)([[query for (query,), _, _ in ROWS], documents], labels)
    return loss


def their_step(folder: Path, loss_of: Callable[[CrossEncoder], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step by Sentence Transformers, and what it changed, by our names."""
    model = CrossEncoder(str(folder), device="cpu").train()
    before = weights(model)
    loss = loss_of(model)
    loss.backward()
    SGD(model.parameters(), LEARNING_RATE).step()
    update = difference(weights(model), before)
    names = {"0.model.": "encoder.backbone.model.", "2.linear.": "encoder.pooling.pooling.outer."}
    return loss.item(), {
        ours + name.removeprefix(theirs): update[name]
        for theirs, ours in names.items()
        for name in update
        if name.startswith(theirs)
    }


def our_rows() -> list[Example]:
    """The same, the queries in another order, right answers first."""
    rows = []
    for query, documents, labels in [ROWS[2], ROWS[0], ROWS[1]]:
        order = sorted(range(len(labels)), key=lambda place: -labels[place])
        right = sum(label > 0 for label in labels)
        ordered = tuple(item(*documents[place]) for place in order)
        rows.append(Example(item(*query, role="query"), ordered[:right], ordered[right:]))
    return rows


@pytest.mark.parametrize("chunk_size", [3, None])
@pytest.mark.parametrize(("loss", "theirs"), [(BinaryCrossEntropy(), pointwise), (ListNet(), listwise)])
def test_one_step_is_that_of_sentence_transformers(
    checkpoint: Path,
    tmp_path: Path,
    loss: RankingLoss,
    theirs: Callable[[CrossEncoder], Tensor],
    chunk_size: int | None,
) -> None:
    model = ranker(checkpoint, loss, head=Linear(LastToken()), optimizer=partial(SGD, lr=LEARNING_RATE))
    write_reranker(model.encoder, tmp_path)
    their_loss, their_update = their_step(tmp_path, theirs)
    run = fit(model, [ranking_batch(model, our_rows(), chunk_size)])
    assert run.losses == pytest.approx([their_loss], rel=1e-5)
    # Other chunks, other order of float32 sums; weights round the update once more.
    assert relative_difference(run.update(1), their_update) < 1e-4


# Against autograd without chunks

#: What is trained with, and which layout.
SETUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "binary": lambda: {"loss": BinaryCrossEntropy()},
    "softmax, document first": lambda: {"loss": SoftmaxCrossEntropy(), "template": DocumentFirst()},
    "lambda": lambda: {"loss": LambdaRank(k=3)},
}

ADAPTERS: dict[str, Callable[[], list[Adapter]]] = {
    "all": lambda: [],
    "LoRA": lambda: [LoRA(LORA)],
    "frozen tower": lambda: [Freeze(["vision", "merger"])],
}


def expected_gradients(model: CrossEncoderModule, rows: Sequence[Example]) -> dict[str, Tensor]:
    """Of the loss of scores that were made one pair at a time, each with a graph of its own."""
    width = max(len(row.positives + row.negatives) for row in rows)
    scores, targets, mask = (torch.zeros(len(rows), width) for _ in range(3))
    for index, row in enumerate(rows):
        for place, document in enumerate(row.positives + row.negatives):
            pair = model.preprocessor([Pair(row.query, document)])
            scores[index, place] = model.encoder(pair)[0, 0]
            assert row.labels is not None
            targets[index, place] = row.labels[place]
            mask[index, place] = 1
    model.loss(scores, targets, mask.bool()).backward()
    found = gradients(model)
    model.zero_grad()
    return found


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("setup", SETUPS)
def test_chunks_have_the_gradient_of_the_whole(checkpoint: Path, setup: str, adapters: str) -> None:
    rows = lists()
    for chunk_size, graph_memory in [(1, "none"), (3, "none"), (3, "auto"), (None, "auto")]:
        model = ranker(checkpoint, adapters=ADAPTERS[adapters](), graph_memory=graph_memory, **SETUPS[setup]())
        if chunk_size == 1 or adapters == "LoRA":  # Which starts at random.
            expected = expected_gradients(model, rows)
        data = ranking_batch(model, rows, chunk_size)
        assert (len(data.chunks) > 3) == (chunk_size is not None)
        assert relative_difference(fit(model, [data]).gradients[0], expected) < EXACT


def recorded(see: Callable[[Inputs], Sequence[Tensor]], keys: list[int]) -> Callable[[Inputs], Sequence[Tensor]]:
    """Write down the keys of the images that the tower sees."""

    def record(images: Inputs) -> Sequence[Tensor]:
        keys.extend(images["keys"].tolist())
        return see(images)

    return record


def test_kept_features_train_alike(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two epochs, whose batches differ."""
    rows, runs, seen = write_rows(tmp_path / "rows.jsonl"), [], []
    for features in (None, InMemory(0.01)):
        model = ranker(checkpoint, adapters=[Freeze(["vision", "merger"])], features=features, optimizer=OPTIMIZER)
        keys: list[int] = []
        monkeypatch.setattr(
            model.encoder.backbone, "encode_images", recorded(model.encoder.backbone.encode_images, keys)
        )
        data = RetrievalDataModule(str(rows), batch_size=4, chunk_size=3, num_workers=0)
        runs.append(Recorder())
        trainer(callbacks=[runs[-1]], max_epochs=2, log_every_n_steps=1).fit(model, datamodule=data)
        seen.append(keys)
    assert len(runs[0].losses) == 4
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=EXACT)
    assert relative_difference(runs[1].update(4), runs[0].update(4)) < EXACT
    assert set(seen[0]) == set(seen[1])
    assert len(seen[0]) > len(seen[1]) == len(set(seen[1])) == 6


# Two processes


def shares(step: int) -> tuple[list[Example], list[Example]]:
    """Uneven shares of rows; both processes have the longest list's query, and do not agree on one candidate."""
    rows = lists(6, largest=2.0)
    rows = rows[step:] + rows[:step]
    last = max(rows, key=lambda row: len(row.positives + row.negatives))
    assert last.labels is not None
    # An even number, so that every second label is that of every second document.
    assert len(last.positives) == 2
    halves = [
        Example(last.query, last.positives[half::2], last.negatives[half::2], labels=last.labels[half::2])
        for half in (0, 1)
    ]
    # The first process's right answer, which is wrong to the second.
    disputed = replace(halves[1], negatives=halves[1].negatives + last.positives[:1], labels=(*halves[1].labels, 0.0))
    others = [row for row in rows if row is not last]
    return [others[0], halves[0]], [*others[1:3], disputed, *others[3:]]


PARALLEL: dict[str, Callable[[], RankingLoss]] = {"softmax": SoftmaxCrossEntropy, "lambda": lambda: LambdaRank(k=3)}


def train_share(checkpoint: Path, chunk_size: int | None) -> dict[str, Recorder]:
    """Train with each loss, as one of two processes, or alone on everybody's rows."""
    together, runs = dist.is_initialized(), {}
    steps = [shares(step) for step in range(3)]
    rows = [step[dist.get_rank()] if together else [*step[0], *step[1]] for step in steps]
    for name, loss in PARALLEL.items():
        # Large steps, which the rounding of weights does not blur.
        model = ranker(checkpoint, loss(), optimizer=partial(SGD, lr=0.3))
        runs[name] = fit(model, [ranking_batch(model, each, chunk_size) for each in rows], **ddp.strategy())
    return runs


def test_two_processes_train_as_one(checkpoint: Path) -> None:
    (first, second), alone = ddp.run(train_share, checkpoint, 3), train_share(checkpoint, None)
    for name in PARALLEL:
        check_trained_as_one(first[name], second[name], alone[name])


def validate(checkpoint: Path, rows: Path) -> tuple[dict[str, float], int]:
    """Measure, and say how many pairs this process scored."""
    model = ranker(checkpoint)
    data = RetrievalDataModule(val=str(rows), eval_batch_size=1, num_workers=0)
    (found,) = trainer(**ddp.strategy()).validate(model, data, verbose=False)
    return found, sum(map(len, model.metrics[0].numbers))


def test_two_processes_measure_as_one(checkpoint: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    alone, pairs = validate(checkpoint, rows)
    found = ddp.run(validate, checkpoint, rows)
    assert {f"val/{name}{stage}" for name in METRICS for stage in ("", "/before")} == alone.keys()
    assert [metrics for metrics, _ in found] == [alone, alone]
    counts = [count for _, count in found]
    assert sum(counts) == pairs == 9 * 3
    assert min(counts) > 0


# Who is whose candidate


def test_candidates_side_by_side() -> None:
    """Of a pair that comes twice, as from two processes, the first score counts, and the highest target."""
    large = 2**62
    pairs = [(70, 1), (9, 2), (large, 3), (9, large + 1), (5, 2), (9, large), (70, 3), (large + 1, 1), (9, 2), (5, 2)]
    scores, targets = torch.linspace(0.1, 1, 10), torch.tensor([0.0, 3, 0, 1, 0, 0.5, 2, 0, 1, 4])
    batch = RankingBatch([], [], *torch.tensor(pairs).T, targets)
    found, wanted, mask = gather_candidates(scores, batch)
    expected: dict[tuple[int, int], tuple[float, float]] = {}
    for pair, score, target in zip(pairs, scores.tolist(), targets.tolist(), strict=True):
        first, highest = expected.get(pair, (score, target))
        expected[pair] = first, max(highest, target)
    rows = [
        sorted(value for pair, value in expected.items() if pair[0] == query) for query in {one for one, _ in pairs}
    ]
    assert mask.shape == (5, 3)
    assert sorted(rows) == sorted(
        sorted(zip(scores[there].tolist(), labels[there].tolist(), strict=True))
        for scores, labels, there in zip(found, wanted, mask, strict=True)
    )
