"""Tiles of scores, some queries with some documents at a time, and the best documents of all tiles so far.

Search and validation share them: nothing that is held grows with queries × documents. In shapes, q and p are the
queries and the documents of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from vlmembed.metrics.functions import order_keys


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices as float32, whatever autocast and ``set_float32_matmul_precision`` say outside."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def products(queries: Float[Tensor, "q D"], documents: Float[Tensor, "p D"]) -> Float[Tensor, "q p"]:
    """Inner products in float32."""
    if queries.device.type == "cpu":  # NumPy's product knows of no other precision.
        return torch.from_numpy(queries.numpy() @ documents.numpy().T)
    with exact_products(queries.device):
        return queries @ documents.T


class BestDocuments:
    """The first K documents of Q queries among all that were scored: by float32 score, then by name, descending.

    They are held as the keys of `order_keys` (Q, K), which say both score and name.
    """

    def __init__(self, queries: int, k: int, device: torch.device | str = "cpu") -> None:
        # Nobody has the name 0 and the lowest score, which any document is before.
        nobody = order_keys(torch.tensor([-torch.inf]), torch.tensor([0])).item()
        self.keys = torch.full((queries, k), int(nobody), dtype=torch.long, device=device)

    def add(self, start: int, scores: Float[Tensor, "q p"], name_order: Int[Tensor, " p"]) -> None:
        """Take a tile: scores of the queries from a number on, with documents whose names have these positions."""
        keys = self.keys[start : start + len(scores)]
        # Most documents of most tiles are below the K-th so far, which one comparison says.
        rows, columns = (scores >= self._scores(keys[:, -1:])).nonzero(as_tuple=True)
        if not len(rows):
            return
        counts = rows.bincount(minlength=len(scores))
        positions = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        found = self.keys.new_full((len(scores), int(counts.max())), int(torch.iinfo(torch.long).min))
        found[rows, positions] = order_keys(scores[rows, columns], name_order[columns] + 1)
        keys.copy_(torch.cat([keys, found], dim=1).topk(keys.shape[1]).values)

    def merge(self, other: Int64[Tensor, "Q k"]) -> None:
        """Take the keys of another part of the documents."""
        self.keys = torch.cat([self.keys, other], dim=1).topk(self.keys.shape[1]).values

    def ranked(self) -> tuple[Float[Tensor, "Q K"], Int64[Tensor, "Q K"]]:
        """Scores and name positions, the best first; -inf and -1 where a query has no more documents."""
        scores = self._scores(self.keys)
        return scores, ((self.keys & 0xFFFFFFFF) - 1).where(scores > -torch.inf, -1)

    @staticmethod
    def _scores(keys: Int64[Tensor, "*Q K"]) -> Float[Tensor, "*Q K"]:
        """Undo what `order_keys` makes of scores."""
        ascending = (keys >> 32).int()
        return torch.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).view(torch.float32)
