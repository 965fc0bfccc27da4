"""Backbones are loaded as a config says, and give transformers' own hidden states, whatever shares the batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import other_models
import pytest
import torch
from building import gradients, item, mixed_items, picture, relative_difference
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor, BertConfig, Qwen3Config
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
