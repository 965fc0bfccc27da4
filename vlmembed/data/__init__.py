"""Where rows come from, how they are mixed, and how they become batches."""

from vlmembed.data.batches import Batches
from vlmembed.data.cells import to_item
from vlmembed.data.collate import Collator, ItemCollator
from vlmembed.data.datamodule import RetrievalDataModule
from vlmembed.data.evaluation import EvaluationFolder, EvaluationRows, EvaluationSource, load_evaluation
from vlmembed.data.lists import Lists
from vlmembed.data.mixture import Mixture
from vlmembed.data.reranking import RerankingRows, RerankingRun, RerankingSource
from vlmembed.data.sources import Rows, Source
from vlmembed.data.tasks import Embedding, Reranking, Task

__all__ = [
    "Batches",
    "Collator",
    "Embedding",
    "EvaluationFolder",
    "EvaluationRows",
    "EvaluationSource",
    "ItemCollator",
    "Lists",
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
