"""What a run of an ablation leaves besides its log: what it cost, and what each query found."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from vlmembed.ablation.documents import show, words_of
from vlmembed.ablation.results import QUERY_FOLDER, cost_path, csv_text, per_query_path, top_path
from vlmembed.files import write_whole
from vlmembed.metrics import RerankingMetrics, RetrievalMetrics
from vlmembed.types import EvaluationSet, Item

#: Documents of each query, and queries of each evaluation set, that the report can show.
DOCUMENTS, QUERIES = 5, 200

#: Steps that are slower than the others: kernels are chosen and memory is found.
FIRST_STEPS = 2


class Record(Callback):
    """Records what a run costs, and what the trained model finds for each query; ``ablate`` adds it to its runs.

    Args:
        documents: Where documents are kept to be shown, for all runs together.
        stage: Which evaluation sets are recorded.
    """

    def __init__(self, documents: str, stage: Literal["val", "test"] = "test") -> None:
        self.documents = Path(documents)
        self.stage = stage
        self._has_trained = False
        self._steps: list[float] = []
        self._elapsed = 0.0

    @property
    def seconds_per_step(self) -> float:
        """The median of a step, without the first ones if there are others."""
        return statistics.median(self._steps[FIRST_STEPS:] or self._steps or [0.0])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Note where training starts; a run may go on from a checkpoint."""
        self._last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._start = _now(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it; a step of several batches takes what they take together."""
        self._elapsed += _now(pl_module.device) - self._start
        if trainer.global_step > self._last_step:
            self._steps.append(self._elapsed)
            self._elapsed, self._last_step = 0.0, trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write what training took."""
        self._has_trained = True
        pooling, dimension = pl_module.encoder.pooling, pl_module.encoder.dimension
        cost = {
            "seconds_per_step": self.seconds_per_step,
            "steps_per_epoch": -(-trainer.num_training_batches // trainer.accumulate_grad_batches),
            "peak_memory_bytes": _peak_memory(pl_module.device),
            "trained_parameters": _count(each for each in pl_module.parameters() if each.requires_grad),
            "pooling_parameters": _count(pooling.parameters()),
            "embedding_dimension": dimension,
            "embedding_bytes": 4 * dimension,
        }
        folder = _folder(trainer)
        if trainer.is_global_zero:
            write_whole(cost_path(folder), json.dumps(cost, indent=1).encode())

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep what the trained model finds in the validation sets."""
        if self.stage == "val" and trainer.state.fn == TrainerFn.VALIDATING:
            self._keep(trainer, pl_module.metrics)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep what the trained model finds in the test sets."""
        if self.stage == "test":
            self._keep(trainer, pl_module.metrics)

    def _keep(self, trainer: Trainer, measured: Iterable[RetrievalMetrics | RerankingMetrics]) -> None:
        """Write what each query found; what the fresh model finds is not kept."""
        folder = _folder(trainer)
        for metrics in measured if self._has_trained else ():
            # Each process has a share of the embeddings or scores, so all of them ask.
            values, (scores, columns) = metrics.per_query(), metrics.top_k(DOCUMENTS)
            if trainer.is_global_zero:
                evaluation = metrics.evaluation
                lines = zip(evaluation.query_names, *(each.tolist() for each in values.values()), strict=True)
                write_whole(per_query_path(folder, evaluation.name), csv_text(["query", *values], lines).encode())
                found = {
                    evaluation.query_names[row]: _found(evaluation, row, scores[row].tolist(), columns[row].tolist())
                    for row in _first_queries(evaluation)
                }
                write_whole(top_path(folder, evaluation.name), json.dumps(found).encode())
                show(_shown(evaluation, found), evaluation.name, self.documents)
                asked = {evaluation.query_names[row]: evaluation.queries[row] for row in _first_queries(evaluation)}
                show(asked, evaluation.name, self.documents / QUERY_FOLDER)


def _first_queries(evaluation: EvaluationSet) -> list[int]:
    """The same queries in every run: the first by name."""
    return sorted(range(len(evaluation.queries)), key=evaluation.query_names.__getitem__)[:QUERIES]


def _found(evaluation: EvaluationSet, row: int, scores: list[float], columns: list[int]) -> dict[str, Any]:
    """What the report shows of a query: itself, its first documents, and the right ones."""
    grades = evaluation.qrels[evaluation.query_names[row]]
    # A reranker's list of candidates may be shorter than others, and -1 fills it up.
    names = [evaluation.document_names[column] for column in columns if column >= 0]
    top = [[name, score, grades.get(name, 0)] for name, score in zip(names, scores, strict=False)]
    relevant = {name: grade for name, grade in grades.items() if grade > 0}
    return {"query": words_of(evaluation.queries[row]), "top": top, "relevant": relevant}


def _shown(evaluation: EvaluationSet, found: dict[str, dict[str, Any]]) -> dict[str, Item]:
    """The documents that the report may show: what was found, and a query's first right answers."""
    names = {name for each in found.values() for name, *_ in each["top"]}
    for each in found.values():
        names.update([*each["relevant"]][:DOCUMENTS])
    documents = zip(evaluation.document_names, evaluation.corpus, strict=True)
    return {name: document for name, document in documents if name in names}


def _folder(trainer: Trainer) -> Path:
    """The run's folder. All processes call: they agree on it."""
    return Path(trainer.log_dir or ".")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _peak_memory(device: torch.device) -> int:
    """The most bytes on the GPU since training began, or of this process in main memory since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes, but on a Mac bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
