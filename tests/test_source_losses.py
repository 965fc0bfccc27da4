"""Each source of training rows with its weight, its loss and its batches."""

from __future__ import annotations

import csv
import math
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from building import (
    Recorder,
    batch,
    collated,
    fit,
    item,
    jsonl,
    lists,
    module,
    ranker,
    relative_difference,
    run_config,
    trainer,
    weights,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from scenarios import EXACT, learnable, losses, several_losses
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmembed.cli import main
from vlmembed.data import Mixture, RetrievalDataModule, Source
from vlmembed.data.sources import Batches
from vlmembed.losses import (
    BinaryCrossEntropy,
    CoSENT,
    InfoNCE,
    KLDivergence,
    Loss,
    Matryoshka,
    ScoreDistillation,
    SoftmaxCrossEntropy,
    WeightedSum,
)
from vlmembed.modules import ParityCheck
from vlmembed.modules.embedding import gather_batch
from vlmembed.training.parity import defined_loss
from vlmembed.types import Example

#: Sums of float32 in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Numbered(Source):
    """Rows of a source by number, each with its own query."""

    def __init__(self, name: str, count: int) -> None:
        self.title, self.count = name, count

    @property
    def name(self) -> str:
        return self.title

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        query = item(f"{self.title} {index}", role="query")
        return Example(query, (item(f"answer {self.title} {index}"),), (item(f"wrong {self.title} {index}"),))


# The losses


def vectors(count: int, seed: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), requires_grad=True)


