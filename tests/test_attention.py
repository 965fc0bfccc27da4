"""Attention over packed sequences is PyTorch's own attention, one sequence after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from building import gradients, mixed_items, relative_difference
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from transformers.utils import is_flash_attn_2_available

from vlmembed.backbones import Qwen3VL, packing
from vlmembed.backbones.packing import Bounds, Packed, packed_attention
from vlmembed.encoder import Encoder
from vlmembed.pooling import Mean

#: Sums in float32 in another order.
ROUNDING = 1e-5
#: bfloat16 keeps 8 bits, and attention rounds its weights, its sums and its output.
HALF_ROUNDING = 2e-2
LENGTHS = {
    "equal": [5, 5, 5],
    "unequal": [7, 2, 4],
    "equal neighbours": [6, 6, 3, 6, 1, 1, 1],
    "one": [9],
    "single tokens": [1, 1],
}
HEADS = {"a key each": (4, 4), "shared keys": (4, 2), "one key for all": (4, 1)}
WIDTH = 16


def tensors(lengths: Sequence[int], heads: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values of all sequences end to end."""
    draw = torch.Generator().manual_seed(sum(lengths))
    drawn = [torch.randn(1, count, sum(lengths), WIDTH, generator=draw) for count in (heads[0], heads[1], heads[1])]
    return [each.to(dtype).requires_grad_() for each in drawn]


def bounds(lengths: Sequence[int], device: str = "cpu") -> dict[str, Any]:
    """What transformers hands over."""
    found = Bounds.of(torch.tensor(lengths), torch.device(device))
    return {"packed": Packed(found, found)}


