"""From paths in the YAML to batches in the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from vlmembed.data import checks
from vlmembed.data.collate import Collator
from vlmembed.data.evaluation import EvaluationSource, RerankingSource
from vlmembed.data.rows import INSTRUCTIONS, Rows, Table
from vlmembed.data.sources import (
    Batches,
    GroupByQuery,
    Mixture,
    ResumableLoader,
    RowLists,
    RowLoader,
    Source,
    read_usable,
    seeded_generator,
)
from vlmembed.data.streaming import StreamedBatches, StreamingRows, StreamLoader, collated, stream_of
from vlmembed.metrics import MEAN
from vlmembed.training.guards import BadRowFile, SkipBadRows
from vlmembed.training.signals import leave_stopping_to_parent
from vlmembed.types import PATCH_COST, Chunking

#: Rows of each source whose instructions are looked at, to name them.
SAMPLE = 32

Training = str | Source | list[str | Source]
Evaluation = str | Source | EvaluationSource | RerankingSource
Evaluations = Evaluation | list[Evaluation]


class RetrievalDataModule(LightningDataModule):
    """Training rows and evaluation sets, as batches for a model.

    Of a data set with several splits, ``train``, ``val`` and ``test`` read ``train``, ``validation`` and ``test``;
    write a ``vlmembed.data.Rows`` for another. `vlmembed.trainer.Trainer` sets ``collator`` to the model's; with
    another trainer, set it before anything runs, and ``use_distributed_sampler=False``.

    Args:
        train: Training rows: a JSONL, CSV or Parquet file, a saved data set, a Hub id, a ``vlmembed.data.Source``, or
            a list of these, mixed by size.
        val: What to measure on while training: an evaluation folder, training rows, a
            ``vlmembed.data.EvaluationSource``, for a cross-encoder a ``vlmembed.data.RerankingRun``, or a list.
        test: What to measure on with ``test``, and to embed with ``predict``, which takes ``val`` if there is none.
        batch_size: Training rows per process and step; the documents of all other rows are negatives.
        chunk_size: Items of average cost that go through the model at once in training. ``auto`` measures what memory
            allows, null is the whole batch. Changes memory and speed, never the gradient.
        eval_batch_size: Items that go through the model at once when measuring.
        num_workers: Processes per loader that read and preprocess; 0 to do it in the training process.
        seed: Draws the order of the training rows.
        on_bad_row: What to do with a training row that cannot be used: ``raise`` stops and names it, ``skip`` leaves it
            out of its batch and names it in ``bad_rows.jsonl`` in the run's folder. Evaluation sets have no such
            choice: a metric over fewer rows is another metric.
        max_bad_rows: How many rows may be left out, over all processes and restarts, before the run stops.
    """

    trainer: Any  # Says which process this is, and where its device is.
    _stream: StreamingRows | None = None

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
        self.train, self.val, self.test = train, val, test
        self.batch_size, self.chunk_size, self.eval_batch_size = batch_size, chunk_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.on_bad_row, self.max_bad_rows = on_bad_row, max_bad_rows
        #: Makes batches of the model's kind.
        self.collator: Collator | None = None
        #: The tokens of a chunk, where ``chunk_size: auto`` has measured them.
        self.chunk_tokens: int | None = None
        self.patch_cost = PATCH_COST
        #: The instructions of the training sources, by name; see `named_prompts`.
        self.prompts: dict[str, str] = {}
        #: How many training rows there are, where known.
        self.rows: int | None = None
        #: Of each stage (``val``, ``test``, ``predict``), its evaluation sets, one per loader.
        self.evaluations: dict[str, list[Any]] = {}

    def set_chunking(self, tokens: int | None, patch_cost: float) -> None:
        """Take what was measured on the model; a number in ``chunk_size`` takes precedence."""
        self.chunk_tokens, self.patch_cost = tokens, patch_cost

    def setup(self, stage: str) -> None:
        """Open what the stage needs; a ``ValueError`` says what is missing or cannot be read."""
        loaded = {*self.evaluations}
        if stage == "fit":
            self._mixture = as_mixture(self.train)
            self._stream = stream_of(self._mixture)
            self.prompts = named_prompts(self._mixture)
            self.rows = len(self._mixture) if self._stream is None else self._stream.rows
        if stage == "validate" or (stage == "fit" and self.val is not None):
            self._load("val", self.val, "validation")
        elif stage == "test":
            self._load("test", self.test, "test")
        elif stage == "predict":
            self._load("predict", *((self.val, "validation") if self.test is None else (self.test, "test")))
        checks.warn(self._problems(stage == "fit", loaded))

    def _problems(self, is_fit: bool, loaded: set[str]) -> Iterator[str]:
        """Say what looks wrong with what has been opened since some stages were loaded."""
        mixture = getattr(self, "_mixture", None)
        if mixture is not None and is_fit:
            yield from checks.in_rows(mixture)
        for stage, sets in self.evaluations.items():
            for evaluation in (getattr(one, "evaluation", one) for one in sets):
                if stage not in loaded:
                    yield from checks.in_evaluation(evaluation)
                if mixture is not None and (is_fit or stage not in loaded):
                    yield from checks.in_both(mixture, evaluation)

    def _load(self, stage: str, value: Evaluations | None, split: str) -> None:
        """Load the evaluation sets of a stage, once."""
        if value is None or value == []:
            raise ValueError(
                "There is nothing to measure on: give data.val to validate, data.test to test, either to predict."
            )
        if stage not in self.evaluations:
            values = value if isinstance(value, list) else [value]
            sets = [self._collator.load(single, split) for single in values]
            name, count = Counter(evaluation.name for evaluation in sets).most_common(1)[0]
            if count > 1:
                raise ValueError(
                    f"{count} evaluation sets are called {name!r}; give their EvaluationFolder or -Rows a name."
                )
            if len(sets) > 1 and any(evaluation.name == MEAN for evaluation in sets):
                raise ValueError(f"An evaluation set is called {MEAN!r}, as their mean is; give it another name.")
            if stage == "predict" and (paths := [one.name for one in sets if Path(one.name).name != one.name]):
                raise ValueError(f"The evaluation set {paths[0]!r} has no name that a file may have; give it another.")
            self.evaluations[stage] = sets

    @property
    def loss_names(self) -> set[str]:
        """The losses that training sources name."""
        return {*filter(None, self._mixture.losses or ())}

    @property
    def steps_per_epoch(self) -> int | None:
        """Training batches per epoch and process, known without reading the rows; null of a stream without end."""
        if self._stream is not None:
            rows = self._stream.rows
            return None if rows is None else rows // (self.batch_size * self.trainer.world_size)
        return len(self._batches())

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training batches."""
        trainer, collator = self.trainer, self._collator
        if self.chunk_size == "auto":
            if self.chunk_tokens is None:
                raise ValueError("chunk_size: auto needs a vlmembed module to measure it; give a number, or null.")
            collator.chunking = Chunking(None, self.chunk_tokens, self.patch_cost)
        else:
            collator.chunking = Chunking(self.chunk_size, None, self.patch_cost)
        skips = self.on_bad_row == "skip"
        collate: Any = SkipBadRows(collator, collator.check) if skips else collator
        loader: ResumableLoader
        if self._stream is not None:
            loader = self._stream_loader(self._stream, collate, skips)
        else:
            options = {"persistent_workers": self.num_workers > 0, **self._loader_options}
            # A sampler's item is a whole batch of row numbers, and a row list reads them in one call.
            rows = RowLists(partial(read_usable, self._mixture) if skips else self._mixture.__getitems__)
            loader = RowLoader(rows, batch_size=None, sampler=self._batches(), collate_fn=collate, **options)
        if skips:
            loader.bad_rows = BadRowFile(Path(trainer.log_dir or trainer.default_root_dir), self.max_bad_rows)
        return loader

    def _stream_loader(self, rows: StreamingRows, collate: Any, skips: bool) -> StreamLoader:
        trainer, per_epoch = self.trainer, self.steps_per_epoch
        if per_epoch is None and (trainer.max_steps or -1) < 0:
            raise ValueError(f"{rows.origin}: the length of a stream is unknown; set trainer.max_steps, or its rows.")
        # The loader must have a length: of one without, Lightning takes a batch ahead, and a resumed run would lose it.
        per_epoch = trainer.max_steps * trainer.accumulate_grad_batches if per_epoch is None else per_epoch
        if per_epoch == 0:
            raise ValueError(f"{rows.origin}: rows is {rows.rows}, fewer than one batch over all processes.")
        workers = max(1, self.num_workers)
        readers, first = workers * trainer.world_size, workers * trainer.global_rank
        batches = StreamedBatches(rows, self.batch_size, readers, first, self._collator.distinct_queries, skips)
        return StreamLoader(batches, per_epoch, collate_fn=partial(collated, collate, skips), **self._loader_options)

    def val_dataloader(self) -> list[DataLoader]:
        """Return a loader for each validation set."""
        return self._evaluation_loaders("val")

    def test_dataloader(self) -> list[DataLoader]:
        """Return a loader for each test set."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> list[DataLoader]:
        """Return a loader for each set to embed."""
        return self._evaluation_loaders("predict")

    def state_dict(self) -> dict[str, Any]:
        """Save the size of chunks, so that a resumed run cuts the same; and for an export instructions and rows."""
        return {"chunk_tokens": self.chunk_tokens, "prompts": self.prompts, "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint says."""
        self.chunk_tokens = state_dict["chunk_tokens"]

    def _batches(self) -> Batches:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        distinct = self._collator.distinct_queries
        return Batches(self._mixture, self.batch_size, self.seed, rank, world_size, distinct)

    def _evaluation_loaders(self, stage: str) -> list[DataLoader]:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return [
            self._collator.loader(evaluation, self.eval_batch_size, rank, world_size, **self._loader_options)
            for evaluation in self.evaluations.get(stage, [])
        ]

    @property
    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": self.trainer.strategy.root_device.type == "cuda",
            "generator": seeded_generator(self.seed),
            "worker_init_fn": leave_stopping_to_parent,
        }

    @property
    def _collator(self) -> Collator:
        if self.collator is None:
            raise ValueError(
                "The data module has no collator, so it cannot make batches. vlmembed.trainer.Trainer sets it; with "
                "another trainer, write datamodule.collator = model.collator() before anything runs."
            )
        return self.collator


