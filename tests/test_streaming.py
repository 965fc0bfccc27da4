"""Rows that are streamed: the same rows as read in place, once per pass, and resumed to the bit."""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import ddp
import pyarrow
import pytest
import torch
import torch.distributed as dist
from building import jsonl, module, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image

from vlmembed.data import (
    EvaluationRows,
    EvaluationTables,
    GroupByQuery,
    ItemCollator,
    Mixture,
    PairCollator,
    RetrievalDataModule,
    Rows,
    StreamingRows,
)
from vlmembed.data.streaming import StreamedBatches, StreamLoader
from vlmembed.media import encode_audio, load_image
from vlmembed.mining import mine, score
from vlmembed.types import BadRow


def write(folder: Path, kind: str, count: int = 600, files: int = 1) -> list[str]:
    rows = [{"q": f"question {number}", "positive": f"ünïcode {number}"} for number in range(count)]
    paths = []
    for number in range(files):
        part, path = rows[number::files], folder / f"{number}.{kind}"
        if kind == "jsonl":
            jsonl(path, part)
        else:
            getattr(datasets.Dataset.from_list(part), f"to_{kind}")(path)
        paths.append(str(path))
    return paths


def loader(rows: StreamingRows, size: int = 8, workers: int = 0, world: int = 1, rank: int = 0) -> StreamLoader:
    readers = max(1, workers)
    batches = StreamedBatches(rows, size, readers * world, readers * rank, distinct=True, skip=False)
    return StreamLoader(batches, 1000, num_workers=workers, collate_fn=keep)


class Read(list):  # type: ignore[type-arg]
    bad_rows = ()


def keep(read: Any) -> Any:
    number, position, rows = read
    return number, position, Read((row, example.query.id, example.positives[0].id) for row, example in rows)


def keep_bad(read: Any) -> Any:
    number, position, rows = read
    return number, position, Read(rows)


