from __future__ import annotations

import math
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch
import torch.distributed
from torch import Tensor

from vlmembed import metrics
from vlmembed.metrics import METRICS, RerankingMetrics
from vlmembed.types import EvaluationSet, Item, Part, RerankingSet

#: pytrec_eval's recip_rank has no cut of its own, so it gets a run cut at 10.
MEASURES = {"ndcg@10": "ndcg_cut_10", "recall@1": "recall_1", "recall@10": "recall_10", "map": "map"}
QUERIES, DOCUMENTS = 25, 70


def items(count: int, role: str) -> list[Item]:
    return [Item(role, (Part("text", f"{role} {number}"),)) for number in range(count)]


def reranking_set(seed: int = 0, most: int = 30) -> RerankingSet:
    """Lists of different lengths, one of them empty; grades from -1 to 3; answers that no list or corpus has."""
    generator = random.Random(seed)
    names = [str(number) for number in generator.sample(range(1000), DOCUMENTS)]
    queries = [f"q{number}" for number in range(QUERIES)]
    judged = {query: generator.sample([*names, "absent", "9 missing"], generator.randint(1, 25)) for query in queries}
    qrels = {
        query: {name: generator.choice([-1, 0, 1, 1, 2, 3]) for name in found} | {names[7]: 0}
        for query, found in judged.items()
    }
    evaluation = EvaluationSet("graded", items(QUERIES, "query"), items(DOCUMENTS, "document"), queries, names, qrels)
    candidates = [generator.sample(range(DOCUMENTS), generator.randint(1, most)) for _ in queries]
    candidates[3] = []
    return RerankingSet(evaluation, candidates)


def reference(reranking: RerankingSet, scores: list[list[float]]) -> dict[str, list[float]]:
    """What pytrec_eval says of each query's candidates with these scores; 0 where it has none."""
    evaluation = reranking.evaluation
    run = {
        query: {evaluation.document_names[column]: score for column, score in zip(columns, row, strict=True)}
        for query, columns, row in zip(evaluation.query_names, reranking.candidates, scores, strict=True)
    }
    best = {
        query: dict(sorted(found.items(), key=lambda pair: (pair[1], pair[0]))[-10:]) for query, found in run.items()
    }
    measured = pytrec_eval.RelevanceEvaluator(evaluation.qrels, {*MEASURES.values()}).evaluate(run)
    cut = pytrec_eval.RelevanceEvaluator(evaluation.qrels, {"recip_rank"}).evaluate(best)
    measured = {query: measured.get(query, {}) | cut.get(query, {}) for query in run}
    return {
        ours: [measured[query].get(theirs, 0.0) for query in evaluation.query_names]
        for ours, theirs in {**MEASURES, "mrr@10": "recip_rank"}.items()
    }


def pairs_of(reranking: RerankingSet) -> Tensor:
    return torch.tensor([(query, column) for query, found in enumerate(reranking.candidates) for column in found])


def random_scores(reranking: RerankingSet, decimals: int = 6) -> list[list[float]]:
    """Around zero; the fewer decimals, the more ties. Rounded to float32, which is what is compared."""
    generator = np.random.default_rng(decimals)
    return [
        generator.standard_normal(len(found)).round(decimals).astype(np.float32).tolist()
        for found in reranking.candidates
    ]


def updated(reranking: RerankingSet, scores: list[list[float]]) -> RerankingMetrics:
    """Updated with batches of 7, in no order."""
    measured = RerankingMetrics(reranking)
    flat = torch.tensor([score for row in scores for score in row])
    for chosen in torch.randperm(len(flat), generator=torch.Generator().manual_seed(2)).split(7):
        measured.update(pairs_of(reranking)[chosen], flat[chosen])
    return measured


