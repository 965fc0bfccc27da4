"""Attention over sequences that lie end to end without padding, and a last layer that computes the last tokens alone.

transformers calls `packed_attention` through its attention interface. On a GPU in half precision it is PyTorch's
variable-length kernel; elsewhere ordinary attention, once for each run of sequences of equal length.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

varlen_attn: Any = None
with suppress(ImportError):  # PyTorch before 2.10.
    from torch.nn.attention.varlen import varlen_attn

#: transformers passes on where packed images end only to an attention called flash-something.
NAME = "vlmembed_flash"


@dataclass(frozen=True)
class Bounds:
    """Where packed sequences begin and end: their lengths and the longest on the host, (n + 1,) ends on the device."""

    lengths: list[int]
    longest: int
    ends: Int[Tensor, " n_plus_1"]

    @classmethod
    def of(cls, lengths: Int[Tensor, " n"], device: torch.device) -> Bounds:
        """Count on the host, and copy to the device."""
        ends = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(lengths.tolist(), int(lengths.max()), ends.to(device, non_blocking=True))


@dataclass(frozen=True)
class LastTokens:
    """The last tokens of packed sequences: their index among all tokens, on the device, and their own bounds."""

    index: Int[Tensor, " tokens"]
    bounds: Bounds

    @classmethod
    def of(cls, lengths: Int[Tensor, " n"], count: int, device: torch.device) -> LastTokens:
        """Take so many tokens of each sequence, or all that it has."""
        counts = lengths.clamp(max=count)
        skipped = (lengths - counts).cumsum(0).repeat_interleave(counts)
        index = torch.arange(len(skipped)) + skipped
        return cls(index.to(device, non_blocking=True), Bounds.of(counts, device))


@dataclass(frozen=True)
class Packed:
    """How the tokens of a forward pass lie: what travels through transformers to `packed_attention`."""

    queries: Bounds  # Of the tokens that are computed.
    keys: Bounds  # Of the tokens that they see.
    key_index: Int[Tensor, " T"] | None = None  # The computed token that each key is, where sequences share some.
    last: LastTokens | None = None  # The tokens that the last layer computes; None for all.

    @property
    def flash_arguments(self) -> dict[str, Any]:
        """The same in the words of transformers, for its call of flash-attn."""
        return {
            "cu_seq_lens_q": self.queries.ends,
            "cu_seq_lens_k": self.keys.ends,
            "max_length_q": self.queries.longest,
            "max_length_k": self.keys.longest,
        }


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
    packed: Packed,
    **_: Any,
) -> tuple[Float[Tensor, "1 Q heads d"], None]:
    """Attend within each sequence; ``packed`` was given to the model's forward, the rest comes from transformers."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if torch.is_autocast_enabled(query.device.type):
        # Rotary positions are applied in float32, which the values never saw.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if packed.key_index is not None:
        # Shared beginnings were computed once: (kv_heads, K, d) → (kv_heads, T, d), each sequence whole again.
        key, value = key.index_select(2, packed.key_index), value.index_select(2, packed.key_index)
    queries, keys = packed.queries, packed.keys
    if varlen_attn is not None and query.is_cuda and query.dtype != torch.float32 and not dropout:
        tokens = (states[0].transpose(0, 1) for states in (query, key, value))  # (tokens, heads, d)
        limits = (queries.ends, keys.ends, queries.longest, keys.longest)
        window = (-1, 0 if causal else -1)
        return varlen_attn(*tokens, *limits, scale=scaling, window_size=window, enable_gqa=True)[None], None
    # Neighbours of equal length go together, as sorted chunks have many.
    runs = [(*lengths, len([*run])) for lengths, run in groupby(zip(queries.lengths, keys.lengths, strict=True))]
    query_runs, key_runs = [(length, count) for length, _, count in runs], [run[1:] for run in runs]
    outputs = []
    for q, k, v in zip(_split(query, query_runs), _split(key, key_runs), _split(value, key_runs), strict=True):
        mask = None
        if causal and q.shape[2] < k.shape[2]:
            # PyTorch aligns queries with the first keys; these are the last tokens, and see all before them.
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        causal_here = causal and mask is None
        output = scaled_dot_product_attention(q, k, v, mask, dropout, causal_here, scale=scaling, enable_gqa=True)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def _split(states: Float[Tensor, "1 heads T d"], runs: Sequence[tuple[int, int]]) -> list[Float[Tensor, "n heads L d"]]:
    """Cut into runs of sequences of one length, given as (length, count)."""
    parts = states[0].split([length * count for length, count in runs], dim=1)
    return [
        part.unflatten(1, (count, length)).transpose(0, 1) for part, (length, count) in zip(parts, runs, strict=True)
    ]


