"""Score heads and templates of pairs: what transformers' own language model and a formula say, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from building import item, picture, ranker
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, log_softmax
from transformers import AutoModelForImageTextToText

from vlmembed.backbones import DocumentFirst, QueryFirst, Qwen3VL, TemplateFile, tiny
from vlmembed.backbones.base import label_token_ids
from vlmembed.backbones.chat_templates import PairTemplate
from vlmembed.encoder import Scorer
from vlmembed.heads import MLP, Linear, YesNo
from vlmembed.pooling import LastToken, Mean, MeanWithoutInstruction, Pooling
from vlmembed.types import Pair

PAIRS = [
    Pair(item("four zero seven", role="query"), item(picture(64, 96, 1))),
    Pair(item("what is this " * 9, picture(64, 64, 2), role="query"), item("a seven")),
    Pair(item("four", role="query"), item("seven")),
]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose language-model head has weights of its own."""
    folder = tmp_path_factory.mktemp("checkpoint") / "untied"
    tiny.create(folder, hidden_size=64, layers=2, heads=2, vision_hidden_size=32, tie_word_embeddings=False)
    return folder


# Yes and no


@pytest.mark.parametrize("tied", [True, False])
def test_yes_or_no_is_what_the_language_model_says(checkpoint: Path, untied: Path, tied: bool) -> None:
    folder = checkpoint if tied else untied
    model = ranker(folder, head=YesNo("zero", "one")).encoder.eval()
    theirs = AutoModelForImageTextToText.from_pretrained(folder).eval()
    padded = Qwen3VL(str(folder), attn_implementation="sdpa").make_preprocessor(QueryFirst())
    tokens = label_token_ids(padded.processor.tokenizer, ["zero", "one"])
    with torch.no_grad():
        found = model(model.backbone.preprocessor(PAIRS))
        for pair, score in zip(PAIRS, found, strict=True):
            logits = theirs(**padded([pair])).logits[0, -1]
            yes, no = log_softmax(logits, dim=0)[tokens]
            # Of 151,936 logits a softmax is taken and taken back: float32, once more.
            assert float(score) == pytest.approx(float(yes - no), abs=1e-5)
    assert found.std() > 1e-3


def test_yes_or_no_adds_no_weights_where_the_head_is_tied(checkpoint: Path, untied: Path) -> None:
    assert not [*ranker(checkpoint).encoder.pooling.parameters()]
    assert [tuple(weight.shape) for weight in ranker(untied).encoder.pooling.parameters()] == [(2, 64)]


