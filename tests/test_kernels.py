"""Optional kernels change no embedding and no gradient, and nobody else's model."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from building import batch, examples, module, relative_difference, step_gradients, texts
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cosine_similarity, silu
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb
from transformers.utils import is_liger_kernel_available

from vlmembed import kernels
from vlmembed.adapters import LoRA
from vlmembed.gradcache import GradCache
from vlmembed.kernels import compile_layers, use_liger
from vlmembed.modules import EmbeddingModule
from vlmembed.types import Example

#: Fused operations in float32 round in other places.
ROUNDING = 1e-5
DROPOUT = {"r": 4, "target_modules": ["q_proj", "v_proj", "qkv"], "lora_dropout": 0.3, "init_lora_weights": False}


def built(checkpoint: Path, **options: Any) -> EmbeddingModule:
    torch.manual_seed(0)
    return module(checkpoint, **options)


def step(
    model: EmbeddingModule, rows: list[Example], chunk_size: int | None, graph_bytes: float
) -> tuple[Tensor, dict[str, Tensor], float]:
    """Embeddings, gradients, and the bytes that graphs took."""
    torch.manual_seed(1)
    grad_cache = GradCache(model.encoder, graph_bytes)
    return *step_gradients(model, grad_cache, batch(model, rows, chunk_size)), grad_cache.budget.taken


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"adapters": [LoRA(LoraConfig(**DROPOUT))]}, id="dropout"),
        pytest.param({}, id="full", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.exhaustive
def test_compiled_layers_embed_and_learn_as_before(checkpoint: Path, options: dict[str, Any]) -> None:
    """With graphs and with replays, whose dropout falls as in the first pass; and compiled once for all shapes."""
    torch.compiler.reset()
    counters.clear()
    eager, compiled = (built(checkpoint, **options) for _ in range(2))
    compile_layers(compiled.encoder.backbone.model)
    graphs = 0
    for rows, chunk_size, graph_bytes in [
        (examples(), 2, 0.0),
        (examples(), 2, math.inf),
        (examples(9), 3, 2e6),
        (examples(4), None, 0.0),
        (texts(5), 1, 0.0),
    ]:
        expected, actual = (step(model, rows, chunk_size, graph_bytes) for model in (eager, compiled))
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=ROUNDING)
        assert relative_difference(actual[1], expected[1]) < ROUNDING
        # Fused layers save other tensors, but what they save is counted too.
        assert actual[2] == pytest.approx(expected[2], rel=0.8)
        graphs = graphs or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs > 0


def test_a_model_without_layers_is_not_compiled() -> None:
    with pytest.raises(ValueError, match=r"Linear has no layers .* set torch_compile: false"):
        compile_layers(nn.Linear(2, 2))


@pytest.mark.skipif(torch.cuda.is_available() and is_liger_kernel_available(), reason="has all that it needs")
def test_liger_without_a_gpu_or_the_package_is_refused(checkpoint: Path) -> None:
    has = rf"CUDA: {torch.cuda.is_available()}, liger-kernel: {is_liger_kernel_available()}"
    with pytest.raises(ValueError, match=rf"liger: true needs a CUDA device and the liger-kernel package \({has}\)"):
        use_liger(built(checkpoint).encoder.backbone.model)


def test_liger_for_another_model_is_refused() -> None:
    other = SimpleNamespace(config=SimpleNamespace(model_type="idefics3"))
    with pytest.raises(ValueError, match="liger: true is for Qwen3-VL, not for a 'idefics3'"):
        use_liger(other)


class StandIn:
    """What Liger offers, in plain PyTorch; counts its calls."""

    def __init__(self) -> None:
        self.calls = {"norm": 0, "mlp": 0, "rope": 0}
        norm, mlp = type("LigerRMSNorm", (), {}), type("LigerSwiGLUMLP", (), {})
        norm.forward = lambda module, hidden: self.norm(module, hidden)  # type: ignore[attr-defined]
        mlp.forward = lambda module, hidden: self.mlp(module, hidden)  # type: ignore[attr-defined]
        self.module = SimpleNamespace(LigerRMSNorm=norm, LigerSwiGLUMLP=mlp, liger_rotary_pos_emb=self.rope)

    def norm(self, module: Any, hidden: Tensor) -> Tensor:
        self.calls["norm"] += 1
        assert (module.casting_mode, module.offset, module.in_place) == ("llama", 0, False)
        scale = hidden.float().pow(2).mean(dim=-1, keepdim=True).add(module.variance_epsilon).rsqrt()
        return module.weight * (hidden.float() * scale).to(hidden.dtype)

    def mlp(self, module: Any, hidden: Tensor) -> Tensor:
        self.calls["mlp"] += 1
        return module.down_proj(silu(module.gate_proj(hidden)) * module.up_proj(hidden))

    def rope(self, *inputs: Tensor) -> Any:
        self.calls["rope"] += 1
        return apply_rotary_pos_emb(*inputs)


def test_every_norm_mlp_and_rotation_goes_through_liger(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of no other model in the process."""
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in.module)
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stock, fused = (built(checkpoint) for _ in range(2))
    use_liger(fused.encoder.backbone.model)
    expected = step(stock, examples(), None, 0.0)
    assert set(stand_in.calls.values()) == {0}
    actual = step(fused, examples(), None, 0.0)
    # Of two layers: four norms and an MLP each, the rotation of the first (in the last, one token of each item asks),
    # and the norm at the end.
    assert stand_in.calls == {"norm": 9, "mlp": 2, "rope": 1}
    assert relative_difference(actual[1], expected[1]) < ROUNDING
    step(built(checkpoint), examples(), None, 0.0)
    assert stand_in.calls == {"norm": 9, "mlp": 2, "rope": 1}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "accelerate",
    [
        compile_layers,
        pytest.param(
            use_liger,
            marks=pytest.mark.skipif(not is_liger_kernel_available(), reason="needs liger-kernel"),
        ),
    ],
)
def test_half_precision_on_a_gpu(checkpoint: Path, accelerate: Any) -> None:
    """As near to float32 as without the kernels."""
    found = {}
    for name, dtype in (("float32", "float32"), ("eager", "bfloat16"), ("fused", "bfloat16")):
        model = built(checkpoint, backbone={"dtype": dtype, "attn_implementation": "auto"}).cuda()
        if name == "fused":
            accelerate(model.encoder.backbone.model)
        embeddings, grown, _ = step(model, examples(), 2, 0.0)
        found[name] = embeddings.float(), {key: each.float() for key, each in grown.items()}
    exact = found["float32"]
    assert float(cosine_similarity(found["fused"][0], exact[0]).min()) > 0.999
    errors = {name: relative_difference(found[name][1], exact[1]) for name in ("eager", "fused")}
    assert errors["fused"] < 1.5 * errors["eager"]
