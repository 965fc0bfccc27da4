"""``python -m vlmembed benchmark``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmembed.cli import run_function
from vlmembed.data import EvaluationSource
from vlmembed.files import content_digest, write_whole
from vlmembed.search.served import folder_digest


def main(words: Sequence[str]) -> None:
    """Run the command: its name, and the command line after that."""
    run_function(benchmark, [*_listed(words)])


def _listed(words: Sequence[str]) -> Iterator[str]:
    """Write ``--tasks A B`` as ``--tasks+=A --tasks+=B``: jsonargparse takes one value after an option."""
    in_tasks = False
    for word in words:
        if word.startswith("--"):
            in_tasks = word == "--tasks"
            if not in_tasks:
                yield word
        else:
            yield f"--tasks+={word}" if in_tasks else word


def benchmark(
    model: str,
    tasks: list[str | EvaluationSource],
    output: str = "benchmark",
    compare: str | None = None,
    first_stage: str | None = None,
    depth: int = 100,
    name: str | None = None,
    save_predictions: bool = False,
    update_card: bool = False,
    batch_size: int = 32,
    num_workers: int = 0,
    trust_remote_code: bool = False,
) -> None:
    """Measure a model by mteb, on its tasks and benchmarks by name and on evaluation folders.

    ``--tasks "ViDoRe(v3.1)" SciFact ../invoices``. Needs ``pip install "vlmembed[mteb]"``. The output folder gets
    mteb's files of results, a file of each query's score beside each, and ``results.md``, a table with bootstrap
    intervals. A task that has been measured there with the same model and data is not measured again.

    Args:
        model: A folder written by ``export``, a run that has one, or a Hub id: an embedder, a multi-vector model or a
            reranker.
        tasks: Names of mteb's tasks and benchmarks, evaluation folders or training rows (a path or Hub id), or
            ``vlmembed.data.EvaluationSource``.
        output: The folder of results; several models may share one.
        compare: Another model, which is measured as well; or what this command has written about it, an output folder
            or a model's folder in it. The two are compared query by query.
        first_stage: What each query's documents are chosen from, and what a reranker puts in order: a TREC run, for a
            single task without subsets, or the predictions that ``save_predictions`` has written for another model.
        depth: How many of the first stage's documents each query has as candidates.
        name: What mteb calls the model, such as someone/birds; null for the Hub id or the folder's name.
        save_predictions: Whether to write the rankings, as mteb does: 1,000 documents a query.
        update_card: Whether to write the results into the metadata (``model-index``) of the folder's card.
        batch_size: Pairs that go through a reranker at once.
        num_workers: Processes that read for an embedder.
        trust_remote_code: Whether to run code that the model brings.
    """
    try:
        from mteb.cache import ResultCache

        from vlmembed.benchmark import results
        from vlmembed.benchmark.models import Model, open_model
        from vlmembed.benchmark.tasks import find_tasks, refuse_unfit
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed: pip install "vlmembed[mteb]"') from error

    if depth < 1:
        raise ValueError(f"depth is 1 or more, got {depth}.")
    if update_card and not Path(model).is_dir():
        raise ValueError(f"update_card writes into a folder, and {model} is none; download it, and name the folder.")
    stage = None if first_stage is None else Path(first_stage)
    if stage is not None and not stage.exists():
        raise ValueError(f"first_stage {first_stage}: no such file or folder.")
    chosen, cache = find_tasks(tasks), ResultCache(output)
    # Numbers over candidates are kept apart from those over the whole corpus.
    digest = folder_digest if stage is not None and stage.is_dir() else content_digest
    settings = {} if stage is None else {"first_stage": digest(stage), "depth": depth}
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
    options |= {"settings": settings, "trust_remote_code": trust_remote_code}

    def measured(opened: Model) -> list[results.Scores]:
        refuse_unfit(chosen, opened, stage is not None)
        return [results.measure(opened, task, cache, stage, depth, save_predictions) for task in chosen]

    opened = open_model(model, name, **options)
    scores = [measured(opened)]
    metas = [opened.mteb_model_meta]
    if compare is not None:
        written = results.find_results(Path(compare), cache.get_task_result_path("", metas[0]).parent)
        if written is None:
            other = open_model(compare, **options)
            scores.append(measured(other))
            metas.append(other.mteb_model_meta)
        else:
            scores.append([results.read_written(task, written) for task in chosen])
            metas.append(results.read_meta(written))
        results.check_same_queries(*scores)
    text = results.table(results.labels(metas), [results.rows_of(of_model) for of_model in scores])
    write_whole(Path(output) / "results.md", text.encode())
    print(text)
    if update_card:
        results.update_card(opened.folder, scores[0])
    print(f"{output}: mteb's results, the scores of each query, and the table in results.md.")
