"""Whatever is wrong with rows, each is in a batch, or named as bad: nothing is lost, and nothing hangs.

At random, and with one of each input of ``experiments/survival``, whose table must stay true.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import building
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from building import picture
from lightning.pytorch.callbacks import Callback
from test_datamodule import Recorder, trainer

from vlmembed.backbones import Qwen3VL
from vlmembed.data import ItemCollator, RetrievalDataModule, Rows
from vlmembed.types import Batch, Preprocessor

SURVIVAL = Path(__file__).parent.parent / "experiments" / "survival"
sys.path.append(str(SURVIVAL))

import bad_inputs  # noqa: E402
from inputs import TABLE  # noqa: E402

#: Rows per file.
ROWS = 320
BATCH = 20

#: What a cell may be; not what takes seconds to make.
CELLS = [each for inputs in TABLE.values() for each in inputs if not re.search("MB|MiB", each.name)]

Random = np.random.Generator


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Fail rather than hang."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def preprocessor(checkpoint: Path) -> Preprocessor:
    return Qwen3VL(str(checkpoint), max_length=256).make_preprocessor()


# One of each


@pytest.fixture(scope="module")
def found(preprocessor: Preprocessor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What becomes of each input."""
    with limited(120):
        endings = bad_inputs.outcomes(preprocessor, tmp_path_factory.mktemp("inputs"))
        return {f"{kind}: {each.name}": ending for kind, each, ending in endings}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TABLE)
def test_each_input_ends_as_it_should(kind: str, found: dict[str, str]) -> None:
    for each in TABLE[kind]:
        ending = found[f"{kind}: {each.name}"]
        assert ending.startswith(f"works: {each.words}" if each.like else "refused: "), each.name


def test_the_table_is_true(found: dict[str, str]) -> None:
    """Inputs and how they end; the sentences may be Pillow's, and differ by version."""
    lines = (SURVIVAL / "README.md").read_text().splitlines()
    table = [re.match(r"\| (\w+: .*?) \| (works: .*|refused)", line) for line in lines if re.match(r"\| \w+: ", line)]
    said = {row[1]: row[2].removesuffix(" |") for row in table if row}
    expected = {f"{kind.lower()}: {each.name}": each for kind, inputs in TABLE.items() for each in inputs}
    assert said == {name: f"works: {each.words}" if each.like else "refused" for name, each in expected.items()}


@pytest.mark.filterwarnings("ignore")
def test_generated_files_and_rows_are_refused_by_name_or_read_as_their_plain_equivalent(
    preprocessor: Preprocessor, tmp_path: Path
) -> None:
    """A small part of the 10,000 of ``experiments/survival``, from another seed."""
    endings = bad_inputs.generated(preprocessor, tmp_path, 120, seed=1)
    assert {ending for _, ending in endings} == {"refused", "works"}
    assert sum(endings.values()) == 120
    assert len({kind for kind, _ in endings}) == 12


# At random


def any_cell(random: Random, folder: Path, number: int, depth: int = 0) -> Any:
    """Return a cell of any form and kind, with its files, most of them as they should be."""
    name = f"{number}-{random.integers(10**9)}"
    if random.random() < 0.15:
        each = CELLS[random.integers(len(CELLS))]
        place = folder / name
        place.mkdir()
        made = each.make(place)
        if not isinstance(made, bytes) and not (isinstance(made, dict) and "query" in made):
            return moved(made, name)
    forms: list[Callable[[], Any]] = [
        lambda: f"text {number}",
        lambda: {"text": f"text {number}"},
        lambda: {"image": image(random, folder, name)},
        lambda: {"image": image(random, folder, name), "text": "a caption"},
        lambda: {"text": ["one", "two"], "image": [image(random, folder, name)]},
        lambda: {"video": [[image(random, folder, name)] * 2]},
        lambda: [{"type": "text", "text": "encode_images"}, {"type": "image", "image": image(random, folder, name)}],
        lambda: [{"role": "user", "content": f"text {number}"}],
        lambda: damaged(random, any_cell(random, folder, number, depth + 1)) if depth < 3 else None,
    ]
    return forms[random.integers(len(forms))]()


def moved(cell: Any, name: str) -> Any:
    """Have the paths of a cell start one folder higher."""
    if isinstance(cell, dict) and isinstance(cell.get("image"), str) and "/" not in cell["image"]:
        return {**cell, "image": f"{name}/{cell['image']}"}
    return cell


def image(random: Random, folder: Path, name: str) -> str:
    """Write an image of any kind, sometimes with bytes changed, cut out and put in."""
    kind = str(random.choice(["png", "jpg", "gif", "webp", "tiff", "bmp", "ppm"]))
    path = folder / f"{name}.{kind}"
    picture(int(random.integers(1, 80)), int(random.integers(1, 80)), int(random.integers(100))).save(path)
    if random.random() < 0.4:
        path.write_bytes(building.damaged(random, path.read_bytes(), int(random.choice([40, 4000]))))
    return path.name


