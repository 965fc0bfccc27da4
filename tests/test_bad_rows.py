"""With ``on_bad_row: skip``, what cannot be used is left out and written down, and nothing else is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import building
import ddp
import pytest
import torch
import yaml
from building import Recorder as LossRecorder
from building import call, lists, module, picture, relative_difference, run_config
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_datamodule import Letters, Recorder, trainer
from torch.optim import SGD

from vlmembed.backbones import Qwen3VL
from vlmembed.data import ItemCollator, Mixture, PairCollator, RetrievalDataModule, Rows, Source
from vlmembed.losses import LabelSpec
from vlmembed.modules import CrossEncoderModule
from vlmembed.training.guards import BadRowFile, SkipBadRows
from vlmembed.types import BadRow, Example, Inputs, Item, Part

#: What is wrong with each, and what is said of it. Row 3 in every file.
BAD = {
    "not JSON": ('{"query": "q"', "row 3: not JSON"),
    "no object": ("[1, 2]", "row 3: expected a JSON object"),
    "nested": ("[" * 100_000, "row 3: not JSON"),
    "not UTF-8": (b'{"query": "\xff", "positive": "p"}', "row 3: not JSON"),
    "lacks a column": ('{"query": "q"}', "row 3 lacks column 'positive'"),
    "query of a wrong type": ('{"query": 7, "positive": "p"}', "row 3, column 'query': expected a string"),
    "empty query": ('{"query": " ", "positive": "p"}', "row 3, column 'query': the text is empty"),
    "half a character": ('{"query": "\\ud83d", "positive": "p"}', "row 3, column 'query': the text .* no character"),
    "image gone": ('{"query": "q", "positive": {"image": "gone.png"}}', "row 3, column 'positive': .*does not exist"),
    "refused": ('{"query": "q", "positive": "unreadable"}', "row 3, column 'positive': cannot be read"),
}


class Fussy(Letters):
    """Refuses a text as the real one refuses an image."""

    def __call__(self, items: Sequence[Item]) -> Inputs:
        for item in items:
            if "unreadable" in str(item.parts[0].value):
                raise ValueError(f"{item.origin}: cannot be read")
        return super().__call__(items)


def recorder() -> Recorder:
    made = Recorder()
    made.preprocessor = Fussy()
    return made


def write(path: Path, size: int, bad: dict[int, str | bytes], mark: str = "") -> str:
    """Write rows, and others in the place of some of them."""
    good = [json.dumps({"query": f"{mark}q{k}", "positive": f"{mark}answer {k}"}) for k in range(size)]
    lines = [bad.get(k, line) for k, line in enumerate(good)]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return str(path)


def ids(path: str) -> dict[int, int]:
    """Of every row that can be read, from 1 on, the id of its query."""
    found = {}
    for index in range(len(Rows(path))):
        try:
            found[index + 1] = Rows(path)[index].query.id
        except ValueError:
            continue
    return found


def left_out(folder: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    assert len({line["row"] for line in lines}) == len(lines)
    return {line["row"]: line["reason"] for line in lines}


@pytest.mark.filterwarnings("ignore:Left out")
@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in BAD), ("not JSON", 2), ("refused", 2)])
def test_a_bad_row_is_left_out_and_the_others_of_its_batch_stay(tmp_path: Path, kind: str, workers: int) -> None:
    line, reason = BAD[kind]
    path = write(tmp_path / "train.jsonl", 12, {2: line})
    model = recorder()
    data = RetrievalDataModule(path, batch_size=4, num_workers=workers, on_bad_row="skip", max_bad_rows=1)
    trainer(tmp_path, max_epochs=2).fit(model, datamodule=data)
    good = {row: query for row, query in ids(path).items() if row != 3}
    assert len(good) == 11
    for start in (0, 3):
        epoch = model.trained[start : start + 3]
        assert sorted(map(len, epoch)) == [3, 4, 4]
        assert {*chain(*epoch)} == {*good.values()}
    ((row, said),) = left_out(tmp_path).items()
    assert row == 3
    assert said.startswith(f"{path}, row 3")
    with pytest.raises(ValueError, match=reason):
        raise ValueError(said)


@pytest.mark.filterwarnings("ignore:Left out")
def test_rows_are_numbered_over_all_sources(tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", 6, {1: BAD["not JSON"][0]})
    second = write(tmp_path / "second.jsonl", 10, {4: BAD["refused"][0]}, "other ")
    data = RetrievalDataModule(Mixture([Rows(first), Rows(second)]), batch_size=8, on_bad_row="skip")
    trainer(tmp_path, max_epochs=3).fit(recorder(), datamodule=data)
    found = left_out(tmp_path)
    assert {*found} == {2, 6 + 5}
    assert found[2].startswith(f"{first}, row 2: not JSON")
    assert found[11].startswith(f"{second}, row 5, column 'positive'")


def test_too_many_bad_rows_stop_the_run_and_a_restart_does_not_forget(tmp_path: Path) -> None:
    bad = {k: BAD["not JSON"][0] for k in (1, 5, 7)}
    path = write(tmp_path / "train.jsonl", 12, bad)

    def run(limit: int) -> None:
        data = RetrievalDataModule(path, batch_size=4, num_workers=0, on_bad_row="skip", max_bad_rows=limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(tmp_path, max_epochs=1).fit(recorder(), datamodule=data)

    for _ in range(2):
        with pytest.raises(ValueError, match=rf"more than max_bad_rows=2\. {tmp_path}/bad_rows\.jsonl has them all"):
            run(2)
    assert {*left_out(tmp_path)} == {2, 6, 8}
    run(3)
    assert {*left_out(tmp_path)} == {2, 6, 8}
    (tmp_path / "bad_rows.jsonl").write_text(json.dumps({"row": 100, "reason": "of before"}) + "\n")
    with pytest.raises(ValueError, match="4 training rows cannot be used"):
        run(3)


def test_a_batch_of_nothing_is_refused_in_words(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", 4, {k: BAD["image gone"][0].replace("q", f"q{k}", 2) for k in (1, 2, 3)})
    data = RetrievalDataModule(path, batch_size=1, num_workers=0, on_bad_row="skip")
    with pytest.raises(ValueError, match=r"None of the 1 rows of a batch can be used, .* The first: .*row [234]"):
        trainer(tmp_path, max_epochs=1).fit(recorder(), datamodule=data)


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_the_command_line_trains_on_the_rest(checkpoint: Path, here: Path) -> None:
    write(here / "train.jsonl", 12, {2: BAD["image gone"][0], 7: BAD["not JSON"][0]})
    config = run_config(checkpoint, train="train.jsonl", batch_size=4, on_bad_row="skip") | {"seed_everything": 0}
    config["trainer"] |= {"max_epochs": 2, "exporter": None}
    config["data"]["init_args"]["num_workers"] = 1
    call("fit", config)
    (folder,) = Path("runs/run").iterdir()
    assert {*left_out(folder)} == {3, 8}
    assert [*folder.rglob("*.ckpt")]
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]["max_bad_rows"] == 100
    config["data"]["init_args"]["max_bad_rows"] = 1
    with pytest.raises(ValueError, match=r"max_bad_rows=1\. runs/run/version_1/bad_rows\.jsonl has them all"):
        call("fit", config)


# What is no row's fault


class Faulty(Source):
    """Raises what it is given for one row, and kills its process if that is a signal."""

    def __init__(self, error: Any) -> None:
        self.error = error

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Example:
        if index == 5:
            if isinstance(self.error, signal.Signals):
                os.kill(os.getpid(), self.error)
            raise self.error
        query, answer = (
            Item(role, (Part("text", f"{role} {index}"),), f"row {index}") for role in ("query", "document")
        )
        return Example(query, (answer,))

    def read_queries(self, indices: Sequence[int]) -> list[Item]:
        return [Item("query", (Part("text", f"query {index}"),)) for index in indices]


@pytest.mark.parametrize("error", [TypeError("a bug"), MemoryError("no memory"), OSError("the disk")], ids=repr)
@pytest.mark.parametrize("workers", [0, 1])
def test_only_a_rows_own_fault_is_skipped(tmp_path: Path, error: Exception, workers: int) -> None:
    data = RetrievalDataModule(Faulty(error), batch_size=4, num_workers=workers, on_bad_row="skip")
    with pytest.raises(type(error), match=str(error)):
        trainer(tmp_path, max_epochs=1).fit(recorder(), datamodule=data)


def test_what_is_wrong_with_the_configuration_is_not_skipped(checkpoint: Path) -> None:
    """The error names no row, although one row is tried by itself."""
    preprocessor = Qwen3VL(str(checkpoint), max_length=3).make_preprocessor()
    collate = ItemCollator(preprocessor)
    with pytest.raises(ValueError, match=r"^max_length=3 has no room for a text"):
        SkipBadRows(collate, collate.check)([*enumerate([Faulty(None)[0], Faulty(None)[1]])])


@pytest.mark.parametrize("killed_by", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_ends_the_run_at_once(tmp_path: Path, killed_by: signal.Signals) -> None:
    data = RetrievalDataModule(Faulty(killed_by), batch_size=4, num_workers=2, on_bad_row="skip")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.* \d+\) (is killed by|exited unexpectedly)"):
        trainer(tmp_path, max_epochs=1).fit(recorder(), datamodule=data)
    assert time.monotonic() - start < 30


# While training runs


class Between(Callback):
    """Does something after the first epoch."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            self.change()


