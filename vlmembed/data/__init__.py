"""Training rows, evaluation sets, and the batches that are made of them. README.md in this folder is the cookbook."""

from vlmembed.data.collate import Collator, ItemCollator, PairCollator
from vlmembed.data.datamodule import RetrievalDataModule
from vlmembed.data.evaluation import (
    EvaluationFolder,
    EvaluationRows,
    EvaluationSource,
    EvaluationTables,
    RerankingRows,
    RerankingRun,
    RerankingSource,
)
from vlmembed.data.pages import Pages
from vlmembed.data.rows import Lookup, Rows, Table
from vlmembed.data.sources import GroupByQuery, Mixture, Source
from vlmembed.data.streaming import StreamingRows

__all__ = [
    "Collator",
    "EvaluationFolder",
    "EvaluationRows",
    "EvaluationSource",
    "EvaluationTables",
    "GroupByQuery",
    "ItemCollator",
    "Lookup",
    "Mixture",
    "Pages",
    "PairCollator",
    "RerankingRows",
    "RerankingRun",
    "RerankingSource",
    "RetrievalDataModule",
    "Rows",
    "Source",
    "StreamingRows",
    "Table",
]

#: The old YAML name, for one release.
Lists = GroupByQuery
