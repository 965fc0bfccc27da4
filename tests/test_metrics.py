from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import ddp
import numpy as np
import pytest
import pytrec_eval
import torch
import torch.distributed
from torch import Tensor

from vlmembed import metrics
from vlmembed.late_interaction import MultiVectors
from vlmembed.metrics import METRICS, MultiVectorMetrics, RerankingMetrics, RetrievalMetrics
from vlmembed.metrics.functions import order_keys
from vlmembed.types import EvaluationSet, Item, Part, RerankingSet

#: The first ten documents decide; pytrec_eval's recip_rank has no cut of its own, so it gets a run cut at 10.
MEASURES = {
    "ndcg@10": "ndcg_cut_10",
    "hit@1": "success_1",
    "recall@1": "recall_1",
    "recall@10": "recall_10",
    "map": "map",
}


def items(count: int, role: str) -> list[Item]:
    return [Item(role, (Part("text", f"{role} {number}"),)) for number in range(count)]


def evaluation_set(queries: int = 30, documents: int = 60, seed: int = 0) -> EvaluationSet:
    """Grades from -2 to 3, document ids that sort differently as strings, judged documents that the corpus lacks."""
    generator = random.Random(seed)
    documents_named = [str(number) for number in generator.sample(range(1000), documents)]
    queries_named = [f"q{number}" for number in range(queries)]
    qrels = {
        name: {
            document: generator.choice([-2, -1, 0, 1, 1, 2, 3])
            for document in generator.sample([*documents_named, "absent", "9 missing"], generator.randint(1, 25))
        }
        for name in queries_named
    }
    for judged in qrels.values():
        judged[documents_named[7]] = max(0, judged.get(documents_named[7], 0))  # pytrec_eval crashes on -1 alone.
    qrels["q3"] = {documents_named[0]: 0, documents_named[1]: -1}
    return EvaluationSet(
        "graded", items(queries, "query"), items(documents, "document"), queries_named, documents_named, qrels
    )


def trec(evaluation: EvaluationSet, run: dict[str, dict[str, float]]) -> dict[str, list[float]]:
    """What pytrec_eval says, per query in the set's order; 0 where the run has nothing."""
    best = {query: dict(sorted(row.items(), key=lambda pair: pair[::-1])[-10:]) for query, row in run.items()}
    measured = pytrec_eval.RelevanceEvaluator(evaluation.qrels, set(MEASURES.values())).evaluate(run)
    cut = pytrec_eval.RelevanceEvaluator(evaluation.qrels, {"recip_rank"}).evaluate(best)
    values = {query: measured.get(query, {}) | cut.get(query, {}) for query in run}
    return {
        ours: [values[query].get(theirs, 0.0) for query in evaluation.query_names]
        for ours, theirs in {**MEASURES, "mrr@10": "recip_rank"}.items()
    }


def reference(evaluation: EvaluationSet, scores: Tensor) -> dict[str, list[float]]:
    rows = zip(evaluation.query_names, scores.tolist(), strict=True)
    return trec(evaluation, {query: dict(zip(evaluation.document_names, row, strict=True)) for query, row in rows})


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_time_follows_the_number_of_judgements(tied: bool) -> None:
    """20 of 2,000 queries have 10,000 of 50,000 documents: 5 s alone on one core, with room for a busy machine."""
    generator, names = np.random.default_rng(0), [f"d{number}" for number in range(50_000)]
    qrels = {f"q{row}": {f"d{generator.integers(50_000)}": 1} for row in range(2_000)}
    qrels |= {f"q{row}": dict.fromkeys(names[:10_000], 1) for row in range(7, 27)}
    corpus = items(1, "document") * 50_000
    evaluation = EvaluationSet("large", items(2_000, "query"), corpus, [*qrels], names, qrels)
    candidates = [generator.choice(50_000, 100, replace=False).tolist() for _ in qrels]
    candidates[7] = [*range(10_000)]
    start = time.monotonic()
    measured = RetrievalMetrics(evaluation)
    size = (52_000, 16)
    embeddings = torch.ones(size) if tied else torch.randn(size, generator=torch.Generator().manual_seed(0))
    measured.update(torch.arange(52_000), embeddings)
    assert measured.compute()["recall@10"] < 0.02
    reranking = RerankingMetrics(RerankingSet(evaluation, candidates))
    for pairs in reranking.pairs.split(256):
        reranking.update(pairs, pairs[:, 1].float() * (not tied))
    assert 0 < reranking.compute()["recall@10"] < 0.02
    assert time.monotonic() - start < 40


