from __future__ import annotations

import gzip
import pickle
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from building import evaluation_folder, jsonl, module, trainer
from PIL import Image
from test_metrics import candidate_scores, reranked, reranking_set

from vlmembed.data import (
    EvaluationFolder,
    EvaluationRows,
    EvaluationSource,
    GroupByQuery,
    Mixture,
    PairCollator,
    RerankingRows,
    RerankingRun,
    RerankingSource,
    RetrievalDataModule,
    Rows,
)
from vlmembed.data.evaluation import as_evaluation, as_reranking
from vlmembed.losses import LabelSpec
from vlmembed.media import load_image
from vlmembed.modules.base import write_run
from vlmembed.types import EvaluationSet, Example, Item, RerankingSet

CORPUS = [
    {"_id": "d2", "text": "two"},
    {"_id": "d1", "image": "a.png", "text": "one"},
    {"_id": "d3", "title": "Three", "text": "three", "metadata": {"url": "x"}},
]
QUERIES = [{"id": 2, "text": "second"}, {"id": "q1", "text": "first"}, {"id": "idle", "text": "not judged"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n2\td3\t1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = Path(evaluation_folder(tmp_path / "pages", CORPUS, QUERIES, QRELS))
    Image.new("RGB", (4, 4)).save(place / "a.png")
    return place


def values(items: Any) -> list[list[Any]]:
    return [[part.value for part in item.parts] for item in items]


@pytest.mark.filterwarnings("error")
def test_a_folder(folder: Path) -> None:
    found = as_evaluation(str(folder))
    assert found.name == "pages"
    assert found.query_names == ["2", "q1"]  # In the order of queries.jsonl; the query without judgements is left out.
    assert values(found.queries) == [["second"], ["first"]]
    assert found.document_names == ["d2", "d1", "d3"]
    assert values(found.corpus) == [["two"], [folder / "a.png", "one"], ["Three three"]]
    assert found.qrels == {"q1": {"d1": 2, "d2": 0}, "2": {"d3": 1}}
    assert {item.role for item in found.queries} == {"query"}
    assert {item.role for item in found.corpus} == {"document"}


def test_the_header_is_optional_and_the_name_can_be_given(folder: Path) -> None:
    expected = EvaluationFolder(str(folder)).load().qrels
    (folder / "qrels.tsv").write_text(QRELS.split("\n", 1)[1])
    found = EvaluationFolder(str(folder), name="other").load()
    assert (found.name, found.qrels) == ("other", expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 d1 1", "qrels.tsv, row 5: expected query-id, corpus-id, integer grade; got 'q1 d1 1'"),
        ("q1\t0\td1\t1", "qrels.tsv, row 5: expected"),
        ("q1\td3\t0.5", "qrels.tsv, row 5: expected"),
        ("q1\td1\t1", "qrels.tsv, row 5: 'q1' and 'd1' had another grade before"),
        ("gone\td1\t1", "qrels.tsv: query 'gone' is not in .*queries.jsonl"),
        (f"q1\td3\t{'9' * 30}", "qrels.tsv, row 5: expected"),
        ("q1\td3\tinf", "qrels.tsv, row 5: expected"),
        ("q1\td3\t1\t", "qrels.tsv, row 5: expected"),
        ("# a remark", "qrels.tsv, row 5: expected"),
    ],
)
def test_bad_judgements_are_refused(line: str, message: str, folder: Path) -> None:
    (folder / "qrels.tsv").write_text(QRELS + line + "\n")
    with pytest.raises(ValueError, match=message):
        as_evaluation(str(folder))


@pytest.mark.parametrize("line", ["q1\td1\t0.5", "q1\td1", "# a remark", "q1\td1\t0\t1", "q1\td1\t1\t", "\0"])
def test_a_first_line_that_is_no_header_is_no_header(line: str, folder: Path) -> None:
    (folder / "qrels.tsv").write_text(f"{line}\nq1\td1\t1\n")
    with pytest.raises(ValueError, match=r"qrels.tsv, row 1: expected query-id, corpus-id, integer grade"):
        as_evaluation(str(folder))


def test_whole_grades_may_be_written_as_fractions(folder: Path) -> None:
    (folder / "qrels.tsv").write_text("\ufeffq1\td1\t2.0\r\n q1 \td2\t-1\r\n\r\n2\td3\t+1\r\n")
    assert as_evaluation(str(folder)).qrels == {"q1": {"d1": 2, "d2": -1}, "2": {"d3": 1}}


@pytest.mark.parametrize(
    "name", ["", " ", " d9", "d9 ", "d9\u00a0", "\u2003d9", "d\t9", "d\n9", "d9\r", "d\x1f", "\ufeffd9", "\ud83d"]
)
@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl"])
def test_ids_that_qrels_cannot_name_are_refused(name: str, file: str, folder: Path) -> None:
    jsonl(folder / file, [{"id": name, "text": "x"}, *(CORPUS if file == "corpus.jsonl" else QUERIES)])
    with pytest.raises(ValueError, match=f"{file}, row 1, column 'id': id .* cannot stand in qrels.tsv"):
        as_evaluation(str(folder))


#: Bytes in the place of a corpus, and what is said of them.
BROKEN = {
    "cut": (b'{"id": "d1", "text": "x"}\n{"id": "d2", "te', "row 2: not JSON"),
    "gzip": (gzip.compress(b'{"id": "d1", "text": "x"}\n'), "row 1: not JSON"),
    "UTF-16": ('{"id": "d1", "text": "x"}\n'.encode("utf-16"), "row 1: not JSON"),
    "Latin-1": ('{"id": "d1", "text": "é"}\n'.encode("latin-1"), "row 1: not JSON"),
    "an array": (b'[{"id": "d1", "text": "x"}]\n', "row 1: expected a JSON object"),
    "over several lines": (b'{\n"id": "d1",\n"text": "x"\n}\n', "row 1: not JSON"),
    "two in a line": (b'{"id": "d1", "text": "x"}\r{"id": "d2", "text": "x"}\r', "row 1: not JSON"),
    "nulls": (b"\0" * 9, "row 1: not JSON"),
    "a blank line": (b'{"id": "d1", "text": "x"}\n\n{"id": "d2", "text": "x"}\n', "row 2: a blank line"),
    "nested": (b'{"id": "d1", "text": ' + b"[" * 100_000, "row 1: not JSON"),
    "many digits": (b'{"id": ' + b"9" * 5000 + b', "text": "x"}\n', "row 1: not JSON"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_corpus_is_refused(kind: str, folder: Path) -> None:
    content, message = BROKEN[kind]
    (folder / "corpus.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"corpus.jsonl, {message}"):
        as_evaluation(str(folder))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": True, "text": "x"}, "corpus.jsonl, row 4, column 'id': an id is a string or a whole number, got bool"),
        (
            {"id": "d4", "title": 7, "text": "x"},
            "corpus.jsonl, row 4 .id 'd4'.: 'title' and 'text' are strings .*got 7, 'x'",
        ),
        ({"id": "d4", "title": "x", "text": ["y"]}, r"'title' and 'text' are strings .*got 'x', \['y'\]"),
        ({"id": "d1", "text": "again"}, "corpus.jsonl, row 4: id 'd1' is given twice; first at .*row 2"),
        ({"text": "no id"}, "corpus.jsonl, row 4: expected one 'id'"),
        ({"id": "d4", "_id": "d5", "text": "x"}, "corpus.jsonl, row 4: expected one 'id'"),
        (
            {"id": ["d4"], "text": "x"},
            "corpus.jsonl, row 4, column 'id': an id is a string or a whole number, got list",
        ),
        ({"id": "d4", "text": ""}, "corpus.jsonl, row 4 .id 'd4'.: the text is empty"),
        ({"id": "d4"}, "corpus.jsonl, row 4 .id 'd4'.: it has none of document, text, .*; there are id"),
        ({"id": "d4", "text": None}, "corpus.jsonl, row 4 .id 'd4'.: the cell is empty"),
        ({"id": "d4", "body": "x"}, "corpus.jsonl, row 4 .id 'd4'.: it has none of .*; there are id, body"),
        ({"id": "d4", "image": "gone.png"}, "corpus.jsonl, row 4 .id 'd4'.: the image file .*gone.png does not exist"),
    ],
)
def test_bad_rows_are_refused(row: dict[str, Any], message: str, folder: Path) -> None:
    jsonl(folder / "corpus.jsonl", [*CORPUS, row])
    with pytest.raises(ValueError, match=message):
        as_evaluation(str(folder))


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels.tsv"])
def test_missing_and_empty_files_are_refused(name: str, folder: Path) -> None:
    (folder / name).write_text("")
    with pytest.raises(ValueError, match=f"{name}: the file has no rows"):
        as_evaluation(str(folder))
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        as_evaluation(str(folder))


def test_judged_documents_that_are_not_in_the_corpus_are_kept_and_counted_once(folder: Path) -> None:
    (folder / "qrels.tsv").write_text(QRELS + "q1\tgone\t1\n2\tgone\t1\n2\taway\t1\n")
    with pytest.warns(UserWarning, match="2 documents .*such as 'away'") as caught:
        found = as_evaluation(str(folder))
    assert len(caught) == 1
    assert found.qrels["2"] == {"d3": 1, "gone": 1, "away": 1}


ROWS = [
    {"query": "q1", "positive": "shared", "negative": "n1"},
    {"query": "q2", "positive": ["p2", "p3"], "negative": "shared"},
    {"query": "q1", "positive": "p2", "negative": "n1"},
    {"query": "shared", "positive": "p3", "negative": "n2"},
]


def named(items: Any, names: Any) -> dict[str, str]:
    return {name: str(item.parts[0].value) for item, name in zip(items, names, strict=True)}


def grades(found: EvaluationSet) -> dict[str, dict[str, int]]:
    queries, documents = named(found.queries, found.query_names), named(found.corpus, found.document_names)
    return {
        queries[query]: {documents[name]: grade for name, grade in judged.items()}
        for query, judged in found.qrels.items()
    }


def test_training_rows(tmp_path: Path) -> None:
    found = as_evaluation(jsonl(tmp_path / "rows.jsonl", ROWS))
    assert found.name == "rows"
    assert values(found.queries) == [["q1"], ["q2"], ["shared"]]
    assert values(found.corpus) == [["shared"], ["n1"], ["p2"], ["p3"], ["n2"]]
    assert grades(found) == {
        "q1": {"shared": 1, "n1": 0, "p2": 1},
        "q2": {"p2": 1, "p3": 1, "shared": 0},
        "shared": {"p3": 1, "n2": 0},
    }
    assert [item.parts[0].value for item in found.corpus[1:3]] == ["n1", "p2"]


def test_the_names_of_training_rows_do_not_depend_on_their_order(tmp_path: Path) -> None:
    def names(rows: list[Any], file: str) -> dict[str, str]:
        found = as_evaluation(jsonl(tmp_path / file, rows))
        return named(found.corpus, found.document_names)

    assert names(ROWS, "a.jsonl") == names(ROWS[::-1], "b.jsonl")


def test_labelled_rows_measure_the_queries_that_have_an_answer(tmp_path: Path) -> None:
    rows = [("q1", "a", 0), ("q1", "b", 1), ("q2", "c", 0), ("q1", "d", 3), ("q1", "b", 2), ("q1", "d", 0)]
    path = jsonl(tmp_path / "t.jsonl", [{"query": q, "document": d, "label": k} for q, d, k in rows])
    found = EvaluationRows(Rows(path), name="labelled").load()
    assert found.name == "labelled"
    assert grades(found) == {"q1": {"a": 0, "b": 2, "d": 3}}
    assert values(found.corpus) == [["a"], ["b"], ["c"], ["d"]]


def test_a_label_that_is_no_grade_is_refused(tmp_path: Path) -> None:
    rows = [{"query": "q", "document": "d", "label": label} for label in (1, 0.5)]
    with pytest.raises(ValueError, match=r"t.jsonl, row 2, column 'query': label 0.5 is no whole number"):
        as_evaluation(jsonl(tmp_path / "t.jsonl", rows))


def test_open_images_of_training_rows_are_read_when_asked_for(tmp_path: Path) -> None:
    images = [Image.new("RGB", (3, 3), color) for color in ("red", "blue")]
    columns = {"query": ["red", "blue"], "positive": images}
    datasets.Dataset.from_dict(columns).cast_column("positive", datasets.Image()).save_to_disk(tmp_path / "saved")
    found = EvaluationRows(Rows(str(tmp_path / "saved"))).load()
    first = found.corpus[0].parts[0].value
    assert found.corpus[0].parts[0].value is first
    assert found.corpus[1].parts[0].value is not first
    assert found.corpus[0].parts[0].value is not first  # Nobody held it while another row was read.
    shown = [load_image(item.parts[0].value) for item in found.corpus]
    assert [image.tobytes() for image in shown] == [image.tobytes() for image in images]


def text(item: Item) -> str:
    return str(item.parts[0].value)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    corpus = [{"id": f"d{number}", "text": f"page {number}"} for number in range(12)]
    queries = [{"id": f"q{number}", "text": f"question {number}"} for number in range(3)]
    return Path(evaluation_folder(tmp_path / "pages", corpus, queries, "q0\td3\t2\nq1\td1\t1\nq2\td0\t1\n"))


#: Not in the order of scores, nor of ranks; q1's three first are equal in float32, and q2 is not there.
RUN = """q1 Q0 d1 1 1.00000001 x
q0 Q0 d3 1 0.5 x
q1\tQ0\td9\t2\t1.0\tx
q0 Q0 d4 2 7e-1 x
q1 Q0 d10 3 1.00000002 x

q1 Q0 d2 9 -3 x
q0 Q0 d0 5 -2 x
"""


def run(run_folder: Path, content: str = RUN) -> str:
    (run_folder / "found.trec").write_text(content)
    return str(run_folder / "found.trec")


def names(reranking: RerankingSet) -> list[list[str]]:
    return [[reranking.evaluation.document_names[column] for column in found] for found in reranking.candidates]


def test_a_run_is_ordered_by_float32_scores_and_then_by_names(run_folder: Path) -> None:
    found = RerankingRun(str(run_folder), run(run_folder)).load()
    assert found.name == "pages"
    assert found.evaluation.query_names == ["q0", "q1", "q2"]
    assert names(found) == [["d4", "d3", "d0"], ["d9", "d10", "d1", "d2"], []]


def test_the_depth_is_of_each_query_and_the_name_can_be_given(run_folder: Path) -> None:
    given = RerankingRun(EvaluationFolder(str(run_folder), name="other"), run(run_folder), depth=2)
    assert as_reranking(given, "test").name == "other"
    assert names(given.load()) == [["d4", "d3"], ["d9", "d10"], []]
    assert RerankingRun(str(run_folder), run(run_folder), name="top 2").load().evaluation.name == "top 2"
    with pytest.raises(ValueError, match="depth is 1 or more, got 0"):
        RerankingRun(str(run_folder), run(run_folder), depth=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q0 Q0 d1 1 0.5", "row 9: expected 'query Q0 document rank score tag', got 'q0 Q0 d1 1 0.5'"),
        ("q0 Q0 d 1 1 0.5 x", "row 9: expected 'query Q0"),
        ("q0 Q0 d1 1 high x", "row 9: score 'high' is not a finite number"),
        ("q0 Q0 d1 1 nan x", "row 9: score 'nan' is not a finite number"),
        ("q9 Q0 d1 1 0.5 x", "row 9: query 'q9' is none of the 3 judged queries of 'pages'"),
        ("q0 Q0 d99 1 0.5 x", "row 9: document 'd99' is not in the corpus of 'pages'"),
        ("q0 Q0 d3 4 0.1 x", "row 9: query 'q0' has document 'd3' twice"),
    ],
)
def test_bad_lines_of_runs_are_refused(line: str, message: str, run_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"found.trec, {message}"):
        RerankingRun(str(run_folder), run(run_folder, RUN + line + "\n")).load()


def test_missing_and_empty_runs_are_refused(run_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"found.trec: the file has no rows"):
        RerankingRun(str(run_folder), run(run_folder, "\n")).load()
    with pytest.raises(ValueError, match=r"gone.trec: no such file; it holds lines"):
        RerankingRun(str(run_folder), "gone.trec").load()


def test_an_evaluation_set_without_a_run_is_refused(run_folder: Path) -> None:
    for given, what in ((str(run_folder), str(run_folder)), (EvaluationFolder(str(run_folder)), "EvaluationFolder")):
        with pytest.raises(ValueError, match=f"{what}: a cross-encoder reads .*vlmembed.data.RerankingRun"):
            as_reranking(given, "test")


def test_candidates_of_nobody_are_refused() -> None:
    class Nothing(RerankingSource):
        def load(self) -> RerankingSet:
            return replace(reranking_set(), candidates=[[] for _ in reranking_set().candidates])

    with pytest.raises(ValueError, match="no query has a candidate"):
        PairCollator(None, LabelSpec()).load(Nothing(), "test")


class Given(EvaluationSource):
    def __init__(self, evaluation: EvaluationSet) -> None:
        self.evaluation = evaluation

    def load(self) -> EvaluationSet:
        return self.evaluation


def test_what_is_written_is_read_back_in_the_same_order(tmp_path: Path) -> None:
    evaluation = reranking_set().evaluation
    reranking = RerankingSet(replace(evaluation, name="digits"), reranking_set().candidates)
    scores = candidate_scores(reranking)
    # Neighbours in float32, which six decimals would make one.
    scores[0][:2] = [1e-7, float(np.nextafter(np.float32(1e-7), np.float32(1)))]
    measured = reranked(reranking, scores)
    write_run(reranking.evaluation, *measured.top_k(measured.depth), tmp_path / "predictions")
    again = RerankingRun(Given(evaluation), str(tmp_path / "predictions" / "digits.trec")).load()
    expected = [[column for column in row if column >= 0] for row in measured.top_k(1000)[1].tolist()]
    assert again.candidates == expected
    first = (tmp_path / "predictions" / "digits.trec").read_text().splitlines()[0].split()
    assert first[:2] + first[3:4] + first[5:] == ["q0", "Q0", "1", "vlmembed"]
    assert np.float32(first[4]) == measured.top_k(1000)[0][0, 0].item()


@pytest.mark.parametrize("names", [["#q", "q,1", '"q"', "nan"], ["ü", "-1", "Q0", "\u200bq"]])
def test_odd_names_are_read_back(names: list[str], tmp_path: Path) -> None:
    rows = [{"id": name, "text": "x"} for name in names]
    evaluation = as_evaluation(evaluation_folder(tmp_path, rows, rows, [(name, name, 1) for name in names]))
    assert evaluation.qrels == {name: {name: 1} for name in names}
    columns = torch.arange(4).expand(4, 4)
    write_run(evaluation, torch.arange(4.0).flip(0).expand(4, 4), columns, tmp_path)
    again = RerankingRun(str(tmp_path), str(tmp_path / f"{tmp_path.name}.trec")).load()
    assert torch.equal(torch.tensor(again.candidates), columns)


@pytest.mark.parametrize("name", ["page 0 of Ünï.pdf", "page\u00a00", "page\u20280", "page\x1c0"])
@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl"])
def test_names_that_a_run_cannot_hold_are_measured_but_not_predicted(
    name: str, file: str, folder: Path, checkpoint: Path
) -> None:
    rows = CORPUS if file == "corpus.jsonl" else QUERIES
    jsonl(folder / file, [{"id": name, "text": "x"}, *rows[1:]])
    qrels = QRELS.replace("d2", name) if file == "corpus.jsonl" else QRELS.replace("\n2", f"\n{name}")
    (folder / "qrels.tsv").write_text(qrels)
    model, data = module(checkpoint), RetrievalDataModule(test=str(folder), num_workers=0)
    trainer().test(model, datamodule=data, verbose=False)
    model.measure = lambda *_: pytest.fail("embedded")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"id .* has white space in it, which a TREC run cannot hold"):
        trainer().predict(model, datamodule=data)