@pytest.mark.parametrize("decimals", [0, 1, 6])
@pytest.mark.parametrize("seed", range(3))
def test_after_and_before_equal_pytrec_eval(seed: int, decimals: int) -> None:
    reranking = reranking_set(seed)
    scores = random_scores(reranking, decimals)
    measured = updated(reranking, scores)
    values, per_query = measured.compute(), measured.per_query()
    found = [[-float(place) for place in range(len(columns))] for columns in reranking.candidates]
    assert values.keys() == per_query.keys() == {f"{name}{suffix}" for name in METRICS for suffix in ("", "/before")}
    for suffix, given in (("", scores), ("/before", found)):
        for name, expected in reference(reranking, given).items():
            np.testing.assert_allclose(per_query[name + suffix].numpy(), expected, atol=1e-6, err_msg=name + suffix)
            assert values[name + suffix].item() == pytest.approx(np.mean(expected), abs=1e-6)


def test_by_hand() -> None:
    """Of grades 3, 1 and 2 (not a candidate), the first two stand third and first, then first and third."""
    names = ["a", "b", "c", "d"]
    evaluation = EvaluationSet(
        "h", items(1, "query"), items(4, "document"), ["q"], names, {"q": {"a": 3, "b": 1, "d": 2}}
    )
    measured = RerankingMetrics(RerankingSet(evaluation, [[1, 2, 0]]))
    measured.update(torch.tensor([[0, 0], [0, 1], [0, 2]]), torch.tensor([40.0, -3.0, 39.0]))
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    values = {name: value.item() for name, value in measured.compute().items()}
    assert values["ndcg@10"] == pytest.approx((3 / math.log2(2) + 1 / math.log2(4)) / ideal)
    assert values["ndcg@10/before"] == pytest.approx((1 / math.log2(2) + 3 / math.log2(4)) / ideal)
    assert values["recall@10"] == values["recall@10/before"] == pytest.approx(2 / 3)
    assert values["recall@1"] == pytest.approx(1 / 3)
    assert (values["mrr@10"], values["mrr@10/before"]) == (1.0, 1.0)


