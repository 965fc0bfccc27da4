"""Metrics of late interaction, against a slow loop, ``pytrec_eval`` and Sentence Transformers."""

from __future__ import annotations

import itertools
import math
import pickle
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from building import allocated, run_config, slow_maxsim, write_rows
from safetensors.torch import load_file
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator
from sentence_transformers.multi_vector_encoder.modules.token_pooling import HierarchicalTokenPooling
from sentence_transformers.util.similarity import maxsim
from test_metrics import evaluation_set, items, trec, vectors_of
from torch import Tensor
from torch.nn.functional import normalize

from vlmembed import metrics
from vlmembed.ablation.run import csv_logger
from vlmembed.cli import main
from vlmembed.data.evaluation import as_evaluation
from vlmembed.late_interaction import MultiVectors, merge, ward_trees
from vlmembed.losses import InfoNCE
from vlmembed.metrics import METRICS, MultiVectorMetrics, RetrievalMetrics
from vlmembed.modules.multi_vector import SAME_TOKENS
from vlmembed.training.guards import LOOKS, CollapseMonitor, embedding_likeness
from vlmembed.types import EvaluationSet

#: Every document, for each query.
ALL = [[*range(60)]] * 30


def updated(evaluation: EvaluationSet, vectors: list[Tensor], *rows: list[int], **options: Any) -> MultiVectorMetrics:
    """Updated with batches of 7, in no order; or with these."""
    measured = MultiVectorMetrics(evaluation, **options)
    shuffled = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(2))
    for batch in rows or [part.tolist() for part in shuffled.split(7)]:
        measured.update(torch.tensor(batch), MultiVectors.of([vectors[row] for row in batch]))
    return measured


def reference(evaluation: EvaluationSet, scores: Tensor, candidates: list[list[int]]) -> dict[str, list[float]]:
    """What pytrec_eval says of each query's candidates."""
    names, run = evaluation.document_names, {}
    for query, row, columns in zip(evaluation.query_names, scores.tolist(), candidates, strict=True):
        run[query] = {names[column]: row[column] for column in columns}
    return trec(evaluation, run)


def two_stages(queries: list[Tensor], documents: list[Tensor], count: int) -> list[list[int]]:
    """The documents whose mean vectors have the largest cosines."""
    means = [
        normalize(torch.stack([normalize(vectors, dim=1).mean(0) for vectors in side])) for side in (queries, documents)
    ]
    return [sorted(range(len(documents)), key=row.__getitem__)[-count:] for row in (means[0] @ means[1].T).tolist()]


