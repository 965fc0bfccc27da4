"""Retrieval metrics that agree with ``pytrec_eval``, from the ranks of the relevant documents alone.

A query's documents are ranked by score, equal scores by document name, both descending. Nothing but the ranks of the
relevant documents enters a metric, and a rank is one more than the number of documents ahead: no sort of the corpus.
In shapes, R is the most relevant documents that a query has; fewer are filled up with grade 0, which counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from vlmembed.types import EvaluationSet

#: Bounds the memory of scoring: this many query-document scores are looked at together (some 500 MiB with all copies).
SCORES_PER_BLOCK = 2**24

#: Bounds the device memory of gathering, where a whole corpus may not fit: rows of each process sent together.
ROWS_PER_GATHER = 2**15


def order_keys(scores: Float[Tensor, "Q P"], name_order: Int[Tensor, " P"]) -> Int64[Tensor, "Q P"]:
    """Turn scores into distinct integers that sort as the documents do: by score, then by name.

    Args:
        scores: Compared as float32.
        name_order: Position of each document when the corpus is sorted by name.
    """
    # The bits of a float sort as the number does once those below the sign of a negative one are flipped. Adding 0.0
    # turns -0.0 into 0.0, which it equals.
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ascending.long() << 32) + name_order


def ranks(
    scores: Float[Tensor, "Q P"], relevant: Int[Tensor, "Q R"], name_order: Int[Tensor, " P"]
) -> Float64[Tensor, "Q R"]:
    """Rank of each relevant document, from 1; infinite where there is none.

    Args:
        scores: Of every document for every query.
        relevant: Columns of the relevant documents; -1 where a document is not in the corpus, or as padding.
        name_order: See ``order_keys``.
    """
    keys = order_keys(scores, name_order)
    # One column of relevant documents at a time: all at once would take R times the memory of the scores.
    own_keys = keys.gather(1, relevant.clamp(min=0))
    ahead = torch.stack([(keys > own[:, None]).sum(1) for own in own_keys.unbind(1)], dim=1)
    return torch.where(relevant >= 0, 1.0 + ahead.double(), torch.inf)


def ndcg_at_k(ranks: Float64[Tensor, "Q R"], grades: Int[Tensor, "Q R"], k: int) -> Float64[Tensor, " Q"]:
    """Normalised discounted cumulative gain: grade over log2(rank + 1), relative to the best possible order.

    A query without relevant documents counts 0, in all of these metrics.
    """
    gains = grades.clamp(min=0).double()
    gained = torch.where(ranks <= k, gains / torch.log2(ranks + 1), 0.0).sum(1)
    best = gains.sort(dim=1, descending=True).values[:, :k]
    ideal = (best / torch.log2(torch.arange(best.shape[1]).double() + 2)).sum(1)
    return torch.where(ideal > 0, gained / ideal, 0.0)


def recall_at_k(ranks: Float64[Tensor, "Q R"], grades: Int[Tensor, "Q R"], k: int) -> Float64[Tensor, " Q"]:
    """Share of the relevant documents among the first k."""
    relevant = grades > 0
    return (relevant & (ranks <= k)).sum(1).double() / relevant.sum(1).clamp(min=1)


def reciprocal_rank_at_k(ranks: Float64[Tensor, "Q R"], grades: Int[Tensor, "Q R"], k: int) -> Float64[Tensor, " Q"]:
    """One over the rank of the first relevant document, 0 if that is beyond k."""
    first = torch.where(grades > 0, ranks, torch.inf).amin(1)
    return torch.where(first <= k, 1 / first, 0.0)


def average_precision(ranks: Float64[Tensor, "Q R"], grades: Int[Tensor, "Q R"]) -> Float64[Tensor, " Q"]:
    """Mean, over the relevant documents, of the precision at their ranks."""
    relevant = grades > 0
    ascending = torch.where(relevant, ranks, torch.inf).sort(dim=1).values
    precision = torch.arange(1, ranks.shape[1] + 1).double() / ascending
    return precision.sum(1) / relevant.sum(1).clamp(min=1)


#: What is reported, by name.
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ndcg@10": partial(ndcg_at_k, k=10),
    "recall@1": partial(recall_at_k, k=1),
    "recall@10": partial(recall_at_k, k=10),
    "mrr@10": partial(reciprocal_rank_at_k, k=10),
    "map": average_precision,
}


def judgements(evaluation: EvaluationSet) -> tuple[Int64[Tensor, "Q R"], Int64[Tensor, "Q R"], Int64[Tensor, " P"]]:
    """Columns and grades of each query's relevant documents, padded with -1 and 0, and the corpus' name order.

    A relevant document that the corpus lacks has column -1 and keeps its grade: it is there to be found, and never is.

    Raises:
        ValueError: If two documents share a name, or no query has a relevant document.
    """
    columns = {name: column for column, name in enumerate(evaluation.document_names)}
    if len(columns) < len(evaluation.document_names):
        raise ValueError(f"evaluation set {evaluation.name!r} has documents that share a name")
    judged = [evaluation.qrels[name] for name in evaluation.query_names]
    positive = [{name: grade for name, grade in each.items() if grade > 0} for each in judged]
    if not any(positive):
        raise ValueError(f"evaluation set {evaluation.name!r} has no query with a document of grade 1 or above")
    relevant = [torch.tensor([columns.get(name, -1) for name in each], dtype=torch.long) for each in positive]
    grades = [torch.tensor(list(each.values()), dtype=torch.long) for each in positive]
    by_name = sorted(range(len(columns)), key=evaluation.document_names.__getitem__)
    return (
        pad_sequence(relevant, batch_first=True, padding_value=-1),
        pad_sequence(grades, batch_first=True, padding_value=0),
        torch.tensor(by_name, dtype=torch.long).argsort(),
    )


class RetrievalMetrics(Metric):
    """Collects the embeddings of an evaluation set and measures how well its queries find their documents.

    Similarity is the cosine, in float32. Embeddings wait on the CPU and are compared there. Several processes may
    each update with their share; ``compute``, ``per_query`` and ``top_k`` join the shares, so all processes must call
    them. An item seen twice (samplers repeat items to even out processes) counts once.

    Args:
        evaluation: The queries, the corpus and the judgements.
        dimensions: Measure embeddings cut to these dimensions as well, under ``name/dimension``.

    Raises:
        ValueError: If nothing can be measured, document names repeat, or a dimension is below 1 or repeated.
    """

    full_state_update = False
    rows: list[Tensor]
    embeddings: list[Tensor]

    def __init__(self, evaluation: EvaluationSet, dimensions: Sequence[int] = ()) -> None:
        super().__init__(dist_sync_fn=self._gather)
        if any(dimension < 1 for dimension in dimensions) or len(set(dimensions)) < len(dimensions):
            raise ValueError(f"dimensions must be distinct numbers of at least 1, got {dimensions!r}")
        self.evaluation = evaluation
        self.dimensions = tuple(dimensions)
        self.relevant, self.grades, self.name_order = judgements(evaluation)
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("embeddings", default=[], dist_reduce_fx="cat")

    def update(self, rows: Int[Tensor, " B"], embeddings: Float[Tensor, "B D"]) -> None:
        """Take the embeddings of some items: any float type, not normalised.

        Args:
            rows: Their numbers in the evaluation set: its queries first, then its corpus.
            embeddings: One for each row.

        Raises:
            ValueError: If a row is not in the set, or an embedding is not finite (it would rank first).
        """
        rows, embeddings = rows.detach().cpu().long(), embeddings.detach().float().cpu()
        outside = rows[(rows < 0) | (rows >= self._items)].tolist()
        if outside:
            raise ValueError(f"evaluation set {self.evaluation.name!r} has {self._items} items, no rows {outside}")
        broken = rows[~embeddings.isfinite().all(1)].tolist()
        if broken:
            raise ValueError(f"embeddings of rows {broken} of evaluation set {self.evaluation.name!r} are not finite")
        self.rows.append(rows[:, None])
        self.embeddings.append(embeddings)

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Mean of every metric over queries; raises as ``per_query`` does."""
        return {name: values.mean().float() for name, values in self._per_query().items()}

    def per_query(self) -> dict[str, Float64[Tensor, " Q"]]:
        """Every metric of every query, in the order of the evaluation set.

        Raises:
            RuntimeError: If items of the evaluation set are missing.
            ValueError: If a dimension is above the embedding's.
        """
        with self.sync_context(dist_sync_fn=self._gather):
            return self._per_query()

    def joined(self) -> Float[Tensor, "N D"]:
        """The embeddings of all items, queries first, not normalised; raises as ``per_query`` does."""
        with self.sync_context(dist_sync_fn=self._gather):
            return self._matrix()

    def top_k(self, k: int) -> tuple[Float[Tensor, "Q K"], Int64[Tensor, "Q K"]]:
        """Scores and corpus columns of each query's first K = min(k, P) documents; raises as ``per_query`` does."""
        with self.sync_context(dist_sync_fn=self._gather):
            found = []
            for _, scores in self._score_blocks(self._matrix()):
                columns = order_keys(scores, self.name_order).topk(min(k, scores.shape[1])).indices
                found.append((scores.gather(1, columns), columns))
        scores, columns = (torch.cat(blocks) for blocks in zip(*found, strict=True))
        return scores, columns

    @property
    def _items(self) -> int:
        return len(self.evaluation.queries) + len(self.evaluation.corpus)

    def _per_query(self) -> dict[str, Float64[Tensor, " Q"]]:
        matrix = self._matrix()
        largest, available = max(self.dimensions, default=0), matrix.shape[1]
        if largest > available:
            raise ValueError(f"dimension {largest} is above the embedding's, which is {available}")
        values: dict[str, Tensor] = {}
        for suffix, dimension in [("", available), *((f"/{d}", d) for d in self.dimensions)]:
            blocks = self._score_blocks(matrix[:, :dimension])
            found = torch.cat([ranks(scores, self.relevant[rows], self.name_order) for rows, scores in blocks])
            values |= {name + suffix: metric(found, self.grades) for name, metric in METRICS.items()}
        return values

    def _matrix(self) -> Float[Tensor, "N D"]:
        """One embedding per item, in order: the first that came."""
        rows = dim_zero_cat(self.rows)[:, 0] if len(self.rows) else torch.empty(0, dtype=torch.long)
        first = torch.full((self._items,), len(rows)).scatter_reduce_(0, rows, torch.arange(len(rows)), "amin")
        missing = int((first == len(rows)).sum())
        if missing:
            raise RuntimeError(
                f"{missing} of the {self._items} items of evaluation set {self.evaluation.name!r} have no embedding: "
                "metrics need all of its batches, limit none of them"
            )
        return dim_zero_cat(self.embeddings)[first]

    def _score_blocks(self, embeddings: Float[Tensor, "N D"]) -> Iterator[tuple[slice, Float[Tensor, "Q P"]]]:
        """Cosine of some queries with the whole corpus, block after block."""
        queries, corpus = normalize(embeddings, dim=1).split(
            [len(self.evaluation.queries), len(self.evaluation.corpus)]
        )
        height = max(1, SCORES_PER_BLOCK // len(corpus))
        for start in range(0, len(queries), height):
            rows = slice(start, start + height)
            # NumPy's product stays float32, whatever autocast and torch.set_float32_matmul_precision say.
            yield rows, torch.from_numpy(queries[rows].numpy() @ corpus.numpy().T)

    def _gather(self, state: Tensor, group: Any = None) -> list[Tensor]:
        """Collect a state from all processes, through the metric's device as NCCL takes no CPU tensors, in pieces."""
        own = torch.tensor([len(state), state.shape[-1], state.dtype == torch.long], device=self.device)
        height, width, whole = torch.stack(gather_all_tensors(own, group)).amax(0).tolist()
        if not len(state):  # A process without items does not know what the others hold.
            state = torch.empty(0, width, dtype=torch.long if whole else torch.float32)
        pieces = (state[start : start + ROWS_PER_GATHER] for start in range(0, max(1, height), ROWS_PER_GATHER))
        return [part.cpu() for piece in pieces for part in gather_all_tensors(piece.to(self.device), group)]


class RerankingMetrics(Metric):
    """Placeholder."""