def test_order_keys_sort_as_score_and_name_do():
    scores = torch.tensor([[0.0, -0.0, -1e-40, 1e-40, -3.5, 2.0, -torch.inf, 2.0, torch.inf, -3.5]])
    positions = torch.tensor([4, 9, 1, 0, 6, 3, 2, 8, 5, 7])
    pairs = list(zip(scores[0].tolist(), positions.tolist(), strict=True))
    expected = sorted(range(len(pairs)), key=lambda column: pairs[column])
    assert order_keys(scores, positions)[0].argsort().tolist() == expected


def embeddings_of(evaluation: EvaluationSet, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return 3 * torch.randn(len(evaluation.queries) + len(evaluation.corpus), size, generator=generator)


def cosines(evaluation: EvaluationSet, embeddings: Tensor) -> Tensor:
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    return unit[: len(evaluation.queries)] @ unit[len(evaluation.queries) :].T


def updated(evaluation: EvaluationSet, embeddings: Tensor, **options) -> RetrievalMetrics:
    """Updated with batches of 7, in no order."""
    measured = RetrievalMetrics(evaluation, **options)
    for rows in torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(2)).split(7):
        measured.update(rows, embeddings[rows])
    return measured


@pytest.mark.parametrize("block", [1, 7 * 60, 2**24])
def test_metric_equals_pytrec_eval_at_every_dimension(block, monkeypatch):
    monkeypatch.setattr(metrics.retrieval, "SCORES_PER_BLOCK", block)
    evaluation = evaluation_set()
    embeddings = embeddings_of(evaluation)
    measured = updated(evaluation, embeddings, dimensions=(8, 3))
    values, per_query = measured.compute(), measured.per_query()
    assert values.keys() == per_query.keys() == {f"{name}{suffix}" for name in METRICS for suffix in ("", "/8", "/3")}
    for suffix, size in (("", 8), ("/8", 8), ("/3", 3)):
        for name, expected in reference(evaluation, cosines(evaluation, embeddings[:, :size])).items():
            np.testing.assert_allclose(per_query[name + suffix].numpy(), expected, atol=1e-6)
            assert values[name + suffix].item() == pytest.approx(np.mean(expected), abs=1e-6)


def tied_embeddings(evaluation: EvaluationSet) -> Tensor:
    """Sixteen signs each: norm 4 and cosines in eighths, exact in float32, so that ties are ties in any arithmetic."""
    return embeddings_of(evaluation, size=16).sign()


@pytest.mark.parametrize("k", [1, 10, 1000])
def test_ties_go_to_the_later_name_in_metrics_and_in_the_top_k(k):
    evaluation = evaluation_set()
    embeddings = tied_embeddings(evaluation)
    measured = updated(evaluation, embeddings)
    for name, values in reference(evaluation, cosines(evaluation, embeddings)).items():
        np.testing.assert_allclose(measured.per_query()[name].numpy(), values, atol=1e-6)
    scores, columns = measured.top_k(k)
    for query, row in enumerate(cosines(evaluation, embeddings)):
        expected = sorted(zip(row.tolist(), evaluation.document_names, strict=True), reverse=True)[:k]
        names = [evaluation.document_names[column] for column in columns[query]]
        assert list(zip(scores[query].tolist(), names, strict=True)) == expected


