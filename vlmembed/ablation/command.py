"""``python -m vlmembed ablate``: plan, estimate, run, report; and ``--probe``, many read-outs of one pass."""

from __future__ import annotations

import html
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
import yaml
from lightning import LightningModule

from vlmembed import cli, pooling
from vlmembed.ablation.plan import Ablation, check_trials, configuration, merge, parse, plan, read_mapping, remaining
from vlmembed.ablation.report import write_report
from vlmembed.ablation.run import FIT, Executor, Trial, csv_logger, locked, start
from vlmembed.data import Collator
from vlmembed.files import clear_drafts, write_whole
from vlmembed.metrics import METRICS, RetrievalMetrics
from vlmembed.modules import EmbeddingModule
from vlmembed.training.checkpoint_files import read_checkpoint

#: Steps of the trial that the time is estimated from, and Lightning's epochs where nothing is said.
STEPS, EPOCHS = 6, 1000


def main(words: Sequence[str]) -> None:
    """Run the command: its name, and the command line after that."""
    ablate(words[1:], cli.check)


def ablate(args: Sequence[str], check: Callable[[dict[str, Any]], None], fit: str = FIT) -> None:
    """Run the command line after ``ablate``; the exit status is 1 if a trial has failed or was not done.

    ``check`` parses a trial's configuration without building anything, and raises a ValueError if it is none. ``fit``
    is the command that trains and measures, before the path of its configuration.
    """
    ablation, options = parse(args)
    output_dir = ablation.output_dir
    if options.probe is not None:
        run_probe(ablation, options.probe)
        return
    if options.report_only:
        print(f"Report: {write_report(output_dir)}")
        return
    trials = plan(ablation)
    check_trials(trials, check, ablation.path)
    left = remaining(trials, options.retry_failed)
    if options.dry_run:
        _dry_run(trials, left, ablation, options.executor, fit)
        return
    with locked(output_dir, patience=0):
        for folder in (output_dir, *output_dir.glob("documents/**/")):
            clear_drafts(folder)
        write_whole(output_dir / "ablation.yaml", ablation.to_yaml().encode())
        start(left, options.executor, ablation.jobs, fit)
        ended = [trial.ended() for trial in trials]
        if any(trial.status == "finished" for trial in ended):
            print(f"Report: {write_report(output_dir)}")
    for trial in ended:
        if trial.status == "planned":
            print(f"{trial} was not done.", file=sys.stderr)
        elif trial.status == "failed":
            print(f"{trial} has failed, see {trial.folder / 'log.txt'}; --retry_failed runs it again.", file=sys.stderr)
    if any(trial.status != "finished" for trial in ended):
        sys.exit(1)


