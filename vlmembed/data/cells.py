"""Cells of a data set, in any of the forms that Sentence Transformers accepts, become items."""

from __future__ import annotations

import mimetypes
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants
from PIL import Image

from vlmembed.data.pdf import PdfPage, all_pages
from vlmembed.media import HEAD, encode_audio, is_audio, is_video, limit
from vlmembed.types import Frame, Item, LazyImage, Part, Role

KINDS = ("text", "image", "video", "audio", "pdf")

#: The page of a PDF by one name, as `vlmembed.data.Pages` has it in its ids.
PAGE_OF_PDF = re.compile(r"(.+)#page=(\d+)", re.DOTALL)

#: The most bytes, in UTF-8, that a text may have: ``max_length`` cuts it only once all of it has been tokenized.
MAX_TEXT_BYTES = limit("VLMEMBED_MAX_TEXT_BYTES", 2**21)

#: ``https://…``, ``file:/…``, ``data:…``, but not ``figure:1.png``.
URL = re.compile(r"[a-z][a-z0-9+.-]+:/|(file|data):", re.IGNORECASE)

#: What is in a cell, whether it is a query or a document, and where the cell is, for error messages.
Cell = tuple[Any, Role, str]


@dataclass(frozen=True)
class Folder:
    """The media root of a data set: where relative paths start, and what they may not leave.

    A data set could name any file of this machine, to have it embedded or shown in a report. So a path that leads out,
    whether it is absolute, goes up, or goes through a link, is refused; and nothing is ever downloaded.
    """

    path: Path
    others: tuple[Path, ...] = ()  # Folders whose files may be named besides.

    @classmethod
    def of(cls, path: str | list[str], allow_outside: Iterable[str] | None) -> Folder:
        """Return the media root of a path, a glob, a list of these, or a Hub id.

        Of a list, it is the folder that all files are in. ``datasets`` puts the files of a Hub id into its caches.
        """
        others = tuple(map(Path, allow_outside or ()))
        roots = {_root(one) for one in ([path] if isinstance(path, str) else path)} or {Path()}
        root = Path(os.path.commonpath([root.absolute() for root in roots])) if len(roots) > 1 else roots.pop()
        if not isinstance(path, str) or Path(path) != root:
            return cls(root, others)
        config = datasets.config
        downloads = constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH
        return cls(root, (*others, *map(Path, downloads)))

    def find(self, value: Any, kind: str, origin: str) -> Path:
        """Return the file that a cell names, relative to the folder or absolute, if it is one, and inside."""
        if not isinstance(value, str | Path) or not str(value):
            a_kind = f"{'an' if kind in ('image', 'audio') else 'a'} {kind}"
            raise ValueError(
                f"{origin}: expected the path of {a_kind} file, got {type(value).__name__} {value!r:.100}."
            )
        return self.locate(str(value), kind, origin, must_exist=True)

    def locate(self, value: str, kind: str, origin: str, must_exist: bool = False) -> Path:
        """Return where a path leads that is relative to the folder or absolute; refuse one that leads outside."""
        if URL.match(value):
            raise ValueError(
                f"{origin}: the {kind} {value!r:.100} is a URL, and nothing is downloaded. Put the file into "
                f"{self.path}, and give its path."
            )
        path = self.path / value
        try:
            value.encode()
            real, exists = Path(os.path.realpath(path)), path.is_file()
        except (OSError, ValueError) as error:  # Too long; with a null byte; with what is no character.
            raise ValueError(f"{origin}: the {kind} file {value!r:.100} cannot be looked for: {error}.") from error
        if not any(map(real.is_relative_to, self._allowed)):
            raise ValueError(
                f"{origin}: the {kind} file {value!r} leads out of the data set's folder {self.path}, to {real}. "
                "Move the file there, or if you trust this data set to name files of another folder, allow that one: "
                f"allow_outside: [{real.parent}] beside 'path' (vlmembed.data.Rows, vlmembed.data.EvaluationFolder)."
            )
        if must_exist and not exists:
            raise ValueError(f"{origin}: the {kind} file {path} does not exist.")
        return path

    @cached_property
    def _allowed(self) -> tuple[Path, ...]:
        return tuple(Path(os.path.realpath(folder)) for folder in (self.path, *self.others))


def _root(path: str) -> Path:
    """Return the folder of a file, or what of a glob is no pattern."""
    if os.path.isfile(path):
        return Path(path).parent
    parts = Path(path).parts
    return Path(*(parts if os.path.lexists(path) else takewhile(re.compile(r"[^*?[]*").fullmatch, parts)))


