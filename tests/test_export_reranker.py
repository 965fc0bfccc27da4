"""A cross-encoder is served as it was trained: on logits, in both forms, with every head."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import building
import pytest
import torch
from building import export
from peft import LoraConfig
from safetensors import safe_open
from sentence_transformers import CrossEncoder
from torch import Tensor

from vlmembed import pooling as zoo
from vlmembed.adapters import LoRA
from vlmembed.backbones import DocumentFirst, QueryFirst, tiny
from vlmembed.backbones.chat_templates import PairTemplate
from vlmembed.encoder import Scorer
from vlmembed.export import ExportError, SentenceTransformers
from vlmembed.export.sentence_transformers import Scoring
from vlmembed.export.verify import HALF_PRECISION_TOLERANCE, TOLERANCE, Check, as_input, brings_code, expect, verify
from vlmembed.files import read_json
from vlmembed.heads import MLP, Linear, ScoreHead, YesNo


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose language-model head has weights of its own."""
    folder = tmp_path_factory.mktemp("checkpoint") / "untied"
    tiny.create(folder, hidden_size=64, layers=2, heads=2, vision_hidden_size=32, tie_word_embeddings=False)
    return folder


def scorer(checkpoint: Path, head: ScoreHead, template: PairTemplate | None = None, **options: Any) -> Scorer:
    """With random weights: those that are as in the checkpoint would hide that they were left behind."""
    torch.manual_seed(0)
    # Much of the time would go to the attention of the long text.
    built = building.scorer(checkpoint, head, template, **{"max_length": 512, **options})
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return built


def served(folder: Path, check: Check, **options: Any) -> Tensor:
    """The logits of an exported folder, opened here: of each side of padding, one after the other."""
    model = CrossEncoder(str(folder), device="cpu", trust_remote_code=brings_code(folder))
    inputs = [(as_input(query), as_input(document)) for query, document in check.inputs]
    options |= {"activation_fn": torch.nn.Identity(), "batch_size": len(inputs), "convert_to_tensor": True}
    scores = []
    for side in check.sides:
        model.tokenizer.padding_side = side
        scores.append(model.predict(inputs, **options))
    return torch.cat(scores)


def expected(check: Check) -> Tensor:
    return check.expected["pair"][:, 0].repeat(len(check.sides))


def assert_served(folder: Path, check: Check, **options: Any) -> None:
    scores = served(folder, check, **options)
    torch.testing.assert_close(scores, expected(check), atol=TOLERANCE, rtol=0)
    assert scores.std() > 100 * TOLERANCE  # Not all the same.


# In a process that cannot import vlmembed


def test_both_forms_are_served_as_trained(untied: Path, tmp_path: Path) -> None:
    """With an adapter to merge, and rows of the language-model head that were trained."""
    trained = scorer(untied, YesNo())
    adapter = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj", "qkv"], init_lora_weights=False)
    LoRA(adapter).apply(trained.backbone)
    forms = {"dense": ("left", "right"), "logits": ("left",)}
    checks = {form: expect(trained, tmp_path, sides=sides) for form, sides in forms.items()}
    folders = {export(trained, tmp_path / form, form): check for form, check in checks.items()}
    for folder, verification in zip(folders, verify(folders), strict=True):
        assert verification.passed
        # Pairs; alone, in batches, ranked.
        assert verification.comparisons == 11 * (1 + len(verification.check.sides) + 1)
        requirement = read_json(folder / "config_sentence_transformers.json")["requirements"]["sentence_transformers"]
        assert requirement == ">=5.6"


# Here


NUMBER = """
from torch import Tensor
from vlmembed.pooling import Pooling


class Number(Pooling):
    def dimension(self, hidden_size: int) -> int:
        return 1

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        return hidden[:, :, :3].masked_fill(mask[..., None] == 0, -9.0).amax(dim=(1, 2))[:, None]
"""


