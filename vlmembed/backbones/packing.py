"""Qwen3-VL inputs without padding: what travels from loader workers to the model.

transformers' inputs are split into the texts, chunk by chunk, and the distinct images. Everything that follows from the
images' sizes (rotary positions, taps into the position embeddings) is computed here, in the worker, so that the model
never has to ask the device for a number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PretrainedConfig
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from vlmembed.backbones.prefix_sharing import common, kept, neighbours, signature
from vlmembed.types import Inputs, Prepared

#: What transformers calls the pixels and the grids of each of ``mm_token_type_ids``: 0 is text.
VISION_INPUTS = {1: ("pixel_values", "image_grid_thw"), 2: ("pixel_values_videos", "video_grid_thw")}

#: What a chunk of images has one of for each image; of the rest it has one for each patch.
PER_IMAGE = ("grid_thw", "keys")


@dataclass(frozen=True)
class VisionLayout:
    """What of a vision tower decides which numbers belong to which patch.

    Args:
        merge_size: Patches per token and side.
        table_size: Rows, and columns, of the learned position embeddings.
    """

    merge_size: int
    table_size: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> VisionLayout:
        """Read a Qwen3-VL configuration."""
        vision = config.vision_config
        return cls(vision.spatial_merge_size, int(vision.num_position_embeddings**0.5))


@dataclass(frozen=True)
class _Image:
    """An image, or a video, of the batch; equal ones have equal keys."""

    kind: int
    key: int
    grid: tuple[int, int, int]
    pixels: Tensor

    def tokens(self, merge_size: int) -> tuple[int, int]:
        """Return the rows and columns of tokens, of one frame."""
        _, height, width = self.grid
        return height // merge_size, width // merge_size


class PackedItems(Prepared):
    """Items that transformers' processor has read, to be cut into chunks.

    A chunk holds ``input_ids`` and ``attention_mask`` (B, L), which poolings read; ``position_ids`` (3, T) of its T
    real tokens; and ``images`` (n, 2): for every image, in the order in which the model reads them, its item's row in
    the chunk and its place among the distinct images of the batch. Where items share beginnings there are ``shared``
    (B,), how many first tokens each item has in common with the one before it, and ``image_starts`` (n,), the token of
    its item at which each image begins.

    A chunk of images holds ``pixel_values`` (patches, numbers), ``position_ids`` (patches, 2), ``taps`` and ``weights``
    (patches, 4), one patch after the other; and for each image ``grid_thw`` (n, 3) and ``keys`` (n,).

    Args:
        inputs: What the processor returns for N items.
        layout: Of the vision tower.
        shares: Whether items share beginnings; see `sharing`.
    """

    def __init__(self, inputs: Inputs, layout: VisionLayout, shares: bool = False) -> None:
        self._inputs = inputs
        self._layout = layout
        self._shares = shares
        self.padded = not shares  # Sharing items are packed; see `collate.cut`.
        self._signatures: list[np.ndarray] = []
        self._image_starts: list[list[int]] = []
        self._positions: list[Tensor] = []
        self._item_images: list[list[int]] = []
        distinct: dict[int, _Image] = {}
        frames = {kind: _frames(inputs, kind) for kind in VISION_INPUTS}
        rows = zip(inputs["input_ids"], inputs["mm_token_type_ids"], inputs["attention_mask"].bool(), strict=True)
        for ids, types, mask in rows:
            kinds, lengths = (each.tolist() for each in types[mask].unique_consecutive(return_counts=True))
            runs = [next(frames[kind]) if kind else None for kind in kinds]
            starts = accumulate(lengths, initial=0)
            self._image_starts.append([start for start, run in zip(starts, runs, strict=False) if run and run[1] == 0])
            if shares:
                self._signatures.append(signature(ids[mask], types[mask], [run[0].key for run in runs if run]))
            sizes = [run[0].tokens(layout.merge_size) if run else None for run in runs]
            self._positions.append(rotary_positions(lengths, sizes))
            self._item_images.append([run[0].key for run in runs if run and run[1] == 0])
            distinct.update({run[0].key: run[0] for run in runs if run})
        # Images before videos, whose patches hold more numbers; then the largest first, as for texts.
        self._images = sorted(distinct.values(), key=lambda image: (image.kind, -len(image.pixels)))
        self._places = {image.key: place for place, image in enumerate(self._images)}

    @property
    def lengths(self) -> list[int]:
        """(N,) the tokens of each item."""
        return [positions.shape[1] for positions in self._positions]

    @property
    def patches(self) -> list[int]:
        """(N,) the patches of each item's images."""
        return [sum(len(self._images[self._places[key]].pixels) for key in keys) for keys in self._item_images]

    @property
    def order(self) -> list[int]:
        """The items' rows, so that neighbours share a beginning, or are of similar length."""
        if self._shares:
            return neighbours(self._signatures)
        return sorted(range(len(self.lengths)), key=self.lengths.__getitem__, reverse=True)

    def shared(self, rows: Sequence[int]) -> list[int]:
        """Count, for each of some rows, the first tokens that a chunk of them takes from the row before."""
        if not self._shares:
            return [0] * len(rows)
        signatures = [self._signatures[row] for row in rows]
        return [0, *(common(*neighbouring) for neighbouring in pairwise(signatures))]

    def chunk(self, rows: Sequence[int]) -> Inputs:
        """Make one chunk of some of the items."""
        mask = self._inputs["attention_mask"][list(rows)]
        width = int(mask.any(dim=0).nonzero().max()) + 1
        images = [(index, self._places[key]) for index, row in enumerate(rows) for key in self._item_images[row]]
        chunk = {
            "input_ids": self._inputs["input_ids"][list(rows), :width],
            "attention_mask": mask[:, :width].contiguous(),
            "position_ids": torch.cat([self._positions[row] for row in rows], dim=1),
            "images": torch.tensor(images, dtype=torch.long).reshape(-1, 2),
        }
        if self._shares:
            starts = [start for row in rows for start in self._image_starts[row]]
            chunk["image_starts"] = torch.tensor(starts, dtype=torch.long)
            chunk["shared"] = torch.tensor(self.shared(rows))
        return chunk

    def images(self, room: int | None = None) -> list[Inputs]:
        """Make chunks of the distinct images; see `Prepared.images`."""
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
        grids = torch.tensor([image.grid for image in images])
        taps, weights = get_vision_interpolation_indices_and_weights(
            grids, self._layout.table_size, align_corners=True, spatial_merge_size=self._layout.merge_size
        )
        return {
            "pixel_values": torch.cat([image.pixels for image in images]),
            "position_ids": get_vision_position_ids(grids, self._layout.merge_size),
            "taps": taps,
            "weights": weights,
            "grid_thw": grids,
            "keys": torch.tensor([image.key for image in images]),
        }


