"""Where rows come from, how they are mixed, and how they become batches; README.md beside this file is for users."""

from vlmembed.data.collate import Collator, ItemCollator, PairCollator
from vlmembed.data.datamodule import RetrievalDataModule
from vlmembed.data.evaluation import (
    EvaluationFolder,
    EvaluationRows,
    EvaluationSource,
    RerankingRows,
    RerankingRun,
    RerankingSource,
)
from vlmembed.data.sources import GroupByQuery, Mixture, Rows, Source

__all__ = [
    "Collator",
    "EvaluationFolder",
    "EvaluationRows",
    "EvaluationSource",
    "GroupByQuery",
    "ItemCollator",
    "Mixture",
    "PairCollator",
    "RerankingRows",
    "RerankingRun",
    "RerankingSource",
    "RetrievalDataModule",
    "Rows",
    "Source",
]

#: The old YAML name, for one release.
Lists = GroupByQuery
