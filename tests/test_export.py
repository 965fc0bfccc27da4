"""Embedders are served as they were trained: by modules of Sentence Transformers, or by code that a folder brings."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from building import encoder
from other_models import idefics3, qwen2_5_vl, qwen3_vl_moe
from peft import LoraConfig
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers.utils.logging import is_progress_bar_enabled

from vlmembed import pooling as zoo
from vlmembed.adapters import LoRA
from vlmembed.backbones import Qwen3VL, VisionLanguageModel, tiny
from vlmembed.encoder import Encoder
from vlmembed.export import ExportError, ModelInfo, SentenceTransformers, Verification
from vlmembed.export.modules import check_servable, is_stock, standalone_code
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.export.verify import TOLERANCE, Check, brings_code, expect, verify
from vlmembed.pooling import (
    Attention,
    Concatenation,
    EarlierLayer,
    EndToken,
    FirstToken,
    LastToken,
    LatentAttention,
    LayerMix,
    LearnedTokens,
    Max,
    Mean,
    MeanOfImages,
    MeanOfLast,
    MeanOfText,
    MeanSqrtLength,
    MeanWithoutInstruction,
    Pooling,
    Projection,
    WeightedMean,
)
from vlmembed.types import Role

ROLES: tuple[Role, Role] = ("query", "document")


@dataclass(frozen=True)
class Case:
    """What makes a pooling, whether modules of Sentence Transformers serve it, and what else is exported."""

    build: Callable[[], Pooling]
    stock: bool = True
    lora: bool = False
    truncate_dim: int | None = None
    dtype: str = "float32"


def own_pooling() -> Pooling:
    return importlib.import_module("shifted_pooling").Shifted(MeanOfText(), 0.5)


CASES = {
    "first": Case(FirstToken),
    "last": Case(LastToken),
    "last, LoRA": Case(LastToken, lora=True),
    "last, truncated": Case(LastToken, truncate_dim=24),
    "last, bfloat16": Case(LastToken, dtype="bfloat16"),
    "max": Case(Max),
    "mean": Case(Mean),
    "mean of √length": Case(MeanSqrtLength),
    "weighted mean": Case(WeightedMean),
    "concatenation": Case(lambda: Concatenation([WeightedMean(), LastToken(), MeanSqrtLength()])),
    "end token": Case(EndToken),
    "one learned token": Case(lambda: LearnedTokens(1)),
    "earlier layer": Case(lambda: EarlierLayer(Concatenation([Mean(), LastToken()]))),
    "layer mix": Case(lambda: LayerMix(WeightedMean(), 2)),
    "linear projection": Case(lambda: Projection(EndToken(), 24)),
    "MLP, LoRA": Case(lambda: Projection(LayerMix(Max(), 2), 24, 48), lora=True),
    "mean of the last": Case(MeanOfLast, False),
    "images": Case(MeanOfImages, False),
    "text": Case(MeanOfText, False),
    "without instruction": Case(MeanWithoutInstruction, False),
    "learned tokens, mean": Case(lambda: LearnedTokens(3), False),
    "learned tokens, concatenated, LoRA": Case(lambda: LearnedTokens(2, "concatenation"), False, lora=True),
    "attention": Case(lambda: EarlierLayer(Attention(2)), False),
    "latent attention": Case(lambda: LatentAttention(16, 4), False),
    "many": Case(lambda: Projection(LayerMix(Concatenation([Attention(), MeanOfText(), Mean()]), 2), 24), False),
    "own": Case(own_pooling, False),
}

OWN = """
from torch import Tensor

from vlmembed.pooling import (
    Mean,
    Pooling,
)


class Shifted(Pooling):
    def __init__(self, pooling: Pooling, shift: float = 1.0) -> None:
        super().__init__()
        self.pooling = pooling
        self.shift = shift

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        from vlmembed.pooling.base import weighted_mean
        return moved(self.pooling(hidden, mask, input_ids), self.shift) + 0 * weighted_mean(hidden, mask)


def moved(values: Tensor, shift: float) -> Tensor:
    return values + SIGN * shift


SIGN = -1


class Forgetful(Shifted):
    def __init__(self, pooling: Pooling, size: int) -> None:
        super().__init__(pooling)


class Drifting(Mean):
    drift = 0.0

    def forward(self, *inputs: Tensor) -> Tensor:
        pooled = super().forward(*inputs)
        pooled[:, 0] += self.drift
        return pooled
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """A user's own file of poolings."""
    return write_module(tmp_path_factory.mktemp("own"), "shifted_pooling", OWN)