def test_half_precision_is_scored_in_float32_even_under_autocast():
    evaluation = evaluation_set()
    embeddings = embeddings_of(evaluation).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        measured = updated(evaluation, embeddings)
        scores, columns = measured.top_k(60)
    assert measured.values[0].dtype == scores.dtype == torch.float32
    # Rounding of float32 products of 8 terms; bfloat16 would be off by 1e-3.
    torch.testing.assert_close(scores, cosines(evaluation, embeddings.float()).gather(1, columns), atol=1e-6, rtol=0)


def test_missing_rows_are_counted():
    evaluation = evaluation_set()
    measured = RetrievalMetrics(evaluation)
    measured.update(torch.arange(50), embeddings_of(evaluation)[:50])
    with pytest.raises(RuntimeError, match=r"40 of the 90 embeddings of evaluation set 'graded' are missing"):
        measured.compute()
    with pytest.raises(RuntimeError, match="90 of the 90"), pytest.warns(UserWarning, match="before"):
        RetrievalMetrics(evaluation).compute()


def test_update_refuses_rows_and_values():
    measured = RetrievalMetrics(evaluation_set())
    with pytest.raises(ValueError, match=r"no rows \[-1, 90\]"):
        measured.update(torch.tensor([3, -1, 90]), torch.ones(3, 4))
    embeddings = torch.ones(3, 4)
    embeddings[1, 2] = torch.nan
    with pytest.raises(ValueError, match="embeddings of query 'q7' of evaluation set 'graded' are not finite"):
        measured.update(torch.tensor([3, 7, 2]), embeddings)
    document = measured.evaluation.document_names[4]
    with pytest.raises(ValueError, match=f"embeddings of document '{document}' of"):
        measured.update(torch.tensor([3, 34, 2]), embeddings)
    broken = "query 'q0', query 'q1', query 'q2', query 'q3', query 'q4' and 2 more"
    with pytest.raises(ValueError, match=f"embeddings of {broken} of"):
        measured.update(torch.arange(7), torch.full((7, 4), torch.inf))


@pytest.mark.parametrize(("dimensions", "message"), [((0,), "0"), ((4, 4), "4"), ((4, 16), "16.*8")])
def test_dimensions_are_distinct_and_no_larger_than_the_embeddings(dimensions, message):
    evaluation = evaluation_set()
    with pytest.raises(ValueError, match=message):
        updated(evaluation, embeddings_of(evaluation), dimensions=dimensions).compute()


def test_sets_that_cannot_be_measured_are_refused():
    sets = items(1, "query"), items(2, "document")
    with pytest.raises(ValueError, match="share a name"):
        RetrievalMetrics(EvaluationSet("twice", *sets, ["q"], ["d", "d"], {"q": {"d": 1}}))
    with pytest.raises(ValueError, match="'empty' has no query"):
        RetrievalMetrics(EvaluationSet("empty", *sets, ["q"], ["d", "e"], {"q": {"d": 0}}))


def test_state_empties_on_reset_and_survives_copies():
    evaluation = evaluation_set()
    embeddings = embeddings_of(evaluation)
    measured = updated(evaluation, embeddings)
    value = measured.compute()["map"]
    assert pickle.loads(pickle.dumps(measured)).compute()["map"] == value
    copy = measured.clone()
    measured.reset()
    measured.update(torch.arange(90), -embeddings)
    assert copy.compute()["map"] == value
    assert measured.compute()["map"] == value  # Cosines do not see a common sign.
    assert len(measured.numbers) == 1


# Reranking

QUERIES, DOCUMENTS = 25, 70


def reranking_set(seed: int = 0, most: int = 30) -> RerankingSet:
    """Lists of different lengths, one of them empty; some answers are in no list."""
    generator = random.Random(seed)
    candidates = [generator.sample(range(DOCUMENTS), generator.randint(1, most)) for _ in range(QUERIES)]
    candidates[3] = []
    return RerankingSet(evaluation_set(QUERIES, DOCUMENTS, seed), candidates)