def as_mixture(train: Training | None) -> Mixture:
    """Turn what the YAML says about training data into one mixture; a ``ValueError`` if that is nothing."""
    values = train if isinstance(train, list) else [train]
    sources = [Rows(value) if isinstance(value, str) else value for value in values if value is not None]
    if not sources:
        raise ValueError("data.train is not given: fit needs training rows.")
    return sources[0] if len(sources) == 1 and isinstance(sources[0], Mixture) else Mixture(sources)


def named_prompts(mixture: Mixture) -> dict[str, str]:
    """Name the instructions of training files and data sets, ``NAME-query`` and ``NAME-document``, as MTEB does.

    Of one with several, the one that most rows have, among `SAMPLE` rows that are spread over it. A source of one's own
    is not read here.
    """
    prompts: dict[str, str] = {}
    for source in mixture.sources:
        table: Any = source.rows if isinstance(source, GroupByQuery) else source
        if not isinstance(table, Table) or not {*INSTRUCTIONS}.intersection(table.column_names):
            continue
        counts: dict[str, Counter[str | None]] = {"query": Counter(), "document": Counter()}
        for row in checks.spread(len(source), SAMPLE):
            with suppress(ValueError):  # Training says what is wrong with the row.
                example = source[row]
                counts["query"][example.query.instruction] += 1
                counts["document"].update(document.instruction for document in example.documents[:1])
        title = "-".join(filter(None, [table.name, table.subset]))
        for role, count in counts.items():
            instruction = max(count, key=count.__getitem__, default=None)
            if instruction is not None:
                name, number = f"{title}-{role}", 1
                while prompts.setdefault(name, instruction) != instruction:  # Those of one name are numbered.
                    number += 1
                    name = f"{title}-{number}-{role}"
    return prompts
