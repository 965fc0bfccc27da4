"""Where rows come from, how they are mixed, and how they become batches."""

from vlmembed.data.cells import to_item
from vlmembed.data.collate import Collator, ItemCollator
from vlmembed.data.datamodule import RetrievalDataModule
from vlmembed.data.evaluation import (
    EvaluationFolder,
    EvaluationRows,
    EvaluationSource,
    RerankingRows,
    RerankingRun,
    RerankingSource,
    load_evaluation,
)
from vlmembed.data.sampling import Batches
from vlmembed.data.sources import GroupByQuery, Mixture, Rows, Source
from vlmembed.data.tasks import Embedding, Reranking, Task

__all__ = [
    "Batches",
    "Collator",
    "Embedding",
    "EvaluationFolder",
    "EvaluationRows",
    "EvaluationSource",
    "GroupByQuery",
    "ItemCollator",
    "Mixture",
    "Reranking",
    "RerankingRows",
    "RerankingRun",
    "RerankingSource",
    "RetrievalDataModule",
    "Rows",
    "Source",
    "Task",
    "load_evaluation",
    "to_item",
]

#: The old YAML name, for one release.
Lists = GroupByQuery
