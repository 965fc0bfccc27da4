"""The Lightning callback that records what a trial cost, and what each query found."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from vlmembed.files import write_whole
from vlmembed.media import load_image
from vlmembed.metrics import RerankingMetrics
from vlmembed.types import EvaluationSet, Item

#: Documents of each query, and queries of each evaluation set, that the report can show.
DOCUMENTS, QUERIES = 5, 200
#: Pixels of the longest side of an image, and characters of a text.
SIDE, CHARACTERS = 160, 2_000
#: Steps that are slower than the others: kernels are chosen and memory is found.
FIRST_STEPS = 2


class Record(Callback):
    """Records cost, scores per query and top documents; ``ablate`` adds it to its trials.

    Args:
        documents: The folder of the documents that can be shown, for all trials together.
        stage: Which evaluation sets are recorded.
    """

    def __init__(self, documents: str, stage: Literal["val", "test"] = "test") -> None:
        self.documents = Path(documents)
        self.stage = stage
        self._has_trained = False
        self._steps: list[float] = []
        self._elapsed = 0.0
        self._cost: dict[str, float] = {}

    @property
    def seconds_per_step(self) -> float:
        """The median of a step, without the first ones if there are others."""
        return statistics.median(self._steps[FIRST_STEPS:] or self._steps or [0.0])

    def now(self, device: torch.device) -> float:
        """Return seconds, once the device has done its work."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Note the first step, which is not 0 where training is resumed."""
        self._last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._start = self.now(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it; a step of several batches takes what they take together."""
        self._elapsed += self.now(pl_module.device) - self._start
        if trainer.global_step > self._last_step:
            self._steps.append(self._elapsed)
            self._elapsed, self._last_step = 0.0, trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write ``cost.json``."""
        self._has_trained = True
        encoder, device = pl_module.encoder, pl_module.device
        # Main memory: in kilobytes, but on a Mac in bytes.
        main_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        cost: dict[str, float] = {
            "seconds_per_step": self.seconds_per_step,
            "steps_per_epoch": -(-trainer.num_training_batches // trainer.accumulate_grad_batches),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else main_memory,
            "trained_parameters": sum(weight.numel() for weight in pl_module.parameters() if weight.requires_grad),
            "pooling_parameters": sum(weight.numel() for weight in encoder.pooling.parameters()),
            "embedding_dimension": encoder.dimension,
        }
        self._write_cost(trainer, cost)

    def _write_cost(self, trainer: Trainer, cost: Mapping[str, float]) -> None:
        self._cost |= cost
        folder = Path(trainer.log_dir or ".")  # All processes ask: they agree on it.
        if trainer.is_global_zero:
            write_whole(folder / "cost.json", json.dumps(self._cost, indent=1).encode())

    def start_measuring(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock of a reranker, whose search is this."""
        self._measuring_start = self.now(pl_module.device)

    on_validation_epoch_start = on_test_epoch_start = start_measuring

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Record what the trained model finds in the validation sets."""
        if self.stage == "val" and trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Record what the trained model finds in the test sets."""
        if self.stage == "test":
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: Any) -> None:
        """Write what the trained model finds, and what a search costs; the fresh model's is not recorded."""
        if not self._has_trained:
            return
        folder, device = Path(trainer.log_dir or "."), pl_module.device
        reading, sizes, search, queries = self.now(device) - self._measuring_start, list[float](), 0.0, 0
        for metrics in pl_module.metrics:
            # Each process has a share of the embeddings or scores, so all of them ask.
            values, start = metrics.per_query(), self.now(device)
            scores, columns = metrics.top_k(DOCUMENTS)  # (Q, 5)
            search, queries = search + self.now(device) - start, queries + len(scores)
            vectors = float(metrics.compute().get("vectors_per_document", 1))
            sizes.append(4 * pl_module.encoder.dimension * vectors)
            if trainer.is_global_zero:
                self._write_ranking(folder, metrics.evaluation, values, scores, columns)
        if isinstance(metrics, RerankingMetrics):  # It keeps nothing of a document, and reads all when it is asked.
            sizes, search = [0.0], reading
        self._write_cost(trainer, {"document_bytes": statistics.mean(sizes), "search_seconds": search / queries})

    def _write_ranking(
        self, folder: Path, evaluation: EvaluationSet, values: dict[str, Tensor], scores: Tensor, columns: Tensor
    ) -> None:
        """Write every metric (Q,) of each query, and the scores and columns (Q, 5) of its top documents."""
        names = evaluation.query_names
        measured_folder, documents = folder / "measured" / evaluation.name, self.documents / evaluation.name
        table = pd.DataFrame({name: column.tolist() for name, column in values.items()}, names)
        write_whole(measured_folder / "per_query.csv", table.to_csv(index_label="query").encode())
        tops, shown = {}, set[str]()
        # The same queries in every trial: the first by name.
        for row in sorted(range(len(names)), key=names.__getitem__)[:QUERIES]:
            grades = evaluation.qrels[names[row]]
            # A reranker's list of candidates may be shorter than others, and -1 fills it up.
            found = [evaluation.document_names[column] for column in columns[row].tolist() if column >= 0]
            top = [[name, score, grades.get(name, 0)] for name, score in zip(found, scores[row].tolist(), strict=False)]
            relevant = {name: grade for name, grade in grades.items() if grade > 0}
            tops[names[row]] = {"top": top, "relevant": relevant}
            shown |= {*found, *[*relevant][:DOCUMENTS]}
            show(evaluation.queries[row], self.documents / "queries" / evaluation.name, names[row])
        write_whole(measured_folder / "top.json", json.dumps(tops).encode())
        for name, document in zip(evaluation.document_names, evaluation.corpus, strict=True):
            if name in shown:
                show(document, documents, name)


def show(item: Item, folder: Path, name: str) -> None:
    """Write an item's first image, made small, and its texts, unless another trial has."""
    image_path, text_path = (content_path(folder, name, kind) for kind in ("jpg", "txt"))
    frames = [frame for part in item.parts for frame in part.frames]
    # A video or audio file is shown by its name.
    values = ["audio" if isinstance(part.value, bytes) else part.value for part in item.parts if not part.frames]
    words = [getattr(value, "name", str(value)) for value in values]
    if words and not text_path.exists():
        write_whole(text_path, "\n".join(words)[:CHARACTERS].encode())
    if frames and not image_path.exists():
        image, file = load_image(frames[0], item.origin), io.BytesIO()
        image.thumbnail((SIDE, SIDE))
        image.save(file, "JPEG", quality=80)
        write_whole(image_path, file.getvalue())


def content_path(folder: Path, name: str, kind: str) -> Path:
    """Return where a document or query is shown, as ``jpg`` or ``txt``; its id may hold any character."""
    return folder / f"{hashlib.sha1(name.encode()).hexdigest()[:16]}.{kind}"
