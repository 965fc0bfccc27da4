"""MaxSim, the similarity of late interaction, in memory that does not grow with queries × documents × tokens.

Each vector of a query takes the document's vector that is nearest to it, and their products are added up (ColBERT,
arXiv:2004.12832). Only *which* vector was nearest is kept for the backward pass: of Q queries with m vectors and P
documents with n, Q·m·P numbers of four bytes where autograd would keep n times as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmembed.late_interaction.vectors import MultiVectors

#: Products of two vectors that are looked at together: 64 MiB of them, and as much for the backward pass.
TILE = 2**24


def maxsim(queries: MultiVectors, documents: MultiVectors) -> Float[Tensor, "Q P"]:
    """Score queries against documents, in float32; vectors are taken as they are, so normalise them before.

    The mean over a query's vectors where it is ``length_normalized``, and their sum otherwise.
    """
    with torch.autocast(queries.device.type, enabled=False):
        scores: Tensor = _MaxSim.apply(
            queries.vectors.float(), documents.vectors.float(), queries.lengths, documents.lengths
        )
    if queries.length_normalized:
        scores = scores / queries.lengths[:, None].to(scores.device, non_blocking=True)
    return scores


class _MaxSim(torch.autograd.Function):
    """The sum over each query's vectors of the largest product with a document's: (S, D) and (T, D) → (Q, P)."""

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
        for columns, rows, is_padding in _tiles(document_lengths, len(queries)):
            columns, rows = columns.to(device, non_blocking=True), rows.to(device, non_blocking=True)
            tile = documents[rows.flatten()]  # (p × n, D)
            products = (queries @ tile.T).unflatten(1, rows.shape)  # (S, p, n)
            if is_padding is not None:
                products.masked_fill_(is_padding.to(device, non_blocking=True), -torch.inf)
            largest, index = products.max(dim=2)  # (S, p)
            nearest[:, columns] = rows[:, 0].int() + index.int()
            scores[:, columns] = torch.segment_reduce(largest, "sum", lengths=lengths)
        ctx.save_for_backward(queries, documents, nearest, lengths)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "Q P"]) -> tuple[Tensor | None, ...]:
        queries, documents, nearest, lengths = ctx.saved_tensors
        to_queries, to_documents = torch.zeros_like(queries), torch.zeros_like(documents)
        weights = gradient.repeat_interleave(lengths, dim=0, output_size=len(queries))  # (Q, P) → (S, P)
        height = max(1, TILE // (8 * queries.numel()))
        # Columns of P documents at a time: (S, p) rows of the nearest, each times its weight.
        for rows, weight in zip(nearest.split(height, dim=1), weights.split(height, dim=1), strict=True):
            flat = rows.flatten()
            to_queries += torch.einsum("sp,spd->sd", weight, documents[flat].unflatten(0, rows.shape))
            to_documents.index_add_(0, flat, (weight[:, :, None] * queries[:, None]).flatten(0, 1))
        return to_queries, to_documents, None, None


def _tiles(lengths: Int[Tensor, " P"], height: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield documents of similar length together: columns (p,), rows of their vectors (p, n), and which are padding.

    A shorter document repeats its last row, which is masked. None where nothing is padded.
    """
    starts = lengths.cumsum(0) - lengths
    order = lengths.argsort(descending=True, stable=True)
    position = 0
    while position < len(order):
        longest = int(lengths[order[position]])
        columns = order[position : position + max(1, TILE // (4 * height * longest))]
        offsets = torch.arange(longest)
        own = lengths[columns][:, None]
        rows = starts[columns][:, None] + torch.minimum(offsets, own - 1)
        yield columns, rows, offsets >= own if int(own.min()) < longest else None
        position += len(columns)
