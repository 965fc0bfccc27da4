"""Tasks: those of `mteb`, by the names of tasks and benchmarks, and evaluation sets of ours as tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import mteb
from httpx import HTTPError
from huggingface_hub.errors import HfHubHTTPError
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.get_tasks import TASK_LIST
from mteb.types import PromptType

from vlmembed.benchmark.models import MODALITIES, Items, Model
from vlmembed.data import EvaluationSource
from vlmembed.data.evaluation import FILES, as_evaluation
from vlmembed.data.judgements import first_documents, read_run
from vlmembed.files import digest
from vlmembed.metrics import Relevance
from vlmembed.search.served import identity
from vlmembed.types import EvaluationSet

#: Names that a message offers instead of an unknown one.
OFFERED = 3


class EvaluationTask(AbsTaskRetrieval):
    """An evaluation set of ours as mteb's task; each of its subsets is one there.

    Args:
        evaluation: The queries, the corpus, the judgements and, where a set has some, candidates.
    """

    def __init__(self, evaluation: EvaluationSet) -> None:
        Relevance.of(evaluation)  # Refuses a set in which nothing is to be found.
        self.evaluation = evaluation
        self.metadata = _metadata(evaluation)
        super().__init__()

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Put the set into mteb's form."""
        self.dataset = {subset: {"test": self._split(subset)} for subset in self.hf_subsets}
        self.data_loaded = True

    def _split(self, subset: str) -> Any:
        evaluation = self.evaluation
        of = evaluation.subsets or [subset] * len(evaluation.queries)
        rows = [row for row, name in enumerate(of) if name == subset]
        queries = Items(evaluation.query_names, evaluation.queries).select(rows)
        corpus, ranked = Items(evaluation.document_names, evaluation.corpus), None
        if evaluation.candidates and evaluation.subsets:  # Then they are the subset's own corpus.
            corpus = corpus.select(evaluation.candidates[rows[0]])
        elif evaluation.candidates:
            columns = {name: evaluation.candidates[row] for name, row in zip(queries.names, rows, strict=True)}
            ranked = {name: [evaluation.document_names[column] for column in own] for name, own in columns.items()}
        return {
            "corpus": corpus,
            "queries": queries,
            "relevant_docs": {name: dict(evaluation.qrels[name]) for name in queries.names},
            "top_ranked": ranked,
        }

    def unload_data(self) -> None:
        """Forget mteb's form of the set; mteb would forget what it is called, too."""
        self.dataset, self.data_loaded = {}, False


def _metadata(evaluation: EvaluationSet) -> TaskMetadata:
    """Describe a set to mteb; its revision is its content."""
    shown, contents = set[str](), list[str]()
    for item in chain(evaluation.queries, evaluation.corpus):  # Each is read once.
        shown |= {part.kind for part in item.parts}
        contents.append(identity(item))
    judged = (
        f"{query}\t{document}\t{grade}"
        for query, grades in evaluation.qrels.items()
        for document, grade in grades.items()
    )
    names = (*evaluation.query_names, *evaluation.document_names, *(evaluation.subsets or ()))
    languages = ["und-Zyyy"]  # mteb asks for one; undetermined, in an undetermined script.
    return TaskMetadata(
        name=evaluation.name.replace("/", "__"),  # It names files.
        description=f"Evaluation set {evaluation.name}.",
        dataset={"path": evaluation.name, "revision": digest((*names, *contents, *judged))},
        type="Retrieval" if shown == {"text"} else "Any2AnyRetrieval",
        modalities=[kind for kind in MODALITIES if kind in shown],
        eval_splits=["test"],
        eval_langs=dict.fromkeys(evaluation.subsets, languages) if evaluation.subsets else languages,
        main_score="ndcg_at_10",
    )


def find_tasks(wanted: Sequence[str | EvaluationSource]) -> list[AbsTask]:
    """Return the tasks that are meant by names of tasks and benchmarks, evaluation folders and sources.

    A ``ValueError`` says that a name is unknown, with those that are near it, or that two sets have the same.
    """
    tasks: dict[str, AbsTask] = {}
    for value in wanted:
        for task in _tasks_of(value):
            first = tasks.setdefault(task.metadata.name, task)
            if first is not task and EvaluationTask in (type(first), type(task)):
                raise ValueError(
                    f"tasks: two are called {task.metadata.name!r}. Give one of them another name: "
                    "{class_path: vlmembed.data.EvaluationFolder, init_args: {path: …, name: …}}."
                )
    if not tasks:
        raise ValueError("tasks: name at least one task, benchmark or evaluation folder.")
    return [*tasks.values()]


def _tasks_of(value: str | EvaluationSource) -> list[AbsTask]:
    if not isinstance(value, str) or Path(value).exists() or Path(value).suffix.lower() in FILES or "/" in value:
        return [EvaluationTask(as_evaluation(value))]
    benchmarks = {name: one for one in mteb.get_benchmarks() for name in (one.name, *one.aliases)}
    if value in benchmarks:
        return [*benchmarks[value].tasks]
    names = {task.metadata.name for task in TASK_LIST}
    if value in names:
        return [mteb.get_task(value)]
    spellings = {name.lower(): name for name in sorted({*names, *benchmarks})}
    near = get_close_matches(value.lower(), spellings, n=OFFERED)
    offered = ", ".join(spellings[name] for name in near)
    raise ValueError(
        f"{value!r} is no task and no benchmark of mteb {mteb.__version__}, and no evaluation folder"
        + (f"; near it are {offered}." if offered else ".")
    )


