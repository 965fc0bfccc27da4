"""Tokens that a pooling appends end every item, in training as in serving, and learned ones are learned."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from building import encoder, gradients, item, mixed_items, relative_difference

from vlmembed.adapters import Freeze
from vlmembed.backbones import QueryFirst, Qwen3VL
from vlmembed.encoder import Encoder, Scorer
from vlmembed.heads import YesNo
from vlmembed.pooling import EndToken, LastToken, LearnedTokens, Mean, Pooling, Projection
from vlmembed.types import Inputs

#: Sums in float32 in another order.
ROUNDING = 1e-5


def last_tokens(built: Encoder, inputs: Inputs, count: int) -> list[list[str]]:
    tokenizer = built.backbone.preprocessor.processor.tokenizer
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return [tokenizer.convert_ids_to_tokens(ids[mask])[-count:] for ids, mask in rows]


@pytest.mark.parametrize("max_length", [None, 40])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_every_item_ends_with_them(checkpoint: Path, max_length: int | None, generation_prompt: bool) -> None:
    """Also one that is cut."""
    options = {"max_length": max_length, "generation_prompt": generation_prompt}
    for pooling, expected in (
        (EndToken(), ["<|endoftext|>"]),
        (LearnedTokens(2), ["<|read_out_0|>", "<|read_out_1|>"]),
        (Projection(EndToken("<|im_end|>"), 8), ["<|im_end|>"]),
    ):
        built = encoder(checkpoint, pooling, **options)
        items = [item("many words " * 40), item("few", role="query")] if max_length else mixed_items()
        inputs = built.backbone.preprocessor(items)
        assert last_tokens(built, inputs, len(expected)) == [expected] * len(items)
        assert max_length is None or inputs["input_ids"].shape[1] == max_length


def test_nothing_else_changes(checkpoint: Path) -> None:
    plain, ended = (encoder(checkpoint, pooling) for pooling in (LastToken(), EndToken()))
    before, after = (built.backbone.preprocessor(mixed_items()) for built in (plain, ended))
    for row, mask in enumerate(before["attention_mask"].bool()):
        count = int(mask.sum())
        assert torch.equal(before["input_ids"][row, :count], after["input_ids"][row, :count])
        assert int(after["attention_mask"][row].sum()) == count + 1


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_learned_embeddings_are_what_their_tokens_read(checkpoint: Path, attention: str) -> None:
    """Packed or padded: as if they were rows of the checkpoint's own table."""
    torch.manual_seed(0)
    built = encoder(checkpoint, LearnedTokens(3, "concatenation"), attn_implementation=attention)
    inputs = built.backbone.preprocessor(mixed_items())
    found = built(inputs).detach()
    table = built.backbone.model.get_input_embeddings()
    first = built.backbone.preprocessor.processor.tokenizer.convert_tokens_to_ids("<|read_out_0|>")
    with torch.no_grad():
        table.weight[first : first + 3] = built.pooling.token_embeddings
    table._forward_hooks.clear()
    torch.testing.assert_close(built(inputs).detach(), found, rtol=0, atol=ROUNDING)


def test_learned_embeddings_learn_where_all_else_is_frozen(checkpoint: Path) -> None:
    built = encoder(checkpoint, LearnedTokens(2))
    Freeze(["vision", "merger", "language"]).apply(built.backbone)
    built(built.backbone.preprocessor(mixed_items())).square().sum().backward()
    found = gradients(built)
    assert list(found) == ["pooling.learned"]
    assert (found["pooling.learned"].norm(dim=1) > 0).all()


def test_their_gradient_is_that_of_rows_of_the_table(checkpoint: Path) -> None:
    torch.manual_seed(0)
    built = encoder(checkpoint, LearnedTokens(2))
    inputs = built.backbone.preprocessor(mixed_items())
    built(inputs).square().sum().backward()
    learned = built.pooling.token_embeddings.grad.clone()
    table = built.backbone.model.get_input_embeddings()
    with torch.no_grad():
        table.weight[-2:] = built.pooling.token_embeddings
    table._forward_hooks.clear()
    built.zero_grad()
    built(inputs).square().sum().backward()
    assert relative_difference({"": learned}, {"": table.weight.grad[-2:]}) < ROUNDING


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        (EndToken("<|no_such_token|>"), r"appends \['<\|no_such_token\|>'\] .* does not have"),
        (EndToken("two words"), "does not have"),
    ],
)
def test_tokens_that_the_checkpoint_lacks_are_refused(checkpoint: Path, pooling: Pooling, message: str) -> None:
    built = Encoder(Qwen3VL(str(checkpoint)), pooling)
    with pytest.raises(ValueError, match=message):
        _ = built.preprocessor


def test_learned_tokens_are_new_ones(checkpoint: Path) -> None:
    pooling = LearnedTokens(1)
    pooling.appended = ("<|endoftext|>",)
    built = Encoder(Qwen3VL(str(checkpoint)), pooling)
    with pytest.raises(ValueError, match=r"has already\. Rename"):
        built.configure()


def test_making_an_encoder_or_a_scorer_changes_no_backbone(checkpoint: Path) -> None:
    backbone = Qwen3VL(str(checkpoint))
    before = {name: copy.copy(value) for name, value in vars(backbone).items()}
    Encoder(backbone, LearnedTokens(1))
    Scorer(backbone, YesNo(), QueryFirst())
    assert vars(backbone) == before
    tokens = Encoder(backbone, Mean()).preprocessor([item("text")])["input_ids"]
    assert torch.equal(tokens, backbone.make_preprocessor()([item("text")])["input_ids"])
