"""Metrics of rankings, as functions and as what collects their inputs while a model runs."""

from vlmembed.metrics.functions import METRICS, Relevance
from vlmembed.metrics.retrieval import RerankingMetrics, RetrievalMetrics

__all__ = ["METRICS", "Relevance", "RerankingMetrics", "RetrievalMetrics"]
