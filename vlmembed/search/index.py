"""A folder that ``encode`` wrote, opened for reading: ids, vectors and documents of any number of items."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64
from torch import Tensor

from vlmembed.data.streaming import refuse_streams
from vlmembed.late_interaction import MultiVectors, Vectors, truncate
from vlmembed.search.corpus import CorpusSource, open_corpus
from vlmembed.types import Item, Role

#: The format that README.md describes: `encode` writes it, and what is here reads it.
FORMAT = 1
#: How vectors are stored.
Precision = Literal["float32", "float16", "int8", "binary"]
#: The files beside the shards: what made them, and what could not be read.
MANIFEST, SIDE_FILE = "manifest.json", "unreadable.jsonl"


@dataclass(frozen=True)
class Index:
    """The encoded items of a corpus, in the corpus's order; their vectors stay on disk.

    All but the folder is what its manifest says; P items have vectors of D numbers.
    """

    folder: Path
    model: str
    model_digest: str
    precision: Precision
    dimension: int  # D.
    is_multi_vector: bool
    count: int  # P.
    shards: list[dict[str, Any]]  # The ``file``, and how many ``rows`` it has.
    dimensions: tuple[int, ...] = ()  # To which vectors may be cut, by the model's training.
    similarity: str | None = None
    corpus: str = ""
    role: Role = "document"

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Open a folder; a ``ValueError`` says that it is no index, not complete, or not as its manifest says."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder}: no index, for it has no manifest.json. 'python -m vlmembed encode' makes one.")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            needed = [field.name for field in fields(cls)[1:] if field.default is MISSING]
            missing = [key for key in ("format", "complete", *needed) if key not in manifest]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: it cannot be read: {error}. Encode the corpus again.") from error
        if missing:
            raise ValueError(f"{path}: it does not say {', '.join(missing)}. Encode the corpus again.")
        if manifest["format"] != FORMAT or manifest["precision"] not in get_args(Precision):
            raise ValueError(
                f"{path}: format {manifest['format']!r} with vectors in {manifest['precision']!r}; this version reads "
                f"format {FORMAT} in {', '.join(get_args(Precision))}. Encode the corpus again."
            )
        known = {**manifest, "folder": Path(folder)}
        index = cls(**{field.name: known[field.name] for field in fields(cls) if field.name in known})
        index._check(manifest["complete"])
        return index

    def _check(self, complete: bool) -> None:
        """Refuse what is not whole."""
        expected = sum(shard["rows"] for shard in self.shards)
        if not complete:
            raise ValueError(
                f"{self.folder}: the index is not complete; it has {expected} items so far. Run the same "
                "'python -m vlmembed encode' again, which goes on where it ended."
            )
        for shard, file in zip(self.shards, self.files, strict=True):
            rows = pq.ParquetFile(file).metadata.num_rows if file.is_file() else 0
            if rows != shard["rows"]:
                raise ValueError(
                    f"{file}: {rows} items, but manifest.json says {shard['rows']}. Encode the corpus again."
                )
        if expected != self.count or not self.count:
            raise ValueError(
                f"{self.folder / MANIFEST}: {self.count} items, and {expected} in its shards. Encode the corpus again."
            )

    @property
    def files(self) -> list[Path]:
        """The shards, in order."""
        return [self.folder / shard["file"] for shard in self.shards]

    def refuse_other(self, model_digest: str, model: str) -> None:
        """Refuse a model that is not the one whose vectors these are: it would find anything."""
        if model_digest != self.model_digest:
            raise ValueError(
                f"{self.folder}: its vectors are of {self.model} (digest {self.model_digest}), and {model} is another "
                f"model, or has changed since (digest {model_digest}). Search with that model, or encode the corpus "
                "with this one."
            )

    def check_dimension(self, dimension: int | None) -> int:
        """Return a dimension that vectors may be cut to, the whole one for None; a ``ValueError`` if there is none."""
        if dimension is None:
            return self.dimension
        if not 1 <= dimension <= self.dimension:
            trained = ", ".join(map(str, self.dimensions)) or "none"
            raise ValueError(
                f"{self.folder}: dimension {dimension} is none of its vectors', which have {self.dimension}; "
                f"smaller ones that the model was trained for: {trained}."
            )
        return dimension

    @cached_property
    def ids(self) -> pa.ChunkedArray:
        """The ids (P,), in the corpus's order."""
        return pa.chunked_array([pq.read_table(file, columns=["id"])["id"].combine_chunks() for file in self.files])

    def names(self, rows: Int64[Tensor, " n"]) -> list[str]:
        """Return the ids of some rows."""
        names: list[str] = self.ids.take(pa.array(rows.numpy())).to_pylist()
        return names

    def refuse_white_space(self) -> None:
        """Refuse ids that a TREC run cannot hold."""
        spaced = pc.match_substring_regex(self.ids, r"[\s\v\x1c-\x1f\x85\p{Z}]")
        if (row := pc.index(spaced, True).as_py()) >= 0:
            raise ValueError(
                f"{self.folder}: id {self.ids[row].as_py()!r} has white space in it, which a TREC run cannot hold. "
                "Replace it in the corpus, and encode it again."
            )

    @cached_property
    def by_name(self) -> Int64[Tensor, " P"]:
        """The rows, sorted by id as bytes; a ``ValueError`` if two items share one."""
        rows = pc.sort_indices(self.ids)
        ids = self.ids.take(rows)
        repeated = pc.index(pc.equal(ids[1:], ids[:-1]), True).as_py()
        if repeated >= 0:
            first, second = rows[repeated : repeated + 2].to_pylist()
            raise ValueError(
                f"{self.folder}: id {ids[repeated].as_py()!r} is that of items {min(first, second)} and "
                f"{max(first, second)}. Give each document of the corpus an id of its own, and encode it again."
            )
        return torch.from_numpy(rows.to_numpy().astype(np.int64))

    @cached_property
    def name_order(self) -> Int64[Tensor, " P"]:
        """The position of each row when they are sorted by id."""
        return torch.empty_like(self.by_name).index_copy_(0, self.by_name, torch.arange(self.count))

    def rows_of(self, numbers: int) -> int:
        """Return how many items have so many numbers, about; at least one."""
        return max(1, int(numbers / self.numbers_per_item))

    @cached_property
    def numbers_per_item(self) -> float:
        """How many numbers the vectors of an item have, about: by the first shard with items."""
        shard = next(shard for shard in self.shards if shard["rows"])
        group = pq.ParquetFile(self.folder / shard["file"]).metadata.row_group(0)
        columns = (group.column(number) for number in range(group.num_columns))
        count = next(column.num_values for column in columns if column.path_in_schema.startswith("embedding"))
        return count / group.num_rows * (8 if self.precision == "binary" else 1)

    def blocks(
        self, rows: int, dimension: int | None = None, only: Int64[Tensor, " n"] | None = None
    ) -> Iterator[tuple[int, Vectors]]:
        """Yield some rows after the other: the first one's number, and their vectors (n, D) in float32, or of each.

        Vectors are as they are stored, cut to a dimension: of any length. Where only some rows are wanted, which are
        sorted, groups of rows without them are not read.
        """
        size, columns = self.check_dimension(dimension), ["embedding", *(["scale"] * (self.precision == "int8"))]
        for first, shard, groups in self._parts(only):
            for batch in shard.iter_batches(rows, row_groups=groups, columns=columns):
                yield first, truncate(self._decoded(batch), size)
                first += len(batch)

    def _parts(self, only: Int64[Tensor, " n"] | None) -> Iterator[tuple[int, pq.ParquetFile, list[int]]]:
        """Yield where to read, and the number of the first row there: whole files, or groups of rows of them."""
        first = 0
        for file in self.files:
            shard = pq.ParquetFile(file, memory_map=True)
            if only is None:
                yield first, shard, [*range(shard.num_row_groups)]
            for group in range(shard.num_row_groups):
                stop = first + shard.metadata.row_group(group).num_rows
                if only is not None and torch.searchsorted(only, torch.tensor([first, stop])).diff():
                    yield first, shard, [group]
                first = stop

    def _decoded(self, batch: pa.RecordBatch) -> Vectors:
        """Return the vectors of some rows in float32, whatever they are stored in; of bits, their signs."""
        items = batch["embedding"]
        lengths = torch.from_numpy(pc.list_value_length(items).to_numpy(zero_copy_only=False).astype(np.int64))
        vectors = items.flatten() if self.is_multi_vector else items
        numbers = torch.from_dlpack(vectors.flatten())  # Arrow's memory, which nothing here writes to.
        width = -(-self.dimension // 8) if self.precision == "binary" else self.dimension
        if len(numbers) != len(vectors) * width:
            raise ValueError(
                f"{self.folder}: {len(vectors)} vectors with {len(numbers)} numbers, where manifest.json says {width} "
                "each. Encode the corpus again."
            )
        matrix = numbers.view(len(vectors), width)
        if self.precision == "binary":
            bits = np.unpackbits(matrix.numpy(), axis=1, count=self.dimension)
            matrix = torch.from_numpy(bits) * 2.0 - 1
        if self.precision == "int8":
            scales = torch.from_numpy(batch["scale"].to_numpy().copy())
            matrix = matrix * (scales.repeat_interleave(lengths) if self.is_multi_vector else scales)[:, None]
        tensor = matrix.float()
        return MultiVectors(tensor, lengths) if self.is_multi_vector else tensor


class Documents:
    """The items of an index by row, each read when it is asked for, from several threads too.

    A ``ValueError`` says that the corpus is not there, or is another than the index was made of.

    Args:
        index: The index.
        corpus: Where the corpus is now; null for where it was.
    """

    def __init__(self, index: Index, corpus: CorpusSource | None = None) -> None:
        value = index.corpus if corpus is None else corpus
        self._index, self._lock = index, Lock()
        self._name = value if isinstance(value, str) else type(value).__name__
        self._unreadable = _unreadable(index)
        if value is None or value == "" or isinstance(value, dict | list):
            raise ValueError(f"{index.folder}: its manifest does not say where its corpus is. Give it as 'corpus'.")
        refuse_streams(value, "looking documents up")
        try:
            self._corpus = open_corpus(value, index.role)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{index.folder}: its corpus {self._name!r} cannot be opened: {str(error).rstrip('.')}. If it has "
                "moved, or was given as a class, give 'corpus'."
            ) from error
        if len(self._corpus) != index.count + len(self._unreadable):
            self._refuse(f"{len(self._corpus)} items, and the index {index.count + len(self._unreadable)}")

    def __len__(self) -> int:
        return self._index.count

    def __getitem__(self, row: int) -> Item:
        with self._lock:
            name, item = self._corpus.read(self._place(row))
        if name != (expected := self._index.ids[row].as_py()):
            self._refuse(f"{name!r} where the index has {expected!r} ({item.origin})")
        return item

    def _place(self, row: int) -> int:
        """Return where the item of a row is in the corpus, of which the index lacks what could not be read."""
        place = row
        while place != (shifted := row + bisect_right(self._unreadable, place)):
            place = shifted
        return place

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"{self._index.folder}: the corpus {self._name} has changed since it was encoded; it has {what}. "
            "Encode it again, or give the one that was encoded as 'corpus'."
        )


def _unreadable(index: Index) -> list[int]:
    """Return the places in the corpus that could not be read, ascending."""
    path = index.folder / SIDE_FILE
    if not path.is_file():
        return []
    return sorted(json.loads(line)["row"] for line in path.read_text(encoding="utf-8").splitlines() if line)
