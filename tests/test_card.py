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
from huggingface_hub import ModelCard

from vlmembed.export.card import CardFacts, escape, write_card

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
)


def write(folder: Path, facts: CardFacts = FACTS, **options: Any) -> Path:
    """Write a card into a folder that says how it is served."""
    kind, prompts = options.get("opens_with", "SentenceTransformer"), options.get("prompts", {})
    requirements = {"sentence_transformers": ">=5.4", "transformers": ">=5.4"}
    modality = {"text": {"method_output_name": options.get("output", "last_hidden_state")}}
    modules = ("sentence_transformers.Transformer", *options.get("modules", ("sentence_transformers.Pooling",)))
    contents = {
        "config_sentence_transformers.json": {"model_type": kind, "prompts": prompts, "requirements": requirements},
        "modules.json": [{"type": module, "path": module.split(".")[-1]} for module in modules],
        "sentence_bert_config.json": {"modality_config": modality},
        "config.json": {"text_config": {"is_causal": options.get("causal", True)}},
        "Pooling/config.json": {"pooling_mode": options.get("mode", "lasttoken")},
    }
    (folder / "Pooling").mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return write_card(folder, facts)


def render(markdown: str) -> str:
    """As the Hub does: CommonMark with tables."""
    return pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").render(markdown)


def rendered(path: Path) -> str:
    return render(ModelCard.load(path).text)  # Without the front matter.


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_metadata_and_text_say_what_was_done_and_measured(tmp_path: Path) -> None:
    path = write(tmp_path)
    data, page = ModelCard.load(path).data, rendered(path)
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "feature-extraction")
    assert data.tags == ["sentence-transformers", "vlmembed"]
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
    assert str(tmp_path) in card.text
    assert "<table>" not in rendered(path)
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
    _, snippet = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
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
        ({"causal": False}, False, False),
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
    )
    path = write(tmp_path, nasty, prompts={"query": NASTY})
    card, page = ModelCard.load(path), rendered(path)
    assert (card.data.license, card.data.model_name) == (NASTY, NASTY)  # YAML carries it exactly
    plain = rendered(write(tmp_path / "plain"))
    for tag in ("h1", "h2", "details", "/details", "pre", "/pre", "script", "a ", "em", "table", "hr"):
        assert page.count(f"<{tag}") == plain.count(f"<{tag}"), tag
    assert [len(row) for row in cells(page)] == [3, 3]
    # Title, base model, label and its value, data set, verification, library and its version.
    visible = html.unescape(re.sub("<[^>]+>", "", page))
    assert visible.count(" ".join(NASTY.split())) == 8
    assert html.unescape(render(f"# {escape(NASTY)}")) == f"<h1>{' '.join(NASTY.split())}</h1>\n"


def test_the_configuration_is_whole(tmp_path: Path) -> None:
    config = {"seed": 7, "data": {"max_tokens": 2048, "path": "data/train.jsonl", "token": None, "sizes": [1, 2]}}
    text = write(tmp_path, replace(FACTS, config=config)).read_text()
    [shown] = re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert yaml.safe_load(html.unescape(shown)) == config
