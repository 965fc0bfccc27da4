from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmembed.data import EvaluationFolder, EvaluationRows, Rows
from vlmembed.data.evaluation import as_evaluation
from vlmembed.media import load_image
from vlmembed.types import EvaluationSet


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


CORPUS = [
    {"_id": "d2", "text": "two"},
    {"_id": "d1", "image": "a.png", "text": "one"},
    {"_id": "d3", "title": "Three", "text": "three", "metadata": {"url": "x"}},
]
QUERIES = [{"id": 2, "text": "second"}, {"id": "q1", "text": "first"}, {"id": "idle", "text": "not judged"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n2\td3\t1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pages"
    place.mkdir()
    Image.new("RGB", (4, 4)).save(place / "a.png")
    write(place / "corpus.jsonl", CORPUS)
    write(place / "queries.jsonl", QUERIES)
    (place / "qrels.tsv").write_text(QRELS)
    return place


def values(items: Any) -> list[list[Any]]:
    return [[part.value for part in item.parts] for item in items]


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
    ],
)
def test_bad_judgements_are_refused(line: str, message: str, folder: Path) -> None:
    (folder / "qrels.tsv").write_text(QRELS + line + "\n")
    with pytest.raises(ValueError, match=message):
        as_evaluation(str(folder))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "d1", "text": "again"}, "corpus.jsonl, row 4: id 'd1' is given twice; first at .*row 2"),
        ({"text": "no id"}, "corpus.jsonl, row 4: expected one 'id'"),
        ({"id": "d4", "_id": "d5", "text": "x"}, "corpus.jsonl, row 4: expected one 'id'"),
        ({"id": ["d4"], "text": "x"}, "corpus.jsonl, row 4: expected one 'id'"),
        ({"id": "d4", "text": ""}, "corpus.jsonl, row 4 .id 'd4'.: the text is empty"),
        ({"id": "d4"}, "corpus.jsonl, row 4 .id 'd4'.: the cell is empty"),
        ({"id": "d4", "body": "x"}, "corpus.jsonl, row 4 .id 'd4'.: unknown key 'body'"),
        ({"id": "d4", "image": "gone.png"}, "corpus.jsonl, row 4 .id 'd4'.: the image file .*gone.png does not exist"),
    ],
)
def test_bad_rows_are_refused(row: dict[str, Any], message: str, folder: Path) -> None:
    write(folder / "corpus.jsonl", [*CORPUS, row])
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


def test_no_warning_without_reason(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_evaluation(str(folder))


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
    found = as_evaluation(write(tmp_path / "rows.jsonl", ROWS))
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
        found = as_evaluation(write(tmp_path / file, rows))
        return named(found.corpus, found.document_names)

    assert names(ROWS, "a.jsonl") == names(ROWS[::-1], "b.jsonl")


def test_labelled_rows_measure_the_queries_that_have_an_answer(tmp_path: Path) -> None:
    rows = [("q1", "a", 0), ("q1", "b", 1), ("q2", "c", 0), ("q1", "d", 3), ("q1", "b", 2), ("q1", "d", 0)]
    path = write(tmp_path / "t.jsonl", [{"query": q, "document": d, "label": k} for q, d, k in rows])
    found = EvaluationRows(Rows(path), name="labelled").load()
    assert found.name == "labelled"
    assert grades(found) == {"q1": {"a": 0, "b": 2, "d": 3}}
    assert values(found.corpus) == [["a"], ["b"], ["c"], ["d"]]


def test_a_label_that_is_no_grade_is_refused(tmp_path: Path) -> None:
    rows = [{"query": "q", "document": "d", "label": label} for label in (1, 0.5)]
    with pytest.raises(ValueError, match=r"t.jsonl, row 2, column 'query': label 0.5 is no whole number"):
        as_evaluation(write(tmp_path / "t.jsonl", rows))


def test_open_images_of_training_rows_are_read_when_asked_for(tmp_path: Path) -> None:
    import datasets

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