def test_logits_that_a_sigmoid_would_make_equal_are_told_apart() -> None:
    reranking = reranking_set()
    scores = [[50.0 + place for place in range(len(found))] for found in reranking.candidates]
    assert torch.tensor(scores[0]).sigmoid().unique().numel() == 1
    per_query = updated(reranking, scores).per_query()
    for name, expected in reference(reranking, scores).items():
        np.testing.assert_allclose(per_query[name].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("k", [1, 12, 1000])
def test_top_k_is_by_score_and_then_by_name(k: int) -> None:
    reranking = reranking_set()
    scores = random_scores(reranking, decimals=0)
    ranked, columns = updated(reranking, scores).top_k(k)
    names = reranking.evaluation.document_names
    for query, (given, found) in enumerate(zip(scores, reranking.candidates, strict=True)):
        expected = sorted(zip(given, (names[column] for column in found), strict=True), reverse=True)[:k]
        there = [
            (score, names[column])
            for score, column in zip(ranked[query].tolist(), columns[query].tolist(), strict=True)
        ]
        assert there[: len(expected)] == expected
        assert columns[query, len(expected) :].eq(-1).all()
        assert ranked[query, len(expected) :].eq(-torch.inf).all()


def test_missing_pairs_are_counted() -> None:
    reranking = reranking_set()
    pairs = pairs_of(reranking)
    measured = RerankingMetrics(reranking)
    measured.update(pairs[5:], torch.zeros(len(pairs) - 5))
    with pytest.raises(RuntimeError, match=rf"5 of the {len(pairs)} scores of evaluation set 'graded' are missing"):
        measured.compute()
    with pytest.raises(RuntimeError, match="are missing"), pytest.warns(UserWarning, match="before"):
        RerankingMetrics(reranking).compute()


def test_update_refuses_pairs_and_values() -> None:
    reranking = reranking_set()
    measured = RerankingMetrics(reranking)
    stranger = next(column for column in range(DOCUMENTS) if column not in reranking.candidates[0])
    column = reranking.candidates[1][0]
    # The second and third would name a candidate if pairs were numbered through.
    foreign = [[0, stranger], [0, DOCUMENTS + column], [2, column - DOCUMENTS], [QUERIES, 0], [3, 0]]
    with pytest.raises(ValueError, match="has no candidates") as error:
        measured.update(torch.tensor([[1, column], *foreign]), torch.zeros(6))
    assert str(foreign) in str(error.value)
    for broken in (torch.nan, torch.inf, -torch.inf):
        name = reranking.evaluation.document_names[column]
        with pytest.raises(ValueError, match=f"scores of query 'q1' with document '{name}' of evaluation set 'graded' are not"):
            measured.update(torch.tensor([[1, column]]), torch.tensor([broken]))


def test_half_precision_is_compared_in_float32() -> None:
    reranking = reranking_set()
    scores = [torch.tensor(row).bfloat16().tolist() for row in random_scores(reranking)]
    measured = RerankingMetrics(reranking)
    measured.update(pairs_of(reranking), torch.tensor([score for row in scores for score in row], dtype=torch.bfloat16))
    assert measured.values[0].dtype == torch.float32
    np.testing.assert_allclose(measured.per_query()["map"].numpy(), reference(reranking, scores)["map"], atol=1e-6)


def test_sets_that_cannot_be_measured_are_refused() -> None:
    reranking = reranking_set()
    with pytest.raises(ValueError, match="'graded' has no query with a candidate"):
        RerankingMetrics(replace(reranking, candidates=[[]] * QUERIES))
    with pytest.raises(ValueError, match="'graded': query 'q1' has a candidate twice"):
        RerankingMetrics(replace(reranking, candidates=[[4], [2, 5, 2], *reranking.candidates[2:]]))


def test_state_empties_on_reset_and_survives_copies() -> None:
    reranking = reranking_set()
    scores = random_scores(reranking)
    measured = updated(reranking, scores)
    value = measured.compute()["map"]
    assert pickle.loads(pickle.dumps(measured)).compute()["map"] == value
    measured.reset()
    measured.update(pairs_of(reranking), -torch.tensor([score for row in scores for score in row]))
    opposite = reference(reranking, [[-score for score in row] for row in scores])["map"]
    assert measured.compute()["map"].item() == pytest.approx(np.mean(opposite), abs=1e-6)


def results(measured: RerankingMetrics) -> dict[str, Tensor]:
    scores, columns = measured.top_k(1000)
    each = {f"each {name}": values for name, values in measured.per_query().items()}
    return {**measured.compute(), **each, "scores": scores, "columns": columns}


def measure_shares(rank: int, folder: Path, shares: list[dict[str, list[Tensor]]]) -> None:
    """One of two processes: update with its share, write down what comes out."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    metrics.retrieval.ROWS_PER_GATHER = 100  # So that a share takes several pieces.
    reranking = reranking_set()
    scores = torch.tensor([score for row in random_scores(reranking) for score in row])
    for name, batches in shares[rank].items():
        measured = RerankingMetrics(reranking)
        for chosen in batches:
            measured.update(pairs_of(reranking)[chosen], scores[chosen])
        torch.save(results(measured), folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    reranking = reranking_set()
    order = torch.randperm(len(pairs_of(reranking)), generator=torch.Generator().manual_seed(4))
    # Uneven: five pairs are on both processes, and two of them twice on the second.
    first = {"uneven": list(order[:61].split(9)), "alone": [order]}
    second = {"uneven": [order[61:], order[:5], order[:2]], "alone": []}
    torch.multiprocessing.spawn(measure_shares, (tmp_path, [first, second]), nprocs=2)
    expected = results(updated(reranking, random_scores(reranking)))
    for name in first:
        for rank in range(2):
            torch.testing.assert_close(torch.load(tmp_path / f"{name}-{rank}.pt"), expected, rtol=0, atol=0)