def to_items(cells: Iterable[Cell], folder: Folder) -> list[Item]:
    """Read cells, of the forms in README.md; a ``ValueError`` names the cell that is empty or has another form.

    A plain string is always text, never a path. The keys of a mapping stay in order, because the order changes the
    embedding; keys whose value is null are skipped, because Arrow fills every key that another row has.
    """
    items = []
    for cell, role, origin in cells:
        try:
            parts = tuple(_parts(cell, folder, origin))
        except RecursionError as error:
            raise ValueError(f"{origin}: the cell is nested too deeply.") from error
        if not parts:
            raise ValueError(f"{origin}: the cell is empty ({cell!r}); every item needs one of {', '.join(KINDS)}.")
        items.append(Item(role, parts, origin))
    return items


def instructed(items: Sequence[Item], instruction: Any, origin: str) -> list[Item]:
    """Give items what their row says that the model is told to do with them: a string, empty for nothing at all.

    Null leaves it to the backbone. A ``ValueError`` names what is neither.
    """
    if instruction is None:
        return [*items]
    if instruction != "":
        _checked_text(instruction, origin)
    return [replace(item, instruction=instruction) for item in items]


def is_content(cell: Any) -> bool:
    """Tell a list that is one item (chat content parts, or chat messages) from a list of several items."""
    if not isinstance(cell, list) or not cell:
        return False
    return all(isinstance(part, Mapping) and ("type" in part or "role" in part) for part in cell)


def content_keys(columns: Collection[str]) -> list[str]:
    """Return those columns that are content by their names; a page is, of a PDF."""
    return [key for key in (*KINDS, "page") if key in columns and (key != "page" or "pdf" in columns)]


def _parts(cell: Any, folder: Folder, origin: str) -> Iterator[Part]:
    if isinstance(cell, str):
        yield from _of_kind("text", cell, folder, origin)
    elif isinstance(cell, Image.Image | LazyImage) or _is_encoded(cell):
        yield from _without_key(cell, folder, origin)
    elif isinstance(cell, Mapping) and "role" in cell:
        yield from _parts(_users_content(cell, origin), folder, origin)
    elif isinstance(cell, Mapping):
        yield from _of_mapping(cell, folder, origin)
    elif is_content(cell):
        for part in cell:
            if "role" in part:
                yield from _parts(part, folder, origin)
            else:
                yield from _of_mapping(_without_type(part, origin), folder, origin)
    elif cell is not None:
        raise ValueError(
            f"{origin}: expected a string, an image, a mapping with {', '.join(KINDS)}, or a list of content parts, "
            f"got {type(cell).__name__} {cell!r:.100}."
        )


def _without_key(cell: Any, folder: Folder, origin: str) -> Iterator[Part]:
    """Read an image, or a cell of an ``Image``, ``Pdf``, ``Audio`` or ``Video`` column."""
    content, path = _content_and_path(cell)
    kind = (mimetypes.guess_type(path)[0] or "") if isinstance(path, str) else ""
    head = bytes(content[:HEAD]) if isinstance(content, bytes | memoryview) else b""
    if head.startswith(b"%PDF-") or (not head and kind == "application/pdf"):
        yield from _of_pdf(cell, None, folder, origin)
    elif is_audio(head) or kind.startswith("audio/"):
        yield Part("audio", _audio(cell, folder, origin))
    elif is_video(head) or kind.startswith("video/"):
        yield Part("video", _file(cell, "video", folder, origin))
    else:
        yield Part("image", _frame(cell, folder, origin))


def _users_content(message: Mapping[str, Any], origin: str) -> Any:
    if message["role"] != "user":
        raise ValueError(
            f"{origin}: a chat message here is the user's, got role {message['role']!r}; instructions belong in the "
            "model's prompts, which are exported with it."
        )
    content = message.get("content")
    if isinstance(content, Mapping) and "role" in content:
        raise ValueError(f"{origin}: a chat message is inside another one ({message!r:.100}).")
    return content


