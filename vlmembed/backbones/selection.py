"""Taking items and images out of their chunks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from vlmembed.backbones.packing import PER_IMAGE
from vlmembed.backbones.sharing import kept
from vlmembed.types import Inputs


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
