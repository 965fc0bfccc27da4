"""Backbones are loaded as a config says, and give transformers' own hidden states, whatever shares the batch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import building
import other_models
import pytest
import torch
from building import assert_alone_as_mixed, gradients, item, mixed_items, picture, relative_difference
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor, AutoTokenizer, BertConfig, Qwen3Config
from videos import film

from vlmembed.adapters import LoRA
from vlmembed.backbones import Qwen3VL, TemplateFile, VisionLanguageModel, base, chat_templates
from vlmembed.types import Inputs, Item, Part

#: Sums in float32 in another order: hidden states are of size one after the norm, and have passed through few layers.
ROUNDING = 1e-5
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
    return building.backbone(checkpoint, **options).eval()


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


@torch.no_grad()
def test_an_item_alone_equals_itself_in_a_mixed_batch(backbone: Qwen3VL, items: list[Item]) -> None:
    assert_alone_as_mixed(backbone, items, ROUNDING)


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


@torch.no_grad()
def test_bidirectional_is_is_causal_false_in_the_text_config(
    checkpoint: Path, backbone: Qwen3VL, tmp_path: Path
) -> None:
    edited = shutil.copytree(checkpoint, tmp_path / "bidirectional")
    edit_text_config(edited, is_causal=False)
    inputs = backbone.preprocessor([item("some words"), item(picture(64, 32), "more")])
    expected = AutoModel.from_pretrained(edited)(**inputs).last_hidden_state
    kept = inputs["attention_mask"] == 1
    found = load(checkpoint, bidirectional=True)(inputs)
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=ROUNDING)


def edit_text_config(folder: Path, **changes: Any) -> None:
    edit(folder / "config.json", text_config=json.loads((folder / "config.json").read_text())["text_config"] | changes)


@pytest.mark.parametrize("adapted", [False, True])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(checkpoint: Path, adapted: bool) -> None:
    """A layer runs a second time in the backward pass; also if its weights are frozen, and its inputs constants."""
    inputs = Qwen3VL(str(checkpoint)).make_preprocessor()([item("words"), item(picture(64, 64), "more")])
    found, calls = {}, {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = building.backbone(checkpoint, gradient_checkpointing=checkpointing)
        if adapted:
            LoRA(LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])).apply(backbone)
        counted: list[int] = []
        # The first module of the layer: recomputing stops as soon as nothing is missing, inside the last one.
        name = next(name for name, _ in backbone.named_modules() if name.endswith(".layers.0.input_layernorm"))
        backbone.get_submodule(name).register_forward_hook(lambda *_, counted=counted: counted.append(1))
        uneven_loss(backbone, inputs).backward()
        found[checkpointing], calls[checkpointing] = gradients(backbone), len(counted)
    assert calls == {False: 1, True: 2}
    assert all(gradient.any() for gradient in found[True].values()) or not adapted
    assert relative_difference(found[True], found[False]) < ROUNDING


def uneven_loss(backbone: VisionLanguageModel, inputs: Inputs) -> Tensor:
    hidden = backbone(inputs)[inputs["attention_mask"] == 1]
    return (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).sum()


def test_dropout_is_on_until_somebody_measures(checkpoint: Path, tmp_path: Path) -> None:
    edit_text_config(shutil.copytree(checkpoint, tmp_path / "dropout"), attention_dropout=0.5)
    backbone = building.backbone(tmp_path / "dropout")
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
    model = mock.MagicMock(**{"get_input_embeddings.return_value.num_embeddings": 9999})
    opened = (model, {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []})
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


WEIGHTS, INDEX, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
UP, BIAS = "model.language_model.layers.1.mlp.up_proj.weight", "model.visual.merger.norm.bias"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def reweigh(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Change weights by name; None removes one."""
    weights = load_file(folder / WEIGHTS) | changes
    present = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(present, folder / WEIGHTS, {"format": "pt"})


