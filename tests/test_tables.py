"""Each form of a data set, opened by `open_table`: against what wrote it, or against another library that reads it."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hub_server import Repository, serve
from huggingface_hub import constants
from PIL import Image
from test_hub import connect

from vlmembed.data.cells import Folder, to_items
from vlmembed.data.records import Records, unpacked
from vlmembed.data.streaming import START, StreamedBatches, StreamingRows
from vlmembed.data.tables import RawTable, open_table
from vlmembed.media import load_image


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


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


def write_parquet(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(path)
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
    "t{a}*.ndjson": write_lines,
    "lines.json": write_lines,
    "list.json": write_json,
    "indented.JSON": lambda path, rows: write_json(path, rows, indent=4, ensure_ascii=False),
    "columns.json": lambda path, rows: write_json(path, {name: [row[name] for row in rows] for name in rows[0]}),
    "T[1].CSV": write_delimited,
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
        assert isinstance(table, Records)
        table.path.write_bytes(table.path.read_bytes() + b" ")
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


# Several files


def test_lists_and_globs_are_read_in_order_and_say_where_a_row_is(tmp_path: Path) -> None:
    folder = tmp_path / "shards [1]"
    folder.mkdir()
    pieces = {"a[1].jsonl": ROWS[:2], "b.csv": ROWS[2:3], "c.jsonl.gz": ROWS[3:7], "d.json": ROWS[7:]}
    write_lines(folder / "a[1].jsonl", ROWS[:2])
    write_delimited(folder / "b.csv", ROWS[2:3])
    compress(write_lines(folder / "c.jsonl", ROWS[3:7]), ".gz")
    (folder / "c.jsonl").unlink()
    write_json(folder / "d.json", ROWS[7:])
    files = [str(folder / name) for name in pieces]
    origins = [f"{folder / name}, row {row + 1}" for name, rows in pieces.items() for row in range(len(rows))]
    (folder / "e.jsonl").mkdir()  # A folder is no file.
    for path in (files, str(tmp_path / "shards [[]1]" / "*"), [str(tmp_path / "*" / "a*"), str(tmp_path / "*/[b-d]*")]):
        table = opened(path)
        assert read(table) == ROWS
        assert table.origins(range(len(table))) == origins
        assert table.select_columns(["query"]).column_names == ["query", "positive"]
    table = pickle.loads(pickle.dumps(opened(files[::-1])))
    assert read(table) == ROWS[7:] + ROWS[3:7] + ROWS[2:3] + ROWS[:2]
    assert table.__getitems__([8, 0, 8, 2]) == [ROWS[1], ROWS[7], ROWS[1], ROWS[3]]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "glob", "saved", "splits", "folder", "tar"])
@pytest.mark.parametrize(
    "split",
    [
        "train",
        "train[:1%]",
        "train[90%:]",
        "train[3:-4]",
        "train[33%:66%]",
        "train[-1:]",
        "train[:50%](pct1_dropremainder)",
        "train[5:10]+train[:5]",
        "train + test[1:]",
        "all",
    ],
)
def test_slices_of_every_form_are_those_of_datasets(form: str, split: str, tmp_path: Path) -> None:
    counts = {"train": 120, "test": 7} if form in ("splits", "folder", "tar") else {"train": 120}
    if ("test" in split and "test" not in counts) or (split == "all" and len(counts) == 1):
        pytest.skip("a file has no splits")
    tables = {name: datasets.Dataset.from_list([{"txt": f"{name}{k}"} for k in range(n)]) for name, n in counts.items()}
    path: Path | str = tmp_path / "d"
    (tmp_path / "reference").mkdir()
    (tmp_path / "d").mkdir()
    for name, table in tables.items():
        table.to_parquet(tmp_path / "reference" / f"{name}.parquet")
    train, rows = tables["train"], tables["train"].to_list()
    if form == "jsonl":
        path = write_lines(tmp_path / "t.jsonl", rows)
    elif form == "parquet":
        path = tmp_path / "reference" / "train.parquet"
    elif form == "glob":
        for shard, (start, stop) in enumerate(((0, 5), (5, 6), (6, 100), (100, 120))):
            train.select(range(start, stop)).to_parquet(tmp_path / "d" / f"{shard}.parquet")
        path = str(tmp_path / "d" / "*.parquet")
    elif form == "saved":
        train.save_to_disk(path)
    elif form == "splits":
        datasets.DatasetDict(tables).save_to_disk(path)
    else:
        for name, table in tables.items():
            table.to_json(tmp_path / "d" / f"{name}.jsonl") if form == "folder" else write_tar(
                tmp_path / "d" / f"{name}.tar", [(f"{k}.txt", row["txt"].encode()) for k, row in enumerate(table)]
            )
    expected = datasets.load_dataset(str(tmp_path / "reference"), split=split.replace(" ", ""))
    assert [row["txt"] for row in read(opened(path, split))] == expected["txt"]


def test_parquet_of_many_files_says_where_a_row_is(tmp_path: Path) -> None:
    sizes = [3, 0, 1, 400]
    for number, size in enumerate(sizes):
        table = pyarrow.table({"n": [f"{number}.{row}" for row in range(size)]})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=50)
    table = opened(str(tmp_path / "?.parquet"))
    for row, origin in zip(read(table), table.origins(range(len(table))), strict=True):
        file, number = row["n"].split(".")
        assert origin == f"{tmp_path / file}.parquet, row {int(number) + 1}"


def test_parquet_files_of_other_columns_are_named(tmp_path: Path) -> None:
    files = [str(write_parquet(tmp_path / f"{name}.parquet", [{"a": "x", name: "y"}])) for name in "bc"]
    assert refused(files) == f"{files[1]}: its columns are a, c; those of {files[0]} are a, b."


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("t.jsnl", "train", "t.jsnl: no such file or folder (did you mean 't.jsonl'?)"),
        ("t.json", "train", "t.json: no such file (did you mean 't.jsonl'?)"),
        ("t.jsonl.zst", "train", "t.jsonl.zst: no such file (did you mean 't.jsonl'?)"),
        ("x*.jsonl", "train", "x*.jsonl: no file matches"),
        (["t.jsonl", "gone.csv"], "train", "gone.csv: no such file"),
        (["t.jsonl", "folder"], "train", "folder: a list of paths has files only"),
        (["t.jsonl", "x?.csv"], "train", "x?.csv: no file matches"),
        (["t.jsonl", "t.md"], "train", "t.md: unknown kind of file '.md'. Rows are in .jsonl, .ndjson, .json, .csv"),
        ("t.jsonl", "train[", "split is 'train[': Unrecognized instruction format"),
        ("t.jsonl", "train+test", "split is 'train+test', but there are no splits"),
        ("t.jsonl", "train[:0]", "the data set has no rows in split 'train[:0]'"),
        ("splits", "tran", "no split 'tran' (did you mean 'train'?); it has train, test"),
        ("splits", "train+dev", "no split 'dev'; it has train, test"),
        ("folder", "validation", "no split 'validation'; it has train, test"),
        ("folder", "train[1]", "Unrecognized instruction format: train[1]"),
        ([], "train", "path is []"),
    ],
)
def test_what_is_not_there_is_refused(path: str | list[str], split: str, message: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "t.jsonl", ROWS)
    (tmp_path / "t.md").write_text("x")
    tables = {name: datasets.Dataset.from_list(ROWS) for name in ("train", "test")}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    for name in tables:
        write_lines(tmp_path / "folder" / f"{name}.jsonl", ROWS)
    paths = [str(tmp_path / one) for one in path] if isinstance(path, list) else str(tmp_path / path)
    said = refused(paths, split)
    assert message in said
    assert said.startswith((str(tmp_path), "path is"))


@pytest.mark.parametrize("name", ["t.jsonl", "folder", "t.parquet", "*.jsonl"])
def test_what_has_no_revision_or_configuration_refuses_one(name: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "t.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / "train.jsonl", ROWS)
    path = str(tmp_path / name)
    with pytest.raises(ValueError, match="revision is 'v1', but a f"):
        open_table(path, "train", None, Folder.of(path, None), "v1")
    assert "it has default" in refused(path, subset="en") or "subset is 'en', but files" in refused(path, subset="en")


def test_configurations_are_named(tmp_path: Path) -> None:
    for name in ("corpus", "queries"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "test.jsonl", [{"text": name}])
    configs = [
        {"config_name": name, "data_files": [{"split": "test", "path": f"{name}/*"}]} for name in ("corpus", "queries")
    ]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert read(opened(tmp_path, "test", "queries")) == [{"text": "queries"}]
    assert "no configuration 'query' (did you mean 'queries'?); it has corpus, queries" in refused(
        tmp_path, "test", "query"
    )
    assert "several configurations, and subset chooses none; it has corpus, queries" in refused(tmp_path, "test")
    assert "no split 'train'; it has test" in refused(tmp_path, "train", "corpus")


# Media


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
def test_bytes_of_parquet_are_read_as_images(kind: pyarrow.DataType, tmp_path: Path) -> None:
    blue = encoded("blue")
    columns: dict[str, Any] = {
        "query": pyarrow.array([PNG, None], kind),
        "struct": [{"bytes": PNG, "path": "a.png"}, None],
        "many": [[PNG, blue], []],
        "nested": [{"image": blue, "width": 3}, {"image": None, "width": 4}],
        "text": ["a", "b"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t[1].parquet")
    for table in (opened(tmp_path / "t[1].parquet"), pickle.loads(pickle.dumps(opened(tmp_path / "t[1].parquet")))):
        first, second = read(table)
        for cell, content in ((first["query"], PNG), (first["struct"], PNG), (first["nested"]["image"], blue)):
            (item,) = to_items([(cell, "document", "o")], Folder(tmp_path))
            assert load_image(item.parts[0].frames[0]).tobytes() == Image.open(io.BytesIO(content)).tobytes()
        assert first["many"] == [PNG, blue]
        assert second == {**dict.fromkeys(columns), "many": [], "nested": {"image": None, "width": 4}, "text": "b"}
    selected = opened(tmp_path / "t[1].parquet").select_columns(["many", "text"])
    assert read(selected) == [{"many": first["many"], "text": "a"}, {"many": [], "text": "b"}]


MEDIA = {"image": datasets.Image, "video": datasets.Video, "audio": datasets.Audio, "pdf": datasets.Pdf}
ENDINGS = {"image": "png", "video": "mp4", "audio": "wav", "pdf": "pdf"}


@pytest.mark.parametrize("kind", MEDIA)
def test_columns_of_media_are_not_decoded(kind: str, tmp_path: Path) -> None:
    """Content of another kind, which any decoder would refuse."""
    cells = [{"bytes": b"noise", "path": "x"}, {"bytes": None, "path": "https://127.0.0.1:9/x"}, None]
    storage = pyarrow.array(cells, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
    table = pyarrow.table(
        {"one": storage, "many": pyarrow.array([cells[:1], cells, None], pyarrow.list_(storage.type))}
    )
    features = datasets.Features({"one": MEDIA[kind](), "many": datasets.List(MEDIA[kind]())})
    # Saving would ask for what is behind the URL.
    datasets.Dataset(table.take([0, 2]), info=datasets.DatasetInfo(features=features)).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    described = table.replace_schema_metadata(features.arrow_schema.metadata)
    for name in ("t.parquet", "folder/train.parquet"):
        pyarrow.parquet.write_table(described, tmp_path / name)
    for name in ("t.parquet", "saved", "folder"):
        found = opened(tmp_path / name)
        assert isinstance(found, datasets.Dataset)
        assert found.features["one"].decode is False
        assert read(found) == (table.take([0, 2]) if name == "saved" else table).to_pylist()


@pytest.mark.parametrize("metadata", ["labels", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("kind", MEDIA)
def test_folders_of_media(kind: str, metadata: str, tmp_path: Path) -> None:
    files = [f"{label}/{number}.{ENDINGS[kind]}" for label in ("a cat", "dog") for number in range(2)]
    for file in files:
        (tmp_path / "d" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / file).write_bytes(b"noise")
    texts = [{"file_name": file, "text": f"text of {file}"} for file in files]
    if metadata != "labels":
        write = {"jsonl": write_lines, "csv": write_delimited, "parquet": write_parquet}[metadata]
        write(tmp_path / "d" / f"metadata.{metadata}", texts)
    rows = read(opened(tmp_path / "d"))
    extra = [{"label": file.split("/")[0]} if metadata == "labels" else {"text": f"text of {file}"} for file in files]
    cells = [{"bytes": None, "path": str(tmp_path / "d" / file)} for file in files]
    assert rows == [{kind: cell, **other} for cell, other in zip(cells, extra, strict=True)]


def test_labels_that_are_no_folders_stay_numbers(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"]), "raw": datasets.Value("binary")})
    made = datasets.Dataset.from_list([{"label": 1, "raw": PNG}, {"label": 0, "raw": None}], features=features)
    made.to_parquet(tmp_path / "t.parquet")
    assert [row["label"] for row in read(opened(tmp_path / "t.parquet"))] == [1, 0]


@pytest.mark.skipif(find_spec("lance") is not None, reason="Lance is installed")
def test_lance_that_is_not_installed_is_named(tmp_path: Path) -> None:
    for name in ("data/0.lance", "_versions/1.manifest"):
        (tmp_path / "t.lance" / name).parent.mkdir(parents=True)
        (tmp_path / "t.lance" / name).write_bytes(b"")
    assert 'pip install "vlmembed[lance]"' in refused(tmp_path / "t.lance")


def test_lance(tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    lance.write_dataset(pyarrow.table({"query": TEXTS, "image": [PNG] * len(TEXTS)}), tmp_path / "t.lance")
    rows = read(opened(tmp_path / "t.lance"))
    assert [(row["query"], row["image"]) for row in rows] == [(text, PNG) for text in TEXTS]


# WebDataset

SAMPLE = {"jpg": PNG, "txt": "ein Käter".encode(), "json": b'{"a": [1, 2], "b": null}', "cls": b"3", "seg.png": PNG}
MEMBERS = [(f"./folder.1/{number:03}.{field}", content) for number in range(7) for field, content in SAMPLE.items()]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_has_the_rows_that_datasets_finds(form: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("./._junk", b""), *MEMBERS], format=form)
    expected = datasets.load_dataset("webdataset", data_files=str(path), split="train")
    undecoded = {name: datasets.Image(decode=False) for name in ("jpg", "seg.png")}
    for name, feature in undecoded.items():
        expected = expected.cast_column(name, feature)
    table = opened(path)
    assert read(table) == expected.to_list()
    assert table.column_names == expected.column_names
    assert read(opened(compress(path, ".gz")))[3]["txt"] == "ein Käter"


def test_a_folder_and_a_glob_of_tars(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for shard in range(3):
        write_tar(tmp_path / "d" / f"train-{shard}.tar", [(f"{shard}{row}.txt", b"x") for row in range(shard + 1)])
    keys = ["00", "10", "11", "20", "21", "22"]
    files = [str(tmp_path / "d" / f"train-{shard}.tar") for shard in range(3)]
    for path in (tmp_path / "d", str(tmp_path / "d" / "*.tar"), files):
        table = opened(path)
        assert [row["__key__"] for row in read(table)] == keys
        assert table.origins([5]) == [f"{files[2]}, row 3"]


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", PNG), ("a.txt", b""), ("b.jpg", PNG)], "row 2: the files of b end in jpg, those of row 1 in"),
        ([("a.jpg", PNG), ("a.txt", b""), ("b.txt", b"")], "row 2: the files of b end in txt, those of row 1 in"),
        ([("a.jpg", PNG), ("b.jpg", PNG), ("a.txt", b"")], "row 3: the files of a end in txt, those of row 1 in jpg."),
        ([("a.jpg", PNG), ("b.jpg", PNG), ("b.txt", b"")], "row 2: the files of b end in jpg, txt, those of row 1 in"),
        ([("a.txt", b""), ("b.txt", b""), ("a.txt", b"")], "the members a.* do not stand beside each other"),
        ([("a.txt", b""), ("a.txt", b"")], "the member a.txt comes twice"),
        ([("a.txt", b""), ("LICENSE", b"")], "the member LICENSE has no ending"),
        ([("../a.txt", b"")], "the member ../a.txt leads out of the tar"),
        ([("b/../../a.txt", b"")], "leads out of the tar"),
        ([("/etc/a.txt", b"")], "the member /etc/a.txt leads out of the tar"),
        ([link("a.txt", "/etc/passwd")], "the member a.txt is no plain file"),
        ([("a.txt", b""), link("b.txt", "a.txt", tarfile.LNKTYPE)], "the member b.txt is no plain file"),
        ([link("a.txt", "", tarfile.FIFOTYPE)], "the member a.txt is no plain file"),
        ([("a.txt", b""), ("b.txt", b"\xe9")], "row 2: the member b.txt is not UTF-8"),
        ([("a.json", b"{"), ("b.json", b"{}")], "row 1: the member a.json is not JSON"),
        ([("a.cls", b"x")], "row 1: the member a.cls is not a whole number"),
        ([], "the file has no rows"),
    ],
)
def test_bad_tars_are_refused(members: list[Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    assert refused(path).startswith(str(path))
    assert message in refused(path)


def test_a_tar_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [(f"{number}.txt", b"x" * 700) for number in range(4)])
    content = path.read_bytes()
    for length in (100, 600, 1200, 1536 * 3 + 600, 1536 * 4 - 20):
        path.write_bytes(content[:length])
        assert "Is the file whole?" in refused(path), length


# Safety


def test_no_file_outside_of_the_folder_is_opened(tmp_path: Path) -> None:
    outside = write_lines(tmp_path / "secret.jsonl", ROWS)
    folder = tmp_path / "d"
    folder.mkdir()
    write_lines(folder / "a.jsonl", ROWS)
    (folder / "b.jsonl").symlink_to(outside)
    for path in (str(folder / "*.jsonl"), [str(folder / "?.jsonl")], folder):
        assert (
            f"the data file '{folder / 'b.jsonl'}' leads out of the data set's folder {folder}, to {outside}"
            in refused(path)
        )
    allowed = open_table(str(folder / "*.jsonl"), "train", None, Folder.of(str(folder / "*"), [str(tmp_path)]))
    assert len(allowed) == 2 * len(ROWS)


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../secret.png", "file:///etc/hostname", "http://127.0.0.1:9/x.png", "link.png"]
)
def test_metadata_of_a_folder_names_no_file_outside(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "secret.png") if name == "link.png" else None
    write_lines(folder / "metadata.jsonl", [{"file_name": name, "text": "x"}])
    assert refused(folder).startswith(str(folder))


@pytest.mark.exhaustive
def test_what_is_small_when_compressed_fills_no_memory(tmp_path: Path) -> None:
    """In a process of its own: 1 GB of spaces in one line, and of one value, in 1 MB."""
    bomb = gzip.compress(b" " * 2**20) * 1000
    before = {"t.jsonl": b"", "t.csv": b'"a', "d/train.jsonl": b"", "d2/train.csv": b"", "t.json": b'["'}
    for name, start in before.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(start) + bomb)
    program = """
