from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from building import jsonl
from jsonargparse import ArgumentParser
from PIL import Image

from vlmembed.data import GroupByQuery, Mixture, RetrievalDataModule, Rows
from vlmembed.data.cells import Folder, to_items
from vlmembed.data.evaluation import as_evaluation, as_reranking
from vlmembed.media import load_image
from vlmembed.types import Example, Item, Part

CONFIGS = Path(__file__).parent.parent / "configs"


def texts(items: tuple[Item, ...]) -> list[Any]:
    return [part.value for item in items for part in item.parts]


def content(example: Example) -> tuple[list[Any], list[Any], list[Any]]:
    return texts((example.query,)), texts(example.positives), texts(example.negatives)


ROWS = [
    {"query": "q1", "positive": "p1", "negative_1": "n1", "negative_2": "m1"},
    {"query": "q2", "positive": "p2", "negative_1": "n2", "negative_2": "m2"},
    {"query": "qué", "positive": "1984", "negative_1": "None", "negative_2": "NA"},
]


def test_a_column_may_mix_strings_mappings_and_lists(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    parts = [{"type": "text", "text": "x"}, {"type": "image", "image": "a.png"}]
    cells = ["p", {"image": "a.png"}, parts, ["p", {"text": "r"}], [parts, "s"]]
    rows = Rows(jsonl(tmp_path / "t.jsonl", [{"query": "q", "positive": cell} for cell in cells]))
    page = tmp_path / "a.png"
    found = [[texts((item,)) for item in rows[k].positives] for k in range(len(cells))]
    assert found == [[["p"]], [[page]], [["x", page]], [["p"], ["r"]], [["x", page], ["s"]]]


def test_negatives_are_ordered_by_number_and_may_be_a_list(tmp_path: Path) -> None:
    numbered = {f"negative_{k}": f"n{k}" for k in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1)}
    row = {"query": "q", "positive": "p", **numbered, "negative": "n0"}
    assert texts(Rows(jsonl(tmp_path / "a.jsonl", [row]))[0].negatives) == [f"n{k}" for k in range(11)]
    row = {"query": "q", "positive": "p", "negative_1": "n1", "negative_0": "n0", "negative": "n"}
    assert texts(Rows(jsonl(tmp_path / "c.jsonl", [row]))[0].negatives) == ["n", "n0", "n1"]
    rows = [{"query": "q", "positive": "p", "negatives": negatives} for negatives in (["x", "y"], [])]
    listed = Rows(jsonl(tmp_path / "b.jsonl", rows))
    assert [texts(listed[k].negatives) for k in (0, 1)] == [["x", "y"], []]


def test_labelled_documents(tmp_path: Path) -> None:
    rows = [{"query": "q", "document": "d", "label": label} for label in (1, 0, 1.0, True, 3, 0.25)]
    labelled = Rows(jsonl(tmp_path / "t.jsonl", rows))
    examples = [labelled[k] for k in range(len(rows))]
    right = ["d"], []
    assert [content(example)[1:] for example in examples] == [right, ([], ["d"]), right, right, right, right]
    assert [example.labels for example in examples] == [(1.0,), (0.0,), (1.0,), (1.0,), (3.0,), (0.25,)]
    (tmp_path / "t.csv").write_text("query,document,label\nq,d,0\nq,e,1\nq,f,0.5\n")
    assert [Rows(str(tmp_path / "t.csv"))[k].labels for k in range(3)] == [(0.0,), (1.0,), (0.5,)]


def test_a_list_of_documents_with_labels(tmp_path: Path) -> None:
    row = {"query": "q", "document": ["a", {"text": "b"}, "c", "d"], "label": [0, 2, 0, 1], "scores": [-1, 4.5, 0.5, 3]}
    found = Rows(jsonl(tmp_path / "t.jsonl", [row]))[0]
    assert content(found) == (["q"], ["b", "d"], ["a", "c"])
    assert found.labels == (2.0, 1.0, 0.0, 0.0)
    assert found.scores == (4.5, 3.0, -1.0, 0.5)


