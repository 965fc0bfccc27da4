"""Retrieval metrics that agree with ``pytrec_eval``, from the ranks of the relevant documents alone.

A query's documents are ranked by score, equal scores by document name, both descending. Nothing but the ranks of the
relevant documents enters a metric. Scores come in tiles, of some queries with some documents at a time, so that nothing
that is held grows with queries × documents; search and validation share this.

In shapes, M is the number of relevant documents of all queries together; q and p are queries and documents of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from vlmembed.types import EvaluationSet

FEW = 16  # Documents of which each is ranked by a pass over the scores; for more these are sorted.


@dataclass(frozen=True)
class Relevance:
    """The relevant documents of Q queries: by query, and those of a query by grade, the best first."""

    num_queries: int
    queries: Int64[Tensor, " M"]
    documents: Int64[Tensor, " M"]  # Columns of the corpus; -1 where it lacks the document, which is never found.
    grades: Int64[Tensor, " M"]  # Above 0.

    @classmethod
    def of(cls, evaluation: EvaluationSet) -> Relevance:
        """Read the judgements of an evaluation set; a ``ValueError`` if two documents share a name, or none counts."""
        columns = {name: column for column, name in enumerate(evaluation.document_names)}
        if len(columns) < len(evaluation.document_names):
            raise ValueError(f"evaluation set {evaluation.name!r} has documents that share a name")
        flat = [
            (query, columns.get(document, -1), grade)
            for query, name in enumerate(evaluation.query_names)
            for document, grade in sorted(evaluation.qrels[name].items(), key=lambda judged: -judged[1])
            if grade > 0
        ]
        if not flat:
            raise ValueError(f"evaluation set {evaluation.name!r} has no query with a document of grade 1 or above")
        return cls(len(evaluation.query_names), *torch.tensor(flat).T.contiguous())

    def sum(self, values: Tensor) -> Float64[Tensor, " Q"]:
        """Add up a value of each relevant document, by query."""
        return torch.zeros(self.num_queries, dtype=torch.float64).index_add_(0, self.queries, values.double())

    @property
    def counts(self) -> Float64[Tensor, " Q"]:
        """Relevant documents of each query; 1 where it has none, so that metrics are 0 there."""
        return self.sum(torch.ones(len(self.queries))).clamp(min=1)

    @property
    def positions(self) -> Int64[Tensor, " M"]:
        """The position of each entry among those of its query, from 1."""
        starts = torch.searchsorted(self.queries, self.queries)
        return torch.arange(1, len(starts) + 1) - starts


def name_order(evaluation: EvaluationSet) -> Int64[Tensor, " P"]:
    """Position of each document when the corpus is sorted by name."""
    by_name = sorted(range(len(evaluation.document_names)), key=evaluation.document_names.__getitem__)
    return torch.tensor(by_name, dtype=torch.long).argsort()


def order_keys(scores: Float[Tensor, "*Q P"], name_order: Int[Tensor, "*#Q P"]) -> Int64[Tensor, "*Q P"]:
    """Turn scores, compared as float32, into distinct integers that sort as documents do: by score, then by name."""
    # The bits of a float sort as the number does once those below the sign of a negative one are flipped. Adding 0.0
    # turns -0.0 into 0.0, which it equals.
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ascending.long() << 32) + name_order


def ranks(
    scores: Float[Tensor, "Q P"],
    queries: Int[Tensor, " M"],
    documents: Int[Tensor, " M"],
    name_order: Int[Tensor, " P"],
) -> Float64[Tensor, " M"]:
    """Rank of each relevant document, from 1; infinite where the corpus lacks it, and its column is -1.

    ``queries`` are the rows of ``scores`` of the relevant documents, ascending.
    """
    edges = torch.searchsorted(queries, torch.arange(len(scores) + 1)).tolist()
    columns, ahead = documents.clamp(min=0).numpy(), np.zeros(len(documents))
    for row, (start, stop) in enumerate(pairwise(edges)):
        if start < stop:  # One query's keys at a time: all would be three times the scores.
            keys = order_keys(scores[row], name_order).numpy()
            ahead[start:stop] = _numbers_above(keys, keys[columns[start:stop]])
    return torch.where(documents >= 0, 1.0 + torch.from_numpy(ahead), torch.inf)


def _numbers_above(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Count the keys above each of some."""
    if len(wanted) < FEW:
        return np.array([np.count_nonzero(keys > key) for key in wanted])
    return len(keys) - np.searchsorted(np.sort(keys), wanted, side="right")


def ndcg_at_k(ranks: Float64[Tensor, " M"], relevance: Relevance, k: int) -> Float64[Tensor, " Q"]:
    """Grade over log2(rank + 1), relative to the best order; a query without relevant documents counts 0, as below."""
    gained, ideal = (
        relevance.sum(torch.where(rank <= k, relevance.grades / torch.log2(rank.double() + 1), 0.0))
        for rank in (ranks, relevance.positions)
    )
    return torch.where(ideal > 0, gained / ideal, 0.0)


def recall_at_k(ranks: Float64[Tensor, " M"], relevance: Relevance, k: int) -> Float64[Tensor, " Q"]:
    """Share of the relevant documents among the first k."""
    return relevance.sum(ranks <= k) / relevance.counts


def reciprocal_rank_at_k(ranks: Float64[Tensor, " M"], relevance: Relevance, k: int) -> Float64[Tensor, " Q"]:
    """One over the rank of the first relevant document, 0 if that is beyond k."""
    first = torch.full((relevance.num_queries,), torch.inf, dtype=torch.float64)
    first.scatter_reduce_(0, relevance.queries, ranks, "amin")
    return torch.where(first <= k, 1 / first, 0.0)


def average_precision(ranks: Float64[Tensor, " M"], relevance: Relevance) -> Float64[Tensor, " Q"]:
    """Mean, over the relevant documents, of the precision at their ranks."""
    by_rank = ranks.argsort()
    ascending = ranks[by_rank[relevance.queries[by_rank].argsort(stable=True)]]
    return relevance.sum(relevance.positions / ascending) / relevance.counts


def mean_over(sets: Mapping[str, Mapping[str, Float[Tensor, ""]]]) -> dict[str, Float[Tensor, ""]]:
    """Mean over evaluation sets, or subsets, of every metric that all of them have."""
    first, *others = sets.values()
    names = [name for name in first if all(name in other for other in others)]
    return {name: torch.stack([values[name] for values in sets.values()]).double().mean().float() for name in names}


#: What the mean over several evaluation sets is called.
MEAN = "mean"

#: What is reported, by name.
METRICS: dict[str, Callable[[Tensor, Relevance], Tensor]] = {
    "ndcg@10": partial(ndcg_at_k, k=10),
    "hit@1": partial(reciprocal_rank_at_k, k=1),
    "recall@1": partial(recall_at_k, k=1),
    "recall@10": partial(recall_at_k, k=10),
    "mrr@10": partial(reciprocal_rank_at_k, k=10),
    "map": average_precision,
}


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
