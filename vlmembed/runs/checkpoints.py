"""Checkpoint files: there whole or not at all, never run as code, and the newest whole one found."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_warn

#: What a checkpoint is called while it is being written.
DRAFT = ".draft"

MAKE_ROOM = " Make room, and go on with --ckpt_path last."


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there, so that its place never holds a part of one.

    Lightning's own writes it into the folder for temporary files; where that is another file system, it is then copied
    to its place, and a process that is killed while copying leaves a torn file there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: If there is no room for it, or it cannot be written. What was there before is as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_name(place.name + DRAFT)
        try:
            _write(checkpoint, draft)
            os.replace(draft, place)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise OSError(
                error.errno,
                f"The checkpoint {place} could not be written: {os.strerror(error.errno or 0)}. Checkpoints that were "
                f"there before are as they were.{MAKE_ROOM if full else ''}",
            ) from error
        finally:
            draft.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; one that holds more than tensors and plain values only if that is asked for.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is torn, or would run code.
        """
        try:
            # Lightning would run the code in one that comes from a URL.
            return super().load_checkpoint(path, map_location, weights_only is not False)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"The checkpoint {path} holds more than tensors and plain values, which could run code: {error}. If "
                "you trust who wrote it, give --weights_only false."
            ) from error
        except (RuntimeError, EOFError) as error:
            raise ValueError(
                f"The checkpoint {path} is not whole: {error}. `--ckpt_path last` takes a run's newest one that is."
            ) from error


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            # torch's writer stumbles over the end of what it could not write.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.flush()
        os.fsync(file.fileno())


def newest_checkpoint(folders: Iterable[Path]) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest checkpoint that a run can go on from.

    Args:
        folders: Where the run's checkpoints are.

    Returns:
        Its path and its content, mapped from the file; None where there is none.
    """
    found = [path for folder in folders for path in folder.glob("*.ckpt")]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            rank_zero_warn(f"{error} An earlier one is looked for.")
            continue
        if "optimizer_states" in content:  # Not so where only weights were saved, for others.
            return path, content
    return None


@cache
def _refuse_damaged(path: Path, written: int) -> None:
    """Look through a file, once in a process: gigabytes are read. When it was ``written`` tells it from a later one."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in it is damaged")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Map a checkpoint from its file, once every byte of it is known to be as written.

    Raises:
        ValueError: If it is torn or damaged, or would run code.
    """
    if path.is_dir():  # Of shards.
        path = path / "meta.pt"
    try:
        _refuse_damaged(path, path.stat().st_mtime_ns)
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"The checkpoint {path} is not whole: {error}.") from error
    return content
