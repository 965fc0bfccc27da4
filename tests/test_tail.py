"""Leaving out what a pooling does not read changes nothing that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from building import gradients, mixed_items, relative_difference, texts
from other_models import qwen3_vl_moe
from peft import LoraConfig
from torch import Tensor, nn

from vlmembed.adapters import LoRA
from vlmembed.backbones import Qwen3VL
from vlmembed.backbones.attention import Bounds, LastTokens, Packed, packed_attention
from vlmembed.encoder import Encoder
from vlmembed.pooling import Concatenation, FirstToken, LastToken, Mean, Pooling

#: Sums in float32 in another order.
ROUNDING = 1e-5


class MeanOfLast(Pooling):
    """The mean of an item's last tokens."""

    def __init__(self, tokens: int, tail: int | None) -> None:
        super().__init__()
        self.tokens, self.num_last_tokens = tokens, tail

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        behind = mask.flip(1).cumsum(dim=1).flip(1)
        kept = (mask == 1) & (behind <= self.tokens)
        return hidden.masked_fill(~kept[..., None], 0.0).sum(dim=1) / kept.sum(dim=1, keepdim=True)


class Counter:
    """Counts the tokens that an MLP is called with."""

    def __init__(self, mlp: nn.Module) -> None:
        self.tokens: list[int] = []
        mlp.register_forward_hook(lambda _, arguments, __: self.tokens.append(arguments[0].shape[1]))


def embedded(encoder: Encoder) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings of every kind of item in two chunks, one of them without images, and gradients."""
    packed = encoder.backbone.preprocessor.prepare(mixed_items())
    features = encoder.encode_images(packed.images(28))
    embeddings = torch.cat([encoder(packed.chunk(rows), features) for rows in ([3, 1, 4, 2], [5, 0])])
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    encoder.zero_grad()
    (embeddings * noise).sum().backward()
    return embeddings.detach(), gradients(encoder)


@pytest.mark.parametrize("tokens", [1, 3, 40], ids=lambda tokens: f"last {tokens}")
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"gradient_checkpointing": True}, {"adapter": True}, {"mixture": True}],
    ids=["causal", "bidirectional", "checkpointing", "LoRA", "mixture of experts"],
)
def test_the_tail_is_what_it_would_be(checkpoint: Path, tmp_path: Path, options: dict[str, Any], tokens: int) -> None:
    adapted, mixture = (options.get(name, False) for name in ("adapter", "mixture"))
    model = qwen3_vl_moe(tmp_path / "moe") if mixture else checkpoint
    options = {name: value for name, value in options.items() if name not in ("adapter", "mixture")}
    encoder = Encoder(Qwen3VL(str(model), **options), MeanOfLast(tokens, None))
    encoder.configure()
    if adapted:
        torch.manual_seed(0)
        LoRA(LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)).apply(
            encoder.backbone
        )
    counter = Counter(encoder.backbone.model.language_model.layers[-1].mlp)
    expected, expected_gradients = embedded(encoder)
    every = counter.tokens[:2]
    counter.tokens.clear()
    encoder.pooling.num_last_tokens = tokens
    found, found_gradients = embedded(encoder)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    assert relative_difference(found_gradients, expected_gradients) < ROUNDING
    lengths = encoder.backbone.preprocessor.prepare(mixed_items()).lengths
    kept = [min(length, tokens) for length in lengths]
    assert every == [sum(lengths[row] for row in rows) for rows in ([3, 1, 4, 2], [5, 0])]
    assert counter.tokens[:2] == [sum(kept[row] for row in rows) for rows in ([3, 1, 4, 2], [5, 0])]


def test_what_is_left_out_is_not_a_number(checkpoint: Path) -> None:
    """A pooling that reads what it said it would not must not go on quietly."""
    backbone = Qwen3VL(str(checkpoint))
    backbone.configure()
    chunk = backbone.preprocessor.prepare([texts(1)[0].query]).chunk([0])
    states = backbone(chunk, num_last_tokens=2)
    assert states.isnan().all(dim=-1).tolist() == [[True] * (states.shape[1] - 2) + [False] * 2]
    assert not backbone(chunk, (-1, 1), num_last_tokens=2).isnan().any()


def test_images_that_enter_behind_the_last_layer_need_all_of_it(checkpoint: Path) -> None:
    backbone = Qwen3VL(str(checkpoint))
    backbone.configure()
    chunk = backbone.preprocessor.prepare([texts(1)[0].query]).chunk([0])
    vision = backbone.model.config.vision_config
    vision.deepstack_visual_indexes = list(range(len(backbone.model.language_model.layers)))
    assert not backbone(chunk, num_last_tokens=2).isnan().any()


def test_poolings_together_read_what_the_longest_reads() -> None:
    assert Concatenation([LastToken(), MeanOfLast(3, 3)]).num_last_tokens == 3
    assert Concatenation([LastToken(), Mean()]).num_last_tokens is None
    assert (LastToken().num_last_tokens, FirstToken().num_last_tokens) == (1, None)


def test_places_of_the_last_tokens() -> None:
    tail = LastTokens.of(torch.tensor([3, 1, 4]), 2, torch.device("cpu"))
    assert tail.index.tolist() == [1, 2, 3, 6, 7]
    assert tail.bounds.lengths == [2, 1, 2]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["loop", "kernel"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_last_tokens_attend_as_among_all(device: str, causal: bool, tokens: int) -> None:
    lengths = torch.tensor([7, 7, 2, 5, 1])
    draw = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value = (
        torch.randn(1, heads, int(lengths.sum()), 16, generator=draw).to(device, dtype) for heads in (4, 2, 2)
    )
    bounds, tail = Bounds.of(lengths, torch.device(device)), LastTokens.of(lengths, tokens, torch.device(device))
    options: dict[str, Any] = {"attention_mask": None, "is_causal": causal}
    every, _ = packed_attention(nn.Module(), query, key, value, packed=Packed(bounds, bounds), **options)
    packed = Packed(tail.bounds, bounds)
    found, _ = packed_attention(nn.Module(), query[:, :, tail.index], key, value, packed=packed, **options)
    tolerance = 1e-2 if device == "cuda" else ROUNDING
    torch.testing.assert_close(found, every[:, tail.index], rtol=0, atol=tolerance)
