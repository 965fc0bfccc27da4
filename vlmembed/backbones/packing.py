"""Qwen3-VL inputs without padding, and without repeated beginnings: what travels from loader workers to the model.

What follows from the images' sizes (positions, weights of position embeddings) is computed here, in the worker, so
that the model never has to ask the device for a number.

The attention over such sequences is here, too, with a last layer that computes the last tokens alone. transformers
calls `packed_attention` through its attention interface. On a GPU in half precision it is PyTorch's variable-length
kernel; elsewhere ordinary attention, once for each run of sequences of equal length.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from vlmembed.types import Inputs, Prepared

#: What transformers calls the pixels and the grids of each of ``mm_token_type_ids``: 0 is text.
VISION_INPUTS = {1: ("pixel_values", "image_grid_thw"), 2: ("pixel_values_videos", "video_grid_thw")}

#: What a chunk of images has one of for each image; of the rest it has one for each patch.
PER_IMAGE = ("grid_thw", "keys")


class _Image(NamedTuple):
    """A distinct image, or video, of the batch; equal ones have equal keys."""

    kind: int
    key: int
    grid: tuple[int, int, int]
    pixels: Tensor


class PackedItems(Prepared):
    """Items that transformers' processor has read, to be cut into chunks.

    A chunk holds ``input_ids`` and ``attention_mask`` (B, L), which poolings read; ``position_ids`` (3, T) of its T
    real tokens; and ``images`` (n, 2): for every image, in the order in which the model reads them, its item's row in
    the chunk and its index among the distinct images of the batch. Where items share beginnings there are ``shared``
    (B,), how many first tokens each item has in common with the one before it, and ``image_starts`` (n,), the token of
    its item at which each image begins.

    A chunk of images holds ``pixel_values`` (patches, numbers), ``position_ids`` (patches, 2), ``taps`` and ``weights``
    (patches, 4), one patch after the other; and for each image ``grid_thw`` (n, 3) and ``keys`` (n,).

    Args:
        inputs: What the processor returns for N items; ``image_order`` says which of its images each image is.
        vision: The vision tower's configuration.
        shares: Whether items share beginnings; see `Sharing`.
    """

    def __init__(self, inputs: Inputs, vision: PretrainedConfig, shares: bool = False) -> None:
        self._inputs, self._vision, self._shares = inputs, vision, shares
        self.padded = not shares  # Sharing items are packed; see `collate.cut`.
        self._positions: list[Tensor] = []
        self._item_images: list[list[tuple[int, int]]] = []  # Of each item: key and first token of its images.
        # Of each item: (L,) numbers that are equal where tokens, and the images at them, are.
        self._signatures: list[np.ndarray] = []
        images: dict[int, _Image] = {}
        frames = {kind: _frames(inputs, kind) for kind in VISION_INPUTS}
        rows = zip(inputs["input_ids"], inputs["mm_token_type_ids"], inputs["attention_mask"].bool(), strict=True)
        for ids, types, mask in rows:
            # An item is runs of tokens: a text, an image, or one frame of a video; between two frames there is a text.
            kinds, lengths = (counts.tolist() for counts in types[mask].unique_consecutive(return_counts=True))
            runs = [next(frames[kind]) if kind else None for kind in kinds]
            starts = accumulate(lengths, initial=0)
            self._positions.append(_rotary_positions(lengths, [run and run[0].grid for run in runs], vision))
            self._item_images.append(
                [(run[0].key, start) for start, run in zip(starts, runs, strict=False) if run and run[1] == 0]
            )
            if shares:
                # Negative, so that no image's key is a token's id.
                keys = np.repeat([-1 - run[0].key if run else 0 for run in runs], lengths)
                self._signatures.append(np.where(types[mask] > 0, keys, ids[mask]))
            images.update({run[0].key: run[0] for run in runs if run})
        if any(next(left, None) for left in frames.values()):
            raise ValueError("The chat template leaves out an image or a video of an item. Mend the template.")
        # Images before videos, whose patches hold more numbers; then the largest first, as for texts.
        self._images = sorted(images.values(), key=lambda image: (image.kind, -len(image.pixels)))
        self._index = {image.key: index for index, image in enumerate(self._images)}

    @cached_property
    def lengths(self) -> list[int]:
        """(N,) the tokens of each item."""
        return [positions.shape[1] for positions in self._positions]

    @property
    def patches(self) -> list[int]:
        """(N,) the patches of each item's images."""
        return [sum(len(self._images[self._index[key]].pixels) for key, _ in images) for images in self._item_images]

    @property
    def order(self) -> list[int]:
        """The items' rows, so that neighbours share a beginning, or are of similar length."""
        if not self._shares:
            return super().order
        return sorted(range(len(self._signatures)), key=lambda row: self._signatures[row].astype(">i8").tobytes())

    def shared(self, rows: Sequence[int]) -> list[int]:
        """Count, for each of some rows, the first tokens that a chunk of them takes from the row before."""
        return shared_lengths([self._signatures[row] for row in rows]) if self._shares else super().shared(rows)

    def chunk(self, rows: Sequence[int]) -> Inputs:
        """Make one chunk of some of the items."""
        mask = self._inputs["attention_mask"][list(rows)]
        width = int(mask.any(dim=0).nonzero().max()) + 1
        shown = [(number, *image) for number, row in enumerate(rows) for image in self._item_images[row]]
        chunk = {
            "input_ids": self._inputs["input_ids"][list(rows), :width],
            "attention_mask": mask[:, :width].contiguous(),
            "position_ids": torch.cat([self._positions[row] for row in rows], dim=1),
            "images": torch.tensor([(number, self._index[key]) for number, key, _ in shown]).long().reshape(-1, 2),
        }
        if "kept" in self._inputs:
            chunk["kept"] = self._inputs["kept"][list(rows), :width].contiguous()
        if self._shares:
            chunk["image_starts"] = torch.tensor([start for _, _, start in shown], dtype=torch.long)
            chunk["shared"] = torch.tensor(self.shared(rows))
        return chunk

    def images(self, room: int | None = None) -> list[Inputs]:
        """Make chunks of the distinct images, of at most so many patches; see `Prepared.images`."""
        chunks: list[list[_Image]] = []
        left = 0.0
        for image in self._images:
            if len(image.pixels) > left or image.kind != chunks[-1][-1].kind:
                chunks.append([])
                left = math.inf if room is None else room
            chunks[-1].append(image)
            left -= len(image.pixels)
        return [self._image_chunk(images) for images in chunks]

    def _image_chunk(self, images: Sequence[_Image]) -> Inputs:
        merge_size, table_size = self._vision.spatial_merge_size, int(self._vision.num_position_embeddings**0.5)
        grids = torch.tensor([image.grid for image in images])
        # The learned position embeddings are a square table, from which each patch takes a mean of four rows.
        taps, weights = get_vision_interpolation_indices_and_weights(
            grids, table_size, align_corners=True, spatial_merge_size=merge_size
        )
        return {
            "pixel_values": torch.cat([image.pixels for image in images]),
            "position_ids": get_vision_position_ids(grids, merge_size),
            "taps": taps,
            "weights": weights,
            "grid_thw": grids,
            "keys": torch.tensor([image.key for image in images]),
        }


