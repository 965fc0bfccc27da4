"""Rankings of an index of any size: exact, in one pass over its shards, or approximate, by FAISS and LanceDB.

A second stage ranks what a first one found. The approximate engines keep lists of near vectors beside the index's
shards, made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from vlmembed.distributed import computing_threads, in_order, thread_count
from vlmembed.files import clear_drafts, digest, whole_file
from vlmembed.late_interaction import MultiVectors, Vectors, maxsim, truncate
from vlmembed.metrics.functions import BestDocuments, exact_products, order_keys
from vlmembed.search.index import Index

#: Numbers of documents' vectors that are read together, and that are looked at together: a processor's cache has room
#: for the latter, and for their scores.
BLOCK_NUMBERS, TILE_NUMBERS = 2**22, 2**20
#: Queries that are compared with a block together.
HEIGHT = 1024
#: What an index's model may compare vectors by.
SIMILARITIES = ("cosine", "dot", "maxsim", "meanmaxsim")


@dataclass(frozen=True)
class Ranking:
    """The first documents of each query, the best first; where there are fewer, -inf and -1 fill up."""

    scores: Float[Tensor, "Q K"]
    rows: Int64[Tensor, "Q K"]  # Of the index.

    def named(self, index: Index) -> Iterator[list[tuple[str, float]]]:
        """Yield ids and scores of the documents of each query."""
        for scores, rows in zip(self.scores, self.rows, strict=True):
            yield [*zip(index.names(rows[rows >= 0]), scores.tolist(), strict=False)]


@dataclass(frozen=True)
class View:
    """What a search looks at: vectors of an index, cut to a dimension, or their signs, or the mean of an item's.

    They are compared as the model compares them, in float32; means of unit vectors by their cosine. Of signs the
    queries' numbers are not reduced: the inner product of numbers with signs finds more than a Hamming distance.
    """

    index: Index
    dimension: int | None = None
    signs: bool = False
    means: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    #: Whether what was read stays in memory (on the device), for the searches that follow.
    in_memory: bool = False

    def __post_init__(self) -> None:
        self.index.check_dimension(self.dimension)
        if self.means and not self.index.is_multi_vector:
            raise ValueError(
                f"{self.index.folder}: the mean of an item's vectors is asked for, and each has one vector."
            )
        if self.similarity not in SIMILARITIES:
            raise ValueError(
                f"{self.index.folder}: its model compares vectors by {self.similarity!r}, and search can do "
                f"{', '.join(SIMILARITIES)}."
            )

    @property
    def similarity(self) -> str:
        """What the model compares vectors by."""
        return self.index.similarity or ("maxsim" if self.index.is_multi_vector else "cosine")

    def queries(self, vectors: Vectors) -> Vectors:
        """Bring queries, as the model encodes them, to what `scores` compares."""
        if vectors.shape[-1] != self.index.dimension or isinstance(vectors, MultiVectors) != self.index.is_multi_vector:
            raise ValueError(f"{self.index.folder}: queries of shape {tuple(vectors.shape)} are none of its model's.")
        if not (vectors.vectors if isinstance(vectors, MultiVectors) else vectors).isfinite().all():
            raise ValueError(
                f"{self.index.folder}: vectors of queries have NaN or infinite numbers, which find nothing. Is the "
                "model whole?"
            )
        if isinstance(vectors, MultiVectors):
            vectors = replace(vectors, length_normalized=self.similarity == "meanmaxsim")
        return self._brought(truncate(vectors, self.dimension or self.index.dimension))

    def blocks(self, only: Int64[Tensor, " n"] | None = None) -> Iterator[tuple[int, Vectors]]:
        """Yield documents, some after the other: the first one's row, and what `scores` compares."""
        yield from self._blocks if self.in_memory else self._read(only)

    @cached_property
    def _blocks(self) -> list[tuple[int, Vectors]]:
        return [*self._read(None)]

    def _read(self, only: Int64[Tensor, " n"] | None) -> Iterator[tuple[int, Vectors]]:
        read = self.index.blocks(self.index.rows_of(BLOCK_NUMBERS), self.dimension, only)
        yield from _ahead((first, self._brought(_signs(part) if self.signs else part)) for first, part in read)

    def scores(self, queries: Vectors, documents: Vectors) -> Float[Tensor, "q p"]:
        """Compare queries with documents."""
        if isinstance(queries, MultiVectors):
            assert isinstance(documents, MultiVectors)
            return maxsim(queries, documents)
        return queries @ documents.T  # type: ignore[union-attr]

    def _brought(self, vectors: Vectors) -> Vectors:
        """Move to the device, and to unit length where vectors are compared by the cosine; MaxSim does that itself."""
        if isinstance(vectors, MultiVectors):
            vectors = vectors.map(lambda rows: rows.to(self.device))
            return _means(vectors) if self.means else vectors
        vectors = vectors.to(self.device)
        return normalize(vectors, dim=1) if self.similarity == "cosine" else vectors