def write_module(folder: Path, name: str, text: str) -> ModuleType:
    (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return importlib.import_module(name)


def trained(checkpoint: Path, case: Case) -> Encoder:
    """With random weights: those that start at zero, as an adapter's do, would hide that they were left behind."""
    torch.manual_seed(0)
    built = encoder(checkpoint, case.build(), query_instruction="Find it.", dtype=case.dtype)
    for weight in built.pooling.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    if case.lora:
        modules = ["q_proj", "down_proj", "qkv"]
        LoRA(LoraConfig(r=4, lora_alpha=16, target_modules=modules, init_lora_weights=False)).apply(built.backbone)
    return built


Exports = dict[str, tuple[Path, Verification]]


def exported(
    checkpoint: Path, root: Path, cases: dict[str, Case], left_out: tuple[str, ...] = (), **options: Any
) -> Exports:
    """Write every case, and open all of them in one process that cannot import vlmembed."""
    checks = {}
    for name, case in cases.items():
        built, folder = trained(checkpoint, case), root / name.replace(" ", "_")
        folder.mkdir()
        checks[folder] = without(expect(built, root, [case.truncate_dim or built.dimension, 16]), left_out)
        write_folder(built, folder, case.truncate_dim)
    return dict(zip(cases, zip(checks, verify(checks, **options), strict=True), strict=True))


def without(check: Check, left_out: tuple[str, ...]) -> Check:
    rows = [row for row, name in enumerate(check.names) if name not in left_out]
    names, inputs = tuple(check.names[row] for row in rows), [check.inputs[row] for row in rows]
    expected = {role: results[rows] for role, results in check.expected.items()}
    return replace(check, names=names, inputs=inputs, expected=expected)


@pytest.fixture(scope="module")
def exports(checkpoint: Path, own: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return exported(checkpoint, tmp_path_factory.mktemp("exports"), CASES)


@pytest.mark.parametrize("name", CASES)
def test_is_served_as_trained(exports: Exports, name: str) -> None:
    """In both roles, padded on both sides, alone and in a batch, in full and truncated."""
    (folder, verification), case = exports[name], CASES[name]
    assert verification.passed
    assert verification.dtype == case.dtype
    assert verification.tolerance == TOLERANCE or case.dtype == "bfloat16"
    assert verification.comparisons == 2 * 2 * 2 * 2 * 10  # roles, sides, batches, dimensions, probes
    assert [path.name for path in folder.glob("*.py")] == ([] if case.stock else ["served_pooling.py"])
    files = [path for path in folder.rglob("*") if path.is_file()]
    umask = os.umask(0o022)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_all_poolings_are_exported() -> None:
    parts = {type(part) for name, case in CASES.items() if name != "own" for part in case.build().modules()}
    abstract = {zoo.Pooling, zoo.PoolingWrapper, zoo.TokenWeights}
    every = {value for value in vars(zoo).values() if isinstance(value, type) and issubclass(value, Pooling)}
    assert every - abstract <= parts


def test_says_before_training_which_of_the_two_it_will_be(own: ModuleType) -> None:
    for case in CASES.values():
        check_servable(case.build())
        assert is_stock(case.build()) is case.stock
    # A subclass is not taken for what it extends.
    assert not is_stock(own.Drifting())


@pytest.mark.slow
def test_the_lowest_release_that_is_claimed_opens_every_folder(
    checkpoint: Path, own: ModuleType, tmp_path: Path
) -> None:
    python = os.environ.get("VLMEMBED_OLDEST_PYTHON")
    if not python:
        pytest.skip("VLMEMBED_OLDEST_PYTHON names no interpreter with Sentence Transformers 5.4 and transformers 5.4")
    left_out = ("two images and text", "video")  # Which releases before 6.0 do not take as lists.
    later = set()
    for name, (folder, verification) in exported(checkpoint, tmp_path, CASES, left_out, python=python).items():
        claimed = read(folder / "config_sentence_transformers.json")["requirements"]["sentence_transformers"] == ">=5.4"
        assert verification.passed is claimed, f"{name}: {verification}"
        later |= set() if claimed else {name}
    # Wrong there where padding is on the left.
    assert later == {"first", "weighted mean", "concatenation", "layer mix"}


@pytest.mark.parametrize("name", ["own", "many", "layer mix"])
def test_a_folder_can_be_copied_and_saved_anew(exports: Exports, tmp_path: Path, name: str) -> None:
    """Saved by Sentence Transformers itself, which leaves out the code where a module does not write it."""
    shutil.copytree(exports[name][0], tmp_path / "copied to")
    copied = SentenceTransformer(str(tmp_path / "copied to"), device="cpu", trust_remote_code=True)
    expected = copied.encode_query(["some words", "and some more of them"])
    copied.save_pretrained(str(tmp_path / "saved"))
    shutil.rmtree(tmp_path / "copied to")
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert np.array_equal(saved.encode_query(["some words", "and some more of them"]), expected)
    assert brings_code(tmp_path / "saved") is (name != "layer mix")


def test_other_models(tmp_path: Path) -> None:
    checks = {}
    builders = ((qwen2_5_vl, VisionLanguageModel), (idefics3, VisionLanguageModel), (qwen3_vl_moe, Qwen3VL))
    for build, backbone in builders:
        built, folder = (
            Encoder(backbone(str(build(tmp_path / build.__name__))), LastToken()),
            tmp_path / f"{build.__name__} export",
        )
        built.configure()
        folder.mkdir()
        checks[folder] = expect(built, tmp_path, [built.dimension])
        write_folder(built, folder)
    for verification in verify(checks):
        assert verification.difference < TOLERANCE


def test_the_exporter(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "export.unverified" / "left by a killed export").mkdir(parents=True)
    built = trained(checkpoint, Case(lambda: Attention(2), False, lora=True))
    loss = {"class_path": "vlmembed.losses.InfoNCE", "init_args": {"temperature": 1}}
    info = ModelInfo("digits", None, [64, 32], {"test/ndcg@10": 0.5}, {"model": {"init_args": {"loss": loss}}})
    capfd.readouterr()
    verification = SentenceTransformers().export(built, tmp_path / "export", info)
    assert verification.passed
    assert verification.dimensions == (128, 64, 32)
    card = (tmp_path / "export" / "README.md").read_text()
    assert all(text in card for text in ("InfoNCE(temperature=1)", "largest difference", "trust_remote_code=True"))
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["is_matryoshka"], config["matryoshka_dimensions"]) == (True, [32, 64, 128])
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    printed, noise = capfd.readouterr()
    assert all(text in printed for text in ("encode_query", "is opened with trust_remote_code=True", "was killed"))
    assert not any(text in noise for text in ("model shards", "Loading weights", "no video metadata"))
    assert is_progress_bar_enabled()


def test_a_difference_fails_and_leaves_no_export(checkpoint: Path, own: ModuleType, tmp_path: Path) -> None:
    """The pooling computes something that its class and arguments do not say."""
    pooling = own.Drifting()
    pooling.drift = 0.1
    with pytest.raises(ExportError, match=r"does not serve what was trained\. .*worst '.*' as .*, 64 dimensions"):
        SentenceTransformers().export(encoder(checkpoint, pooling), tmp_path / "export", ModelInfo())
    assert not (tmp_path / "export").exists()
    assert (tmp_path / "export.unverified" / "modules.json").exists()


def test_the_worst_difference_is_named(checkpoint: Path, tmp_path: Path) -> None:
    check = expect(encoder(checkpoint), tmp_path, [64, 8])
    unit = {role: torch.nn.functional.normalize(rows, dim=-1) for role, rows in check.expected.items()}
    wrong = unit["document"].clone()
    wrong[1, 0] += 2e-5
    verification = check.compare({"query/64/alone": unit["query"], "document/64/alone": wrong})
    assert (verification.passed, verification.worst) == (False, "'image' as document, 64 dimensions, alone")
    assert verification.difference == pytest.approx(2e-5, rel=1e-2)  # To the rounding of the sum.
    wrong[2] = torch.nan
    verification = check.compare({"query/64/alone": unit["query"], "document/64/alone": wrong})
    assert (verification.passed, verification.worst) == (False, "'image and text' as document, 64 dimensions, alone")


@pytest.mark.parametrize(
    ("difference", "cosine", "tolerance", "passed"),
    [(0.9e-5, 1.0, 1e-5, True), (1.1e-5, 1.0, 1e-5, False), (0.04, 0.9995, 0.045, True), (0.04, 0.998, 0.045, False)],
)
def test_what_passes(difference: float, cosine: float, tolerance: float, passed: bool) -> None:
    verification = Verification(1, ("text",), 0, "text", difference, tolerance, "", (64,), cosine)
    assert verification.passed is passed
    assert not replace(verification, difference=float("nan")).passed
    assert not replace(verification, cosine=float("nan")).passed


def test_inputs_too_long_for_the_model_are_left_out(checkpoint: Path, tmp_path: Path) -> None:
    whole = expect(encoder(checkpoint), tmp_path, [64])
    check = expect(encoder(checkpoint, max_length=48), tmp_path, [64])
    # A text is cut, and what has images is not.
    assert check.names == tuple(name for name in lengths if lengths[name] <= 48 or name == "long text")
    assert check.left_out == len(lengths) - len(check.names) > 0
    unit = {f"{role}/64/alone": torch.nn.functional.normalize(rows) for role, rows in check.expected.items()}
    assert f"{check.left_out} kinds of input are too long for the model" in str(check.compare(unit))


def test_computing_what_is_expected_turns_dropout_off(checkpoint: Path, tmp_path: Path) -> None:
    class Dropped(LastToken):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(*args), 0.5, self.training)

    built = encoder(checkpoint, Dropped())
    once, twice = (expect(built, tmp_path, [64]).expected["query"] for _ in range(2))
    assert torch.equal(once, twice)


