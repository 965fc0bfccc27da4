"""A corpus becomes an index: its rows in order, with the vectors that Sentence Transformers gives, whatever happens."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from building import encoder, jsonl, picture, write_rows
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from vlmembed.cli import main
from vlmembed.data import (
    EvaluationFolder,
    EvaluationRows,
    EvaluationTables,
    GroupByQuery,
    Pages,
    Rows,
    StreamingRows,
    Table,
)
from vlmembed.encoder import MultiVectorEncoder as OurMultiVectorEncoder
from vlmembed.export.sentence_transformers import write_folder, write_multi_vector
from vlmembed.pooling import TokenProjection, TokenSelection
from vlmembed.search import encoding
from vlmembed.search.corpus import open_corpus
from vlmembed.search.encoding import encode, scan
from vlmembed.search.index import Index, corpus_of
from vlmembed.search.shards import Precision, Ray, bytes_in, schema_of, table_of
from vlmembed.types import Role

FORK = multiprocessing.get_context("fork")
PAGE = Path(__file__).parent.parent / "vlmembed/search/README.md"


@pytest.fixture(scope="module")
def embedder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedder")
    torch.manual_seed(0)
    write_folder(encoder(checkpoint), folder, dimensions=[64, 32])
    return folder


@pytest.fixture(scope="module")
def multi_vector(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multi_vector")
    torch.manual_seed(0)
    selections: dict[Role, TokenSelection] = {"query": TokenSelection(), "document": TokenSelection()}
    built = OurMultiVectorEncoder(encoder(checkpoint).backbone, TokenProjection(16), selections)
    built.configure()
    write_multi_vector(built, folder)
    return folder


def items(folder: Path, count: int = 24) -> list[dict[str, Any]]:
    """Texts of many lengths, images of some sizes, both, and repeats."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        name = f"{number % 7}.png"
        picture(32 + 32 * (number % 3), 64, number % 7).save(folder / name)
        text = f"ein Blatt № {number} " * (1 + number % 5)
        rows.append(
            {"id": f"doc {number}/ü", **[{"text": text}, {"image": name}, {"image": name, "text": text}][number % 3]}
        )
    return rows


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return jsonl(tmp_path / "corpus.jsonl", items(tmp_path))


def table(folder: Path | str) -> pa.Table:
    """All rows of an index, as anybody reads them."""
    return pa.concat_tables(pq.read_table(file) for file in sorted(Path(folder).glob("*.parquet")))


def manifest(folder: Path | str) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(Path(folder, "manifest.json").read_text())
    return written


