"""Late interaction: several vectors an item, their similarity, MaxSim, and fewer of them by token merging.

MaxSim takes memory that does not grow with queries × documents × tokens. Each vector of a query takes the document's
vector that is nearest to it, and their products are added up (ColBERT, arXiv:2004.12832). Only *which* vector was
nearest is kept for the backward pass: of Q queries with m vectors and P documents with n, Q·m·P numbers of four bytes
where autograd would keep n times as many. Documents are brought to length 1 a tile at a time, so that no copy of them
is made but their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize


@dataclass(frozen=True)
class MultiVectors:
    """The vectors of N items, one item's after the other's: what embeddings (N, D) are to a single-vector model."""

    vectors: Float[Tensor, "T D"]  # T = the sum of the lengths.
    lengths: Int[Tensor, " N"]  # How many vectors each item has; on the host, which knows it from the tokens.
    #: Whether a score is the mean over a query's vectors, and not their sum.
    length_normalized: bool = False

    @classmethod
    def of(cls, items: Sequence[Float[Tensor, "n D"]], length_normalized: bool = False) -> MultiVectors:
        """Join the vectors of some items; see `split`."""
        return cls(torch.cat([*items]), torch.tensor([*map(len, items)]), length_normalized)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.vectors.device

    @property
    def shape(self) -> tuple[int, int]:
        """Items and dimensions: N, D."""
        return len(self.lengths), self.vectors.shape[1]

    @cached_property
    def starts(self) -> Int[Tensor, " N"]:
        """The row of each item's first vector; on the host."""
        return self.lengths.cumsum(0) - self.lengths

    def __getitem__(self, items: Int[Tensor, " n"] | slice) -> MultiVectors:
        """Return some items, by their numbers on the host."""
        items = torch.arange(len(self))[items] if isinstance(items, slice) else items
        lengths = self.lengths[items]
        # Row t of the result is the item's first row, and how far t is behind the item's first in the result.
        offsets = self.starts[items] - (lengths.cumsum(0) - lengths)
        rows = torch.arange(int(lengths.sum())) + offsets.repeat_interleave(lengths)
        vectors = self.vectors.index_select(0, rows.to(self.device, non_blocking=True))
        return replace(self, vectors=vectors, lengths=lengths)

    def map(self, change: Callable[[Tensor], Tensor]) -> MultiVectors:
        """Return the same items with every vector changed: (T, D) → (T, d)."""
        return replace(self, vectors=change(self.vectors))

    def detach(self) -> MultiVectors:
        """Return the same vectors without gradient."""
        return self.map(Tensor.detach)

    def split(self) -> list[Float[Tensor, "n D"]]:
        """Return the vectors of each item."""
        return list(self.vectors.split(self.lengths.tolist()))


#: Embeddings (N, D) of N items, or the vectors of each.
Vectors = Tensor | MultiVectors


def at_least_float32(vectors: Vectors) -> Vectors:
    """Leave half precision."""
    return vectors.map(promoted) if isinstance(vectors, MultiVectors) else promoted(vectors)


