from __future__ import annotations

import ast
import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import yaml
from building import encoder, multi_vector, ranker
from datasets import Dataset
from huggingface_hub import ModelCard, metadata_load
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from vlmembed.export import ModelInfo, SentenceTransformers
from vlmembed.export.card import CardFacts, escape, logged_at, origin_of, write_card
from vlmembed.export.exporter import data_sets, losses
from vlmembed.export.sentence_transformers import write_folder, write_reranker

#: Closes a code span, a table cell, an HTML block, a code block, and the front matter, if it is let through.
NASTY = "a`b|c</details></code></pre>\n```\n---\n# *d* [e](f) <script>g</script> &lt; {{ h }} $i$"

FACTS = CardFacts(
    title="pages-2b",
    source="org/pages-2b",
    base_model="Qwen/Qwen3-VL-2B-Instruct",
    training={"Pooling": "vlmembed.pooling.LastToken", "Loss": "vlmembed.losses.InfoNCE"},
    datasets=("org/pages", "data/train.jsonl"),
    metrics={"val/ndcg@10/64": 0.71, "val/ndcg@10": 0.8125, "val/ndcg@10/256": 0.75, "val/org/birds/recall@1": 0.5},
    config={"seed": 7, "model": {"class_path": "vlmembed.modules.EmbeddingModule"}},
    verification="18 embeddings compared (text, image): largest difference 3.2e-07, allowed 1e-05",
    versions={"torch": "2.15.0", "sentence-transformers": "6.2.0"},
    license="apache-2.0",
    language=("en",),
    losses=("Matryoshka", "InfoNCE"),
    rows=90,
    dimension=512,
    full_dimension=512,
    dimensions=(512, 256, 64),
)


