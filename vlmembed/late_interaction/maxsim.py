"""MaxSim, the similarity of late interaction, in memory that does not grow with queries × documents × tokens.

Each vector of a query takes the document's vector that is nearest to it, and their products are added up (ColBERT,
arXiv:2004.12832). Only *which* vector was nearest is kept for the backward pass: of Q queries with m vectors and P
documents with n, Q·m·P numbers of four bytes where autograd would keep n times as many. Documents are brought to length
1 a tile at a time, so that no copy of them is made but their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmembed.late_interaction.vectors import MultiVectors, promoted

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