LABELLED = [
    {"query": "q1", "document": ["a", "b", "c"], "label": [0, 2, 1]},
    {"query": "q2", "document": ["b", "d"], "label": [0, 0]},
    {"query": "q1", "document": ["d", "c"], "label": [0, 3]},
    {"query": "q3", "document": ["e", "a"], "label": [0, 1]},
]


def test_the_candidates_of_training_rows_are_the_documents_of_a_querys_rows(tmp_path: Path) -> None:
    found = as_reranking(jsonl(tmp_path / "rows.jsonl", LABELLED), "test")
    assert (found.name, RerankingRows(Rows(found.name), "other").name) == ("rows", "other")
    assert [text(query) for query in found.evaluation.queries] == ["q1", "q3"]
    shown = [{text(found.evaluation.corpus[column]) for column in columns} for columns in found.candidates]
    assert shown == [{"a", "b", "c", "d"}, {"e", "a"}]
    grades = {
        text(found.evaluation.corpus[column]): found.evaluation.qrels[name].get(found.evaluation.document_names[column])
        for name, columns in zip(found.evaluation.query_names, found.candidates, strict=True)
        for column in columns
        if name == found.evaluation.query_names[0]
    }
    assert grades == {"a": 0, "b": 2, "c": 3, "d": 0}


