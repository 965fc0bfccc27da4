"""Checkpoints are loaded as a config says, or refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import other_models
import pytest
import torch
from building import mixed_items
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, Qwen3Config

from vlmembed.backbones import Qwen3VL, VisionLanguageModel, base


def load(checkpoint: Path, **options: Any) -> Qwen3VL:
    backbone = Qwen3VL(str(checkpoint), **options)
    backbone.configure()
    return backbone.eval()


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_dtype_is_the_checkpoints_unless_named(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    half = shutil.copytree(checkpoint, tmp_path / "half")
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
    opened = (mock.MagicMock(), {"missing_keys": []})
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda _, **options: asked.update(options) or opened)
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


#: Renders everything, as the tiny checkpoint's own template does.
WHOLE = """{% for m in messages %}{{ m.role }}{% for part in m.content %}\
{{ part.text if part.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}{% endfor %}{% endfor %}"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("part.text", "'a text'", "drops the system and the user"),
        ("messages", "messages if m.role != 'system'", "drops the system: .* set query_instruction"),
        ("messages", "messages if m.role == 'system'", "drops the user and the images of the user"),
        ("m.content", "m.content if part.type == 'text'", "drops the images of the user"),
        ("{{ m.role }}", "{{ m.content + 'text' }}", "cannot be rendered for system and user"),
    ],
)
def test_a_template_that_drops_what_it_is_given_is_refused(
    checkpoint: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "changed")
    template, backbone = tmp_path / "changed" / "chat_template.jinja", Qwen3VL(str(tmp_path / "changed"))
    template.write_text(WHOLE)
    backbone.make_preprocessor()
    template.write_text(WHOLE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        backbone.make_preprocessor()


def test_weights_that_are_missing_are_named(checkpoint: Path, tmp_path: Path) -> None:
    """transformers would draw them at random, and go on."""
    shutil.copytree(checkpoint, tmp_path / "holes")
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.language_model.layers.1.mlp.up_proj.weight"], weights["model.visual.merger.norm.bias"]
    save_file(weights, tmp_path / "holes" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights .*layers.1.mlp.up_proj.weight, visual.merger.norm.bias\."):
        load(tmp_path / "holes")


def test_an_adapter_beside_the_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """transformers would put it on top, unmerged, and an export would hold the adapter alone."""
    shutil.copytree(checkpoint, tmp_path / "adapted")
    model = get_peft_model(AutoModel.from_pretrained(checkpoint), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapted")
    with pytest.raises(ValueError, match=r"adapted' has an adapter beside its weights .*Merge it"):
        load(tmp_path / "adapted")


@pytest.mark.parametrize("weights", [True, False])
def test_learned_modules_of_an_earlier_stage_are_said_to_begin_anew(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: bool
) -> None:
    folder = tmp_path / "stage1"
    shutil.copytree(checkpoint, folder)
    modules = [("", "base.modules.Transformer"), ("1_Pooling", "models.Pooling"), ("2_Dense", "models.Dense")]
    (folder / "modules.json").write_text(json.dumps([{"path": path, "type": kind} for path, kind in modules]))
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    if weights:
        save_file({"linear.weight": torch.zeros(2, 2)}, folder / "2_Dense" / "model.safetensors")
    load(folder)
    sentence = f"{folder} has weights of Dense (modules.json). They are not loaded"
    assert (sentence in capsys.readouterr().out) is weights


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA")
def test_4_bit_weights_are_refused_without_cuda(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"load_in_4bit needs a CUDA device.*CUDA: False.*load_in_4bit: false"):
        Qwen3VL(str(checkpoint), load_in_4bit=True).configure()