@pytest.mark.parametrize(
    "labels", [[0.0, 5.0, 2.5, 2.5, 1.0, 5.0], [1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [2.0] * 6, [-3.0] * 5 + [7e6]]
)
def test_cosent_equals_sentence_transformers(labels: list[float]) -> None:
    queries, documents = vectors(6, 1), vectors(6, 2)
    value = torch.tensor(labels)
    expected = CoSENTLoss(model=None, scale=10.0).compute_loss_from_embeddings([queries, documents], value)
    scores = torch.full((6, 6), math.nan)
    scores[range(6), range(6)] = value
    actual = CoSENT(0.1)(queries, documents, torch.zeros(6, 6, dtype=torch.int8), scores)
    torch.testing.assert_close(actual, expected, **CLOSE)
    gradients = [torch.autograd.grad(loss, (queries, documents), retain_graph=True) for loss in (actual, expected)]
    torch.testing.assert_close(*gradients, **CLOSE)


def test_cosent_compares_all_judged_pairs_of_the_batch() -> None:
    """Pair by pair, where queries and documents are in several pairs, and most pairs are not judged."""
    queries, documents = vectors(3, 3), vectors(4, 4)
    judged = {(0, 1): 0.5, (0, 3): 2.0, (2, 0): 0.5, (2, 1): 1.0, (1, 2): 0.0}
    scores = torch.full((3, 4), math.nan)
    for pair, label in judged.items():
        scores[pair] = label
    cosines = {(q, p): cosine_similarity(queries[q], documents[p], dim=0) for q, p in judged}
    terms = [
        ((cosines[lower] - cosines[higher]) / 0.05).exp()
        for lower in judged
        for higher in judged
        if judged[lower] < judged[higher]
    ]
    expected = torch.log(1 + torch.stack(terms).sum())
    relevance = torch.zeros(3, 4, dtype=torch.int8)
    torch.testing.assert_close(CoSENT()(queries, documents, relevance, scores), expected, **CLOSE)
    half = CoSENT()(queries.bfloat16(), documents.bfloat16(), relevance, scores)
    assert half.dtype == torch.float32
    torch.testing.assert_close(Matryoshka(CoSENT(), [6])(queries, documents, relevance, scores), expected, **CLOSE)
    both = WeightedSum([CoSENT(), CoSENT()], [0.5, 2.0])
    torch.testing.assert_close(both(queries, documents, relevance, scores), 2.5 * expected, **CLOSE)
    with pytest.raises(ValueError, match="CoSENT needs the labels of pairs"):
        CoSENT()(queries, documents, relevance)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        CoSENT(0.0)


@pytest.mark.parametrize(
    "options", [{}, {"hardness": 5.0}, {"false_negative_margin": 0.2}, {"learnable_temperature": True}]
)
def test_without_in_batch_negatives_a_query_is_told_from_its_rows_alone(options: dict[str, Any]) -> None:
    loss = InfoNCE(0.1, in_batch_negatives=False, **options)
    queries, documents = vectors(3, 5), vectors(7, 6)
    relevance = torch.tensor(
        [[1, -1, 0, -1, 0, 0, 1], [0, 1, -1, 0, 0, 0, 0], [-1, 0, 0, 1, -1, 0, 0]], dtype=torch.int8
    )
    actual = loss(queries, documents, relevance)
    torch.testing.assert_close(actual, defined_loss(loss, queries, documents, relevance).float(), **CLOSE)
    if not options:
        parts = []
        for query, row in enumerate(relevance.tolist()):
            logits = [cosine_similarity(queries[query], document, dim=0) / 0.1 for document in documents]
            negatives = [logit.exp() for logit, label in zip(logits, row, strict=True) if label == -1]
            shares = [
                logit.exp() / (logit.exp() + sum(negatives)) for logit, one in zip(logits, row, strict=True) if one == 1
            ]
            parts.append(-torch.stack(shares).log().mean())
        torch.testing.assert_close(actual, torch.stack(parts).mean(), **CLOSE)
    # What another row's documents are makes no difference.
    with torch.no_grad():
        documents[5] = 100.0
    torch.testing.assert_close(loss(queries, documents, relevance), actual, **CLOSE)
    with pytest.raises(ValueError, match="in_batch_negatives=False is for directions"):
        InfoNCE(in_batch_negatives=False, directions=["document_to_query"])


# Batches


@pytest.mark.parametrize(
    ("own", "names", "expected"),
    [
        (False, None, [{0, 1, 2, 3}]),
        (True, None, [{0}, {1}, {2}, {3}]),
        ([False, True, False, False], None, [{0, 2, 3}, {1}]),
        (False, [None, "graded", None, "graded"], [{0, 2}, {1, 3}]),
        ([False, False, False, True], [None, "graded", None, "graded"], [{0, 2}, {1}, {3}]),
        (False, ["a", "b", "a", "c"], [{0, 2}, {1}, {3}]),
    ],
)
def test_a_batch_holds_rows_of_one_loss(own: Any, names: Any, expected: list[set[int]]) -> None:
    """In the shares of the weights, the same in two processes, and each row once where weights are by size."""
    sizes = [40, 24, 16, 48]
    sources: list[Source] = [Numbered(name, size) for name, size in zip("wxyz", sizes, strict=True)]
    mixture = Mixture(sources, one_source_batches=own, losses=names)
    alone = [*Batches(mixture, 8, seed=3)]
    halves = [[*Batches(mixture, 4, seed=3, rank=rank, world_size=2)] for rank in range(2)]
    assert alone == [first + second for first, second in zip(*halves, strict=True)]
    assert len(alone) == sum(sizes) // 8
    resumed = Batches(mixture, 8, seed=3)
    resumed.skip = 5
    assert [*resumed] == alone[5:]
    groups = Counter()
    for rows in alone:
        examples = mixture.__getitems__(rows)
        assert len({example.loss for example in examples}) == 1
        which = {"wxyz".index(example.query.parts[0].value[0]) for example in examples}  # type: ignore[index]
        (group,) = (number for number, group in enumerate(expected) if which <= group)
        groups[group] += 1
        assert examples[0].loss == (names[min(which)] if names else None)
    assert groups == {number: sum(sizes[source] for source in group) // 8 for number, group in enumerate(expected)}
    assert sorted(row for rows in alone for row in rows) == [*range(128)]
    weighted = [*Batches(replace(mixture, weights=[1.0, 4.0, 2.0, 1.0]), 8, seed=3)]
    drawn = Counter(
        min(source for source in range(4) if row < mixture.offsets[source + 1]) for rows in weighted for row in rows
    )
    assert drawn == {0: 16, 1: 64, 2: 32, 3: 16}
    assert pickle.loads(pickle.dumps(mixture)).groups == mixture.groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": ["a"]}, r"losses needs one entry for each of the 2 sources, got \['a'\]"),
        ({"one_source_batches": [True]}, "one_source_batches needs one entry for each of the 2 sources"),
        ({"losses": [None, "a"], "weights": [1000.0, 1.0]}, "Source 'y' gets none of the 6 rows or batches"),
    ],
)
def test_mixtures_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(iter(Batches(Mixture([Numbered("x", 8), Numbered("y", 4)], **options), 2)))


