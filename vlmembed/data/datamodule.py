"""From paths in the YAML to batches in the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from vlmembed.data.collate import PATCH_COST, ExampleCollator
from vlmembed.data.evaluation import EvaluationSource, RerankingSource
from vlmembed.data.sampling import (
    BadRowFile,
    Batches,
    ExampleLists,
    ReadableRows,
    ResumableLoader,
    SkipBadRows,
    own_generator,
)
from vlmembed.data.sources import Mixture, Rows, Source
from vlmembed.types import Chunking
from vlmembed.training.signals import leave_stopping_to_parent
from vlmembed.types import Preprocessor

Training = str | Source | list[str | Source]
Evaluation = str | Source | EvaluationSource | RerankingSource
Evaluations = Evaluation | list[Evaluation]

#: The split that a bare path means in ``val`` and ``test``.
SPLITS = {"val": "validation", "test": "test"}


class RetrievalDataModule(LightningDataModule):
    """Training rows and evaluation sets, as batches for a model.

    Where a path is a data set with several splits, ``train``, ``val`` and ``test`` mean its ``train``, ``validation``
    and ``test``; write a ``vlmembed.data.Rows`` for another. Use ``Trainer(use_distributed_sampler=False)``: batches
    are cut for the processes here.

    Args:
        train: Training rows: a JSONL, CSV or Parquet file, a saved data set, a Hub id, a ``vlmembed.data.Source`` (a
            ``Mixture`` decides how sources are mixed), or a list of these, mixed by size.
        val: What to measure on while training: a folder with ``corpus.jsonl``, ``queries.jsonl`` and ``qrels.tsv``;
            training rows; a ``vlmembed.data.EvaluationSource``; for a cross-encoder, training rows or a
            ``vlmembed.data.RerankingRun``; or a list of these.
        test: What to measure on with ``test``, and to embed with ``predict`` (which takes ``val`` if there is no
            ``test``). As ``val``.
        batch_size: Training rows per process and step; every other row's documents are negatives.
        chunk_size: Items of average cost that go through the model at once in training: more short texts, fewer large
            images. ``auto`` measures what memory allows. Changes memory and speed, never the gradient. Null for the
            whole batch.
        eval_batch_size: Items that go through the model at once when measuring.
        num_workers: Processes per loader that read and preprocess; 0 to do it in the training process.
        seed: Draws the order of the training rows.
        on_bad_row: What to do with a training row that cannot be used: it is not JSON, a cell has the wrong type, a
            score is no number, an image is gone or damaged. ``raise`` stops and names it. ``skip`` leaves it out, so
            that its batch is smaller, and names it in ``bad_rows.jsonl`` in the run's folder. Evaluation sets have no
            such choice: a metric over fewer rows is another metric.
        max_bad_rows: How many rows may be left out, over all processes and restarts, before the run stops.
    """

    def __init__(
        self,
        train: Training | None = None,
        val: Evaluations | None = None,
        test: Evaluations | None = None,
        batch_size: int = 64,
        chunk_size: int | Literal["auto"] | None = None,
        eval_batch_size: int = 32,
        num_workers: int = 2,
        seed: int = 0,
        on_bad_row: Literal["raise", "skip"] = "raise",
        max_bad_rows: int = 100,
    ):
        super().__init__()
        if eval_batch_size < 1:
            raise ValueError(f"eval_batch_size is 1 or more, got {eval_batch_size}.")
        if on_bad_row not in ("raise", "skip") or max_bad_rows < 0:
            raise ValueError(
                f"on_bad_row is raise or skip, max_bad_rows 0 or more; got {on_bad_row!r} and {max_bad_rows}."
            )
        self.train = train
        self.val = val
        self.test = test
        self.batch_size = batch_size
        self.chunk_size = chunk_size
        #: What ``auto`` turned out to be: the tokens of a chunk. The module that is trained measures it.
        self.collator = None
        self.chunking = Chunking(chunk_size if isinstance(chunk_size, int) else None)
        #: What a patch costs; the module that is trained knows whether its vision tower is.
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.on_bad_row = on_bad_row
        self.max_bad_rows = max_bad_rows
        #: Of each stage (``val``, ``test``, ``predict``), its evaluation sets, one per loader.
        self.evaluations: dict[str, list[Any]] = {}

    def setup(self, stage: str) -> None:
        """Open what the stage needs.

        Raises:
            ValueError: If something is missing, cannot be read, or two evaluation sets of a stage have one name.
        """
        self._task = self.collator
        if stage == "fit":
            self._mixture = as_mixture(self.train)
        if stage == "validate" or (stage == "fit" and self.val is not None):
            self.evaluations.setdefault("val", load_evaluations(self._task, self.val, SPLITS["val"]))
        if stage == "test":
            self.evaluations.setdefault("test", load_evaluations(self._task, self.test, SPLITS["test"]))
        if stage == "predict":
            asked, split = (self.val, "val") if self.test is None else (self.test, "test")
            self.evaluations.setdefault("predict", load_evaluations(self._task, asked, SPLITS[split]))

    @property
    def steps_per_epoch(self) -> int:
        """Training batches per epoch and process, known without reading the rows."""
        return len(self._batches())

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training batches."""
        if self._trainer.overfit_batches:
            # Lightning would replace the sampler by one that knows no batches.
            raise ValueError("trainer.overfit_batches is not supported; train on a small file instead.")
        examples, collate = ExampleLists(self._mixture), self._collator()
        skips = self.on_bad_row == "skip"
        if skips:
            folder = Path(self._trainer.log_dir or self._trainer.default_root_dir)
            self._bad_rows = BadRowFile(folder, self.max_bad_rows)
        return ResumableLoader(
            ReadableRows(examples) if skips else examples,
            sampler=self._batches(),
            collate_fn=SkipBadRows(collate) if skips else collate,
            persistent_workers=self.num_workers > 0,
            **self._loader_options,
        )

    def set_chunking(self, tokens, patch_cost):
        self.chunking = Chunking(self.chunking.size, tokens, patch_cost)

    def _collator(self):
        self.collator.chunking = self.chunking
        return self.collator

    def state_dict(self) -> dict[str, Any]:
        """Keep the size of chunks, so that a resumed run cuts the same."""
        return {"tokens": self.chunking.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint says."""
        self.chunking = Chunking(self.chunking.size, state_dict["tokens"], self.chunking.patch_cost)

    def val_dataloader(self) -> list[DataLoader]:
        """Return a loader for each validation set: its queries and corpus, sorted by cost."""
        return self._evaluation_loaders("val")

    def test_dataloader(self) -> list[DataLoader]:
        """Return a loader for each test set."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> list[DataLoader]:
        """Return a loader for each set to embed."""
        return self._evaluation_loaders("predict")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Write down the rows that a training batch lacks, when its step begins: not when a worker reads ahead."""
        if getattr(batch, "bad_rows", ()):
            self._bad_rows.add(batch.bad_rows)
        return batch

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Leave the batch on the host: the encoder takes its chunks over one at a time."""
        return batch

    def _batches(self) -> Batches:
        trainer = self._trainer
        rank, world_size = trainer.global_rank, trainer.world_size
        return Batches(self._mixture, self.batch_size, self.seed, rank, world_size, self._task.distinct_queries)

    def _evaluation_loaders(self, stage: str) -> list[DataLoader]:
        rank, world_size = self._trainer.global_rank, self._trainer.world_size
        return [
            self._task.loader(each, self.eval_batch_size, rank, world_size, **self._loader_options)
            for each in self.evaluations.get(stage, [])
        ]

    @property
    def _loader_options(self) -> dict[str, Any]:
        on_gpu = self._trainer.strategy.root_device.type == "cuda"
        return {
            "batch_size": None,
            "num_workers": self.num_workers,
            "pin_memory": on_gpu,
            "generator": own_generator(self.seed),
            "worker_init_fn": leave_stopping_to_parent,
        }

    @property
    def _trainer(self) -> Any:
        if self.trainer is None:
            raise ValueError("The data module needs a Trainer: it asks it for rank, device and preprocessor.")
        return self.trainer


def as_mixture(train: Training | None) -> Mixture:
    """Turn what the YAML says about training data into one mixture.

    Raises:
        ValueError: If there is nothing.
    """
    given = train if isinstance(train, list) else [train]
    sources = [Rows(one) if isinstance(one, str) else one for one in given if one is not None]
    if not sources:
        raise ValueError("data.train is not given: fit needs training rows.")
    return sources[0] if len(sources) == 1 and isinstance(sources[0], Mixture) else Mixture(sources)


def load_evaluations(task, given: Evaluations | None, split: str) -> list[Any]:
    """Load the evaluation sets of a stage.

    Args:
        task: What they are for.
        given: What the YAML says.
        split: What to take of a data set that is given by its path and has several splits.

    Raises:
        ValueError: If there is nothing, or two sets have one name and would share their metrics.
    """
    if given is None or given == []:
        raise ValueError(
            "There is nothing to measure on: give data.val to validate, data.test to test, either to predict."
        )
    sets = [task.load(one, split) for one in (given if isinstance(given, list) else [given])]
    name, count = Counter(one.name for one in sets).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} evaluation sets are called {name!r}; give their EvaluationFolder or -Rows a name.")
    return sets