class Looking(Letters):
    """Looks at images, as a worker does, when the row has been read."""

    def __call__(self, items: Sequence[Item]) -> Inputs:
        for item in items:
            for part in item.parts:
                if isinstance(part.value, Path) and not part.value.read_bytes().startswith(b"\x89PNG"):
                    raise ValueError(f"{item.origin}: cannot read the image {part.value}")
        return super().__call__(items)


@pytest.mark.filterwarnings("ignore:Left out")
@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b"other")], ids=["gone", "replaced"])
@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_an_image_that_vanishes_is_named(tmp_path: Path, change: Any, on_bad_row: Any) -> None:
    picture(8, 8).save(tmp_path / "page.png")
    path = write(tmp_path / "train.jsonl", 8, {3: '{"query": "q3", "positive": {"image": "page.png"}}'})
    model = recorder()
    model.preprocessor = Looking()
    data = RetrievalDataModule(path, batch_size=4, num_workers=0, on_bad_row=on_bad_row)
    fit = trainer(tmp_path, max_epochs=2, callbacks=[Between(lambda: change(tmp_path / "page.png"))])
    if on_bad_row == "raise":
        with pytest.raises(ValueError, match=r"train\.jsonl, row 4, column 'positive': .*page\.png"):
            fit.fit(model, datamodule=data)
    else:
        fit.fit(model, datamodule=data)
        assert "page.png" in left_out(tmp_path)[4]
    assert sum(map(len, model.trained[:2])) == 8


