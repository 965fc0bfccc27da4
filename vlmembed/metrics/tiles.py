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

#: Documents that are looked at together: at first each of them may be among the best.
WIDTH = 4096
#: Neighbours of which the largest is found first.
GROUP = 64


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


class BestDocuments:
    """The first K documents of Q queries among all that were scored: by float32 score, then by name, descending.

    They are held as the keys of `order_keys` (Q, K), which say both score and name.
    """

    def __init__(self, queries: int, k: int, device: torch.device | str = "cpu") -> None:
        # Nobody has the lowest score and the name 0, which any document is before.
        nobody = order_keys(torch.tensor([-torch.inf]), torch.tensor([0])).item()
        self._keys = torch.full((queries, k), int(nobody), dtype=torch.long, device=device)
        self._lowest = self._scores(self._keys[:, -1])  # (Q,) the K-th score of each query, or one it had before.
        self._waiting: list[tuple[Tensor, Tensor]] = []  # Queries and keys of documents that may be among the first.
        self._count = 0

    def add(self, start: int, scores: Float[Tensor, "q p"], name_order: Int[Tensor, " p"]) -> None:
        """Take a tile: scores of the queries from a number on, with documents whose names have these positions."""
        for tile, order in zip(scores.split(WIDTH, dim=1), name_order.split(WIDTH), strict=True):
            self._add(start, tile, order)

    def _add(self, start: int, scores: Float[Tensor, "q p"], name_order: Int[Tensor, " p"]) -> None:
        lowest, k = self._lowest[start : start + len(scores), None], self._keys.shape[1]
        if k < scores.shape[1] and lowest.isneginf().any():  # Of a first tile, none below its own K-th.
            numbers = scores.where(~scores.isnan(), -torch.inf)
            lowest = torch.maximum(lowest, numbers.topk(k).values[:, -1:])
        # Most documents of most tiles are below the K-th so far, which one comparison says.
        found = _not_below(scores, lowest)
        queries, documents = found // scores.shape[1], found % scores.shape[1]
        keys = order_keys(scores[queries, documents], name_order[documents] + 1)
        self._waiting.append((queries + start, keys))
        self._count += len(found)
        if self._count > self._keys.numel() // 2:  # Merging costs more than comparing.
            self._merge()

    def ranked(self) -> tuple[Float[Tensor, "Q K"], Int64[Tensor, "Q K"]]:
        """Scores and name positions, the best first; -inf and -1 where a query has no more documents."""
        self._merge()
        scores = self._scores(self._keys)
        return scores, ((self._keys & 0xFFFFFFFF) - 1).where(scores > -torch.inf, -1)

    def _merge(self) -> None:
        if not self._count:
            return
        queries, keys = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        queries, order = queries.sort(stable=True)
        rows, counts = queries.unique_consecutive(return_counts=True)
        # From (n,) keys, query after query, to a row of each query, filled up by keys that are below nobody's.
        waiting = keys.new_full((len(rows), int(counts.max())), torch.iinfo(torch.long).min)
        firsts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        positions = torch.arange(len(queries), device=keys.device) - firsts
        waiting[torch.arange(len(rows), device=keys.device).repeat_interleave(counts), positions] = keys[order]
        self._keys[rows] = torch.cat([self._keys[rows], waiting], dim=1).topk(self._keys.shape[1]).values
        self._lowest = self._scores(self._keys[:, -1])
        self._waiting, self._count = [], 0

    @staticmethod
    def _scores(keys: Int64[Tensor, "*Q"]) -> Float[Tensor, "*Q"]:
        """Undo what `order_keys` makes of scores."""
        ascending = (keys >> 32).int()
        return torch.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).view(torch.float32)


def _not_below(scores: Float[Tensor, "q p"], lowest: Float[Tensor, "q 1"]) -> Int64[Tensor, " n"]:
    """The flat indices of scores that are not below the lowest."""
    # Most groups of neighbours have none, and the largest of each are found in half the time of comparing all.
    width = GROUP if scores.shape[1] % GROUP == 0 else scores.shape[1]
    groups = scores.unflatten(1, (-1, width))  # (q, p) → (q, p / width, width)
    query, group = (~(groups.amax(dim=2) < lowest)).nonzero().unbind(1)  # NaN among them hides no other.
    found, place = (groups[query, group] >= lowest[query]).nonzero().unbind(1)
    return query[found] * scores.shape[1] + group[found] * width + place