def _frames(inputs: Inputs, kind: int) -> Iterator[tuple[_Image, int]]:
    """Yield what each run of visual tokens shows: an image, or one of a video's frames, with its number."""
    pixels, grids = (inputs.get(name) for name in VISION_INPUTS[kind])
    if pixels is None or grids is None:
        return
    images = []
    for patches, grid in zip(pixels.split(grids.prod(dim=1).tolist()), grids.tolist(), strict=True):
        hashed = hashlib.blake2b(f"{kind} {grid}".encode(), digest_size=8)
        hashed.update(patches.contiguous().numpy())
        images.append(_Image(kind, int.from_bytes(hashed.digest(), "big") >> 1, tuple(grid), patches))
    for index in inputs["image_order"].tolist() if "image_order" in inputs else range(len(images)):
        yield from ((images[index], frame) for frame in range(images[index].grid[0]))


def _rotary_positions(
    lengths: Sequence[int], grids: Sequence[tuple[int, int, int] | None], vision: PretrainedConfig
) -> Int[Tensor, "3 L"]:
    """Give the runs of an item's tokens their time, height and width, as Qwen3-VL does (arXiv:2409.12191)."""
    pieces, start = [], 0
    for length, grid in zip(lengths, grids, strict=True):
        if grid is None:  # A text counts on by one in all three.
            pieces.append(torch.arange(start, start + length).expand(3, -1))
            start += length
        else:  # An image, or a frame, has one time, lies in the plane, and takes as many positions as its longer side.
            sides = [side // vision.spatial_merge_size for side in grid[1:]]
            rows, columns = torch.meshgrid(*map(torch.arange, sides), indexing="ij")
            pieces.append(start + torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1))
            start += max(sides)
    return torch.cat(pieces, dim=1)


