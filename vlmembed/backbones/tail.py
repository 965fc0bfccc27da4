"""The last layer for the last tokens of each item, where a pooling reads no others.

Every token still gives its key and value; its query, its MLP and what follows would be thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from vlmembed.backbones.attention import Bounds


@dataclass(frozen=True)
class Tail:
    """The last tokens of packed sequences.

    Args:
        places: Where they are among all tokens, on the device.
        bounds: Of each sequence's last tokens, on their own.
    """

    places: Int[Tensor, " tokens"]
    bounds: Bounds

    @classmethod
    def of(cls, lengths: Int[Tensor, " sequences"], tokens: int, device: torch.device) -> Tail:
        """Take so many tokens of each sequence, or all that it has."""
        counts = lengths.clamp(max=tokens)
        left_out = (lengths - counts).cumsum(0).repeat_interleave(counts)
        places = torch.arange(len(left_out)) + left_out
        return cls(places.to(device, non_blocking=True), Bounds.of(counts, device))


def shorten(layer: nn.Module) -> None:
    """Let a decoder layer of Qwen3-VL compute its output for a `Tail` alone, when called with one."""
    layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, hidden_states: Tensor, tail: Tail | None = None, **options: Any) -> Tensor:
    if tail is None:
        whole: Tensor = type(layer).forward(layer, hidden_states, **options)
        return whole
    attended = _attend(layer.self_attn, layer.input_layernorm(hidden_states), tail, **options)
    hidden = hidden_states.index_select(1, tail.places) + attended
    read: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return read


def _attend(
    attention: Any, hidden: Tensor, tail: Tail, position_embeddings: tuple[Tensor, Tensor], **options: Any
) -> Tensor:
    """Do what transformers' attention does, with the queries of the tail and everybody's keys and values."""
    asking = hidden.index_select(1, tail.places)
    query, key, value = (
        projection(states).unflatten(-1, (-1, attention.head_dim))
        for projection, states in ((attention.q_proj, asking), (attention.k_proj, hidden), (attention.v_proj, hidden))
    )
    query, key = attention.q_norm(query).transpose(1, 2), attention.k_norm(key).transpose(1, 2)
    asked_from = [angles.index_select(1, tail.places) for angles in position_embeddings]
    query, _ = apply_rotary_pos_emb(query, query, *asked_from)
    key, _ = apply_rotary_pos_emb(key, key, *position_embeddings)
    dropout = attention.attention_dropout if attention.training else 0.0
    options |= {"cu_seq_lens_q": tail.bounds.ends, "max_length_q": tail.bounds.longest, "asking": tail.bounds}
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    output, _ = attend(
        attention, query, key, value.transpose(1, 2), dropout=dropout, scaling=attention.scaling, **options
    )
    projected: Tensor = attention.o_proj(output.flatten(-2))
    return projected
