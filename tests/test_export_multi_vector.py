"""Multi-vector models are served as they were trained, by Sentence Transformers' MultiVectorEncoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from building import call, export, jsonl, picture, run_config
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder as Served
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator

from vlmembed.adapters import LoRA
from vlmembed.backbones import Qwen3VL
from vlmembed.encoder import MultiVectorEncoder
from vlmembed.export import SentenceTransformers, Verification
from vlmembed.export.verify import brings_code, expect, verify
from vlmembed.late_interaction import MultiVectors, merge
from vlmembed.pooling import TokenProjection, TokenSelection

ALL = TokenSelection()
#: Without images, they have no vector as documents.
TEXTS = ("text", "long text")


@dataclass(frozen=True)
class Case:
    """What is exported, whether Sentence Transformers' modules serve it, and what the model refuses of the probes."""

    projection: TokenProjection = field(default_factory=lambda: TokenProjection(24))
    query: TokenSelection = ALL
    document: TokenSelection = ALL
    stock: bool = True
    left_out: tuple[str, ...] = ()
    similarity: str = "maxsim"
    truncate_dim: int | None = None
    merging_factor: int = 1
    dtype: str = "float32"
    lora: bool = False


MERGED = "residual MLP, truncated, merged"
CASES = {
    "linear": Case(),
    "MLP, mean": Case(TokenProjection(24, inner_size=48), similarity="meanmaxsim"),
    MERGED: Case(TokenProjection(24, inner_size=48, residual=True), truncate_dim=16, merging_factor=3),
    "LoRA, bfloat16": Case(dtype="bfloat16", lora=True),
    "images, words skipped": Case(
        query=TokenSelection(skip=["e", "Ġseven"]),
        document=TokenSelection("images", skip=["e", "Ġseven"]),
        left_out=TEXTS,
    ),
    "words of queries skipped": Case(query=TokenSelection(skip=["Ġseven"])),
    "without instruction": Case(
        query=TokenSelection("without_instruction"), document=TokenSelection("without_instruction"), stock=False
    ),
    "texts, other words skipped": Case(
        query=TokenSelection("texts", ["Ġseven"]), document=TokenSelection("texts", ["Ġzero"]), stock=False
    ),
}

Exports = dict[str, tuple[Path, Verification]]


def trained(checkpoint: Path, case: Case) -> MultiVectorEncoder:
    torch.manual_seed(0)
    backbone = Qwen3VL(str(checkpoint), query_instruction="Find it.", dtype=case.dtype, max_length=256)
    selections: Any = {"query": case.query, "document": case.document}
    built = MultiVectorEncoder(backbone, case.projection, selections, case.similarity)
    built.configure()
    if case.lora:
        LoRA(LoraConfig(r=4, target_modules=["q_proj", "qkv"], init_lora_weights=False)).apply(backbone)
    return built


def change_a_weight(folder: Path) -> None:
    path = folder / "1_Dense" / "model.safetensors"
    weights = load_file(path)
    weights["linear.weight"][0, 0] += 0.01
    save_file(weights, path)


#: What makes a folder serve something else: a weight that is off, a mask that keeps too much, vectors merged too short.
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "linear": change_a_weight,
    "images, words skipped": lambda at: (at / "2_MultiVectorMask/config.json").write_text('{"skiplist_words": []}'),
    MERGED: lambda at: (at / "6_HierarchicalTokenPooling/config.json").write_text(
        '{"pool_factor": 3, "num_protected_tokens": 0}'
    ),
}


