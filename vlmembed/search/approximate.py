"""Approximate search by FAISS and LanceDB, which keep lists of near vectors beside the index's shards, made once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from vlmembed.files import digest, whole_file
from vlmembed.late_interaction import MultiVectors, Vectors
from vlmembed.search.ranking import Ranking, View, ranked, search_exact

Engine = Literal["exact", "faiss", "lancedb"]

#: Queries whose recall is measured.
SAMPLE = 100
#: Of each list, the vectors that its centre is computed of.
VECTORS_PER_LIST = 64


def search_by(engine: Engine, view: View, vectors: Vectors, k: int, probes: int) -> Ranking:
    """Find the first k documents of queries; where that is approximate, print the recall against exact search."""
    if engine == "exact":
        return search_exact(view, vectors, k)
    found = ENGINES[engine](view, vectors, min(k, view.index.count), probes)
    some = torch.arange(0, len(vectors), max(1, len(vectors) // SAMPLE))
    exact = search_exact(view, vectors[some], k).rows
    hits = [
        np.isin(row, of_query).mean() for row, of_query in zip(exact.numpy(), found.rows[some].numpy(), strict=True)
    ]
    print(f"{engine}: recall@{exact.shape[1]} is {np.mean(hits):.4f} of exact search, on {len(some)} of the queries.")
    return found


def _by_faiss(view: View, vectors: Vectors, k: int, probes: int) -> Ranking:
    faiss = _imported("faiss", "faiss-cpu")
    queries, path = _single(view, vectors), _place(view, "faiss")
    if not path.exists():
        lists, size = _list_count(view), queries.shape[1]
        built = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, lists, faiss.METRIC_INNER_PRODUCT)
        built.train(_sample(view, VECTORS_PER_LIST * lists))
        for _, documents in view.blocks():
            built.add(np.ascontiguousarray(documents.cpu().numpy()))  # type: ignore[union-attr]
        with whole_file(path) as draft:
            faiss.write_index(built, str(draft))
    opened = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    opened.nprobe = probes
    scores, rows = map(torch.from_numpy, opened.search(np.ascontiguousarray(queries.numpy()), k))
    return ranked(view.index, scores, rows, k)


def _by_lancedb(view: View, vectors: Vectors, k: int, probes: int) -> Ranking:
    lancedb = _imported("lancedb", "lancedb")
    queries, path = _single(view, vectors), _place(view, "lancedb")
    database = lancedb.connect(path.parent)
    if not path.with_suffix(".lance").exists() or not database.open_table(path.name).list_indices():
        schema = pa.schema([("row", pa.int64()), ("vector", pa.list_(pa.float32(), queries.shape[1]))])
        table = database.create_table(path.name, data=_batches(view, schema), schema=schema, mode="overwrite")
        lists = lancedb.index.IvfFlat(distance_type="dot", num_partitions=_list_count(view))
        table.create_index("vector", config=lists)
    table, size = database.open_table(path.name), (len(queries), k)
    scores, rows = torch.full(size, -torch.inf), torch.full(size, -1)
    for number, query in enumerate(queries.numpy()):
        search = table.search(query).distance_type("dot").nprobes(probes).limit(k)
        found = search.select(["row", "_distance"]).to_arrow()
        rows[number, : len(found)] = torch.tensor(found["row"].to_pylist())
        scores[number, : len(found)] = 1 - torch.tensor(found["_distance"].to_pylist())
    return ranked(view.index, scores, rows, k)


ENGINES: dict[str, Callable[[View, Vectors, int, int], Ranking]] = {"faiss": _by_faiss, "lancedb": _by_lancedb}


def _imported(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"engine {name} is not installed: pip install {package}. Or take engine exact.") from error


def _single(view: View, vectors: Vectors) -> Float[Tensor, "Q D"]:
    """Return queries as the view compares them; several vectors of an item are refused."""
    queries = view.queries(vectors)
    if isinstance(queries, MultiVectors):
        raise ValueError(
            f"{view.index.folder}: FAISS and LanceDB look for one vector of an item. Let them find what MaxSim ranks: "
            "first_stage mean, or take engine exact."
        )
    return queries.cpu()


def _place(view: View, engine: str) -> Path:
    """Return where an engine's own files are: others for another index, dimension, or kind of vector."""
    manifest = (view.index.folder / "manifest.json").read_bytes()
    name = digest([manifest, f"{view.dimension} {view.signs} {view.means}"])[:12]
    return view.index.folder / engine / f"{name}{'.index' * (engine == 'faiss')}"


def _list_count(view: View) -> int:
    return max(1, min(int(4 * math.sqrt(view.index.count)), view.index.count // VECTORS_PER_LIST))


def _sample(view: View, count: int) -> np.ndarray:
    """Return vectors of documents from anywhere in the index."""
    rows = torch.randperm(view.index.count, generator=torch.Generator().manual_seed(0))[:count].sort().values
    parts = []
    for first, documents in view.blocks(rows):
        here = rows[(rows >= first) & (rows < first + len(documents))] - first
        parts.append(documents[here.to(view.device)].cpu())  # type: ignore[union-attr]
    return torch.cat(parts).numpy()


def _batches(view: View, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for first, documents in view.blocks():
        matrix = documents.cpu()  # type: ignore[union-attr]
        rows = pa.array(np.arange(first, first + len(matrix)))
        numbers = pa.FixedSizeListArray.from_arrays(pa.array(matrix.flatten().numpy()), matrix.shape[1])
        yield pa.record_batch([rows, numbers], schema=schema)