# The files


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_files(checkpoint: Path, tmp_path: Path) -> None:
    options = {"query_instruction": "Find it.", "document_instruction": None, "max_pixels": 9216, "max_length": 99}
    write_folder(encoder(checkpoint, **options, bidirectional=True), tmp_path)
    config = read(tmp_path / "config_sentence_transformers.json")
    assert config["prompts"] == {"query": "Find it.", "document": ""}
    assert config["requirements"]["sentence_transformers"] == ">=5.4"
    assert read(tmp_path / "processor_config.json")["image_processor"]["size"]["longest_edge"] == 9216
    assert read(tmp_path / "config.json")["text_config"]["is_causal"] is False
    assert "is_matryoshka" not in read(tmp_path / "config.json")
    assert read(tmp_path / "tokenizer_config.json")["model_max_length"] == 99


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_the_checkpoints(tmp_path: Path, tied: bool) -> None:
    fresh, folder = tmp_path / "fresh", tmp_path / "export"
    tiny.create(fresh, hidden_size=64, layers=2, heads=2, vision_hidden_size=32, tie_word_embeddings=tied)
    folder.mkdir()
    write_folder(encoder(fresh), folder)
    with safe_open(fresh / "model.safetensors", "pt") as before, safe_open(folder / "model.safetensors", "pt") as after:
        # Where the output layer has weights of its own, an embedding model leaves them behind.
        assert set(before.keys()) - set(after.keys()) == (set() if tied else {"lm_head.weight"})
        assert all(torch.equal(before.get_tensor(name), after.get_tensor(name)) for name in after.keys())  # noqa: SIM118


