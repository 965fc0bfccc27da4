"""Queries with the candidates of a first stage."""

from __future__ import annotations

from vlmembed.data.evaluation import EvaluationSource
from vlmembed.data.sources import Source
from vlmembed.types import RerankingSet


def load_reranking(given: str | Source | EvaluationSource, split: str) -> RerankingSet:
    raise NotImplementedError