@pytest.mark.parametrize(
    "change",
    [
        Path.unlink,
        lambda path: write(path, 12, {}, "x"),
        lambda path: path.open("a").write("\n"),
        lambda path: os.truncate(path, 100),
    ],
    ids=["gone", "others", "appended", "cut"],
)
@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_a_table_that_changes_stops_the_run(tmp_path: Path, change: Any, on_bad_row: Any) -> None:
    """Rows are read by their places in the file: of another file, other rows would be trained on."""
    path = tmp_path / "train.jsonl"
    write(path, 12, {})
    data = RetrievalDataModule(str(path), batch_size=4, num_workers=0, on_bad_row=on_bad_row)
    fit = trainer(tmp_path, max_epochs=3, callbacks=[Between(lambda: change(path))])
    with pytest.raises(OSError, match=rf"{path}, row \d+: cannot be read: .*(has changed since|No such file)"):
        fit.fit(recorder(), datamodule=data)


# Restarts and processes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_resumed_run_leaves_out_the_same(tmp_path: Path, stop_after: int) -> None:
    path = write(tmp_path / "train.jsonl", 12, {2: BAD["empty query"][0], 7: BAD["refused"][0]})

    def data() -> RetrievalDataModule:
        return RetrievalDataModule(path, batch_size=4, num_workers=1, on_bad_row="skip")

    whole, resumed = recorder(), recorder()
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    trainer(tmp_path, max_epochs=2, callbacks=[saver]).fit(whole, datamodule=data())
    before = (tmp_path / "bad_rows.jsonl").read_bytes()
    trainer(tmp_path, max_epochs=2).fit(resumed, datamodule=data(), ckpt_path=tmp_path / f"step={stop_after}.ckpt")
    assert resumed.trained == whole.trained[stop_after:]
    assert (tmp_path / "bad_rows.jsonl").read_bytes() == before


def train(checkpoint: Path, folder: Path, path: str) -> LossRecorder:
    """Train on two processes, or alone with batches of twice the size."""
    warnings.simplefilter("ignore")
    parallel = ddp.strategy()
    torch.manual_seed(0)
    recorder = LossRecorder()
    data = RetrievalDataModule(path, batch_size=3 if parallel else 6, num_workers=0, on_bad_row="skip")
    options = {"default_root_dir": folder, "callbacks": [recorder], "max_epochs": 2, "log_every_n_steps": 1}
    building.trainer(**options, **parallel).fit(module(checkpoint, optimizer=partial(SGD, lr=0.01)), datamodule=data)
    return recorder


