"""One pass, many read-outs: every pooling without weights, of several layers of one model, fresh or trained."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from lightning import LightningModule
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from vlmembed import pooling
from vlmembed.ablation.plan import check_keys, merge, read_mapping, set_key
from vlmembed.ablation.report import CHART_STYLE, Section, render_page, to_svg
from vlmembed.ablation.run import csv_logger
from vlmembed.data import Collator
from vlmembed.files import write_whole
from vlmembed.metrics import METRICS, RetrievalMetrics
from vlmembed.modules import EmbeddingModule
from vlmembed.training.checkpoint_files import read_checkpoint

#: All that have no weights, append nothing, and are not another's multiple.
READ_OUTS: dict[str, type[pooling.Pooling]] = {
    "first token": pooling.FirstToken,
    "last token": pooling.LastToken,
    "max": pooling.Max,
    "mean": pooling.Mean,
    "mean of the last 8": pooling.MeanOfLast,
    "mean of images": pooling.MeanOfImages,
    "mean of text": pooling.MeanOfText,
    "mean without instruction": pooling.MeanWithoutInstruction,
    "weighted mean": pooling.WeightedMean,
}
NOTES = [
    "This compares read-outs of one model. A model that is trained with a pooling puts what matters where that pooling "
    "looks; which pooling trains best is a question for an ablation.",
    "Layer −1 is the last one, after the final norm; 0 the token embeddings.",
]


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

    def collator(self) -> Collator:
        """Embed items, as the model does."""
        return self.model.collator()

    def configure_model(self) -> None:
        """Load the weights, once."""
        if self._configured:
            return
        self.model.configure_model()
        if self.checkpoint is not None:
            content = read_checkpoint(Path(self.checkpoint))
            try:
                self.model.checkpointing.load_weights(self.model, content, prefix="encoder.backbone.")
            except ValueError as error:
                raise ValueError(f"{self.checkpoint}: {error}") from error
        self._read_outs = {name: build() for name, build in READ_OUTS.items()}
        for read_out in self._read_outs.values():
            read_out.template = self.model.encoder.preprocessor.template
        self._configured = True

    def on_test_epoch_start(self) -> None:
        """Start measuring every read-out of every layer on every test set."""
        sets = self.trainer.datamodule.evaluations["test"]  # type: ignore[attr-defined]
        read_outs = [(name, layer) for name in READ_OUTS for layer in self.layers]
        self._metrics = [
            {read_out: RetrievalMetrics(evaluation, self.dimensions).to(self.device) for read_out in read_outs}
            for evaluation in sets
        ]

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Encode queries or documents once, and pool them in every way."""
        encoder = self.model.encoder
        # (layers, B, L, H); without the first dimension for a single layer.
        hidden = encoder.backbone(batch.inputs, self.layers, encoder.encode_images(batch.images))
        mask, tokens = (batch.inputs[name].to(hidden.device) for name in ("attention_mask", "input_ids"))
        for layer, states in zip(self.layers, hidden if len(self.layers) > 1 else hidden[None], strict=True):
            for name, read_out in self._read_outs.items():
                self._metrics[dataloader_idx][name, layer].update(batch.rows, read_out(states, mask, tokens))

    def on_test_epoch_end(self) -> None:
        """Rank, and write."""
        rows = []
        for (name, layer), metrics in (pair for measured in self._metrics for pair in measured.items()):
            values, full = metrics.compute(), metrics.values[0].shape[1]
            keys = {"evaluation set": metrics.evaluation.name, "pooling": name, "layer": layer}
            for dimension in dict.fromkeys((full, *self.dimensions)):
                suffix = "" if dimension == full else f"/{dimension}"
                numbers = {metric: float(values[metric + suffix]) for metric in METRICS}
                rows.append({**keys, "dimension": dimension, **numbers})
        folder, table = Path(self.trainer.log_dir or "."), pd.DataFrame(rows)
        if self.trainer.is_global_zero:
            write_whole(folder / "probe.csv", table.to_csv(index=False, float_format="%.6f").encode())
            write_whole(folder / "probe.html", self._page(table).encode())
            print(f"Wrote {folder / 'probe.html'}")

    def _page(self, table: pd.DataFrame) -> str:
        """Render a heat map and a table for each evaluation set and dimension."""
        sections = []
        for (name, dimension), part in table.groupby(["evaluation set", "dimension"], sort=False):
            grid = part.pivot(index="pooling", columns="layer", values=self.metric)[[*self.layers]].loc[[*READ_OUTS]]
            chart = heat_map(grid, f"{self.metric} of each pooling and layer")
            sections.append(Section(f"{name}, {dimension} dimensions", charts=[chart]))
        weights = f"weights of {self.checkpoint}" if self.checkpoint else "weights as released"
        lead = f"{self.metric} of every pooling without weights, in one pass over the test data; {weights}."
        return render_page(f"Read-outs of {self.model.encoder.backbone.checkpoint}", lead, NOTES, sections)


@rc_context(CHART_STYLE | {"axes.grid": False})
def heat_map(grid: pd.DataFrame, title: str) -> Markup:
    """Draw a table as coloured cells with their numbers."""
    rows, columns = grid.shape
    figure = Figure(figsize=(2.5 + 0.8 * columns, 0.8 + 0.35 * rows), layout="constrained")
    axes = figure.add_subplot(xlabel="layer")
    axes.pcolormesh(grid.to_numpy(), cmap="viridis", edgecolors="face")
    for row, column in ((row, column) for row in range(rows) for column in range(columns)):
        value, middle = grid.iat[row, column], (grid.to_numpy().min() + grid.to_numpy().max()) / 2
        colour = "black" if value > middle else "white"
        axes.text(column + 0.5, row + 0.5, f"{value:.3f}", ha="center", va="center", color=colour)
    axes.set_xticks([column + 0.5 for column in range(columns)], [str(layer) for layer in grid.columns])
    axes.set_yticks([row + 0.5 for row in range(rows)], [*grid.index])
    axes.invert_yaxis()
    return to_svg(figure, title)


def run_probe(path: Path, output_dir: str | None = None) -> None:
    """Run ``test`` on the base of a file with its model inside a `Probe`.

    The file has ``base``, ``output_dir``, ``probe`` (what `Probe` takes besides the model), and perhaps ``set``.

    Raises:
        ValueError: If the file does not say what to do.
        SystemExit: With the status of the run, if it fails.
    """
    content = read_mapping(path)
    check_keys(path, content, ["base", "output_dir", "set", "probe"], optional=["set"])
    folder = Path(output_dir or content["output_dir"]).resolve()
    base = read_mapping((path.parent / content["base"]).resolve())
    for key, value in (content.get("set") or {}).items():
        set_key(base, key, value)
    model = {"class_path": f"{__name__}.Probe", "init_args": {"model": base["model"], **content["probe"]}}
    trainer = {"logger": csv_logger(folder), "exporter": None, "callbacks": None}
    config = merge(base, {"model": model, "trainer": trainer})
    write_whole(folder / "run.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    command = [sys.executable, "-m", "vlmembed", "test", "--config", str(folder / "run.yaml")]
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)
