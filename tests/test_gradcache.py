from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from building import batch, examples, gradients, module, relative_difference
from peft import LoraConfig
from torch import nn

from vlmembed import gradcache
from vlmembed.adapters import Freeze, LoRA
from vlmembed.gradcache import GradCache
from vlmembed.losses import InfoNCE, Matryoshka
from vlmembed.modules.embedding import gather_batch
from vlmembed.types import Batch

# Chunks only change the order of float32 sums.
EXACT = 1e-5


class Toy(nn.Module):
    """Rows of numbers to embeddings, with dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4))
        self.calls = 0

    def forward(self, chunk: dict[str, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return self.layers(chunk["numbers"])


def toy_chunks(size: int) -> list[dict[str, torch.Tensor]]:
    numbers = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    return [{"numbers": part} for part in numbers.split(size)]


def toy_loss(embeddings: torch.Tensor) -> torch.Tensor:
    relevance = torch.eye(5, dtype=torch.int8)[torch.tensor([3, 0, 4, 1, 2])]
    return InfoNCE(0.1, directions=["query_to_document", "document_to_query"])(
        embeddings[:5], embeddings[5:], relevance
    )


def step(encoder: nn.Module, chunks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    cached = gradcache.forward_chunks(lambda chunk: (encoder(chunk),), chunks)
    toy_loss(cached.embeddings).backward()
    cached.backward()
    return gradients(encoder)


def unchunked(encoder: nn.Module, chunks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Ordinary autograd through every chunk at once."""
    toy_loss(torch.cat([encoder(chunk) for chunk in chunks])).backward()
    return gradients(encoder)


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_equal_those_without_a_cache(size: int, dropout: float) -> None:
    torch.manual_seed(7)
    expected = unchunked(Toy(dropout), toy_chunks(size))
    torch.manual_seed(7)
    assert relative_difference(step(Toy(dropout), toy_chunks(size)), expected) < EXACT


def test_dropout_falls_differently_in_each_chunk() -> None:
    """Else the test above would pass with every chunk replayed from one state."""
    encoder, chunk = Toy(0.5), {"numbers": torch.ones(2, 6)}
    embeddings = gradcache.forward_chunks(lambda chunk: (encoder(chunk),), [chunk, chunk]).embeddings
    assert not torch.equal(embeddings[:2], embeddings[2:])


def test_random_numbers_go_on_as_if_nothing_was_replayed() -> None:
    torch.manual_seed(7)
    encoder = Toy(0.5)
    torch.cat([encoder(chunk) for chunk in toy_chunks(3)])
    expected = torch.rand(3)
    torch.manual_seed(7)
    step(Toy(0.5), toy_chunks(3))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("size", "calls"), [(10, 1), (5, 3), (1, 19)])
def test_the_last_chunk_is_not_computed_twice(size: int, calls: int) -> None:
    encoder = Toy()
    step(encoder, toy_chunks(size))
    assert encoder.calls == calls


def test_replay_enters_the_first_pass_precision() -> None:
    encoder = Toy()
    with torch.autocast("cpu", torch.bfloat16):
        expected = unchunked(encoder, toy_chunks(3))
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        cached = gradcache.forward_chunks(lambda chunk: (encoder(chunk),), toy_chunks(3))
        loss = toy_loss(cached.embeddings)
    loss.backward()
    cached.backward()
    # bfloat16 keeps 8 bits: sums of chunks may round differently.
    assert relative_difference(gradients(encoder), expected) < 2e-2


def test_nothing_trainable_is_no_error() -> None:
    encoder = Toy().requires_grad_(False)
    cached = gradcache.forward_chunks(lambda chunk: (encoder(chunk),), toy_chunks(3))
    toy_loss(cached.embeddings).backward()
    cached.backward()
    assert not gradients(encoder)


def test_replay_without_backward_is_refused() -> None:
    with pytest.raises(RuntimeError, match="backward"):
        gradcache.forward_chunks(lambda chunk: (Toy()(chunk),), toy_chunks(3)).backward()


def test_without_gradients_it_only_embeds() -> None:
    encoder = Toy()
    with torch.no_grad():
        embeddings = gradcache.forward_chunks(lambda chunk: (encoder(chunk),), toy_chunks(3)).embeddings
    assert not embeddings.requires_grad
    torch.testing.assert_close(embeddings, torch.cat([encoder(chunk) for chunk in toy_chunks(3)]))


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "qkv"], "init_lora_weights": False}


@pytest.mark.parametrize("graph_bytes", [0.0, 2e6, 1e12], ids=["no graphs", "some graphs", "all graphs"])
@pytest.mark.parametrize("size", [1, 5, None])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="full"),
        pytest.param({"adapters": [LoRA(LoraConfig(**LORA))]}, id="LoRA"),
        pytest.param({"adapters": [LoRA(LoraConfig(**LORA, lora_dropout=0.3))]}, id="LoRA with dropout"),
        pytest.param({"adapters": [Freeze(["vision", "merger"])]}, id="frozen vision"),
        pytest.param({"backbone": {"gradient_checkpointing": True}}, id="activation checkpointing"),
        pytest.param({"temperature": True}, id="learnable temperature"),
    ],
)
def test_whole_model(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], size: int | None, graph_bytes: float
) -> None:
    """Texts, pictures, several positives, shared documents: the module's step against autograd through every chunk."""
    torch.manual_seed(0)
    options = dict(options)
    loss = Matryoshka(InfoNCE(0.05, learnable_temperature=options.pop("temperature", False)), [64, 16])
    model = module(checkpoint, loss, **options)
    data = batch(model, examples(), size)

    def loss_of(embeddings: torch.Tensor, data: Batch) -> torch.Tensor:
        return model.loss(*gather_batch(embeddings, data))

    def gradients_of_a_step() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        grad_cache = GradCache(model.encoder, graph_bytes)
        loss_of(grad_cache.embed(data), data).backward()
        grad_cache.backward()
        found = gradients(model)
        model.zero_grad()
        return found

    actual = gradients_of_a_step()
    monkeypatch.setattr(gradcache, "forward_chunks", ordinary_autograd)
    assert relative_difference(actual, gradients_of_a_step()) < EXACT


def ordinary_autograd(forward: Any, chunks: list[Any], budget: Any = None) -> SimpleNamespace:
    """The gradient cache's interface, without a cache."""
    outputs = [output for chunk in chunks for output in forward(chunk)]
    embeddings = torch.cat(outputs) if outputs and outputs[0].ndim == 2 else None
    return SimpleNamespace(outputs=outputs, embeddings=embeddings, backward=lambda: None)


@pytest.mark.parametrize("size", [1, 5])
def test_chunk_size_does_not_matter(checkpoint: Path, size: int) -> None:
    found = {}
    model = module(checkpoint)
    for chunk_size in (size, None):
        model.zero_grad()
        data = batch(model, examples(), chunk_size)
        grad_cache = GradCache(model.encoder)
        model.loss(*gather_batch(grad_cache.embed(data), data)).backward()
        grad_cache.backward()
        found[chunk_size] = gradients(model)
    assert relative_difference(found[size], found[None]) < EXACT


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 3])
def test_dropout_on_a_gpu(size: int) -> None:
    chunks = [{"numbers": chunk["numbers"].cuda()} for chunk in toy_chunks(size)]
    torch.manual_seed(7)
    expected = unchunked(Toy(0.5).cuda(), chunks)
    torch.manual_seed(7)
    assert relative_difference(step(Toy(0.5).cuda(), chunks), expected) < EXACT