def test_the_order_of_training_rows_does_not_give_answers_away(tmp_path: Path) -> None:
    rows = [
        {"query": f"q{row}", "positive": f"p{row}", "negatives": [f"n{row} {number}" for number in range(3)]}
        for row in range(400)
    ]
    found = RerankingRows(Rows(jsonl(tmp_path / "rows.jsonl", rows))).load()
    first = [found.evaluation.corpus[columns[0]] for columns in found.candidates]
    # The binomial's standard deviation is 8.7: this is chance to 5 of them, and 400 if positives came first.
    assert abs(sum(text(item).startswith("p") for item in first) - 100) < 44


def test_a_thousand_queries_with_a_hundred_candidates_load_at_once(run_folder: Path) -> None:
    corpus = [{"id": f"d{number}", "text": "d"} for number in range(100)]
    queries = [{"id": f"q{number}", "text": "q"} for number in range(1000)]
    evaluation_folder(run_folder, corpus, queries, [(f"q{number}", "d1", 1) for number in range(1000)])
    numbers = np.random.default_rng(0).permutation(100_000)
    lines = (f"q{number // 100} Q0 d{number % 100} 1 {number % 17} x\n" for number in numbers)
    path = run(run_folder, "".join(lines))
    start = time.perf_counter()
    found = RerankingRun(str(run_folder), path).load()
    # A second when alone; the limit leaves room for busy machines, and none for anything quadratic.
    assert time.perf_counter() - start < 10
    assert {len(columns) for columns in found.candidates} == {100}


