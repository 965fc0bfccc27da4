"""Attention over sequences that lie end to end, each seeing itself alone.

transformers calls it in place of its own (its attention interface). On a GPU in half precision it is PyTorch's
variable-length kernel; elsewhere one ordinary attention after the other, which wastes nothing on padding either.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from types import MethodType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

varlen_attn: Any = None
with suppress(ImportError):  # PyTorch before 2.10.
    from torch.nn.attention.varlen import varlen_attn

#: transformers passes on where packed images end only to an attention called flash-something.
NAME = "vlmembed_flash"


# Compiled, it would be compiled again for every number of sequences.
@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads Q d"],
    key: Float[Tensor, "1 kv_heads K d"],
    value: Float[Tensor, "1 kv_heads K d"],
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    *,
    bounds: Bounds,
    asking: Bounds | None = None,
    places: Int[Tensor, " T"] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence.

    Args:
        module: The attention layer; its ``is_causal`` counts where ``is_causal`` is None.
        query: Of all sequences, one after the other: T tokens, or the last few of each.
        key: T tokens, or as many as ``places`` point at; heads may be shared.
        value: As ``key``.
        attention_mask: Not used: nothing is padded.
        scaling: What products are multiplied by.
        dropout: The share of attention weights to drop.
        is_causal: Whether a token sees those before it only.
        bounds: Of the sequences, T tokens in all.
        asking: Of their last tokens, Q in all; by default all ask.
        places: Where the sequences' tokens are among the keys, where sequences share some.

    Returns:
        (1, Q, heads, d), and no weights.
    """
    asking = asking or bounds
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if torch.is_autocast_enabled(query.device.type):
        # Rotary positions are applied in float32, which the values never saw.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if places is not None:
        key, value = key.index_select(2, places), value.index_select(2, places)
    if varlen_attn is not None and query.is_cuda and query.dtype != torch.float32 and not dropout:
        packed = (each[0].transpose(0, 1) for each in (query, key, value))
        limits = (asking.ends, bounds.ends, asking.longest, bounds.longest)
        window = (-1, 0 if causal else -1)
        return varlen_attn(*packed, *limits, scale=scaling, window_size=window, enable_gqa=True)[None], None
    # Neighbours of equal length go together, as sorted chunks have many.
    alike = [(*lengths, len(list(same))) for lengths, same in groupby(zip(asking.lengths, bounds.lengths, strict=True))]
    outputs = []
    groups = (
        _groups(query, [(length, count) for length, _, count in alike]),
        *(_groups(each, [(length, count) for _, length, count in alike]) for each in (key, value)),
    )
    for queries, keys, values in zip(*groups, strict=True):
        few = queries.shape[2] < keys.shape[2]
        output = scaled_dot_product_attention(
            queries,
            keys,
            values,
            _last_rows(queries.shape[2], keys.shape[2], query.device) if causal and few else None,
            dropout,
            is_causal=causal and not few,
            scale=scaling,
            enable_gqa=True,
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def _groups(
    packed: Float[Tensor, "1 heads T d"], alike: Sequence[tuple[int, int]]
) -> list[Float[Tensor, "n heads L d"]]:
    """Cut into groups of sequences of one length: lengths and counts."""
    parts = packed[0].split([length * count for length, count in alike], dim=1)
    return [
        part.unflatten(1, (count, length)).transpose(0, 1) for part, (length, count) in zip(parts, alike, strict=True)
    ]


def _last_rows(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """Return what the last tokens may see: those before them, and themselves."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


AttentionInterface.register(NAME, packed_attention)


@dataclass(frozen=True)
class Bounds:
    """Where packed sequences begin and end.

    Args:
        lengths: Of the sequences.
        longest: The longest of them.
        ends: (sequences + 1,) where each ends, from 0, on the device.
    """

    lengths: list[int]
    longest: int
    ends: Int[Tensor, " sequences_plus_1"]

    @classmethod
    def of(cls, lengths: Int[Tensor, " sequences"], device: torch.device) -> Bounds:
        """Count on the host, and copy to the device."""
        ends = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(lengths.tolist(), int(lengths.max()), ends.to(device, non_blocking=True))


def install(model: Any) -> None:
    """Make a Qwen3-VL read packed sequences."""
    language, vision = model.language_model, model.visual
    if "flash" not in language.config._attn_implementation:
        language.config._attn_implementation = NAME
        vision.config._attn_implementation = NAME
    language._deepstack_process = _add_features


def _add_features(hidden: Tensor, visual_pos_masks: None, features: Tensor) -> Tensor:
    """Add DeepStack features, zero at texts: adding only where images are makes the device tell the host where."""
    return hidden + features


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