def reranking_reference(reranking: RerankingSet, scores: list[list[float]]) -> dict[str, list[float]]:
    """What pytrec_eval says of each query's candidates with these scores; 0 where it has none."""
    evaluation = reranking.evaluation
    run = {
        query: {evaluation.document_names[column]: score for column, score in zip(columns, row, strict=True)}
        for query, columns, row in zip(evaluation.query_names, reranking.candidates, scores, strict=True)
    }
    return trec(evaluation, run)


def candidate_scores(reranking: RerankingSet, decimals: int = 6) -> list[list[float]]:
    """Around zero; the fewer decimals, the more ties. Rounded to float32, which is what is compared."""
    generator = np.random.default_rng(decimals)
    return [
        generator.standard_normal(len(found)).round(decimals).astype(np.float32).tolist()
        for found in reranking.candidates
    ]


def reranked(reranking: RerankingSet, scores: list[list[float]]) -> RerankingMetrics:
    """Updated with batches of 7, in no order."""
    measured = RerankingMetrics(reranking)
    flat = torch.tensor([score for row in scores for score in row])
    for chosen in torch.randperm(len(flat), generator=torch.Generator().manual_seed(2)).split(7):
        measured.update(measured.pairs[chosen], flat[chosen])
    return measured


@pytest.mark.parametrize("decimals", [0, 1, 6])
@pytest.mark.parametrize("seed", range(3))
def test_after_and_before_equal_pytrec_eval(seed: int, decimals: int) -> None:
    reranking = reranking_set(seed)
    scores = candidate_scores(reranking, decimals)
    measured = reranked(reranking, scores)
    values, per_query = measured.compute(), measured.per_query()
    found = [[-float(place) for place in range(len(columns))] for columns in reranking.candidates]
    assert values.keys() == per_query.keys() == {f"{name}{suffix}" for name in METRICS for suffix in ("", "/before")}
    for suffix, given in (("", scores), ("/before", found)):
        for name, expected in reranking_reference(reranking, given).items():
            np.testing.assert_allclose(per_query[name + suffix].numpy(), expected, atol=1e-6, err_msg=name + suffix)
            assert values[name + suffix].item() == pytest.approx(np.mean(expected), abs=1e-6)


