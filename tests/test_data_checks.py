"""What goes silently wrong with data: said with the fix, and not said of what is right."""

from __future__ import annotations

import re
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from building import evaluation_folder, jsonl, picture
from test_collate import Letters
from test_cookbook import REPLICAS
from test_cookbook import table as page_table

from vlmembed.data import (
    EvaluationFolder,
    EvaluationRows,
    ItemCollator,
    Lookup,
    Mixture,
    RetrievalDataModule,
    Rows,
    Source,
)
from vlmembed.data.checks import DataWarning, in_both, in_evaluation, in_rows
from vlmembed.data.digits import HandwrittenNumbers, HandwrittenNumbersEvaluation
from vlmembed.types import EvaluationSet, Example, Item, Part

COUNT = 12
CAPTIONS = [f"a caption of the thing that was seen on day {number}" for number in range(COUNT)]


def table(folder: Path, **columns: Sequence[Any]) -> str:
    """A file of columns; the words of a caption where nothing else is said."""
    columns = {"query": CAPTIONS, **columns}
    return jsonl(
        folder / "train.jsonl", [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    )


def problems(*sources: Source) -> list[str]:
    return [*in_rows(Mixture([*sources]))]


def fixed(rows: Rows, problem: str) -> Rows:
    """The rows as the fix has them."""
    written = yaml.safe_load(f"{{{problem.split(' write ')[1].removesuffix('.').removesuffix(' instead of columns')}}}")
    tables = {name: Lookup(**lookup) for name, lookup in written.pop("tables", {}).items()}
    return Rows(rows.path, **written, tables=tables)


def kinds(source: Source) -> set[str]:
    examples = source.__getitems__(range(len(source)))
    return {part.kind for example in examples for item in example.documents for part in item.parts}


def numbered(form: str) -> list[str]:
    return [form.format(number) for number in range(COUNT)]


@pytest.mark.parametrize(
    ("place", "form", "options", "kind"),
    [
        ("videos", "video{}.mp4", {"columns": {"file": "positive"}}, "video"),  # As MSR-VTT has them.
        ("", "clip {}.MKV", {"columns": {"file": "positive"}}, "video"),
        ("", "scan {} of the page.png", {"columns": {"file": "positive"}}, "image"),
        ("", "größe{}.jpg", {"cells": {"query": "query", "positive": {"text": "file"}}}, "image"),
        ("", "deep/er/{}.jpeg", {"cells": {"query": "query", "positive": "file"}}, "image"),
        ("images", "{}.webp", {"cells": {"query": {"constant": "find"}, "positive": "file"}}, "image"),
    ],
)
def test_names_of_files_that_are_there(tmp_path: Path, place: str, form: str, options: Any, kind: str) -> None:
    for name in numbered(form):
        (tmp_path / place / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / place / name).write_bytes(b"-")
    columns = {"query": CAPTIONS, "file": numbered(form)}
    rows = Rows(table(tmp_path, **columns), **options)
    (problem,) = problems(rows)
    assert "train.jsonl, column 'positive': 12 of the 12 values that were looked at name files" in problem
    assert kinds(rows) == {"text"}
    assert kinds(fixed(rows, problem)) == {kind}
    assert problems(fixed(rows, problem)) == []


def test_names_in_a_list_are_read_one_by_one(tmp_path: Path) -> None:
    for name in numbered("{}.png"):
        (tmp_path / name).write_bytes(b"-")
    negatives = [[name, "0.png"] for name in numbered("{}.png")]
    rows = Rows(table(tmp_path, positive=CAPTIONS, negatives=negatives))
    (problem,) = problems(rows)
    mended = fixed(rows, problem)
    assert [len(example.negatives) for example in mended.__getitems__(range(COUNT))] == [2] * COUNT
    assert kinds(mended) == {"text", "image"}


@pytest.mark.parametrize("form", ["page_{}.png", "https://example.org/{}.jpg?size=large", "/data/{}.wav", "C:\\{}.pdf"])
def test_names_of_files_that_are_elsewhere(tmp_path: Path, form: str) -> None:
    (problem,) = problems(Rows(table(tmp_path, positive=numbered(form))))
    assert "name files" in problem


def test_ids_of_other_rows(tmp_path: Path) -> None:
    """As vdr-multilingual has them."""
    for number in range(COUNT):
        picture(32, 32, number).save(tmp_path / f"{number}.png")
    ids, images = numbered("vdr-{}"), [{"image": name} for name in numbered("{}.png")]
    negatives = [[ids[number - 1], ids[number - 2]] for number in range(COUNT)]
    path = table(tmp_path, id=ids, image=images, negatives=negatives, language=["en"] * COUNT)
    rows = Rows(path, columns={"id": None, "language": None, "image": "positive"})
    (problem,) = problems(rows)
    assert "are ids of the column 'id'" in problem
    mended = fixed(rows, problem)
    assert kinds(mended) == {"image"}
    assert [part.value for item in mended[5].negatives for part in item.parts] == [
        tmp_path / "4.png",
        tmp_path / "3.png",
    ]


def test_names_of_several_columns_are_read_from_each(tmp_path: Path) -> None:
    path = table(tmp_path, one=numbered("{}.png"), two=numbered("{}.jpg"))
    rows = Rows(path, cells={"query": "query", "positive": ["one", "two"]})
    (problem,) = problems(rows)
    assert problem.endswith(" write cells: {query: query, positive: [{image: one}, {image: two}]}.")


@pytest.mark.parametrize("key", ["id", "uid", "image_id", "key", "docId"])
def test_ids_of_a_column_by_any_name(tmp_path: Path, key: str) -> None:
    ids = numbered("x{}")
    rows = Rows(
        table(tmp_path, **{key: ids}, others=[[ids[number - 1]] for number in range(COUNT)]),
        cells={"query": "query", "positive": "query", "negatives": "others"},
    )
    (problem,) = problems(rows)
    assert f"are ids of the column {key!r}" in problem
    assert [example.negatives[0].parts for example in fixed(rows, problem).__getitems__([1, 0])] == [
        Rows(rows.path, cells={"query": "query", "positive": "query"})[number].positives[0].parts
        for number in (0, COUNT - 1)
    ]


def ids_of_passages(form: str) -> list[Any]:
    return [[{"docid": name, "text": "words"}] for name in numbered(form)]


@pytest.mark.parametrize(
    ("column", "values", "expression"),
    [
        ("positive_document_ids", [[name] for name in numbered("{}")], "positive_document_ids"),  # As Tevatron.
        ("positive_passages", ids_of_passages("{}"), "positive_passages[].docid"),
        ("pos_cand_list", [[name] for name in numbered("9:{}")], "pos_cand_list"),  # As M-BEIR.
        ("imageId", numbered("{}"), "imageId"),
        ("target_hard", numbered("dev-{}-0-img1"), "target_hard"),  # As CIRR.
        ("file", numbered("COCO_val2014_00000039{}"), "file"),
        ("key", [str(uuid.UUID(int=number)) for number in range(COUNT)], "key"),
        ("key", [f"{number:032x}" for number in range(COUNT)], "key"),
    ],
)
def test_ids_of_another_table(tmp_path: Path, column: str, values: list[Any], expression: str) -> None:
    path = table(tmp_path, **{column: values})
    forms = [Rows(path, cells={"query": "query", "positive": expression})]
    if column == expression:
        forms.append(Rows(path, columns={column: "positive"}))
    for rows in forms:
        (problem,) = problems(rows)
        assert "read as texts" in problem
        assert f"positive: {{ids: {expression.replace('[]', '[]')}" in problem.replace("'", "")
        assert "tables: {documents: {path: FILE, key: ID COLUMN" in problem


@pytest.mark.parametrize(
    ("mark", "kind"),
    [("<|image_1|>", "image"), ("<image>", "image"), ("<IMG>", "image"), ("<video>", "video"), ("<image 1>", "image")],
)
@pytest.mark.parametrize("has_part", [True, False])
def test_marks_left_in_texts(tmp_path: Path, mark: str, kind: str, has_part: bool) -> None:
    for number in range(COUNT):
        (tmp_path / f"{number}.bin").write_bytes(b"-")
    path = table(tmp_path, query=[f"{mark}\nWhat is it?"] * COUNT, file=numbered("{}.bin"), positive=CAPTIONS)
    query = {kind: "file", "text": "query"} if has_part else "query"
    rows = Rows(path, cells={"query": query, "positive": "positive"})
    (problem,) = problems(rows)
    assert f"have a mark such as {mark!r}" in problem
    mended = fixed(rows, problem if has_part else problem.replace("COLUMN", "file"))
    assert [part.kind for part in mended[0].query.parts] == [kind, "text"]
    assert mark not in str(mended[0].query.parts[1].value)
    assert problems(mended) == []


@pytest.mark.parametrize(
    "values",
    [
        numbered("see figure{}.png"),
        ["cat", "dog", "cow"] * 4,
        [str(number) for number in range(COUNT)],
        [str(1984 + number) for number in range(COUNT)],
        numbered("1,{}00"),
        numbered("{}-Mar-2020"),
        numbered("2020-03-{}"),
        numbered("INV-2023-00{}"),
        numbered("get_user_by_id_v{}"),
        numbered("https://example.org/pages/{}"),
        numbered("DE8937040044053201300{}"),
        numbered("someone{}@example.org"),
        numbered("The <video> element of HTML plays {}.")[:1] + CAPTIONS[1:],
        [CAPTIONS],
        ["page.png", *CAPTIONS[1:]],
        ["state-of-the-art", "well-to-do", "mother-in-law"] * 4,
        ["日本語", "größe", "e"] * 4,
        ["node.js", "e.g.", "3.14", "U.S."] * 3,
    ],
    ids=repr,
)
def test_texts_are_texts(tmp_path: Path, values: list[Any]) -> None:
    for name in ("cat.jpg", "dog.jpg", "0.png", "1.png", "7"):
        (tmp_path / name).write_bytes(b"-")
    values = values * (COUNT // len(values))
    path = table(tmp_path, positive=values, id=[*range(COUNT)], questionId=[1980 + number for number in range(COUNT)])
    assert problems(Rows(path, columns={"id": None, "questionId": None})) == []


def test_numbers_are_told_only_where_they_are_long_and_the_ids_of_a_column(tmp_path: Path) -> None:
    ids = [7_067_032 + 13 * number for number in range(COUNT)]
    columns = {"id": None}
    others = [[str(ids[number - 1])] for number in range(COUNT)]
    (problem,) = problems(Rows(table(tmp_path, id=ids, positive=CAPTIONS, negatives=others), columns=columns))
    assert "ids of the column 'id'" in problem
    prices = [[str(7_000_000 + 10 * number)] for number in range(COUNT)]
    assert problems(Rows(table(tmp_path, id=ids, positive=CAPTIONS, negatives=prices), columns=columns)) == []


def test_rows_that_cannot_be_read_are_left_to_training(tmp_path: Path) -> None:
    rows = [{"query": text, "positive": {"image": "gone.png"}} for text in CAPTIONS]
    assert problems(Rows(jsonl(tmp_path / "train.jsonl", rows))) == []


@pytest.mark.parametrize("name", REPLICAS)
def test_nothing_is_said_of_what_the_cookbook_writes(name: str, here: Path) -> None:
    REPLICAS[name]()
    written = page_table("training sets")[name]
    tables = {key: Lookup(**lookup) for key, lookup in written.pop("tables", {}).items()}
    rows = Rows(**written, tables=tables)
    try:
        len(rows)
    except ValueError as error:
        pytest.skip(f"tables do not open it yet: {error}")
    assert problems(rows) == []


@pytest.mark.parametrize(
    ("name", "message", "options"),
    [
        ("MSR-VTT", "name files", {"cells": {"query": "caption", "positive": "video"}, "each": "caption"}),
        (
            "M-BEIR",
            "ids by the name of their column",
            {"cells": {"query": {"text": "query_txt", "image": "query_img_path"}, "positive": "pos_cand_list"}},
        ),
    ],
)
def test_what_one_writes_at_first_is_told(name: str, message: str, options: Any, here: Path) -> None:
    REPLICAS[name]()
    path = page_table("training sets")[name]["path"]
    assert any(message in problem for problem in problems(Rows(path, **options)))


class Slow(Source):
    """Of a user's own, whose rows only workers should read."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Example:
        raise AssertionError

    def read_queries(self, indices: Sequence[int]) -> list[Item]:
        return [Item("query", (Part("text", CAPTIONS[index]),)) for index in indices]


def test_of_a_source_of_ones_own_only_queries_are_read(tmp_path: Path) -> None:
    assert problems(Slow()) == []
    texts = [*CAPTIONS[:1], *OTHERS[1:]]
    (problem,) = in_both(Mixture([Slow()]), EvaluationRows(rows(tmp_path / "val.jsonl", texts)).load())
    assert "(such as 'a caption of the thing that was seen on day 0': row 1 of slow)" in problem


# Evaluation sets


def folder(path: Path, documents: Sequence[dict[str, Any]], queries: Sequence[str] = CAPTIONS) -> EvaluationSet:
    corpus = [{"id": f"d{number}", **document} for number, document in enumerate(documents)]
    asked = [{"id": f"q{number}", "text": text} for number, text in enumerate(queries)]
    judged = [(f"q{number}", f"d{number}", 1) for number in range(len(queries))]
    return EvaluationFolder(evaluation_folder(path, corpus, asked, judged)).load()


def test_duplicate_documents_are_counted_by_content(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.mkdir()
    for number in range(COUNT):
        picture(32, 32, number).save(path / f"{number}.bmp")  # All of one size.
    (path / "copy.bmp").write_bytes((path / "3.bmp").read_bytes())
    (path / "large.tiff").write_bytes(bytes(3_000_000))
    (path / "other.tiff").write_bytes(bytes(2_900_000) + b"x" * 100_000)
    documents: list[dict[str, Any]] = [{"image": name} for name in numbered("{}.bmp")]
    assert [*in_evaluation(folder(path, [*documents, {"image": "large.tiff"}, {"image": "other.tiff"}]))] == []
    again = [{"image": "copy.bmp"}, {"image": "./3.bmp"}, {"text": "a  text"}, {"text": "a text\n"}, {"text": "A text"}]
    (problem,) = in_evaluation(folder(path, [*documents, *again]))
    assert "pages: 3 of the 17 documents" in problem
    assert "(id 'd12'): that of " in problem
    # Rows are measured on with equal documents once; of two files, it is not known that they are equal.
    pairs = [
        {"query": f"the page {name}", "positive": {"image": name}}
        for name in (*numbered("{}.bmp"), "3.bmp", "copy.bmp")
    ]
    (problem,) = in_evaluation(EvaluationRows(Rows(jsonl(path / "rows.jsonl", pairs))).load())
    assert "rows: 1 of the 13 documents" in problem


def test_a_corpus_of_file_names(tmp_path: Path) -> None:
    problem, *_ = in_evaluation(folder(tmp_path / "clips", [{"text": name} for name in numbered("video{}.mp4")]))
    assert "clips, corpus: 12 of the 12" in problem
    assert "under the key 'video' instead of 'text'" in problem


def rows(path: Path, texts: Sequence[str], answer: str = "the answer to {}") -> Rows:
    return Rows(jsonl(path, [{"query": text, "positive": answer.format(text)} for text in texts]))


OTHERS = [text.replace("caption", "question") for text in CAPTIONS]


@pytest.mark.parametrize(
    ("measured", "answer", "message"),
    [
        (CAPTIONS, "the answer to {}", "measured on rows that are also trained on (12 of its 12 queries"),
        ([f" {text}\n" for text in CAPTIONS], "the answer to {}", "trained on (12 of its 12"),
        (CAPTIONS[:8] + OTHERS[:4], "the answer to {}", "trained on (8 of its 12"),
        (CAPTIONS[:1] + OTHERS[1:], "the answer to {}", "1 of the 12 queries are also training queries"),
        (CAPTIONS, "another answer to {}", "12 of the 12 queries are also training queries"),
    ],
)
def test_queries_that_are_trained_on(tmp_path: Path, measured: list[str], answer: str, message: str) -> None:
    training = [rows(tmp_path / "other.jsonl", ["something else"]), rows(tmp_path / "train.jsonl", CAPTIONS)]
    evaluation = EvaluationRows(rows(tmp_path / "val.jsonl", measured, answer)).load()
    (problem,) = in_both(Mixture(training), evaluation)
    assert message in problem
    assert [*in_both(Mixture(training[:1]), evaluation)] == []


def test_images_are_compared_by_content(tmp_path: Path) -> None:
    for place in ("train", "val"):
        (tmp_path / place).mkdir()
        for number in range(COUNT):
            picture(32, 32, number + 6 * (place == "val")).save(tmp_path / place / f"{number}.png")
    train, val = (
        Rows(table(tmp_path / place, query=[{"image": f"{n}.png"} for n in range(COUNT)], positive=CAPTIONS))
        for place in ("train", "val")
    )
    (problem,) = in_both(Mixture([train]), EvaluationRows(val, name="rows").load())
    assert "rows: 6 of the 12 queries are also training queries" in problem


def test_a_large_set_is_compared_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmembed.data.checks.COMPARED", 6)
    training = rows(tmp_path / "train.jsonl", CAPTIONS)
    (problem,) = in_both(Mixture([training]), EvaluationRows(rows(tmp_path / "val.jsonl", CAPTIONS)).load())
    assert "trained on (at least " in problem


def test_nothing_is_said_of_the_quick_start() -> None:
    mixture = Mixture([HandwrittenNumbers(2000)])
    assert [*in_rows(mixture)] == []
    for split in ("val", "test"):
        evaluation = HandwrittenNumbersEvaluation(split).load()
        assert [*in_evaluation(evaluation), *in_both(mixture, evaluation)] == []


# From the data module


def said(*stages: str, **arguments: Any) -> list[str]:
    data = RetrievalDataModule(**arguments)
    data.collator = ItemCollator(Letters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for stage in stages:
            data.setup(stage)
    return [str(warning.message) for warning in caught if warning.category is DataWarning]


@pytest.mark.parametrize(
    "stages", [("validate", "test", "fit", "validate", "test"), ("fit", "test"), ("validate", "fit")]
)
def test_everything_is_said_once(tmp_path: Path, stages: tuple[str, ...]) -> None:
    path = jsonl(tmp_path / "train.jsonl", [{"query": text, "positive": f"{k}.png"} for k, text in enumerate(CAPTIONS)])
    folder(tmp_path / "val", [{"text": "the same"}] * COUNT, CAPTIONS)
    folder(tmp_path / "test", [{"text": text} for text in CAPTIONS], CAPTIONS)
    messages = said(*stages, train=path, val=str(tmp_path / "val"), test=str(tmp_path / "test"))
    expected = ["name files", "val: 11 of the 12 documents", "val: 12 of the 12 queries are also"]
    expected += ["test: 12 of the 12 queries are also"] * ("test" in stages)
    assert [sum(part in message for message in messages) for part in expected] == [1] * len(expected)
    assert len(messages) == len(expected)


def test_other_processes_are_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmembed.distributed.rank", lambda: 1)
    assert said("fit", train=table(tmp_path, positive=numbered("{}.png"))) == []


def test_the_fix_is_one_line_of_yaml(tmp_path: Path) -> None:
    (problem,) = problems(Rows(table(tmp_path, positive=numbered("page: {}'s.png".replace(" ", "")))))
    assert "\n" not in problem
    assert re.search(r" write cells: \{.*\}\.$", problem)