def write(folder: Path, facts: CardFacts = FACTS, **options: Any) -> Path:
    """Write a card into a folder that says how it is served."""
    kind, prompts = options.get("opens_with", "SentenceTransformer"), options.get("prompts", {})
    requirements = {"sentence_transformers": ">=5.4", "transformers": ">=5.4"}
    output = {"method_output_name": options.get("output", "last_hidden_state")}
    modality = dict.fromkeys(["text", "image", *options.get("modalities", ()), "message"], output)
    modules = ("sentence_transformers.Transformer", *options.get("modules", ("sentence_transformers.Pooling",)))
    contents = {
        "config_sentence_transformers.json": {"model_type": kind, "prompts": prompts, "requirements": requirements},
        "modules.json": [
            {"idx": index, "type": module, "path": module.split(".")[-1] if index else ""}
            for index, module in enumerate(modules)
        ],
        "sentence_bert_config.json": {"modality_config": modality},
        **{f"{module.split('.')[-1]}/config.json": options.get("settings", {}).get(module, {}) for module in modules},
        "config.json": {
            "model_type": "qwen3_vl",
            "text_config": {"is_causal": options.get("causal", True), "max_position_embeddings": 4096},
            **options.get("checkpoint", {}),
        },
        "tokenizer_config.json": {"model_max_length": options.get("max_length", 512)},
        "Pooling/config.json": {"pooling_mode": options.get("mode", "lasttoken")},
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return write_card(folder, facts)


def render(markdown: str) -> str:
    """As the Hub does: CommonMark with tables."""
    return pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").render(markdown)


def rendered(path: Path) -> str:
    return render(ModelCard.load(path).text)  # Without the front matter.


def cells(page: str) -> list[list[str]]:
    """The table of results."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.split("<h2>Results</h2>")[1], re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_metadata_and_text_say_what_was_done_and_measured(tmp_path: Path) -> None:
    path = write(tmp_path)
    data, page = ModelCard.load(path).data, rendered(path)
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "feature-extraction")
    tags = ["sentence-transformers", "sentence-similarity", "feature-extraction", "dense", "vlmembed"]
    assert data.tags == [*tags, "generated_from_trainer", "dataset_size:90", "loss:Matryoshka", "loss:InfoNCE"]
    assert (data.language, data.metrics, data.base_model_relation) == (["en"], ["ndcg@10", "recall@1"], "finetune")
    assert (data.license, data.base_model) == ("apache-2.0", "Qwen/Qwen3-VL-2B-Instruct")
    assert data.datasets == ["org/pages"]  # a path means nothing to the Hub
    assert data.model_name == "pages-2b"
    assert {(result.dataset_name, result.metric_name, result.metric_value) for result in data.eval_results} == {
        ("val", "ndcg@10", 0.8125),
        ("val", "ndcg@10 at 256 dimensions", 0.75),
        ("val", "ndcg@10 at 64 dimensions", 0.71),
        ("val/org/birds", "recall@1", 0.5),
    }
    assert cells(page) == [
        ["Evaluation set", "Metric", "full", "256", "64"],
        ["val", "ndcg@10", "0.8125", "0.7500", "0.7100"],
        ["val/org/birds", "recall@1", "0.5000", "", ""],
    ]
    for said in (*FACTS.training.values(), FACTS.verification, "torch 2.15.0, sentence-transformers 6.2.0."):
        assert said in page
    assert "sentence-transformers &gt;=5.4 and transformers &gt;=5.4" in page


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    """A folder as the base model is told, but is no metadata; without measurements there is no table."""
    path = write(tmp_path, replace(FACTS, base_model=str(tmp_path), license=None, metrics={}))
    card = ModelCard.load(path)
    assert (card.data.base_model, card.data.license, card.data.eval_results) == (None, None, None)
    assert str(tmp_path.parent) not in card.text
    assert f"<code>{tmp_path.name}</code>" in card.text
    assert "Nothing was measured." in rendered(path)


def test_a_metric_without_an_evaluation_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric 'ndcg@10' has no evaluation set"):
        write(tmp_path, replace(FACTS, metrics={"ndcg@10": 0.5}))


def test_what_was_there_before_reranking_is_shown_and_is_no_result_of_the_model(tmp_path: Path) -> None:
    metrics = {"val/ndcg@10": 0.75, "val/ndcg@10/before": 0.5, "test/pages/mrr@10/before": 0.25}
    path = write(tmp_path, replace(FACTS, metrics=metrics), opens_with="CrossEncoder")
    assert cells(rendered(path)) == [
        ["Evaluation set", "Metric", "full"],
        ["val", "ndcg@10", "0.7500"],
        ["val", "ndcg@10 before reranking", "0.5000"],
        ["test/pages", "mrr@10 before reranking", "0.2500"],
    ]
    data = ModelCard.load(path).data
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_name, result.metric_value) == ("val", "ndcg@10", 0.75)
    assert data.pipeline_tag == "text-ranking"


def test_the_number_of_vectors_is_shown_and_is_no_result(tmp_path: Path) -> None:
    metrics = {
        "val/ndcg@10": 0.75,
        "val/ndcg@10/x4": 0.5,
        "val/vectors_per_document": 9,
        "val/vectors_per_document/x4": 2,
    }
    path = write(tmp_path, replace(FACTS, metrics=metrics), opens_with="MultiVectorEncoder")
    assert ["val", "vectors_per_document", "9.0000", "2.0000"] in cells(rendered(path))
    names = {result.metric_name for result in ModelCard.load(path).data.eval_results}
    assert names == {"ndcg@10", "ndcg@10 with 4 times fewer vectors"}


@pytest.mark.parametrize(
    ("opens_with", "calls"),
    [
        ("SentenceTransformer", {"SentenceTransformer", "print", "similarity", "encode_query", "encode_document"}),
        ("MultiVectorEncoder", {"MultiVectorEncoder", "print", "similarity", "encode_query", "encode_document"}),
        ("CrossEncoder", {"CrossEncoder", "print", "rank", "predict", "Identity"}),
    ],
)
def test_the_usage_snippet_calls_what_exists(tmp_path: Path, opens_with: str, calls: set[str]) -> None:
    path = write(tmp_path, opens_with=opens_with, modules=["served_pooling.ServedPooling"])
    snippet, *_ = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    called = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    names = {node.func.id if isinstance(node.func, ast.Name) else node.func.attr for node in called}
    assert names == calls
    model_class = getattr(sentence_transformers, opens_with)
    assert all(hasattr(model_class, name) for name in calls - {"print", "Identity", opens_with})
    [opened] = [node for node in called if isinstance(node.func, ast.Name) and node.func.id == opens_with]
    assert ast.literal_eval(opened.args[0]) == "org/pages-2b"
    assert [keyword.arg for keyword in opened.keywords] == ["trust_remote_code"]


def test_other_clients_are_given_the_prompt_of_each_role(tmp_path: Path) -> None:
    """With these arguments LangChain 1.2, Haystack 3.4 and LlamaIndex 0.8 gave the vectors of Sentence Transformers."""
    prompts = {"query": f'Find "it".\n{NASTY}', "document": "A page's text."}
    text = write(tmp_path, prompts=prompts, modules=["served_pooling.ServedPooling"]).read_text()
    snippet = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[-1]
    calls = [node.value for node in ast.parse(snippet).body if isinstance(node, ast.Expr)]
    arguments = [{word.arg: ast.literal_eval(word.value) for word in call.keywords} for call in calls]  # type: ignore[attr-defined]
    langchain, queries, documents, llama_index = arguments
    of_query, of_document, code = {"prompt_name": "query"}, {"prompt_name": "document"}, {"trust_remote_code": True}
    assert (langchain["query_encode_kwargs"], langchain["encode_kwargs"]) == (of_query, of_document)
    assert langchain["model_kwargs"] == code
    assert (queries, documents) == (
        {"model": "org/pages-2b", **code, "encode_kwargs": of_query},
        {"model": "org/pages-2b", **code, "encode_kwargs": of_document},
    )
    assert {"query": llama_index["query_instruction"], "document": llama_index["text_instruction"]} == prompts


@pytest.mark.parametrize(
    ("options", "vllm", "sglang"),
    [
        ({}, True, True),
        ({"mode": "mean"}, True, False),
        ({"modules": ["sentence_transformers.Pooling", "sentence_transformers.Dense"]}, True, False),
        ({"mode": "weightedmean"}, False, False),
        ({"mode": ["lasttoken", "mean"]}, False, False),
        ({"output": ["hidden_states", -2]}, False, False),
        ({"causal": False}, True, False),
        ({"causal": False, "checkpoint": {"model_type": "idefics3"}}, False, False),
        ({"modules": ["sentence_transformers.WeightedLayerPooling", "sentence_transformers.Pooling"]}, False, False),
        ({"modules": ["served_pooling.ServedPooling"]}, False, False),
    ],
)
def test_servers_that_pool_in_their_own_way_are_named(
    tmp_path: Path, options: dict[str, Any], vllm: bool, sglang: bool
) -> None:
    words = {True: "rightly", False: "wrongly"}
    assert f"vLLM pools {words[vllm]}, SGLang {words[sglang]}." in write(tmp_path, **options).read_text()


def test_nothing_from_outside_can_break_the_card(tmp_path: Path) -> None:
    nasty = CardFacts(
        title=NASTY,
        source=NASTY,
        base_model=NASTY,
        training={NASTY: NASTY},
        datasets=(NASTY,),
        metrics={f"val/{NASTY.replace('/', '')}/ndcg@10": 0.25},
        config={NASTY: [NASTY]},
        verification=NASTY,
        versions={NASTY: NASTY},
        license=NASTY,
        language=(NASTY,),
        losses=(NASTY,),
    )
    path = write(tmp_path, nasty, prompts={"query": NASTY})
    card, page = ModelCard.load(path), rendered(path)
    assert (card.data.license, card.data.model_name) == (NASTY, NASTY)  # YAML carries it exactly
    assert card.data.language == [NASTY]
    assert f"loss:{NASTY}" in card.data.tags
    facts = replace(FACTS, base_model="fresh", datasets=("x.jsonl",), training={"a": "b"}, losses=())
    plain = rendered(write(tmp_path / "plain", facts))
    for tag in ("h1", "h2", "details", "/details", "pre", "/pre", "script", "a ", "em", "table", "hr"):
        assert page.count(f"<{tag}") == plain.count(f"<{tag}"), tag
    assert [len(row) for row in cells(page)] == [3, 3]
    # Title, language, license, data set, label and its value, verification, library and its version.
    visible = html.unescape(re.sub("<[^>]+>", "", page))
    assert visible.count(" ".join(NASTY.split())) == 9
    assert html.unescape(render(f"# {escape(NASTY)}")) == f"<h1>{' '.join(NASTY.split())}</h1>\n"


def test_the_configuration_is_whole(tmp_path: Path) -> None:
    config = {"seed": 7, "data": {"max_tokens": 2048, "path": "data/train.jsonl", "token": None, "sizes": [1, 2]}}
    text = write(tmp_path, replace(FACTS, config=config)).read_text()
    *_, shown = re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert yaml.safe_load(html.unescape(shown)) == config


@pytest.mark.parametrize(
    ("dimension", "merging_factor", "results"),
    [
        (512, 1, {("ndcg@10", None): 0.5, ("ndcg@10", "at 64 dimensions"): 0.2}),
        (64, 1, {("ndcg@10", None): 0.2}),  # What was measured at 512 dimensions, the folder does not serve.
        (512, 4, {("ndcg@10", None): 0.3, ("ndcg@10", "at 64 dimensions"): 0.2}),
    ],
)
def test_a_metric_is_listed_once_for_what_the_folder_serves(
    tmp_path: Path, dimension: int, merging_factor: int, results: dict[tuple[str, str | None], float]
) -> None:
    metrics = {"val/ndcg@10": 0.5, "val/ndcg@10/512": 0.5, "val/ndcg@10/64": 0.2}
    metrics |= {"val/ndcg@10/x4": 0.3} if merging_factor > 1 else {}
    merging = "sentence_transformers.HierarchicalTokenPooling"
    options: dict[str, Any] = {"modules": [merging], "opens_with": "MultiVectorEncoder"} if merging_factor > 1 else {}
    facts = replace(FACTS, metrics=metrics, dimension=dimension)
    path = write(tmp_path, facts, settings={merging: {"pool_factor": merging_factor}}, **options)
    listed = ModelCard.load(path).data.eval_results
    found = [((result.metric_type, result.dataset_config), result.metric_value) for result in listed]
    assert dict(found) == results
    assert len(found) == len(results)
    for result in metadata_load(path)["model-index"][0]["results"]:
        types = [metric["type"] for metric in result["metrics"]]
        assert len(types) == len(set(types))


def test_a_document_of_many_vectors_has_a_size(tmp_path: Path) -> None:
    """24 numbers of 4 bytes, 10.5 times."""
    dense = "sentence_transformers.Dense"
    facts = replace(FACTS, metrics={"val/vectors_per_document": 10.5}, dimension=24, full_dimension=24)
    options: dict[str, Any] = {"opens_with": "MultiVectorEncoder", "modules": [dense]}
    text = write(tmp_path, facts, settings={dense: {"out_features": 24}}, **options).read_text()
    assert "A vector has 24 numbers: 96 bytes in float32." in text
    assert "A document has 10.5 vectors on average, which are 1008 bytes." in text


@pytest.mark.parametrize(
    ("modalities", "said"),
    [((), "a text, an image, or several"), (("video",), "an image, a video, or"), (("audio",), "an image, audio, or")],
)
def test_the_card_says_what_the_model_reads(tmp_path: Path, modalities: tuple[str, ...], said: str) -> None:
    text = write(tmp_path, modalities=modalities).read_text()
    assert said in text
    assert f"**Supported Modalities:** {', '.join(map(str.title, ('text', 'image', *modalities)))}" in text
    assert "**Maximum Sequence Length:** 512 tokens" in text


def test_no_folder_of_the_machine_is_named(tmp_path: Path) -> None:
    paths = ["/home/me/pages", "~/pages", "file:///home/me/pages", "C:\\Users\\me\\pages"]
    config = {"data": {"train": paths, "rows": [{"path": "/home/me/pages"}]}, "model": {"instruction": "a/b"}}
    facts = replace(FACTS, base_model="/home/me/checkpoint", datasets=paths, config=config)
    text = write(tmp_path, facts).read_text()
    assert not re.search(r"home|Users|~", text)
    assert {"a/b", "…/pages"} <= set(re.findall(r"[^\s]+/[^\s]+", text))
    assert ModelCard.load(tmp_path / "README.md").data.datasets is None


PAGES = {"class_path": "vlmembed.data.Rows", "init_args": {"path": "org/pages", "subset": "en"}}
BIRDS = {"class_path": "vlmembed.data.StreamingRows", "init_args": {"path": "org/birds", "rows": 100}}
GROUPED = {"class_path": "vlmembed.data.GroupByQuery", "init_args": {"rows": PAGES}}
MIXED = {"class_path": "vlmembed.data.Mixture", "init_args": {"sources": [GROUPED, "birds.jsonl"], "weights": [1, 2]}}
NUMBERS = {"class_path": "vlmembed.data.digits.HandwrittenNumbers", "init_args": {"size": 9}}


@pytest.mark.parametrize(
    ("train", "names"),
    [
        (None, []),
        ("org/pages", ["org/pages"]),
        (["org/pages", BIRDS], ["org/pages", "org/birds"]),
        (MIXED, ["org/pages", "birds.jsonl"]),
        ([MIXED, NUMBERS], ["org/pages", "birds.jsonl", "HandwrittenNumbers(size=9)"]),
        ({"class_path": "mine.Rows"}, ["Rows()"]),
    ],
)
def test_data_sets_are_named_in_every_form(train: Any, names: list[str]) -> None:
    assert data_sets(train) == names


INFONCE = {"class_path": "vlmembed.losses.InfoNCE", "init_args": {"temperature": 1}}
NESTED = {"class_path": "vlmembed.losses.Matryoshka", "init_args": {"loss": INFONCE, "dimensions": [64]}}
SUM = {"class_path": "vlmembed.losses.WeightedSum", "init_args": {"losses": [NESTED, INFONCE], "weights": [1, 2]}}


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (None, []),
        (INFONCE, ["InfoNCE"]),
        (NESTED, ["Matryoshka", "InfoNCE"]),
        (SUM, ["WeightedSum", "Matryoshka", "InfoNCE", "InfoNCE"]),
        ({"a": NESTED, "b": INFONCE}, ["Matryoshka", "InfoNCE", "InfoNCE"]),
    ],
)
def test_losses_are_named_with_those_inside(loss: Any, names: list[str]) -> None:
    assert losses(loss) == names


@pytest.mark.parametrize(
    ("name", "files", "origin"),
    [
        ("org/model", {}, "org/model"),
        ("here", {"README.md": "---\nbase_model: org/model\n---\n"}, "org/model"),
        ("here", {"README.md": "---\nbase_model: [org/model, org/other]\n---\n"}, "org/model"),
        ("here", {"README.md": "---\nbase_model: /home/me\n---\n", "config.json": "{}"}, "here"),
        ("here", {"README.md": "---\n: [\n---\n", "config.json": '{"_name_or_path": "org/model"}'}, "org/model"),
        ("here", {"README.md": "no front matter", "config.json": '{"_name_or_path": "/home/me"}'}, "here"),
        ("here", {"README.md": b"\xff", "config.json": "["}, "here"),
        ("models--org--model/snapshots/1f", {"config.json": "{}"}, "org/model"),
        ("absent", {}, "absent"),
    ],
)
def test_what_a_checkpoint_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, str | bytes], origin: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, content in files.items():
        Path(name).mkdir(parents=True, exist_ok=True)
        Path(name, file).write_bytes(content.encode() if isinstance(content, str) else content)
    assert origin_of(name) == origin


def of_their_trainer(folder: Path, output: Path) -> ModelCard:
    """The card that Sentence Transformers' trainer writes for the model in an exported folder, once it was measured."""
    kind = json.loads((folder / "config_sentence_transformers.json").read_text())["model_type"]
    model: Any = getattr(sentence_transformers, kind)(str(folder), device="cpu")
    columns: dict[str, Any] = {"query": ["one", "two"], "positive": ["1", "2"]}
    loss, evaluator = {
        "SentenceTransformer": (MultipleNegativesRankingLoss, InformationRetrievalEvaluator),
        "MultiVectorEncoder": (MultiVectorMultipleNegativesRankingLoss, MultiVectorInformationRetrievalEvaluator),
        "CrossEncoder": (BinaryCrossEntropyLoss, CrossEncoderRerankingEvaluator),
    }[kind]
    if kind == "CrossEncoder":
        columns["label"] = [1.0, 0.0]
        evaluator([{"query": "one", "positive": ["1"], "negative": ["2"]}])(model)
    else:
        evaluator({"q": "one"}, {"a": "1", "b": "2"}, {"q": {"a"}}, show_progress_bar=False)(model)
    options = getattr(sentence_transformers, f"{kind}TrainingArguments")(str(output), report_to=[])
    rows = Dataset.from_dict(columns)
    getattr(sentence_transformers, f"{kind}Trainer")(model=model, args=options, train_dataset=rows, loss=loss(model))
    model.model_card_data.language, model.model_card_data.license = ["en"], "mit"
    model.save_pretrained(str(output))
    return ModelCard.load(output / "README.md")


#: Their section → ours. What they leave for authors to fill in stands in comments.
SECTIONS = {
    "Direct Usage (Sentence Transformers)": "Usage",
    "Evaluation": "Results",
    "Metrics": "Results",
    "Training Details": "Training",
    "Training Dataset": "Training",
    "Training Logs": "Training",  # Where there are some: their trainer has a heading for none.
    "Framework Versions": "Verification",
    "BibTeX": "Citation",
    "Additional Resources": "Usage",
    "Sentence Transformers": "SentenceTransformers",
}


WRITERS = {encoder: write_folder, multi_vector: write_folder, ranker: write_reranker}


@pytest.mark.parametrize("build", WRITERS)
def test_nothing_is_missing_that_the_card_of_their_trainer_has(checkpoint: Path, tmp_path: Path, build: Any) -> None:
    options: Any = {"max_length": 100}
    built = build(checkpoint, **options if build is encoder else {"backbone": options})
    built, folder = getattr(built, "encoder", built), tmp_path / "folder"
    folder.mkdir()
    WRITERS[build](built, folder)
    config = {"model": {"init_args": {"loss": INFONCE}}, "data": {"init_args": {"train": "org/pages"}}}
    info = ModelInfo("pages", metrics={"val/ndcg@10": 0.5}, config=config, rows=2, steps=9)
    exporter = SentenceTransformers(license="mit", language=["en"], base_model="org/base")
    write_card(folder, exporter.facts(built, info, "", "folder"))
    ours, theirs = ModelCard.load(folder / "README.md"), of_their_trainer(folder, tmp_path)
    missing = set(theirs.data.to_dict()) - set(ours.data.to_dict())
    assert missing <= {"widget"}  # Of texts alone; the Hub has no widget for these models.
    assert (ours.data.base_model, ours.data.datasets) == ("org/base", ["org/pages"])
    kinds = [{tag.split(":")[0] for tag in card.data.tags} for card in (ours, theirs)]
    assert kinds[0] >= kinds[1]
    assert "dataset_size:2" in ours.data.tags
    text = re.sub("<!--.*?-->", "", theirs.text, flags=re.DOTALL)
    facts = [set(re.findall(r"^- \*\*(.+?):\*\*", card, re.MULTILINE)) for card in (ours.text, text)]
    assert facts[0] >= facts[1]
    for label in facts[1] - {"Documentation", "Hugging Face", "Supported Modalities", "Output Dimensionality"}:
        values = [re.findall(rf"\*\*{label}:\*\* (\S+)", card)[0].lower() for card in (ours.text, text)]
        assert values[0] == values[1], label
    headings = [set(re.findall(r"^##+ (.+)$", card, re.MULTILINE)) for card in (ours.text, text)]
    ignored = {"Unnamed Dataset", *theirs.data.tags, *(heading for heading in headings[1] if "Retrieval" in heading)}
    ignored |= {heading for heading in headings[1] if heading.endswith(("Loss", "Reranking"))}
    assert {SECTIONS.get(heading, heading) for heading in headings[1] - ignored} <= headings[0]


def test_the_last_measurements_of_the_run_are_told(tmp_path: Path) -> None:
    """Losses are logged at other steps than metrics; what was measured of part of the model stands with the results."""
    log = tmp_path / "metrics.csv"
    header = "epoch,step,train/loss,val/ndcg@10,val/ndcg@10/64,val/birds/recall@1\n"
    log.write_text(f"{header}0,0,,0.25,0.2,\n0,4,2.5,,,\n0,9,1.5,,,\n0,9,,0.5,0.4,0.75\n")
    text = write(tmp_path / "told", replace(FACTS, log=log)).read_text()
    (told,) = re.findall(r"### Training Logs\n\n(.*?)\n\n", text, re.DOTALL)
    assert told.splitlines()[::2] == [
        "| step | train/loss | val/ndcg@10 | val/birds/recall@1 |",
        "| 0 |  | 0.2500 |  |",
    ]
    assert told.splitlines()[3:] == ["| 9 | 1.5000 | 0.5000 | 0.7500 |"]
    measured = {"val/ndcg@10": 0.5, "val/ndcg@10/64": 0.4, "val/birds/recall@1": 0.75}
    assert [logged_at(log, step) for step in (9, 4, 5, None)] == [measured, {}, {}, {}]
    for content in ("", "epoch\n1\n", "step,train/loss\n1,2\n"):
        log.write_text(content)
        assert "Training Logs" not in write(tmp_path / "empty", replace(FACTS, log=log)).read_text()
