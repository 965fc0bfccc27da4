"""Adapters train what they say and nothing else, and merging them changes no embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import other_models
import pytest
import torch
from building import backbone as load
from building import gradients, item, picture
from peft import LoraConfig, PeftModel
from torch import Tensor

from vlmembed.adapters import Freeze, LoRA, matching_parameters, merge
from vlmembed.backbones import VisionLanguageModel
from vlmembed.types import Inputs

#: float32: the sum of two products, or one product with the sum of two matrices.
ROUNDING = 1e-5
LANGUAGE_ATTENTION = r".*language_model.*\.(q_proj|v_proj)"
VARIANTS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def lora(**options: Any) -> LoRA:
    """With weights that do something, where peft's would begin with nothing."""
    return LoRA(LoraConfig(**{"r": 4, "init_lora_weights": False, "target_modules": LANGUAGE_ATTENTION, **options}))


def inputs_of(backbone: VisionLanguageModel) -> Inputs:
    return backbone.preprocessor([item("some words", role="query"), item(picture(64, 96), "a caption")])


def trainable(backbone: VisionLanguageModel) -> set[str]:
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def uneven_loss(hidden: Tensor) -> Tensor:
    return (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).sum()


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_adapters_train(checkpoint: Path, variant: str) -> None:
    backbone = load(checkpoint)
    lora(**VARIANTS[variant]).apply(backbone)
    kinds = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if variant == "dora" else set())
    layer = "model.base_model.model.language_model.layers.{}.self_attn.{}.{}.default.weight"
    expected = {
        layer.format(number, name, kind) for number in (0, 1) for name in ("q_proj", "v_proj") for kind in kinds
    }
    assert trainable(backbone) == expected
    uneven_loss(backbone(inputs_of(backbone))).backward()
    reached = gradients(backbone)
    assert reached.keys() == expected
    assert all(gradient.any() for gradient in reached.values())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_merging_changes_no_hidden_state(checkpoint: Path, variant: str) -> None:
    torch.manual_seed(0)
    backbone = load(checkpoint).eval()
    fresh_names = {name for name, _ in backbone.named_parameters()}
    inputs, model = inputs_of(backbone), backbone.model
    merge(backbone)
    assert backbone.model is model  # Nothing to merge yet.
    fresh = backbone(inputs)
    lora(target_modules="all-linear", lora_dropout=0.3, **VARIANTS[variant]).apply(backbone)
    backbone.eval()
    adapted = backbone(inputs)
    merge(backbone)
    assert (adapted - fresh).abs().max() > 0.1
    torch.testing.assert_close(backbone(inputs), adapted, rtol=0, atol=ROUNDING)
    assert type(backbone.model).__name__ == "Qwen3VLModel"
    assert {name for name, _ in backbone.named_parameters()} == fresh_names


def test_a_second_lora_is_refused(checkpoint: Path) -> None:
    """The first one would train no more, and peft could not merge the two."""
    backbone = load(checkpoint)
    lora().apply(backbone)
    with pytest.raises(ValueError, match=r"There is a LoRA already.*rank_pattern"):
        lora(target_modules=r".*visual.*\.qkv").apply(backbone)


@pytest.mark.parametrize("target", [["misspelt"], ["q_proj", "misspelt"], r".*misspelt.*"])
def test_a_target_that_matches_nothing_is_named(checkpoint: Path, target: Any) -> None:
    """Also where another one matches: peft is content with that."""
    backbone = load(checkpoint)
    with pytest.raises(ValueError, match=r"misspelt.*linear layers are called down_proj.*q_proj.*v_proj"):
        lora(target_modules=target).apply(backbone)
    assert not isinstance(backbone.model, PeftModel)


@pytest.mark.parametrize(
    "target", [["q_proj", "v_proj"], ["self_attn.q_proj"], ["language_model.layers.1.mlp.up_proj"]]
)
def test_targets_may_be_ends_of_full_names(checkpoint: Path, target: list[str]) -> None:
    backbone = load(checkpoint)
    lora(target_modules=target).apply(backbone)
    adapted = {name.split(".lora_")[0] for name in trainable(backbone)}
    assert {end for end in target if any(name.endswith(f".{end}") for name in adapted)} == set(target)