def _dry_run(trials: Sequence[Trial], left: Sequence[Trial], ablation: Ablation, executor: Executor, fit: str) -> None:
    """List the trials, and estimate how long those take that are left."""
    ended = [trial.ended() for trial in trials]
    for trial, end in zip(trials, ended, strict=True):
        print(f"{'to do' if trial in left else end.status:>8}  {trial}")
    print(f"{len(trials)} trials, {len(left)} to do.")
    if not left:
        return
    finished = [trial.seconds for trial in ended if trial.status == "finished"]
    if finished:
        seconds, source = mean(finished), f"the mean of {len(finished)} that have finished is {mean(finished):.0f} s"
    else:
        print("None has finished, so the first is tried for its time.")
        seconds, source = time_trial(left[0], ablation.output_dir, executor, fit)
    total = seconds * -(-len(left) // ablation.jobs)
    units = (("h", 3600), ("min", 60))
    duration = next((f"{total / size:.1f} {unit}" for unit, size in units if total >= 2 * size), f"{total:.0f} s")
    print(f"About {duration} for {len(left)} trials, {ablation.jobs} at the same time: {source}.")


def time_trial(trial: Trial, output_dir: Path, executor: Executor, fit: str) -> tuple[float, str]:
    """Estimate the seconds of a trial, and say how: a few steps, with all measuring, and the others at their pace."""
    attempt = output_dir.resolve() / ".trial"
    folder = attempt.joinpath(*trial.folder.parts[-3:])
    trainer = trial.config.get("trainer") or {}
    wanted = trainer.get("max_steps") or -1
    short = {**trial.config, "trainer": {**trainer, "max_steps": STEPS if wanted < 0 else min(STEPS, wanted)}}
    try:
        attempted = replace(trial, folder=folder, config=short)
        start([attempted], executor, 1, fit)
        attempted = attempted.ended()
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
    if attempted.status != "finished":
        raise RuntimeError(f"An attempt at {trial} failed: {attempted.error or 'it left no result'}")
    left = max(0.0, planned_steps(trainer, attempted.cost["steps_per_epoch"]) - STEPS)
    step = attempted.cost["seconds_per_step"]
    source = f"an attempt at {trial} took {attempted.seconds:.0f} s with {STEPS} steps, and {left:.0f} more take "
    return attempted.seconds + step * left, f"{source}{step:.3f} s each; measuring while it trains is not counted"


def planned_steps(trainer: Mapping[str, Any], steps_per_epoch: float) -> float:
    """Return how many steps a trainer's configuration is for; infinite if it names no end."""
    steps, epochs = trainer.get("max_steps") or -1, trainer.get("max_epochs")
    if epochs is None:
        epochs = EPOCHS if steps < 0 else -1
    return min(math.inf if steps < 0 else steps, math.inf if epochs < 0 else epochs * steps_per_epoch)


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
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>:root {{ color-scheme: light dark; }}</style>
<h1>{title}</h1><p>This compares read-outs of one model. A model that is trained with a pooling puts what matters where
that pooling looks; which pooling trains best is a question for an ablation. Layer −1 is the last one, after the final
norm; 0 the token embeddings.</p>"""


class Probe(LightningModule):
    """Scores read-outs of a model's test sets, and writes ``probe.csv`` and ``probe.html`` into the run's folder.

    It compares read-outs of one model: what a model would be that is trained with a pooling is another question.

    Args:
        model: The model; what it trains with, its pooling included, is not used.
        layers: Which hidden states to pool: -1 the last one after the final norm, 0 the token embeddings.
        dimensions: Cut embeddings to these as well.
        checkpoint: Of a run of this model, for its backbone's weights; null for the fresh ones.
        metric: What the heat map shows.
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
        self._read_outs = {name: build() for name, build in READ_OUTS.items()}

    def collator(self) -> Collator:
        """Embed items, as the model does."""
        return self.model.collator()

    def configure_model(self) -> None:
        """Load the weights."""
        self.model.configure_model()
        if self.checkpoint is not None:
            content = read_checkpoint(Path(self.checkpoint))
            try:
                self.model.checkpointing.load_weights(self.model, content, prefix="encoder.backbone.")
            except ValueError as error:
                raise ValueError(f"{self.checkpoint}: {error}") from error
        for read_out in self._read_outs.values():
            read_out.template = self.model.encoder.preprocessor.template

    def on_test_epoch_start(self) -> None:
        """Start measuring every read-out of every layer on every test set."""
        self._metrics: list[dict[tuple[str, int], RetrievalMetrics]] = [
            {
                key: RetrievalMetrics(evaluation, self.dimensions).to(self.device)
                for key in product(READ_OUTS, self.layers)
            }
            for evaluation in self.trainer.datamodule.evaluations["test"]  # type: ignore[attr-defined]
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
        """Rank, and write a table, and a page with a heat map for each evaluation set and dimension."""
        rows = []
        for (name, layer), metrics in (pair for measured in self._metrics for pair in measured.items()):
            values, full = metrics.compute(), metrics.values[0].shape[1]
            for dimension in dict.fromkeys((full, *self.dimensions)):
                suffix = "" if dimension == full else f"/{dimension}"
                numbers = {metric: float(values[metric + suffix]) for metric in METRICS}
                rows.append([metrics.evaluation.name, name, layer, dimension, *numbers.values()])
        table = pd.DataFrame(rows, columns=["evaluation set", "pooling", "layer", "dimension", *METRICS])
        weights = f"weights of {self.checkpoint}" if self.checkpoint else "weights as released"
        title = f"{self.metric} of read-outs of {self.model.encoder.backbone.checkpoint}, {weights}"
        blocks = [HEAD.format(title=html.escape(title))]
        for (name, dimension), part in table.groupby(["evaluation set", "dimension"], sort=False):
            grid = part.pivot(index="pooling", columns="layer", values=self.metric)[[*self.layers]].loc[[*READ_OUTS]]
            colours = grid.style.format("{:.3f}").background_gradient(cmap="viridis", axis=None)
            blocks.append(f"<h2>{html.escape(name)}, {dimension} dimensions</h2>{colours.to_html()}")
        folder = Path(self.trainer.log_dir or ".")  # All processes ask: they agree on it.
        if self.trainer.is_global_zero:
            write_whole(folder / "probe.csv", table.to_csv(index=False, float_format="%.6f").encode())
            write_whole(folder / "probe.html", "".join(blocks).encode())
            print(f"Wrote {folder / 'probe.html'}")


def run_probe(ablation: Ablation, probe: Mapping[str, Any]) -> None:
    """Run ``test`` on the base as all trials would have it, with its model inside a `Probe`; exit as that does."""
    config, folder = configuration(ablation, read_mapping(ablation.base), {}), ablation.output_dir.resolve()
    model = {"class_path": f"{__name__}.Probe", "init_args": {"model": config["model"], **probe}}
    trainer = {"logger": csv_logger(folder), "exporter": None, "callbacks": None}
    config = merge(config, {"model": model, "trainer": trainer})
    write_whole(folder / "run.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    command = [sys.executable, "-m", "vlmembed", "test", "--config", str(folder / "run.yaml")]
    if status := subprocess.run(command, check=False).returncode:
        sys.exit(status)