import resource, sys
import datasets.packaged_modules.json.json
from vlmembed.data.cells import Folder
from vlmembed.data.tables import open_table

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for path in sys.argv[1:]:
    try:
        print(len(open_table(path, "train", None, Folder.of(path, None))))
    except ValueError as error:
        print(error)
print(peak() - before)
"""
    paths = [str(tmp_path / (name.split("/")[0] if "/" in name else f"{name}.gz")) for name in before]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", program, *paths]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    *said, used = ran.stdout.splitlines()
    for name, message in zip(before, said, strict=True):
        place = "byte 2: the value" if name == "t.json" else "row 1: the line"
        assert message.startswith(f"{tmp_path / name}.gz, {place} has more than 67,108,864 bytes")
    assert int(used) < 300_000  # KiB: a line up to the limit, and once more while it is put together.


# The Hub

Case = tuple[str, str | None, str, str | None]


def in_place(path: str, subset: str | None, split: str, revision: str | None) -> list[str]:
    return [row["txt"] for row in read(open_table(path, split, subset, Folder.of(path, None), revision))]


def streamed(path: str, subset: str | None, split: str, revision: str | None) -> list[str]:
    """What comes third, and also after a new start."""
    cells: Any = {"query": "txt", "positive": "txt"}
    rows = StreamingRows(path, split, subset, revision=revision, cells=cells, shuffle_buffer=4)
    batches = StreamedBatches(rows, 4, 1, 0, distinct=False, skip=False)
    batches.positions = [START]
    first, *rest = islice(batches, 4)
    batches.positions = [first[1]]
    assert [*islice(batches, 3)] == rest
    return sorted(example.query.parts[0].value for _, example in first[2])


PAGE = """---
configs:
- {config_name: en, data_files: [{split: train, path: en/train.*}, {split: dev, path: en/dev.*}]}
- {config_name: de, data_files: de/*}
---
"""


def test_configurations_splits_slices_and_revisions_of_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = write_tar(tmp_path / "t.tar", [("a.txt", b"one"), ("b.txt", b"two")]).read_bytes()
    lines = b'{"txt": "new"}\n' * 200 + b'{"txt": "last"}\n'
    new = {"README.md": PAGE.encode(), **dict.fromkeys(("en/train.jsonl", "en/dev.jsonl", "de/train.jsonl"), lines)}
    texts, parquet = [{"txt": f"t{number}"} for number in range(16)], io.BytesIO()
    datasets.Dataset.from_list(texts).to_parquet(parquet)
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in texts).encode())
    branches = {"v1": {"train.jsonl": b'{"txt": "old"}\n'}, "main": new}
    branches |= {"parquet": {"train.parquet": parquet.getvalue()}, "gz": {"train.jsonl.gz": packed}}
    tars = {"train.tar": tar, "test.tar": tar}
    cases: dict[Case, Any] = {
        ("org/set", "en", "train[:1%]", None): ["new", "new"],
        ("org/set", "en", "train[-1:] + dev[-1:]", "main"): ["last", "last"],
        ("org/set", None, "train", "v1"): ["old"],
        ("org/tars", None, "test[1:]+train", None): ["two", "one", "two"],
        ("org/set", "fr", "train", None): "org/set: no configuration 'fr'; it has en, de",
        ("org/set", None, "train", None): "org/set: several configurations, and subset chooses none; it has en, de",
        ("org/set", "en", "train", "v1"): "org/set: no configuration 'en'; it has default",
        ("org/set", "en", "tran[:1%]", None): "org/set: no split 'tran' (did you mean 'train'?); it has train, dev",
        ("org/tars", None, "dev", None): "org/tars: no split 'dev'; it has train, test",
        ("org/set", "en", "train", "v9"): "org/set: cannot be opened: 404 Client Error.\n\nRevision Not Found",
    }
    streams: dict[Case, Any] = {
        **{("org/set", None, "train", branch): ["t0", "t1", "t2", "t3"] for branch in ("parquet", "gz")},
        ("org/set", "en", "train", None): ["new"] * 4,
        ("org/set", "fr", "train", None): "org/set: no configuration 'fr'; it has en, de",
        ("org/set", "en", "tran", None): "org/set: no split 'tran' (did you mean 'train'?); it has train, dev",
        ("org/set", "en", "train[:1%]", None): "org/set: split is 'train[:1%]', but a stream has no slices",
        ("org/set", None, "train", "v9"): "org/set: cannot be opened: 404 Client Error.\n\nRevision Not Found",
    }
    with serve("hf_x") as hub:
        hub.repositories |= {name: Repository(private=False) for name in ("org/set", "org/tars")}
        for branch, files in branches.items():
            hub.repositories["org/set"].commit(branch, files)
        hub.repositories["org/tars"].commit("main", tars)
        connect(monkeypatch, hub.url, "hf_x")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        # What `datasets` has read where it was imported.
        config = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "DOWNLOADED_DATASETS_PATH": tmp_path / "downloads"}
        for name, value in config.items():
            monkeypatch.setattr(datasets.config, name, value)
        for reader, expected_of in ((in_place, cases), (streamed, streams)):
            for case, expected in expected_of.items():
                if isinstance(expected, list):
                    assert reader(*case) == expected
                else:
                    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
                        reader(*case)
