"""The scores of every query, and what they say: intervals, a comparison, a table, a card's metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import mteb
import numpy as np
from huggingface_hub import EvalResult, metadata_load, metadata_save
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.results import TaskResult
from scipy import stats

from vlmembed.ablation.statistics import PairwiseComparison, compare, holm
from vlmembed.benchmark.models import Model
from vlmembed.benchmark.tasks import give_candidates, leaves, load
from vlmembed.files import read_json, whole_file, write_whole

#: How pytrec_eval, by which mteb measures, calls what mteb calls ``ndcg_at_10``. Others are no means over queries.
MEASURES = {"ndcg": "ndcg_cut_", "map": "map_cut_", "recall": "recall_", "precision": "P_", "hit_rate": "success_"}

#: mteb rounds to five digits.
ROUNDING = 1e-5

RESAMPLES = 9_999

#: What ends the names of the files of queries' scores, which lie beside mteb's of results.
QUERIES = ".queries.jsonl"


@dataclass
class Scores:
    """What a model has reached in a task."""

    task: AbsTask
    result: TaskResult
    queries: list[dict[str, Any]]  #: A query each: task (a part of this one), split, subset, metric, query, score.

    @property
    def metric(self) -> str:
        """What the task is judged by."""
        return self.task.metadata.main_score

    @cached_property
    def cells(self) -> dict[tuple[str, ...], dict[str, float]]:
        """By part, split and subset: query → score; nothing where the task's score is not the mean of their means."""
        cells: dict[tuple[str, ...], dict[str, float]] = {}
        # In one order, so that two models' scores stand side by side.
        for row in sorted(self.queries, key=lambda row: (row["task"], row["split"], row["subset"], row["query"])):
            cells.setdefault((row["task"], row["split"], row["subset"]), {})[row["query"]] = row["score"]
        mean = np.mean([np.mean([*scores.values()]) for scores in cells.values()]) if cells else np.nan
        return cells if abs(mean - self.result.get_score()) <= ROUNDING else {}


