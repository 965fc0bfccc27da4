"""Rows per CPU second that become examples: read in place, and streamed, in turns, medians."""

import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from vlmembed.data import Rows, StreamingRows
from vlmembed.data.streaming import START, StreamedBatches
from vlmembed.media import open_image

BATCH = 64


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


def local(path: str, count: int, shuffle: bool) -> None:
    rows = Rows(path)
    order = np.random.default_rng(0).permutation(len(rows)) if shuffle else np.arange(len(rows))
    for start in range(0, count, BATCH):
        use(rows.__getitems__(order[start : start + BATCH].tolist()))


def streamed(path: str, count: int, buffer: int) -> None:
    batches = StreamedBatches(StreamingRows(path, shuffle_buffer=buffer), BATCH, 1, 0, distinct=False, skip=False)
    batches.positions = [START]
    for _, _, batch in islice(batches, count // BATCH):
        use([example for _, example in batch])


def use(examples: list) -> None:
    for example in examples:
        for part in example.positives[0].parts:
            if isinstance(part, bytes):
                open_image(part).convert("RGB")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for kind, count in (("jsonl", 20_000), ("parquet", 20_000), ("images", 512)):
            path = write(Path(folder), kind, count)
            runs = {
                "local": lambda path=path, count=count: local(path, count, True),
                "stream": lambda path=path, count=count: streamed(path, count, 0),
                "stream, buffer": lambda path=path, count=count: streamed(path, count, 10_000),
            }
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(3):
                for name, run in runs.items():
                    start = time.process_time()
                    run()
                    seconds[name].append(time.process_time() - start)
            speed = {name: count / statistics.median(values) for name, values in seconds.items()}
            print(kind, *(f"{n}: {v:,.0f} ({v / speed['local']:.0%})" for n, v in speed.items()), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
