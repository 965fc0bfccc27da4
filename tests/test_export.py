from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from building import encoder, module
from other_models import idefics3, qwen2_5_vl, qwen3_vl_moe
from peft import LoraConfig
from safetensors import safe_open
from sentence_transformers import SentenceTransformer

from vlmembed.adapters import LoRA
from vlmembed.backbones import Qwen3VL, VisionLanguageModel
from vlmembed.encoder import Encoder
from vlmembed.export import ExportError, Run, SentenceTransformers
from vlmembed.export.embeddings import EmbeddingVerification, encode_probes, verify
from vlmembed.export.poolings import is_stock
from vlmembed.export.probes import make_probes
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.export.verify import TOLERANCE
from vlmembed.losses import InfoNCE, Matryoshka
from vlmembed.pooling import Concatenation, FirstToken, LastToken, Max, Mean, MeanSqrtLength, Pooling, WeightedMean

POOLINGS = [
    FirstToken(),
    LastToken(),
    Max(),
    Mean(),
    MeanSqrtLength(),
    WeightedMean(),
    Concatenation([WeightedMean(), LastToken(), MeanSqrtLength()]),
]


def lora() -> LoRA:
    """With random weights: an adapter that does nothing yet could be dropped unnoticed."""
    return LoRA(LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj", "qkv"], init_lora_weights=False))


def cases() -> Iterator[Any]:
    """Every pooling; in short, those within the concatenation not alone too, and LoRA, merged before pooling, once."""
    short = {"FirstToken-full", "LastToken-full", "LastToken-LoRA", "Max-full", "Mean-full", "Concatenation-full"}
    for pooling in POOLINGS:
        for adapted in (False, True):
            name = f"{type(pooling).__name__}-{'LoRA' if adapted else 'full'}"
            yield pytest.param(pooling, adapted, id=name, marks=[] if name in short else [pytest.mark.exhaustive])


@pytest.mark.parametrize(("pooling", "adapted"), cases())
def test_every_pooling_is_served_as_trained(checkpoint: Path, tmp_path: Path, pooling: Pooling, adapted: bool) -> None:
    """Opened by Sentence Transformers in a process that cannot import vlmembed."""
    torch.manual_seed(0)
    loss = Matryoshka(InfoNCE(), [64, 48, 16])
    trained = module(checkpoint, loss, pooling=pooling, adapters=[lora()] if adapted else [])
    verification = SentenceTransformers().export(trained.encoder, tmp_path / "export", Run(dimensions=loss.dimensions))
    assert verification.difference < TOLERANCE
    assert verification.dimensions == tuple(sorted({trained.encoder.dimension, 64, 48, 16}, reverse=True))
    assert verification.comparisons == len(verification.dimensions) * 2 * 2 * 2 * 7  # roles, sides, batches, probes


@pytest.mark.parametrize(
    ("build", "backbone"),
    [(qwen2_5_vl, VisionLanguageModel), (idefics3, VisionLanguageModel), (qwen3_vl_moe, Qwen3VL)],
    ids=lambda value: value.__name__,
)
def test_other_models(tmp_path: Path, build: Callable[[Path], Path], backbone: type[VisionLanguageModel]) -> None:
    trained = Encoder(backbone(str(build(tmp_path / "fresh"))), LastToken())
    trained.configure()
    assert SentenceTransformers().export(trained, tmp_path / "export", Run()).difference < TOLERANCE


def test_a_verified_export(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained = module(checkpoint, adapters=[lora()], backbone={"max_length": 300, "bidirectional": True}).encoder
    folder = tmp_path / "export"
    config = {
        "model": {"init_args": {"loss": {"class_path": "vlmembed.losses.InfoNCE", "init_args": {"temperature": 1}}}}
    }
    run = Run("digits", None, [64, 32], {"test/ndcg@10": 0.5}, config)
    verification = SentenceTransformers().export(trained, folder, run)
    assert verification.passed
    assert verification.difference < TOLERANCE
    assert verification.dimensions == (64, 32)
    assert verification.comparisons == 2 * 2 * 2 * 2 * 7  # roles, dimensions, sides, batch sizes, probes
    card = (folder / "README.md").read_text()
    assert "InfoNCE" in card
    assert "largest difference" in card
    assert not list(tmp_path.glob("*.unverified"))
    assert "encode_query" in capfd.readouterr().out


def test_the_files(checkpoint: Path, tmp_path: Path) -> None:
    options = {"query_instruction": "Find it.", "document_instruction": None, "max_pixels": 9216, "max_length": 99}
    write_folder(encoder(checkpoint, **options, bidirectional=True), tmp_path)

    def read(name: str) -> dict:
        return json.loads((tmp_path / name).read_text())

    prompts = read("config_sentence_transformers.json")["prompts"]
    assert prompts == {"query": "Find it.", "document": ""}
    assert read("processor_config.json")["image_processor"]["size"]["longest_edge"] == 9216
    assert read("config.json")["text_config"]["is_causal"] is False
    assert read("tokenizer_config.json")["model_max_length"] == 99
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        assert names == set(weights.keys())


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_the_checkpoints(tmp_path: Path, tied: bool) -> None:
    from vlmembed.backbones import tiny

    fresh, folder = tmp_path / "fresh", tmp_path / "export"
    tiny.create(fresh, hidden_size=64, layers=2, heads=2, vision_hidden_size=32, tie_word_embeddings=tied)
    folder.mkdir()
    write_folder(encoder(fresh), folder)
    with safe_open(fresh / "model.safetensors", "pt") as before, safe_open(folder / "model.safetensors", "pt") as after:
        # Where the output layer has weights of its own, an embedding model leaves them behind.
        assert set(before.keys()) - set(after.keys()) == (set() if tied else {"lm_head.weight"})
        assert all(torch.equal(before.get_tensor(name), after.get_tensor(name)) for name in after.keys())  # noqa: SIM118


def test_truncated_export_is_normalised(checkpoint: Path, tmp_path: Path) -> None:
    trained = encoder(checkpoint)
    folder = tmp_path / "export"
    verification = SentenceTransformers(truncate_dim=24).export(trained, folder, Run(dimensions=[64, 32, 16]))
    assert verification.dimensions == (24, 16)
    found = SentenceTransformer(str(folder), device="cpu").encode(["a", "b"])
    assert found.shape == (2, 24)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_bfloat16(checkpoint: Path, tmp_path: Path) -> None:
    trained = encoder(checkpoint, dtype="bfloat16")
    verification = SentenceTransformers().export(trained, tmp_path / "export", Run())
    assert verification.dtype == "bfloat16"
    assert verification.cosine >= 0.999


def test_an_export_that_differs_fails_and_names_the_worst(checkpoint: Path, tmp_path: Path) -> None:
    """The pooling changes between training and writing, as a bug in the writer would."""
    trained = encoder(checkpoint, LastToken())
    probes = make_probes(tmp_path)
    expected = encode_probes(trained, probes)
    expected["document"][1] += 0.01
    folder = tmp_path / "export"
    folder.mkdir()
    write_folder(trained, folder)
    verification = verify(folder, probes, expected, [64], "cpu", "float32", tmp_path)
    assert not verification.passed
    assert verification.worst.startswith("'image' as document")


def test_a_failed_verification_leaves_no_export(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worst = "'image' as query, 64 dimensions, batch of 1, padded left"
    failed = EmbeddingVerification(1, ("image",), worst, 0.1, "float32", (64,), 0.5)
    monkeypatch.setattr("vlmembed.export.forms.verify", lambda *_: failed)
    with pytest.raises(ExportError, match="'image' as query"):
        SentenceTransformers().export(encoder(checkpoint), tmp_path / "export", Run())
    assert not (tmp_path / "export").exists()
    assert (tmp_path / "export.unverified" / "modules.json").exists()


@pytest.mark.parametrize(("difference", "dtype", "passed"), [(1e-6, "float32", True), (float("nan"), "float32", False)])
def test_not_a_number_never_passes(difference: float, dtype: str, passed: bool) -> None:
    assert EmbeddingVerification(1, ("text",), "text", difference, dtype, (64,), difference).passed is passed
    assert not EmbeddingVerification(1, ("text",), "text", float("nan"), "bfloat16", (64,), float("nan")).passed


def test_a_used_folder_is_refused_and_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        SentenceTransformers().export(encoder(checkpoint), tmp_path, Run())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


class Own(LastToken):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return super().forward(*args) * 2


def test_a_subclass_is_not_taken_for_the_pooling_that_it_extends() -> None:
    assert is_stock(LastToken())
    assert not is_stock(Own())


def test_truncation_beyond_the_embedding_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="truncate_dim=65 is not between 1 and the embedding's 64"):
        SentenceTransformers(truncate_dim=65).export(encoder(checkpoint), tmp_path / "export", Run())


def test_encoding_probes_turns_dropout_off(checkpoint: Path, tmp_path: Path) -> None:
    trained: Encoder = encoder(checkpoint)
    trained.pooling = _Dropped()  # type: ignore[assignment]
    probes = make_probes(tmp_path)[:1]
    assert torch.equal(encode_probes(trained, probes)["query"], encode_probes(trained, probes)["query"])


class _Dropped(LastToken):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(super().forward(*args), 0.5, self.training)
