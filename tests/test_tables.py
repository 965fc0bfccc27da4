"""Each form of a data set, opened by `open_table`: against what wrote it, or against another library that reads it."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vlmembed.data.cells import Folder
from vlmembed.data.records import unpacked
from vlmembed.data.tables import RawTable, open_table

Rows = list[dict[str, Any]]


def encoded(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 5), color).save(file, "png")
    return file.getvalue()


PNG = encoded()
#: Texts that readers of tables like to make something else of.
TEXTS = ["None", "1984", "", " a ", "qué\u2028 \U0001f600", 'two\nlines, "quoted"\tand a tab', "\\u0041", "null", "]}"]
ROWS: Rows = [{"query": text, "positive": f"p{number}"} for number, text in enumerate(TEXTS)]


def opened(path: Path | str | list[str], split: str = "train", subset: str | None = None) -> RawTable:
    path = path if isinstance(path, list) else str(path)
    return open_table(path, split, subset, Folder.of(path, None))


def read(table: RawTable) -> Rows:
    return table.__getitems__(range(len(table)))


def refused(path: Path | str | list[str], split: str = "train", subset: str | None = None) -> str:
    with pytest.raises(ValueError, match=r".+") as error:
        read(opened(path, split, subset))
    return str(error.value)


def compress(path: Path, ending: str) -> Path:
    """Write what is in a file to another one, compressed in two pieces if the format has that."""
    content, target = path.read_bytes(), path.with_name(path.name + ending)
    half = len(content) // 2
    if ending.lower() == ".gz":
        target.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    elif ending == ".zst":
        codec = pyarrow.Codec("zstd")
        target.write_bytes(b"".join(codec.compress(piece, asbytes=True) for piece in (content[:half], content[half:])))
    else:
        target = path
    return target


def write_json(path: Path, value: Any, **options: Any) -> Path:
    path.write_text(json.dumps(value, **options), encoding="utf-8")
    return path


def write_lines(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_delimited(path: Path, rows: Rows) -> Path:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    pandas.DataFrame(rows).to_csv(path, sep=separator, index=False, encoding="utf-8")
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# Files

WRITERS: dict[str, Callable[[Path, Rows], Path]] = {
    "t.jsonl": write_lines,
    "t.ndjson": write_lines,
    "lines.json": write_lines,
    "list.json": write_json,
    "indented.JSON": lambda path, rows: write_json(path, rows, indent=4, ensure_ascii=False),
    "columns.json": lambda path, rows: write_json(path, {name: [row[name] for row in rows] for name in rows[0]}),
    "t.csv": write_delimited,
    "t.TSV": write_delimited,
}


@pytest.mark.parametrize("ending", ["", ".gz", ".GZ", ".zst"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_has_the_rows_that_were_written(name: str, ending: str, tmp_path: Path) -> None:
    path = compress(WRITERS[name](tmp_path / name, ROWS), ending)
    table = opened(path)
    assert read(table) == ROWS
    assert table.column_names == ["query", "positive"]
    assert table.origins([2]) == [f"{path}, row 3"]
    again = pickle.loads(pickle.dumps(table))
    order = random.Random(0).choices(range(len(ROWS)), k=30)
    assert again.__getitems__(order) == [ROWS[index] for index in order]


@pytest.mark.parametrize("name", ["t.tsv", "t.csv"])
def test_cells_of_a_csv_file_are_the_strings_that_pandas_reads(name: str, tmp_path: Path) -> None:
    path = write_delimited(tmp_path / name, [{"a": text, "b": f"{text};'"} for text in TEXTS * 200])
    separator = "\t" if name == "t.tsv" else ","
    expected = pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    assert read(opened(path)) == expected.to_dict("records")


@pytest.mark.parametrize("size", [1, 7, 16, 1000, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_a_json_file_is_cut_into_its_rows_wherever_pieces_of_it_end(size: int, tmp_path: Path) -> None:
    """The file is read in pieces of 2**20 bytes: strings, escapes, numbers and words that lie across their ends."""
    values = ["\\" * 9, "é\u2028\U0001f600" * 7, 10**40 + 123, -1.5e-300, True, None, float("-inf"), {"[": ["]", {}]}]
    rows = [{"pad": "x" * size, "a": value, "b": number} for number, value in enumerate(values * 3)]
    path = write_json(tmp_path / "t.json", rows)
    assert read(opened(path)) == json.loads(path.read_text())
    path = write_json(tmp_path / "n.json", [*range(300_000), *([10**size] if size < 4000 else [])])
    assert [row["value"] for row in read(opened(path))] == json.loads(path.read_text())


COCO = {
    "info": {"year": 2017},
    "images": [{"id": 7, "file_name": "7.jpg"}],
    "annotations": [{"image_id": 7, "caption": "a cat"}, {"image_id": 7, "caption": "ein Käter"}],
    "by_name": {"7.jpg": "./train/7.jpg"},
}
CAPTIONS = {f"{name}.jpg": [f"{name} {number}" for number in range(5)] for name in "abc"}
CIRR = {f"train-{number}-0-img{number % 2}": f"./train/{number}/é.png" for number in range(4)}
FORMS: list[tuple[Any, str | None, Rows]] = [
    (CIRR, None, [{"key": key, "value": value} for key, value in CIRR.items()]),
    (CIRR, "*", [{"key": key, "value": value} for key, value in CIRR.items()]),
    ({"é\n": {"x": 1}, "b": {"x": 2}}, None, [{"key": "é\n", "value": {"x": 1}}, {"key": "b", "value": {"x": 2}}]),
    (COCO, "annotations", COCO["annotations"]),  # type: ignore[list-item]
    (COCO, "images", COCO["images"]),  # type: ignore[list-item]
    (COCO, "by_name", [{"key": "7.jpg", "value": "./train/7.jpg"}]),
    ({"data": ROWS}, None, ROWS),
    ({"data": ROWS}, "data", ROWS),
    ({"version": "1", "data": ROWS, "license": {}}, None, ROWS),
    (CAPTIONS, "*", [{"key": key, "value": value} for key, value in CAPTIONS.items()]),
    (["B1.png", "B2.png"], None, [{"value": "B1.png"}, {"value": "B2.png"}]),
    ([[1, 2], None], None, [{"value": [1, 2]}, {"value": None}]),
    ({"queries": ["a", "b"], "docs": ["c"]}, "docs", [{"value": "c"}]),
    ([{"a": "x"}, {"a": {"image": "y.png"}}, {"b": 1}], None, [{"a": "x"}, {"a": {"image": "y.png"}}, {"b": 1}]),
]


@pytest.mark.parametrize(("value", "subset", "expected"), FORMS)
@pytest.mark.parametrize("indent", [None, 2])
def test_forms_of_json(value: Any, subset: str | None, expected: Rows, indent: int | None, tmp_path: Path) -> None:
    path = write_json(tmp_path / "t.json", value, indent=indent)
    assert read(opened(path, subset=subset)) == expected
    path.write_bytes(b"\xef\xbb\xbf \n" + path.read_bytes() + b"\n\n")
    assert read(opened(path, subset=subset)) == expected


@pytest.mark.parametrize(
    ("text", "subset", "message"),
    [
        (json.dumps(COCO), None, "which rows are meant? It is an object with lists images (1), annotations (2). "),
        (json.dumps(COCO), "annotation", "no key 'annotation' (did you mean 'annotations'?); it has info, images, "),
        (json.dumps({"a": [1], "b": [2, 3]}), None, "lists a (1), b (2). Choose one, such as subset: a"),
        (json.dumps({"a": [{}], "b": [{}]}), None, "which rows are meant?"),
        (json.dumps({"a": ["x"], "b": 1}), None, "which rows are meant?"),
        (json.dumps([{"a": 1}, 2]), None, "row 2: expected a JSON object, got 2"),
        (json.dumps([1]), "a", "no key 'a'; it is no object"),
        ("[]", None, "the file has no rows"),
        ("{}", None, "the file has no rows"),
        ('{"a": []}', "a", "the file has no rows"),
        ("", None, "byte 1: not JSON: expected '[' or '{', got the end"),
        ("3", None, "byte 1: not JSON: expected '[' or '{', got '3'"),
        ('[{"a": 1}', None, "byte 10: not JSON: expected ',' or ']', got the end"),
        ('[{"a": 1},]', None, "byte 11: not JSON (Expecting value)"),
        ('[{"a": 1}] x', None, "byte 12: not JSON: something follows the end"),
        ('[{"a" 1}]', None, "byte 7: not JSON (Expecting ':' delimiter)"),
        ('[{"a": "x}]', None, "byte 8: not JSON (Unterminated string"),
        ('[{"a": tru', None, "byte 8: not JSON (Expecting value)"),
        ("{1: 2}", None, "byte 2: not JSON: expected '\"', got '1'"),
        ("[" + "[" * 99_999, None, "byte 2: the value is nested too deeply"),
        ('["\udcff"]', None, "row 1: not UTF-8"),
    ],
)
def test_bad_json_is_refused(text: str, subset: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert refused(path, subset=subset).startswith(str(path))
    assert message in refused(path, subset=subset)


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    tables = [opened(write(tmp_path / name, ROWS)) for name, write in WRITERS.items()]
    for table in tables:
        table.path.write_bytes(table.path.read_bytes() + b" ")  # type: ignore[union-attr]
        with pytest.raises(OSError, match="has changed since it was opened"):
            table.__getitems__([0])


def test_a_compressed_file_that_was_changed_is_decompressed_again(tmp_path: Path) -> None:
    for rows in (ROWS, ROWS[::-1]):
        path = compress(write_lines(tmp_path / "t.jsonl", rows), ".gz")
        os.utime(path, ns=(0, len(rows[0]["query"])))
        table = opened(path)
        assert read(table) == rows
    assert unpacked(path).parent == Path(datasets.config.HF_DATASETS_CACHE) / "vlmembed"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_that_are_cut_off_or_none_are_refused(ending: str, tmp_path: Path) -> None:
    rows = [{"query": str(random.Random(number).random())} for number in range(5000)]
    path = compress(write_lines(tmp_path / "t.jsonl", rows), ending)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 4], content[:-5], b"noise", b'{"query": "q"}\n'):
        path.write_bytes(damaged)
        assert refused(path).startswith(f"{path}: cannot be decompressed: ")
    assert not [*(Path(datasets.config.HF_DATASETS_CACHE) / "vlmembed").glob("*.draft")]