def test_columns_are_renamed_and_dropped(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{"question": "q", "positive": "p", "url": "u"}])
    rows = Rows(path, columns={"question": "query", "url": None})
    assert content(rows[0]) == (["q"], ["p"], [])
    assert rows.query_ids([0]) == [rows[0].query.id]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q"}, "column 'positive' is missing .there are query"),
        ({"positive": "p"}, "column 'query' is missing"),
        ({"query": "q", "document": "d"}, "column 'label' is missing"),
        ({"query": "q", "document": "d", "label": 1, "negative": "n"}, "column 'negative' is not used"),
        ({"query": "q", "positive": "p", "url": "u"}, r"'url' is unknown, nothing reads it.*columns: \{url: null\}"),
        ({"query": "q", "positive": "p", "negativ": "n"}, "'negativ' is unknown, negatives given but unused"),
        ({"query": "q", "positive": "p", "hard_neg": "n"}, "'hard_neg' is unknown, negatives given but unused"),
        ({"query": "q", "positive": "p", "negative_0": "n", "negative_2": "n"}, "'negative_1' is missing"),
        ({"query": "q", "positive": "p", "negative_1": "n", "negative_3": "m"}, "'negative_2' is missing"),
        ({"query": "q", "positive": "p", "negatives": ["n"], "negative_1": "m"}, "keep one"),
    ],
)
def test_bad_columns_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        len(Rows(jsonl(tmp_path / "t.jsonl", [row])))
    assert "t.jsonl" in str(error.value)


GOOD = {"query": "q", "positive": "p"}
SCORED = {**GOOD, "scores": [1.0]}


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (GOOD, {"query": "", "positive": "p"}, "row 2, column 'query': the cell is empty .''."),
        (GOOD, {"query": " ", "positive": "p"}, "row 2, column 'query': the text is empty .' '."),
        (GOOD, {"query": "q", "positive": None}, "row 2, column 'positive': the cell is empty .None."),
        (GOOD, {"query": "q", "positive": []}, "row 2, column 'positive': the list is empty"),
        (GOOD, {"query": "q", "positive": ["p", ""]}, r"row 2, column 'positive'\[1\]: the text is empty"),
        (GOOD, {"query": ["q", "r"], "positive": "p"}, "row 2, column 'query': expected a string.* got list"),
        (GOOD, {"query": "q"}, "row 2 lacks column 'positive' of row 1"),
        (GOOD, {**GOOD, "negative": "n"}, "row 2 has a column 'negative' that is not in row 1"),
        ({**GOOD, "negative_1": "n"}, {**GOOD, "negative_1": None}, "'negative_1': the cell is empty .*'negatives'"),
        ({**GOOD, "negative_1": "n"}, GOOD, "row 2 lacks column 'negative_1'"),
        ({**GOOD, "negative": "n"}, {**GOOD, "negative": ["n", "m"]}, "row 2, column 'negative': .*got list"),
        ({**GOOD, "negatives": ["n"]}, {**GOOD, "negatives": "n"}, "row 2, column 'negatives': expected a list"),
        (SCORED, {**GOOD, "scores": [1.0, 0.5]}, "row 2, column 'scores': expected a list of 1 numbers"),
        (SCORED, {**GOOD, "scores": [float("nan")]}, "'scores': expected a number, finite in 32 bits; got nan"),
        (SCORED, {**GOOD, "scores": ["1"]}, "finite in 32 bits; got '1'"),
        (GOOD, {**GOOD, "positive": {"image": "gone.png"}}, "row 2, column 'positive': .*gone.png does not exist"),
        (GOOD, {**GOOD, "positive": {"img": "a.png"}}, "row 2, column 'positive': unknown key 'img'"),
        (GOOD, ["q", "p"], "row 2: expected a JSON object"),
    ],
)
def test_bad_rows_are_refused(good: Any, bad: Any, message: str, tmp_path: Path) -> None:
    rows = Rows(jsonl(tmp_path / "t.jsonl", [good, bad]))
    assert content(rows[0])[0] == ["q"]
    with pytest.raises(ValueError, match=message) as error:
        rows[1]
    assert "t.jsonl" in str(error.value)


NO_LABEL = "column 'label': expected a number of 0 .*got "


@pytest.mark.parametrize(
    ("documents", "label", "message"),
    [
        *(("d", label, f"{NO_LABEL}{label!r}") for label in (-1, None, "yes", float("nan"), float("inf"), "")),
        (["d", "e"], [1], r"column 'label': expected a list of 2 numbers, one per document; got \[1\]"),
        (["d", "e"], 1, "column 'label': expected a list of 2 numbers, one per document; got 1"),
        ("d", [1], r"column 'label': expected one number.*; got \[1\]"),
        ([], [], "column 'document': the list is empty"),
        (["d", ""], [1, 0], r"column 'document'\[1\]: the text is empty"),
        (["d", "e"], [1, -2], f"{NO_LABEL}-2"),
    ],
)
def test_bad_documents_and_labels_are_refused(documents: Any, label: Any, message: str, tmp_path: Path) -> None:
    rows = Rows(jsonl(tmp_path / "t.jsonl", [{"query": "q", "document": documents, "label": label}]))
    with pytest.raises(ValueError, match=f"row 1, {message}"):
        rows[0]