def shard(folder: Path, lost: str = "", **index: Any) -> None:
    """Cut the weights in two files with an index, and lose a file, or a weight."""
    weights = load_file(folder / WEIGHTS)
    files = {name: f"model-{1 + number % 2}.safetensors" for number, name in enumerate(weights)}
    for file in {*files.values()} - {lost}:
        part = {name: weight for name, weight in weights.items() if files[name] == file and name != lost}
        save_file(part, folder / file, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps(index or {"metadata": {}, "weight_map": files}))


def adapt(folder: Path, into: str = "", removed: Sequence[str] = ()) -> None:
    """Write an adapter into a checkpoint's folder, and remove files."""
    model = get_peft_model(AutoModel.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder / into)
    for name in removed:
        (folder / name).unlink()


LAYER_0 = "language_model.layers.0.mlp"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (shutil.rmtree, "Cannot open the checkpoint '.*/broken'"),
    "an empty folder": (lambda at: [file.unlink() for file in at.iterdir()], "broken': .* its config.json"),
    "a file": (lambda at: shutil.rmtree(at) or at.write_text("x"), "Cannot open the checkpoint '.*/broken'"),
    "no configuration": (lambda at: (at / "config.json").unlink(), "broken': .* in its config.json"),
    "half a configuration": (lambda at: cut(at / "config.json", 99), "broken/config.json is not JSON"),
    "a depth of words": (lambda at: edit(at / "config.json", vision_config={"depth": "x"}), "broken': .*'depth'"),
    "no processor": (lambda at: (at / "processor_config.json").unlink(), "broken': .*preprocessor_config.json"),
    "half a processor": (lambda at: cut(at / "processor_config.json", 9), "broken/processor_config.json is not JSON"),
    "no tokenizer": (lambda at: (at / TOKENIZER).unlink(), "broken' knows no words. Is its tokenizer.json"),
    "half a tokenizer": (lambda at: cut(at / TOKENIZER, 999), "broken/tokenizer.json is not JSON"),
    "another's tokenizer": (
        lambda at: edit(at / "config.json", image_token_id=5),
        "processor's image_token_id is 6, and config.json has 5",
    ),
    "no chat template": (lambda at: (at / "chat_template.jinja").unlink(), "broken' has no chat template"),
    "no weights": (lambda at: (at / WEIGHTS).unlink(), "broken' has no model.safetensors"),
    "half the weights": (lambda at: cut(at / WEIGHTS, 200_000), "broken/model.safetensors is not whole"),
    "a pointer of git-lfs": (lambda at: (at / WEIGHTS).write_text("version https://"), "broken/model.* not whole"),
    "no bytes": (lambda at: cut(at / WEIGHTS, 0), "broken/model.safetensors is not whole"),
    "a lost shard": (lambda at: shard(at, "model-2.safetensors"), "broken' has no model-2.safetensors"),
    "half a shard": (
        lambda at: shard(at) or cut(at / "model-1.safetensors", 999),
        "broken/model-1.safetensors is not whole",
    ),
    "a weight that no shard has": (lambda at: shard(at, UP), "broken' lacks language_model.layers.1.mlp.up_proj"),
    "an index of nothing": (lambda at: shard(at, weights={}), "broken' has no model.safetensors"),
    "half an index": (lambda at: shard(at) or cut(at / INDEX, 9), "broken/model.*index.json is not JSON"),
    "two weights missing": (
        lambda at: reweigh(at, {UP: None, BIAS: None}),
        r"lacks language_model.layers.1.mlp.up_proj.weight, visual.merger.norm.bias: .* would be random",
    ),
    "names of another class": (
        lambda at: reweigh(at, {name: None for name in load_file(at / WEIGHTS) if "visual" in name}),
        r"lacks visual\..* and \d+ more: ",
    ),
    "a layer more in the configuration": (
        lambda at: edit_text_config(at, num_hidden_layers=3),
        r"lacks language_model.layers.2.input_layernorm.weight, .* and 6 more",
    ),
    "a weight of another shape": (
        lambda at: reweigh(at, {BIAS: torch.zeros(7)}),
        r"broken' has in another shape visual.merger.norm.bias \[7\]",
    ),
    "a configuration of another size": (
        lambda at: edit_text_config(at, intermediate_size=64),
        rf"has in another shape {LAYER_0}.down_proj.weight \[64, 128\], .* and 1 more",
    ),
    "another vocabulary": (
        lambda at: edit_text_config(at, vocab_size=999),
        "has in another shape language_model.embed_tokens.weight",
    ),
    "a tokenizer of more words": (
        lambda at: append_words(at, 500),
        r"broken' has \d+ tokens, its weights embed \d+: they are of two models",
    ),
    "an adapter beside the weights": (adapt, r"broken' has an adapter \(adapter_config.json\). Merge it"),
    "an adapter without its configuration": (
        lambda at: adapt(at, removed=["adapter_config.json"]),
        r"has an adapter \(adapter_model.safetensors\)",
    ),
    "an adapter alone": (
        lambda at: adapt(at, removed=["config.json", WEIGHTS]),
        r"has an adapter \(adapter_config.json\). Merge it into its base model",
    ),
}


