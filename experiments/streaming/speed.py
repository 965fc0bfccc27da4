"""Rows per CPU second that become examples: read in place, and streamed, in turns, medians.

Of a first pass, from opening on, in which local reading makes its copy of a Parquet file; and of later passes.
"""

import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from vlmembed.data import Rows, StreamingRows
from vlmembed.data.streaming import START, StreamedBatches
from vlmembed.media import open_image
from vlmembed.types import Example

BATCH = 64
CASES = (("jsonl", 39_936, False), ("parquet", 39_936, False), ("images", 3072, False), ("images", 3072, True))


def write(folder: Path, kind: str, count: int) -> str:
    path = folder / f"{kind}.{'jsonl' if kind == 'jsonl' else 'parquet'}"
    rows = [{"query": f"question {n} " * 4, "positive": f"answer {n} " * 30} for n in range(count)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)
    if kind == "images":
        noise = np.random.default_rng(0)
        images = [Image.fromarray(noise.integers(0, 255, (224, 224, 3), dtype=np.uint8)) for _ in range(count)]
        rows = [{"query": row["query"], "positive": image} for row, image in zip(rows, images, strict=True)]
    datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


def local(path: str, count: int) -> Iterator[list[Example]]:
    rows = Rows(path)
    for seed in itertools.count():
        order = np.random.default_rng(seed).permutation(len(rows))
        for start in range(0, count, BATCH):
            yield rows.__getitems__(order[start : start + BATCH].tolist())


def streamed(path: str, buffer: int) -> Iterator[list[Example]]:
    batches = StreamedBatches(StreamingRows(path, shuffle_buffer=buffer), BATCH, 1, 0, distinct=False, skip=False)
    batches.positions = [START]
    for _, _, batch in batches:
        yield [example for _, example in batch]


def use(examples: list[Example], decode: bool) -> None:
    for example in examples:
        for part in example.positives[0].parts:
            if decode and part.kind == "image":
                open_image(part.value).convert("RGB")


def seconds(batches: Iterator[list[Example]], count: int, skipped: int, decode: bool) -> float:
    """Processor time of all threads, after the first block: what is timed, a stream must also read in that time."""
    for _ in islice(batches, skipped // BATCH):
        pass
    start = time.process_time()
    for examples in islice(batches, count // BATCH):
        use(examples, decode)
    return time.process_time() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for kind, count, decode in CASES:
            path = write(Path(folder), kind, count)
            buffer = BATCH * (8 if kind == "images" else 156)
            runs: dict[str, Callable[[], Iterator[list[Example]]]] = {
                "local": lambda path=path, count=count: local(path, count),
                "stream": lambda path=path: streamed(path, 0),
                "stream, buffer": lambda path=path, buffer=buffer: streamed(path, buffer),
            }
            first, later = ({name: list[float]() for name in runs} for _ in range(2))
            for turn in range(5):
                datasets.config.HF_DATASETS_CACHE = Path(folder) / f"{kind} {decode} {turn}"
                for name, run in runs.items():
                    first[name].append(seconds(run(), count, 0, decode))
                    later[name].append(seconds(run(), count, 1024 if name == "stream" else buffer, decode))
                shutil.rmtree(datasets.config.HF_DATASETS_CACHE, ignore_errors=True)
            for title, times in (("first pass", first), ("later", later)):
                speed = {name: count / statistics.median(values) for name, values in times.items()}
                shown = [f"{name}: {value:,.0f} ({value / speed['local']:.0%})" for name, value in speed.items()]
                print(f"{kind}{', decoded' if decode else ''}, {title}", *shown, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