def leaves(task: AbsTask) -> list[AbsTask]:
    """Return the tasks that one is made of; of most that is the task itself."""
    if not isinstance(task, AbsTaskAggregate):
        return [task]
    return [leaf for part in task.metadata.tasks for leaf in leaves(part)]


def refuse_unfit(tasks: Sequence[AbsTask], model: Model, has_first_stage: bool) -> None:
    """Refuse, before anything is computed, tasks that the model cannot do rightly; a ``ValueError`` names them all."""
    reasons = [
        f"{leaf.metadata.name}: {reason}"
        for task in tasks
        for leaf in leaves(task)
        for reason in _reasons(leaf, model, has_first_stage)
    ]
    if reasons:
        name = model.mteb_model_meta.name
        raise ValueError(
            "\n  ".join([f"{name}, a {model.kind} model, cannot be measured by:", *dict.fromkeys(reasons)])
        )


def _reasons(task: AbsTask, model: Model, has_first_stage: bool) -> Iterator[str]:
    is_retrieval = isinstance(task, AbsTaskRetrieval)
    for role in PromptType if is_retrieval else [None]:
        missing = [kind for kind in task.metadata.get_modalities(role) if kind not in model.modalities]
        if missing:
            what = f"its {'queries' if role is PromptType.query else 'documents'}" if role else "its items"
            yield (
                f"{what} have {' and '.join(missing)}, which the model does not read ({', '.join(model.modalities)}); "
                "without that the number would be another task's."
            )
    if has_first_stage and not is_retrieval:
        yield f"it is {task.metadata.type}, and only retrieval has a first stage."
    if model.kind != "dense" and not is_retrieval:
        yield f"it is {task.metadata.type}, and needs one vector an item; this model does retrieval and reranking."
    if model.kind == "cross-encoder" and is_retrieval and not has_first_stage and not _has_candidates(task):
        yield "a reranker orders what a first stage has found; give --first_stage, or a task of type Reranking."


def _has_candidates(task: AbsTask) -> bool:
    if isinstance(task, EvaluationTask):
        return bool(task.evaluation.candidates) and not task.evaluation.subsets
    return "Reranking" in task.metadata.type


def load(task: AbsTask) -> None:
    """Load a task's data; where the Hub cannot be reached, a ``ValueError`` says what to do."""
    try:
        task.load_data()
    except (OSError, HTTPError, HfHubHTTPError, ValueError) as error:
        if isinstance(task, EvaluationTask):
            raise
        name, fetch = task.metadata.name, "import mteb; mteb.get_task({!r}).load_data()"
        raise ValueError(
            f"{name}: its data set {task.metadata.dataset['path']} cannot be loaded, neither from the Hub nor from the "
            f"cache ({type(error).__name__}: {error}). Where there is a network, and HF_HUB_OFFLINE is not set, load "
            f'it once: python -c "{fetch.format(name)}". The cache is where HF_HOME says, which has to be the same '
            "here; to download the files alone is not enough. A data set that is gated needs HF_TOKEN."
        ) from error


def give_candidates(task: AbsTaskRetrieval, first_stage: Path, depth: int) -> None:
    """Have each query ranked among the first documents that another model has found for it.

    ``first_stage`` is a TREC run, for a task that has no subsets; or what mteb calls predictions, a file or a folder of
    them, as ``save_predictions`` writes it.
    """
    task.convert_v1_dataset_format_to_v2(num_proc=None)
    splits = [(subset, split, data) for subset, splits in task.dataset.items() for split, data in splits.items()]
    is_trec = first_stage.is_file() and first_stage.suffix != ".json"
    if is_trec and len(splits) > 1:
        names = ", ".join(f"{subset}/{split}" for subset, split, _ in splits)
        raise ValueError(
            f"{first_stage}: a TREC run does not say which of {task.metadata.name}'s subsets a query is of ({names}). "
            "Give the folder of predictions that benchmark writes with --save_predictions."
        )
    predictions = {} if is_trec else _read_predictions(first_stage, task)
    for subset, split, data in splits:
        corpus, queries = ([*map(str, data[table]["id"])] for table in ("corpus", "queries"))
        run: Mapping[str, Mapping[str, float]] | None
        if is_trec:
            run = read_run(first_stage, EvaluationSet(task.metadata.name, [], [], queries, corpus, {}))
        elif (run := predictions.get(subset, {}).get(split)) is None:
            raise ValueError(f"{first_stage}: nothing was found for {task.metadata.name}, {subset}, {split}.")
        data["top_ranked"] = {query: first_documents(run.get(query, {}), depth) for query in queries}


def _read_predictions(path: Path, task: AbsTask) -> Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]:
    """Read the predictions of a task: subset → split → query → document → score."""
    files = [path] if path.is_file() else sorted(path.rglob(task.prediction_file_name))
    if len(files) != 1:
        there = f"are {len(files)} ({', '.join(map(str, files))})" if files else "is none"
        raise ValueError(
            f"{path}: expected one {task.prediction_file_name}, as benchmark writes it with --save_predictions, and "
            f"there {there}. Name the file, or the folder of one model."
        )
    try:
        content = json.loads(files[0].read_text(encoding="utf-8"))
        return {subset: splits for subset, splits in content.items() if subset != "mteb_model_meta"}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{files[0]}: it holds no predictions of mteb's: {error}.") from error
