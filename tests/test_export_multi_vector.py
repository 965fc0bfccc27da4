"""Multi-vector models are served as they were trained, by Sentence Transformers' MultiVectorEncoder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from building import jsonl, picture, run_config
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder as Served
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator

from vlmembed.adapters import LoRA
from vlmembed.backbones import Qwen3VL
from vlmembed.cli import main
from vlmembed.encoder import MultiVectorEncoder
from vlmembed.export import SentenceTransformers, Verification
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.export.verify import Check, brings_code, expect, verify
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


@pytest.fixture(scope="module")
def exports(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Every case, opened in one process that cannot import vlmembed."""
    root = tmp_path_factory.mktemp("exports")
    checks = {}
    for name, case in CASES.items():
        built, folder = trained(checkpoint, case), root / name.replace(" ", "_")
        folder.mkdir()
        prompts = {"pages-query": "Find the page."} if name == "linear" else {}
        size = [case.truncate_dim or built.dimension]
        checks[folder] = expect(built, root, size, prompts=prompts, merging_factor=case.merging_factor)
        write_folder(built, folder, case.truncate_dim, prompts=prompts, merging_factor=case.merging_factor)
    return dict(zip(CASES, zip(checks, verify(checks), strict=True), strict=True))


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


def broken(exports: Exports, tmp_path: Path, name: str) -> tuple[Path, Check]:
    folder, verification = exports[name]
    copy = tmp_path / "broken"
    copy.mkdir()
    for path in folder.rglob("*"):
        target = copy / path.relative_to(folder)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    return copy, verification.check


def test_folders_that_serve_something_else_are_noticed(exports: Exports, tmp_path: Path) -> None:
    """A weight of the projection that is off, a mask that keeps tokens that it should not, merged vectors too short."""
    checks = {}
    changed = {"linear": "1_Dense", "images, words skipped": "2_MultiVectorMask", MERGED: "6_HierarchicalTokenPooling"}
    for name, module in changed.items():
        (tmp_path / name).mkdir()
        folder, check = broken(exports, tmp_path / name, name)
        if module == "1_Dense":
            path = folder / module / "model.safetensors"
            weights = load_file(path)
            weights["linear.weight"][0, 0] += 0.01
            save_file(weights, path)
        elif module == "2_MultiVectorMask":
            (folder / module / "config.json").write_text('{"skiplist_words": []}')
        else:
            (folder / module / "config.json").write_text('{"pool_factor": 3, "num_protected_tokens": 0}')
        checks[folder] = check
    assert not any(verification.passed for verification in verify(checks))


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
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    similarity: str,
) -> None:
    """From the command line: a short run, and an export of its checkpoint, which their own evaluator measures."""
    monkeypatch.chdir(tmp_path)
    written = rows(tmp_path)
    config = run_config(checkpoint, train=jsonl("t.jsonl", written), val=jsonl("v.jsonl", written), batch_size=4)
    model = config["model"]
    model["class_path"] = "vlmembed.modules.MultiVectorModule"
    arguments = {name: value for name, value in model["init_args"].items() if name != "pooling"}
    projection = {"class_path": "vlmembed.pooling.TokenProjection", "init_args": {"size": 16}}
    model["init_args"] = {**arguments, "projection": projection, "similarity": similarity}
    loss = {"loss": {"class_path": "vlmembed.losses.InfoNCE"}, "dimensions": [8]}
    model["init_args"]["loss"] = {"class_path": "vlmembed.losses.Matryoshka", "init_args": loss}
    config["trainer"] |= {"max_steps": 2, "default_root_dir": str(tmp_path)}
    Path("run.yaml").write_text(json.dumps(config))
    main(["fit", "--config", "run.yaml", "--trainer.exporter=null"])
    (saved,) = tmp_path.rglob("*.ckpt")
    main(["export", "--config", "run.yaml", "--ckpt_path", str(saved), "--model.two_stage=3"])
    assert (
        "configured as when the checkpoint was trained:\n  model.init_args.two_stage: None → 3\n"
        in capsys.readouterr().out
    )
    (metrics,) = tmp_path.rglob("metrics.csv")
    measured = pandas.read_csv(metrics)["val/ndcg@10"].dropna().iloc[-1]
    (folder,) = tmp_path.rglob("export")
    card = (folder / "README.md").read_text()
    assert "MultiVectorEncoder(" in card
    assert ". A vector has 16 numbers: 64 bytes in float32." in card
    assert "- late-interaction" in card
    assert "do not serve it" in card
    assert json.loads((folder / "config.json").read_text())["matryoshka_dimensions"] == [8, 16]
    served: Any = Served(str(folder))
    assert served.similarity_fn_name == similarity
    inputs = {str(number): as_input(row["positive"], tmp_path) for number, row in enumerate(written)}
    ranked = MultiVectorInformationRetrievalEvaluator(
        {key: row["query"] for key, row in zip(inputs, written, strict=True)},
        inputs,
        {key: {key} for key in inputs},
        show_progress_bar=False,
    )(served)
    (ndcg,) = [value for name, value in ranked.items() if name.endswith("ndcg@10")]
    assert ndcg == pytest.approx(measured, abs=1e-4)


def as_input(cell: Any, folder: Path) -> Any:
    return cell if isinstance(cell, str) else {**cell, "image": str(folder / cell["image"])}


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