def device_of(name: str | None) -> torch.device:
    """Return a device by its name; for None a GPU if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _signs(vectors: Vectors) -> Vectors:
    if isinstance(vectors, MultiVectors):
        return vectors.map(lambda rows: (rows > 0) * 2.0 - 1)
    return (vectors > 0) * 2.0 - 1


def _means(items: MultiVectors) -> Float[Tensor, "N D"]:
    """The mean of each item's unit vectors, at unit length."""
    lengths = items.lengths.to(items.device)
    return normalize(torch.segment_reduce(normalize(items.vectors, dim=1), "mean", lengths=lengths), dim=1)


def _ahead(blocks: Iterator[Any]) -> Iterator[Any]:
    """Read and decode one block ahead, in a thread, while the one before is looked at."""
    with ThreadPoolExecutor(1) as thread:
        read = in_order(thread, lambda _: next(blocks, None), repeat(None), ahead=1)
        yield from takewhile(lambda block: block is not None, read)


def search_exact(view: View, vectors: Vectors, k: int) -> Ranking:
    """Find the first k documents of queries, in one pass over the index; equal scores are ranked by id, descending."""
    queries, index, count, threads = view.queries(vectors), view.index, len(vectors), thread_count(view.device)
    height, width = min(HEIGHT, -(-count // threads)), index.rows_of(TILE_NUMBERS)
    starts = range(0, max(1, count), max(1, height))  # One part without queries, where there are none.
    parts = [queries[start : start + height] for start in starts]
    best = [BestDocuments(len(part), min(k, index.count), view.device) for part in parts]

    def look(documents: Vectors, name_order: Tensor, number: int) -> None:
        for start in range(0, len(documents), width):
            tile = slice(start, start + width)
            best[number].add(0, view.scores(parts[number], documents[tile]), name_order[tile])  # (q, p)

    with exact_products(view.device), computing_threads(threads) as pool:
        for first, documents in view.blocks():
            name_order = index.name_order[first : first + len(documents)].to(view.device)
            list(pool.map(partial(look, documents, name_order), range(len(parts))))
    scores, names = (torch.cat(tensors).cpu() for tensors in zip(*(part.ranked() for part in best), strict=True))
    return Ranking(scores, index.by_name[names].where(names >= 0, -1))


def rescore(view: View, vectors: Vectors, rows: Int64[Tensor, "Q C"], k: int) -> Ranking:
    """Rank what a first stage found for each query: rows of the index, or -1."""
    queries, scores = view.queries(vectors), torch.full(rows.shape, -torch.inf)
    wanted, places = rows.flatten().sort()  # Pairs of a query and a document, by document.
    for first, documents in view.blocks(wanted[wanted >= 0].unique()):
        start, stop = torch.searchsorted(wanted, torch.tensor([first, first + len(documents)])).tolist()
        place, columns = places[start:stop], wanted[start:stop] - first
        for query in (place // rows.shape[1]).unique().tolist():
            of_query = place // rows.shape[1] == query
            with exact_products(view.device):
                tile = view.scores(queries[query : query + 1], documents[columns[of_query]])
            scores.view(-1)[place[of_query]] = tile[0].cpu()
    return ranked(view.index, scores, rows, k)


def ranked(index: Index, scores: Float[Tensor, "Q C"], rows: Int64[Tensor, "Q C"], k: int) -> Ranking:
    """Put candidates in order; -1 is none."""
    scores = scores.where(rows >= 0, -torch.inf)
    order = order_keys(scores, index.name_order[rows.clamp(min=0)]).topk(min(k, rows.shape[1])).indices
    return Ranking(scores.gather(1, order), rows.gather(1, order))


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
        clear_drafts(path.parent)
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