#: Where the parts of the families are, said by where they begin; the language model is the rest.
PARTS = {
    "Qwen3-VL": (
        None,
        {
            "merger": ("visual.merger.", "visual.deepstack_merger_list."),
            "vision": ("visual.patch_embed.", "visual.pos_embed.", "visual.blocks."),
        },
    ),
    "Qwen2.5-VL": (
        other_models.qwen2_5_vl,
        {"merger": ("visual.merger.",), "vision": ("visual.patch_embed.", "visual.blocks.")},
    ),
    "Qwen2.5-Omni": (
        other_models.qwen2_5_omni,
        {
            "audio": ("audio_tower.",),
            "merger": ("visual.merger.",),
            "vision": ("visual.patch_embed.", "visual.blocks."),
        },
    ),
    "Qwen3-Omni": (
        other_models.qwen3_omni,
        {
            "audio": ("audio_tower.",),
            "merger": ("visual.merger.", "visual.merger_list."),
            "vision": ("visual.patch_embed.", "visual.pos_embed.", "visual.blocks."),
        },
    ),
    "Idefics3": (other_models.idefics3, {"merger": ("connector.",), "vision": ("vision_model.",)}),
}


@pytest.mark.parametrize("family", PARTS)
def test_groups_are_disjoint_and_cover_everything(checkpoint: Path, tmp_path: Path, family: str) -> None:
    write, beginnings = PARTS[family]
    backbone = load(write(tmp_path / "tiny") if write else checkpoint, VisionLanguageModel)
    every = {name for name, _ in backbone.named_parameters()}
    found = {group: {name for name, _ in matching_parameters(backbone, group)} for group in backbone.groups}
    assert sum(map(len, found.values())) == len(every)
    assert set.union(*found.values()) == every
    assert {*found} == {*beginnings, "language"}
    for group, starts in beginnings.items():
        assert found[group] == {name for name in every if name.removeprefix("model.").startswith(starts)}
    assert all(backbone.group_of(name) == group for group, names in found.items() for name in names)


@pytest.mark.parametrize(
    ("modules", "frozen"),
    [
        (["vision"], ("model.visual.patch_embed.", "model.visual.pos_embed.", "model.visual.blocks.")),
        (["merger"], ("model.visual.merger.", "model.visual.deepstack_merger_list.")),
        (["vision", "merger"], ("model.visual.",)),
        (["language"], ("model.language_model.",)),
        ([r"visual\.blocks\.0\.", "embed_tokens"], ("model.visual.blocks.0.", "model.language_model.embed_tokens.")),
    ],
)
def test_freeze_stops_exactly_what_it_names(checkpoint: Path, modules: list[str], frozen: tuple[str, ...]) -> None:
    backbone = load(checkpoint)
    Freeze(modules).apply(backbone)
    every = {name for name, _ in backbone.named_parameters()}
    assert every - trainable(backbone) == {name for name in every if name.startswith(frozen)}
    uneven_loss(backbone(inputs_of(backbone))).backward()
    assert not gradients(backbone).keys() & (every - trainable(backbone))


def test_freezing_nothing_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"'visoin' matches no parameter.*Groups are merger, vision, language"):
        Freeze(["vision", "visoin"]).apply(load(checkpoint))
    for nothing in ([], "vision"):
        with pytest.raises(ValueError, match="list of at least one group or pattern"):
            Freeze(nothing)


def test_lora_freezes_all_weights_there_are_so_that_order_counts(checkpoint: Path) -> None:
    """Before a LoRA, freezing changes nothing, as its weights come after; behind it, it stops the adapters too."""
    plain, before, after = load(checkpoint), load(checkpoint), load(checkpoint)
    Freeze(["vision"]).apply(before)
    for backbone in (plain, before, after):
        lora(target_modules="all-linear").apply(backbone)
    Freeze(["vision"]).apply(after)
    assert trainable(before) == trainable(plain)
    stopped = {name for name in trainable(plain) if ".visual.blocks." in name}
    assert trainable(after) == trainable(plain) - stopped != trainable(plain)
    assert any(".visual.merger." in name for name in trainable(after))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA")
def test_qlora_is_refused_without_cuda(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"load_in_4bit needs a CUDA device and the bitsandbytes package"):
        load(checkpoint, load_in_4bit=True)


@pytest.mark.gpu
def test_qlora_trains_adapters_on_4_bit_weights(checkpoint: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    backbone = load(checkpoint, load_in_4bit=True)
    projection = backbone.model.language_model.layers[0].self_attn.q_proj
    assert isinstance(projection, bitsandbytes.nn.Linear4bit)
    lora().apply(backbone)
    inputs = {name: value.cuda() for name, value in inputs_of(backbone).items()}
    (backbone(inputs).float() ** 3).sum().backward()
    reached = gradients(backbone)
    assert reached.keys() == trainable(backbone)
    assert all(gradient.any() for gradient in reached.values())