def one_by_one(inputs: Sequence[Tensor], lengths: Sequence[int], causal: bool, scale: float | None = None) -> Tensor:
    """The slow obvious way, as (1, T, heads, d): a softmax for each sequence, over keys repeated for their queries."""
    query, *shared = inputs
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in shared)
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    found = []
    for start, end in pairwise(ends):
        part = [each[:, :, start:end] for each in (query, key, value)]
        scores = part[0] @ part[1].mT * (scale or WIDTH**-0.5)
        if causal:
            later = torch.ones(end - start, end - start, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        found.append(scores.softmax(dim=-1) @ part[2])
    return torch.cat(found, dim=2).transpose(1, 2)


def with_gradients(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output, *torch.autograd.grad((output * noise).sum(), inputs)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_sequence_sees_itself_alone(lengths: list[int], heads: tuple[int, int], causal: bool) -> None:
    inputs = tensors(lengths, heads)
    output, weights = packed_attention(nn.Module(), *inputs, None, is_causal=causal, **bounds(lengths))
    assert weights is None
    assert output.shape == (1, sum(lengths), heads[0], WIDTH)
    expected = with_gradients(one_by_one(inputs, lengths, causal), inputs)
    for ours, theirs in zip(with_gradients(output, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(
    ("asked", "layers_own", "causal"), [(None, True, True), (None, False, False), (False, True, False)]
)
def test_scale_and_causality_are_those_of_the_call(
    asked: bool | None, layers_own: bool, causal: bool, scale: float | None
) -> None:
    """Else the layer says whether it is causal, as in transformers."""
    inputs, layer = tensors([3, 5], (4, 2)), nn.Module()
    layer.is_causal = layers_own  # type: ignore[assignment]
    output, _ = packed_attention(layer, *inputs, None, scaling=scale, is_causal=asked, **bounds([3, 5]))
    torch.testing.assert_close(output, one_by_one(inputs, [3, 5], causal, scale), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_dropout_drops_a_share_of_the_weights(share: float) -> None:
    """And makes the others larger by as much; a generator's state brings the same ones back."""
    lengths = [40] * 8
    query, key, _ = (each.detach() for each in tensors(lengths, (4, 4)))
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        ones = torch.ones_like(key)
        found.append(packed_attention(nn.Module(), query, key, ones, None, dropout=share, **bounds(lengths))[0])
    assert torch.equal(*found)
    # Of values that are all one, the sum of the weights is left. A sequence's first token has one weight.
    first = found[0][0, ::40].unique()
    torch.testing.assert_close(first, torch.tensor([0, 1 / (1 - share)] if share else [1.0]))
    assert float(found[0].mean()) == pytest.approx(1, abs=0.04)  # 1280 sums, each 0.3 off: 0.3 / √1280 = 0.01.


@pytest.mark.parametrize("causal", [True, False])
def test_autocast_rounds_what_rotary_positions_left_in_float32(causal: bool) -> None:
    """Queries and keys come in float32 there, values in bfloat16; attention runs in bfloat16."""
    query, key, value = tensors([6, 6, 3], (4, 2))
    half = [each.detach().bfloat16() for each in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = packed_attention(
            nn.Module(), query, key, value.bfloat16(), None, is_causal=causal, **bounds([6, 6, 3])
        )
    assert output.dtype == torch.bfloat16
    expected = one_by_one([each.float() for each in half], [6, 6, 3], causal)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=HALF_ROUNDING)


def test_equal_neighbours_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted chunks have many of them; a call for each would cost more than the attention."""
    shapes = []

    def recorded(query: Tensor, *inputs: Tensor, **options: Any) -> Tensor:
        shapes.append(query.shape[::2])
        return scaled_dot_product_attention(query, *inputs, **options)

    monkeypatch.setattr(packing, "scaled_dot_product_attention", recorded)
    lengths = LENGTHS["equal neighbours"]
    packed_attention(nn.Module(), *tensors(lengths, (4, 2)), None, **bounds(lengths))
    assert shapes == [(2, 6), (1, 3), (1, 6), (3, 1)]


def test_bounds_of_sequences() -> None:
    found = Bounds.of(torch.tensor([4, 1, 7]), torch.device("cpu"))
    assert (found.lengths, found.longest, found.ends.tolist()) == ([4, 1, 7], 7, [0, 4, 5, 12])
    assert found.ends.dtype == torch.int32  # As the kernels want them.


@pytest.mark.gpu
@pytest.mark.skipif(packing.varlen_attn is None, reason="PyTorch before 2.10")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), [300, 17, 128, 128]], ids=[*LENGTHS, "long"])
def test_the_kernel_equals_the_loop(lengths: list[int], heads: tuple[int, int], causal: bool) -> None:
    """In bfloat16, against float32 on the same rounded numbers."""
    half = [each.detach().cuda().requires_grad_() for each in tensors(lengths, heads, torch.bfloat16)]
    full = [each.detach().float().requires_grad_() for each in half]
    output, _ = packed_attention(nn.Module(), *half, None, is_causal=causal, **bounds(lengths, "cuda"))
    assert output.dtype == torch.bfloat16
    names = ("output", "query", "key", "value")
    expected = dict(zip(names, with_gradients(one_by_one(full, lengths, causal), full), strict=True))
    found = dict(zip(names, with_gradients(output, half), strict=True))
    # All together: of a sequence of one token, queries and keys have no gradient.
    assert relative_difference({name: each.float() for name, each in found.items()}, expected) < HALF_ROUNDING


@pytest.mark.gpu
def test_dropout_and_float32_take_the_loop_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel knows neither."""
    monkeypatch.setattr(packing, "varlen_attn", lambda *_, **__: pytest.fail("the kernel was called"))
    inputs = [each.detach().cuda() for each in tensors([3, 5], (4, 2))]
    found, _ = packed_attention(nn.Module(), *inputs, None, **bounds([3, 5], "cuda"))
    torch.testing.assert_close(found, one_by_one(inputs, [3, 5], causal=True), rtol=0, atol=1e-3)
    half = [each.bfloat16() for each in inputs]
    packed_attention(nn.Module(), *half, None, dropout=0.5, **bounds([3, 5], "cuda"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings and gradients in float32, padded, by transformers."""
    return embedded(checkpoint, "sdpa", "float32")


def embedded(checkpoint: Path, implementation: Any, dtype: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Of texts, images and a video, through the language model and the vision tower."""
    backbone = Qwen3VL(str(checkpoint), attn_implementation=implementation, dtype=dtype)
    encoder = Encoder(backbone, Mean())
    encoder.configure()
    encoder.cuda()
    prepared = backbone.preprocessor.prepare(mixed_items())
    if backbone.separate_vision_pass:
        embeddings = encoder(prepared.chunk(range(6)), encoder.encode_images(prepared.images(None)))
    else:
        embeddings = encoder(prepared.chunk(range(6)))
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    (embeddings * noise.to(embeddings)).sum().backward()
    return embeddings.detach().float(), {name: each.float() for name, each in gradients(encoder).items()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "implementation",
    [
        "auto",
        pytest.param(
            "flash_attention_2",
            marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn"),
        ),
    ],
)
def test_half_precision_kernels_embed_as_float32_does(
    checkpoint: Path, reference: tuple[Tensor, dict[str, Tensor]], implementation: str
) -> None:
    """Language model and vision tower; a wrong bound or mask would turn whole embeddings, not their last digits."""
    embeddings, found = embedded(checkpoint, implementation, "bfloat16")
    assert float(cosine_similarity(embeddings, reference[0]).min()) > 0.999
    for name in ("language_model", "visual"):
        parts = [{key: each for key, each in one.items() if name in key} for one in (found, reference[1])]
        # Rounded to 8 bits many times on their way: 0.8 % on a CPU.
        assert relative_difference(*parts) < 0.03, name