def test_yes_or_no_trains_the_embeddings_of_both_words(checkpoint: Path) -> None:
    model = ranker(checkpoint).encoder
    tokens = label_token_ids(model.backbone.preprocessor.processor.tokenizer, ["yes", "no"])
    pooled = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    model.pooling.score(pooled).sum().backward()
    gradient = model.backbone.model.get_input_embeddings().weight.grad
    assert torch.allclose(gradient[tokens], torch.stack([pooled.sum(0), -pooled.sum(0)]))
    gradient[tokens] = 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("yes", "not at all"), r"'not at all' is \d tokens .* Choose another word"),
        (("", "no"), r"'' is 0 tokens"),
        (("no", "no"), r"are the same token; a score is the difference of two"),
    ],
)
def test_an_answer_is_one_token(checkpoint: Path, words: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranker(checkpoint, head=YesNo(*words))


def test_rows_are_found_in_a_checkpoint_of_several_files(untied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(untied, tmp_path / "shards")
    weights = load_file(folder / "model.safetensors")
    backbone = Qwen3VL(str(folder))
    backbone.configure()
    expected = weights["lm_head.weight"][[7, 3]]
    assert torch.equal(backbone.lm_head_rows([7, 3]), expected)
    head = {"lm_head.weight": weights.pop("lm_head.weight")}
    places = {**dict.fromkeys(weights, "first.safetensors"), **dict.fromkeys(head, "second.safetensors")}
    save_file(weights, folder / "first.safetensors", {"format": "pt"})
    save_file(head, folder / "second.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(backbone.lm_head_rows([7, 3]), expected)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places | {"lm_head.weight": "x"}}))
    with pytest.raises(ValueError, match="shards' has no x"):
        backbone.lm_head_rows([7, 3])
    (folder / "model.safetensors.index.json").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no lm_head.weight in safetensors.*vlmembed.heads.Linear"):
        backbone.lm_head_rows([1])


# Scores that are learned


@pytest.mark.parametrize("pooling", [LastToken, Mean])
@pytest.mark.parametrize("inner_size", [None, 3])
def test_a_learned_score(pooling: Callable[[], Pooling], inner_size: int | None) -> None:
    hidden, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    head = MLP(pooling(), inner_size) if inner_size else Linear(pooling())
    head.configure(8)
    states = pooling()(hidden, mask)
    if inner_size:
        inner = head.pooling.inner
        assert inner.weight.shape == (3, 8)
        states = gelu(states @ inner.weight.T + inner.bias)
    expected = states @ head.pooling.outer.weight[0] + head.pooling.outer.bias
    assert torch.allclose(head(hidden, mask)[:, 0], expected, atol=1e-6)
    assert head.dimension(8) == 1


def test_an_mlp_has_neurons() -> None:
    with pytest.raises(ValueError, match="got size=1, inner_size=0"):
        MLP(LastToken(), 0)


# Templates


def rendered(checkpoint: Path, template: PairTemplate, pair: Pair) -> str:
    preprocess = ranker(checkpoint, template=template).preprocessor
    decoded: str = preprocess.processor.tokenizer.decode(preprocess([pair])["input_ids"][0])
    return decoded


@pytest.mark.parametrize(
    ("template", "content"),
    [
        (QueryFirst, "<Query>:a question\n<Document>:an answer"),
        (DocumentFirst, "<Document>:an answer\n<Query>:a question"),
    ],
)
def test_a_pair_as_a_chat(checkpoint: Path, template: type[QueryFirst], content: str) -> None:
    """Quotes, line ends and what Jinja would read are as they were written."""
    given = template("Find 'it'\n in C:\\{{ one }}.", 'Say "yes".')
    expected = (
        '<|im_start|>system\nSay "yes".<|im_end|>\n'
        f"<|im_start|>user\n<Instruct>: Find 'it'\n in C:\\{{{{ one }}}}.{content}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert rendered(checkpoint, given, Pair(item("a question", role="query"), item("an answer"))) == expected


#: Renders everything; images as the checkpoint's own template does.
WHOLE = (
    "{% for m in messages %}{{ m.role }}{% for part in m.content %}"
    "{{ part.text if part.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% endfor %}{% endfor %}"
)


def test_a_template_of_ones_own(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(WHOLE)
    template = TemplateFile(str(tmp_path / "own.jinja"), ends_with_query=True)
    found = rendered(checkpoint, template, Pair(item("one", role="query"), item("two")))
    assert found == "queryonedocumenttwo"
    assert ranker(checkpoint, template=template).preprocessor.pair_template is template


def test_a_template_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.jinja: no such file"):
        TemplateFile(str(tmp_path / "none.jinja"))
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"TemplateFile .*bytes.jinja: not a text in UTF-8"):
        _ = TemplateFile(str(tmp_path / "bytes.jinja")).source


# What a scorer refuses


def test_instructions_are_the_templates(checkpoint: Path) -> None:
    backbone = Qwen3VL(str(checkpoint), query_instruction="Find it.")
    with pytest.raises(ValueError, match=r"{'query': 'Find it.'}, which no pair is read with: give model.template"):
        Scorer(backbone, YesNo(), QueryFirst())


def test_a_pooling_that_looks_for_an_instruction_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="MeanWithoutInstruction does not know"):
        Scorer(Qwen3VL(str(checkpoint)), Linear(MeanWithoutInstruction()), QueryFirst())