def test_a_batch_says_what_it_is_trained_with(checkpoint: Path) -> None:
    model = module(checkpoint, losses={**losses(), "teacher": ScoreDistillation()})
    rows = [row for first, second in several_losses(3) for row in (*first, *second)]
    for name in (None, "graded", "classes"):
        chosen = [row for row in rows if row.loss == name]
        data = batch(model, chosen, 2)
        assert data.loss == name
        assert (data.scores is not None) == (name == "graded")
        if data.scores is not None:
            found = dict(zip(map(tuple, data.pairs.tolist()), data.scores.tolist(), strict=True))
            expected: dict[tuple[int, int], float] = {}
            for row in chosen:
                for document, label in zip(row.documents, row.grades, strict=True):
                    key = row.query.id, document.id
                    expected[key] = max(label, expected.get(key, -math.inf))
            assert found == expected
    scored = Example(item("q", role="query"), (item("a"),), (item("b"),), scores=(-0.5, -2.0), loss="graded")
    found = batch(model, [scored]).scores
    assert found is not None
    assert found.tolist() == [-0.5, -2.0]
    origin = "rows.jsonl, row 3, column 'query'"
    plain = Example(replace(item("q", role="query"), origin=origin), (item("a"),))
    refused = [
        (
            [replace(rows[0], loss=None), replace(plain, loss="graded")],
            f"{origin}: its loss is 'graded', and None that",
        ),
        ([replace(plain, loss="graed")], f"{origin}: its loss is 'graed', and model.losses has 'graded', 'classes'"),
        ([replace(plain, loss="classes")], f"{origin}: the loss has in_batch_negatives: false"),
        ([replace(plain, loss="teacher")], f"{origin}: the loss distils a teacher's scores"),
        ([replace(scored, loss="classes", query=plain.query)], f"{origin}: scores given but unused"),
    ]
    for examples, message in refused:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            model.collator()(examples)
        assert message in str(error.value)
        with pytest.raises(ValueError, match=r"rows.jsonl|its loss"):
            model.collator().check(examples[-1]) if len(examples) == 1 else model.collator()(examples)


# Training


def train(checkpoint: Path, size: int | None, **options: Any) -> Recorder:
    torch.manual_seed(0)
    model = module(checkpoint, learnable(), losses=losses(), **options)
    steps = several_losses(6)
    return fit(model, [batch(model, [*first, *second], size) for first, second in steps], accumulate_grad_batches=3)


def test_chunks_of_several_losses_are_ordinary_training(checkpoint: Path) -> None:
    """The gradient of a window of three losses is the mean of theirs, by autograd without chunks."""
    torch.manual_seed(0)
    model = module(checkpoint, learnable(), losses=losses())
    total: dict[str, Tensor] = {}
    for first, second in several_losses(3):
        data = batch(model, [*first, *second])
        embeddings = model.encoder.forward_with_images(data.chunks[0], data.images)
        model.loss_of(data.loss)(*gather_batch(embeddings, data)).div(3).backward()
    total = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert {"loss.log_scale", "losses.classes.log_scale"} < total.keys()
    for size in (1, 4, None):
        recorder = train(checkpoint, size)
        assert relative_difference(recorder.gradients[0], total) < EXACT
    assert len(recorder.losses) == 6


@pytest.mark.parametrize("wrong", [False, True])
def test_the_parity_check_knows_each_batchs_loss(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    model = module(checkpoint, learnable(), losses=losses())
    batches = [batch(model, [*first, *second], 3) for first, second in several_losses(3)]
    if wrong:  # A step that takes the module's own loss for all.
        monkeypatch.setattr(model.losses["classes"], "in_batch_negatives", True)
        monkeypatch.setattr("vlmembed.training.parity.defined_loss", _with_own_negatives)
        with pytest.raises(RuntimeError, match="The step's gradient is not that of its loss"):
            fit(model, batches, ParityCheck(), accumulate_grad_batches=3)
    else:
        fit(model, batches, ParityCheck(), accumulate_grad_batches=3)
        assert "Parity check passed" in capsys.readouterr().out


def _with_own_negatives(loss: Loss, *arguments: Tensor) -> Tensor:
    if isinstance(loss, InfoNCE) and loss.label_spec.needs_negative:
        loss = InfoNCE(0.05, in_batch_negatives=False)
    return defined_loss(loss, *arguments)


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["graded", None], {}, "has the loss 'graded', and model.losses has none"),
        (["grade", None], losses(), r"has the loss 'grade' .*'graded'.*model.losses has graded, classes"),
        (["graded", None], losses(), "model.losses has 'classes', which no source of data.train is trained with"),
        (None, losses(), "model.losses has 'graded', which no source"),
    ],
)
def test_names_without_a_loss_and_losses_without_a_source_are_refused(
    checkpoint: Path, names: Any, given: dict[str, Loss], message: str
) -> None:
    data = RetrievalDataModule(Mixture([Numbered("x", 8), Numbered("y", 8)], losses=names), batch_size=2, num_workers=0)
    with pytest.raises(ValueError, match=message):
        trainer().fit(module(checkpoint, losses=given), datamodule=data)


