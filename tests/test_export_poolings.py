"""Every pooling is served as it was trained: by modules of Sentence Transformers, or by code that a folder brings."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from building import encoder
from torch import Tensor

from vlmembed import pooling as zoo
from vlmembed.encoder import Encoder
from vlmembed.export import Run, SentenceTransformers
from vlmembed.export.code import standalone_code
from vlmembed.export.poolings import check_servable, is_stock
from vlmembed.export.verify import TOLERANCE
from vlmembed.pooling import (
    Attention,
    Concatenation,
    EarlierLayer,
    EndToken,
    LastToken,
    LatentAttention,
    LayerMix,
    LearnedTokens,
    Max,
    Mean,
    MeanOfImages,
    MeanOfLast,
    MeanOfText,
    MeanWithoutInstruction,
    Pooling,
    Projection,
    WeightedMean,
)

#: What makes the pooling, and whether modules of Sentence Transformers serve it. Simple ones are in `test_export`.
SERVED: dict[str, tuple[Callable[[], Pooling], bool]] = {
    "end token": (EndToken, True),
    "one read-out": (lambda: LearnedTokens(1), True),
    "earlier layer": (lambda: EarlierLayer(Concatenation([Mean(), LastToken()])), True),
    "layer mix": (lambda: LayerMix(WeightedMean(), 2), True),
    "linear projection": (lambda: Projection(EndToken(), 24), True),
    "MLP": (lambda: Projection(LayerMix(Max(), 2), 24, 48), True),
    "mean of the last": (MeanOfLast, False),
    "images": (MeanOfImages, False),
    "text": (MeanOfText, False),
    "without instruction": (MeanWithoutInstruction, False),
    "read-outs, mean": (lambda: LearnedTokens(3), False),
    "read-outs, concatenated": (lambda: LearnedTokens(2, "concatenation"), False),
    "attention": (lambda: EarlierLayer(Attention(2)), False),
    "latent attention": (lambda: LatentAttention(16, 4), False),
    "many": (lambda: Projection(LayerMix(Concatenation([Attention(), MeanOfText(), Mean()]), 2), 24), False),
}


def trained(checkpoint: Path, pooling: Pooling) -> Encoder:
    """With random weights: those that start at zero would hide that they were left behind."""
    torch.manual_seed(0)
    built = encoder(checkpoint, pooling, query_instruction="Find it.")
    for weight in pooling.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return built


@pytest.mark.parametrize("name", SERVED)
def test_is_served_as_trained(checkpoint: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process that cannot import vlmembed, for both roles, both padding sides, alone and in a batch."""
    build, stock = SERVED[name]
    folder = tmp_path / "export"
    verification = SentenceTransformers().export(trained(checkpoint, build()), folder, Run())
    assert verification.difference < TOLERANCE
    said = capsys.readouterr().out
    if stock:
        assert not list(folder.glob("*.py"))
        assert "it brings no code along" in said
    else:
        assert [path.name for path in folder.glob("*.py")] == ["trained_pooling.py"]
        assert "is opened with trust_remote_code=True" in said
        assert "trust_remote_code=True" in (folder / "README.md").read_text()


def test_all_poolings_are_here_or_in_the_test_of_simple_ones() -> None:
    simple = {"FirstToken", "LastToken", "Max", "Mean", "MeanSqrtLength", "WeightedMean", "Concatenation"}
    classes = {type(part).__name__ for build, _ in SERVED.values() for part in build().modules()}
    concrete = {name for name in zoo.__all__ if name not in ("Pooling", "Template")}
    assert concrete - simple <= classes


@pytest.mark.parametrize("name", SERVED)
def test_says_before_training_which_of_the_two_it_will_be(name: str) -> None:
    build, stock = SERVED[name]
    check_servable(build())
    assert is_stock(build()) is stock


OPEN = """
import sys
import numpy
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=True)
numpy.save(sys.argv[2], model.encode_query(["some words", "and some more of them"]))
"""


def opened(folder: Path, scratch: Path) -> np.ndarray:
    output = scratch / f"{folder.name}.npy"
    subprocess.run([sys.executable, "-c", OPEN, folder, output], check=True, cwd=scratch)
    return np.load(output)


def test_a_folder_with_code_survives_being_copied(checkpoint: Path, tmp_path: Path) -> None:
    built, folder, copy = trained(checkpoint, Attention(2)), tmp_path / "export", tmp_path / "copied to"
    SentenceTransformers().export(built, folder, Run())
    shutil.copytree(folder, copy)
    expected = opened(folder, tmp_path)
    shutil.rmtree(folder)
    np.testing.assert_allclose(opened(copy, tmp_path), expected, atol=1e-6)


def test_learned_tokens_are_in_the_vocabulary(checkpoint: Path, tmp_path: Path) -> None:
    built, folder = trained(checkpoint, LearnedTokens(1)), tmp_path / "export"
    SentenceTransformers().export(built, folder, Run())
    rows = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    assert rows == json.loads((checkpoint / "config.json").read_text())["text_config"]["vocab_size"] + 1
    assert (folder / "chat_template.jinja").read_text().endswith("<|read_out_0|>")


# The code


class Shifted(Pooling):
    """A user's own: another pooling's answer, and a number."""

    def __init__(self, pooling: Pooling, shift: float = 1.0) -> None:
        super().__init__()
        self.pooling = pooling
        self.shift = shift

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        return moved(self.pooling(hidden, mask, input_ids), self.shift)


def moved(values: Tensor, shift: float) -> Tensor:
    return values + SIGN * shift


SIGN = -1


class Forgetful(Shifted):
    def __init__(self, pooling: Pooling, size: int) -> None:
        super().__init__(pooling)


class NeedsMore(Pooling):
    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        return hidden[:, TOLERANCE > 0]


def test_a_users_pooling_is_served_too(checkpoint: Path, tmp_path: Path) -> None:
    """With the function and the constant that it uses, and nothing else of its file."""
    folder = tmp_path / "export"
    built = trained(checkpoint, Shifted(MeanOfText(), 0.5))
    assert SentenceTransformers().export(built, folder, Run()).difference < TOLERANCE
    code = (folder / "trained_pooling.py").read_text()
    assert "SIGN = -1" in code
    assert "Forgetful" not in code
    assert "LatentAttention" not in code
    assert "vlmembed" not in code


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        (Forgetful(Mean(), 3), "Forgetful cannot be exported: .* 'size' as self.size"),
        (Shifted(Mean(), {}), "shift cannot be exported: it is a dict"),  # type: ignore[arg-type]
        (NeedsMore(), "needs `from vlmembed.export.verify import TOLERANCE`"),
    ],
)
def test_what_cannot_be_brought_along_is_refused_before_training(pooling: Pooling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SentenceTransformers().check(pooling)


def test_code_of_a_notebook_is_refused() -> None:
    made = type("Made", (Mean,), {"__module__": "nowhere"})
    with pytest.raises(ValueError, match="Made cannot be exported: its module nowhere is no file"):
        standalone_code(made())
