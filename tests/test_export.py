"""Embedders are served as they were trained: by modules of Sentence Transformers, or by code that a folder brings."""

from __future__ import annotations

import importlib
import json
import os
import resource
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
from building import encoder, export, picture
from other_models import idefics3, qwen2_5_vl, qwen3_vl_moe
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from torch.nn.functional import dropout, normalize
from transformers.utils.logging import is_progress_bar_enabled

from vlmembed import pooling as zoo
from vlmembed.adapters import LoRA
from vlmembed.backbones import Qwen3VL, VisionLanguageModel, tiny
from vlmembed.encoder import Encoder
from vlmembed.export import ExportError, ModelInfo, SentenceTransformers, Verification
from vlmembed.export.modules import check_servable, is_stock, standalone_code
from vlmembed.export.sentence_transformers import SERVED_SINCE
from vlmembed.export.verify import TOLERANCE, Check, as_input, brings_code, expect, verify
from vlmembed.files import read_json
from vlmembed.media import load_image
from vlmembed.pooling import Pooling
from vlmembed.types import Item, Part


@dataclass(frozen=True)
class Case:
    """What makes a pooling, whether modules of Sentence Transformers serve it, and what else is exported."""

    build: Callable[[], Pooling]
    stock: bool = True
    lora: bool = False
    truncate_dim: int | None = None
    dtype: str = "float32"
    max_length: int | None = 256  # Shorter than the long text, whose attention would take most of the time.
    also: tuple[int, ...] = ()  # Dimensions to compare beside the full one.


def own_pooling() -> Pooling:
    return importlib.import_module("shifted_pooling").Shifted(zoo.MeanOfText(), 0.5)


