"""Metrics of rankings, as functions and as what collects their inputs while a model runs."""

from vlmembed.metrics.functions import MEAN, METRICS, Relevance, mean_over
from vlmembed.metrics.retrieval import RerankingMetrics, RetrievalMetrics

__all__ = ["MEAN", "METRICS", "Relevance", "RerankingMetrics", "RetrievalMetrics", "mean_over"]
