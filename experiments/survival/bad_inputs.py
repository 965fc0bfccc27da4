"""What becomes of bad inputs: one of each goes the way of a training row, and a table says how it ends.

A row is read, preprocessed and put into a batch in a loader worker, beside a good one, as with ``on_bad_row: skip``.
"Works" means that the model's inputs are equal, bit by bit, to those of a plain input that shows the same.

    python experiments/survival/bad_inputs.py                    # half a minute; prints the table of README.md
    python experiments/survival/bad_inputs.py --generated 10000  # rows and files, damaged at random; its second table
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import re
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from inputs import TABLE, Input, content, encoded, picture
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from vlmembed.backbones import Qwen3VL, tiny
from vlmembed.data import ItemCollator, Rows
from vlmembed.data.sources import RowLists, read_usable
from vlmembed.losses import LabelSpec
from vlmembed.training.guards import SkipBadRows
from vlmembed.types import Batch, Preprocessor

#: Of a refusal, what stands in the table.
LONGEST = 110


def outcomes(preprocessor: Preprocessor, folder: Path) -> Iterator[tuple[str, Input, str]]:
    """Yield the kind of each input, the input, and how it ends."""
    for kind, inputs in TABLE.items():
        for number, each in enumerate(inputs):
            place = folder / f"{kind}{number}"
            place.mkdir()
            yield kind, each, outcome(each, preprocessor, place)


def outcome(each: Input, preprocessor: Preprocessor, folder: Path) -> str:
    batch = batch_of(each.make(folder), preprocessor, folder)
    if batch.bad_rows:
        ((_, reason),) = ((row.row, row.reason) for row in batch.bad_rows)
        return f"refused: {shortened(reason, folder)}"
    if each.like is None:
        return "WORKS, AND SHOULD NOT"
    same = equal(batch, batch_of(each.like(folder), preprocessor, folder))
    return f"works: {each.words}" if same else "IS READ AS SOMETHING ELSE"


def batch_of(given: object, preprocessor: Preprocessor, folder: Path) -> Batch:
    """Make a batch of a good row and of the given one, in a worker."""
    line = content(given)
    path = folder / "train.jsonl"
    path.write_bytes(good(line) + b"\n" + line + b"\n")
    rows = RowLists(partial(read_usable, Rows(str(path))))
    loader = DataLoader(rows, sampler=[[0, 1]], batch_size=None, num_workers=1, collate_fn=collator(line, preprocessor))
    (batch,) = loader
    return batch


def good(line: bytes) -> bytes:
    """Return a good row with the same columns."""
    if b'"label"' in line:
        return b'{"query": "good", "document": "good", "label": 1}'
    columns = {"query": "good", "positive": "good"}
    columns |= {"negative": "bad"} if b'"negative"' in line else {}
    return json.dumps(columns | ({"scores": [2.0, 1.0]} if b'"scores"' in line else {})).encode()


def collator(line: bytes, preprocessor: Preprocessor) -> SkipBadRows:
    made = ItemCollator(preprocessor, LabelSpec(teacher_scores=b'"scores"' in line))
    return SkipBadRows(made, made.check)


def equal(one: Batch, other: Batch) -> bool:
    """Whether the model reads the same; images are kept apart by keys that say which file they are of."""
    chunks = [[*batch.chunks, *batch.images] for batch in (one, other)]
    return len(chunks[0]) == len(chunks[1]) and all(
        first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first if name != "keys")
        for first, second in zip(*chunks, strict=True)
    )


def shortened(reason: str, folder: Path) -> str:
    """Leave out where, which the table does not need, and the end."""
    _, _, reason = reason.partition("train.jsonl, row 2")
    place, colon, rest = reason.partition(": ")
    said = f"{place}{colon}{rest}".replace("column 'positive': ", "").strip(",: ")
    said = said.replace(f"{folder}/", "").replace(str(folder), "DATA")
    said = re.sub(r"(.)\1{40,}", r"\1\1\1…", " ".join(said.split())).replace("|", "\\|")
    return said if len(said) <= LONGEST else f"{said[:LONGEST].rstrip()} …"


# At random

Random = np.random.Generator

#: Seconds that one input may take.
SECONDS = {"image": 10, "video": 30, "table": 30}
IMAGES = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000")
VIDEOS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx", "avi": "mpeg4", "mov": "mpeg4", "flv": "flv"}
STRANGE = (
    None,
    7,
    -0.5,
    True,
    [],
    {},
    "",
    " ",
    [[]],
    float("nan"),
    {"x": 1},
    "../x.png",
    ["a", None],
    {"image": "gone"},
)


def generated(preprocessor: Preprocessor, folder: Path, number: int, seed: int = 0) -> Counter[tuple[str, str]]:
    """Make and read as many malformed rows and files, each in turn; count the kinds by how they end."""
    random = np.random.default_rng(seed)
    good: dict[str, list[bytes]] = {
        "image": [encoded(picture(48, 40), kind) for kind in IMAGES],
        "video": [film(folder / f"film.{kind}", codec) for kind, codec in VIDEOS.items()],
        "table": [],
    }
    ways: dict[str, Callable[..., bytes]] = {"cut": cut, "bits flipped": flipped, "bytes put in": stuffed}
    kinds = [
        (media, way) for media in good for way in [*ways, "another's suffix" if media != "table" else "wrong types"]
    ]
    endings: Counter[tuple[str, str]] = Counter()
    for index in range(number):
        media, way = kinds[index % len(kinds)]
        damage = ways.get(way, lambda _, content: content)
        if media == "table":
            task = partial(table, random, folder, damage, way == "wrong types", preprocessor)
        else:
            task = partial(
                shown,
                media,
                damage(random, good[media][random.integers(len(good[media]))]),
                random,
                folder,
                preprocessor,
            )
        endings[f"{media}: {way}", limited(task, SECONDS[media])] += 1
    return endings


def limited(task: Callable[[], str], seconds: int) -> str:
    """Say how an input ends, within its time: refused by name, or works as its plain equivalent."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return task()
    except TimeoutError:
        return "HANGS"
    except Exception as error:  # What is not a ValueError that names the file is what is looked for.
        named = isinstance(error, ValueError) and re.search(r"(train|media)\.\w+", str(error))
        return "refused" if named else f"IS REFUSED WITHOUT ITS NAME ({type(error).__name__}: {error})"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def cut(random: Random, whole: bytes) -> bytes:
    return whole[: random.integers(len(whole))]


