"""Exact search of an index on disk, against FAISS's IndexFlatIP in memory and read from its own file.

    python experiments/search/speed.py --count 1000000

Runs alternate, and medians are compared. Ours reads the shards (from the system's cache, as FAISS its file) each time;
opening, which sorts the ids, is measured apart. Prints a line of JSON; needs faiss-cpu.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vlmembed.search.index import Index
from vlmembed.search.ranking import View, search_exact

SHARD = 50_000


def vectors(count: int, dimension: int, seed: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def write(folder: Path, count: int, dimension: int, flat: faiss.IndexFlatIP) -> None:
    """Write the same vectors as an index, as ``encode`` writes it, and into FAISS."""
    folder.mkdir(parents=True)
    order, shards = np.random.default_rng(0).permutation(count), []
    for number, start in enumerate(range(0, count, SHARD)):
        rows = min(SHARD, count - start)
        matrix = vectors(rows, dimension, number + 1)
        flat.add(matrix)
        ends = pa.array(np.arange(rows + 1, dtype=np.int32) * dimension)
        element = pa.field("element", pa.float32(), nullable=False)
        lists = pa.ListArray.from_arrays(ends, pa.array(matrix.ravel()), type=pa.list_(element))
        fields = pa.field("id", pa.string()), pa.field("embedding", lists.type, nullable=False)
        ids = pa.array([f"doc-{name}" for name in order[start : start + rows]])
        table = pa.table([ids, lists], schema=pa.schema(fields))
        file = f"shard-{number:05}.parquet"
        pq.write_table(table, folder / file, row_group_size=4096, compression="none", use_dictionary=False)
        shards.append({"file": file, "rows": rows})
    manifest = {
        "format": 1, "complete": True, "model": "", "model_digest": "", "precision": "float32", "count": count,
        "dimension": dimension, "is_multi_vector": False, "similarity": "cosine", "shards": shards,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    queries = vectors(options.queries, options.dimension, 0)
    with tempfile.TemporaryDirectory() as temporary:
        folder, flat = Path(temporary) / "index", faiss.IndexFlatIP(options.dimension)
        write(folder, options.count, options.dimension, flat)
        faiss.write_index(flat, f"{temporary}/flat.faiss")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        index = Index.open(folder)
        start = time.perf_counter()
        _ = index.name_order
        times: dict[str, list[float]] = {"opening": [time.perf_counter() - start]}

        def ours() -> np.ndarray:
            return search_exact(View(index), torch.from_numpy(queries), options.k).rows.numpy()

        def in_memory() -> np.ndarray:
            return flat.search(queries, options.k)[1]

        def from_file() -> np.ndarray:
            return faiss.read_index(f"{temporary}/flat.faiss").search(queries, options.k)[1]

        found = {}
        for _ in range(options.repeats):
            for search in (ours, in_memory, from_file):
                start = time.perf_counter()
                found[search.__name__] = search()
                times.setdefault(search.__name__, []).append(time.perf_counter() - start)
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    speeds = {name: round(medians[name] / medians["ours"], 2) for name in ("in_memory", "from_file")}
    same = float((np.sort(found["ours"], 1) == np.sort(found["in_memory"], 1)).mean())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(json.dumps(vars(options) | {"seconds": medians, "speed": speeds, "same": same, "MiB more": grown}))


if __name__ == "__main__":
    main()