def test_a_run_of_several_losses_is_resumed_to_the_bit(checkpoint: Path, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    runs = []
    for path in (None, tmp_path / "step=3.ckpt"):
        mixture = Mixture([Numbered("x", 16), Numbered("y", 16)], losses=[None, "classes"])
        torch.manual_seed(0)
        model = module(checkpoint, learnable(), losses={"classes": losses()["classes"]})
        recorder, data = Recorder(), RetrievalDataModule(mixture, batch_size=4, num_workers=0)
        options: Any = {"callbacks": [saver, recorder], "enable_checkpointing": True, "log_every_n_steps": 1}
        trainer(max_steps=6, **options).fit(model, datamodule=data, ckpt_path=path)
        runs.append((recorder.losses, weights(model)))
    (whole, last), (resumed, again) = runs
    assert resumed == whole[3:]
    assert all(torch.equal(again[name], weight) for name, weight in last.items())
    assert {"loss.log_scale", "losses.classes.log_scale"} < again.keys()


def test_a_name_that_no_loss_can_have_is_refused(checkpoint: Path) -> None:
    for name in ("a.b", "keys"):
        with pytest.raises(ValueError, match="not all are names that a loss can have"):
            module(checkpoint, losses={name: CoSENT()})


def test_a_run_of_three_sources_from_yaml(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All dimensions that one of the losses trains are measured."""
    monkeypatch.chdir(tmp_path)
    plain = [{"query": f"q{n}", "positive": f"p{n}"} for n in range(8)]
    graded = [{"query": f"s{n}", "document": f"t{n}", "label": n / 2} for n in range(8)]
    classes = [{"query": f"c{n}", "positive": f"class {n % 2}", "negative": f"class {1 - n % 2}"} for n in range(8)]
    tables = {"plain": plain, "graded": graded, "classes": classes}
    sources = [
        {"class_path": "vlmembed.data.Rows", "init_args": {"path": jsonl(tmp_path / f"{name}.jsonl", rows)}}
        for name, rows in tables.items()
    ]
    mixture = {"sources": sources, "weights": [2, 1, 1], "losses": [None, "graded", "classes"]}
    config = run_config(checkpoint, train={"class_path": "vlmembed.data.Mixture", "init_args": mixture}, batch_size=2)
    config["data"]["init_args"]["val"] = str(tmp_path / "plain.jsonl")
    config["model"]["init_args"]["losses"] = {
        "graded": {
            "class_path": "vlmembed.losses.Matryoshka",
            "init_args": {"loss": {"class_path": "vlmembed.losses.CoSENT"}, "dimensions": [64, 16]},
        },
        "classes": {"class_path": "vlmembed.losses.InfoNCE", "init_args": {"in_batch_negatives": False}},
    }
    config["trainer"] |= {"max_epochs": 1, "exporter": None}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "run.yaml"])
    rows = [*csv.DictReader(next(Path().rglob("metrics.csv")).open())]
    assert len([row for row in rows if row.get("train/loss")]) == 12
    assert any(row.get("val/ndcg@10/16") for row in rows)


def test_a_reranker_has_several_losses_too(checkpoint: Path) -> None:
    options = {"losses": {"lists": SoftmaxCrossEntropy(), "teacher": KLDivergence()}}
    torch.manual_seed(0)
    model = ranker(checkpoint, BinaryCrossEntropy(), **options)
    rows = lists()
    scored = [replace(row, labels=None, scores=tuple(float(n) for n in range(len(row.documents)))) for row in rows]
    kinds = {None: rows, "lists": [replace(row, loss="lists") for row in rows]}
    kinds["teacher"] = [replace(row, loss="teacher") for row in scored]
    total: dict[str, Tensor] = {}
    for name, examples in kinds.items():
        # By itself, in one chunk, with that loss as the module's own.
        torch.manual_seed(0)
        own: Any = {None: BinaryCrossEntropy(), **options["losses"]}[name]
        alone = ranker(checkpoint, own)
        plain = [replace(row, loss=None) for row in examples]
        gradient = fit(alone, [collated(alone.collator(), plain)]).gradients[0]
        total = {key: total.get(key, 0) + value / 3 for key, value in gradient.items()}
    batches = [collated(model.collator(), examples, 2) for examples in kinds.values()]
    assert [data.loss for data in batches] == [None, "lists", "teacher"]
    found = fit(model, batches, accumulate_grad_batches=3).gradients[0]
    assert relative_difference(found, total) < EXACT
    with pytest.raises(ValueError, match="label 7 is outside of what this loss takes"):
        model.collator()([replace(rows[0], labels=(7.0,) * len(rows[0].documents))])
    model.collator()([replace(rows[0], labels=(7.0,) * len(rows[0].documents), loss="lists")])
