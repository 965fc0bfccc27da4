"""Files that are there whole or not at all, and one hash for what is compared by its content."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


def digest(pieces: Iterable[str | bytes | memoryview]) -> str:
    """Return 32 hexadecimal digits: others where a piece, the order or the number of pieces is another."""
    hashed = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        content = memoryview(piece.encode() if isinstance(piece, str) else piece)
        hashed.update(content.nbytes.to_bytes(8, "big"))  # Where a piece ends: "ab", "c" is not "a", "bc".
        hashed.update(content)
    return hashed.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a draft, which takes the name ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.{os.getpid()}.draft")
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
    """Remove what killed processes of this machine had begun to write: of one file, or all in a folder."""
    for draft in folder.glob(".*.draft"):
        pid = draft.name.split(".")[-2]
        # In a container that was started again, the killed process may have had our own number.
        ended = pid.isdecimal() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid)))
        if ended and draft.name.startswith(f".{name}"):
            draft.unlink(missing_ok=True)
