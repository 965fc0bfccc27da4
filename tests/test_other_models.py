"""Backbones of other families."""

from __future__ import annotations

import other_models
import pytest
import torch
from building import gradients, item, mixed_items, picture

from vlmembed.backbones import Qwen3VL, VisionLanguageModel

#: Sums in float32 in another order.
ROUNDING = 1e-5
FAMILIES = {
    "Qwen2.5-VL": (other_models.qwen2_5_vl, VisionLanguageModel),
    "Qwen3-VL-MoE": (other_models.qwen3_vl_moe, Qwen3VL),
    "Idefics3": (other_models.idefics3, VisionLanguageModel),
}


@pytest.fixture(scope="module", params=FAMILIES)
def relative(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    """A backbone of another family."""
    write, backbone_class = FAMILIES[request.param]
    backbone = backbone_class(str(write(tmp_path_factory.mktemp("families") / "tiny")))
    backbone.configure()
    return backbone.eval()


@torch.no_grad()
def test_other_families_encode_an_item_alone_as_in_a_mixed_batch(relative: VisionLanguageModel) -> None:
    items = [kind for kind in mixed_items() if all(part.kind != "video" for part in kind.parts)]
    inputs = relative.preprocessor(items)
    hidden = relative(inputs)
    for row, one in enumerate(items):
        alone = relative.preprocessor([one])
        length = alone["input_ids"].shape[1]
        assert alone["input_ids"][0].equal(inputs["input_ids"][row, :length])
        torch.testing.assert_close(hidden[row, :length], relative(alone)[0], rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_other_families_see_their_images(relative: VisionLanguageModel) -> None:
    """Two pictures of one size differ in no token, so their difference comes through the vision tower."""
    one, other = (relative.preprocessor([item(picture(64, 64, seed), "a caption")]) for seed in (0, 1))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert (relative(one) - relative(other))[0, -1].abs().max() > 100 * ROUNDING


@torch.no_grad()
def test_other_families_can_be_bidirectional(relative: VisionLanguageModel) -> None:
    backbone = type(relative)(relative.checkpoint, bidirectional=True)
    backbone.configure()
    one = relative.preprocessor([item("some words")])
    other = {**one, "input_ids": one["input_ids"].clone()}
    other["input_ids"][0, -1] = 7
    assert (relative(one) - relative(other))[0, 0].abs().max() == 0
    backbone.eval()
    assert (backbone(one) - backbone(other))[0, 0].abs().max() > 100 * ROUNDING


def test_gradients_reach_every_part_of_other_families(relative: VisionLanguageModel) -> None:
    inputs = relative.preprocessor([item("words"), item(picture(64, 32), "more")])
    hidden = relative(inputs)
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    reached = {name for name, gradient in gradients(relative).items() if gradient.any()}
    relative.zero_grad()
    layers = {
        name.split(".layers.")[1][0]
        for name in reached
        if "language_model.layers." in name or "text_model.layers." in name
    }
    assert layers == {"0", "1"}
    assert any("visual" in name or "vision_model" in name for name in reached)