def _frames(inputs: Inputs, kind: int) -> Iterator[tuple[_Image, int]]:
    """Yield what each run of visual tokens shows: an image, or one of a video's frames, with its number.

    Where ``image_order`` is there, it says of each image of the texts which of the distinct ones it is.
    """
    pixels, grids = (inputs.get(name) for name in VISION_INPUTS[kind])
    if pixels is None or grids is None:
        return
    parts = zip(pixels.split(grids.prod(dim=1).tolist()), grids.tolist(), strict=True)
    images = [_Image(kind, _key(kind, part, grid), tuple(grid), part) for part, grid in parts]
    order = inputs["image_order"].tolist() if "image_order" in inputs else range(len(images))
    for place in order:
        yield from ((images[place], frame) for frame in range(images[place].grid[0]))


def _key(kind: int, pixels: Any, grid: Sequence[int]) -> int:
    hashed = hashlib.blake2b(f"{kind} {grid}".encode(), digest_size=8)
    hashed.update(pixels.contiguous().numpy())
    return int.from_bytes(hashed.digest(), "big") >> 1


def rotary_positions(lengths: Sequence[int], sizes: Sequence[tuple[int, int] | None]) -> Int[Tensor, "3 L"]:
    """Place an item's tokens in time, height and width, as Qwen3-VL's rotary embedding wants it (arXiv:2409.12191).

    A text goes on by one in all three. An image, or a frame, stands still in time, lies in the plane, and takes as much
    room as its longer side.

    Args:
        lengths: Of each run of text, or of visual tokens.
        sizes: Of each run: an image's rows and columns of tokens; None for a text.
    """
    pieces = []
    start = 0
    for length, size in zip(lengths, sizes, strict=True):
        if size is None:
            pieces.append(torch.arange(start, start + length).expand(3, -1))
            start += length
        else:
            rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
            pieces.append(start + torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1))
            start += max(size)
    return torch.cat(pieces, dim=1)


