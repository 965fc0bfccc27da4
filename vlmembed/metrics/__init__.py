"""Metrics of rankings, as functions and as what collects their inputs while a model runs."""

from vlmembed.metrics.functions import MEAN, METRICS, Relevance, mean_over
from vlmembed.metrics.retrieval import MultiVectorMetrics, RerankingMetrics, RetrievalMetrics

__all__ = ["MEAN", "METRICS", "MultiVectorMetrics", "Relevance", "RerankingMetrics", "RetrievalMetrics", "mean_over"]