def _without_type(part: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    """Return a content part, ``{"type": "image", "image": value}``, as the mapping ``{"image": value}``."""
    kind = str(part["type"])
    keys = (kind, "page") if kind == "pdf" else (kind,)
    unused = [key for key, value in part.items() if key not in ("type", *keys) and value is not None]
    if part.get(kind) is None or unused:
        raise ValueError(f"{origin}: a content part is {{'type': kind, kind: value}}, got {dict(part)!r:.200}.")
    return {key: part[key] for key in keys if key in part}


def _of_mapping(cell: Mapping[str, Any], folder: Folder, origin: str) -> Iterator[Part]:
    pages = cell.get("page")
    if pages is not None and cell.get("pdf") is None:
        raise ValueError(f"{origin}: page {pages!r:.100} of which PDF? The key 'page' stands beside the key 'pdf'.")
    for kind, value in cell.items():
        if kind == "pdf" and value is not None:
            yield from _of_pdf(value, pages, folder, origin)
        elif kind not in ("pdf", "page"):
            yield from _of_kind(kind, value, folder, origin)


def _of_pdf(value: Any, pages: Any, folder: Folder, origin: str) -> Iterator[Part]:
    """Read the PDF, or the list of PDFs, of a key: the pages that are named, or all of them."""
    names = value if isinstance(value, list | tuple) else [value]
    numbers = pages if isinstance(pages, list | tuple) else [] if pages is None else [pages]
    matches = [PAGE_OF_PDF.fullmatch(name) if isinstance(name, str) else None for name in names]
    if pages is not None and (len(names) != 1 or matches[0] or not numbers):
        raise ValueError(f"{origin}: 'page' names pages of one PDF; got page {pages!r:.100} of {value!r:.200}.")
    for name, match in zip(names, matches, strict=True):
        file = _file(match[1] if match else name, "PDF", folder, origin)
        chosen = [PdfPage(file, _page_number(number, origin)) for number in ([match[2]] if match else numbers)]
        yield from (Part("image", page) for page in chosen or _all_pages(file, origin))


def _all_pages(file: Path | bytes, origin: str) -> list[PdfPage]:
    try:
        return all_pages(file)
    except (OSError, ValueError) as error:
        name = "PDF given as bytes" if isinstance(file, bytes) else f"PDF {file}"
        raise ValueError(f"{origin}: cannot read the {name}: {error}, or remove the row.") from error


def _page_number(value: Any, origin: str) -> int:
    # CSV has only strings, and pandas makes fractions of whole numbers where a row has none.
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if isinstance(value, bool) or not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise ValueError(f"{origin}: a page is a whole number, and the first one is 1; got {value!r:.100}.")
    return int(text)


def _of_kind(kind: str, value: Any, folder: Folder, origin: str) -> Iterator[Part]:
    """Read the value, or the list of values, of a key; a list of frames is one video."""
    if kind not in KINDS:
        raise ValueError(f"{origin}: unknown key {kind!r} (value {value!r:.100}); use {', '.join(KINDS)}.")
    is_list = isinstance(value, list | tuple) and not (kind == "video" and value and all(map(_is_frame, value)))
    for single in value if is_list else () if value is None else (value,):
        if kind == "text":
            yield Part("text", _checked_text(single, origin))
        elif kind == "image":
            yield Part("image", _frame(single, folder, origin))
        elif kind == "audio":
            yield Part("audio", _audio(single, folder, origin))
        elif not isinstance(single, list | tuple):
            yield Part("video", _file(single, "video", folder, origin))
        elif single:
            yield Part("video", tuple(_frame(frame, folder, origin) for frame in single))
        else:
            raise ValueError(f"{origin}: a video without frames.")


def _checked_text(value: Any, origin: str) -> str:
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
    return value


def _frame(value: Any, folder: Folder, origin: str) -> Frame:
    """Return an open image, the path of one, or its content, which is decoded when it is encoded."""
    if isinstance(value, Image.Image | LazyImage):
        return value
    content, _ = _content_and_path(value)  # Of a stream, images are not copied.
    return content if isinstance(content, memoryview) else _file(value, "image", folder, origin)


def _audio(value: Any, folder: Folder, origin: str) -> Path | bytes:
    """Return the path of a recording, or its content; also of samples, as decoded columns of `datasets` have them."""
    if not isinstance(value, Mapping) or _is_encoded(value):
        return _file(value, "audio", folder, origin)
    try:
        return encode_audio(value["array"], value["sampling_rate"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{origin}: an audio is a path, its {{'bytes': …}}, or {{'array': numbers, 'sampling_rate': number}} of "
            f"one channel; got {value!r:.100} ({type(error).__name__}: {error})."
        ) from error


def _file(value: Any, kind: str, folder: Folder, origin: str) -> Path | bytes:
    """Return the path of a file, or its content."""
    content, path = _content_and_path(value)
    if content is None:
        return folder.find(path, kind, origin)
    if isinstance(content, memoryview):
        return bytes(content)
    if not isinstance(content, bytes):
        raise ValueError(f"{origin}: the bytes of {kind} {path!r} are {type(content).__name__} {content!r:.100}.")
    return content


def _is_encoded(value: Any) -> bool:
    is_mapping = isinstance(value, Mapping) and bool(value) and value.keys() <= {"bytes", "path"}
    return is_mapping or isinstance(value, bytes | memoryview)


def _content_and_path(value: Any) -> tuple[Any, Any]:
    """Return what is in an encoded file, and its path; of another value none, and itself."""
    if isinstance(value, bytes | memoryview):
        return value, None
    return (value.get("bytes"), value.get("path")) if _is_encoded(value) else (None, value)


def _is_frame(value: Any) -> bool:
    """Tell the frames of one video from several videos."""
    if isinstance(value, str | Path):
        return (mimetypes.guess_type(str(value))[0] or "").startswith("image/")
    return isinstance(value, Image.Image | LazyImage) or _is_encoded(value)