AttentionInterface.register(NAME, packed_attention)


def install(model: Any) -> None:
    """Make a Qwen3-VL read packed sequences, and its last layer compute `Packed.last` alone where that is set."""
    language, vision = model.language_model, model.visual
    if "flash" not in language.config._attn_implementation:
        language.config._attn_implementation = vision.config._attn_implementation = NAME
    language._deepstack_process = _add_features
    language.layers[-1].forward = MethodType(_forward_last, language.layers[-1])
    vision.patch_embed.forward = MethodType(_embed_patches, vision.patch_embed)


def _embed_patches(embed: Any, patches: Float[Tensor, "patches numbers"]) -> Float[Tensor, "patches H"]:
    """Do as a product what transformers does as a convolution over windows that never overlap: 6 times as fast.

    An image, which is the same at all moments in time, comes with one of them: then weights are added up over moments.
    """
    projection, moments = embed.proj, embed.temporal_patch_size
    patches = patches.unflatten(1, (embed.in_channels, -1, embed.patch_size**2))
    folds = type(projection) is nn.Conv3d and projection.weight.dtype == torch.float32  # Others would round the sum.
    if not folds:
        patches = patches.expand(-1, -1, moments, -1)
    flat = patches.flatten(1)
    if type(projection) is not nn.Conv3d:  # A LoRA's.
        embedded: Tensor = type(embed).forward(embed, flat)
        return embedded
    weight = projection.weight if patches.shape[2] == moments else projection.weight.sum(dim=2)
    return linear(flat.to(weight.dtype), weight.flatten(1), projection.bias)


def _add_features(hidden: Tensor, _: None, features: Tensor) -> Tensor:
    # Zero at texts: to add only where images are, the device would have to tell the host where.
    return hidden + features


def _forward_last(layer: Any, hidden_states: Float[Tensor, "1 T H"], *, packed: Packed, **options: Any) -> Tensor:
    """Run a decoder layer of Qwen3-VL, with queries, residual and MLP of the last tokens, and keys of all."""
    if packed.last is None:
        whole: Tensor = type(layer).forward(layer, hidden_states, packed=packed, **options)
        return whole
    attended = _attend_last(layer.self_attn, layer.input_layernorm(hidden_states), packed, packed.last, **options)
    hidden = hidden_states.index_select(1, packed.last.index) + attended  # (1, tokens, H)
    output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return output


def _attend_last(
    attention: Any, hidden: Tensor, packed: Packed, last: LastTokens, position_embeddings: Any, **options: Any
) -> Float[Tensor, "1 tokens H"]:
    """Do what transformers' attention does, with the queries of the last tokens and the keys and values of all."""
    size = (-1, attention.head_dim)
    query = attention.q_norm(attention.q_proj(hidden.index_select(1, last.index)).unflatten(-1, size)).transpose(1, 2)
    key = attention.k_norm(attention.k_proj(hidden).unflatten(-1, size)).transpose(1, 2)
    value = attention.v_proj(hidden).unflatten(-1, size).transpose(1, 2)
    angles = [angle.index_select(1, last.index) for angle in position_embeddings]
    query, _ = apply_rotary_pos_emb(query, query, *angles)
    key, _ = apply_rotary_pos_emb(key, key, *position_embeddings)
    packed = replace(packed, queries=last.bounds)
    options |= packed.flash_arguments | {"packed": packed, "scaling": attention.scaling}
    dropout = attention.attention_dropout if attention.training else 0.0
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    output, _ = attend(attention, query, key, value, dropout=dropout, **options)
    projected: Tensor = attention.o_proj(output.flatten(-2))
    return projected
