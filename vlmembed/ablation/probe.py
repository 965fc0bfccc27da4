"""One pass, many read-outs: every pooling without weights, of several layers of one model, fresh or trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from lightning import LightningModule

from vlmembed.ablation.report import html_environment
from vlmembed.ablation.results import csv_text
from vlmembed.data import Task
from vlmembed.files import write_whole
from vlmembed.metrics import METRICS, RetrievalMetrics
from vlmembed.modules import EmbeddingModule, frozen
from vlmembed.pooling import (
    FirstToken,
    LastToken,
    Max,
    Mean,
    MeanOfImages,
    MeanOfLast,
    MeanOfText,
    MeanWithoutInstruction,
    Pooling,
    WeightedMean,
)
from vlmembed.types import ItemBatch, Preprocessor

#: All that have no weights, append nothing, and are not another's multiple.
READ_OUTS: dict[str, type[Pooling]] = {
    "first token": FirstToken,
    "last token": LastToken,
    "max": Max,
    "mean": Mean,
    "mean of the last 8": MeanOfLast,
    "mean of images": MeanOfImages,
    "mean of text": MeanOfText,
    "mean without instruction": MeanWithoutInstruction,
    "weighted mean": WeightedMean,
}

ReadOut = tuple[str, int]


class Probe(LightningModule):
    """Scores read-outs of a model's test sets, and writes ``probe.csv`` and ``probe.html`` into the run's folder.

    It compares read-outs of one model: what a model would be that is trained with a pooling is another question.

    Args:
        model: The model; what it trains with, its pooling included, is not used.
        layers: Which hidden states to pool: -1 the last one after the final norm, 0 the token embeddings.
        dimensions: Cut embeddings to these as well.
        checkpoint: Of a run of this model, for its backbone's weights; null for the fresh ones.
        metric: What the heat map shows.

    Raises:
        ValueError: If no layer is given, or one twice; or if there is no such metric.
    """

    def __init__(
        self,
        model: EmbeddingModule,
        layers: Sequence[int] = (-1,),
        dimensions: Sequence[int] = (),
        checkpoint: str | None = None,
        metric: str = "ndcg@10",
    ) -> None:
        super().__init__()
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"Probe: layers are different numbers, at least one; got {list(layers)}.")
        if metric not in METRICS:
            raise ValueError(f"Probe: metric is one of {', '.join(METRICS)}; got {metric!r}.")
        self.model = model
        self.layers = tuple(layers)
        self.dimensions = tuple(dimensions)
        self.checkpoint = checkpoint
        self.metric = metric
        self._configured = False

    @property
    def preprocessor(self) -> Preprocessor:
        """The preprocessor of the model's inputs."""
        return self.model.preprocessor

    @property
    def task(self) -> Task:
        """To embed items."""
        return self.model.task

    def configure_model(self) -> None:
        """Load the weights, once."""
        if self._configured:
            return
        self.model.configure_model()
        if self.checkpoint is not None:
            _load_backbone(self.model, self.checkpoint)
        self._read_outs = {name: build() for name, build in READ_OUTS.items()}
        for pooling in self._read_outs.values():
            pooling.template = self.model.encoder.preprocessor.template
        self._configured = True

    def on_test_epoch_start(self) -> None:
        """Start measuring every read-out on every test set."""
        sets = self.trainer.datamodule.evaluations["test"]  # type: ignore[attr-defined]
        self._metrics: list[dict[ReadOut, RetrievalMetrics]] = [
            {
                (name, layer): RetrievalMetrics(one, self.dimensions).to(self.device)
                for name in READ_OUTS
                for layer in self.layers
            }
            for one in sets
        ]

    def test_step(self, batch: ItemBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Encode queries or documents once, and pool them in every way."""
        encoder = self.model.encoder
        hidden = encoder.backbone(batch.inputs, self.layers, encoder.encode_images(batch.images))
        mask, tokens = (batch.inputs[name].to(hidden.device) for name in ("attention_mask", "input_ids"))
        for layer, states in zip(self.layers, hidden if len(self.layers) > 1 else hidden[None], strict=True):
            for name, pooling in self._read_outs.items():
                self._metrics[dataloader_idx][name, layer].update(batch.rows, pooling(states, mask, tokens))

    def on_test_epoch_end(self) -> None:
        """Rank, and write."""
        rows = [row for metrics in self._metrics for row in _rows(metrics)]
        folder = Path(self.trainer.log_dir or ".")
        if self.trainer.is_global_zero:
            write_whole(folder / "probe.csv", _csv(rows).encode())
            write_whole(folder / "probe.html", self._html(rows).encode())
            print(f"Wrote {folder / 'probe.html'}")

    def _html(self, rows: Sequence[Row]) -> str:
        tables: dict[tuple[str, int], dict[ReadOut, float]] = {}
        for one, pooling, layer, dimension, measured in rows:
            tables.setdefault((one, dimension), {})[pooling, layer] = measured[self.metric]
        page: str = (
            html_environment()
            .get_template("probe.html.jinja")
            .render(
                metric=self.metric,
                model=self.model.encoder.backbone.checkpoint,
                checkpoint=self.checkpoint,
                poolings=list(READ_OUTS),
                layers=self.layers,
                tables=tables,
            )
        )
        return page


#: Evaluation set, pooling, layer, dimension, and every metric by name.
Row = tuple[str, str, int, int, dict[str, float]]


def _rows(metrics: dict[ReadOut, RetrievalMetrics]) -> Iterator[Row]:
    for (pooling, layer), measured in metrics.items():
        values = {name: float(value) for name, value in measured.compute().items()}
        full = measured.embeddings[0].shape[1]
        for suffix, dimension in [("", full), *((f"/{each}", each) for each in measured.dimensions if each != full)]:
            of_dimension = {name: values[name + suffix] for name in METRICS}
            yield measured.evaluation.name, pooling, layer, dimension, of_dimension


def _csv(rows: Sequence[Row]) -> str:
    lines = ([*names, *(f"{value:.6f}" for value in values.values())] for *names, values in rows)
    return csv_text(["evaluation set", "pooling", "layer", "dimension", *METRICS], lines)


def _load_backbone(model: EmbeddingModule, path: str) -> None:
    """Take up what a run's checkpoint has of the backbone.

    Raises:
        ValueError: If it has nothing of one, or of another one.
    """
    prefix, backbone = "encoder.backbone.", model.encoder.backbone
    checkpoint = frozen.part_of(torch.load(path, map_location="cpu", weights_only=True), prefix)
    if not any(checkpoint.values()):
        raise ValueError(f"{path} has no weights of an embedding module; name a checkpoint that `fit` wrote.")
    weights = frozen.completed(checkpoint, backbone, frozen.within(model.frozen_sums, prefix))
    backbone.load_state_dict(weights, strict=False)