def flipped(random: Random, whole: bytes) -> bytes:
    changed = np.frombuffer(whole, np.uint8).copy()
    places = random.integers(len(whole), size=random.integers(1, 9))
    changed[places] ^= (1 << random.integers(8, size=len(places))).astype(np.uint8)
    return changed.tobytes()


def stuffed(random: Random, whole: bytes) -> bytes:
    place = random.integers(len(whole))
    return whole[:place] + random.bytes(random.integers(1, 40)) + whole[place + random.integers(20) :]


def film(path: Path, codec: str) -> bytes:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for shade in range(0, 240, 20):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 32), (shade, 90, 255 - shade)))))
        container.mux(stream.encode())
    return path.read_bytes()


def shown(media: str, content: bytes, random: Random, folder: Path, preprocessor: Preprocessor) -> str:
    """Give a file as an image or a video, under any suffix; the plain equivalent is what its own library shows."""
    name = f"media.{random.choice(['png', 'jpg', 'mp4', 'webm', 'tiff', 'gif', 'txt'])}"
    (folder / name).write_bytes(content)
    row = {"query": "q", "positive": {media: name}}
    (folder / "train.jsonl").write_text(json.dumps(row))
    batch = ItemCollator(preprocessor)([Rows(str(folder / "train.jsonl"))[0]])
    if media == "video":
        return "works"  # Which frames are read: tests/test_media.py.
    with Image.open(io.BytesIO(content)) as opened:
        upright = ImageOps.exif_transpose(opened)
        visible = upright.convert("RGBA") if "A" in upright.getbands() or "transparency" in upright.info else upright
    plain = Image.new("RGB", visible.size, "white")
    plain.paste(visible.convert("RGB"), mask=visible.getchannel("A") if visible.mode == "RGBA" else None)
    plain.save(folder / "plain.png")
    (folder / "plain.jsonl").write_text(json.dumps({"query": "q", "positive": {"image": "plain.png"}}))
    same = equal(batch, ItemCollator(preprocessor)([Rows(str(folder / "plain.jsonl"))[0]]))
    return "works" if same else "IS READ AS SOMETHING ELSE"


def table(random: Random, folder: Path, damage: Callable[..., bytes], strange: bool, preprocessor: Preprocessor) -> str:
    """Write rows as JSONL, CSV or Parquet; the plain equivalent is what the format's own library reads."""
    kind = ("jsonl", "csv", "parquet")[random.integers(3)]
    rows: list[dict[str, Any]] = [{"query": f"question {n}", "positive": f"answer {n}"} for n in range(4)]
    if strange:
        kind, rows[1]["positive"] = "jsonl", STRANGE[random.integers(len(STRANGE))]
    path = folder / f"train.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["query", "positive"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    path.write_bytes(damage(random, path.read_bytes()))
    source = Rows(str(path))
    examples = [source[index] for index in range(len(source))]
    ItemCollator(preprocessor)(examples)
    said = [[example.query.parts[0].value, example.positives[0].parts[0].value] for example in examples]
    return "works" if said == plainly(path) else "IS READ AS SOMETHING ELSE"


def plainly(path: Path) -> list[list[Any]]:
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    return [[row["query"], row["positive"]] for row in rows]


def print_generated(preprocessor: Preprocessor, folder: Path, number: int, seed: int) -> None:
    start, endings = time.monotonic(), generated(preprocessor, folder, number, seed)
    print("| malformed | refused by name | works | other |\n|---|--:|--:|--:|")
    for kind in dict.fromkeys(kind for kind, _ in endings):
        other = sum(endings[key] for key in endings if key[0] == kind and key[1] not in ("refused", "works"))
        print(f"| {kind} | {endings[kind, 'refused']} | {endings[kind, 'works']} | {other} |")
    print(
        *(
            f"\n{count} × {kind}: {ending:.300}"
            for (kind, ending), count in endings.items()
            if ending.isupper() or "(" in ending
        )
    )
    print(f"\n{number:,} in {time.monotonic() - start:.0f} s, seed {seed}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--generated", type=int, help="how many to make at random, in place of one of each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with TemporaryDirectory() as scratch:
        tiny.create(Path(scratch) / "checkpoint")
        preprocessor = Qwen3VL(str(Path(scratch) / "checkpoint"), max_length=256).make_preprocessor()
        if arguments.generated:
            print_generated(preprocessor, Path(scratch), arguments.generated, arguments.seed)
            return
        print("| input | outcome |\n|---|---|")
        for kind, each, ending in outcomes(preprocessor, Path(scratch)):
            print(f"| {kind.lower()}: {each.name} | {ending} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\nThe largest of the workers took {peak:.1f} GiB.")


if __name__ == "__main__":
    main()
