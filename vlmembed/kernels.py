"""Optional kernels: the same embeddings and gradients, to the rounding of the precision, in less time."""

from __future__ import annotations

import inspect
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_liger_kernel_available


def compile_layers(model: nn.Module) -> None:
    """Have PyTorch compile the parts of a model's layers: norms, attentions and MLPs (``torch.compile``).

    It happens on their first call, takes a minute or two, and fails there where the machine has no compiler (Triton's
    on a GPU, a C++ compiler elsewhere). Layers of a kind share their code, and chunks of all sizes do.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers as transformers writes them: set torch_compile: false.")
    # Not the layers themselves: all kinds of them are called through one function of transformers, whose compiled
    # variants, with and without gradients, would soon be more than PyTorch keeps.
    for part in (part for layer in layers for part in layer.children()):
        # Random numbers as without compiling, so that a replayed chunk drops what it dropped the first time.
        part.compile(dynamic=True, options={"fallback_random": True})


def use_liger(model: Any) -> None:
    """Run RMSNorm, SwiGLU and rotary positions of a Qwen3-VL through Liger's Triton kernels (arXiv:2410.10989).

    Only this model is changed: Liger's own patch replaces functions of transformers, and would reach the stock model
    that an export is compared with.
    """
    if not model.config.model_type.startswith("qwen3_vl"):
        raise ValueError(f"liger: true is for Qwen3-VL, not for a {model.config.model_type!r}. Set liger: false.")
    if not (torch.cuda.is_available() and is_liger_kernel_available()):
        raise ValueError(
            "liger: true needs a CUDA device and the liger-kernel package "
            f"(CUDA: {torch.cuda.is_available()}, liger-kernel: {is_liger_kernel_available()}). "
            "Install vlmembed[liger] on a machine with a GPU, or set liger: false."
        )
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb

    norms = [model.language_model.norm]
    for layer in model.language_model.layers:
        attention = layer.self_attn
        norms += [layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm]
        # The attention's code, without transformers' wrapper, and with another function under a global name.
        code = inspect.unwrap(type(attention).forward)
        names = code.__globals__ | {"apply_rotary_pos_emb": liger_rotary_pos_emb}
        rotated = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
        attention.forward = MethodType(rotated, attention)
        if hasattr(layer.mlp, "gate_proj"):  # A mixture of experts has none.
            layer.mlp.forward = MethodType(LigerSwiGLUMLP.forward, layer.mlp)
    for norm in norms:
        # As in Llama: normalised in float32, and rounded before it is multiplied by the weight. A gradient that comes
        # in is left as it is: autograd may have given it to others too.
        norm.casting_mode, norm.offset, norm.row_mode, norm.in_place = "llama", 0.0, None, False
        norm.forward = MethodType(LigerRMSNorm.forward, norm)
