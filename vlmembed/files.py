"""Files that are there whole or not at all, JSON by name, and one hash for what is compared by its content."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

HOST = platform.node().replace(".", "-")


def digest(pieces: Iterable[str | bytes | memoryview]) -> str:
    """Return 32 hexadecimal digits: others where a piece, the order or the number of pieces is another."""
    hashed = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        content = memoryview(piece.encode() if isinstance(piece, str) else piece)
        hashed.update(content.nbytes.to_bytes(8, "big"))  # Where a piece ends: "ab", "c" is not "a", "bc".
        hashed.update(content)
    return hashed.hexdigest()


def content_digest(file: Path | bytes) -> str:
    """Return 32 hexadecimal digits: others for other content. A file is read once, until it is written again."""
    if isinstance(file, bytes):
        return hashlib.blake2b(file, digest_size=16).hexdigest()
    return _file_digest(file, *version_of(file.stat()))


@lru_cache(maxsize=4096)
def _file_digest(file: Path, *version: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def version_of(status: os.stat_result) -> tuple[int, int]:
    """Return what is another for a file that has been written again: its size, and when."""
    return status.st_size, status.st_mtime_ns


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file; a ``ValueError`` names one that is none."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def draft_of(path: Path) -> Path:
    """Return where to write what is not whole yet, such that `left_drafts` knows whether its writer has ended."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.{HOST}.{os.getpid()}.draft")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a draft, which takes the name ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whoever else writes the same one at the same time."""
    with whole_file(path) as draft:
        draft.write_bytes(content)


def clear_drafts(folder: Path, name: str = "") -> None:
    """Remove what killed processes had begun to write: of one file, or of all in a folder."""
    for draft in left_drafts(folder, name):
        draft.unlink(missing_ok=True)


def left_drafts(folder: Path, name: str = "") -> Iterator[Path]:
    """Yield what killed processes had begun to write: of one file, or of all in a folder."""
    for draft in folder.glob(f".*.{'[0-9a-f]' * 32}.*.[0-9]*.draft"):
        host, pid = draft.name.split(".")[-3:-1]
        with suppress(FileNotFoundError):  # Its writer has finished it.
            if host == HOST:
                # In a container that was started again, the killed process may have had our own number.
                ended = int(pid) == os.getpid() or not psutil.pid_exists(int(pid))
            else:
                ended = time.time() - draft.stat().st_mtime > 3600  # Of another machine.
            if ended and draft.name.startswith(f".{name}"):
                yield draft