def content(folder: Path) -> dict[str, bytes]:
    """What everybody sees of an index."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


# What is written


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_vectors_are_those_of_sentence_transformers(
    kind: str, embedder: Path, multi_vector: Path, corpus: str, tmp_path: Path
) -> None:
    folder = embedder if kind == "single" else multi_vector
    model: Any = (SentenceTransformer if kind == "single" else MultiVectorEncoder)(str(folder))
    rows = [json.loads(line) for line in Path(corpus).read_text().splitlines()]
    inputs = [
        {key: str(tmp_path / value) if key == "image" else value for key, value in row.items() if key != "id"}
        for row in rows
    ]
    for role in ("document", "query"):
        output = tmp_path / role
        encode(str(folder), corpus, str(output), role=role, shard_size=10)  # type: ignore[arg-type]
        expected = model.encode_document(inputs) if role == "document" else model.encode_query(inputs)
        written = table(output)
        assert written["id"].to_pylist() == [row["id"] for row in rows]
        vectors = written["embedding"].to_pylist()
        for ours, theirs in zip(vectors, expected, strict=True):
            # float32 of two orders of adding.
            np.testing.assert_allclose(np.array(ours), np.asarray(theirs), rtol=0, atol=1e-5)
        said = manifest(output)
        assert said["complete"] is True
        assert said["count"] == len(rows)
        assert said["dimension"] == np.asarray(expected[0]).shape[-1]
        assert (said["is_multi_vector"], said["role"]) == (kind == "multi", role)
        assert said["prompt"] == model.prompts[role]
        assert said["dimensions"] == ([32, 64] if kind == "single" else [])
        assert [(shard["file"], shard["rows"]) for shard in said["shards"]] == [
            (f"shard-0000{number}.parquet", size) for number, size in enumerate([10, 10, 4])
        ]
        for shard in said["shards"]:
            assert hashlib.sha256((output / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
        assert not (output / "unreadable.jsonl").exists()


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
@pytest.mark.parametrize("lengths", [None, [3, 1, 0, 6]])
def test_precisions_are_their_formulas(precision: Precision, lengths: list[int] | None, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(4 if lengths is None else sum(lengths), 12)).astype(np.float32)
    vectors[0, :5] = 0
    given: Any = torch.from_numpy(vectors)
    given = given if lengths is None else [*given.split(lengths)]
    schema = schema_of(precision, lengths is not None)
    pq.write_table(table_of(["a", "b", "c", "d"], given, precision, schema), tmp_path / "shard.parquet")
    written = pq.read_table(tmp_path / "shard.parquet")
    assert written.column_names == ["id", "embedding", *(["scale"] if precision == "int8" else [])]
    for row, (item, vector) in enumerate(zip(written["embedding"].to_pylist(), given, strict=True)):
        expected = vector.numpy()
        if not len(expected):
            assert item == []
        elif precision == "binary":
            bits = [[f"{byte:08b}" for byte in one] for one in (item if lengths else [item])]
            signs = ["".join(line)[:12] for line in bits]
            assert signs == ["".join(str(int(number > 0)) for number in one) for one in np.atleast_2d(expected)]
        elif precision == "int8":
            scale = written["scale"][row].as_py()
            assert scale == pytest.approx(np.abs(expected).max() / 127)
            # Rounding is half a step.
            np.testing.assert_allclose(np.array(item) * scale, expected, rtol=0, atol=scale * 0.501)
        else:
            np.testing.assert_array_equal(np.array(item, dtype=precision), expected.astype(precision))


@pytest.mark.parametrize(("precision", "size"), [("float32", 4), ("float16", 2), ("int8", 1), ("binary", 1 / 8)])
@pytest.mark.parametrize("lengths", [None, [4] * 100])
def test_a_number_takes_what_it_is_stored_in(
    precision: Precision, size: float, lengths: list[int] | None, tmp_path: Path
) -> None:
    """A twentieth more, for where an item begins and ends; and of bits, for the dictionary of a page."""
    vectors, ids = torch.randn(400, 512), [f"{row}" for row in range(400 if lengths is None else 100)]
    given: Any = vectors if lengths is None else [*vectors.split(lengths)]
    schema = schema_of(precision, lengths is not None)
    with pq.ParquetWriter(tmp_path / "shard", schema, compression="none", use_dictionary=bytes_in(schema)) as writer:
        writer.write_table(table_of(ids, given, precision, schema))
    column = pq.read_metadata(tmp_path / "shard").row_group(0).column(1)
    assert column.path_in_schema.startswith("embedding")
    assert column.total_compressed_size < vectors.numel() * size * (1.2 if precision == "binary" else 1.05)


# What can be encoded


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(48, 32, number).save(buffer, "PNG")
    return buffer.getvalue()


def evaluation_folder(folder: Path) -> EvaluationFolder:
    jsonl(folder / "corpus.jsonl", [{"_id": f"d{n}", "title": f"title {n}", "text": f"text {n}"} for n in range(5)])
    jsonl(folder / "queries.jsonl", [{"_id": f"q{n}", "text": f"question {n}"} for n in range(3)])
    (folder / "qrels.tsv").write_text("".join(f"q{n}\td{n}\t1\n" for n in range(3)))
    return EvaluationFolder(str(folder))


def of_tables(folder: Path) -> EvaluationTables:
    evaluation_folder(folder)
    places = [str(folder / name) for name in ("corpus.jsonl", "queries.jsonl", "qrels.tsv")]
    return EvaluationTables(*places, document_instruction="Told.", query_instruction="")


def training_rows(folder: Path) -> EvaluationRows:
    folder.mkdir()
    return EvaluationRows(Rows(str(write_rows(folder / "train.jsonl"))))


@pytest.mark.parametrize("role", ["document", "query"])
@pytest.mark.parametrize("build", [evaluation_folder, of_tables, training_rows], ids=lambda build: build.__name__)
def test_an_evaluation_set_has_the_ids_and_items_of_its_measurement(
    build: Callable[[Path], Any], role: Role, tmp_path: Path
) -> None:
    source = build(tmp_path / "set")
    loaded = source.load()
    names = loaded.document_names if role == "document" else loaded.query_names
    expected = dict(zip(names, loaded.corpus if role == "document" else loaded.queries, strict=True))
    values = [source]
    if isinstance(source, EvaluationFolder):
        values.append(source.path)
    if isinstance(source, EvaluationRows):
        values += [source.rows, source.rows.path, GroupByQuery(source.rows)]  # type: ignore[attr-defined]
    for value in values:
        corpus = open_corpus(value, role)
        found = dict(corpus.read(row) for row in range(len(corpus)))
        assert found == expected
        assert [name for block in corpus.blocks() for name, _ in block] == [*found]


def test_subsets_have_the_ids_of_their_measurement(tmp_path: Path) -> None:
    folder, configs = tmp_path / "set", []
    for subset in ("english", "french"):
        jsonl(folder / f"{subset}-corpus.jsonl", [{"id": f"d{n}", "text": f"{subset} {n}"} for n in range(300)])
        jsonl(folder / f"{subset}-queries.jsonl", [{"id": "q", "text": subset}])
        jsonl(folder / f"{subset}-qrels.jsonl", [{"query-id": "q", "corpus-id": "d1", "score": 1}])
        for kind in ("corpus", "queries", "qrels"):
            files = [{"split": "test", "path": f"{subset}-{kind}.jsonl"}]
            configs.append({"config_name": f"{subset}-{kind}", "data_files": files})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    corpus, loaded = open_corpus(str(folder), "document"), EvaluationFolder(str(folder)).load()
    assert [corpus.read(row)[0] for row in (0, 299, 300, 599)] == [loaded.document_names[n] for n in (0, 299, 300, 599)]
    assert [name for block in corpus.blocks() for name, _ in block] == loaded.document_names
    assert len(open_corpus(EvaluationFolder(str(folder), subset="french"), "query")) == 1
    with pytest.raises(ValueError, match=r"no subset 'frensh' .did you mean 'french'"):
        open_corpus(EvaluationFolder(str(folder), subset="frensh"), "document")


def as_csv(folder: Path) -> Any:
    with (folder / "items.csv").open("w") as file:
        csv.writer(file).writerows([["docid", "text"], *([f"{n}", f"text {n}"] for n in range(3))])
    return str(folder / "items.csv")


def as_parquet(folder: Path) -> Any:
    rows = [{"id": n, "image": {"bytes": png(n), "path": None}} for n in range(3)]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(folder / "items.parquet")
    return str(folder / "items.parquet")


def as_several_parquet_files(folder: Path) -> Any:
    as_parquet(folder)
    rows = [{"id": 3, "image": {"bytes": png(3), "path": None}}]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(folder / "more.parquet")
    return Table(f"{folder}/*.parquet")


def as_renamed(folder: Path) -> Any:
    jsonl(folder / "items.jsonl", [{"key": n, "body": f"text {n}", "keep": n != 1} for n in range(4)])
    return Table(str(folder / "items.jsonl"), columns={"key": "id", "body": "text"}, where={"keep": True})


def as_images(folder: Path) -> Any:
    for name in ("0.png", "deep/1.PNG", "2.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        picture(48, 32, 1).save(folder / name)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no data set")
    return str(folder)


@pytest.mark.parametrize(
    ("build", "ids"),
    [
        (as_csv, ["0", "1", "2"]),
        (as_parquet, ["0", "1", "2"]),
        (as_several_parquet_files, ["0", "1", "2", "3"]),
        (as_renamed, ["0", "2", "3"]),
        (as_images, ["0.png", "2.jpg", "deep/1.PNG"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_form_of_items_is_read(build: Callable[[Path], Any], ids: list[str], tmp_path: Path) -> None:
    corpus = open_corpus(build(tmp_path), "document")
    read = [corpus.read(row) for row in range(len(corpus))]
    assert [name for name, _ in read] == ids == [name for block in corpus.blocks() for name, _ in block]
    assert {part.kind for _, item in read for part in item.parts} == {"image" if build in IMAGES else "text"}
    assert len({scan(corpus) for _ in range(2)}) == 1


IMAGES = [as_parquet, as_several_parquet_files, as_images]


def test_a_folder_of_pdfs_is_its_pages(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    for name, pages in (("a.pdf", 2), ("b/c.pdf", 1)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        images = [picture(48, 64, page) for page in range(pages)]
        images[0].save(tmp_path / name, "PDF", save_all=True, append_images=images[1:])
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 and no more")
    corpus = open_corpus(str(tmp_path), "document")
    ids = [name for block in corpus.blocks() for name, _ in block]
    assert ids == ["a.pdf#page=1", "a.pdf#page=2", "b/c.pdf#page=1", "broken.pdf#page=1"]
    assert [corpus.read(row)[0] for row in range(4)] == ids
    one = open_corpus(Pages(str(tmp_path / "a.pdf")), "document")
    assert [one.read(row)[0] for row in range(2)] == ["a.pdf#page=1", "a.pdf#page=2"]
    assert [open_corpus(str(tmp_path / "a.pdf"), "document").read(row)[0] for row in range(2)] == ids[:2]


def test_a_source_is_named_in_yaml(embedder: Path, tmp_path: Path) -> None:
    evaluation_folder(tmp_path / "set")
    path, output = str(tmp_path / "set/corpus.jsonl"), tmp_path / "index"
    corpus = {"class_path": "vlmembed.data.Table", "init_args": {"path": path, "where": {"_id": ["d1", "d3"]}}}
    config = {"model": str(embedder), "corpus": corpus, "output": str(output), "precision": "float16"}
    (tmp_path / "encode.yaml").write_text(json.dumps(config))
    main(["encode", "--config", str(tmp_path / "encode.yaml"), "--shard_size", "1"])
    assert table(output)["id"].to_pylist() == ["d1", "d3"]
    assert table(output).schema.field("embedding").type.value_type == pa.float16()
    assert len(manifest(output)["shards"]) == 2
    assert "corpus.jsonl" in manifest(output)["corpus"]


# Streams


def streamed_rows(folder: Path) -> tuple[str, dict[str, Any]]:
    path = write_rows(folder / "rows.jsonl", 21)
    lines = path.read_text().splitlines()
    lines[9] = '{"query": "cut off", "posit'
    lines[13] = json.dumps({"query": "q", "positive": {"image": "missing.png"}, "negative": "wrong 0"})
    lines[14] = json.dumps({"query": "q", "positive": "", "negative": "wrong 0"})
    path.write_text("\n".join(lines))
    return str(path), {}


def streamed_elements(folder: Path) -> tuple[str, dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"query": f"q{n}", "answers": [f"a{n}", f"b{n % 5}"], "kind": n % 2} for n in range(30)
    ]
    rows[11]["answers"] = ["good", ""]
    rows[15]["answers"] = []
    cells = {"query": "query", "positive": "answers"}
    return jsonl(folder / "rows.jsonl", rows), {"cells": cells, "where": {"kind": 1}, "each": "answers"}


def streamed_images(folder: Path) -> tuple[str, dict[str, Any]]:
    rows: list[Any] = [{"query": f"q{n}", "page": {"bytes": png(n % 17), "path": None}} for n in range(21)]
    rows[10]["page"] = {"bytes": png(1)[:200], "path": None}
    rows[12]["page"] = None
    data = datasets.Dataset.from_list(rows).cast_column("page", datasets.Image(decode=False))
    data.to_parquet(folder / "rows.parquet", batch_size=6)
    return str(folder / "rows.parquet"), {"columns": {"page": "positive"}}


def streamed_items(folder: Path) -> tuple[str, dict[str, Any]]:
    lines = [json.dumps(row) for row in items(folder, 21)]
    lines[5] = json.dumps({"id": "missing", "image": "missing.png"})
    lines[6] = '{"id": "cut off'
    return write_lines(folder / "items.jsonl", lines), {}


def streamed_some(folder: Path) -> tuple[str, dict[str, Any]]:
    rows = [{"key": n, "body": f"text {n}", "keep": n % 3 > 0} for n in range(21)]
    return jsonl(folder / "items.jsonl", rows), {"columns": {"key": "id", "body": "text"}, "where": {"keep": True}}


def streamed_pages(folder: Path) -> tuple[str, dict[str, Any]]:
    rows = [{"id": n, "image": {"bytes": png(n), "path": None}, "language": "de"} for n in range(21)]
    rows[10]["image"] = {"bytes": b"no image", "path": None}
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    data.to_parquet(folder / "pages.parquet", batch_size=6)
    return str(folder / "pages.parquet"), {"where": {"language": {"not": "fr"}}}


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def same_index(one: Path, other: Path) -> bool:
    """Whether all is the same, but what the corpus is called."""
    files = [
        {name: file for name, file in content(folder).items() if name != "manifest.json"}
        | {name: value for name, value in manifest(folder).items() if name != "corpus"}
        for folder in (one, other)
    ]
    return files[0] == files[1]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[StreamingRows]:
    """A stream for each time that one is opened; blocks are small."""
    streams, open_one = list[StreamingRows](), StreamingRows.open

    def counted(stream: StreamingRows) -> Any:
        streams.append(stream)
        return open_one(stream)

    monkeypatch.setattr(StreamingRows, "open", counted)
    monkeypatch.setattr("vlmembed.search.corpus.STREAM_BLOCK", 4)
    return streams


@pytest.mark.parametrize("role", ["document", pytest.param("query", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    ("build", "kind", "unreadable"),
    [
        (streamed_rows, Rows, 3),
        pytest.param(streamed_elements, Rows, 1, marks=pytest.mark.exhaustive),
        (streamed_images, Rows, 2),
        (streamed_items, Table, 2),
        pytest.param(streamed_some, Table, 0, marks=pytest.mark.exhaustive),
        pytest.param(streamed_pages, Table, 1, marks=pytest.mark.exhaustive),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_stream_makes_the_files_of_rows_in_place(
    build: Any, kind: Any, unreadable: int, role: Role, embedder: Path, tmp_path: Path, opened: list[StreamingRows]
) -> None:
    """Without a row being read more than twice: to know the ids, and to encode; and the first for their columns."""
    path, options = build(tmp_path)
    for name, corpus in (("place", kind(path, **options)), ("stream", StreamingRows(path, **options))):
        with suppress(SystemExit):
            encode(str(embedder), corpus, str(tmp_path / name), role, shard_size=5, window=3)
    assert same_index(tmp_path / "stream", tmp_path / "place")
    assert manifest(tmp_path / "stream")["complete"]
    assert len(opened) == 3
    if role == "document":
        side_file = content(tmp_path / "stream").get("unreadable.jsonl", b"")
        assert len(side_file.splitlines()) == unreadable


def test_a_stream_is_shared_out_and_resumed(
    embedder: Path, tmp_path: Path, opened: list[StreamingRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, options = streamed_images(tmp_path)
    config = {"class_path": "vlmembed.data.StreamingRows", "init_args": {"path": path, **options}}
    Path("encode.yaml").write_text(json.dumps({"model": str(embedder), "corpus": config, "shard_size": 4}))
    words = ["encode", "--config", "encode.yaml", "--output"]
    with pytest.raises(SystemExit, match="2 of the items"):
        main([*words, "one", "--num_workers", "1"])
    named = ["encode", "--model", str(embedder), "--corpus", "vlmembed.data.StreamingRows", "--corpus.path", path]
    with pytest.raises(SystemExit, match="2 of the items"):
        main([*named, "--corpus.columns", json.dumps(options["columns"]), "--shard_size", "4", "--output", "named"])
    assert content(tmp_path / "named") == content(tmp_path / "one")
    for share in ("2/2", "1/2"):
        with suppress(SystemExit):
            main([*words, "several", "--shards", share])
    assert content(tmp_path / "several") == content(tmp_path / "one")
    for number in (1, 3, 4):  # As if it had been killed.
        Path(f"several/shard-0000{number}.parquet").unlink()
    opened.clear()
    with pytest.raises(SystemExit, match="2 of the items"):
        main([*words, "several"])
    assert content(tmp_path / "several") == content(tmp_path / "one")
    assert len(opened) <= 4  # For the columns, the ids, to look at what is done, and for shard 1, which is before.
    with pytest.raises(ValueError, match="looking documents up needs all rows"):
        corpus_of(Index.open("one"), StreamingRows(path, **options))


def test_a_stream_has_no_row_of_a_blank_line(tmp_path: Path, opened: list[StreamingRows]) -> None:
    lines = [json.dumps({"id": n, "text": f"text {n}"}) for n in range(10)]
    path = write_lines(tmp_path / "items.jsonl", [*lines[:6], "", " ", "", "", "", *lines[6:], "", ""])
    corpus = open_corpus(StreamingRows(path), "document")
    assert [corpus.read(row)[0] for row in range(len(corpus))] == [f"{n}" for n in range(10)]
    assert corpus.origin(6) == f"{path}, row 12"
    assert corpus.read(2)[0] == corpus.read(2)[0] == "2"
    assert len(opened) == 4


@pytest.mark.parametrize(
    ("options", "wrap", "message"),
    [
        ({"rows": 4}, None, "rows is 4, which ends an epoch of training"),
        ({}, GroupByQuery, "encoding a GroupByQuery needs all rows"),
        ({"columns": {"id": None}}, None, "column 'text' is unknown"),
        ({"columns": {"it": None}}, None, "no column 'it' to rename or drop"),
        ({"split": "train[:1%]"}, None, "a stream has no slices"),
    ],
    ids=str,
)
def test_what_a_stream_cannot_do_is_refused(
    options: dict[str, Any], wrap: Any, message: str, corpus: str, tmp_path: Path
) -> None:
    stream = StreamingRows(corpus, **options)
    with pytest.raises(ValueError, match=message):
        encode("no model is opened", wrap(stream) if wrap else stream, str(tmp_path / "index"))


def test_a_stream_that_breaks_off_or_changes_is_no_shorter_corpus(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": n, "text": f"text {n}"}) + "\n" for n in range(600))
    path = Path(write_lines(tmp_path / "items.jsonl", [lines]))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-100])
    stream = StreamingRows([str(path), str(tmp_path / "cut.jsonl.gz")])
    with pytest.raises(OSError, match=r"cut.jsonl.gz: the stream broke off after row \d+: .*gz: cannot be dec"):
        scan(open_corpus(stream, "document"))
    corpus = open_corpus(StreamingRows(str(path)), "document")
    scan(corpus)
    path.write_text(lines[: len(lines) // 2])
    with pytest.raises(OSError, match=r"items.jsonl has changed since it was opened; it has fewer rows now"):
        corpus.read(599)


# What is no corpus, or no other things


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "text": "1"}, {"id": "b", "text": "2"}, {"_id": "a", "text": "3"}], "row 3: id 'a' .*row 1"),
        ([{"id": 7, "text": "1"}, {"id": "7", "text": "2"}], "row 2: id '7' is given twice; first at .*row 1"),
        ([{"id": "a", "text": "1"}, {"text": "2"}], "row 2: expected one 'id'"),
        ([{"id": "a", "text": "1"}, {"id": None, "text": "2"}], "row 2, column 'id': an id is a string"),
        ([{"id": "a", "text": "1"}, {"id": " ", "text": "2"}], "row 2, column 'id': id ' ' cannot"),
        ([{"text": "1"}], "row 1: expected one 'id'"),
        ([], "no rows"),
    ],
)
def test_ids_are_checked_before_anything_is_encoded(rows: list[Any], message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "corpus.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        encode("no model is opened", path, str(tmp_path / "index"))


def test_equal_hashes_of_different_ids_are_no_repetition(corpus: str) -> None:
    opened = open_corpus(corpus, "document")
    encoding._refuse_repeated(opened, np.zeros(len(opened), np.uint64))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"precision": "int8"}, "another precision: precision is 'float32' in manifest.json, and now 'int8'"),
        ({"shard_size": 5}, "another shard size"),
        ({"window": 3}, "another window"),
        ({"role": "query"}, "another role"),
        ({"model": "multi_vector"}, "another model"),
        ({"corpus": "text"}, "another corpus"),
        ({"corpus": "id"}, "another corpus"),
        ({"corpus": "less"}, "another corpus"),
        ({"corpus": "image"}, "1.png was written after shard-00000.parquet"),
    ],
    ids=str,
)
def test_what_has_changed_since_the_beginning_is_named(
    changed: dict[str, Any], message: str, embedder: Path, multi_vector: Path, tmp_path: Path, request: Any
) -> None:
    rows = items(tmp_path, 9)
    arguments: dict[str, Any] = {"model": str(embedder), "corpus": jsonl(tmp_path / "corpus.jsonl", rows)}
    arguments |= {"output": str(tmp_path / "index"), "shard_size": 4}
    encode(**arguments)
    (tmp_path / "index/shard-00001.parquet").unlink()  # As if it had been killed.
    before = content(tmp_path / "index")
    if "model" in changed:
        changed = {"model": str(multi_vector)}
    if kind := changed.get("corpus"):
        changed = {}
        if kind == "image":
            picture(48, 48, 99).save(tmp_path / "1.png")
        rows[8] |= {"text": "another text"} if kind == "text" else {"id": "another"} if kind == "id" else {}
        jsonl(tmp_path / "corpus.jsonl", rows[:-1] if kind == "less" else rows)
    with pytest.raises(ValueError, match=message):
        encode(**{**arguments, **changed})
    assert content(tmp_path / "index") == before


def test_what_cannot_be_read_is_named_and_the_others_are_encoded(embedder: Path, tmp_path: Path) -> None:
    rows = items(tmp_path)
    good = jsonl(tmp_path / "good.jsonl", [row for number, row in enumerate(rows) if number not in (3, 4, 5, 10)])
    encode(str(embedder), good, str(tmp_path / "good"))
    (tmp_path / "broken.png").write_bytes(png(1)[:200])
    rows[3] = {"id": "broken", "image": "broken.png"}
    rows[4] = {"id": "missing", "image": "missing.png", "text": "with a text"}
    rows[5] = {"id": "empty", "text": ""}
    lines = [json.dumps(row) for row in rows]
    lines[10] = '{"id": "cut off", "text": "no'
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    arguments = str(embedder), str(tmp_path / "corpus.jsonl"), str(tmp_path / "index")
    for _ in range(2):  # It is the same, and no less an error, if nothing is left to do.
        with pytest.raises(SystemExit, match=r"4 of the items could not be read; .*unreadable.jsonl says which"):
            encode(*arguments, shard_size=10)
        named = [json.loads(line) for line in (tmp_path / "index/unreadable.jsonl").read_text().splitlines()]
        assert [entry["id"] for entry in named] == ["broken", "missing", "empty", None]
        assert [f"row {row}" in entry["origin"] for entry, row in zip(named, (4, 5, 6, 11), strict=True)] == [True] * 4
        for entry, reason in zip(
            named, ("broken.png", "missing.png' does not|missing.png does not", "empty", "not JSON"), strict=True
        ):
            assert re.search(reason, entry["error"]), entry
        assert [entry["shard"] for entry in named] == [0, 0, 0, 1]
    assert manifest(tmp_path / "index")["complete"]
    assert [shard["rows"] for shard in manifest(tmp_path / "index")["shards"]] == [7, 9, 4]
    both = table(tmp_path / "index"), table(tmp_path / "good")
    assert both[0]["id"] == both[1]["id"]
    # Other items beside them, in other batches.
    np.testing.assert_allclose(*(np.array(one["embedding"].to_pylist()) for one in both), rtol=0, atol=1e-5)
    # The way out that the message names.
    (tmp_path / "broken.png").write_bytes(png(1))
    (tmp_path / "missing.png").write_bytes(png(2))
    (tmp_path / "index/shard-00000.parquet").unlink()
    with pytest.raises(SystemExit, match="2 of the items"):
        encode(*arguments, shard_size=10)
    assert table(tmp_path / "index")["id"].to_pylist()[3:5] == ["broken", "missing"]


def test_a_corpus_of_which_nothing_can_be_read_is_an_error(embedder: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "corpus.jsonl", [{"id": n, "image": f"{n}.png"} for n in range(3)])
    with pytest.raises(ValueError, match=r"none of the 3 items could be encoded. The first: .*0.png does not exist"):
        encode(str(embedder), path, str(tmp_path / "index"))
    assert not manifest(tmp_path / "index")["complete"]


def test_numbers_that_are_none_are_an_error(checkpoint: Path, corpus: str, tmp_path: Path) -> None:
    broken = encoder(checkpoint)
    next(iter(broken.backbone.model.get_input_embeddings().parameters())).data[:] = torch.nan
    (tmp_path / "model").mkdir()
    write_folder(broken, tmp_path / "model")
    with pytest.raises(ValueError, match=r"row 1 \(id 'doc 0/ü'\): its embedding has NaN"):
        encode(str(tmp_path / "model"), corpus, str(tmp_path / "index"))
    assert not [*(tmp_path / "index").glob("*.parquet")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shards": "0/4"}, "shards is K/N, with K from 1 to N"),
        ({"shards": "5/4"}, "shards is K/N"),
        ({"shards": "two"}, "shards is K/N"),
        ({"shards": "1/2", "executor": Ray()}, "an executor shares out itself"),
        ({"shard_size": 0}, "1 or more"),
        ({"window": 0}, "1 or more"),
        ({"output": "corpus.jsonl"}, "is a file; output is the folder"),
        ({"output": "others"}, "has Parquet files, and no manifest"),
        ({"corpus": "images", "output": "images/index"}, "is in the folder images"),
        ({"corpus": "nothing.jsonl"}, "no such file"),
        ({"model": "no/where/at/all"}, "no/where/at/all is not there"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(
    arguments: dict[str, Any],
    message: str,
    corpus: str,
    embedder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("others").mkdir()
    Path("others/table.parquet").write_bytes(b"")
    Path("images").mkdir()
    picture(32, 32).save("images/0.png")
    with pytest.raises(ValueError, match=message):
        encode(**{"model": str(embedder), "corpus": "corpus.jsonl", "output": "index", **arguments})


# Whatever happens


def start(**arguments: Any) -> Any:
    """A process that encodes. It is forked from this one, which has imported all that takes seconds."""
    process = FORK.Process(target=encode, kwargs=arguments)
    process.start()
    return process


def kill_when(process: Any, is_time: Callable[[], bool], after: float) -> None:
    """Kill a process, its loader workers are then orphans; unless it has ended before."""
    while process.is_alive() and not is_time():
        time.sleep(0.002)
    time.sleep(after)
    process.kill()
    process.join()


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_killed_at_any_moment_it_leaves_the_same_files(kills: int, embedder: Path, tmp_path: Path) -> None:
    rows = [*items(tmp_path, 160), {"id": "broken", "image": "nowhere.png"}]
    arguments: dict[str, Any] = {"model": str(embedder), "corpus": jsonl(tmp_path / "corpus.jsonl", rows)}
    arguments |= {"shard_size": 8, "num_workers": 1}
    output, random, before, killed = tmp_path / "index", np.random.default_rng(kills), dict[str, int](), 0
    with pytest.raises(SystemExit):
        encode(output=str(tmp_path / "whole"), **arguments)
    for kill in range(kills):
        shards = kill * 20 // kills  # So many are there when it is killed, or one or two more.
        process = start(output=str(output), **arguments)
        kill_when(process, lambda shards=shards: len([*output.glob("*.parquet")]) > shards, random.uniform(0, 0.1))
        killed += process.exitcode == -signal.SIGKILL
        times = {file.name: file.stat().st_mtime_ns for file in output.glob("*.parquet")}
        assert before.items() <= times.items()  # None is written again.
        before = times
    assert killed > kills * 3 // 4  # The others had ended.
    with pytest.raises(SystemExit):
        encode(output=str(output), **arguments)
    assert content(output) == content(tmp_path / "whole")
    assert not [*output.glob(".*.draft")]


#: With which status an encoding ends that is told to: 128 and the signal's number, as shells have it, or by the signal.
STATUS = {signal.SIGINT: 128 + signal.SIGINT, signal.SIGTERM: -signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL}


def words_for(embedder: Path, folder: Path) -> list[str]:
    """A command line whose encoding takes a while."""
    corpus = jsonl(folder / "corpus.jsonl", items(folder, 480))
    return ["encode", f"--model={embedder}", f"--corpus={corpus}", f"--output={folder / 'index'}", "--shard_size=8"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_does(number: signal.Signals, embedder: Path, tmp_path: Path, capfd: Any) -> None:
    process: Any = FORK.Process(target=main, args=(words_for(embedder, tmp_path),))
    process.start()
    while process.is_alive() and not [*(tmp_path / "index").glob("*.parquet")]:
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == STATUS[number]
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "index/shard-00059.parquet").exists()


def test_a_file_that_is_not_whole_is_written_again(embedder: Path, corpus: str, tmp_path: Path) -> None:
    output = tmp_path / "index"
    encode(str(embedder), corpus, str(output), shard_size=10)
    whole = content(output)
    (output / "shard-00001.parquet").write_bytes(whole["shard-00001.parquet"][:500])
    encode(str(embedder), corpus, str(output), shard_size=10)
    assert content(output) == whole


def hold(folder: Path, shares: int, is_held: Any) -> None:
    with encoding._locked(folder, 1, shares):
        is_held.set()
        time.sleep(60)


@pytest.mark.parametrize(("others", "ours", "refused"), [(1, None, True), (2, "1/2", True), (2, "2/2", False)])
def test_one_process_writes_a_folder(
    others: int, ours: str | None, refused: bool, embedder: Path, corpus: str, tmp_path: Path
) -> None:
    is_held = FORK.Event()
    process: Any = FORK.Process(target=hold, args=(tmp_path / "index", others, is_held))
    process.start()
    try:
        assert is_held.wait(60)
        with pytest.raises(ValueError, match="another process is") if refused else nullcontext():
            encode(str(embedder), corpus, str(tmp_path / "index"), shards=ours)
    finally:
        process.kill()


# Several processes


def test_shares_make_the_files_of_one(embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = jsonl(tmp_path / "corpus.jsonl", items(tmp_path, 30))
    encode(str(embedder), corpus, str(tmp_path / "one"), shard_size=4)
    for share in ("2/3", "3/3", "1/3"):
        assert not (tmp_path / "several/manifest.json").exists() or not manifest(tmp_path / "several")["complete"]
        encode(str(embedder), corpus, str(tmp_path / "several"), shard_size=4, shards=share)
    assert "share 3/3 are whole; others are not yet" in capsys.readouterr().out
    assert content(tmp_path / "several") == content(tmp_path / "one")


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, (1, 1)),
        ({"RANK": "0", "WORLD_SIZE": "4"}, (1, 4)),
        ({"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "10"}, (4, 4)),
        ({"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "10"}, (10, 10)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "10"}, (1, 1)),  # A script of sbatch, without srun.
    ],
    ids=str,
)
def test_the_environment_says_which_share(
    environment: dict[str, str], share: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert encoding._share(None) == share
    assert encoding._share("2/5") == (2, 5)


def test_ray_that_is_not_there_is_named(
    embedder: Path, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'needs Ray: pip install "vlmembed\[ray\]"'):
        encode(str(embedder), corpus, str(tmp_path / "index"), executor=Ray())


def test_a_cluster_without_room_is_an_error() -> None:
    """Ray would wait for room without a word."""
    assert Ray(cpus=2, gpus=0.5)._room({"CPU": 9.0, "GPU": 1.0}) == 2
    with pytest.raises(ValueError, match="it has 2 CPU cores and 0 GPUs, and a worker needs 1 and 1"):
        Ray(gpus=1)._room({"CPU": 2.0})


def kill_workers(output: Path, kills: int, killed: list[int]) -> None:
    """Each time that two more shards are there, kill a process of Ray that encodes."""
    for kill in range(kills):
        while len([*output.glob("*.parquet")]) < 2 * kill + 3:
            time.sleep(0.01)
        for process in psutil.process_iter(["cmdline"]):
            if "ray::MapWorker" in " ".join(process.info["cmdline"] or []):
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
                break


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_ray_makes_the_same_files_though_workers_are_killed(
    kills: int, embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # As in this process: rounding depends on it.
    corpus = jsonl(tmp_path / "corpus.jsonl", items(tmp_path, 480))
    encode(str(embedder), corpus, str(tmp_path / "one"), shard_size=8)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    killed: list[int] = []
    threading.Thread(target=kill_workers, args=(tmp_path / "ray", kills, killed), daemon=True).start()
    try:
        encode(str(embedder), corpus, str(tmp_path / "ray"), shard_size=8, executor=Ray(workers=2))
    finally:
        ray.shutdown()
    assert len(killed) == kills
    assert content(tmp_path / "ray") == content(tmp_path / "one")
    assert not [*(tmp_path / "ray").glob(".*.draft")]


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [*STATUS])
def test_ray_is_resumed_at_once_when_its_driver_has_ended(
    number: signal.Signals, embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers end by themselves, and what they write until then are the same files."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words, output = words_for(embedder, tmp_path), tmp_path / "index"
    encode(str(embedder), str(tmp_path / "corpus.jsonl"), str(tmp_path / "one"), shard_size=8)
    command = [sys.executable, "-m", "vlmembed", *words, "--executor=Ray", "--executor.workers=2"]
    driver = subprocess.Popen(command)
    while driver.poll() is None and len([*output.glob("*.parquet")]) < 6:
        time.sleep(0.01)
    children = psutil.Process(driver.pid).children(recursive=True)
    workers = [child for child in children if "MapWorker" in " ".join(child.cmdline())]
    driver.send_signal(number)
    assert driver.wait(30) == STATUS[number]
    subprocess.run(command, check=True)
    assert len(workers) == 2
    assert psutil.wait_procs(workers, 1)[1] == []
    assert content(output) == content(tmp_path / "one")
    assert not [*output.glob(".*.draft")]


PEAK = "import resource, sys; from vlmembed.cli import main; main(sys.argv[1:]); print(resource.getrusage(0).ru_maxrss)"


@pytest.mark.exhaustive
def test_memory_does_not_grow_with_the_corpus(embedder: Path, tmp_path: Path) -> None:
    peaks = []
    for count in (20_000, 200_000):
        rows = ({"id": f"document {number}", "text": f"item {number}"} for number in range(count))
        words = ["encode", "--model", str(embedder), "--corpus", jsonl(tmp_path / f"{count}.jsonl", rows)]
        command = [sys.executable, "-c", PEAK, *words, "--output", str(tmp_path / f"{count}")]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout.split()[-1]))
    assert peaks[1] < peaks[0] * 1.1


# The page


def commands(section: str) -> list[str]:
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [line for line in text.splitlines() if " vlmembed encode " in line]


@pytest.fixture
def place(embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user would be."""
    monkeypatch.chdir(tmp_path)
    Path("my-model").symlink_to(embedder)
    Path("pages").mkdir()
    rows = items(tmp_path / "pages", 9)
    jsonl("corpus.jsonl", [{"id": row["id"], "text": "text", "language": "de"} for row in rows])
    (written,) = re.findall(r"<!-- encode.yaml -->\n```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    Path("encode.yaml").write_text(written)
    return tmp_path


def test_the_commands_of_the_page_run(place: Path) -> None:
    for command in [*commands("Encode"), *(line for line in commands("On a cluster") if "--shards" in line)]:
        main(command.split()[3:])
    assert {path.parent.name for path in place.glob("runs/*/manifest.json")} == {
        *("index", "pages", "german-and-french", "all-pages")
    }
    assert all(manifest(path.parent)["complete"] for path in place.glob("runs/*/manifest.json"))
    assert table("runs/pages")["id"].to_pylist() == [f"{number}.png" for number in range(7)]


#: Runs its command once for each of two tasks, as SLURM would.
SRUN = """#!/usr/bin/env bash
while [ "$1" != -m ]; do shift || exit 1; done
for task in 0 1; do SLURM_PROCID=$task SLURM_STEP_NUM_TASKS=2 PYTHON "$@" || exit 1; done
"""


@pytest.mark.exhaustive
def test_the_commands_of_the_page_run_on_a_cluster(place: Path) -> None:
    Path("srun").write_text(SRUN.replace("PYTHON", sys.executable))
    Path("srun").chmod(0o755)
    replaced = {
        "torchrun --nproc-per-node 8": f"{sys.executable} -m torch.distributed.run --nproc-per-node 2",
        "srun": "./srun",
        "python -m vlmembed": f"{sys.executable} -m vlmembed",
        "--executor.gpus 1": "--executor.workers 1",
    }
    everywhere = [line for line in commands("On a cluster") if "--shards" not in line]
    assert len(everywhere) == 3
    for command in everywhere:
        for words, others in replaced.items():
            command = command.replace(words, others) if words in command and others not in command else command
        run = subprocess.run(f"{command} --shard_size 3".split(), capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        assert manifest("runs/all-pages")["count"] == 7
        shutil.rmtree("runs/all-pages")
