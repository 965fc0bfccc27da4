"""Search of an index, against a loop over pairs that sorts by score and then by id, and against other libraries."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from building import encoder, jsonl, multi_vector, picture, ranker, slow_maxsim, write_index
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

from vlmembed.cli import main
from vlmembed.export.sentence_transformers import write_folder, write_reranker
from vlmembed.heads import Linear
from vlmembed.late_interaction import MultiVectors
from vlmembed.metrics.functions import BestDocuments
from vlmembed.pooling import LastToken
from vlmembed.search import ranking
from vlmembed.search.index import Index
from vlmembed.search.ranking import View, rescore, search_by, search_exact
from vlmembed.search.searching import read_queries, same_rows

QUERIES, DOCUMENTS = 5, 40
PRECISIONS = ["float32", "float16", "int8", "binary"]


def ids(count: int = DOCUMENTS) -> list[str]:
    """In no order, and in other orders by bytes, by letters and by numbers."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3)).tolist()
    return [f"{'éa𝕏Z'[number % 4]}{number}" for number in order]


def random(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Of any length."""
    return 3 * torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def several(count: int, size: int = 16, seed: int = 0) -> list[Tensor]:
    """One to six vectors of each item."""
    return [random(1 + number * 7 % 6, size, 100 * seed + number) for number in range(count)]


def stored(vectors: Tensor, precision: str) -> Tensor:
    """What a precision leaves of the vectors (n, D) of one item."""
    if precision == "binary":
        return torch.where(vectors > 0, 1.0, -1.0)
    if precision == "int8":
        scale = vectors.abs().max() / 127
        return (vectors / scale).round() * scale
    return vectors.to(getattr(torch, precision)).float()


def expected(scores: Tensor, names: list[str], k: int) -> list[list[str]]:
    """By score and then by id, both descending, as pytrec_eval ranks."""
    return [
        [names[column] for column in sorted(range(len(row)), key=lambda column: (row[column], names[column]))[::-1][:k]]
        for row in scores.tolist()
    ]


def names_of(index: Index, rows: Tensor) -> list[list[str]]:
    return [[index.ids[number].as_py() for number in row if number >= 0] for row in rows.tolist()]


@pytest.mark.parametrize("k", [1, 4, 40])
@pytest.mark.parametrize(("width", "group"), [(1, 64), (8, 4), (40, 64)])
@pytest.mark.parametrize("kind", ["random", "tied", "ascending", "one value", "excluded", "NaN"])
def test_the_best_of_tiles_are_those_of_all(
    k: int, width: int, kind: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmembed.metrics.functions.GROUP", group)
    scores, names = random(QUERIES, DOCUMENTS), ids()
    if kind == "tied":
        scores = scores.round()  # Of 0 and -0, which are equal, too.
    elif kind == "ascending":
        scores = scores.sort(dim=1).values
    elif kind == "one value":
        scores = torch.full_like(scores, -0.25)
    elif kind == "excluded":
        scores[:, ::2] = -torch.inf
        scores[2] = -torch.inf
    elif kind == "NaN":
        scores[:, ::3] = torch.nan
    order = torch.tensor(sorted(range(DOCUMENTS), key=names.__getitem__)).argsort()
    best = BestDocuments(QUERIES, k)
    for start, column in itertools.product(range(0, QUERIES, 2), range(0, DOCUMENTS, width)):
        tile = slice(column, column + width)
        best.add(start, scores[start : start + 2, tile], order[tile])
    values, positions = best.ranked()
    for row, query in enumerate(scores.tolist()):
        ranked = zip(values[row].tolist(), positions[row].tolist(), strict=True)
        pairs = [pair for pair in zip(query, names, strict=True) if pair[0] > -torch.inf]
        best_pairs = sorted(pairs, reverse=True)[:k]
        filled = [(-torch.inf, None)] * (k - len(best_pairs))
        assert [(value, sorted(names)[place] if place >= 0 else None) for value, place in ranked] == best_pairs + filled


def test_scores_are_float32_whatever_is_allowed_outside(tmp_path: Path) -> None:
    vectors, queries = random(DOCUMENTS, 64), random(QUERIES, 64, 1)
    index, before = (
        Index.open(write_index(tmp_path / "index", vectors, ids())),
        torch.get_float32_matmul_precision(),
    )
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = search_exact(View(index), queries, 40)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    exact = normalize(queries.double(), dim=1) @ normalize(vectors.double(), dim=1).T
    # Rounding of 64 products of float32; bfloat16 would be off by 1e-3.
    torch.testing.assert_close(found.scores.double(), exact.gather(1, found.rows), atol=1e-6, rtol=0)


def test_threads_share_the_queries(tmp_path: Path) -> None:
    vectors, threads = random(DOCUMENTS), torch.get_num_threads()
    index = Index.open(write_index(tmp_path / "index", vectors, ids()))
    try:
        torch.set_num_threads(3)
        found = {count: search_exact(View(index), random(QUERIES, seed=1)[:count], 10) for count in range(QUERIES + 1)}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    names = expected(normalize(random(QUERIES, seed=1), dim=1) @ normalize(vectors, dim=1).T, ids(), 10)
    for count, ranking_of_some in found.items():
        assert names_of(index, ranking_of_some.rows) == names[:count]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("dimension", "block"), [(None, 2**20), (16, 60), (5, 1)])
def test_search_is_the_loop_over_pairs(
    precision: str, dimension: int | None, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "BLOCK_NUMBERS", block)
    monkeypatch.setattr(ranking, "TILE_NUMBERS", block // 2)
    monkeypatch.setattr(ranking, "HEIGHT", 2)
    vectors, queries = random(DOCUMENTS), random(QUERIES, seed=1)
    index = Index.open(write_index(tmp_path / "index", vectors, ids(), precision))
    found = search_exact(View(index, dimension), queries, 10)
    kept = torch.stack([stored(vector, precision) for vector in vectors])[:, :dimension]
    scores = normalize(queries[:, :dimension], dim=1) @ normalize(kept, dim=1).T
    if precision == "binary":  # Signs tie, and products in other orders differ in the last bit.
        torch.testing.assert_close(found.scores, scores.sort(descending=True).values[:, :10])
    else:
        assert names_of(index, found.rows) == expected(scores, ids(), 10)
    # Rounding of 16 products of float32.
    torch.testing.assert_close(found.scores, scores.gather(1, found.rows), atol=1e-6, rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("similarity", ["maxsim", "meanmaxsim"])
def test_search_of_several_vectors_is_maxsim(precision: str, similarity: str, tmp_path: Path) -> None:
    documents, queries = several(DOCUMENTS), several(QUERIES, seed=1)
    index = Index.open(write_index(tmp_path / "index", documents, ids(), precision, similarity=similarity))
    for dimension in (None, 5):
        found = search_exact(View(index, dimension), MultiVectors.of(queries), 10)
        kept = [stored(vectors, precision)[:, :dimension] for vectors in documents]
        scores = slow_maxsim([query[:, :dimension] for query in queries], kept)
        if similarity == "meanmaxsim":
            scores /= torch.tensor([[len(query)] for query in queries])
        torch.testing.assert_close(found.scores, scores.gather(1, found.rows), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.scores, scores.sort(descending=True).values[:, :10], atol=1e-5, rtol=0)


def test_equal_scores_are_ranked_by_id(tmp_path: Path) -> None:
    """Signs of 16 numbers: cosines in eighths, exact in float32."""
    vectors, queries = random(DOCUMENTS).sign(), random(QUERIES, seed=1).sign()
    index = Index.open(write_index(tmp_path / "index", vectors, ids()))
    scores = queries @ vectors.T / 16
    for k in (1, 7, 100):
        assert names_of(index, search_exact(View(index), queries, k).rows) == expected(scores, ids(), k)


def test_what_stays_in_memory_is_found_again(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "index", random(DOCUMENTS), ids())
    view, queries = View(Index.open(folder), 5, in_memory=True), random(QUERIES, seed=1)
    expected = search_exact(View(view.index, 5), queries, 10)
    assert search_exact(view, queries, 10).rows.equal(expected.rows)
    for file in folder.glob("*.parquet"):
        file.unlink()
    assert search_exact(view, queries, 10).rows.equal(expected.rows)
    assert rescore(view, queries, expected.rows, 3).rows.equal(expected.rows[:, :3])


def test_inner_products_are_of_vectors_as_they_are(tmp_path: Path) -> None:
    vectors, queries = random(DOCUMENTS), random(QUERIES, seed=1)
    index = Index.open(write_index(tmp_path / "index", vectors, ids(), similarity="dot"))
    assert names_of(index, search_exact(View(index), queries, 9).rows) == expected(queries @ vectors.T, ids(), 9)


@pytest.mark.parametrize("first_stage", [{"dimension": 3}, {"signs": True}])
def test_a_second_stage_ranks_what_the_first_finds(first_stage: Any, tmp_path: Path) -> None:
    vectors, queries = random(DOCUMENTS), random(QUERIES, seed=1)
    index = Index.open(write_index(tmp_path / "index", vectors, ids()))
    first = search_exact(View(index, **first_stage), queries, 12).rows
    found = rescore(View(index), queries, first, 5)
    cosines = normalize(queries, dim=1) @ normalize(vectors, dim=1).T
    allowed = torch.full_like(cosines, -torch.inf).scatter(1, first, cosines.gather(1, first))
    assert names_of(index, found.rows) == expected(allowed, ids(), 5)
    torch.testing.assert_close(found.scores, cosines.gather(1, found.rows), atol=1e-6, rtol=0)
    fewer = first.clone()
    fewer[1:, 2:] = -1
    assert [*map(len, names_of(index, rescore(View(index), queries, fewer, 5).rows))] == [5, 2, 2, 2, 2]


def test_means_of_vectors_find_what_maxsim_ranks(tmp_path: Path) -> None:
    documents, queries = several(DOCUMENTS), several(QUERIES, seed=1)
    index = Index.open(write_index(tmp_path / "index", documents, ids()))
    first = search_exact(View(index, means=True), MultiVectors.of(queries), 12)
    means = [
        normalize(torch.stack([normalize(item, dim=1).mean(0) for item in side]), dim=1)
        for side in (queries, documents)
    ]
    assert names_of(index, first.rows) == expected(means[0] @ normalize(means[1], dim=1).T, ids(), 12)
    scores = slow_maxsim(queries, documents)
    allowed = torch.full_like(scores, -torch.inf).scatter(1, first.rows, scores.gather(1, first.rows))
    assert names_of(index, rescore(View(index), MultiVectors.of(queries), first.rows, 6).rows) == expected(
        allowed, ids(), 6
    )


def test_rows_of_one_index_are_found_in_another(tmp_path: Path) -> None:
    """Of the same corpus in another order, and without an item that could not be read by one of the models."""
    one, other = (
        write_index(tmp_path / name, random(DOCUMENTS), ids()[::step]) for name, step in (("a", 1), ("b", -1))
    )
    rows = torch.tensor([[0, 3, -1], [39, 5, 1]])
    assert same_rows(Index.open(one), Index.open(other), rows).tolist() == [[39, 36, -1], [0, 34, 38]]
    fewer = Index.open(write_index(tmp_path / "c", random(39), ids()[1:]))
    with pytest.raises(ValueError, match=f"id '{ids()[0]}' is not in .*c: they are of other corpora"):
        same_rows(Index.open(one), fewer, rows)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "incomplete": ({"complete": False}, "the index is not complete; it has 40 items so far"),
    "another format": ({"format": 2}, "format 2 with vectors in 'float32'; this version reads format 1"),
    "another precision": ({"precision": "int4"}, "in 'int4'; this version reads format 1 in float32, float16"),
    "another count": ({"count": 41}, "41 items, and 40 in its shards"),
    "another dimension": ({"dimension": 8}, "7 vectors with 112 numbers, where manifest.json says 8"),
    "another similarity": ({"similarity": "euclidean"}, "compares vectors by 'euclidean', and search can do cosine"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_index_that_cannot_be_searched_is_refused(kind: str, tmp_path: Path) -> None:
    changes, message = BROKEN[kind]
    folder = write_index(tmp_path / "index", random(DOCUMENTS), ids())
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        [*View(Index.open(folder)).blocks()]


def test_folders_that_are_no_index_are_refused(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "index", random(DOCUMENTS), ids())
    (folder / "shard-00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"shard-00003.parquet: 0 items, but manifest.json says 7"):
        Index.open(folder)
    for content, message in (("{", "cannot be read"), ("[1]", "does not say format"), ("3", "cannot be read")):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=f"manifest.json: it .*{message}|{message}"):
            Index.open(folder)
    with pytest.raises(ValueError, match="no index, for it has no manifest"):
        Index.open(tmp_path)


@pytest.mark.parametrize("dimension", [0, -1, 17])
def test_dimensions_that_the_index_lacks_are_refused(dimension: int, tmp_path: Path) -> None:
    index = Index.open(write_index(tmp_path / "index", random(9), ids(9), dimensions=[4, 8]))
    with pytest.raises(ValueError, match=rf"dimension {dimension} is none of its vectors', which have 16.*: 4, 8"):
        search_exact(View(index, dimension), random(2), 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_queries_without_numbers_are_refused(value: float, tmp_path: Path) -> None:
    index, queries = Index.open(write_index(tmp_path / "index", random(9), ids(9))), random(2)
    queries[1, 3] = value
    with pytest.raises(ValueError, match="queries have NaN or infinite numbers"):
        search_exact(View(index), queries, 3)
    with pytest.raises(ValueError, match=r"queries of shape \(2, 4\) are none of its model's"):
        search_exact(View(index), random(2, 4), 3)


def test_repeated_ids_are_refused(tmp_path: Path) -> None:
    names = ids()
    names[31] = names[12]
    index = Index.open(write_index(tmp_path / "index", random(DOCUMENTS), names))
    with pytest.raises(ValueError, match=f"id '{names[12]}' is that of items 12 and 31"):
        search_exact(View(index), random(2), 3)


def test_another_models_index_is_refused(tmp_path: Path) -> None:
    index = Index.open(write_index(tmp_path / "index", random(9), ids(9), model="a/model", model_digest="1f"))
    index.refuse_other("1f", "here")
    with pytest.raises(ValueError, match=r"vectors are of a/model \(digest 1f\), and here is another .* 2f"):
        index.refuse_other("2f", "here")


def test_query_files(tmp_path: Path) -> None:
    """JSONL, CSV and Parquet; of an evaluation folder all queries, judged or not."""
    rows = [{"_id": "1", "text": "one"}, {"_id": "b", "text": "zwei é"}]
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.jsonl").write_text('{"_id": "d", "text": "three"}\n')
    (folder / "qrels.tsv").write_text("b\td\t1\n")
    (tmp_path / "q.csv").write_text("id,text\n1,one\nb,zwei é\n")
    pq.write_table(pa.table({"id": ["1", "b"], "text": ["one", "zwei é"]}), tmp_path / "q.parquet")
    for path in (folder, folder / "queries.jsonl", tmp_path / "q.csv", tmp_path / "q.parquet"):
        names, items = read_queries(str(path))
        assert names == ["1", "b"]
        assert [(item.role, item.parts[0].value) for item in items] == [("query", "one"), ("query", "zwei é")]


QUERY_FILES = {
    "no ids": ('{"text": "one"}', "row 1.*expected one 'id'"),
    "an empty id": ('{"id": "", "text": "one"}', "row 1.*id ''"),
    "white space": ('{"id": "a b", "text": "one"}', "id 'a b' has white space"),
    "repeated": ('{"id": "a", "text": "one"}\n{"id": "a", "text": "two"}', "row 2.*id 'a' is given twice"),
    "no content": ('{"id": "a"}', "row 1"),
    "null": ('{"id": "a", "text": null}', "row 1"),
    "no rows": ("", "queries.jsonl"),
}


@pytest.mark.parametrize("kind", QUERY_FILES)
def test_query_files_that_cannot_be_searched_are_refused(kind: str, tmp_path: Path) -> None:
    content, message = QUERY_FILES[kind]
    (tmp_path / "queries.jsonl").write_text(content + "\n" * bool(content))
    with pytest.raises(ValueError, match=message):
        read_queries(str(tmp_path / "queries.jsonl"))


# Approximate search


@pytest.mark.parametrize("engine", ["faiss", "lancedb"])
@pytest.mark.parametrize("options", [{}, {"dimension": 5}, {"signs": True}, {"means": True}])
def test_approximate_search_that_looks_everywhere_is_exact(
    engine: Any, options: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And does so again with what the first time has left; with one list of many it finds less, and says so."""
    pytest.importorskip(engine)
    means = "means" in options
    documents, queries = (several(300), several(QUERIES, seed=9)) if means else (random(300), random(QUERIES, seed=9))
    index = Index.open(write_index(tmp_path / "index", documents, ids(300), shard_size=70))
    view, vectors = View(index, **options), MultiVectors.of(queries) if means else queries
    exact = search_exact(view, vectors, 10)
    for _ in range(2):
        found = search_by(engine, view, vectors, 10, probes=100)
        assert capsys.readouterr().out.startswith(f"{engine}: recall@10 is 1.0000 of exact search, on 5 of")
        # FAISS and LanceDB add up in other orders.
        torch.testing.assert_close(found.scores, exact.scores, atol=1e-5, rtol=0)
    found = search_by(engine, view, vectors, 10, probes=1)
    hits = sum(len({*one} & {*other}) for one, other in zip(found.rows.tolist(), exact.rows.tolist(), strict=True))
    assert f"recall@10 is {hits / 50:.4f}" in capsys.readouterr().out
    assert 0 < hits < 50


@pytest.mark.parametrize("count", [1, 2])
def test_approximate_search_of_few_documents(count: int, tmp_path: Path) -> None:
    index = Index.open(write_index(tmp_path / "index", random(count), ids(count)))
    for engine in ("faiss", "lancedb"):
        pytest.importorskip(engine)
        found = search_by(engine, View(index), random(QUERIES, seed=9), 10, probes=1)
        assert found.rows.equal(search_exact(View(index), random(QUERIES, seed=9), 10).rows)


def test_engines_that_cannot_search_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index.open(write_index(tmp_path / "index", several(9), ids(9)))
    with pytest.raises(ValueError, match=r"one vector of an item.*first_stage mean"):
        search_by("faiss", View(index), MultiVectors.of(several(2)), 3, 1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="engine faiss is not installed: pip install faiss-cpu"):
        search_by("faiss", View(index, means=True), MultiVectors.of(several(2)), 3, 1)


# The command


@pytest.fixture(scope="module")
def world(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a corpus and queries of texts and pictures, and the index of each model, ``single`` and ``multi``."""
    folder = tmp_path_factory.mktemp("world")
    write_folder(encoder(checkpoint), folder / "single", dimensions=[32])
    write_folder(multi_vector(checkpoint).encoder, folder / "multi")
    write_reranker(ranker(checkpoint, head=Linear(LastToken())).encoder, folder / "reranker")
    for number in range(3):
        picture(32 + 32 * number, 64, number).save(folder / f"{number}.png")
    texts = [{"id": f"t{number}", "text": f"text {number} " * (1 + number % 3)} for number in range(7)]
    jsonl(folder / "corpus.jsonl", [*texts, *({"id": f"p{number}", "image": f"{number}.png"} for number in range(3))])
    jsonl(folder / "queries.jsonl", [{"_id": "a", "text": "text 3"}, {"_id": "é", "image": "1.png", "text": "what?"}])
    for kind in ("single", "multi"):
        corpus = ["--corpus", str(folder / "corpus.jsonl"), "--output", str(folder / f"{kind}_index")]
        main(["encode", "--model", str(folder / kind), *corpus])
    return folder


def arguments(folder: Path, kind: str = "single", **options: Any) -> list[str]:
    given = {"index": folder / f"{kind}_index", "model": folder / kind, "queries": folder / "queries.jsonl"} | options
    pairs = ([f"--{name}", str(value)] for name, value in given.items() if value is not None)
    return ["search", *itertools.chain.from_iterable(pairs)]


def run_of(path: Path) -> dict[str, list[tuple[str, float]]]:
    """A TREC run: documents and scores by query, with ranks from 1."""
    run: dict[str, list[tuple[str, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        query, _, document, rank, score, _ = line.split()
        run.setdefault(query, []).append((document, float(score)))
        assert len(run[query]) == int(rank)
    return run


@pytest.mark.parametrize(("kind", "dimension"), [("single", None), ("single", 32), ("multi", None)])
def test_a_run_is_what_sentence_transformers_finds(
    kind: str, dimension: int | None, world: Path, tmp_path: Path
) -> None:
    main(arguments(world, kind, output=tmp_path / "a" / "run.trec", top_k=4, depth=10, dimension=dimension))
    found = run_of(tmp_path / "a" / "run.trec")
    model: Any = (SentenceTransformer if kind == "single" else MultiVectorEncoder)(str(world / kind))
    options: Any = {"truncate_dim": dimension} if dimension else {}
    sides = []
    for name, encode in (("queries", model.encode_query), ("corpus", model.encode_document)):
        rows = [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]
        contents = [{key: row[key] for key in ("image", "text") if key in row} for row in rows]
        contents = [one | ({"image": str(world / one["image"])} if "image" in one else {}) for one in contents]
        sides.append(([row.get("id") or row["_id"] for row in rows], encode(contents, **options)))
    (queries, of_queries), (documents, of_documents) = sides
    scores = model.similarity(of_queries, of_documents)
    assert [*found] == queries
    for row, query in enumerate(queries):
        named = dict(zip(documents, scores[row].tolist(), strict=True))
        # Packed and padded encoding differ by 1e-5; MaxSim adds up some ten cosines.
        assert [named[name] for name, _ in found[query]] == pytest.approx(sorted(named.values())[::-1][:4], abs=1e-4)
        assert [score for _, score in found[query]] == pytest.approx(
            [named[name] for name, _ in found[query]], abs=1e-4
        )


def test_one_query_is_answered_on_the_console(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main(arguments(world, queries=None, query="text 3 ", top_k=3))
    ranks, scores, names = zip(*(line.split() for line in capsys.readouterr().out.splitlines()[-3:]), strict=True)
    assert ranks == ("1", "2", "3")
    assert sorted(map(float, scores), reverse=True) == [*map(float, scores)]
    assert {*names} < {*(f"t{number}" for number in range(7)), "p0", "p1", "p2"}


@pytest.mark.parametrize(("kind", "first_stage"), [("single", 32), ("single", "binary"), ("multi", "mean")])
def test_a_first_stage_that_finds_all_changes_nothing(kind: str, first_stage: Any, world: Path, tmp_path: Path) -> None:
    options: Any = {"top_k": 10, "depth": 10}
    main(arguments(world, kind, output=tmp_path / "one.trec", **options))
    main(arguments(world, kind, output=tmp_path / "two.trec", first_stage=first_stage, **options))
    one, two = run_of(tmp_path / "one.trec"), run_of(tmp_path / "two.trec")
    for query in one:
        assert [score for _, score in two[query]] == pytest.approx([score for _, score in one[query]], abs=1e-5)


def test_another_models_index_may_find_what_maxsim_ranks(world: Path, tmp_path: Path) -> None:
    options: Any = {"top_k": 3, "depth": 3}
    main(arguments(world, "single", output=tmp_path / "first.trec", **options))
    main(arguments(world, "multi", output=tmp_path / "both.trec", first_stage=world / "single_index", **options))
    first, both = run_of(tmp_path / "first.trec"), run_of(tmp_path / "both.trec")
    for query in first:
        assert {name for name, _ in both[query]} == {name for name, _ in first[query]}


@pytest.mark.parametrize("first_stage", [None, "binary"])
def test_a_reranker_ranks_by_its_logits(first_stage: Any, world: Path, tmp_path: Path) -> None:
    """Texts and pictures, as Sentence Transformers scores the pairs."""
    options: Any = {"depth": 6, "first_stage": first_stage}
    main(arguments(world, output=tmp_path / "first.trec", top_k=6, **options))
    main(arguments(world, output=tmp_path / "run.trec", top_k=4, reranker=world / "reranker", **options))
    first, found = run_of(tmp_path / "first.trec"), run_of(tmp_path / "run.trec")
    queries: dict[str, Any] = {"a": {"text": "text 3"}, "é": {"image": str(world / "1.png"), "text": "what?"}}
    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    documents = {row.pop("id"): row | ({"image": str(world / row["image"])} if "image" in row else {}) for row in rows}
    reranker = CrossEncoder(str(world / "reranker"))
    for query, content in queries.items():
        pairs: Any = [(content, documents[name]) for name, _ in first[query]]
        logits = reranker.predict(pairs, activation_fn=torch.nn.Identity(), batch_size=1).tolist()
        expected = sorted(zip(logits, (name for name, _ in first[query]), strict=True), reverse=True)[:4]
        assert [name for name, _ in found[query]] == [name for _, name in expected]
        # Padding moves a float32 logit by about 1e-6.
        assert [score for _, score in found[query]] == pytest.approx([score for score, _ in expected], abs=1e-5)


def test_a_reranker_reads_the_corpus_that_was_encoded(world: Path, tmp_path: Path) -> None:
    other = jsonl(tmp_path / "corpus.jsonl", [{"id": "t0", "text": "one"}])
    with pytest.raises(ValueError, match=r"has changed since it was encoded; it has 1 items, and the index 10"):
        main(arguments(world, queries=None, query="one", top_k=2, reranker=world / "reranker", corpus=other))


def test_the_commands_of_the_page_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parent.parent / "vlmembed/search/README.md"
    section = page.read_text().split("\n## Search\n")[1].split("\n## ")[0]
    commands = [shlex.split(line)[3:] for line in section.splitlines() if line.startswith("python -m vlmembed ")]
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("my-model").symlink_to(world / "single")
    for file in ("queries.jsonl", "1.png"):
        Path(file).write_bytes((world / file).read_bytes())
    Path("runs/index").symlink_to(world / "single_index")
    for command in commands:
        main(command)
    assert {path.name for path in Path("runs").glob("*.trec")} == {"found.trec", "32.trec", "two.trec"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"index": "multi_index"}, "multi_index: its vectors are of .*multi .* is another model"),
    "a dimension that the index lacks": ({"dimension": 4096}, "dimension 4096 is none of its vectors'.*: 32"),
    "no probes": ({"probes": 0}, "probes is 1 or more, got 0"),
    "a folder to write": ({"output": "."}, "is a folder; output is the TREC run"),
    "no such queries": ({"queries": "nowhere.jsonl"}, "nowhere.jsonl"),
    "a corpus that is gone": ({"reranker": "reranker", "corpus": "gone.jsonl"}, "its corpus 'gone.jsonl' cannot be"),
    "no documents": ({"top_k": 0}, "top_k is 1 or more, and depth at least top_k; got 0 and 1000"),
    "a first stage that finds fewer": ({"top_k": 10, "depth": 9, "first_stage": 32}, "got 10 and 9"),
    "two kinds of queries": ({"query": "text"}, "takes queries .* or query"),
    "neither": ({"queries": None}, "takes queries .* or query"),
    "nowhere to write": ({"output": None}, "takes queries .* with output"),
    "an empty query": ({"queries": None, "query": " "}, "query is empty"),
    "no such index": ({"index": "nowhere"}, "nowhere: no index"),
    "no such first stage": ({"first_stage": "nowhere"}, "nowhere: no index"),
    "means of single vectors": ({"first_stage": "mean"}, "the mean of an item's vectors"),
    "no numbers in a first stage": ({"first_stage": 0}, "dimension 0 is none"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_search_cannot_do_is_refused(kind: str, world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    options, message = REFUSED[kind]
    monkeypatch.chdir(world)
    with pytest.raises(ValueError, match=message):
        main(arguments(world, **{"output": tmp_path / "run.trec", **options}))
    assert not [*tmp_path.iterdir()]


def test_ids_that_a_run_cannot_hold_are_refused(tmp_path: Path) -> None:
    for space in ("\u3000", " ", "\x0b"):
        folder = write_index(tmp_path / str(ord(space)), random(3), ["a", f"b{space}c", "d"])
        with pytest.raises(ValueError, match=r"id 'b.*c' has white space in it, which a TREC run cannot hold"):
            Index.open(folder).refuse_white_space()
