"""Benchmarks: numbers are pytrec_eval's on Sentence Transformers' vectors; what could not be right is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import pytest
import pytrec_eval
import torch
import yaml
from building import encoder, jsonl, module, multi_vector, picture, ranker, trainer
from hub_server import Repository, serve
from huggingface_hub import ModelCard, constants, metadata_load
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.mocks import mock_tasks
from mteb.models import CrossEncoderWrapper, ModelMeta, MultiVectorWrapper, SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from PIL import Image
from scipy import stats
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader

from vlmembed.benchmark.command import benchmark
from vlmembed.benchmark.models import Model, open_model
from vlmembed.benchmark.results import Row, Scores, compared, labels, measure, rows_of, table
from vlmembed.benchmark.tasks import find_tasks, load, refuse_unfit
from vlmembed.cli import main
from vlmembed.data import EvaluationFolder, RetrievalDataModule
from vlmembed.export.sentence_transformers import write_folder, write_reranker

#: Float32 through twice the layers that are compared elsewhere to 1e-5, and a sum of gains.
EQUAL = {"rel": 0, "abs": 1e-6}
TEXTS = [f"page {number} about {'rivers and ' * (number % 4)}stones" for number in range(12)]
QUESTIONS = [f"which page is {number}, of rivers?" for number in range(7)]
#: Query → document → grade; the last query has no document that answers it.
QRELS = {f"q{n}": {f"d{n}": 2, f"d{(5 * n + 3) % 12}": 1, "d11": -1} for n in range(6)} | {"q6": {"d1": 0}}


def shown(number: int) -> Image.Image:
    return picture(64 + 32 * (number % 2), 64, number)


@pytest.fixture(scope="module")
def folders(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of each kind; the other embedder has other weights."""
    root = tmp_path_factory.mktemp("models")
    made = {name: root / name for name in ("embedder", "other", "multi_vector", "reranker")}
    for folder in made.values():
        folder.mkdir()
    write_folder(encoder(checkpoint), made["embedder"])
    changed = encoder(checkpoint)
    torch.manual_seed(1)
    for parameter in changed.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    write_folder(changed, made["other"])
    write_folder(multi_vector(checkpoint).encoder, made["multi_vector"])
    write_reranker(ranker(checkpoint).encoder, made["reranker"])
    return made


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of texts, of images, and of both in either order."""
    folder = tmp_path_factory.mktemp("sets") / "pages"
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(TEXTS):
        shown(number).save(folder / f"{number}.png")
        image = {"image": f"{number}.png"}
        content = ({"text": text}, image, {"text": text, **image}, {**image, "text": text})[number % 4]
        rows.append({"id": f"d{number}", **content})
    jsonl(folder / "corpus.jsonl", rows)
    jsonl(folder / "queries.jsonl", [{"id": f"q{number}", "text": text} for number, text in enumerate(QUESTIONS)])
    lines = [f"{query}\t{document}\t{grade}\n" for query, judged in QRELS.items() for document, grade in judged.items()]
    (folder / "qrels.tsv").write_text("".join(lines))
    return folder


def contents(folder: Path) -> list[dict[str, Any]]:
    """Its documents, as Sentence Transformers takes them."""
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    return [
        {key: Image.open(folder / value) if key == "image" else value for key, value in row.items() if key != "id"}
        for row in rows
    ]


def per_query(scores: np.ndarray, measure: str = "ndcg_cut.10") -> dict[str, float]:
    """Of each query, by pytrec_eval; scores below the smallest float are of documents that were not found."""
    run = {
        f"q{query}": {f"d{document}": float(score) for document, score in enumerate(row) if score > -np.inf}
        for query, row in enumerate(scores)
    }
    found = pytrec_eval.RelevanceEvaluator(QRELS, {measure}).evaluate(run)
    return {query: values[measure.replace(".", "_")] for query, values in found.items()}


def similarities(folder: Path, documents: list[Any]) -> np.ndarray:
    """Of all queries with all documents, by Sentence Transformers alone."""
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    opened: Any = {"MultiVectorEncoder": MultiVectorEncoder}.get(config["model_type"], SentenceTransformer)
    served = opened(str(folder))
    queries = served.encode_query(QUESTIONS, batch_size=3)
    return served.similarity(queries, served.encode_document(documents, batch_size=5)).float().cpu().numpy()


def written(output: Path, name: str) -> dict[str, float]:
    """The scores of queries on disk."""
    (file,) = output.glob(f"results/*__{name}/*/*.queries.jsonl")
    return {row["query"]: row["score"] for row in map(json.loads, file.read_text().splitlines())}


def run_of(model: Model, task: AbsTaskRetrieval, output: Path, **options: Any) -> Scores:
    options = {"first_stage": None, "depth": 100, "save_predictions": False, **options}
    return measure(model, task, ResultCache(output), **options)


# Numbers


class Pages(AbsTaskRetrieval):
    """A task in the form of ViDoRe v3.1: documents are images with text, in two languages."""

    metadata = TaskMetadata(
        name="Pages",
        description="Pages.",
        dataset={"path": "someone/pages", "revision": "1"},
        type="DocumentUnderstanding",
        category="t2it",
        modalities=["text", "image"],
        eval_langs={"english": ["eng-Latn"], "french": ["fra-Latn"]},
        main_score="ndcg_at_10",
    )

    def load_data(self, *_: Any, **__: Any) -> None:
        rows = {
            "id": [f"d{number}" for number in range(len(TEXTS))],
            "image": [*map(shown, range(len(TEXTS)))],
            "text": TEXTS,
            "title": ["T" * (number % 2) for number in range(len(TEXTS))],
        }
        corpus = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        queries = datasets.Dataset.from_dict({"id": [f"q{n}" for n in range(len(QUESTIONS))], "text": QUESTIONS})
        some = {"corpus": corpus.select(range(8)), "queries": queries.select([1, 4])}
        judged: dict[str, Any] = {"relevant_docs": QRELS, "top_ranked": None}
        self.dataset = {
            "english": {"test": {"corpus": corpus, "queries": queries, **judged}},  # type: ignore[typeddict-item]
            "french": {"test": {**some, **judged}},  # type: ignore[typeddict-item]
        }
        self.data_loaded = True


#: Of each type that a model of text and images can do; mteb brings some rows of each with it.
SHORT = {"MockSTSTask", "MockImageTextPairClassificationTask", "MockAsymCustomTextImagePairClassificationTaskV2"}
SHORT |= {"MockAny2AnyRetrievalI2TTask", "MockAggregatedTask", "MockInstructionReranking", "MockRetrievalDialogTask"}
LONG = {
    "MockClassificationTask",
    "MockImageClusteringFastTask",
    "MockMultilingualRetrievalTask",
    "MockBitextMiningTask",
}
LONG |= {"MockZeroShotClassificationTask", "MockImageRegressionTask", "MockPairImageClassificationTask"}
LONG |= {"MockMultilingualRerankingTask", "MockSummarizationTask", "MockMultiChoiceTask", "MockInstructionRetrieval"}


@pytest.mark.parametrize("kind", ["embedder", "multi_vector", "reranker"])
@pytest.mark.parametrize(
    "task", [*sorted(SHORT), *(pytest.param(name, marks=pytest.mark.exhaustive) for name in sorted(LONG))]
)
def test_tasks_of_every_type_have_the_number_of_mtebs_own_wrapper(
    task: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    made = getattr(mock_tasks, task)
    model = open_model(str(folders[kind]))
    try:
        refuse_unfit([made()], model, False)
    except ValueError:
        assert kind != "embedder"
        return
    scores = run_of(model, made(), tmp_path)
    assert means(scores.result) == pytest.approx(means(by_mteb(folders[kind], made())), rel=0, abs=1e-5)


def by_mteb(folder: Path, task: AbsTaskRetrieval) -> Any:
    """A task's result by mteb's own wrapper of what Sentence Transformers opens, told that it reads images."""
    kind = json.loads((folder / "config_sentence_transformers.json").read_text())["model_type"]
    opened, wrapper = {
        "SentenceTransformer": (SentenceTransformer, SentenceTransformerEncoderWrapper),
        "MultiVectorEncoder": (MultiVectorEncoder, MultiVectorWrapper),
        "CrossEncoder": (CrossEncoder, CrossEncoderWrapper),
    }[kind]
    stock = with_modalities(wrapper(opened(str(folder))), "text", "image")
    (result,) = mteb.evaluate(stock, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results
    return result


def means(result: Any) -> dict[tuple[str, str], float]:
    return {(split, one["hf_subset"]): one["main_score"] for split, scores in result.scores.items() for one in scores}


def with_modalities(model: Any, *modalities: str) -> Any:
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update={"modalities": [*modalities]})
    return model


@pytest.mark.parametrize("name", ["embedder", "multi_vector"])
def test_a_task_has_the_number_of_mtebs_own_wrapper_with_images(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    scores = run_of(open_model(str(folders[name])), Pages(), tmp_path)
    expected = by_mteb(folders[name], Pages())
    assert means(scores.result) == means(expected)
    rows = rows_of([scores])
    assert [row.label for row in rows] == ["Pages", "Pages / test / english", "Pages / test / french"]
    assert [row.count for row in rows] == [9, 7, 2]
    # mteb rounds to five digits.
    assert rows[0].value == pytest.approx(expected.get_score(), rel=0, abs=1e-5)
    assert rows[0].value == pytest.approx((rows[1].value + rows[2].value) / 2, **EQUAL)


def test_a_folder_has_the_number_of_validation(
    checkpoint: Path, folders: dict[str, Path], pages: Path, tmp_path: Path
) -> None:
    benchmark(str(folders["embedder"]), [str(pages)], str(tmp_path))
    scores = written(tmp_path, "embedder")
    data = RetrievalDataModule(val=str(pages), num_workers=0)
    (validated,) = trainer().validate(module(checkpoint), data, verbose=False)
    expected = per_query(similarities(folders["embedder"], contents(pages)))
    assert scores == pytest.approx(expected, **EQUAL)
    assert np.mean([*scores.values()]) == pytest.approx(validated["val/ndcg@10"], **EQUAL)
    assert 0.1 < validated["val/ndcg@10"] < 0.9
    assert f"{np.mean([*scores.values()]):.4f}" in (tmp_path / "results.md").read_text()


def test_images_between_texts_are_read_in_order(folders: dict[str, Path], tmp_path: Path) -> None:
    """Which a mapping of Sentence Transformers cannot say, and its messages can."""
    shown(1).save(tmp_path / "1.png")
    parts = [{"type": "text", "text": "before"}, {"type": "image", "image": "1.png"}, {"type": "text", "text": "after"}]
    jsonl(tmp_path / "corpus.jsonl", [{"id": "a", "document": parts}, {"id": "b", "document": parts[::-1]}])
    jsonl(tmp_path / "queries.jsonl", [{"id": "q", "text": "before"}])
    (tmp_path / "qrels.tsv").write_text("q\ta\t1\n")
    (task,) = find_tasks([str(tmp_path)])
    load(task)
    data, model = task.dataset["default"]["test"], open_model(str(folders["embedder"]))  # type: ignore[index]
    model.index(data["corpus"])
    found = model.search(data["queries"], task_metadata=task.metadata, top_k=10)["q"]
    served = SentenceTransformer(str(folders["embedder"]))
    opened = [{**part, "image": shown(1)} if part["type"] == "image" else part for part in parts]
    messages = [[{"role": "user", "content": content}] for content in (opened, opened[::-1])]
    vectors = served.encode_document(messages)
    expected = served.similarity(served.encode_query(["before"]), vectors)[0].tolist()
    assert [found["a"], found["b"]] == pytest.approx(expected, rel=0, abs=1e-5)
    assert abs(found["a"] - found["b"]) > 1e-4


@pytest.mark.parametrize("prompt", [PromptType.query, PromptType.document, None])
@pytest.mark.parametrize("columns", [["text"], ["image"], ["image", "text"], ["text", "image"]])
def test_vectors_are_sentence_transformers(
    prompt: PromptType | None, columns: list[str], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": TEXTS[number], "image": shown(number)} for number in (0, 1, 0)]
    table = datasets.Dataset.from_list([{name: row[name] for name in columns} for row in rows])
    model: Any = open_model(str(folders["embedder"]))
    vectors = model.encode(DataLoader(table), task_metadata=Pages.metadata, prompt_type=prompt)
    served = SentenceTransformer(str(folders["embedder"]))
    encode = {PromptType.query: served.encode_query, PromptType.document: served.encode_document}.get(
        prompt, served.encode
    )
    expected = encode([{name: row[name] for name in columns} for row in rows])
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        model.similarity_pairwise(vectors, vectors[::-1].copy()), (expected * expected[::-1]).sum(1), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["trec", "predictions"])
def test_a_reranker_orders_what_a_first_stage_found(
    kind: str, folders: dict[str, Path], pages: Path, tmp_path: Path
) -> None:
    benchmark(str(folders["embedder"]), [str(pages)], str(tmp_path / "first"), save_predictions=True)
    first = similarities(folders["embedder"], contents(pages))
    candidates = [*np.argsort(-first, axis=1)[:, :4]]
    stage = tmp_path / "first" / "predictions"
    if kind == "trec":
        stage, candidates[2] = tmp_path / "run.trec", np.array([], dtype=int)  # Nothing was found for one.
        lines = [
            f"q{query} Q0 d{document} 1 {first[query, document]} x\n"
            for query in range(len(first))
            for document in range(12)
        ]
        stage.write_text("".join(line for line in lines if not line.startswith("q2 ")))
    benchmark(str(folders["reranker"]), [str(pages)], str(tmp_path), first_stage=str(stage), depth=4)
    model, documents = CrossEncoder(str(folders["reranker"])), contents(pages)
    expected = np.full(first.shape, -np.inf)
    for query, columns in enumerate(candidates):
        pairs = [({"text": QUESTIONS[query]}, documents[column]) for column in columns]
        if pairs:
            expected[query, columns] = model.predict(pairs, activation_fn=torch.nn.Identity())
    (file,) = tmp_path.glob("results/*__reranker/*/experiments/*/pages.queries.jsonl")
    found = {row["query"]: row["score"] for row in map(json.loads, file.read_text().splitlines())}
    assert found == pytest.approx(per_query(expected), **EQUAL)


def test_a_first_stage_of_a_task_with_subsets(folders: dict[str, Path], tmp_path: Path) -> None:
    model = open_model(str(folders["embedder"]))
    whole = run_of(model, Pages(), tmp_path / "first", save_predictions=True)
    stage = tmp_path / "first" / "predictions"
    again = run_of(model, Pages(), tmp_path / "all", first_stage=stage, depth=12)
    assert means(again.result) == means(whole.result)
    few = run_of(open_model(str(folders["other"])), Pages(), tmp_path / "few", first_stage=stage, depth=2)
    found = json.loads(next(stage.rglob("Pages_predictions.json")).read_text())["french"]["test"]
    for query, ranked in found.items():
        best = {name: -rank for rank, name in enumerate(sorted(ranked, key=ranked.__getitem__, reverse=True)[:2])}
        orders = best, {name: -rank for name, rank in best.items()}
        possible = [
            pytrec_eval.RelevanceEvaluator(QRELS, {"ndcg_cut.10"}).evaluate({query: run})[query]["ndcg_cut_10"]
            for run in orders
        ]
        (score,) = [row["score"] for row in few.queries if (row["subset"], row["query"]) == ("french", query)]
        assert any(score == pytest.approx(value, **EQUAL) for value in possible)
    (tmp_path / "run.trec").write_text("q1 Q0 d1 1 0.5 x\n")
    with pytest.raises(ValueError, match=r"run.trec: a TREC run does not say .*Pages.*english/test, french/test"):
        run_of(model, Pages(), tmp_path / "trec", first_stage=tmp_path / "run.trec")


def test_a_model_of_text_alone_is_measured_on_texts(tmp_path: Path) -> None:
    """Any of Sentence Transformers, which need not have a backbone of ours."""
    words = ["This", "is", "a", "positive", "negative", "sentence", "test"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(["[UNK]", *words])}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)]).save(str(tmp_path / "static"))
    model = open_model(str(tmp_path / "static"))
    assert model.modalities == ["text"]
    task = mock_tasks.MockRetrievalTask
    scores = run_of(model, task(), tmp_path)
    assert means(scores.result) == pytest.approx(means(by_mteb(tmp_path / "static", task())), rel=0, abs=1e-5)
    with pytest.raises(ValueError, match=r"Pages: its documents have image, which the model does not read \(text\)"):
        refuse_unfit([Pages()], model, False)


def test_an_embedder_may_order_candidates_too(folders: dict[str, Path], pages: Path, tmp_path: Path) -> None:
    ranked = {f"q{number}": [f"d{(number + step) % 12}" for step in (0, 3, 5)] for number in range(6)}
    task = Pages()
    load(task)
    data = task.dataset["english"]["test"]
    model = open_model(str(folders["embedder"]))
    model.index(data["corpus"])
    found = model.search(data["queries"], task_metadata=task.metadata, top_k=2, top_ranked=ranked)
    model.index(data["corpus"])
    whole = model.search(data["queries"], task_metadata=task.metadata, top_k=12)
    for query, names in ranked.items():
        best = sorted(names, key=whole[query].__getitem__, reverse=True)[:2]
        assert found[query] == pytest.approx({name: whole[query][name] for name in best}, rel=0, abs=1e-6)
    assert found["q6"] == {}
    model.index(data["corpus"])
    nothing = model.search(data["queries"], task_metadata=task.metadata, top_k=2, top_ranked={})
    assert nothing == {query: {} for query in data["queries"]["id"]}


def test_prompts_of_a_task_and_of_its_type_are_used(checkpoint: Path, tmp_path: Path) -> None:
    prompts = {
        "DocumentUnderstanding-query": "What is it?",
        "DocumentUnderstanding-document": "A page",
        "STS": "The same?",
    }
    numbers = []
    for name, given in (("without", {}), ("with", prompts)):
        (tmp_path / name).mkdir()
        write_folder(encoder(checkpoint), tmp_path / name, prompts=given)
        model: Any = open_model(str(tmp_path / name))
        for task in (Pages, mock_tasks.MockSTSTask):
            numbers.append(means(run_of(model, task(), tmp_path / name / "out").result))
            assert numbers[-1] == pytest.approx(means(by_mteb(tmp_path / name, task())), rel=0, abs=1e-5)
    assert numbers[0] != numbers[2]
    assert model._instruction(mock_tasks.MockSTSTask.metadata, None) == "The same?"


def test_a_corpus_that_two_subsets_have_is_encoded_once(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where questions are translated; another order, or a corpus with a change in it, is another one."""

    class Translated(Pages):
        def load_data(self, *_: Any, **__: Any) -> None:
            super().load_data()
            first, second = (self.dataset[name]["test"] for name in ("english", "french"))
            second["corpus"] = first["corpus"].select(order)

    model: Any = open_model(str(folders["embedder"]))
    counts: list[int] = []
    original = model.served.stream
    monkeypatch.setattr(
        model.served,
        "stream",
        lambda windows, role, **o: original((counts.append(len(w)) or w for w in windows), role, **o),
    )
    scores = []
    for order, expected in (([*range(12)], [7, 12, 2]), ([*range(11, -1, -1)], [7, 12, 2, 12])):
        model._last, counts[:] = ("", []), []
        scores.append(means(run_of(model, Translated(), tmp_path / str(order[0])).result))
        assert counts == expected
    assert scores[0] == scores[1]


