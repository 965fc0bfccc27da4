"""What becomes of bad inputs: one of each goes the way of a training row, and a table says how it ends.

A row is read, preprocessed and put into a batch in a loader worker, beside a good one, as with ``on_bad_row: skip``.
"Works" means that the model's inputs are equal, bit by bit, to those of a plain input that shows the same.

    python experiments/survival/bad_inputs.py           # half a minute; prints the table of README.md
"""

from __future__ import annotations

import json
import logging
import re
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from inputs import TABLE, Input, content
from torch.utils.data import DataLoader

from vlmembed.backbones import Qwen3VL, tiny
from vlmembed.data import ItemCollator, Rows
from vlmembed.training.bad_rows import ReadableRows, SkipBadRows
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
    rows = ReadableRows(Rows(str(path)))
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
    made = ItemCollator(preprocessor, b'"scores"' in line)
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


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("| input | outcome |\n|---|---|")
    with TemporaryDirectory() as scratch:
        tiny.create(Path(scratch) / "checkpoint")
        preprocessor = Qwen3VL(str(Path(scratch) / "checkpoint"), max_length=256).make_preprocessor()
        for kind, each, ending in outcomes(preprocessor, Path(scratch)):
            print(f"| {kind.lower()}: {each.name} | {ending} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\nThe largest of the workers took {peak:.1f} GiB.")


if __name__ == "__main__":
    main()