def test_a_row_whose_query_cannot_be_read_asks_something_of_its_own(tmp_path: Path) -> None:
    """So it comes up in a batch, and reading it says what is wrong."""
    rows = Rows(jsonl(tmp_path / "t.jsonl", [GOOD, {"query": None, "positive": "p"}, {"query": 7, "positive": "p"}]))
    ids = rows.query_ids([0, 1, 2, 1])
    assert ids[0] == rows[0].query.id
    assert ids[1] == ids[3] != ids[2]
    assert max(ids[1:]) < 0
    with pytest.raises(ValueError, match="row 2, column 'query': the cell is empty"):
        rows[1]
    grouped = GroupByQuery(rows)
    assert len(grouped) == 3
    with pytest.raises(ValueError, match="row 2, column 'query': the cell is empty"):
        grouped[1]


def test_blank_lines_at_the_end_and_a_missing_last_newline_are_fine(tmp_path: Path) -> None:
    line = json.dumps(GOOD)
    for name, text in {"a": f"{line}\n{line}\n\n \n", "b": f"{line}\n{line}", "c": f"\ufeff{line}\r\n{line}"}.items():
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        rows = Rows(str(tmp_path / f"{name}.jsonl"))
        assert [content(rows[k])[0] for k in range(len(rows))] == [["q"], ["q"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"query,positive\nq,p\nq,p,n\n", "row 2: 3 cells under 2 columns"),
        ("t.csv", b"query,positive\n\nq,p\n", "row 1: 0 cells under 2 columns"),
        ("t.csv", b"query,positive,positive\nq,p,r\n", "two columns are called 'positive'"),
        ("t.csv", b'query,positive\nq,"p\nr,s\n', "line 3: not CSV: .*is a quote left open"),
        ("t.csv", b'query,positive\nq,"p"r\n', "line 2: not CSV"),
        ("t.csv", b"query,positive\nq,\xe9\n", "row 2: not UTF-8"),
        ("t.csv", b"query,positive\n", "the file has no rows"),
        ("t.csv", b"", "the file has no rows"),
        ("t.parquet", b"noise", "cannot be opened: .*Parquet"),
        ("t.json", b"noise", r"byte 1: not JSON: expected '\[' or '{', got 'n'"),
        ("t.parquet.gz", gzip.compress(b"noise", mtime=0), "unknown kind of file '.gz'. Rows are in"),
        ("t.tar", b"noise", "not a tar that can be read"),
        ("t", b"q\tp\n", "unknown kind of file ''. Rows are in"),
    ],
)
def test_files_that_are_no_tables_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path / name}.* ?{message}"):
        len(Rows(str(tmp_path / name)))


