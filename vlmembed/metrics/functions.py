"""Retrieval metrics that agree with ``pytrec_eval``, from the ranks of the relevant documents alone.

A query's documents are ranked by score, equal scores by document name, both descending. Nothing but the ranks of the
relevant documents enters a metric, and a rank is one more than the number of documents ahead: no sort of the corpus.
In shapes, R is the most relevant documents that a query has; fewer are filled up with grade 0, which counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmembed.types import EvaluationSet


def order_keys(scores: Float[Tensor, "Q P"], name_order: Int[Tensor, "... P"]) -> Int64[Tensor, "Q P"]:
    """Turn scores into distinct integers that sort as the documents do: by score, then by name.

    Args:
        scores: Compared as float32.
        name_order: Position of each document when the corpus is sorted by name; (Q, P) where each query has documents
            of its own.
    """
    # The bits of a float sort as the number does once those below the sign of a negative one are flipped. Adding 0.0
    # turns -0.0 into 0.0, which it equals.
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ascending.long() << 32) + name_order


def ranks(
    scores: Float[Tensor, "Q P"], relevant: Int[Tensor, "Q R"], name_order: Int[Tensor, "... P"]
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
