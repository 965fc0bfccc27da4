"""Checkpoints are loaded as a config says, or refused with a reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import other_models
import pytest
import torch
from building import mixed_items
from transformers import AutoModel, BertConfig, Qwen3Config

from vlmembed.backbones import Qwen3VL, VisionLanguageModel, base


def load(checkpoint: Path, **options: Any) -> Qwen3VL:
    backbone = Qwen3VL(str(checkpoint), **options)
    backbone.configure()
    return backbone.eval()


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_dtype_is_the_checkpoints_unless_named(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    half = tmp_path / "half"
    AutoModel.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(half)
    expected = {"auto": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    assert {parameter.dtype for parameter in load(half, dtype=dtype).parameters()} == {expected}
    if dtype == "auto":
        assert {parameter.dtype for parameter in load(checkpoint).parameters()} == {torch.float32}


def test_attention_is_sdpa_here_unless_named(checkpoint: Path) -> None:
    if not torch.cuda.is_available():
        assert load(checkpoint).model.config._attn_implementation == "sdpa"
    assert load(checkpoint, attn_implementation="eager").model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", "flash_attention_2"), ("auto", "sdpa"), ("float32", "sdpa")]
)
def test_flash_attention_is_for_half_precision_on_cuda(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, expected: str
) -> None:
    """As on a machine that has both; the checkpoint's own dtype is float32."""
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(base, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda _, **options: asked.update(options) or (mock.MagicMock(), {"missing_keys": []}))
    Qwen3VL(str(checkpoint), dtype=dtype).configure()
    assert asked["attn_implementation"] == expected


@pytest.mark.gpu
@torch.no_grad()
def test_flash_attention_is_chosen_and_agrees_with_sdpa(checkpoint: Path) -> None:
    pytest.importorskip("flash_attn")
    backbone = load(checkpoint, dtype="bfloat16").cuda()
    assert backbone.model.config._attn_implementation == "flash_attention_2"
    inputs = {name: value.cuda() for name, value in backbone.preprocessor(mixed_items()).items()}
    expected = load(checkpoint, dtype="bfloat16", attn_implementation="sdpa").cuda()(inputs)
    kept = inputs["attention_mask"] == 1
    # bfloat16 has eight bits, and the two kernels round in different places.
    torch.testing.assert_close(backbone(inputs)[kept], expected[kept], rtol=0, atol=0.1)


@pytest.mark.parametrize("config", [Qwen3Config(), BertConfig()], ids=["qwen3", "bert"])
def test_a_text_model_is_refused(tmp_path: Path, config: Any) -> None:
    config.save_pretrained(tmp_path)
    message = f"'{tmp_path}' is a '{config.model_type}', not a vision-language model"
    with pytest.raises(ValueError, match=message):
        VisionLanguageModel(tmp_path).configure()
    with pytest.raises(ValueError, match=message):
        _ = VisionLanguageModel(tmp_path).make_preprocessor()


def test_qwen3_vl_refuses_another_family(tmp_path: Path) -> None:
    folder = other_models.idefics3(tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"is a 'idefics3', not a Qwen3-VL.*vlmembed\.backbones\.VisionLanguageModel"):
        Qwen3VL(str(folder)).configure()


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"Cannot open the checkpoint '{tmp_path}/nothing'"):
        Qwen3VL(str(tmp_path / "nothing")).configure()


def test_a_checkpoint_without_chat_template_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="plain' has no chat template"):
        _ = VisionLanguageModel(tmp_path / "plain").make_preprocessor()


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA")
def test_4_bit_weights_are_refused_without_cuda(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"load_in_4bit needs a CUDA device.*CUDA: False.*load_in_4bit: false"):
        Qwen3VL(str(checkpoint), load_in_4bit=True).configure()