def test_a_long_text_of_a_csv_file_is_read(tmp_path: Path) -> None:
    text = 'a, "b"\r\nc\r' * 30_000
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["query", "positive"], ["q", text]])
    assert content(Rows(str(tmp_path / "t.csv"))[0]) == (["q"], [text], [])


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"question": "query"}, "no column 'question' to rename"), ({"positive": "query"}, "two columns would be called")],
)
def test_bad_renaming_is_refused(columns: dict[str, str | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        len(Rows(jsonl(tmp_path / "t.jsonl", [GOOD]), columns=columns))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("visual_*.yaml")), ids=lambda path: path.stem)
def test_recipes_read_the_data_set_that_they_name(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica of it: configurations train, eval and full, of one split each, with the columns of the data set."""
    monkeypatch.chdir(tmp_path)
    folder = Path("tomaarsen/llamaindex-vdr-en-train-preprocessed")
    columns = ["image", *(f"negative_{number}" for number in range(4))]
    features = datasets.Features({"query": datasets.Value("string")} | dict.fromkeys(columns, datasets.Image()))
    page = "---\nconfigs:\n"
    for subset, count in {"train": 4, "eval": 3, "full": 7}.items():
        table: dict[str, Any] = {"query": [f"{subset} {row}" for row in range(count)]}
        for number, column in enumerate(columns):
            table[column] = [Image.new("RGB", (4, 4), (count, row, number)) for row in range(count)]
        (folder / subset).mkdir(parents=True)
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / subset / "0.parquet")
        page += f"- config_name: {subset}\n  data_files: [{{split: train, path: {subset}/*}}]\n"
    (folder / "README.md").write_text(page + "---\n")
    parser = ArgumentParser()
    parser.add_class_arguments(RetrievalDataModule, "data")
    written = {"data": yaml.safe_load(path.read_text())["data"]["init_args"]}
    data = parser.instantiate_classes(parser.parse_object(written)).data
    is_reranker = "reranking" in path.stem
    examples = data.train.__getitems__(range(len(data.train)))
    assert [content(example)[0] for example in examples] == [[f"train {row}"] for row in range(4)]
    shown = [
        [load_image(part.value).getpixel((0, 0)) for item in example.documents for part in item.parts]
        for example in examples
    ]
    count = 5 if is_reranker else 3 if "late" in path.stem else 2  # The positive, and four, two or one negatives.
    assert shown == [[(4, row, number) for number in range(count)] for row in range(4)]
    found = as_reranking(data.val, "validation").evaluation if is_reranker else as_evaluation(data.val, "validation")
    assert (texts(tuple(found.queries)), len(found.corpus)) == ([f"eval {row}" for row in range(3)], 3 * 5)
    assert [sum(judged.values()) for judged in found.qrels.values()] == [1, 1, 1]


def test_lines_that_are_too_long_are_refused_while_they_are_read(tmp_path: Path) -> None:
    """In a process of its own, whose peak is not that of other tests; the files have holes, and take no disk."""
    before = dict.fromkeys(
        ("first.jsonl", "t.json", "folder/train.jsonl", "qrels/qrels.tsv", "corpus/corpus.jsonl"), b""
    )
    before |= {
        "t.json": b'["' + b"x" * 2**26,
        "third.jsonl": b'{"query": "q", "positive": "p"}\n' * 2,
        "t.csv": b"query,positive\n" * 2,
    }
    for name, content in before.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.write(content)
            file.truncate(600_000_000)
    for name in ("corpus/queries.jsonl", "qrels/queries.jsonl", "qrels/corpus.jsonl"):
        (tmp_path / name).write_text('{"id": "q", "text": "x"}\n')
    (tmp_path / "corpus" / "qrels.tsv").write_text("q\td\t1\n")
    program = """
import resource, sys
import datasets.packaged_modules.json.json
from vlmembed.data import Rows
from vlmembed.data.evaluation import as_evaluation

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for path in sys.argv[1:]:
    try:
        as_evaluation(path)
    except ValueError as error:
        print(error)
print(peak() - before)
"""
    paths = [str(tmp_path / (name if name.count("/") == 0 else Path(name).parent)) for name in before]
    command = [sys.executable, "-c", program, *paths]
    *said, used = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for (name, content), message in zip(before.items(), said, strict=True):
        row = content.count(b"\n") + 1
        place = "byte 2: the value" if name == "t.json" else f"row {row}: the line"
        assert message.startswith(f"{tmp_path / name}, {place} has more than 67,108,864 bytes; VLMEMBED_MAX")
    assert int(used) < 200_000  # KiB: the line up to the limit, and once more while it is put together.


def test_a_batch_is_read_as_its_rows_are(tmp_path: Path) -> None:
    rows = Rows(jsonl(tmp_path / "t.jsonl", ROWS))
    assert rows.__getitems__([2, 0, 2]) == [rows[2], rows[0], rows[2]]
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "t.parquet")
    mixture = Mixture([rows, Rows(str(tmp_path / "t.parquet"))])
    assert mixture.__getitems__([4, 0, 3, 4]) == [mixture[4], mixture[0], mixture[3], mixture[4]]


# Cells

ORIGIN = "train.jsonl, row 17, column 'positive'"


@pytest.fixture
def media_folder(tmp_path: Path) -> Path:
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    Image.new("RGB", (3, 5), "blue").save(tmp_path / "b.png")
    (tmp_path / "film.mp4").write_bytes(b"film")
    (tmp_path / "other.mp4").write_bytes(b"other")
    return tmp_path


def parts(cell: Any, folder: Path) -> tuple[Part, ...]:
    (found,) = to_items([(cell, "document", ORIGIN)], Folder(folder))
    assert (found.role, found.origin) == ("document", ORIGIN)
    return found.parts


OPEN = Image.new("RGB", (2, 3), "green")
CHAT = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "cat"}]
#: What a cell stands for: words are text; names with an ending, an image; a tuple of such names, a video's frames.
CELLS: list[tuple[Any, list[Any]]] = [
    ("cat", ["cat"]),
    (OPEN, [OPEN]),
    ({"image": OPEN}, [OPEN]),
    ({"image": "a.png"}, ["a.png"]),
    ({"image": Path("a.png")}, ["a.png"]),
    ({"image": {"bytes": None, "path": "a.png"}}, ["a.png"]),
    ({"text": "cat", "image": "a.png"}, ["cat", "a.png"]),  # The order of keys is the order of parts.
    ({"image": "a.png", "text": "cat"}, ["a.png", "cat"]),
    ({"image": ["b.png", "a.png"], "text": ["x", "y"]}, ["b.png", "a.png", "x", "y"]),
    ({"video": "film.mp4"}, ["film.mp4"]),
    ({"video": ["b.png", "a.png"]}, [("b.png", "a.png")]),
    ({"video": ["other.mp4", "film.mp4"]}, ["other.mp4", "film.mp4"]),
    ({"video": [["b.png", "a.png"], "film.mp4"]}, [("b.png", "a.png"), "film.mp4"]),
    (CHAT, ["a.png", "cat"]),
    ({"role": "user", "content": CHAT}, ["a.png", "cat"]),
    ([{"role": "user", "content": CHAT}], ["a.png", "cat"]),
    ([{"role": "user", "content": "cat"}], ["cat"]),
    ({"text": "cat", "image": None}, ["cat"]),  # Arrow adds nulls.
    ([{"type": "text", "text": "cat", "image": None}], ["cat"]),
]


@pytest.mark.parametrize(("cell", "expected"), CELLS)
def test_every_form_of_a_cell(cell: Any, expected: list[Any], media_folder: Path) -> None:
    def part(value: Any) -> Part:
        if isinstance(value, tuple):
            return Part("video", tuple(media_folder / name for name in value))
        if isinstance(value, str) and "." in value:
            return Part("video" if value.endswith("mp4") else "image", media_folder / value)
        return Part("text" if isinstance(value, str) else "image", value)

    assert parts(cell, media_folder) == tuple(map(part, expected))


def test_a_string_is_text_even_if_a_file_has_its_name_and_paths_may_be_absolute(media_folder: Path) -> None:
    path = media_folder / "a.png"
    assert parts("a.png", media_folder) == (Part("text", "a.png"),)
    assert parts(str(path), media_folder) == (Part("text", str(path)),)
    assert parts({"image": str(path)}, media_folder) == (Part("image", path),)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "the cell is empty"),
        ("", "the text is empty"),
        (" \n", "the text is empty"),
        ({}, "the cell is empty"),
        ([], "a list of content parts, got list"),
        ({"text": None}, "the cell is empty"),
        ({"text": "", "image": "a.png"}, "the text is empty"),
        ({"text": 7}, "a text is a string, got int 7"),
        (7, "got int 7"),
        (["cat", "dog"], "got list"),
        ({"caption": "cat"}, "unknown key 'caption'"),
        ({"image": "gone.png"}, "the image file .*gone.png does not exist"),
        ({"image": 3}, "expected the path of an image file, got int 3"),
        ({"image": {"bytes": None, "path": None}}, "expected the path of an image file, got NoneType"),
        ({"image": {"bytes": "noise", "path": "x.png"}}, "the bytes of image 'x.png' are str 'noise'"),
        ({"image": {"bytes": 7, "path": None}}, "the bytes of image None are int 7"),
        ({"video": "gone.mp4"}, "the video file .*gone.mp4 does not exist"),
        ({"video": ["a.png", "gone.png"]}, "the image file .*gone.png does not exist"),
        ({"video": [[]]}, "a video without frames"),
        ([{"type": "text", "image": "a.png"}], "a content part is"),
        ([{"type": "text", "text": "cat", "image": "a.png"}], "a content part is"),
        ([{"type": "image_url", "image_url": "a.png"}], "unknown key 'image_url'"),
        ([{"role": "system", "content": "Find."}], "got role 'system'"),
        ([{"role": "user", "content": None}], "the cell is empty"),
    ],
)
def test_bad_cells_are_refused_with_their_origin(cell: Any, message: str, media_folder: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parts(cell, media_folder)
    assert str(error.value).startswith(ORIGIN)
