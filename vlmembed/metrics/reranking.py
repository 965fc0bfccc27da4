"""Measuring how well each query's candidates are ordered, before and after a reranker."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from vlmembed.metrics.functions import METRICS, judgements, order_keys, ranks
from vlmembed.metrics.retrieval import first_rows, gather_rows, named
from vlmembed.types import RerankingSet


class RerankingMetrics(Metric):
    """Collects the scores of each query's candidates and measures the order that they give.

    Every metric of retrieval is reported after reranking under its own name, and in the first stage's order as
    ``name/before``. A relevant document that is not among the candidates counts against both, as one that is never
    found; a query without candidates counts 0. Candidates are ordered by their logits in float32, which no sigmoid has
    made equal, and equal ones by document name, as ``pytrec_eval`` does.

    Several processes may each update with their share; ``compute``, ``per_query`` and ``top_k`` join the shares, so
    all processes must call them. A pair scored twice counts once.

    Args:
        reranking: The queries, the corpus, the judgements and the candidates.

    Raises:
        ValueError: If nothing can be measured, document names repeat, or a query has a candidate twice.
    """

    full_state_update = False
    places: list[Tensor]
    scores: list[Tensor]

    def __init__(self, reranking: RerankingSet) -> None:
        super().__init__(dist_sync_fn=self._gather)
        self.evaluation = reranking.evaluation
        relevant, self.grades, name_order = judgements(self.evaluation)
        self.candidates, self._there = _padded(reranking)
        self.name_order = name_order[self.candidates]
        found = [dict(zip(row, range(len(row)), strict=True)) for row in reranking.candidates]
        placed = [[of.get(column, -1) for column in row] for of, row in zip(found, relevant.tolist(), strict=True)]
        #: (Q, R) the place of each relevant document among the candidates; -1 where it is none of them.
        self.relevant = torch.tensor(placed)
        queries = torch.arange(len(self.candidates))[:, None].expand_as(self.candidates)
        pairs = torch.stack([queries[self._there], self.candidates[self._there]], dim=1)
        self._keys, self._order = self._key(pairs).sort()
        self.add_state("places", default=[], dist_reduce_fx="cat")
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    def update(self, rows: Int[Tensor, "B 2"], scores: Float[Tensor, " B"]) -> None:
        """Take the scores of some pairs: logits, of any float type.

        Args:
            rows: Of each pair, the number of its query and the corpus column of its document.
            scores: One for each pair.

        Raises:
            ValueError: If a pair is not in the set, or a score is not finite (it would rank first or last).
        """
        rows, scores = rows.detach().cpu().long(), scores.detach().float().cpu()
        name, keys = self.evaluation.name, self._key(rows)
        sorted_places = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        inside = (rows >= 0).all(1) & (rows[:, 1] < len(self.evaluation.corpus))
        foreign = rows[~inside | (self._keys[sorted_places] != keys)].tolist()
        if foreign:
            raise ValueError(f"reranking set {name!r} has no candidates {foreign} (query number, corpus column)")
        broken = rows[~scores.isfinite()].tolist()
        if broken:
            first = named(self.evaluation, [broken[0][0], len(self.evaluation.queries) + broken[0][1]])
            raise ValueError(
                f"{len(broken)} of the scores of reranking set {name!r} are not finite, such as that of {first}: look "
                "at these, or, if all are broken, go on from an earlier checkpoint"
            )
        self.places.append(self._order[sorted_places, None])
        self.scores.append(scores[:, None])

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Mean of every metric over queries, after reranking and before; raises as ``per_query`` does."""
        return {name: values.mean().float() for name, values in self._per_query().items()}

    def per_query(self) -> dict[str, Float64[Tensor, " Q"]]:
        """Every metric of every query, after reranking and before, in the order of the evaluation set.

        Raises:
            RuntimeError: If candidates have no score.
        """
        with self.sync_context(dist_sync_fn=self._gather):
            return self._per_query()

    def top_k(self, k: int) -> tuple[Float[Tensor, "Q K"], Int64[Tensor, "Q K"]]:
        """Scores and corpus columns of each query's first K = min(k, C) candidates; raises as ``per_query`` does.

        Where a query has fewer, -inf and -1 fill up.
        """
        with self.sync_context(dist_sync_fn=self._gather):
            scores = self._matrix()
        order = order_keys(scores, self.name_order).argsort(descending=True)[:, :k]
        return scores.gather(1, order), torch.where(self._there, self.candidates, -1).gather(1, order)

    def _per_query(self) -> dict[str, Float64[Tensor, " Q"]]:
        after = ranks(self._matrix(), self.relevant, self.name_order)
        before = torch.where(self.relevant >= 0, 1.0 + self.relevant.double(), torch.inf)
        stages = {"": after, "/before": before}
        return {
            name + suffix: metric(found, self.grades)
            for suffix, found in stages.items()
            for name, metric in METRICS.items()
        }

    def _matrix(self) -> Float[Tensor, "Q C"]:
        """Each candidate's score, the first that came; -inf where a query has fewer candidates than others."""
        first, missing = first_rows(self.places, len(self._keys))
        if missing:
            raise RuntimeError(
                f"{missing} of the {len(self._keys)} candidates of reranking set {self.evaluation.name!r} have no "
                "score: metrics need all of its batches, limit none of them"
            )
        scores = torch.full(self.candidates.shape, -torch.inf)
        scores[self._there] = dim_zero_cat(self.scores)[first, 0]
        return scores

    def _key(self, pairs: Int64[Tensor, "N 2"]) -> Int64[Tensor, " N"]:
        return pairs[:, 0] * len(self.evaluation.corpus) + pairs[:, 1]

    def _gather(self, state: Tensor, group: Any = None) -> list[Tensor]:
        return gather_rows(state, self.device, group)


def _padded(reranking: RerankingSet) -> tuple[Int64[Tensor, "Q C"], Bool[Tensor, "Q C"]]:
    """Corpus columns of each query's candidates, padded with 0, and where there is one."""
    columns = [torch.tensor(row, dtype=torch.long) for row in map(list, reranking.candidates)]
    if not any(map(len, columns)):
        raise ValueError(f"reranking set {reranking.name!r} has no query with a candidate")
    for query, row in zip(reranking.evaluation.query_names, columns, strict=True):
        if len(row.unique()) < len(row):
            raise ValueError(f"reranking set {reranking.name!r}: query {query!r} has a candidate twice")
    there = [torch.ones(len(row), dtype=torch.bool) for row in columns]
    return pad_sequence(columns, batch_first=True), pad_sequence(there, batch_first=True)