def contents(example: Example) -> tuple[str, list[str], list[str], Any, Any]:
    positives, negatives = ([text(item) for item in items] for items in (example.positives, example.negatives))
    return text(example.query), positives, negatives, example.labels, example.scores


SINGLE = [{"query": "q", "document": name, "label": label} for name, label in (("a", 0), ("b", 1), ("a", 1))]
MINED = [{"query": "q", "positive": name, "negative": "n", "scores": [k, -1]} for name, k in (("a", 3), ("b", 2))]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            LABELLED,
            [
                ("q1", ["b", "c"], ["a", "d"], (2.0, 3.0, 0.0, 0.0), None),
                ("q2", [], ["b", "d"], (0.0, 0.0), None),
                ("q3", ["a"], ["e"], (1.0, 0.0), None),
            ],
        ),
        (SINGLE, [("q", ["a", "b"], [], (1.0, 1.0), None)]),
        (MINED, [("q", ["a", "b"], ["n"], (1.0, 1.0, 0.0), (3.0, 2.0, -1.0))]),
    ],
)
def test_groups_join_the_rows_of_a_query(rows: list[Any], expected: list[Any], tmp_path: Path) -> None:
    source = Rows(jsonl(tmp_path / "rows.jsonl", rows))
    groups = pickle.loads(pickle.dumps(GroupByQuery(source)))
    assert (groups.name, [contents(groups[index]) for index in range(len(groups))]) == ("rows", expected)
    assert groups.query_ids(range(len(groups))) == [groups[index].query.id for index in range(len(groups))]
    assert contents(Mixture([source, groups])[len(rows)]) == expected[0]


