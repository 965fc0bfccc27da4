"""Documents and queries made small enough to be shown in a report."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from vlmembed.ablation.results import document_path
from vlmembed.files import write_whole
from vlmembed.media import load_image
from vlmembed.types import Item

#: Pixels of the longest side of a picture, and characters of a text.
SIDE, CHARACTERS = 160, 2_000


def show(items: Mapping[str, Item], evaluation: str, folder: Path) -> None:
    """Write the first picture of some items, or the text of one that has none, unless another run has.

    Args:
        items: By id: documents of an evaluation set, or queries.
        evaluation: The set's name.
        folder: Where those of all sets are.
    """
    for name, item in items.items():
        picture, text = (document_path(folder, evaluation, name, kind) for kind in ("jpg", "txt"))
        if not picture.exists() and not text.exists():
            frames = [frame for part in item.parts for frame in part.frames]
            if frames:
                image = load_image(frames[0], item.origin)
                image.thumbnail((SIDE, SIDE))
                content = io.BytesIO()
                image.save(content, "JPEG", quality=80)
                write_whole(picture, content.getvalue())
            else:
                write_whole(text, (words_of(item) or item.origin)[:CHARACTERS].encode())


def words_of(item: Item) -> str | None:
    """Return an item's texts, and the names of its video files, or None if it has neither."""
    words = [str(part.value) for part in item.parts if part.kind == "text"]
    words += [part.value.name for part in item.parts if part.kind == "video" and isinstance(part.value, Path)]
    return "\n".join(words) or None