def append_words(folder: Path, count: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<word {number}>" for number in range(count)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_checkpoint_that_is_not_whole_is_refused(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    """By folder and file; transformers draws what is missing at random, and goes on, or fails without a name."""
    damage(shutil.copytree(checkpoint, tmp_path / "broken"))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "broken")


def stage(folder: Path, kind: str, file: str = WEIGHTS) -> None:
    """Make a folder of an earlier stage, with a module of two weights."""
    modules = [{"path": "", "type": "base.Transformer"}, {"path": "1", "type": "Pooling"}, {"path": "2", "type": kind}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2").mkdir()
    (folder / "2" / file).write_bytes(b"weights")


def prompt(folder: Path, **prompts: str) -> None:
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda at: stage(at, "models.Dense"), "weights of Dense (modules.json)"),
        (lambda at: stage(at, "served_pooling.ServedPooling", "pytorch_model.bin"), "weights of ServedPooling"),
        (lambda at: stage(at, "models.Normalize", "config.json"), ""),
        (lambda at: prompt(at, query="Find it.", document=""), "the prompt 'Find it.' for a query"),
        (lambda at: prompt(at, query=base.DEFAULT_INSTRUCTION), ""),
        (lambda at: adapt(at, "lora"), "an adapter in lora/"),
        (lambda at: edit_text_config(at, num_hidden_layers=1), "no place for (model.language_model.layers.1."),
        (
            lambda at: reweigh(at, {f"{UP}.lora_A.weight": torch.zeros(4, 4)}),
            f"no place for ({UP}.lora_A.weight)",
        ),
        (lambda at: reweigh(at, {"lm_head.weight": torch.zeros(4, 64)}), ""),
        (shard, ""),
    ],
)
def test_what_a_checkpoint_has_besides_is_said_to_be_left_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], said: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "more")
    change(folder)
    capsys.readouterr()
    load(folder)
    lines = [line for line in capsys.readouterr().out.splitlines() if "are not loaded" in line]
    assert len(lines) == bool(said)
    assert all(line.startswith(f"{folder} has ") and said in line for line in lines)


PART = "{{ part.text if part.type == 'text' else '<|' + part.type + '_pad|>' }}"
#: Renders everything.
WHOLE = "{% for m in messages %}{{ m.role }}{% for part in m.content %}" + PART + "{% endfor %}{% endfor %}"
LOSSES = {
    "a fixed text": (WHOLE.replace("part.text", "'a text'"), "texts of the {role}"),
    "the end of long texts": (WHOLE.replace("part.text", "part.text[:9000]"), "texts of the {role}"),
    "long texts": (WHOLE.replace("m.content", "m.content if not part.text or part.text|length < 9000"), "texts of the"),
    "texts behind images": (
        WHOLE.replace("m.content", "m.content if part.type == 'image' or loop.first"),
        "texts of the",
    ),
    "images": (WHOLE.replace("m.content", "m.content if part.type == 'text'"), "images of the {role}"),
    "all but the first part": (WHOLE.replace("m.content", "m.content[:1]"), "images of the {role}"),
    "images without a text": (WHOLE.replace("m.content", "m.content if m.content|length > 1"), "images of the {role}"),
    "all but one image": (
        "{% for m in messages %}{{ m.content|selectattr('type', 'eq', 'image')|map(attribute='type')|first }}"
        "{{ m.content|map(attribute='text')|join }}{% endfor %}",
        "images of the {role}",
    ),
    "all before an answer": ("{% if not add_generation_prompt %}" + WHOLE + "{% endif %}", "images of .* texts of"),
    "everything": ("hello", "texts of the {role}"),
    "a misspelt word": (WHOLE.replace("endfor", "endfro"), "cannot be rendered for"),
    "its own error": ("{{ raise_exception('no') }}", "cannot be rendered for .*: no"),
    "a missing field": ("{{ messages[0].content.no.thing }}", "cannot be rendered for"),
    # What templates of language models without eyes do.
    "a list as a text": ("{{ 'a' + messages[0].content }}", "cannot be rendered for .*: TypeError"),
    "a range": ("{% for i in range(10**9) %}x{% endfor %}" + WHOLE, "cannot be rendered .*Range too big"),
    "loops in loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + WHOLE,
        "cannot be rendered .*it takes more than 1 seconds",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + WHOLE, "cannot be rendered .*RecursionError"),
    "a huge string": ("{{ 'a' * 10**10 }}" + WHOLE, "cannot be rendered .*MemoryError"),
    "a huge width": ("{{ '%10000000000d' % 1 }}" + WHOLE, "cannot be rendered .*MemoryError"),
    "a string that doubles": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}" + WHOLE,
        "cannot be rendered .*(MemoryError|more than 1 seconds)",
    ),
    "a huge number": ("{{ 3 ** (10 ** 9) }}" + WHOLE, "cannot be rendered .*it takes more than 1 seconds"),
}


#: Those that are tried in pairs too, in short: they are rendered by the same code.
OF_PAIRS = ("a fixed text", "images without a text", "a huge number")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "item") for name in LOSSES),
        *(
            (name, "pair") if name in OF_PAIRS else pytest.param(name, "pair", marks=pytest.mark.exhaustive)
            for name in LOSSES
        ),
    ],
)
def test_a_template_that_loses_something_or_never_ends_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    template, message = LOSSES[name]
    monkeypatch.setattr(chat_templates, "SECONDS", 1)
    if kind == "item":
        file, read = shutil.copytree(checkpoint, tmp_path / "own") / "chat_template.jinja", None
    else:
        (tmp_path / "own").mkdir()
        file = tmp_path / "own" / "pairs.jinja"
        file.write_text(WHOLE)
        read = TemplateFile(str(file))
    backbone = Qwen3VL(str(checkpoint if read else tmp_path / "own"))
    for content in (WHOLE, WHOLE.replace("part.text", "part.text|trim")):
        file.write_text(content)
        backbone.make_preprocessor(read)
    file.write_text(template)
    message = message.format(role="query" if read else "user")
    with pytest.raises(ValueError, match=f"{file if read else file.parent}'? .*{message}"):
        backbone.make_preprocessor(read)


def test_a_template_may_refuse_several_images_aloud(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "own")
    refusal = "{% if messages[-1].content|length > 2 %}{{ raise_exception('one image') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusal + WHOLE)
    preprocessor = Qwen3VL(str(folder)).make_preprocessor()
    several = Item("document", (Part("text", "a"),) * 3, "train.jsonl, row 7")
    with pytest.raises(ValueError, match=r"row 7: .*refuses it \(one image\)"):
        preprocessor([several])


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ("messages if m.role != 'system'", "drops the system message: .* set query_instruction"),
        ("messages if messages|length == 2", "drops images of the user and texts of the user"),
        ("messages if messages|length == 2 or m.content|length == 1", "drops images of the user and texts of the user"),
    ],
)
def test_queries_may_have_no_instruction(checkpoint: Path, tmp_path: Path, shown: str, message: str) -> None:
    """And then have to be rendered without a system message."""
    folder = shutil.copytree(checkpoint, tmp_path / "own")
    backbone = Qwen3VL(str(folder), query_instruction=None)
    (folder / "chat_template.jinja").write_text(WHOLE.replace("messages", shown))
    with pytest.raises(ValueError, match=message):
        backbone.make_preprocessor()


@pytest.mark.parametrize(("role", "other"), [("query", "document"), ("document", "query")])
def test_a_template_reads_both_of_a_pair(checkpoint: Path, tmp_path: Path, role: str, other: str) -> None:
    (tmp_path / "pairs.jinja").write_text(WHOLE.replace("messages", f"messages if m.role == '{role}'"))
    with pytest.raises(ValueError, match=rf"drops images of the {other} and texts of the {other}: it has to"):
        Qwen3VL(str(checkpoint)).make_preprocessor(TemplateFile(str(tmp_path / "pairs.jinja")))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (item("words", picture(64, 64)), "chat template leaves out an image or a video"),
        (
            Item("document", (Part("video", (picture(64, 64, 1), picture(64, 64, 2))),)),
            "0 <.video_pad.> tokens and 1 vid",
        ),
    ],
)
def test_what_a_template_leaves_out_later_is_refused_there(
    checkpoint: Path, tmp_path: Path, document: Item, message: str
) -> None:
    """An image beside words that no probe has; and a video, which no probe is."""
    folder = shutil.copytree(checkpoint, tmp_path / "own")
    shown = "m.content if part.type == 'text' or part.type == 'image' and m.content[0].text != 'words'"
    (folder / "chat_template.jinja").write_text(WHOLE.replace("m.content", shown))
    preprocessor = Qwen3VL(str(folder)).make_preprocessor()
    with pytest.raises(ValueError, match=message):
        preprocessor.prepare([document])


FAMILIES = {
    "Qwen2.5-VL": (other_models.qwen2_5_vl, VisionLanguageModel),
    "Qwen3-VL-MoE": (other_models.qwen3_vl_moe, Qwen3VL),
    "Idefics3": (other_models.idefics3, VisionLanguageModel),
}


@pytest.fixture(scope="module", params=FAMILIES)
def relative(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    """A backbone of another family."""
    write, backbone_class = FAMILIES[request.param]
    return building.backbone(write(tmp_path_factory.mktemp("families") / "tiny"), backbone_class).eval()


@torch.no_grad()
def test_other_families_encode_an_item_alone_as_in_a_mixed_batch(relative: VisionLanguageModel) -> None:
    items = [kind for kind in mixed_items() if all(part.kind != "video" for part in kind.parts)]
    assert_alone_as_mixed(relative, items, ROUNDING)


@torch.no_grad()
def test_other_families_see_their_images(relative: VisionLanguageModel) -> None:
    """Two pictures of one size differ in no token, so their difference comes through the vision tower."""
    one, other = (relative.preprocessor([item(picture(64, 64, seed), "a caption")]) for seed in (0, 1))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert (relative(one) - relative(other))[0, -1].abs().max() > 100 * ROUNDING


@torch.no_grad()
def test_other_families_can_be_bidirectional(relative: VisionLanguageModel) -> None:
    backbone = building.backbone(relative.checkpoint, type(relative), bidirectional=True).eval()
    one = relative.preprocessor([item("some words")])
    other = {**one, "input_ids": one["input_ids"].clone()}
    other["input_ids"][0, -1] = 7
    assert (relative(one) - relative(other))[0, 0].abs().max() == 0
    assert (backbone(one) - backbone(other))[0, 0].abs().max() > 100 * ROUNDING


def test_gradients_reach_every_part_of_other_families(relative: VisionLanguageModel) -> None:
    inputs = relative.preprocessor([item("words"), item(picture(64, 32), "more")])
    uneven_loss(relative, inputs).backward()
    reached = {name for name, gradient in gradients(relative).items() if gradient.any()}
    relative.zero_grad()
    layers = {match[1] for name in reached if (match := re.search(r"(?:language|text)_model\.layers\.(\d)", name))}
    assert layers == {"0", "1"}
    assert any(relative.group_of(name) == "vision" for name in reached)