def promoted(vectors: Tensor) -> Tensor:
    """Leave half precision."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def truncate(vectors: Vectors, dimension: int) -> Vectors:
    """Keep the leading numbers of each vector."""
    if isinstance(vectors, MultiVectors):
        return vectors.map(lambda rows: rows[:, :dimension])
    return vectors[:, :dimension]


#: Numbers that are computed at once: 4 MiB of float32, which a processor's cache holds.
TILE = 2**20
#: How many vectors of queries are compared at once, at most: more would leave a tile too few of documents.
MAXIMUM_HEIGHT = 2**13


def maxsim(queries: MultiVectors, documents: MultiVectors) -> Float[Tensor, "Q P"]:
    """Score queries against documents, in at least float32, by the cosines of their vectors, of whatever length.

    The mean over a query's vectors where it is ``length_normalized``, and their sum otherwise.

    Raises:
        ValueError: If an item has no vectors, or the lengths are not those of the vectors.
    """
    _check_lengths("query", queries)
    _check_lengths("document", documents)
    rows = promoted(queries.vectors), promoted(documents.vectors)
    scores: Tensor = _MaxSim.apply(*rows, queries.lengths, documents.lengths)
    if queries.length_normalized:
        scores = scores / queries.lengths[:, None].to(scores.device, non_blocking=True)
    return scores


class _MaxSim(torch.autograd.Function):
    """The sum over each query's vectors of the largest cosine with a document's: (S, D) and (T, D) → (Q, P)."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Float[Tensor, "S D"],
        documents: Float[Tensor, "T D"],
        query_lengths: Int[Tensor, " Q"],
        document_lengths: Int[Tensor, " P"],
    ) -> Float[Tensor, "Q P"]:
        device = queries.device
        lengths = query_lengths.to(device, non_blocking=True)
        scores = queries.new_empty(len(query_lengths), len(document_lengths))
        # Row of the nearest vector, of each query's vector (S) in each document (P).
        nearest = torch.empty(len(queries), len(document_lengths), dtype=torch.int32, device=device)
        height = min(len(queries), MAXIMUM_HEIGHT)
        query_norms, norms = _norms(queries), _norms(documents)  # (S, 1), (T, 1)
        queries = queries / query_norms
        with torch.autocast(device.type, enabled=False):
            for columns, rows, is_padding in _tiles(document_lengths, TILE // max(height, queries.shape[1])):
                columns, rows = columns.to(device, non_blocking=True), rows.to(device, non_blocking=True)
                flat = rows.flatten()
                tile = (documents.index_select(0, flat) / norms[flat]).unflatten(0, rows.shape)  # (p, n, D)
                if is_padding is not None:
                    is_padding = is_padding.to(device, non_blocking=True)
                largest = queries.new_empty(len(queries), len(columns))
                for start in range(0, len(queries), height):
                    part = slice(start, start + height)
                    largest[part], index = _largest(queries[part], tile, is_padding)
                    nearest[part, columns] = rows[:, 0].int() + index.int()
                # (S, p) → (Q, p). Lengths were checked on the host; to check them again would wait for the device.
                scores[:, columns] = torch.segment_reduce(largest, "sum", lengths=lengths, unsafe=True)
        ctx.save_for_backward(queries, query_norms, documents, norms, nearest, lengths)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "Q P"]) -> tuple[Tensor | None, ...]:
        queries, query_norms, documents, norms, nearest, lengths = ctx.saved_tensors
        to_queries, to_documents = torch.zeros_like(queries), torch.zeros_like(documents)
        width = max(1, TILE // queries.numel())
        # Columns of P documents at a time: (S, p) rows of the nearest, each times its weight.
        for rows, columns in zip(nearest.split(width, dim=1), gradient.split(width, dim=1), strict=True):
            weight = columns.repeat_interleave(lengths, dim=0, output_size=len(queries))  # (Q, p) → (S, p)
            flat = rows.flatten()
            of_unit = (weight / norms[flat].view(rows.shape))[:, :, None]
            to_queries += (of_unit * documents.index_select(0, flat).unflatten(0, rows.shape)).sum(dim=1)
            to_documents.index_add_(0, flat, (weight[:, :, None] * queries[:, None]).flatten(0, 1))
        # From the gradients of unit vectors to those of the vectors, in place.
        _project(to_queries, queries, query_norms)
        height = max(1, TILE // documents.shape[1])
        blocks = (tensor.split(height) for tensor in (to_documents, documents, norms))
        for gradients, vectors, norm in zip(*blocks, strict=True):
            _project(gradients, vectors / norm, norm)
        return to_queries, to_documents, None, None


def _largest(
    queries: Float[Tensor, "s D"], tile: Float[Tensor, "p n D"], is_padding: Bool[Tensor, "p n"] | None
) -> tuple[Float[Tensor, "s p"], Int[Tensor, "s p"]]:
    """Return the largest product of each vector with each document's, and which it is."""
    products = (queries @ tile.flatten(0, 1).T).unflatten(1, tile.shape[:2])  # (s, p, n)
    if is_padding is not None:
        products.masked_fill_(is_padding, -torch.inf)
    return products.max(dim=2)


def _norms(vectors: Float[Tensor, "T D"]) -> Float[Tensor, "T 1"]:
    return torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(1e-12)


def _project(gradients: Float[Tensor, "n D"], unit: Float[Tensor, "n D"], norms: Float[Tensor, "n 1"]) -> None:
    """Take out of gradients what points along their unit vectors, and divide by the vectors' lengths."""
    gradients.sub_(unit * (gradients * unit).sum(dim=1, keepdim=True)).div_(norms)


def _check_lengths(name: str, items: MultiVectors) -> None:
    """Refuse items that MaxSim does not know."""
    if not len(items) or not items.lengths.all():
        empty = (items.lengths == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"MaxSim: every {name} needs a vector, and of {len(items)} numbers {empty} have none.")
    if int(items.lengths.sum()) != len(items.vectors):
        raise ValueError(
            f"MaxSim: the lengths of {name} items add up to {int(items.lengths.sum())}, but there are "
            f"{len(items.vectors)} vectors."
        )


def _tiles(lengths: Int[Tensor, " P"], width: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield documents of similar length together: columns (p,), rows of their vectors (p, n), and which are padding.

    About ``width`` rows, and at least one document. A shorter document repeats its last row, which is masked. None
    where nothing is padded.
    """
    starts = lengths.cumsum(0) - lengths
    order = lengths.argsort(descending=True, stable=True)
    position = 0
    while position < len(order):
        longest = int(lengths[order[position]])
        columns = order[position : position + max(1, width // longest)]
        offsets = torch.arange(longest)
        counts = lengths[columns][:, None]
        rows = starts[columns][:, None] + torch.minimum(offsets, counts - 1)
        yield columns, rows, offsets >= counts if int(counts.min()) < longest else None
        position += len(columns)


def merge(items: MultiVectors, factor: int, trees: Sequence[np.ndarray] | None = None) -> MultiVectors:
    """Merge the vectors of each item into 1 / factor of their number, and at least one.

    Unit vectors come out, and of a factor of 1 the items as they are. Which vectors are merged has no gradient, their
    means have. The clusters are Ward's, on cosine distance, as in Sentence Transformers' ``HierarchicalTokenPooling``.
    Who merges by several factors makes the `ward_trees` once.
    """
    if factor == 1:
        return items
    trees = ward_trees(items) if trees is None else trees
    counts = (items.lengths // factor).clamp_min(1).tolist()
    clusters = [_clusters(tree, count) for tree, count in zip(trees, counts, strict=True)]
    unit = items.map(_unit)
    lengths = torch.tensor([int(labels.max()) + 1 for labels in clusters])
    # From numbers within an item to numbers over all: (T,).
    offsets = (lengths.cumsum(0) - lengths).repeat_interleave(items.lengths)
    labels = (torch.cat(clusters) + offsets).to(items.device, non_blocking=True)
    total = int(lengths.sum())
    sums = unit.vectors.new_zeros(total, unit.vectors.shape[1]).index_add(0, labels, unit.vectors)
    # A mean's direction is that of the sum.
    return replace(items, vectors=normalize(sums, dim=-1), lengths=lengths)


def ward_trees(items: MultiVectors) -> list[np.ndarray]:
    """Return SciPy's tree (n - 1, 4) of each item's n vectors: which two clusters are merged at each step."""
    return [_ward_tree(vectors) for vectors in items.detach().map(_unit).map(Tensor.cpu).split()]


def _ward_tree(vectors: Float[Tensor, "n D"]) -> np.ndarray:
    if len(vectors) == 1:
        return np.empty((0, 4))
    with torch.autocast("cpu", enabled=False):
        # What is not finite makes a loss that is not, of which the step is skipped; SciPy would stop the run.
        distances = (1 - vectors @ vectors.T).clamp_(0, 2).nan_to_num_()
    return linkage(squareform(distances.numpy(), checks=False), method="ward")


def _clusters(tree: np.ndarray, count: int) -> Int[Tensor, " n"]:
    """Return the number of each vector's cluster, from 0, of at most so many."""
    if count > len(tree):
        return torch.arange(len(tree) + 1)
    labels = torch.from_numpy(fcluster(tree, t=count, criterion="maxclust")).long()
    # Dense from 0: where distances tie there may be fewer clusters than were asked for.
    return labels.unique(return_inverse=True)[1]


def _unit(vectors: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
    return normalize(promoted(vectors), dim=-1)