def damaged(random: Random, cell: Any) -> Any:
    """Put something strange into the place of a cell, or of some part of it."""
    strange = [None, 7, -0.5, True, [], {}, "", [[]], float("nan"), "\ud83d", {"x": 1}, "../x.png", ["a", None], "\0"]
    wrong = strange[random.integers(len(strange))]
    if isinstance(cell, dict) and cell and random.random() < 0.7:
        key = [*cell][random.integers(len(cell))]
        return {**cell, key: wrong} if random.random() < 0.7 else {**cell, str(wrong): cell[key]}
    if isinstance(cell, list) and cell and random.random() < 0.7:
        return [*cell[:-1], damaged(random, cell[-1])]
    return wrong


def any_line(random: Random, folder: Path, number: int) -> bytes:
    """Return a row whose query, where it can be read, nobody else asks: of two such rows one may wait for an epoch."""
    row: dict[str, Any] = {"query": f"question {number} is {number}", "positive": any_cell(random, folder, number)}
    row["negatives"] = [any_cell(random, folder, number) for _ in range(random.integers(0, 3))]
    if random.random() < 0.1:
        row["query"] = [None, 7, "", " ", [], {}, {"x": 1}, ["a"], "\ud83d", {"image": "gone.png"}][random.integers(10)]
    if random.random() < 0.05:
        row.pop(str(random.choice([*row])))
    line = json.dumps(row).encode()
    if random.random() < 0.05:
        place = int(random.integers(len(line)))
        line = line[:place] + random.bytes(int(random.integers(1, 4))).replace(b"\n", b"") + line[place + 2 :]
    return line


class Batches(Callback):
    """Keeps what was in each batch, and what was left out."""

    def __init__(self) -> None:
        self.queries: list[int] = []
        self.bad: dict[int, str] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.queries += batch.query_ids.tolist()
        self.bad |= {row.row: row.reason for row in batch.bad_rows}
        items = sum(len(chunk["attention_mask"]) for chunk in batch.chunks)
        assert len({*batch.queries.tolist(), *batch.documents.tolist()}) == items


def run(path: Path, preprocessor: Preprocessor, **options: Any) -> Batches:
    """Have all rows of a file go the way of training, through two workers."""
    model, seen = Recorder(), Batches()
    model.preprocessor = preprocessor  # type: ignore[assignment]
    data = RetrievalDataModule(Rows(str(path)), batch_size=BATCH, num_workers=2, **options)  # type: ignore[arg-type]
    with limited(120):
        trainer(path.parent, max_epochs=1, callbacks=[seen]).fit(model, datamodule=data)
    return seen


def by_itself(path: Path, preprocessor: Preprocessor) -> tuple[dict[int, int], set[int]]:
    """Try each row alone, in this process: the ids of the queries of good ones, and which are bad."""
    rows, good, bad = Rows(str(path)), {}, set()
    for index in range(len(rows)):
        try:
            example = rows[index]
            ItemCollator(preprocessor)([example])
        except ValueError:
            bad.add(index + 1)
        else:
            good[index + 1] = example.query.id
    return good, bad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (2, 3, 4))])
def test_every_row_is_used_or_named(tmp_path: Path, preprocessor: Preprocessor, seed: int) -> None:
    random = np.random.default_rng(seed)
    path = tmp_path / "train.jsonl"
    first = b'{"query": "first", "positive": "p", "negatives": []}'
    lines = [first, *(any_line(random, tmp_path, number) for number in range(1, ROWS))]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    check(path, preprocessor, run(path, preprocessor, on_bad_row="skip", max_bad_rows=ROWS))


def check(path: Path, preprocessor: Preprocessor, seen: Batches) -> None:
    good, bad = by_itself(path, preprocessor)
    assert len(good) + len(bad) == ROWS
    assert 50 < len(bad) < ROWS - 50
    assert sorted(seen.queries) == sorted(good.values())
    assert {*seen.bad} == bad
    assert all(re.match(rf"{re.escape(str(path))}, row {row}\b", reason) for row, reason in seen.bad.items())
    written = [json.loads(line) for line in (path.parent / "bad_rows.jsonl").read_text().splitlines()]
    assert {line["row"]: line["reason"] for line in written} == seen.bad
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, row \d+"):
        run(path, preprocessor, on_bad_row="raise")


@pytest.mark.filterwarnings("ignore")
def test_every_row_of_a_table_with_its_images_inside_is_used_or_named(
    tmp_path: Path, preprocessor: Preprocessor
) -> None:
    random = np.random.default_rng(9)
    cells = []
    for number in range(ROWS):
        name = image(random, tmp_path, str(number))
        whole = {"bytes": (tmp_path / name).read_bytes(), "path": name}
        others = [{"bytes": None, "path": name}, {"bytes": b"", "path": None}, None]
        cells.append(whole if random.random() < 0.7 else others[random.integers(3)])
    columns = {"query": [f"question {number}" for number in range(ROWS)], "positive": cells}
    path = tmp_path / "train.parquet"
    # As a user's own program writes it; `datasets` would look into the images.
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    check(path, preprocessor, run(path, preprocessor, on_bad_row="skip", max_bad_rows=ROWS))
