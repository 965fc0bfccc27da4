"""Cosine similarities of embeddings cut to several dimensions, all from one pass over the embeddings.

The product of two vectors cut to d numbers is a prefix of the sum that makes the product of the whole vectors, and so
is a vector's squared norm. Embeddings are therefore split between one dimension and the next, each number is
multiplied once, and what is known at one dimension is where the next begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

#: A shorter vector is divided by this instead of its norm, as in ``torch.nn.functional.normalize``.
SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Truncations:
    """Embeddings cut to T dimensions.

    Args:
        values: The embeddings, in float32, up to the largest dimension.
        widths: How many numbers each dimension adds to the one below it, smallest dimension first.
        scales: 1 / norm of each embedding at each dimension.
    """

    values: Float[Tensor, "N D"]
    widths: tuple[int, ...]
    scales: Float[Tensor, "T N"]

    @classmethod
    def of(cls, embeddings: Float[Tensor, "N D"], dimensions: Sequence[int]) -> Truncations:
        """Cut embeddings to dimensions, which are in ascending order."""
        widths = tuple(high - low for low, high in zip([0, *dimensions], dimensions, strict=False))
        values = embeddings[:, : dimensions[-1]]
        return cls(values, widths, _prefix_sums(values.square(), widths).clamp_min(SMALLEST_NORM**2).rsqrt())

    def __getitem__(self, rows: Tensor) -> Truncations:
        """Choose embeddings."""
        return Truncations(self.values[rows], self.widths, self.scales[:, rows])

    def cosines(self, others: Truncations) -> Float[Tensor, "T N M"]:
        """Compare each embedding with each of the others, at each dimension."""
        cosines: Tensor = _Cosines.apply(self.values, self.scales, others.values, others.scales, self.widths)
        return cosines

    def paired_cosines(self, others: Truncations) -> Float[Tensor, "T N"]:
        """Compare each embedding with the other one in the same row, at each dimension."""
        return _prefix_sums(self.values * others.values, self.widths) * self.scales * others.scales


def _prefix_sums(values: Float[Tensor, "N D"], widths: tuple[int, ...]) -> Float[Tensor, "T N"]:
    return torch.stack([part.sum(1) for part in values.split(widths, dim=1)]).cumsum(0)


class _Cosines(torch.autograd.Function):
    """Prefix sums of products, each scaled by its row and its column.

    The gradient is written out because autograd would pass over the (T, M, C) matrices twice as often.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, row_scales: Tensor, columns: Tensor, column_scales: Tensor, widths: tuple[int, ...]
    ) -> Tensor:
        product = rows.new_zeros(len(rows), len(columns))
        cosines = product.new_empty(len(widths), *product.shape)
        parts = zip(rows.split(widths, dim=1), row_scales, columns.split(widths, dim=1), column_scales, strict=True)
        for cosine, (row_part, row_scale, column_part, column_scale) in zip(cosines, parts, strict=True):
            product.addmm_(row_part, column_part.T)
            torch.mul(product, row_scale[:, None], out=cosine).mul_(column_scale)
        ctx.widths = widths
        ctx.save_for_backward(rows, row_scales, columns, column_scales, cosines)
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_scales, columns, column_scales, cosines = ctx.saved_tensors
        to_rows, to_row_scales = torch.empty_like(rows), torch.empty_like(row_scales)
        to_columns, to_column_scales = torch.empty_like(columns), torch.empty_like(column_scales)
        row_parts, column_parts = rows.split(ctx.widths, dim=1), columns.split(ctx.widths, dim=1)
        to_row_parts, to_column_parts = to_rows.split(ctx.widths, dim=1), to_columns.split(ctx.widths, dim=1)
        # What reaches the product: a number counts at its own dimension and at every larger one.
        flow = torch.zeros_like(cosines[0])
        for index in reversed(range(len(ctx.widths))):
            weighted = gradients[index] * cosines[index]
            to_row_scales[index] = weighted.sum(1) / row_scales[index]
            to_column_scales[index] = weighted.sum(0) / column_scales[index]
            torch.mul(gradients[index], row_scales[index][:, None], out=weighted)
            flow.addcmul_(weighted, column_scales[index])
            torch.mm(flow, column_parts[index], out=to_row_parts[index])
            torch.mm(flow.T, row_parts[index], out=to_column_parts[index])
        return to_rows, to_row_scales, to_columns, to_column_scales, None