def frame_patches(grids: Int[Tensor, "n 3"]) -> Int[Tensor, " frames"]:
    """Return how many patches each frame has: frames attend to themselves alone."""
    return (grids[:, 1] * grids[:, 2]).repeat_interleave(grids[:, 0])


def select(chunk: Inputs, places: Sequence[int]) -> Inputs:
    """Take some images out of their chunk, as a chunk of their own."""
    patches = chunk["grid_thw"].prod(dim=1).tolist()
    of_each = {name: values.split(1 if name in PER_IMAGE else patches) for name, values in chunk.items()}
    return {name: torch.cat([values[place] for place in places]) for name, values in of_each.items()}


def picked(chunks: Sequence[Inputs], places: Collection[int]) -> Iterator[tuple[Inputs, list[int]]]:
    """Take images out of several chunks, as one chunk of images and one of videos.

    Args:
        chunks: Chunks of images.
        places: Of the images to take, counted over all chunks.

    Yields:
        A chunk, and the places of its images. One each, because a tower that ran twice would have two gradients.
    """
    parts: dict[int, list[tuple[Inputs, list[int]]]] = {}
    start = 0
    for chunk in chunks:
        own = [place for place in range(start, start + len(chunk["keys"])) if place in places]
        if own:
            part = select(chunk, [place - start for place in own])
            parts.setdefault(chunk["pixel_values"].shape[1], []).append((part, own))
        start += len(chunk["keys"])
    for same in parts.values():
        joined = {name: torch.cat([part[name] for part, _ in same]) for name in same[0][0]}
        yield joined, [place for _, own in same for place in own]


def take(chunk: Inputs, rows: Sequence[int]) -> Inputs:
    """Take some items out of their chunk, in order, as a chunk of their own."""
    positions = chunk["position_ids"].split(chunk["attention_mask"].sum(dim=1).tolist(), dim=1)
    shown = [number for number, row in enumerate(chunk["images"][:, 0].tolist()) if row in rows]
    images = [(rows.index(row), place) for row, place in chunk["images"][shown].tolist()]
    taken = {
        "input_ids": chunk["input_ids"][list(rows)],
        "attention_mask": chunk["attention_mask"][list(rows)],
        "position_ids": torch.cat([positions[row] for row in rows], dim=1),
        "images": torch.tensor(images, dtype=torch.long).reshape(-1, 2),
    }
    if "shared" in chunk:
        taken |= {"image_starts": chunk["image_starts"][shown], "shared": kept(chunk["shared"], rows)}
    return taken


def halve(chunk: Inputs) -> list[Inputs]:
    """Cut a chunk of items in two, or leave it alone if it has one item."""
    items = range(len(chunk["attention_mask"]))
    middle = len(items) // 2
    return [take(chunk, items[:middle]), take(chunk, items[middle:])] if middle else [chunk]