def measure(
    model: Model, task: AbsTask, cache: ResultCache, first_stage: Path | None, depth: int, save_predictions: bool
) -> Scores:
    """Run a task; or read what the same model has reached on the same data before."""
    path = cache.get_task_result_path(task.metadata.name, model.mteb_model_meta)
    predictions = cache.cache_path / "predictions" / path.parent.relative_to(cache.cache_path / "results")
    is_saved = all((predictions / part.prediction_file_name).is_file() for part in leaves(task))
    before = read_scores(task, path)
    if before is not None and (is_saved or not save_predictions):
        return before
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for part in leaves(task):
            load(part)
            stack.callback(part.unload_data)
            if first_stage is not None and isinstance(part, AbsTaskRetrieval):
                give_candidates(part, first_stage, depth)
            _record(part, rows)
        mteb.evaluate(
            model,
            task,
            cache=cache,
            overwrite_strategy="always",
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"show_progress_bar": False},
            prediction_folder=predictions if save_predictions else None,
        )
    write_whole(path.with_suffix(QUERIES), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return Scores(task, TaskResult.from_disk(path), rows)


def _record(task: AbsTask, rows: list[dict[str, Any]]) -> None:
    """Have the main score of each query written down, of which mteb keeps the mean alone."""
    name, _, k = task.metadata.main_score.rpartition("_at_")
    if not isinstance(task, AbsTaskRetrieval) or name not in MEASURES:
        return
    original = partial(type(task).task_specific_scores, task)

    def record(scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str) -> dict[str, float]:
        about = {"task": task.metadata.name, "split": hf_split, "subset": hf_subset, "metric": task.metadata.main_score}
        rows.extend({**about, "query": query, "score": of[f"{MEASURES[name]}{k}"]} for query, of in scores.items())
        return original(scores, qrels, results, hf_split, hf_subset)

    task.task_specific_scores = record  # type: ignore[method-assign]


def read_scores(task: AbsTask, path: Path) -> Scores | None:
    """Read what `measure` has written about the data and subsets that the task has now; None where there is nothing."""
    queries = path.with_suffix(QUERIES)  # Written last.
    if not queries.is_file() or not path.is_file():
        return None
    result = TaskResult.from_disk(path)
    measured = {(split, entry["hf_subset"]) for split, entries in result.scores.items() for entry in entries}
    wanted = {(split, subset) for split in task.eval_splits for subset in task.hf_subsets}
    if result.dataset_revision != task.metadata.revision or (measured != wanted and leaves(task) == [task]):
        return None
    return Scores(task, result, [json.loads(line) for line in queries.read_text(encoding="utf-8").splitlines()])


def find_results(folder: Path, this_model: Path) -> Path | None:
    """Return where an output folder has the results of the one other model; None where a folder is a model itself.

    A ``ValueError`` says that there are several, or those of this model alone.
    """
    if any((part / "modules.json").is_file() for part in (folder, folder / "export")) or not folder.is_dir():
        return None
    models = sorted({file.parent.resolve() for file in folder.rglob(f"*{QUERIES}")})
    others = [model for model in models if model != this_model.resolve()]
    if models and len(others) != 1:
        listed = f"several models; name one: {', '.join(map(str, others))}" if others else "this model alone"
        raise ValueError(f"{folder} has results of {listed}.")
    return others[0] if others else None


def read_written(task: AbsTask, folder: Path) -> Scores:
    """Read what `measure` has written of another model; a ValueError says that it lacks a task, or has other data."""
    scores = read_scores(task, folder / f"{task.metadata.name}.json")
    if scores is None:
        raise ValueError(
            f"{folder}: it has no results of {task.metadata.name}, or they are of other data (another revision than "
            f"{task.metadata.revision}, or other subsets). Measure that model on the same tasks."
        )
    return scores


def read_meta(folder: Path) -> ModelMeta:
    """Read whose results a folder has."""
    written = read_json(folder / "model_meta.json")
    return ModelMeta.create_empty({"name": written["name"], "revision": written["revision"]})


# What they say


@dataclass
class Row:
    """A line of the table."""

    kind: Literal["task", "subset", "mean"]  #: Those of a kind are a family of comparisons.
    label: str
    metric: str
    value: float
    shares: list[np.ndarray]  #: What each query adds to the value, by split and subset; empty where none is known.

    @property
    def count(self) -> int:
        """How many queries there are."""
        return sum(map(len, self.shares))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, over what other queries might have been asked; None where a subset has one query.

        Each subset is sampled anew by itself (a stratified percentile bootstrap).
        """
        if not self.shares or min(map(len, self.shares)) < 2:
            return None

        def value(*shares: np.ndarray, axis: int = -1) -> Any:
            return sum(of_subset.sum(axis) for of_subset in shares)

        drawn = stats.bootstrap(
            self.shares, value, n_resamples=RESAMPLES, batch=100, method="percentile", rng=np.random.default_rng(0)
        )
        return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)

    def compare(self, other: Row) -> PairwiseComparison | None:
        """Compare with another model's on the same queries; None where there are no two."""
        if self.count < 2 or not other.count:
            return None
        # Of as many queries, the mean is then the value.
        return compare([self.count * np.concatenate(row.shares)[None] for row in (self, other)])[0, 1]


def rows_of(scores: Sequence[Scores]) -> list[Row]:
    """Return a row a task and, where it has several, a row a subset; and last the mean over several tasks."""
    tasks, rows = [], []
    for one in scores:
        subsets = []
        for cell, queries in one.cells.items():
            values = np.array([*queries.values()])
            subsets.append(Row("subset", " / ".join(cell), one.metric, float(values.mean()), [values / len(values)]))
        value = float(np.mean([subset.value for subset in subsets])) if subsets else one.result.get_score()
        shares = [subset.shares[0] / len(subsets) for subset in subsets]
        tasks.append(Row("task", one.task.metadata.name, one.metric, value, shares))
        rows += [tasks[-1], *(subsets if len(subsets) > 1 else [])]
    if len(tasks) > 1:
        are_known = all(task.shares for task in tasks)
        shares = [share / len(tasks) for task in tasks for share in task.shares] if are_known else []
        metric = tasks[0].metric if len({task.metric for task in tasks}) == 1 else "main score"
        rows.append(Row("mean", "mean over tasks", metric, float(np.mean([task.value for task in tasks])), shares))
    return rows


def check_same_queries(scores: Sequence[Scores], others: Sequence[Scores]) -> None:
    """Refuse to compare where queries differ; a ``ValueError`` names the task and a query."""
    for one, other in zip(scores, others, strict=True):
        asked, also = (
            {(*cell, query) for cell, queries in side.cells.items() for query in queries} for side in (one, other)
        )
        if different := asked ^ also:
            raise ValueError(
                f"{one.task.metadata.name}: the two models were not asked the same: {len(different)} queries are of "
                f"one alone, such as {' / '.join(min(different))}. Measure both anew, in one output folder."
            )


def labels(models: Sequence[ModelMeta]) -> list[str]:
    """Return the names of models; with their revisions, where they have the same."""
    names = [str(model.name) for model in models]
    if len({*names}) == len(names):
        return names
    return [f"{model.name} ({str(model.revision)[:8]})" for model in models]


def compared(rows: Sequence[Row], others: Sequence[Row]) -> dict[int, PairwiseComparison]:
    """Compare two models row by row, with p-values corrected over all tasks, and over all subsets."""
    pairs = ((number, row.compare(other)) for number, (row, other) in enumerate(zip(rows, others, strict=True)))
    comparisons = {number: comparison for number, comparison in pairs if comparison is not None}
    for kind in ("task", "subset", "mean"):
        family = [number for number in comparisons if rows[number].kind == kind]
        p_values = holm(np.array([comparisons[number].p_value for number in family]))
        for number, p_value in zip(family, p_values.tolist(), strict=True):
            comparisons[number] = replace(comparisons[number], corrected=p_value)
    return comparisons


def table(names: Sequence[str], models: Sequence[Sequence[Row]]) -> str:
    """Write a Markdown table of the rows of a model, or of two that are compared."""
    heads = ["Task", "Metric", "Queries", *(head for name in names for head in (name, "95 %"))]
    heads += ["Difference", "p", "Verdict"] if len(models) > 1 else []
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    comparisons = compared(*models) if len(models) > 1 else {}
    for number, rows in enumerate(zip(*models, strict=True)):
        cells = [rows[0].label, rows[0].metric, str(rows[0].count or "")]
        for row in rows:
            interval = row.interval
            cells += [f"{row.value:.4f}", "–" if interval is None else "{:.4f} – {:.4f}".format(*interval)]
        if comparison := comparisons.get(number):
            cells += [f"{comparison.difference:+.4f} ± {comparison.margin:.4f}"]
            cells += [f"{comparison.corrected:.4f}", comparison.verdict]
        elif len(models) > 1:
            cells += [f"{rows[0].value - rows[1].value:+.4f}", "–", "–"]
        lines.append(cells)
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def update_card(folder: Path, scores: Sequence[Scores]) -> None:
    """Write results into the metadata of a folder's card, over those of the same tasks; all else in it stays."""
    path = folder / "README.md"
    metadata = (metadata_load(path) if path.is_file() else None) or {}
    name, before = folder.resolve().name, list[EvalResult]()
    if metadata.get("model-index"):
        try:
            name, before = model_index_to_eval_results(metadata["model-index"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its model-index is none ({error!r}). Remove it, and try again.") from error
    results = [result for one in scores for result in _eval_results(one)]
    stays = [old for old in before if not any(old.is_equal_except_value(result) for result in results)]
    metadata["model-index"] = eval_results_to_model_index(name, stays + results)
    with whole_file(path) as draft:
        draft.write_bytes(path.read_bytes() if path.is_file() else b"")
        metadata_save(draft, metadata)


def _eval_results(scores: Scores) -> Iterator[EvalResult]:
    metadata = scores.task.metadata
    for split, entries in scores.result.scores.items():
        for entry in entries:
            yield EvalResult(
                task_type="information-retrieval" if isinstance(scores.task, AbsTaskRetrieval) else metadata.type,
                task_name=metadata.type,
                dataset_type=metadata.dataset["path"],
                dataset_name=f"{metadata.name} ({entry['hf_subset']})",
                dataset_config=entry["hf_subset"],
                dataset_split=split,
                dataset_revision=metadata.revision,
                metric_type=scores.metric,
                metric_name=scores.metric,
                metric_value=entry["main_score"],
                source_name="MTEB",
                source_url="https://github.com/embeddings-benchmark/mteb/",
            )