def test_scores_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    rows = [{"query": "q", "positive": "a", "scores": [score]} for score in (1.5, 2)]
    with pytest.raises(ValueError, match=r"twice.jsonl, row 2, column 'positive': score 2.0, and 1.5 in an earlier"):
        GroupByQuery(Rows(jsonl(tmp_path / "twice.jsonl", rows)))[0]
    scored = Rows(jsonl(tmp_path / "scored.jsonl", rows[:1]))
    plain = Rows(jsonl(tmp_path / "plain.jsonl", [{"query": "q", "positive": "b"}]))
    with pytest.raises(
        ValueError, match=r"scored.jsonl, row 1, column 'query': some rows .* have scores and some have"
    ):
        GroupByQuery(Mixture([scored, plain]))[0]


def test_lists_read_only_queries_until_a_list_is_asked_for(tmp_path: Path) -> None:
    class Counted(Rows):
        count = 0

        def __getitems__(self, indices: Sequence[int]) -> list[Example]:
            self.count += len(indices)
            return super().__getitems__(indices)

    rows = Counted(jsonl(tmp_path / "rows.jsonl", LABELLED))
    lists = GroupByQuery(rows)
    assert (len(lists), len({*lists.query_ids(range(3))}) < 3, rows.count) == (3, False, 0)
    assert (contents(lists[0])[0], rows.count) == ("q1", 2)