def take(read: StreamLoader, count: int) -> list[Any]:
    return [list(batch) for batch in islice(read, count)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_stream_has_the_rows_of_the_file_in_order(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    columns: Any = {"q": "query"}
    local = Rows(path, columns=columns)
    expected = [(n, local[n].query.id, local[n].positives[0].id) for n in range(600)]
    streamed = take(loader(StreamingRows(path, columns=columns, shuffle_buffer=0)), 75)
    assert [row for batch in streamed for row in batch] == expected


@pytest.mark.parametrize("files", [1, 4])
def test_processes_read_each_row_once_in_a_pass(tmp_path: Path, files: int) -> None:
    rows = StreamingRows(write(tmp_path, "jsonl", 2048, files), columns={"q": "query"}, shuffle_buffer=256)
    seen = [row for rank in range(2) for batch in take(loader(rows, world=2, rank=rank), 128) for row in batch]
    assert len({query for _, query, _ in seen}) == len(seen) == 2048
    assert [number for number, *_ in seen[:256]] != sorted(number for number, *_ in seen[:256])


@pytest.mark.parametrize(
    ("workers", "done"),
    [
        (0, 1),
        (0, 33),
        (0, 75),
        (0, 80),
        (2, 33),
        *(pytest.param(2, n, marks=pytest.mark.exhaustive) for n in (1, 75, 80)),
    ],
)
def test_a_resumed_stream_goes_on_with_the_same_rows(tmp_path: Path, workers: int, done: int) -> None:
    rows = StreamingRows(write(tmp_path, "jsonl"), columns={"q": "query"}, shuffle_buffer=100)
    whole = take(loader(rows, workers=workers), 90)
    first = loader(rows, workers=workers)
    before = []
    for batch in first:
        before.append(list(batch))
        if len(before) == done:
            state = first.state_dict()
            break
    resumed = loader(rows, workers=workers)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert before + take(resumed, 90 - done) == whole


def test_another_number_of_workers_is_refused(tmp_path: Path) -> None:
    rows = StreamingRows(write(tmp_path, "jsonl"), columns={"q": "query"})
    with pytest.raises(ValueError, match="Resume with the same devices and num_workers"):
        loader(rows, workers=2).load_state_dict(loader(rows).state_dict())


class Queries(Callback):
    """Keeps the queries that a process trains on."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.ids += batch.query_ids.tolist()


def check_resumed(checkpoint: Path, paths: list[str], folder: Path, workers: int = 0, steps: int = 2) -> list[int]:
    """Resume before the last step; return the queries that this process trained on without interruption."""

    def run(resume: Path | None = None) -> Any:
        torch.manual_seed(0)
        rows = StreamingRows(paths, columns={"q": "query"}, shuffle_buffer=16)
        data = RetrievalDataModule(rows, batch_size=2, num_workers=workers)
        model = module(checkpoint)
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        queries = Queries()
        together: Any = {"enable_checkpointing": True, "callbacks": [saving, queries], "max_epochs": -1}
        if dist.is_initialized():
            together |= {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
        trainer(max_steps=steps, **together).fit(model, datamodule=data, ckpt_path=resume)
        return model, queries.ids

    whole, queries = run()
    resumed, rest = run(folder / f"step={steps - 1}.ckpt")
    assert rest == queries[-2:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    return queries


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(
    checkpoint: Path, tmp_path: Path, workers: int
) -> None:
    check_resumed(checkpoint, write(tmp_path, "jsonl", 1024), tmp_path, workers)


@pytest.mark.parametrize("files", [2, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.exhaustive
def test_two_processes_resume_with_the_same_bits(checkpoint: Path, tmp_path: Path, files: int) -> None:
    paths = write(tmp_path, "jsonl", 256, files)
    if files == 2:  # Of each block of 16 lines, the first file has one batch of 2, the other 8.
        first = Path(paths[0]).read_text().splitlines()
        Path(paths[0]).write_text("".join(line * (number % 16 < 2) + "\n" for number, line in enumerate(first)))
    first, second = map(set, ddp.run(check_resumed, checkpoint, paths, tmp_path, 0, 3))
    assert (len(first), len(second), first & second) == (6, 6, set())
    if files == 2:
        loops = torch.load(tmp_path / "step=2.ckpt", weights_only=False)["loops"]
        (saved,) = loops["fit_loop"]["state_dict"]["combined_loader"]
        positions = [position for (position,) in saved["positions"]]
        assert [(position["row"], position["batches"]) for position in positions] == [(16, 1), (0, 2)]


def test_an_epoch_begins_where_the_last_one_ended(checkpoint: Path, tmp_path: Path) -> None:
    rows = StreamingRows(write(tmp_path, "jsonl", 64), columns={"q": "query"}, rows=8)
    queries = Queries()
    fitted = trainer(max_epochs=3, max_steps=-1, callbacks=[queries])
    fitted.fit(module(checkpoint), datamodule=RetrievalDataModule(rows, batch_size=4, num_workers=0))
    assert (fitted.global_step, len({*queries.ids})) == (6, 24)


def test_where_and_each_work_row_by_row(tmp_path: Path) -> None:
    lines = [{"query": f"q{n}", "positive": [f"a{n}", f"b{n}"], "kind": n % 2} for n in range(40)]
    path = jsonl(tmp_path / "rows.jsonl", lines)
    options: Any = {"cells": {"query": {"text": "{positive} {query}"}, "positive": "positive"}}
    options |= {"where": {"kind": 1}, "each": "positive"}
    local = Rows(path, **options)
    streamed = take(loader(StreamingRows(path, shuffle_buffer=0, **options)), 5)
    expected = [local[n].query.id for n in range(40)]
    assert [query for batch in streamed for _, query, _ in batch] == expected


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    lines = [{"query": f"q{n}", "positive": f"a{n}" if n != 17 else ""} for n in range(40)]
    path = jsonl(tmp_path / "rows.jsonl", lines)
    with pytest.raises(ValueError, match=r"rows.jsonl, row 18, column 'positive': the cell is empty"):
        take(loader(StreamingRows(path, shuffle_buffer=0)), 5)


def test_cells_of_several_types_and_blank_lines_are_as_in_a_file(tmp_path: Path) -> None:
    """Of JSON, a cell may be a string in one row and a mapping in the next; Arrow has one type per column."""
    path = tmp_path / "rows.jsonl"
    lines = [{"query": f"q{n}", "positive": [f"a{n}", {"text": "b\u2028c"}] if n % 2 else f"a{n}"} for n in range(40)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n")
    Path(tmp_path, "same.jsonl").write_text(text)
    local = Rows(str(tmp_path / "same.jsonl"))
    expected = [(n, local[n].query.id, local[n].positives[0].id) for n in range(40)]
    streamed = take(loader(StreamingRows(str(path), shuffle_buffer=0)), 5)
    assert [row for batch in streamed for row in batch] == expected


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"query": "caf\xe9", "positive": "x"}', b'{"query": "x"}'])
def test_bad_lines_are_left_out_once_each(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"query": f"q{n}", "positive": f"a{n}"}).encode() for n in range(300)]
    lines[255] = line
    path.write_bytes(b"\n".join(lines))
    batches = StreamedBatches(StreamingRows(str(path)), 10, 1, 0, distinct=True, skip=True)
    read = StreamLoader(batches, 30, collate_fn=keep_bad)
    rows = [row for batch in read for row in batch]
    (bad,) = [row for row in rows if isinstance(row, BadRow)]
    assert len(rows) == 300
    assert bad.row == 256
    assert f"{path}, row 256" in bad.reason


@pytest.mark.parametrize("blank", [1, 1500])
def test_blank_lines_may_come_first(tmp_path: Path, blank: int) -> None:
    (path,) = write(tmp_path, "jsonl", 20)
    text = Path(path).read_text()
    Path(path).write_text("\n" * blank + text.replace("\n", "\n \n"))
    rows = StreamingRows(path, columns={"q": "query"})
    RetrievalDataModule(rows).setup("fit")
    assert rows.column_names == ["query", "positive"]
    assert rows.origins([0, 9]) == [f"{path}, row {blank + number}" for number in (1, 19)]


@pytest.mark.parametrize("wrap", [lambda rows: [rows, rows], GroupByQuery, lambda rows: Mixture([rows], losses=["a"])])
def test_a_stream_is_trained_on_alone(tmp_path: Path, wrap: Any) -> None:
    rows = StreamingRows(write(tmp_path, "jsonl"), columns={"q": "query"})
    with pytest.raises(ValueError, match="a stream is trained on alone"):
        RetrievalDataModule(wrap(rows)).setup("fit")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rows: rows,
        EvaluationRows,
        lambda rows: [EvaluationRows(Mixture([GroupByQuery(rows)]))],
        lambda rows: EvaluationTables(rows, rows),
    ],
)
@pytest.mark.parametrize("collator", [lambda: ItemCollator(None), lambda: PairCollator(None, None)])
def test_a_stream_is_not_measured_on(tmp_path: Path, wrap: Any, collator: Any) -> None:
    path = write(tmp_path, "jsonl")
    data = RetrievalDataModule(None, val=wrap(StreamingRows(path, columns={"q": "query"})))
    data.collator = collator()
    message = r"0\.jsonl.*: a stream is for training, and a measurement needs all rows\. Give the path itself"
    with pytest.raises(ValueError, match=message):
        data.setup("validate")


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3 + number % 5, 4), (number, 0, 255)).save(file, "png")
    return file.getvalue()


IMAGE, BINARY, LARGE = datasets.Image(decode=False), datasets.Value("binary"), datasets.Value("large_binary")
#: Types of a column, and what a row has in it, by the row's number.
MEDIA: dict[str, tuple[Any, Any]] = {
    "struct": (IMAGE, lambda n: {"bytes": encoded(n), "path": f"{n}.png"}),
    "plain": (BINARY, encoded),
    "large": (LARGE, encoded),
    "list": (datasets.List(IMAGE), lambda n: [{"bytes": encoded(k), "path": None} for k in range(n % 3 + 1)]),
    "list of plain": (datasets.List(LARGE), lambda n: [encoded(k) for k in range(n % 3 + 1)]),
    "fixed": (datasets.List(IMAGE, length=2), lambda n: [{"bytes": encoded(k), "path": None} for k in (n, n + 1)]),
    "text or image": (
        {"text": datasets.Value("string"), "image": IMAGE},
        lambda n: {"text": f"t{n}", "image": {"bytes": encoded(n), "path": None} if n % 2 else None},
    ),
    "nested": (
        {"text": datasets.Value("string"), "image": datasets.List(BINARY)},
        lambda n: {"text": f"t{n}", "image": [encoded(k) for k in range(n % 3)] if n % 4 else None},
    ),
    "audio": (BINARY, lambda n: encode_audio([0.0, n / 400] * 800, 16000)),
    "some empty": (IMAGE, lambda n: {"bytes": encoded(n), "path": None} if n % 50 else None),
}


@pytest.mark.parametrize("kind", MEDIA)
def test_media_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    """Though their bytes are not copied; without shuffling and with it, each row once."""
    feature, make = MEDIA[kind]
    path = str(tmp_path / "rows.parquet")
    data = {"query": [f"q{n}" for n in range(300)], "positive": [make(n) for n in range(300)]}
    features = datasets.Features({"query": datasets.Value("string"), "positive": feature})
    datasets.Dataset.from_dict(data, features=features).to_parquet(path, batch_size=70)
    RetrievalDataModule(StreamingRows(path)).setup("fit")
    local = Rows(path)
    for buffer in (0, 100):
        rows = StreamingRows(path, shuffle_buffer=buffer)
        batches = StreamedBatches(rows, 10, 1, 0, distinct=False, skip=True)
        read = [row for batch in islice(StreamLoader(batches, 30, collate_fn=keep_bad), 30) for row in batch]
        bad = {row.row - 1 for row in read if isinstance(row, BadRow)}
        assert bad == ({*range(0, 300, 50)} if kind == "some empty" else set())
        examples = dict(row for row in read if not isinstance(row, BadRow))
        assert {*examples} | bad == {*range(300)}
        for number, example in examples.items():
            expected = local[number]
            assert example == expected
            assert (example.query.id, example.positives[0].id) == (expected.query.id, expected.positives[0].id)
            assert example.positives[0].origin == expected.positives[0].origin
            for part in example.positives[-1].parts:
                if part.kind == "image":
                    assert isinstance(part.value, memoryview)
                    load_image(part.value)


@pytest.mark.parametrize(("command", "use"), [(mine, "mining"), (score, "scoring")])
@pytest.mark.parametrize("wrap", [lambda rows: rows, GroupByQuery, lambda rows: Mixture([GroupByQuery(rows)])])
def test_a_stream_is_neither_mined_nor_scored(tmp_path: Path, command: Any, use: str, wrap: Any) -> None:
    rows = wrap(StreamingRows(write(tmp_path, "jsonl"), columns={"q": "query"}))
    with pytest.raises(ValueError, match=rf"0\.jsonl: a stream is for training, and {use} needs all rows\. Give the"):
        command("no model", rows, str(tmp_path / "output.jsonl"))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("wrap", [lambda path: path, lambda path: str(Path(path).parent)])
def test_a_line_above_the_limit_is_refused_as_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, wrap: Any
) -> None:
    """Also of the rows that no check looks at, and of a folder's files; a line of the limit's size is read."""
    monkeypatch.setattr("vlmembed.data.records.MAX_LINE_BYTES", 100)
    lines = [json.dumps({"query": f"q{n}", "positive": "é"}, ensure_ascii=False).encode() for n in range(300)]
    lines[290] = lines[290].ljust(99)
    for size, message in ((0, None), (100, "row 280: the line has more than")):
        folder = tmp_path / str(size)
        folder.mkdir()
        lines[279] = lines[279].ljust(size)
        path = str(folder / f"rows.jsonl{ending}")
        with pyarrow.output_stream(path) as file:  # Which compresses by the ending.
            file.write(b"\n".join(lines))
        read = loader(StreamingRows(wrap(path), shuffle_buffer=0), size=100)
        if message is None:
            assert [n for batch in take(read, 3) for n, *_ in batch] == [*range(300)]
        else:
            with pytest.raises(ValueError, match=rf"^{path}, {message}"):
                take(read, 3)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_stream_that_was_cut_off_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    text = "".join(json.dumps({"query": f"q{n} {n**99}", "positive": f"a{n}"}) + "\n" for n in range(300))
    with pyarrow.output_stream(path) as file:
        file.write(text.encode())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"^{path}: cannot be decompressed: .*Is the file whole"):
        take(loader(StreamingRows(str(path))), 30)


def test_names_of_files_are_no_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]"
    folder.mkdir()
    for kind in ("jsonl", "parquet"):
        rows = StreamingRows(write(folder, kind), columns={"q": "query"}, shuffle_buffer=0)
        assert [n for batch in take(loader(rows), 2) for n, *_ in batch] == [*range(16)]


def test_a_run_leaves_out_a_bad_row_of_a_stream(checkpoint: Path, tmp_path: Path) -> None:
    (path,) = write(tmp_path, "jsonl", 20)
    lines = Path(path).read_text().splitlines()
    lines[2] = '{"q": "question 2", "positive": " "}'
    Path(path).write_text("\n".join(lines))
    rows, queries = StreamingRows(path, columns={"q": "query"}, shuffle_buffer=0), Queries()
    data = RetrievalDataModule(rows, batch_size=4, num_workers=0, on_bad_row="skip")
    with pytest.warns(UserWarning, match="Left out of training: .*0.jsonl, row 3, column 'positive': the"):
        trainer(max_steps=2, callbacks=[queries], default_root_dir=tmp_path).fit(module(checkpoint), datamodule=data)
    assert len(set(queries.ids)) == 7
    (bad,) = map(json.loads, (tmp_path / "bad_rows.jsonl").read_text().splitlines())
    assert bad["row"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train[:10%]"}, "a stream has no slices"),
        ({"columns": {"qq": "query"}}, "no column 'qq' to rename or drop"),
        ({"revision": "main"}, "a file has none"),
        ({"shuffle_buffer": -1}, "shuffle_buffer is 0 or more"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrievalDataModule(StreamingRows(write(tmp_path, "jsonl"), **options)).setup("fit")


def test_a_run_without_an_end_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    data = RetrievalDataModule(StreamingRows(write(tmp_path, "jsonl"), columns={"q": "query"}), batch_size=2)
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        trainer(max_epochs=1, max_steps=-1).fit(module(checkpoint), datamodule=data)