def test_two_processes_train_as_one_on_what_is_left(checkpoint: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", 12, {2: BAD["empty query"][0], 7: BAD["image gone"][0]})
    alone = train(checkpoint, tmp_path / "alone", path)
    one, other = ddp.run(train, checkpoint, tmp_path / "both", path)
    assert one.losses == other.losses
    # The logits are about 20, so float32 rounds each by some 1e-6, and so it does their differences, the losses.
    assert one.losses == pytest.approx(alone.losses, rel=0, abs=2e-6)
    assert relative_difference(one.update(4), alone.update(4)) < 1e-5
    assert left_out(tmp_path / "both") == left_out(tmp_path / "alone")
    assert {*left_out(tmp_path / "both")} == {3, 8}


def add(folder: Path, process: int, together: Any) -> None:
    warnings.simplefilter("ignore")
    read = Path.read_text

    def slowly(*arguments: Any, **options: Any) -> str:
        content = read(*arguments, **options)
        time.sleep(0.002)  # For another process to write meanwhile.
        return content

    Path.read_text = slowly  # type: ignore[method-assign]
    file = BadRowFile(folder, 10_000)
    for number in range(100):
        together.wait(60)
        # Half of the rows are everybody's.
        row = number if number % 2 else process * 1000 + number
        file.add([BadRow(row, f"a reason of more than {row} words. " * 20)])


def test_processes_share_the_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    together = context.Barrier(4)
    processes = [context.Process(target=add, args=(tmp_path / "run", number, together)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    own = {process * 1000 + number for process in range(4) for number in range(0, 100, 2)}
    assert {*left_out(tmp_path / "run")} == own | {*range(1, 100, 2)}


def test_a_line_that_was_cut_short_harms_no_other(tmp_path: Path) -> None:
    whole = '{"row": 1, "reason": "x"}\n'
    (tmp_path / "bad_rows.jsonl").write_text(whole + '{"row": 2, "rea')
    file = BadRowFile(tmp_path, 9)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            file.add([BadRow(2, "y"), BadRow(1, "x")])
    assert [str(warning.message).startswith("Left out of training: y") for warning in said] == [True]
    assert (tmp_path / "bad_rows.jsonl").read_text() == whole + '{"row": 2, "rea\n{"row": 2, "reason": "y"}\n'


# Cross-encoders


@pytest.mark.parametrize("negatives", [0, 3])
def test_of_pairs_only_the_row_at_fault_is_left_out(checkpoint: Path, negatives: int) -> None:
    """A document that cannot be read is a wrong answer to other queries too, and the error names both."""
    rows = lists()
    strip = Item("document", (Part("image", picture(1, 400)),), "row 3, column 'positive'")
    bad = Example(Item("query", (Part("text", "strip"),), "row 3"), (strip,), (Item("document", (Part("text", "a"),)),))
    model = CrossEncoderModule(Qwen3VL(str(checkpoint)), loss=torch.nn.Identity())  # type: ignore[arg-type]
    collate = PairCollator(model.preprocessor, LabelSpec(needs_several=True), negatives)
    single = Example(Item("query", (Part("text", "single"),), "row 7"), (rows[0].positives[0],))
    given = [*rows[:2], bad, *rows[2:], *([single] if negatives else [])]
    batch = SkipBadRows(collate, collate.check)([*enumerate(given)])
    assert [(row.row, "aspect ratio" in row.reason) for row in batch.bad_rows] == [(3, True)]
    expected = collate([example for example in given if example is not bad])
    for name in ("queries", "documents", "targets"):
        assert torch.equal(getattr(batch, name), getattr(expected, name))
    with pytest.raises(ValueError, match="aspect ratio"):
        collate(given)


@pytest.mark.parametrize("kind", BAD)
def test_of_evaluation_sets_nothing_is_left_out(tmp_path: Path, kind: str) -> None:
    """A metric over fewer rows is another metric."""
    line, reason = BAD[kind]
    path = write(tmp_path / "val.jsonl", 6, {2: line})
    data = RetrievalDataModule(val=path, num_workers=0, on_bad_row="skip")
    with pytest.raises(ValueError, match=reason):
        trainer(tmp_path).validate(recorder(), datamodule=data)


def test_bad_options_are_refused() -> None:
    for options in ({"on_bad_row": "ignore"}, {"max_bad_rows": -1}):
        with pytest.raises(ValueError, match="on_bad_row is raise or skip, max_bad_rows 0 or more"):
            RetrievalDataModule("train.jsonl", **options)