CASES = {
    "first": Case(zoo.FirstToken),
    "last": Case(zoo.LastToken, max_length=None),
    "last, LoRA": Case(zoo.LastToken, lora=True, also=(16,)),
    "last, truncated": Case(zoo.LastToken, truncate_dim=24, also=(16,)),
    "last, bfloat16": Case(zoo.LastToken, dtype="bfloat16"),
    "max": Case(zoo.Max),
    "mean": Case(zoo.Mean),
    "mean of √length": Case(zoo.MeanSqrtLength),
    "weighted mean": Case(zoo.WeightedMean),
    "concatenation": Case(lambda: zoo.Concatenation([zoo.WeightedMean(), zoo.LastToken(), zoo.MeanSqrtLength()])),
    "end token": Case(zoo.EndToken),
    "one learned token": Case(lambda: zoo.LearnedTokens(1)),
    "earlier layer": Case(lambda: zoo.EarlierLayer(zoo.Concatenation([zoo.Mean(), zoo.LastToken()]))),
    "layer mix": Case(lambda: zoo.LayerMix(zoo.WeightedMean(), 2)),
    "linear projection": Case(lambda: zoo.Projection(zoo.EndToken(), 24)),
    "MLP, LoRA": Case(lambda: zoo.Projection(zoo.LayerMix(zoo.Max(), 2), 24, 48), lora=True),
    "mean of the last": Case(zoo.MeanOfLast, False),
    "images": Case(zoo.MeanOfImages, False),
    "text": Case(zoo.MeanOfText, False),
    "without instruction": Case(zoo.MeanWithoutInstruction, False),
    "learned tokens, mean": Case(lambda: zoo.LearnedTokens(3), False),
    "learned tokens, concatenated, LoRA": Case(lambda: zoo.LearnedTokens(2, "concatenation"), False, lora=True),
    "attention": Case(lambda: zoo.EarlierLayer(zoo.Attention(2)), False),
    "latent attention": Case(lambda: zoo.LatentAttention(16, 4), False),
    "many": Case(
        lambda: zoo.Projection(zoo.LayerMix(zoo.Concatenation([zoo.Attention(), zoo.MeanOfText(), zoo.Mean()]), 2), 24),
        False,
    ),
    "own": Case(own_pooling, False, also=(16,)),
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
    options = {"query_instruction": "Find it.", "dtype": case.dtype, "max_length": case.max_length}
    built = encoder(checkpoint, case.build(), **options)
    for weight in built.pooling.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    if case.lora:
        modules = ["q_proj", "down_proj", "qkv"]
        LoRA(LoraConfig(r=4, lora_alpha=16, target_modules=modules, init_lora_weights=False)).apply(built.backbone)
    return built


Exports = dict[str, tuple[Path, Verification]]


def exported(
    checkpoint: Path,
    root: Path,
    left_out: tuple[str, ...] = (),
    cases: dict[str, Case] = CASES,
    others: dict[str, Encoder] | None = None,
    **options: Any,
) -> Exports:
    """Write every case and other encoders, and open all of them in one process that cannot import vlmembed."""
    checks, others = {}, others or {}
    for name, case in cases.items():
        built = trained(checkpoint, case)
        omitted = (*left_out, "long text") if left_out and not case.max_length else left_out
        check = expect(built, root, [case.truncate_dim or built.dimension, *case.also])
        checks[export(built, root / name.replace(" ", "_"), case.truncate_dim)] = without(check, omitted)
    for name, built in others.items():
        check = expect(built, root, [built.dimension])
        checks[export(built, root / name)] = check
    return dict(zip([*cases, *others], zip(checks, verify(checks, **options), strict=True), strict=True))


def others(checkpoint: Path, root: Path) -> dict[str, Encoder]:
    """Of other families; with room for few tokens; with a template that takes one image only."""
    kinds = {qwen2_5_vl: VisionLanguageModel, idefics3: VisionLanguageModel, qwen3_vl_moe: Qwen3VL}
    built = {
        write.__name__: encoder(write(root / "fresh" / write.__name__), kind=kind, max_length=256)
        for write, kind in kinds.items()
    }
    built |= {f"{length} tokens": encoder(checkpoint, max_length=length) for length in (48, 20)}
    fresh, loop = shutil.copytree(checkpoint, root / "fresh" / "one image"), "{%- for message in messages -%}"
    refusal = "{%- if message.content | length > 2 %}{{ raise_exception('one image') }}{% endif %}"
    template = (fresh / "chat_template.jinja").read_text()
    assert loop in template
    (fresh / "chat_template.jinja").write_text(template.replace(loop, loop + refusal))
    return built | {"one image": encoder(fresh)}


def without(check: Check, left_out: tuple[str, ...]) -> Check:
    rows = [row for row, name in enumerate(check.names) if name not in left_out]
    names, inputs = tuple(check.names[row] for row in rows), [check.inputs[row] for row in rows]
    return replace(
        check, names=names, inputs=inputs, expected={role: all[rows] for role, all in check.expected.items()}
    )


@pytest.fixture(scope="module")
def exports(checkpoint: Path, own: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    root = tmp_path_factory.mktemp("exports")
    return exported(checkpoint, root, others=others(checkpoint, root))


@pytest.mark.parametrize("name", CASES)
def test_is_served_as_trained(exports: Exports, name: str) -> None:
    """In both roles, alone and in batches padded on either side, in full and truncated."""
    (folder, verification), case = exports[name], CASES[name]
    assert verification.passed
    assert verification.check.dtype == case.dtype
    assert verification.tolerance == TOLERANCE or case.dtype == "bfloat16"
    assert verification.comparisons == 2 * (1 + len(case.also)) * 3 * 10  # roles, dimensions, batchings, probes
    assert [path.name for path in folder.glob("*.py")] == ([] if case.stock else ["served_pooling.py"])
    files = [path for path in folder.rglob("*") if path.is_file()]
    umask = os.umask(0o022)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_says_of_every_pooling_before_training_whether_it_brings_code(own: ModuleType) -> None:
    poolings = {name: case.build() for name, case in CASES.items()}
    for name, pooling in poolings.items():
        check_servable(pooling)
        assert is_stock(pooling) is CASES[name].stock
    # A subclass is not taken for what it extends.
    assert not is_stock(own.Drifting())
    # Of several vectors an item: tests/test_export_multi_vector.py.
    abstract = {zoo.Pooling, zoo.PoolingWrapper, zoo.TokenWeights, zoo.TokenProjection}
    every = {value for value in vars(zoo).values() if isinstance(value, type) and issubclass(value, Pooling)}
    assert every - abstract <= {type(part) for pooling in poolings.values() for part in pooling.modules()}


@pytest.mark.slow
def test_the_lowest_release_that_is_claimed_opens_every_folder(
    checkpoint: Path, own: ModuleType, tmp_path: Path
) -> None:
    python = os.environ.get("VLMEMBED_OLDEST_PYTHON")
    if not python:
        pytest.skip("VLMEMBED_OLDEST_PYTHON names no interpreter with Sentence Transformers 5.4 and transformers 5.4")
    # Releases before 6.0 take no lists; transformers 5.4 does not lay transparent images on white.
    left_out = ("two images and text", "video", "transparent image")
    cases = {name: replace(case, max_length=None) for name, case in CASES.items()} | {"cut": Case(zoo.LastToken)}
    later = set()
    for name, (folder, verification) in exported(checkpoint, tmp_path, left_out, cases, python=python).items():
        requirements = read_json(folder / "config_sentence_transformers.json")["requirements"]
        claimed = requirements["sentence_transformers"] == ">=5.4"
        assert verification.passed is claimed, f"{name}: {verification}"
        later |= set() if claimed else {name}
    # Wrong there where padding is on the left, or the template's end is cut.
    assert later == {"first", "weighted mean", "concatenation", "layer mix", "cut"}


def test_the_latest_release_that_a_module_needs_is_claimed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest release, not the last text: 5.10 comes behind 5.9."""
    monkeypatch.setitem(SERVED_SINCE, "cls", "5.9")
    monkeypatch.setitem(SERVED_SINCE, "max_seq_length", "5.10")
    export(encoder(checkpoint, zoo.FirstToken(), max_length=99), tmp_path)
    requirements = read_json(tmp_path / "config_sentence_transformers.json")["requirements"]
    assert requirements["sentence_transformers"] == ">=5.10"


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


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3", "qwen3_vl_moe"])
def test_other_models(exports: Exports, name: str) -> None:
    folder, verification = exports[name]
    assert verification.passed
    claims_videos = "video" in read_json(folder / "sentence_bert_config.json")["modality_config"]
    assert claims_videos is ("video" not in verification.check.left_out) is (name != "idefics3")


SEVERAL = {"two images and text"}
IMAGES = SEVERAL | {"image", "image and text", "rotated image", "transparent image", "video"}


@pytest.mark.parametrize(
    ("name", "left_out"),
    [("48 tokens", SEVERAL | {"image and text"}), ("20 tokens", IMAGES), ("one image", SEVERAL)],
)
def test_probes_are_what_the_model_reads(exports: Exports, name: str, left_out: set[str]) -> None:
    """A text is cut, what has images is not; a template may take one image only."""
    _, verification = exports[name]
    assert verification.passed
    assert {*verification.check.left_out} >= left_out
    assert {"text", "long text"} <= {*verification.check.names}
    assert f"because the model refuses them: {', '.join(verification.check.left_out)}" in str(verification)


def test_every_image_is_served_as_trained_in_the_form_that_the_page_says(checkpoint: Path, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 8
    opaque, grey = picture(96, 64, 1), np.asarray(picture(96, 64, 2).convert("L"))
    alpha, palette = opaque.copy(), opaque.quantize(16)
    alpha.putalpha(Image.fromarray(grey))
    images: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "path.png": (opaque, {}),
        "turned.jpg": (opaque, {"exif": turned, "quality": 95}),
        "cmyk.jpg": (opaque.convert("CMYK"), {}),
        "alpha.png": (alpha, {}),
        "turned and alpha.webp": (alpha, {"exif": turned, "lossless": True}),
        "grey and alpha.png": (alpha.convert("LA"), {}),
        "palette.png": (palette, {"transparency": 3}),
        "animation.gif": (palette, {"transparency": 3}),
        "16 bits.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "10 bits.tif": (Image.fromarray(grey.astype(np.uint16) + 291), {}),
    }
    for name, (image, options) in images.items():
        image.save(tmp_path / name, **options)
    built, paths = encoder(checkpoint).eval(), [tmp_path / name for name in images]
    rows = [Item("document", (Part("image", form),)) for path in paths for form in (path, path.read_bytes())]
    with torch.no_grad():
        expected = normalize(torch.cat([built(built.preprocessor([row])) for row in rows]), dim=-1)
    served = SentenceTransformer(str(export(built, tmp_path / "export")), device="cpu")
    opened = [{"image": load_image(path)} for path in paths]
    probes = [as_input({"image": str(path)}) for path in paths[:-1]]
    for forms in (opened, probes):
        results = served.encode_document(forms, convert_to_tensor=True)
        torch.testing.assert_close(results, expected[: 2 * len(forms) : 2], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(expected[::2], expected[1::2], rtol=0, atol=TOLERANCE)
    with pytest.raises(TypeError):
        served.encode_document([{"image": paths[0].read_bytes()}])


# The exporter


def test_the_exporter(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "export.unverified" / "left by a killed export").mkdir(parents=True)
    built = trained(checkpoint, Case(lambda: zoo.Attention(2), False, lora=True))
    loss = {"class_path": "vlmembed.losses.InfoNCE", "init_args": {"temperature": 1}}
    info = ModelInfo("digits", None, [64, 32], {"test/ndcg@10": 0.5}, {"model": {"init_args": {"loss": loss}}})
    capfd.readouterr()
    verification = SentenceTransformers().export(built, tmp_path / "export", info)
    assert verification.passed
    assert verification.check.dimensions == (128, 64, 32)
    card = (tmp_path / "export" / "README.md").read_text()
    assert all(text in card for text in ("InfoNCE(temperature=1)", "largest difference", "trust_remote_code=True"))
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["is_matryoshka"], config["matryoshka_dimensions"]) == (True, [32, 64, 128])
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    printed, noise = capfd.readouterr()
    said = ("model = SentenceTransformer(", "is opened with trust_remote_code=True", "was killed")
    assert all(text in printed for text in said)
    assert not any(text in noise for text in ("model shards", "Loading weights", "no video metadata"))
    assert is_progress_bar_enabled()


@pytest.mark.parametrize("base_model", ["/home/me/model", "model", "model.json", "a/b/c", ""])
def test_a_base_model_that_is_no_id_is_refused_before_training(base_model: str) -> None:
    with pytest.raises(ValueError, match="is no id of a model on the Hub"):
        SentenceTransformers(base_model=base_model).check(zoo.LastToken())


def test_a_difference_fails_and_leaves_no_export(checkpoint: Path, own: ModuleType, tmp_path: Path) -> None:
    """The pooling computes something that its class and arguments do not say."""
    pooling = own.Drifting()
    pooling.drift = 0.1
    with pytest.raises(ExportError, match=r"does not serve what was trained\. .*worst '.*' as .*, 64 dimensions"):
        SentenceTransformers().export(encoder(checkpoint, pooling, max_length=256), tmp_path / "export", ModelInfo())
    assert not (tmp_path / "export").exists()
    assert (tmp_path / "export.unverified" / "modules.json").exists()


def test_a_used_folder_is_refused_and_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for folder, error, message in (
        (tmp_path, FileExistsError, "is not empty"),
        (tmp_path / "thesis.txt", FileExistsError, "is not empty"),
        (tmp_path / "thesis.txt" / "export", PermissionError, "thesis.txt is no folder to write into"),
    ):
        with pytest.raises(error, match=message):
            SentenceTransformers().export(encoder(checkpoint), folder, ModelInfo())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_room_nothing_is_left_but_advice(checkpoint: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(ExportError, match=r"stopped: .*File too large.* checkpoints are whole\. Make room"):
            SentenceTransformers().export(encoder(checkpoint), tmp_path / "export", ModelInfo())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())


# What is tolerated


def test_the_worst_difference_is_named(checkpoint: Path, tmp_path: Path) -> None:
    check = expect(encoder(checkpoint), tmp_path, [64, 8])
    unit = {role: normalize(rows, dim=-1) for role, rows in check.expected.items()}
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
    [
        (0.9e-5, 1.0, 1e-5, True),
        (1.1e-5, 1.0, 1e-5, False),
        (0.04, 0.9995, 0.045, True),
        (0.04, 0.998, 0.045, False),
        (float("nan"), 1.0, 1e-5, False),
        (0.9e-5, float("nan"), 1e-5, False),
    ],
)
def test_what_passes(difference: float, cosine: float, tolerance: float, passed: bool) -> None:
    check = Check(("text",), [], (), {}, (64,), (), "cpu", "float32")
    assert Verification(check, 1, "text", difference, tolerance, cosine).passed is passed


def test_computing_what_is_expected_turns_dropout_off(checkpoint: Path, tmp_path: Path) -> None:
    class Dropped(zoo.LastToken):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return dropout(super().forward(*args), 0.5, self.training)

    built = encoder(checkpoint, Dropped())
    once, twice = (expect(built, tmp_path, [64]).expected["query"] for _ in range(2))
    assert torch.equal(once, twice)


# The files


def test_the_files(checkpoint: Path, tmp_path: Path) -> None:
    options = {"query_instruction": "Find it.", "document_instruction": None, "max_pixels": 9216, "max_length": 99}
    export(encoder(checkpoint, **options, bidirectional=True), tmp_path)
    config = read_json(tmp_path / "config_sentence_transformers.json")
    assert config["prompts"] == {"query": "Find it.", "document": ""}
    assert config["requirements"]["sentence_transformers"] == ">=5.6"
    assert read_json(tmp_path / "processor_config.json")["image_processor"]["size"]["longest_edge"] == 9216
    assert read_json(tmp_path / "config.json")["text_config"]["is_causal"] is False
    assert "is_matryoshka" not in read_json(tmp_path / "config.json")
    assert read_json(tmp_path / "tokenizer_config.json")["model_max_length"] == 99


def test_an_export_is_a_checkpoint_whose_settings_are_those_of_the_next_training(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Of the first training nothing stays: its limit, its attention, its dimensions, its layers."""
    long_text = "one two three " * 40
    built = encoder(checkpoint, zoo.LayerMix(zoo.LastToken(), 2), max_length=60, bidirectional=True)
    first = export(built, tmp_path / "first", dimensions=[32, 64])
    trained_on = encoder(first).eval()
    second = export(trained_on, tmp_path / "second")
    with torch.no_grad():
        expected = normalize(trained_on(trained_on.preprocessor([Item("document", (Part("text", long_text),))])))
    served = SentenceTransformer(str(second), device="cpu").encode_document([long_text], convert_to_tensor=True)
    torch.testing.assert_close(served, expected, rtol=0, atol=TOLERANCE)
    before, after = (read_json(folder / "config.json") for folder in (first, second))
    positions = after["text_config"]["max_position_embeddings"]
    assert read_json(second / "tokenizer_config.json")["model_max_length"] >= positions
    assert "max_seq_length" not in read_json(second / "sentence_bert_config.json")
    assert (before.pop("is_causal"), after["is_causal"], after["text_config"]["is_causal"]) == (False, True, True)
    stale = {"is_matryoshka", "matryoshka_dimensions", "output_hidden_states"}
    assert stale <= {*before}
    assert not stale & {*after, *after["text_config"]}


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_the_checkpoints(tmp_path: Path, tied: bool) -> None:
    fresh = tmp_path / "fresh"
    tiny.create(fresh, hidden_size=64, layers=2, heads=2, vision_hidden_size=32, tie_word_embeddings=tied)
    folder = export(encoder(fresh), tmp_path / "export")
    with safe_open(fresh / "model.safetensors", "pt") as before, safe_open(folder / "model.safetensors", "pt") as after:
        # Where the output layer has weights of its own, an embedding model leaves them behind.
        assert set(before.keys()) - set(after.keys()) == (set() if tied else {"lm_head.weight"})
        assert all(torch.equal(before.get_tensor(name), after.get_tensor(name)) for name in after.keys())  # noqa: SIM118


def test_learned_tokens_are_in_the_vocabulary(exports: Exports, checkpoint: Path) -> None:
    folder, _ = exports["one learned token"]
    fresh = read_json(checkpoint / "config.json")["text_config"]["vocab_size"]
    assert read_json(folder / "config.json")["text_config"]["vocab_size"] == fresh + 1
    assert (folder / "chat_template.jinja").read_text().endswith("<|read_out_0|>")


def test_a_truncated_export_is_normalised(exports: Exports, checkpoint: Path, tmp_path: Path) -> None:
    embeddings = SentenceTransformer(str(exports["last, truncated"][0]), device="cpu").encode(["a", "b"])
    assert embeddings.shape == (2, 24)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="truncate_dim=65 is not between 1 and the embedding's 64"):
        export(encoder(checkpoint), tmp_path, truncate_dim=65)


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
        (lambda own: own.Forgetful(zoo.Mean(), 3), "Forgetful cannot be exported: .* 'size' as self.size"),
        (lambda own: own.Shifted(zoo.Mean(), {}), "shift cannot be exported: it is a dict"),
        (lambda own: type("Made", (zoo.Mean,), {"__module__": "nowhere"})(), "Made .* module nowhere is no file"),
        (lambda own: type("Made", (zoo.Mean,), {"__module__": "__main__"})(), "Made .* module __main__ is no file"),
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
        ("class Max: ...", "Max is something else in vlmembed.pooling.base than in refused"),
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
