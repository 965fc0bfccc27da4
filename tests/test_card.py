from __future__ import annotations

import ast
import html
import re
from dataclasses import replace
from pathlib import Path

import pytest
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


def rendered(path: Path) -> str:
    """Render a card as the Hub does: CommonMark with tables, without the front matter."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    return markdown.render(ModelCard.load(path).text)


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_the_metadata_parses_back(tmp_path: Path) -> None:
    data = ModelCard.load(write_card(tmp_path, FACTS)).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "feature-extraction")
    assert data.tags == ["sentence-transformers", "vlmembed"]
    assert (data.license, data.base_model) == ("apache-2.0", "Qwen/Qwen3-VL-2B-Instruct")
    assert data.datasets == ["org/pages"]  # a path means nothing to the Hub
    assert data.model_name == "pages-2b"
    assert {(each.dataset_name, each.metric_name, each.metric_value) for each in data.eval_results} == {
        ("val", "ndcg@10", 0.8125),
        ("val", "ndcg@10 at 256 dimensions", 0.75),
        ("val", "ndcg@10 at 64 dimensions", 0.71),
        ("val/org/birds", "recall@1", 0.5),
    }


def test_the_text_says_what_was_done_and_found(tmp_path: Path) -> None:
    page = rendered(write_card(tmp_path, FACTS))
    assert cells(page) == [
        ["Evaluation set", "Metric", "full", "256", "64"],
        ["val", "ndcg@10", "0.8125", "0.7500", "0.7100"],
        ["val/org/birds", "recall@1", "0.5000", "", ""],
    ]
    for said in ("vlmembed.pooling.LastToken", "vlmembed.losses.InfoNCE", FACTS.verification):
        assert said in page
    assert "torch 2.15.0, sentence-transformers 6.2.0." in page


def test_a_folder_as_base_model_is_told_but_is_no_metadata(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    card = ModelCard.load(write_card(tmp_path, replace(FACTS, base_model=str(tmp_path / "base"), license=None)))
    assert card.data.base_model is None
    assert card.data.license is None
    assert str(tmp_path / "base") in card.text


def test_without_measurements_there_is_no_table(tmp_path: Path) -> None:
    path = write_card(tmp_path, replace(FACTS, metrics={}))
    assert "model-index" not in path.read_text()
    assert "<table>" not in rendered(path)
    assert "Nothing was measured." in rendered(path)


def test_a_metric_without_an_evaluation_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric 'ndcg@10' has no evaluation set"):
        write_card(tmp_path, replace(FACTS, metrics={"ndcg@10": 0.5}))


@pytest.mark.parametrize(
    ("opens_with", "calls"),
    [
        ("SentenceTransformer", {"SentenceTransformer", "print", "similarity", "encode_query", "encode_document"}),
        ("MultiVectorEncoder", {"MultiVectorEncoder", "print", "similarity", "encode_query", "encode_document"}),
        ("CrossEncoder", {"CrossEncoder", "print", "rank", "predict", "Identity"}),
    ],
)
def test_the_usage_snippet_calls_what_exists(tmp_path: Path, opens_with: str, calls: set[str]) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    path = write_card(tmp_path, replace(FACTS, opens_with=opens_with, trust_remote_code=True))
    [snippet] = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    tree = ast.parse(snippet)
    called = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {node.func.id if isinstance(node.func, ast.Name) else node.func.attr for node in called}
    assert names == calls
    model_class = getattr(sentence_transformers, opens_with)
    assert all(hasattr(model_class, name) for name in calls - {"print", "Identity", opens_with})
    [opened] = [node for node in called if isinstance(node.func, ast.Name) and node.func.id == opens_with]
    assert ast.literal_eval(opened.args[0]) == "org/pages-2b"
    assert [keyword.arg for keyword in opened.keywords] == ["trust_remote_code"]


def test_nothing_from_outside_can_break_the_card(tmp_path: Path) -> None:
    nasty = replace(
        FACTS,
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
    path = write_card(tmp_path, nasty)
    card, page = ModelCard.load(path), rendered(path)
    assert card.data.license == NASTY  # YAML carries it exactly
    assert card.data.model_name == NASTY
    plain = rendered(write_card(tmp_path / "plain", FACTS))
    for tag in ("h1", "h2", "details", "/details", "pre", "/pre", "script", "a ", "em", "table", "hr"):
        assert page.count(f"<{tag}") == plain.count(f"<{tag}"), tag
    assert [len(row) for row in cells(page)] == [3, 3]
    visible = html.unescape(re.sub("<[^>]+>", "", page))
    one_line = " ".join(NASTY.split())
    # Title, base model, label and its value, data set, verification, library and its version.
    assert visible.count(one_line) == 8


def test_the_configuration_is_whole(tmp_path: Path) -> None:
    config = {"seed": 7, "data": {"max_tokens": 2048, "path": "data/train.jsonl", "token": None, "sizes": [1, 2]}}
    text = write_card(tmp_path, replace(FACTS, config=config)).read_text()
    [shown] = re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert yaml.safe_load(html.unescape(shown)) == config


def test_escaping_shows_the_text_itself() -> None:
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    page = markdown.render(f"# {escape(NASTY)}")
    assert html.unescape(page) == f"<h1>{' '.join(NASTY.split())}</h1>\n"


def test_what_was_there_before_reranking_is_shown_and_is_no_result_of_the_model(tmp_path: Path) -> None:
    metrics = {"val/ndcg@10": 0.75, "val/ndcg@10/before": 0.5, "test/pages/mrr@10/before": 0.25}
    path = write_card(tmp_path, replace(FACTS, metrics=metrics, opens_with="CrossEncoder"))
    table = [row for row in cells(rendered(path)) if len(row) == 3]
    assert table == [
        ["Evaluation set", "Metric", "full"],
        ["val", "ndcg@10", "0.7500"],
        ["val", "ndcg@10 before reranking", "0.5000"],
        ["test/pages", "mrr@10 before reranking", "0.2500"],
    ]
    (result,) = ModelCard.load(path).data.eval_results
    assert (result.dataset_name, result.metric_name, result.metric_value) == ("val", "ndcg@10", 0.75)
