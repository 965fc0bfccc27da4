"""Backbones give transformers' own hidden states, whatever an item shares its batch with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from building import gradients, item, mixed_items, picture, relative_difference
from torch import Tensor
from transformers import AutoModel, AutoProcessor
from videos import film

from vlmembed.backbones import Qwen3VL, VisionLanguageModel, base
from vlmembed.types import Inputs, Item, Part

#: Sums in float32 in another order: hidden states are of size one after the norm, and have passed through few layers.
ROUNDING = 1e-5
KINDS = ("text", "image", "image and text", "interleaved", "frames", "long text", "video file")
CONTENTS = {
    "text": [{"type": "text", "text": "four zero seven, Zoë"}],
    "image": [{"type": "image", "image": picture(96, 64, 1)}],
    "interleaved": [
        {"type": "text", "text": "before"},
        {"type": "image", "image": picture(32, 96, 2)},
        {"type": "image", "image": picture(64, 64, 3)},
        {"type": "text", "text": "after"},
    ],
}


def load(checkpoint: Path, **options: Any) -> Qwen3VL:
    backbone = Qwen3VL(str(checkpoint), **options)
    backbone.configure()
    return backbone.eval()


@pytest.fixture(scope="module")
def backbone(checkpoint: Path) -> Qwen3VL:
    return load(checkpoint)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    video = film(tmp_path_factory.mktemp("films") / "film.mp4")
    return [*mixed_items(), Item("document", (Part("video", video),))]


@pytest.fixture(scope="module")
def mixed(backbone: Qwen3VL, items: list[Item]) -> tuple[Inputs, Tensor]:
    """One batch of every kind, and its hidden states."""
    inputs = backbone.preprocessor(items)
    with torch.no_grad():
        return inputs, backbone(inputs)


def parts(content: list[dict[str, Any]]) -> tuple[Part, ...]:
    return tuple(Part(part["type"], part[part["type"]]) for part in content)


@pytest.mark.parametrize("kind", CONTENTS)
@torch.no_grad()
def test_hidden_states_are_the_last_ones_of_transformers(checkpoint: Path, backbone: Qwen3VL, kind: str) -> None:
    system = {"role": "system", "content": [{"type": "text", "text": base.DEFAULT_INSTRUCTION}]}
    inputs = AutoProcessor.from_pretrained(checkpoint).apply_chat_template(
        [system, {"role": "user", "content": CONTENTS[kind]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    expected = AutoModel.from_pretrained(checkpoint)(**inputs).last_hidden_state
    actual = backbone(backbone.preprocessor([Item("document", parts(CONTENTS[kind]))]))
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_the_last_state_is_behind_the_final_norm(checkpoint: Path) -> None:
    backbone = load(checkpoint)
    language = backbone.model.language_model
    language.norm.weight.copy_(torch.linspace(0.5, 2, backbone.hidden_size))  # Fresh, it would be ones.
    before: list[Tensor] = []
    language.layers[-1].register_forward_hook(lambda *call: before.append(call[-1]))
    hidden = backbone(backbone.preprocessor([item("some words")]))
    variance = before[0].pow(2).mean(dim=-1, keepdim=True)
    expected = before[0] * (variance + language.config.rms_norm_eps).rsqrt() * language.norm.weight
    torch.testing.assert_close(hidden, expected, rtol=0, atol=ROUNDING)
    assert not torch.allclose(hidden, before[0], atol=0.1)


@torch.no_grad()
def test_several_layers_come_in_the_order_asked_for(checkpoint: Path, backbone: Qwen3VL) -> None:
    inputs = backbone.preprocessor([item("some words"), item(picture(64, 64), "more")])
    expected = AutoModel.from_pretrained(checkpoint)(**inputs, output_hidden_states=True)
    hidden = backbone(inputs, layers=(-1, 0, 1))
    assert hidden.shape == (3, *inputs["input_ids"].shape, backbone.hidden_size)
    kept = inputs["attention_mask"] == 1  # What stands at padding is anybody's.
    torch.testing.assert_close(hidden[0][kept], expected.last_hidden_state[kept], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(hidden[1][kept], expected.hidden_states[0][kept], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(hidden[2][kept], expected.hidden_states[1][kept], rtol=0, atol=ROUNDING)
    words = inputs["input_ids"][0][kept[0]]
    torch.testing.assert_close(hidden[1, 0][kept[0]], backbone.model.get_input_embeddings()(words))
    torch.testing.assert_close(backbone(inputs, layers=(1,)), hidden[2])


def test_weights_wait_for_configure_and_come_without_a_head(checkpoint: Path) -> None:
    backbone = Qwen3VL(str(checkpoint))
    assert not list(backbone.parameters())
    assert backbone.make_preprocessor()([item("no weights needed")])["input_ids"].shape[0] == 1
    backbone.configure()
    names = [name for name, _ in backbone.named_parameters()]
    assert {name.split(".")[1] for name in names} == {"visual", "language_model"}
    assert not any("lm_head" in name for name in names)
    assert backbone.hidden_size == 64


@pytest.mark.parametrize("row", range(len(KINDS)), ids=KINDS)
@torch.no_grad()
def test_an_item_alone_equals_itself_in_a_mixed_batch(
    backbone: Qwen3VL, items: list[Item], mixed: tuple[Inputs, Tensor], row: int
) -> None:
    inputs, hidden = mixed
    alone = backbone.preprocessor([items[row]])
    length = alone["input_ids"].shape[1]
    assert alone["input_ids"][0].equal(inputs["input_ids"][row, :length])
    assert inputs["attention_mask"][row].sum() == length
    torch.testing.assert_close(hidden[row, :length], backbone(alone)[0], rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_padding_on_the_left_equals_padding_on_the_right(backbone: Qwen3VL, mixed: tuple[Inputs, Tensor]) -> None:
    inputs, right = mixed
    shape = inputs["input_ids"].shape
    padding = (1 - inputs["attention_mask"]).sum(dim=1).tolist()
    rolled = {
        name: torch.stack([row.roll(shift) for row, shift in zip(value, padding, strict=True)])
        for name, value in inputs.items()
        if value.shape == shape
    }
    left = backbone({**inputs, **rolled})
    for row, shift in enumerate(padding):
        torch.testing.assert_close(left[row, shift:], right[row, : shape[1] - shift], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_what_padding_holds_never_matters(checkpoint: Path, items: list[Item], bidirectional: bool) -> None:
    backbone = load(checkpoint, bidirectional=bidirectional)
    inputs = backbone.preprocessor(items)
    kept = inputs["attention_mask"] == 1
    noise = torch.randint(50, 250, kept.shape, generator=torch.Generator().manual_seed(0))
    noisy = backbone({**inputs, "input_ids": inputs["input_ids"].where(kept, noise)})
    torch.testing.assert_close(noisy[kept], backbone(inputs)[kept], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_the_first_token_sees_the_last_only_if_bidirectional(checkpoint: Path, bidirectional: bool) -> None:
    backbone = load(checkpoint, bidirectional=bidirectional, generation_prompt=False)
    one = backbone.preprocessor([item("some words")])
    other = {**one, "input_ids": one["input_ids"].clone()}
    other["input_ids"][0, -1] = 7
    difference = (backbone(one) - backbone(other))[0, 0].abs().max()
    assert (difference > 100 * ROUNDING) if bidirectional else (difference == 0)


@torch.no_grad()
def test_bidirectional_is_is_causal_false_in_the_text_config(
    checkpoint: Path, backbone: Qwen3VL, tmp_path: Path
) -> None:
    edited = edit_text_config(checkpoint, tmp_path / "bidirectional", is_causal=False)
    inputs = backbone.preprocessor([item("some words"), item(picture(64, 32), "more")])
    expected = AutoModel.from_pretrained(edited)(**inputs).last_hidden_state
    kept = inputs["attention_mask"] == 1
    found = load(checkpoint, bidirectional=True)(inputs)
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=ROUNDING)


def edit_text_config(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(checkpoint: Path) -> None:
    """A layer runs a second time in the backward pass, and the gradients are the same."""
    inputs = Qwen3VL(str(checkpoint)).make_preprocessor()([item("words"), item(picture(64, 64), "more")])
    found, calls = {}, {}
    for checkpointing in (False, True):
        backbone = Qwen3VL(str(checkpoint), gradient_checkpointing=checkpointing)
        backbone.configure()
        counted: list[int] = []
        # The first module of the layer: recomputing stops as soon as nothing is missing, inside the last one.
        backbone.model.language_model.layers[0].input_layernorm.register_forward_hook(
            lambda *_, counted=counted: counted.append(1)
        )
        uneven_loss(backbone, inputs).backward()
        found[checkpointing], calls[checkpointing] = gradients(backbone), len(counted)
    assert calls == {False: 1, True: 2}
    assert relative_difference(found[True], found[False]) < ROUNDING


def uneven_loss(backbone: VisionLanguageModel, inputs: Inputs) -> Tensor:
    hidden = backbone(inputs)[inputs["attention_mask"] == 1]
    return (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).sum()


def test_dropout_is_on_until_somebody_measures(checkpoint: Path, tmp_path: Path) -> None:
    backbone = Qwen3VL(str(edit_text_config(checkpoint, tmp_path / "dropout", attention_dropout=0.5)))
    backbone.configure()
    assert all(module.training for module in backbone.modules())
    inputs = backbone.preprocessor([item("some words")])
    assert not torch.allclose(backbone(inputs), backbone(inputs), atol=1e-3)
    backbone.eval()
    assert torch.equal(backbone(inputs), backbone(inputs))