@pytest.mark.parametrize("block", [1, 40, pytest.param(2**24, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("length_normalized", [False, True])
def test_every_variant_equals_pytrec_eval(block: int, length_normalized: bool, monkeypatch: Any) -> None:
    """By pooled documents of Sentence Transformers, too; and a mean over a query's vectors ranks as their sum."""
    monkeypatch.setattr(metrics.retrieval, "VECTORS_PER_BLOCK", block)
    evaluation = evaluation_set()
    vectors = vectors_of(evaluation)
    queries, documents = vectors[:30], vectors[30:]
    options: Any = {"dimensions": (8, 3), "merging_factors": (2, 50), "two_stage": 6}
    measured = updated(evaluation, vectors, length_normalized=length_normalized, **options)
    unit = [normalize(item, dim=1) for item in documents]  # What theirs takes.
    pooled = {factor: HierarchicalTokenPooling(factor, num_protected_tokens=0).pool(unit) for factor in (2, 50)}
    whole = slow_maxsim(queries, documents)
    expected = {
        "": whole,
        "/8": whole,
        "/3": slow_maxsim(*([item[:, :3] for item in side] for side in (queries, documents))),
        "/x2": slow_maxsim(queries, pooled[2]),
        "/x50": slow_maxsim(queries, pooled[50]),
        "/two_stage": whole,
    }
    values, per_query = measured.compute(), measured.per_query()
    counts = {"": documents, "/x2": pooled[2], "/x50": pooled[50]}
    for suffix, items_of in counts.items():
        mean = values.pop(f"vectors_per_document{suffix}").item()
        assert mean == pytest.approx(np.mean([*map(len, items_of)]))
    assert values.keys() == per_query.keys() == {f"{name}{suffix}" for name in METRICS for suffix in expected}
    for suffix, scores in expected.items():
        candidates = two_stages(queries, documents, 6) if suffix == "/two_stage" else ALL
        for name, numbers in reference(evaluation, scores, candidates).items():
            np.testing.assert_allclose(per_query[name + suffix].numpy(), numbers, atol=1e-6, err_msg=name + suffix)
            assert values[name + suffix].item() == pytest.approx(np.mean(numbers), abs=1e-6)


def signs(evaluation: EvaluationSet) -> list[Tensor]:
    """Sixteen signs each: products in eighths, exact in float32, so that ties are ties in any arithmetic."""
    return [vectors.sign() for vectors in vectors_of(evaluation, size=16, longest=3)]


@pytest.mark.parametrize("k", [1, 10, 1000])
@pytest.mark.parametrize("length_normalized", [False, True])
def test_ties_go_to_the_later_name(k: int, length_normalized: bool) -> None:
    evaluation = evaluation_set()
    vectors = signs(evaluation)
    measured = updated(evaluation, vectors, length_normalized=length_normalized)
    scores = slow_maxsim(vectors[:30], vectors[30:])
    for name, values in reference(evaluation, scores, ALL).items():
        np.testing.assert_allclose(measured.per_query()[name].numpy(), values, atol=1e-6)
    if length_normalized:
        scores /= torch.tensor([[len(query)] for query in vectors[:30]])
    ranked, columns = measured.top_k(k)
    for query, row in enumerate(scores.tolist()):
        best = sorted(zip(row, evaluation.document_names, strict=True), reverse=True)[:k]
        names = [evaluation.document_names[column] for column in columns[query]]
        assert list(zip(ranked[query].tolist(), names, strict=True)) == best


def test_candidates_and_subsets() -> None:
    """Each query among its own candidates, of the first stage too; a query with fewer of them is filled up."""
    generator = random.Random(1)
    candidates = [generator.sample(range(60), generator.randint(1, 20)) for _ in range(30)]
    evaluation = replace(evaluation_set(), candidates=candidates, subsets=["a"] * 10 + ["b"] * 20)
    vectors = vectors_of(evaluation)
    measured = updated(evaluation, vectors, two_stage=4)
    queries, documents = vectors[:30], vectors[30:]
    scores = slow_maxsim(queries, documents)
    found = [
        [columns[place] for place in two_stages([query], [documents[column] for column in columns], 4)[0]]
        for query, columns in zip(queries, candidates, strict=True)
    ]
    for suffix, allowed in (("", candidates), ("/two_stage", found)):
        for name, numbers in reference(evaluation, scores, allowed).items():
            values = np.array(numbers)
            np.testing.assert_allclose(measured.per_query()[name + suffix].numpy(), values, atol=1e-6)
            assert measured.compute()[f"a/{name}{suffix}"].item() == pytest.approx(values[:10].mean(), abs=1e-6)
            means = (values[:10].mean() + values[10:].mean()) / 2
            assert measured.compute()[name + suffix].item() == pytest.approx(means, abs=1e-6)
    _, columns = measured.top_k(20)
    for row, allowed in zip(columns.tolist(), candidates, strict=True):
        assert {*row[: len(allowed)]} == {*allowed}
        assert {*row[len(allowed) :]} <= {-1}


def test_equal_to_the_evaluator_of_sentence_transformers() -> None:
    """On the same vectors, with grades of 1 and without ties."""
    evaluation = evaluation_set()
    present = {*evaluation.document_names}
    qrels = {name: dict.fromkeys({*judged} & present, 1) for name, judged in evaluation.qrels.items()}
    evaluation = replace(evaluation, qrels=qrels)
    vectors = [normalize(item, dim=1) for item in vectors_of(evaluation)]
    contents = [item.parts[0].value for item in (*evaluation.queries, *evaluation.corpus)]
    texts = dict(zip(contents, vectors, strict=True))
    model: Any = SimpleNamespace(
        similarity_fn_name="maxsim",
        similarity=maxsim,
        prompts={},
        model_card_data=SimpleNamespace(set_evaluation_metrics=lambda *_: None),
        encode_query=lambda sentences, **_: [texts[sentence] for sentence in sentences],
        encode_document=lambda sentences, **_: [texts[sentence] for sentence in sentences],
    )
    evaluator = MultiVectorInformationRetrievalEvaluator(
        dict(zip(evaluation.query_names, contents[:30], strict=True)),
        dict(zip(evaluation.document_names, contents[30:], strict=True)),
        {name: {*judged} for name, judged in qrels.items()},
        corpus_chunk_size=13,
        precision_recall_at_k=[1, 10],
        map_at_k=[60],
        write_csv=False,
    )
    theirs = evaluator(model)
    judged = [bool(qrels[name]) for name in evaluation.query_names]  # They leave out the others.
    ours = {name: values[judged].mean().item() for name, values in updated(evaluation, vectors).per_query().items()}
    pairs = {"ndcg@10": "ndcg@10", "hit@1": "precision@1", "recall@1": "recall@1", "recall@10": "recall@10"}
    for name, other in {**pairs, "mrr@10": "mrr@10", "map": "map@60"}.items():
        assert ours[name] == pytest.approx(theirs[f"maxsim_{other}"], abs=1e-6), name


def test_what_comes_twice_counts_once_and_what_is_missing_is_counted() -> None:
    evaluation = evaluation_set()
    vectors = vectors_of(evaluation)
    once = updated(evaluation, vectors, two_stage=3)
    twice = updated(evaluation, vectors, [*range(50), 3, 3], [7], [*range(40, 90)], two_stage=3)
    torch.testing.assert_close(twice.compute(), once.compute())
    assert pickle.loads(pickle.dumps(twice)).compute()["map"] == twice.clone().compute()["map"] == once.compute()["map"]
    gathered = twice.gather_embeddings()
    assert gathered.vectors.equal(torch.cat(vectors))
    assert gathered.lengths.tolist() == [*map(len, vectors)]
    with pytest.raises(RuntimeError, match=r"40 of the 90 embeddings of evaluation set 'graded' are missing"):
        updated(evaluation, vectors, [*range(50)]).compute()
    with pytest.raises(RuntimeError, match="90 of the 90"), pytest.warns(UserWarning, match="before"):
        MultiVectorMetrics(evaluation).compute()


def test_update_refuses_rows_and_values_by_name() -> None:
    evaluation = evaluation_set()
    vectors = vectors_of(evaluation)
    vectors[7][-1, 2] = torch.nan
    vectors[34][0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"no rows \[-1, 90\]"):
        MultiVectorMetrics(evaluation).update(torch.tensor([-1, 3, 90]), MultiVectors.of(vectors[:3]))
    document = evaluation.document_names[4]
    with pytest.raises(ValueError, match=f"embeddings of query 'q7', document '{document}' of evaluation set 'graded'"):
        updated(evaluation, vectors, [3, 7, 34])


@pytest.mark.parametrize("size", [1, 64])
def test_half_precision_is_scored_in_float32_whatever_products_are_allowed(size: int) -> None:
    """Neither autocast nor ``set_float32_matmul_precision`` reaches the scores, which bfloat16 would move by 1e-2."""
    evaluation = evaluation_set()
    vectors = [item.bfloat16() for item in vectors_of(evaluation, size)]
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            scores, columns = updated(evaluation, vectors).top_k(60)
    finally:
        torch.set_float32_matmul_precision(precision)
    expected = slow_maxsim(*([item.float() for item in side] for side in (vectors[:30], vectors[30:])))
    torch.testing.assert_close(scores, expected.gather(1, columns), atol=1e-5, rtol=0)


def peak(of: Any) -> int:
    """Bytes that a call allocates at most at a time, of torch and of Python and NumPy."""
    tracemalloc.start()
    of_torch = allocated(of)
    _, traced = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return traced + of_torch


def test_measuring_copies_no_corpus() -> None:
    """1,500 documents of 100 vectors are 77 MB, and scores of queries with all their vectors would be 24 MB."""
    evaluation = EvaluationSet(
        "large", items(4, "query"), items(1, "document") * 1500, [*"abcd"], [f"d{row}" for row in range(1500)],
        {name: {"d3": 1} for name in "abcd"},
    )  # fmt: skip
    measured = MultiVectorMetrics(evaluation, dimensions=(64,), two_stage=10)
    generator = torch.Generator().manual_seed(0)
    for rows in torch.arange(1504).split(32):
        lengths = torch.where(rows < 4, 10, 100)
        vectors = torch.randn(int(lengths.sum()), 128, generator=generator)
        measured.update(rows, MultiVectors(vectors, lengths))
    assert peak(measured.per_query) < 77e6 / 2  # A tile is 2 MB, and its copies.


def test_memory_does_not_grow_with_queries_times_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 documents at seven dimensions: all scores of 400 queries are 8 MB, a block of them 0.25 MB."""
    monkeypatch.setattr(metrics.retrieval, "SCORES_PER_BLOCK", 2**16)
    peaks = []
    for count in (40, 400):
        names, documents = [f"q{row}" for row in range(count)], [f"d{row}" for row in range(5000)]
        qrels = {name: {"d3": 1, "d70": 2} for name in names}
        corpus = items(1, "document") * 5000
        evaluation = EvaluationSet("large", items(count, "query"), corpus, names, documents, qrels)
        measured = RetrievalMetrics(evaluation, dimensions=(8, 7, 6, 5, 4, 3))
        measured.update(torch.arange(count + 5000), torch.randn(count + 5000, 8))
        tracemalloc.start()  # Not while torch's events are recorded, which are many.
        measured.per_query()
        _, traced = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        peaks.append(traced + allocated(measured.per_query))
    assert peaks[1] < peaks[0] + 1e6  # Of each query a few values of each metric.


MERGED = {
    "ragged": lambda: [normalize(vectors, dim=1) for vectors in vectors_of(evaluation_set(), 8, 40)],
    "one vector": lambda: [torch.eye(4)[:1], torch.eye(4)[1:2]],
    "all alike": lambda: [torch.eye(4)[:1].repeat(9, 1), torch.eye(4)[1:2].repeat(4, 1)],
    "ties": lambda: [torch.eye(8), torch.eye(8)[[0, 1, 0, 1, 2, 2, 3]]],
    "half precision": lambda: [normalize(torch.randn(30, 8), dim=1).bfloat16()],
}


@pytest.mark.parametrize("factor", [1, 2, 3, 100])
@pytest.mark.parametrize("kind", MERGED)
def test_merged_vectors_are_those_of_sentence_transformers(kind: str, factor: int) -> None:
    """Under autocast too; theirs of half precision are float32 here, and unit vectors to 1e-6 anyway."""
    items_of = MERGED[kind]()
    unit = [normalize(vectors.float(), dim=1) for vectors in items_of]
    whole = MultiVectors.of(items_of if factor > 1 else unit)  # Of one each, they stay as they are.
    with torch.autocast("cpu", torch.bfloat16):
        merged = merge(whole, factor)
        assert torch.equal(merge(whole, factor, ward_trees(whole)).vectors, merged.vectors)
    torch.testing.assert_close(merged.vectors.norm(dim=1), torch.ones(len(merged.vectors)))
    expected = HierarchicalTokenPooling(factor, num_protected_tokens=0).pool(unit)
    for ours, theirs in zip(merged.split(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("similarity", ["maxsim", "meanmaxsim"])
def test_equal_vectors_are_collapsed_and_at_chance(similarity: str) -> None:
    """What the collapse monitor asks: all cosines are 1, and each of four documents is as likely."""
    queries, documents = (
        MultiVectors(torch.ones(sum(lengths), 3), torch.tensor(lengths), similarity == "meanmaxsim")
        for lengths in ([2, 1, 4], [3, 5, 1, 2])
    )
    likeness, equal = embedding_likeness(queries, documents, torch.eye(3, 4, dtype=torch.int8))
    assert likeness.item() == pytest.approx(1)
    assert InfoNCE(0.05)(*equal).item() == pytest.approx(math.log(4), rel=1e-5)
    random = queries.map(lambda vectors: torch.randn(len(vectors), 3, generator=torch.Generator().manual_seed(0)))
    cosines = [
        float(torch.cosine_similarity(one, other, dim=0))
        for one, other in itertools.combinations([*random.vectors, *documents.vectors], 2)
    ]
    assert embedding_likeness(random, documents)[0].item() == pytest.approx(np.mean(cosines), abs=1e-6)


def test_a_vector_that_all_documents_have_may_leave_nothing_to_learn() -> None:
    """Where it is the nearest, as those of a template's first tokens may be, the loss is at chance and says why."""
    generator = torch.Generator().manual_seed(0)
    near, far = torch.eye(8)[0], 0.1 * torch.randn(40, 8, generator=generator)
    queries = MultiVectors((near + far).requires_grad_(), torch.full((8,), 5))
    documents = MultiVectors.of([torch.stack([near, *-torch.rand(4, 8, generator=generator)]) for _ in range(8)])
    loss = InfoNCE(0.02)(queries, documents, torch.eye(8, dtype=torch.int8))
    assert loss.item() == pytest.approx(math.log(8))
    (gradient,) = torch.autograd.grad(loss, queries.vectors)
    assert gradient.abs().max() < 1e-6
    monitor = CollapseMonitor("Vectors", embedding_likeness, SAME_TOKENS)
    monitor._looks = [torch.zeros(3)] * LOOKS
    with pytest.warns(UserWarning, match=r"at chance.*Or tokens of the chat template.*document_tokens\.skip"):
        monitor._judge([0.5, loss.item(), math.log(8)], 0.0)


@pytest.mark.exhaustive
def test_what_a_module_logs_and_predicts(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rankings are those of the vectors in the file beside them, and the logged metrics are pytrec_eval's of these."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vlmembed"])
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    config = run_config(checkpoint, train=rows, test=rows, batch_size=3, eval_batch_size=4) | {"seed_everything": 0}
    options = config["model"]["init_args"]
    del options["pooling"]
    projection = {"class_path": "vlmembed.pooling.TokenProjection", "init_args": {"size": 24}}
    options |= {"projection": projection, "similarity": "meanmaxsim", "merging_factors": [3], "two_stage": 4}
    config["model"]["class_path"] = "vlmembed.modules.MultiVectorModule"
    config["trainer"]["logger"] = csv_logger(tmp_path / "a/b")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", "run.yaml"])
    main(["predict", "--config", "run.yaml", "--trainer.logger.init_args.version=c"])
    tensors = load_file(tmp_path / "a/c/predictions/rows.safetensors")
    queries, documents = (
        tensors[side].split(tensors[lengths].tolist())
        for side, lengths in (("queries", "query_lengths"), ("documents", "document_lengths"))
    )
    evaluation = as_evaluation(rows)
    scores = slow_maxsim([*queries], [*documents]) / tensors["query_lengths"][:, None]
    run: dict[str, dict[str, float]] = {name: {} for name in evaluation.query_names}
    for line in (tmp_path / "a/c/predictions/rows.trec").read_text().splitlines():
        query, _, document, rank, score, _ = line.split()
        run[query][document] = float(score)
        assert len(run[query]) == int(rank)
        row, column = evaluation.query_names.index(query), evaluation.document_names.index(document)
        assert float(score) == pytest.approx(scores[row, column].item(), abs=1e-6)
    logged = pd.read_csv(tmp_path / "a/b/metrics.csv").iloc[-1]
    for name, values in trec(evaluation, run).items():
        assert logged[f"test/{name}"] == pytest.approx(np.mean(values), abs=1e-6)
        assert {f"test/{name}/x3", f"test/{name}/two_stage"} <= {*logged.index}
    mean = tensors["document_lengths"].double().mean().item()
    assert logged["test/vectors_per_document"] == pytest.approx(mean)
    # A third, rounded down: of vectors that differ no fewer.
    third = (tensors["document_lengths"] // 3).clamp(min=1).double().mean().item()
    assert logged["test/vectors_per_document/x3"] == pytest.approx(third)