@pytest.fixture(scope="module", autouse=True)
def _number(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user's own file, with a pooling that ends in a number."""
    folder = tmp_path_factory.mktemp("number")
    (folder / "number_pooling.py").write_text(NUMBER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


HEADS: dict[str, Callable[[], ScoreHead]] = {
    "yes or no": YesNo,
    "linear": lambda: Linear(zoo.LastToken()),
    "linear, mean": lambda: Linear(zoo.Mean()),
    "linear, several": lambda: Linear(zoo.Concatenation([zoo.Max(), zoo.LastToken()])),
    "MLP": lambda: MLP(zoo.EndToken(), 24),
    "MLP of earlier layers": lambda: MLP(zoo.LayerMix(zoo.Mean(), 2), 24),
    "projection of a projection": lambda: Linear(zoo.Projection(zoo.LastToken(), 16)),
    "read-out": lambda: Linear(zoo.LearnedTokens(2)),
    "text": lambda: Linear(zoo.MeanOfText()),
    "attention": lambda: MLP(zoo.EarlierLayer(zoo.Attention(2)), 24),
    "own": lambda: ScoreHead(importlib.import_module("number_pooling").Number()),
}


@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_served_as_trained(checkpoint: Path, tmp_path: Path, name: str) -> None:
    head = HEADS[name]()
    SentenceTransformers().check(head)
    trained = scorer(checkpoint, head, DocumentFirst("Find it.") if name == "attention" else None)
    check = expect(trained, tmp_path)
    assert_served(export(trained, tmp_path / "export").rename(tmp_path / "moved to"), check)


def test_the_two_forms_score_alike_bidirectionally_with_tied_weights(checkpoint: Path, tmp_path: Path) -> None:
    trained = scorer(checkpoint, YesNo(), bidirectional=True)
    check = expect(trained, tmp_path, sides=["left"])
    for scoring in ("dense", "logits"):
        assert_served(export(trained, tmp_path / scoring, scoring), check)


def test_the_language_model_head_keeps_its_other_rows(untied: Path, tmp_path: Path) -> None:
    trained = scorer(untied, YesNo("zero", "one"))
    export(trained, tmp_path, "logits")
    score = read_json(tmp_path / "1_LogitScore" / "config.json")
    tokenizer = trained.backbone.preprocessor.processor.tokenizer
    words = {"true_token_id": "zero", "false_token_id": "one"}
    assert {name: tokenizer.decode([score[name]]) for name in words} == words
    rows = [score[name] for name in words]
    with safe_open(untied / "model.safetensors", "pt") as fresh, safe_open(tmp_path / "model.safetensors", "pt") as now:
        before, after = (each.get_tensor("lm_head.weight") for each in (fresh, now))
    assert torch.equal(after[rows], trained.pooling.weights)  # type: ignore[arg-type]
    after[rows] = before[rows]
    assert torch.equal(after, before)


def test_the_files(checkpoint: Path, tmp_path: Path) -> None:
    export(scorer(checkpoint, YesNo(), QueryFirst("Find it."), max_length=300), tmp_path)
    config = read_json(tmp_path / "config_sentence_transformers.json")
    assert (config["model_type"], config["activation_fn"]) == ("CrossEncoder", "torch.nn.modules.activation.Sigmoid")
    assert (config["prompts"], config["default_prompt_name"]) == ({}, None)
    assert read_json(tmp_path / "sentence_bert_config.json")["processing_kwargs"]["chat_template"] == {
        "add_generation_prompt": True,
        "chat_template": "reranker",
    }
    template = tmp_path / "additional_chat_templates" / "reranker.jinja"
    assert template.read_text() == QueryFirst("Find it.").source
    assert (tmp_path / "chat_template.jinja").read_text() == (checkpoint / "chat_template.jinja").read_text()
    assert read_json(tmp_path / "tokenizer_config.json")["model_max_length"] == 300
    assert [entry["path"] for entry in read_json(tmp_path / "modules.json")] == ["", "1_Pooling", "2_Dense"]


def test_an_exported_reranker_is_a_checkpoint_too(checkpoint: Path, tmp_path: Path) -> None:
    """To train on from, with another template: that of the first training does not come back."""
    first = export(scorer(checkpoint, YesNo(), max_length=None), tmp_path / "first")
    trained = scorer(first, YesNo(), DocumentFirst(), max_length=None)
    check = expect(trained, tmp_path)
    assert_served(export(trained, tmp_path / "second"), check)
    config = read_json(tmp_path / "second" / "config_sentence_transformers.json")
    assert config["requirements"]["sentence_transformers"] == ">=5.5"


def test_a_prompt_takes_the_instructions_place(checkpoint: Path, tmp_path: Path) -> None:
    check = expect(scorer(checkpoint, YesNo(), QueryFirst("Find it.")), tmp_path)
    assert_served(export(scorer(checkpoint, YesNo()), tmp_path), check, prompt="Find it.")


def test_documents_are_cut_as_in_training(checkpoint: Path, tmp_path: Path) -> None:
    """The end of a long document, and not of the template behind it."""
    trained = scorer(checkpoint, YesNo(), max_length=300)
    check = expect(trained, tmp_path)
    assert "text – long text" in check.names
    assert len(trained.backbone.preprocessor.processor.tokenizer(check.inputs[0][1])["input_ids"]) > 300
    assert_served(export(trained, tmp_path), check)


def test_a_pair_that_the_model_refuses_is_not_compared(checkpoint: Path, tmp_path: Path) -> None:
    """Behind a document that is too long, the query would be cut."""
    whole = expect(scorer(checkpoint, YesNo(), DocumentFirst(), max_length=None), tmp_path)
    check = expect(scorer(checkpoint, YesNo(), DocumentFirst(), max_length=300), tmp_path)
    assert set(whole.names) - set(check.names) == {"text – long text"}
    assert check.left_out == ("text – long text",)
    with pytest.raises(ExportError, match=r"reads none of the inputs .* max_length=20"):
        expect(scorer(checkpoint, YesNo(), DocumentFirst(), max_length=20), tmp_path)


@pytest.mark.parametrize("scoring", ["dense", "logits"])
def test_half_precision_answers_in_float32(checkpoint: Path, tmp_path: Path, scoring: Scoring) -> None:
    """Logits of equal size would tie in bfloat16, which has 8 bits for each."""
    trained = scorer(checkpoint, YesNo(), dtype="bfloat16")
    check = expect(trained, tmp_path, sides=["left"])
    scores = served(export(trained, tmp_path, scoring), check)
    torch.testing.assert_close(scores, expected(check), atol=HALF_PRECISION_TOLERANCE, rtol=0)
    assert not torch.equal(scores, scores.bfloat16().float())


# What is tolerated, and what is refused


@pytest.mark.parametrize(
    ("difference", "largest", "dtype", "passed"),
    [
        (0.9e-5, 0.1, "float32", True),
        (1.1e-5, 0.1, "float32", False),
        (0.9e-4, 10.0, "float32", True),
        (0.04, 0.1, "bfloat16", True),
        (0.05, 0.1, "bfloat16", False),
        (float("nan"), 0.1, "float32", False),
        (float("nan"), float("nan"), "bfloat16", False),
    ],
)
def test_the_tolerance_grows_with_the_logits(difference: float, largest: float, dtype: str, passed: bool) -> None:
    logits = torch.tensor([[0.0], [-largest]], dtype=torch.float64)
    check = Check(("text", "image"), [], (), {"pair": logits}, (), ("left",), "cpu", dtype)
    served = logits[:, 0] + torch.tensor([0.0, difference], dtype=torch.float64)
    verification = check.compare({"pair//ranked": served, "pair//batch of 1": logits[:, 0].nan_to_num()})
    assert verification.passed is passed
    assert verification.worst.startswith("'image' as pair")
    assert verification.comparisons == 4


class Doubled(YesNo):
    def score(self, pooled: Tensor) -> Tensor:
        return 2 * super().score(pooled)


class Sure(YesNo):
    """Ours in all but name."""


class Unknown(zoo.Mean):
    def __init__(self, size: int) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (Doubled(), {}, "Doubled cannot be exported: it has a score of its own"),
        (Linear(Unknown(3)), {}, "Unknown cannot be exported: .* 'size' as self.size"),
        (Linear(zoo.LastToken()), {"reranker_scoring": "logits"}, "Linear does not score by. Use vlmembed.heads.YesNo"),
        (YesNo(), {"truncate_dim": 8}, "truncate_dim=8 is for embeddings"),
        (zoo.LastToken(), {"reranker_scoring": "logits"}, "reranker_scoring=logits is for rerankers"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_training(
    head: zoo.Pooling, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SentenceTransformers(**options).check(head)


@pytest.mark.parametrize("scoring", ["dense", "logits"])
def test_what_can_be_exported_is_not(scoring: Scoring) -> None:
    SentenceTransformers(reranker_scoring=scoring).check(Sure())
