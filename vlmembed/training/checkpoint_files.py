"""Checkpoint files: there whole or not at all, never run as code, and the newest whole one found."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_warn

from vlmembed.files import whole_file


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its path and moves it there, so that the path never holds a part of one.

    Lightning's own writes it into the folder for temporary files; where that is another file system, it is then copied,
    and a process that is killed while copying leaves a torn file. What is asked for in the middle of an accumulation
    window waits in ``postponed`` until the step that ends it, removals of older files behind it included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.postponed: list[Callable[[], None]] = []

    def write_postponed(self) -> None:
        """Do what has waited."""
        actions, self.postponed = self.postponed, []
        for action in actions:
            action()

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, once those that are to be written before are there."""
        if self.postponed:
            self.postponed.append(partial(super().remove_checkpoint, path))
        else:
            super().remove_checkpoint(path)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; where an OSError says that it cannot be, what was there before is as it was."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            with whole_file(path) as draft, draft.open("wb") as file:
                _write(checkpoint, file)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise OSError(
                error.errno,
                f"The checkpoint {path} could not be written: {os.strerror(error.errno or 0)}. Checkpoints that were "
                f"there before are as they were.{' Make room, and resume with --ckpt_path last.' if full else ''}",
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; a ValueError if it is torn or would run code, unless that is asked for."""
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


def _write(checkpoint: dict[str, Any], file: Any) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch's writer stumbles over the end of what it could not write.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    file.flush()
    os.fsync(file.fileno())


def is_resumable(path: Path, content: dict[str, Any]) -> bool:
    """Whether a run can be resumed from a checkpoint: it has more than weights."""
    return "optimizer_states" in content


def newest_checkpoint(
    folders: Iterable[Path], accept: Callable[[Path, dict[str, Any]], bool] = is_resumable
) -> tuple[Path, dict[str, Any]] | None:
    """Return the path of the newest whole checkpoint that is accepted, and its content, mapped from the file.

    The names of checkpoints may have folders in them.
    """
    paths = {path for folder in folders for path in folder.rglob("*.ckpt") if path.exists()}  # A link may lead nowhere.
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            rank_zero_warn(f"{error} An earlier one is looked for.")
            continue
        if accept(path, content):
            return path, content
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Map a checkpoint from its file; a ValueError if a byte of it is not as it was written, or it would run code."""
    if path.is_dir():  # Of shards.
        path = path / "meta.pt"
    try:
        _refuse_damaged(path, path.stat().st_mtime_ns)
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"The checkpoint {path} is not whole: {error}.") from error
    return content


@cache
def _refuse_damaged(path: Path, written: int) -> None:
    """Look through a file, once in a process: gigabytes are read. When it was ``written`` tells it from a later one."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in it is damaged")