def test_a_folder_with_subsets_is_their_mean(folders: dict[str, Path], pages: Path, tmp_path: Path) -> None:
    """Languages of one corpus; what is in a table by itself is a number of validation's too."""
    rows = [json.loads(line) for line in (pages / "queries.jsonl").read_text().splitlines()]
    grouped = shutil.copytree(pages, tmp_path / "grouped")
    jsonl(grouped / "queries.jsonl", [{**row, "language": "de" if n < 2 else "en"} for n, row in enumerate(rows)])
    benchmark(str(folders["embedder"]), [EvaluationFolder(str(grouped), group_by="language")], str(tmp_path))
    scores = [*per_query(similarities(folders["embedder"], contents(pages))).values()]
    expected = [np.mean([np.mean(scores[:2]), np.mean(scores[2:])]), np.mean(scores[:2]), np.mean(scores[2:])]
    lines = (tmp_path / "results.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [
        "grouped",
        "grouped / test / de",
        "grouped / test / en",
    ]
    assert [line.split(" | ")[3] for line in lines] == [f"{value:.4f}" for value in expected]


def test_a_run_has_the_name_of_its_folders_and_a_revision_that_no_card_changes(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "my runs" / "version_0"
    export = shutil.copytree(folders["embedder"], run / "export")
    names, revisions = [], []
    for change in (None, "README.md", "config_sentence_transformers.json"):
        if change is not None:
            (export / change).write_text(
                (export / change).read_text() + "\n" if (export / change).exists() else "A card"
            )
        meta = open_model(str(run)).mteb_model_meta
        names.append(meta.name)
        revisions.append(meta.revision)
    assert names == ["my_runs/version_0"] * 3
    assert revisions[0] == revisions[1] != revisions[2]
    assert open_model(str(folders["embedder"])).mteb_model_meta.revision == revisions[0]
    weights = sum(parameter.numel() for parameter in SentenceTransformer(str(export)).parameters())
    assert meta.n_parameters == weights


def test_an_image_that_cannot_be_read_is_named(folders: dict[str, Path], pages: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(pages, tmp_path / "broken")
    (broken / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken: .*corpus.jsonl, row 2.*1.png"):
        benchmark(str(folders["embedder"]), [str(broken)], str(tmp_path / "out"))


# What numbers say


def rows_with(*samples: np.ndarray) -> Row:
    means = [sample.mean() for sample in samples]
    return Row("task", "task", "ndcg_at_10", float(np.mean(means)), [*samples], [1 / len(samples)] * len(samples))


def test_intervals_are_those_of_the_mean() -> None:
    """By the central limit theorem; a subset's queries are drawn among its own."""
    random = np.random.default_rng(3)
    one, other = random.uniform(size=4000), random.uniform(size=1000) / 2
    for row in (rows_with(one), rows_with(one, other)):
        errors = [sample.std() / np.sqrt(len(sample)) for sample in row.samples]
        reach = 1.96 * np.linalg.norm(errors) / len(errors)
        assert row.interval == pytest.approx((row.value - reach, row.value + reach), rel=0, abs=0.1 * reach)
    assert rows_with(np.full(5, 0.25)).interval == (0.25, 0.25)
    assert rows_with(one, one[:1]).interval is None


def test_two_models_are_compared_query_by_query() -> None:
    random = np.random.default_rng(5)
    easy = random.uniform(size=300)
    better = easy + 0.02 + 0.1 * random.standard_normal(300)
    comparison = rows_with(better).compare(rows_with(easy))
    assert comparison is not None
    paired = stats.ttest_rel(better, easy)
    interval = paired.confidence_interval(0.95)
    assert comparison.p_value == pytest.approx(paired.pvalue, rel=1e-9)
    assert comparison.difference - comparison.margin == pytest.approx(interval.low, rel=1e-9)
    halves = rows_with(better[:100], better[100:]).compare(rows_with(easy[:100], easy[100:]))
    assert halves is not None
    expected = ((better - easy)[:100].mean() + (better - easy)[100:].mean()) / 2
    assert halves.difference == pytest.approx(expected, rel=1e-9)
    assert "| better |" in table(["a/b", "c/d"], [[rows_with(better)], [rows_with(easy)]])
    assert "| worse |" in table(["c/d", "a/b"], [[rows_with(easy)], [rows_with(better)]])
    assert rows_with(easy[:1]).compare(rows_with(easy[:1])) is None


def test_a_model_is_compared_with_another_or_with_its_results(
    folders: dict[str, Path], pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark(str(folders["other"]), [str(pages)], str(tmp_path / "other"))
    (file,) = (tmp_path / "other").rglob("*.queries.jsonl")
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))  # In any order.
    benchmark(str(folders["embedder"]), [str(pages)], str(tmp_path), compare=str(tmp_path / "other"))
    (line,) = (tmp_path / "results.md").read_text().splitlines()[2:]
    one, other = ([*per_query(similarities(folders[name], contents(pages))).values()] for name in ("embedder", "other"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["pages", "ndcg_at_10", "7", f"{np.mean(one):.4f}"]
    assert cells[5] == f"{np.mean(other):.4f}"
    assert cells[7].split(" ")[0] == f"{np.mean(one) - np.mean(other):+.4f}"
    assert float(cells[8]) == pytest.approx(stats.ttest_rel(one, other).pvalue, rel=0, abs=1e-4)
    benchmark(str(folders["embedder"]), [str(pages)], str(tmp_path / "both"), compare=str(folders["other"]))
    assert (tmp_path / "both" / "results.md").read_text() == (tmp_path / "results.md").read_text()


def test_what_was_measured_is_not_measured_again_until_something_changes(
    folders: dict[str, Path], pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = []
    original = Model.search
    monkeypatch.setattr(Model, "search", lambda self, *a, **o: searches.append(self) or original(self, *a, **o))
    changing = shutil.copytree(pages, tmp_path / "pages")
    for expected in (1, 1):
        benchmark(str(folders["embedder"]), [str(changing)], str(tmp_path / "out"))
        assert len(searches) == expected
    changes = [
        lambda: picture(40, 40, 77).save(changing / "1.png"),  # The content of a file, under its name.
        lambda: (changing / "qrels.tsv").write_text((changing / "qrels.tsv").read_text().replace("\t2", "\t3")),
        # A run that was killed: mteb's own file is there, the queries' is not.
        lambda: next((tmp_path / "out").rglob("*.queries.jsonl")).unlink(),
    ]
    for count, change in enumerate(changes, start=2):
        change()
        benchmark(str(folders["embedder"]), [str(changing)], str(tmp_path / "out"))
        assert len(searches) == count
    benchmark(str(folders["other"]), [str(changing)], str(tmp_path / "out"), name="org/embedder")
    assert len(searches) == 5


def test_results_go_into_the_card_and_nothing_else_changes(
    folders: dict[str, Path], pages: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["embedder"], tmp_path / "model")
    metric = {"type": "ndcg@10", "value": 0.5, "name": "ndcg@10"}
    old = {"task": {"type": "information-retrieval"}, "dataset": {"name": "val", "type": "val"}, "metrics": [metric]}
    card = {"license": "mit", "tags": ["a", "ä"], "model-index": [{"name": "Birds", "results": [old]}]}
    body = "\n# Birds\n\n---\n\nText | with `marks`,\n  and {{ braces }}.\n"
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card, allow_unicode=True)}---\n{body}", encoding="utf-8")
    for _ in range(2):  # The second time in place of the first.
        benchmark(str(folder), [str(pages)], str(tmp_path / "out"), update_card=True)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.endswith(f"---\n{body}")
    metadata = metadata_load(folder / "README.md")
    assert {key: value for key, value in metadata.items() if key != "model-index"} == {
        "license": "mit",
        "tags": ["a", "ä"],
    }
    (entry,) = metadata["model-index"]
    assert entry["name"] == "Birds"
    first, second = entry["results"]
    assert (first["dataset"], first["metrics"]) == (old["dataset"], [metric])
    assert second["dataset"]["type"] == "pages"
    expected = np.mean([*per_query(similarities(folder, contents(pages))).values()])
    assert second["metrics"][0]["value"] == pytest.approx(expected, rel=0, abs=1e-5)  # mteb's five digits
    assert ModelCard.load(folder / "README.md").data.eval_results[1].metric_type == "ndcg_at_10"


# What is refused


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("scifact", "near it are SciFact"),
        ("vidore(v3)", "ViDoRe(v3)"),
        ("ViDoRe(v3.2)", "ViDoRe(v3.1)"),
        ("Vidore3FinanceEn", "Vidore3FinanceEnRetrieval"),
        ("MIEB(english)", "MIEB(eng)"),
        ("quite another thing", "no evaluation folder."),
        ("pages.jsonl", "pages.jsonl"),
    ],
)
def test_an_unknown_name_gets_those_near_it(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=re.escape(name)) as refused:
        find_tasks([name])
    assert near in str(refused.value)


def test_benchmarks_are_found_by_name() -> None:
    names = [task.metadata.name for task in find_tasks(["ViDoRe(v3.1)", "SciFact", "Vidore3HrRetrieval.v2"])]
    assert names == [task.metadata.name for task in mteb.get_benchmark("ViDoRe(v3.1)").tasks] + ["SciFact"]


def test_what_a_model_cannot_do_rightly_is_refused_before_it_runs(folders: dict[str, Path], pages: Path) -> None:
    dense, many, ranks = (open_model(str(folders[name])) for name in ("embedder", "multi_vector", "reranker"))
    assert dense.modalities == ["text", "image", "video"]
    tasks = find_tasks(["ViDoRe(v3.1)", "STS12", str(pages), "Vidore3HrBM25sReranking.v2"])
    refuse_unfit(tasks, dense, False)
    with pytest.raises(ValueError, match=r"STS12: it is STS, and needs one vector an item") as refused:
        refuse_unfit(tasks, many, False)
    assert str(refused.value).count("\n") == 1
    with pytest.raises(ValueError, match=r"pages: a reranker orders what a first stage has found") as refused:
        refuse_unfit(tasks, ranks, False)
    assert "BM25" not in str(refused.value)
    refuse_unfit([task for task in tasks if task.metadata.name != "STS12"], ranks, True)
    with pytest.raises(
        ValueError, match=r"Vidore3HrRetrieval.v2: its documents have image.*does not read \(text\)"
    ) as refused:
        refuse_unfit(tasks, with_modalities(dense, "text"), False)
    assert "STS12" not in str(refused.value)
    assert "pages: " in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_card": True, "model": "org/birds"}, "update_card writes into a folder, and org/birds is none"),
        ({"tasks": ["nothing"]}, "evaluation set 'nothing' has no query with a document of grade 1"),
        ({"depth": 0}, "depth is 1 or more, got 0"),
        ({"first_stage": "nowhere"}, "first_stage nowhere: no such file"),
        ({"name": "birds"}, "name 'birds': mteb's names of models are two words with a slash"),
        ({"tasks": []}, "name at least one task"),
        ({"tasks": ["pages", "copy/pages"]}, "two are called 'pages'"),
        ({"compare": "empty"}, "empty"),
        ({"compare": "out"}, "out/results/a__b/1: it has no results of pages, or they are of other data"),
        ({"compare": "two"}, r"two has results of several models; name one: .*two/a, .*two/b"),
        ({"tasks": ["STS12"], "first_stage": "strange.trec"}, "STS12: it is STS, and only retrieval has a first stage"),
        ({"first_stage": "out"}, "expected one pages_predictions.json"),
        ({"first_stage": "broken.json"}, r"broken.json: it holds no predictions"),
        ({"first_stage": "other.json"}, r"other.json: nothing was found for pages, default, test"),
        ({"first_stage": "strange.trec"}, r"strange.trec, row 1: document 'x' is not in the corpus of 'pages'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any],
    message: str,
    folders: dict[str, Path],
    pages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for copy in ("pages", "copy/pages"):
        shutil.copytree(pages, copy)
    shutil.copytree(pages, "nothing")
    Path("nothing/qrels.tsv").write_text("q1\td1\t0\n")
    Path("empty").mkdir()
    Path("broken.json").write_text("[1]")
    Path("other.json").write_text('{"mteb_model_meta": {}, "english": {}}')
    Path("strange.trec").write_text("q0 Q0 x 1 0.5 t\n")
    for results in ("out/results/a__b/1", "two/a", "two/b"):
        jsonl(f"{results}/Others.queries.jsonl", [])
    with pytest.raises(ValueError, match=message):
        benchmark(**{"model": str(folders["embedder"]), "tasks": ["pages"], "output": "out", **options})


def test_without_mteb_the_command_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb.cache", None)
    with pytest.raises(ValueError, match=r'mteb.* is not installed: pip install "vlmembed\[mteb\]"'):
        benchmark("model", ["SciFact"])


def test_models_of_one_name_are_told_apart_by_revision() -> None:
    known = ("a/b", "1" * 32), ("a/b", "2" * 32), ("a/c", "3")
    metas = [ModelMeta.create_empty({"name": name, "revision": revision}) for name, revision in known]
    assert labels(metas[:2]) == ["a/b (11111111)", "a/b (22222222)"]
    assert labels(metas[1:]) == ["a/b", "a/c"]


def test_p_values_are_corrected_over_tasks_and_over_subsets() -> None:
    random = np.random.default_rng(11)
    pairs = [
        (base + shift + 0.1 * random.standard_normal(40), base)
        for shift in (0.05, 0.03, 0.0)
        for base in [random.uniform(size=40)]
    ]
    kinds = ["task", "subset", "task"]
    first, second = (
        [replace(rows_with(pair[side]), kind=kind) for kind, pair in zip(kinds, pairs, strict=True)] for side in (0, 1)
    )
    plain = [stats.ttest_rel(*pair).pvalue for pair in pairs]
    corrected = [comparison.corrected for comparison in compared(first, second) if comparison is not None]
    smaller, larger = sorted([plain[0], plain[2]])
    expected = {smaller: min(1, 2 * smaller), larger: max(larger, min(1, 2 * smaller)), plain[1]: plain[1]}
    assert corrected == pytest.approx([expected[p_value] for p_value in plain], rel=1e-9)


def test_models_are_not_compared_on_other_queries(folders: dict[str, Path], pages: Path, tmp_path: Path) -> None:
    benchmark(str(folders["other"]), [str(pages)], str(tmp_path))
    (file,) = tmp_path.rglob("*.queries.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1].replace('"q6"', '"r6"'))
    with pytest.raises(ValueError, match=r"pages: the two models were not asked the same: 2 queries.*/ [qr]"):
        benchmark(str(folders["embedder"]), [str(pages)], str(tmp_path), compare=str(tmp_path))


def test_a_task_of_the_hub_says_what_to_do_without_a_network(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"VidoreTabfquadRetrieval: its data set \S+ cannot be loaded") as refused:
        benchmark(str(folders["embedder"]), ["VidoreTabfquadRetrieval"], str(tmp_path))
    assert "python -c \"import mteb; mteb.get_task('VidoreTabfquadRetrieval').load_data()\"" in str(refused.value)
    assert "HF_HUB_OFFLINE" in str(refused.value)


# The command


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub that has a task of ViDoRe as it is there: three configurations, images in the corpus."""
    (task,) = find_tasks(["VidoreTabfquadRetrieval"])
    judged = [(int(q[1:]), int(d[1:]), grade) for q, grades in QRELS.items() for d, grade in grades.items()]
    tables: dict[str, dict[str, Any]] = {
        "corpus": {"corpus-id": [*range(12)], "image": [*map(shown, range(12))]},
        "queries": {"query-id": [*range(7)], "query": QUESTIONS},
        "qrels": dict(zip(("query-id", "corpus-id", "score"), zip(*judged, strict=True), strict=True)),
    }
    files, configs = {}, []
    for name, columns in tables.items():
        table, path = datasets.Dataset.from_dict(columns), tmp_path / f"{name}.parquet"
        (table.cast_column("image", datasets.Image()) if "image" in columns else table).to_parquet(path)
        files[path.name] = path.read_bytes()
        configs.append({"config_name": name, "data_files": [{"split": "test", "path": path.name}]})
    files["README.md"] = f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()
    with serve("token") as server:
        repository = server.repositories[task.metadata.dataset["path"]] = Repository(private=False)
        sha = repository.commit("main", files)
        repository.commits[task.metadata.revision] = repository.commits[sha]
        # What a new process does with HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE=0: they are read at import.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        monkeypatch.setenv("HF_TOKEN", "token")
        yield


@pytest.mark.usefixtures("hub")
def test_the_command_measures_a_task_of_the_hub(
    folders: dict[str, Path],
    pages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--model", str(folders["embedder"]), "--output", str(tmp_path / "out")]
    main(["benchmark", "--tasks", "VidoreTabfquadRetrieval", str(pages), *words])
    images = similarities(folders["embedder"], [{"image": shown(number)} for number in range(12)])
    (file,) = (tmp_path / "out").rglob("VidoreTabfquadRetrieval.queries.jsonl")
    found = {row["query"]: row["score"] for row in map(json.loads, file.read_text().splitlines())}
    expected = {f"query-test-{query[1:]}": value for query, value in per_query(images, "ndcg_cut.5").items()}
    assert found == pytest.approx(expected, **EQUAL)
    by_mteb = json.loads(file.with_name("VidoreTabfquadRetrieval.json").read_text())
    assert by_mteb["scores"]["test"][0]["ndcg_at_5"] == pytest.approx(np.mean([*found.values()]), rel=0, abs=1e-5)
    labels = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    assert labels == ["Task", "---", "VidoreTabfquadRetrieval", "pages", "mean over tasks"]
    # What was loaded once is there without a network.
    for place in (constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", True)
    benchmark(str(folders["embedder"]), ["VidoreTabfquadRetrieval"], str(tmp_path / "again"))
    (again,) = (tmp_path / "again").rglob("VidoreTabfquadRetrieval.queries.jsonl")
    assert again.read_text() == file.read_text()
