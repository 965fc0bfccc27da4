"""Metrics of rankings, as functions and as what collects their inputs while a model runs."""

from vlmembed.metrics.functions import (
    METRICS,
    average_precision,
    judgements,
    ndcg_at_k,
    order_keys,
    ranks,
    recall_at_k,
    reciprocal_rank_at_k,
)
from vlmembed.metrics.reranking import RerankingMetrics
from vlmembed.metrics.retrieval import RetrievalMetrics

__all__ = [
    "METRICS",
    "RerankingMetrics",
    "RetrievalMetrics",
    "average_precision",
    "judgements",
    "ndcg_at_k",
    "order_keys",
    "ranks",
    "recall_at_k",
    "reciprocal_rank_at_k",
]