@pytest.fixture(scope="module")
def exports(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Every case and damaged copies, opened in one process that cannot import vlmembed."""
    root = tmp_path_factory.mktemp("exports")
    checks = {}
    for name, case in CASES.items():
        built = trained(checkpoint, case)
        prompts = {"pages-query": "Find the page."} if name == "linear" else {}
        size = [case.truncate_dim or built.dimension]
        checks[root / name] = expect(built, root, size, prompts=prompts, merging_factor=case.merging_factor)
        export(built, root / name, case.truncate_dim, prompts=prompts, merging_factor=case.merging_factor)
    for name, damage in DAMAGES.items():
        damage(shutil.copytree(root / name, root / f"damaged {name}"))
        checks[root / f"damaged {name}"] = checks[root / name]
    verified = zip(checks, verify(checks), strict=True)
    return {folder.name: (folder, verification) for folder, verification in verified}


@pytest.mark.parametrize("name", CASES)
def test_is_served_as_trained(exports: Exports, name: str) -> None:
    """Every vector and every similarity: in both roles, alone and in batches padded on either side."""
    (folder, verification), case = exports[name], CASES[name]
    assert verification.passed, str(verification)
    assert verification.check.left_out == case.left_out
    inputs, prompts = 10 - len(case.left_out), len(verification.check.prompts)
    merged = case.merging_factor > 1  # How many vectors are left.
    assert verification.comparisons == inputs * (3 * 3 + prompts + merged)  # Roles and similarities, batchings.
    assert brings_code(folder) is not case.stock
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert (config["model_type"], config["similarity_fn_name"]) == ("MultiVectorEncoder", case.similarity)
    assert config["default_prompt_name"] is None


@pytest.mark.parametrize("name", DAMAGES)
def test_folders_that_serve_something_else_are_noticed(exports: Exports, name: str) -> None:
    assert not exports[f"damaged {name}"][1].passed


def test_merged_documents_are_those_that_are_measured(exports: Exports) -> None:
    """Equal vectors are merged as `merge` does, which measures ``val/ndcg@10/x3``."""
    served: Any = Served(str(exports[MERGED][0]), device="cpu")
    texts = ["four zero seven", "a page about birds that fly south in winter", "x"]
    merged = served.encode_document(texts)
    served[-1].tasks = []
    whole = served.encode_document(texts)
    expected = merge(MultiVectors(torch.cat(whole), torch.tensor([len(rows) for rows in whole])), 3).split()
    assert [len(rows) for rows in merged] == [len(rows) // 3 for rows in whole]
    for vectors, reference in zip(merged, expected, strict=True):
        torch.testing.assert_close(vectors, reference, atol=1e-6, rtol=0)  # Rounding of unit vectors in float32.


def rows(folder: Path) -> list[dict[str, Any]]:
    """Text, image and mixed documents, in turn."""
    cells: list[Any] = []
    for number in range(9):
        picture(32 + 32 * (number % 3), 64, seed=number).save(folder / f"{number}.png")
        image: dict[str, Any] = {"image": f"{number}.png"}
        cells.append([f"document {number} of many", image, {**image, "text": f"page {number}"}][number % 3])
    return [{"query": f"number {number} is wanted", "positive": cell} for number, cell in enumerate(cells)]


@pytest.mark.parametrize("similarity", ["maxsim", pytest.param("meanmaxsim", marks=pytest.mark.exhaustive)])
def test_what_was_measured_is_what_the_folder_ranks(
    checkpoint: Path, here: Path, capsys: pytest.CaptureFixture[str], similarity: str
) -> None:
    """From the command line: a short run, and an export of its checkpoint, which their own evaluator measures."""
    written = rows(here)
    data = {"train": jsonl("t.jsonl", written), "val": jsonl("v.jsonl", written), "batch_size": 4}
    config = run_config(checkpoint, "MultiVectorModule", **data)
    projection = {"class_path": "vlmembed.pooling.TokenProjection", "init_args": {"size": 16}}
    loss = {"loss": {"class_path": "vlmembed.losses.InfoNCE"}, "dimensions": [8]}
    loss = {"class_path": "vlmembed.losses.Matryoshka", "init_args": loss}
    config["model"]["init_args"] |= {"projection": projection, "similarity": similarity, "loss": loss}
    config["trainer"] |= {"max_steps": 2, "default_root_dir": str(here)}
    call("fit", config, "--trainer.exporter=null")
    (saved,) = here.rglob("*.ckpt")
    call("export", config, "--ckpt_path", str(saved), "--model.two_stage=3")
    assert (
        "configured as when the checkpoint was trained:\n  model.init_args.two_stage: None → 3\n"
        in capsys.readouterr().out
    )
    (metrics,) = here.rglob("metrics.csv")
    measured = pandas.read_csv(metrics)["val/ndcg@10"].dropna().iloc[-1]
    (folder,) = here.rglob("export")
    card = (folder / "README.md").read_text()
    assert "MultiVectorEncoder(" in card
    assert ". A vector has 16 numbers: 64 bytes in float32." in card
    assert "- late-interaction" in card
    assert "do not serve it" in card
    assert json.loads((folder / "config.json").read_text())["matryoshka_dimensions"] == [8, 16]
    served: Any = Served(str(folder))
    assert served.similarity_fn_name == similarity
    positives = [row["positive"] for row in written]
    inputs = {
        str(number): one if isinstance(one, str) else {**one, "image": str(here / one["image"])}
        for number, one in enumerate(positives)
    }
    ranked = MultiVectorInformationRetrievalEvaluator(
        {key: row["query"] for key, row in zip(inputs, written, strict=True)},
        inputs,
        {key: {key} for key in inputs},
        show_progress_bar=False,
    )(served)
    (ndcg,) = [value for name, value in ranked.items() if name.endswith("ndcg@10")]
    assert ndcg == pytest.approx(measured, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "pooling", "message"),
    [
        ({"truncate_dim": 25}, TokenProjection(24), "truncate_dim=25 is not between 1 and the vectors' 24"),
        ({"merging_factor": 0}, TokenProjection(24), "merging_factor=0 is 1 or more"),
        ({"reranker_scoring": "logits"}, TokenProjection(24), "reranker_scoring=logits is for rerankers"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_training(
    options: dict[str, Any], pooling: TokenProjection, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SentenceTransformers(**options).check(pooling)
