"""One cell of a data set, in any of the forms that Sentence Transformers accepts, becomes an ``Item``."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vlmembed.media import UNREADABLE, Folder, limit, open_image
from vlmembed.types import Frame, Item, Part, Role

KINDS = ("text", "image", "video")

#: The most bytes, in UTF-8, that a text may have. ``max_length`` cuts it only once all of it has been tokenized, and a
#: million tokens take two seconds and a gigabyte.
MAX_TEXT_BYTES = limit("VLMEMBED_MAX_TEXT_BYTES", 2**21)


def to_item(cell: Any, role: Role, folder: Folder, origin: str) -> Item:
    """Read one cell.

    A plain string is always text, never a path, so that no text can turn into an image because a file of that name
    exists: write ``{"image": "page.png"}``. The keys of a mapping are kept in order, because the order changes the
    embedding; keys whose value is null are skipped, because Arrow fills every key that another row has.

    Args:
        cell: A string; an image; a mapping with any of ``text``, ``image``, ``video``, each one value or a list; a list
            of chat content parts (``{"type": "image", "image": …}``); a chat message or a list of them. An image is
            open, a path, or ``{"bytes": …, "path": …}``. A video is a path, or the list of its frames.
        role: Whether the item asks or answers.
        folder: Where relative paths start, and what files may not leave.
        origin: Where the cell came from, for error messages.

    Raises:
        ValueError: If the cell is empty, has another form, or names a file that does not exist or is outside.
    """
    try:
        parts = tuple(_cell_parts(cell, folder, origin))
    except RecursionError as error:
        raise ValueError(f"{origin}: the cell is nested too deeply.") from error
    if not parts:
        raise ValueError(f"{origin}: the cell is empty ({cell!r}); every item needs a text, an image or a video.")
    return Item(role, parts, origin)


def is_content(cell: Any) -> bool:
    """Tell a list that is one item (chat content parts, or chat messages) from a list of several items."""
    if not isinstance(cell, list) or not cell:
        return False
    return all(isinstance(part, Mapping) and ("type" in part or "role" in part) for part in cell)


def _cell_parts(cell: Any, folder: Folder, origin: str) -> Iterator[Part]:
    if cell is None:
        return
    if isinstance(cell, str):
        yield _text(cell, origin)
    elif isinstance(cell, Image.Image) or _is_encoded_image(cell):
        yield Part("image", _frame(cell, folder, origin))
    elif isinstance(cell, Mapping) and "role" in cell:
        yield from _message_parts(cell, folder, origin)
    elif isinstance(cell, Mapping):
        for kind, value in cell.items():
            yield from _kind_parts(kind, value, folder, origin)
    elif is_content(cell):
        for part in cell:
            yield from (_message_parts if "role" in part else _content_parts)(part, folder, origin)
    else:
        raise ValueError(
            f"{origin}: expected a string, an image, a mapping with {', '.join(KINDS)}, or a list of content parts, "
            f"got {type(cell).__name__} {cell!r:.100}."
        )


def _message_parts(message: Mapping[str, Any], folder: Folder, origin: str) -> Iterator[Part]:
    if message["role"] != "user":
        raise ValueError(
            f"{origin}: a chat message here is the user's, got role {message['role']!r}; instructions belong in the "
            "model's prompts, which are exported with it."
        )
    yield from _cell_parts(message.get("content"), folder, origin)


def _content_parts(part: Mapping[str, Any], folder: Folder, origin: str) -> Iterator[Part]:
    kind = str(part["type"])
    unused = sorted(key for key, value in part.items() if key not in ("type", kind) and value is not None)
    if part.get(kind) is None or unused:
        raise ValueError(f"{origin}: a content part is {{'type': kind, kind: value}}, got {dict(part)!r:.200}.")
    yield from _kind_parts(kind, part[kind], folder, origin)


def _kind_parts(kind: str, value: Any, folder: Folder, origin: str) -> Iterator[Part]:
    if kind not in KINDS:
        raise ValueError(f"{origin}: unknown key {kind!r} (value {value!r:.100}); use {', '.join(KINDS)}.")
    if value is None:
        return
    is_one = not isinstance(value, list | tuple) or (kind == "video" and bool(value) and all(map(_is_frame, value)))
    for one in [value] if is_one else value:
        if kind == "text":
            yield _text(one, origin)
        elif kind == "image":
            yield Part("image", _frame(one, folder, origin))
        else:
            yield Part("video", _video(one, folder, origin))


def _text(value: Any, origin: str) -> Part:
    if not isinstance(value, str):
        raise ValueError(f"{origin}: a text is a string, got {type(value).__name__} {value!r:.100}.")
    if not value.strip():
        raise ValueError(f"{origin}: the text is empty ({value!r:.100}); remove the row, or the key.")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:  # Half of a pair of JSON's escapes, such as \ud83d alone.
        raise ValueError(f"{origin}: the text {value!r:.100} has what is no character ({error}).") from error
    if size > MAX_TEXT_BYTES:
        raise ValueError(
            f"{origin}: the text has {size:,} bytes, more than the limit of {MAX_TEXT_BYTES:,}; "
            "VLMEMBED_MAX_TEXT_BYTES sets it."
        )
    return Part("text", value)


def _video(value: Any, folder: Folder, origin: str) -> Path | tuple[Frame, ...]:
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{origin}: a video without frames.")
        return tuple(_frame(frame, folder, origin) for frame in value)
    return folder.find(value, "video", origin)


def _frame(value: Any, folder: Folder, origin: str) -> Frame:
    if isinstance(value, Image.Image):
        return value
    if not _is_encoded_image(value):
        return folder.find(value, "image", origin)
    if value.get("bytes") is None:
        return folder.find(value.get("path"), "image", origin)
    try:
        image = open_image(value["bytes"])
        image.load()  # A truncated image fails here, where the message can say which row it is in.
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except UNREADABLE as error:
        raise ValueError(f"{origin}: cannot read image {value.get('path') or 'given as bytes'}: {error}") from error


def _is_encoded_image(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and value.keys() <= {"bytes", "path"}


def _is_frame(value: Any) -> bool:
    """Whether a list of such values is one video, as opposed to several."""
    if isinstance(value, str | Path):
        return (mimetypes.guess_type(str(value))[0] or "").startswith("image/")
    return isinstance(value, Image.Image) or _is_encoded_image(value)
