"""The tiny fresh checkpoint opens and runs like any other Qwen3-VL."""

from __future__ import annotations

import pytest
import torch
from building import encoder, item, picture
from safetensors import safe_open
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, Qwen3VLProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

from vlmembed.backbones import tiny

SIZES = {"hidden_size": 48, "layers": 2, "heads": 2, "vision_hidden_size": 32, "vision_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    assert tiny.create(folder, **SIZES)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_carry_the_names_of_the_released_checkpoints(tmp_path, tied):
    tiny.create(tmp_path, **SIZES, tie_word_embeddings=tied)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "model.language_model.embed_tokens.weight" in names
    assert "model.visual.deepstack_merger_list.0.linear_fc1.weight" in names
    assert {".".join(name.split(".")[:2]) for name in names - {"lm_head.weight"}} == {
        "model.language_model",
        "model.visual",
    }
    assert ("lm_head.weight" in names) is not tied
    model, loading = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, Qwen3VLForConditionalGeneration)
    assert not loading["missing_keys"]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


def test_ids_agree_between_config_and_tokenizer(folder, processor):
    config = AutoModel.from_pretrained(folder).config
    tokenizer = processor.tokenizer
    assert isinstance(processor, Qwen3VLProcessor)
    assert config.text_config.vocab_size == len(tokenizer)
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert config.vision_end_token_id == tokenizer.convert_tokens_to_ids("<|vision_end|>")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert config.text_config.eos_token_id == tokenizer.eos_token_id


def test_special_tokens_and_answers_are_one_token_each(processor):
    ids = [processor.tokenizer.encode(text) for text in (*tiny.SPECIAL_TOKENS, "yes", "no")]
    assert [len(encoded) for encoded in ids] == [1] * len(ids)
    assert len({encoded[0] for encoded in ids}) == len(ids)


def test_every_byte_survives_tokenization(processor):
    text = "".join(map(chr, range(1, 0x250))) + " 漢字 ☃ 🙂"
    text = processor.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_template_writes_qwen_turns(processor):
    messages = [
        {"role": "system", "content": "Represent the user's input."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "  a {{b}}\n"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [{"type": "video"}]},
    ]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    turns = (
        "<|im_start|>system\nRepresent the user's input.<|im_end|>\n"
        f"<|im_start|>user\n{image}{image}  a {{{{b}}}}\n<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\n<|video_pad|><|im_end|>\n"
    )
    assert processor.apply_chat_template(messages) == turns
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == turns + "<|im_start|>assistant\n"


def test_template_refuses_what_it_does_not_know(processor):
    with pytest.raises(Exception, match="a text, an image or a video, not audio"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}])


def test_an_image_changes_the_answer(folder):
    built = encoder(folder)
    with torch.no_grad():
        first, second = built(built.preprocessor([item(picture(96, 32, seed)) for seed in range(2)]))
    assert (first - second).abs().max() > 1e-4


def test_the_seed_decides_the_weights_and_nothing_else_is_touched(tmp_path):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny.create(tmp_path / name, **SIZES, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == same
    assert first != other


def test_create_leaves_other_files_alone(tmp_path):
    assert tiny.create(tmp_path, **SIZES)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert not tiny.create(tmp_path, **SIZES)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with pytest.raises(FileExistsError, match=r"model.safetensors"):
        tiny.create(tmp_path, **SIZES, seed=1)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_command_line_can_be_repeated(tmp_path, capsys):
    folder = tmp_path / "new" / "tiny"
    tiny.main([str(folder)])
    assert "Wrote" in capsys.readouterr().out
    tiny.main([str(folder)])
    assert "already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        tiny.main([str(folder), "--seed", "1"])
    assert str(folder) in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="1"):
        tiny.main([str(tmp_path)])
    assert "model.safetensors" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"new", "notes.txt"}