def test_logits_that_a_sigmoid_would_make_equal_are_told_apart() -> None:
    reranking = reranking_set()
    scores = [[50.0 + place for place in range(len(found))] for found in reranking.candidates]
    assert torch.tensor(scores[0]).sigmoid().unique().numel() == 1
    per_query = reranked(reranking, scores).per_query()
    for name, expected in reranking_reference(reranking, scores).items():
        np.testing.assert_allclose(per_query[name].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("k", [1, 12, 1000])
def test_top_k_is_by_score_and_then_by_name(k: int) -> None:
    reranking = reranking_set()
    scores = candidate_scores(reranking, decimals=0)
    ranked, columns = reranked(reranking, scores).top_k(k)
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
        with pytest.raises(
            ValueError, match=f"scores of query 'q1' with document '{name}' of evaluation set 'graded' are not"
        ):
            measured.update(torch.tensor([[1, column]]), torch.tensor([broken]))


def test_half_precision_is_compared_in_float32() -> None:
    reranking = reranking_set()
    scores = [torch.tensor(row).bfloat16().tolist() for row in candidate_scores(reranking)]
    measured = RerankingMetrics(reranking)
    measured.update(measured.pairs, torch.tensor([*chain(*scores)], dtype=torch.bfloat16))
    assert measured.values[0].dtype == torch.float32
    expected = reranking_reference(reranking, scores)["map"]
    np.testing.assert_allclose(measured.per_query()["map"].numpy(), expected, atol=1e-6)


def test_reranking_sets_that_cannot_be_measured_are_refused() -> None:
    reranking = reranking_set()
    with pytest.raises(ValueError, match="'graded' has no query with a candidate"):
        RerankingMetrics(replace(reranking, candidates=[[]] * QUERIES))
    with pytest.raises(ValueError, match="'graded': query 'q1' has a candidate twice"):
        RerankingMetrics(replace(reranking, candidates=[[4], [2, 5, 2], *reranking.candidates[2:]]))


# Processes


def retrieval_metrics() -> tuple[RetrievalMetrics, Tensor, Tensor]:
    """A metric without values, and all rows and values that it takes."""
    evaluation = evaluation_set()
    embeddings = embeddings_of(evaluation)
    return RetrievalMetrics(evaluation, dimensions=(3,)), torch.arange(len(embeddings)), embeddings


def reranking_metrics() -> tuple[RerankingMetrics, Tensor, Tensor]:
    reranking = reranking_set()
    scores = torch.tensor([score for row in candidate_scores(reranking) for score in row])
    return RerankingMetrics(reranking), RerankingMetrics(reranking).pairs, scores


def vectors_of(evaluation: EvaluationSet, size: int = 8, longest: int = 9) -> list[Tensor]:
    """One to nine vectors of each item, of any length."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest + 1, (len(evaluation.queries) + len(evaluation.corpus),), generator=generator)
    return [3 * torch.randn(length, size, generator=generator) for length in lengths.tolist()]


def multi_vector_metrics() -> tuple[MultiVectorMetrics, Tensor, list[Tensor]]:
    evaluation = evaluation_set()
    measured = MultiVectorMetrics(evaluation, (3,), (2,), two_stage=9, length_normalized=True)
    return measured, torch.arange(90), vectors_of(evaluation)


METRICS_MADE = [retrieval_metrics, reranking_metrics, multi_vector_metrics]


def results(make: Callable, batches: list[Tensor]) -> dict[str, Tensor]:
    """Whatever a metric says of some batches."""
    measured, rows, values = make()
    for chosen in batches:
        is_multi = isinstance(values, list)
        some = MultiVectors.of([values[row] for row in chosen.tolist()]) if is_multi else values[chosen]
        measured.update(rows[chosen], some)
    scores, columns = measured.top_k(1000)
    per_query = {f"{name} of each": found for name, found in measured.per_query().items()}
    found = {**measured.compute(), **per_query, "scores": scores, "columns": columns}
    if not isinstance(measured, RerankingMetrics):
        gathered = measured.gather_embeddings()
        found["embeddings"] = gathered.vectors if isinstance(gathered, MultiVectors) else gathered
    return found


def shares(make: Callable) -> list[list[list[Tensor]]]:
    """Uneven: five items are on both processes, and two of them twice on the second. Then one has nothing."""
    order = torch.randperm(len(make()[1]), generator=torch.Generator().manual_seed(4))
    return [[[*order[:61].split(9)], [order[61:], order[:5], order[:2]]], [[order], []], [[], [order]]]


def measure_shares() -> list[dict[str, Tensor]]:
    """One of two processes: update with its shares, and say what comes out."""
    metrics.retrieval.ROWS_PER_GATHER = 16  # So that a share takes several pieces.
    metrics.retrieval.SCORES_PER_BLOCK = 7 * 60  # So that each process scores some of the queries.
    rank = torch.distributed.get_rank()
    return [results(make, share[rank]) for make in METRICS_MADE for share in shares(make)]


def test_two_processes_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.retrieval, "SCORES_PER_BLOCK", 7 * 60)
    whole = [results(make, [torch.arange(len(make()[1]))]) for make in METRICS_MADE]
    for found in ddp.run(measure_shares):
        for result, expected in zip(found, [one for one in whole for _ in range(3)], strict=True):
            torch.testing.assert_close(result, expected, rtol=0, atol=0)  # The same blocks, to the bit.