def test_learned_tokens_are_in_the_vocabulary(exports: Exports, checkpoint: Path) -> None:
    folder, _ = exports["one learned token"]
    fresh = read(checkpoint / "config.json")["text_config"]["vocab_size"]
    assert read(folder / "config.json")["text_config"]["vocab_size"] == fresh + 1
    assert (folder / "chat_template.jinja").read_text().endswith("<|read_out_0|>")


def test_a_truncated_export_is_normalised(exports: Exports) -> None:
    embeddings = SentenceTransformer(str(exports["last, truncated"][0]), device="cpu").encode(["a", "b"])
    assert embeddings.shape == (2, 24)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


def test_a_used_folder_is_refused_and_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        SentenceTransformers().export(encoder(checkpoint), tmp_path, ModelInfo())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_truncation_beyond_the_embedding_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="truncate_dim=65 is not between 1 and the embedding's 64"):
        write_folder(encoder(checkpoint), tmp_path, truncate_dim=65)


# The code


def test_a_users_file_is_copied_whole_and_imports_nothing_of_ours(own: ModuleType) -> None:
    code = standalone_code(own_pooling())
    assert all(part in code for part in ("SIGN = -1", "class Forgetful", "class LatentAttention"))
    assert "import jaxtyping" not in code
    assert not any(line.strip().startswith(("from vlmembed", "import vlmembed")) for line in code.splitlines())
    compile(code, "served_pooling.py", "exec")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda own: own.Forgetful(Mean(), 3), "Forgetful cannot be exported: .* 'size' as self.size"),
        (lambda own: own.Shifted(Mean(), {}), "shift cannot be exported: it is a dict"),
        (lambda own: type("Made", (Mean,), {"__module__": "nowhere"})(), "Made .* module nowhere is no file"),
        (lambda own: type("Made", (Mean,), {"__module__": "__main__"})(), "Made .* module __main__ is no file"),
    ],
)
def test_what_cannot_be_written_down_is_refused_before_training(
    own: ModuleType, build: Callable[[ModuleType], Pooling], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SentenceTransformers().check(build(own))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from vlmembed.types import Item", "needs `from vlmembed.types import Item`.* file of its own"),
        ("import vlmembed.losses", "needs `import vlmembed.losses`"),
        ("from vlmembed.pooling import Max as Largest", "without renaming"),
        ("from .shifted_pooling import moved", r"needs `from \.shifted_pooling import moved`"),
        ("class Max: ...", "Max is something else in vlmembed.pooling.tokens than in refused"),
        ("def weighted_mean(): ...", "weighted_mean is something else .*Rename one"),
    ],
)
def test_a_file_that_could_not_stand_alone_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    late = f"def late():\n    {line}\n" if "import" in line else f"{line}\n"
    monkeypatch.delitem(sys.modules, "refused", raising=False)
    module = write_module(tmp_path, "refused", f"from vlmembed.pooling import Mean\nclass Own(Mean): ...\n{late}")
    with pytest.raises(ValueError, match=f"cannot be exported: .*{message}"):
        SentenceTransformers().check(module.Own())