def select(chunk: Inputs, indices: Sequence[int]) -> Inputs:
    """Take some images out of their chunk, as a chunk of their own."""
    patches = chunk["grid_thw"].prod(dim=1).tolist()
    images = {name: values.split(1 if name in PER_IMAGE else patches) for name, values in chunk.items()}
    return {name: torch.cat([values[index] for index in indices]) for name, values in images.items()}


def picked(chunks: Sequence[Inputs], indices: Collection[int]) -> Iterator[tuple[Inputs, list[int]]]:
    """Take images, by their index over all chunks, as one chunk of images and one of videos, whose patches are larger.

    Yields each with the indices of its images. One each, because a tower that ran twice would have two gradients.
    """
    parts: dict[int, list[tuple[Inputs, list[int]]]] = {}
    start = 0
    for chunk in chunks:
        end = start + len(chunk["keys"])
        if chosen := [index for index in range(start, end) if index in indices]:
            part = select(chunk, [index - start for index in chosen])
            parts.setdefault(chunk["pixel_values"].shape[1], []).append((part, chosen))
        start = end
    for same in parts.values():
        joined = {name: torch.cat([part[name] for part, _ in same]) for name in same[0][0]}
        yield joined, [index for _, chosen in same for index in chosen]


def halve(chunk: Inputs) -> list[Inputs]:
    """Cut a chunk of items in two, or leave it alone if it has one item."""
    middle = len(chunk["attention_mask"]) // 2
    if not middle:
        return [chunk]
    images = int((chunk["images"][:, 0] < middle).sum())
    ends = {"position_ids": int(chunk["attention_mask"][:middle].sum()), "images": images, "image_starts": images}
    parts = {
        name: values.tensor_split([ends.get(name, middle)], dim=1 if name == "position_ids" else 0)
        for name, values in chunk.items()
    }
    first, second = ({name: pair[half] for name, pair in parts.items()} for half in (0, 1))
    second["images"] = second["images"] - torch.tensor([middle, 0])
    if "shared" in second:
        # The first row of the second half has no row before it any more.
        second["shared"] = second["shared"].index_fill(0, torch.tensor([0]), 0)
    return [first, second]


# Items that begin alike compute their beginning once


def shared_lengths(signatures: Sequence[np.ndarray]) -> list[int]:
    """Count the tokens that each item begins with as the one before it does; one at least is left to compute."""
    counts = [0] * len(signatures)
    for row, (before, item) in enumerate(pairwise(signatures), start=1):
        length = min(len(before), len(item) - 1)
        different = (before[:length] != item[:length]).nonzero()[0]
        counts[row] = int(different[0]) if len(different) else length
    return counts


@dataclass(frozen=True)
class Sharing:
    """Which tokens of a chunk are computed, and which of those each token is.

    Under causal attention a token's state depends on nothing behind it. So of two items that begin with the same
    tokens, and the same images (candidates of one query, queries of one document), the second takes the states of its
    beginning from the first: scores and gradients are the same, in less time.
    """

    computed: Bool[Tensor, " T"]  # True at the tokens that are computed.
    index: Int[Tensor, " T"]  # Of each token, among the computed ones.
    counts: Int[Tensor, " B"]  # How many tokens of each item are computed.

    @classmethod
    def of(cls, lengths: Int[Tensor, " B"], shared: Int[Tensor, " B"]) -> Sharing:
        """Follow how many first tokens each item shares with the one before it, which may share them in its turn."""
        counts, start = lengths - shared, 0
        index: list[Tensor] = []
        for prefix, count in zip(shared.tolist(), counts.tolist(), strict=True):
            new = torch.arange(start, start + count)
            index.append(torch.cat([index[-1][:prefix], new]) if prefix else new)
            start += count
        computed = [torch.arange(len(item)) >= prefix for item, prefix in zip(index, shared.tolist(), strict=True)]
        return cls(torch.cat(computed), torch.cat(index), counts)


def computed_images(chunk: Inputs) -> list[int]:
    """Return the index of each image that a chunk computes with: not those of shared beginnings."""
    images = chunk["images"]
    if "shared" in chunk:
        images = images[chunk["image_starts"] >= chunk["shared"][images[:, 0]]]
    indices: list[int] = images[:, 1].tolist()
    return indices


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
