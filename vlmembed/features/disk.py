"""The cache of features on disk: one file per image, in a folder that processes and runs may share."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
import warnings
import zlib
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlmembed.features.cache import FeatureCache
from vlmembed.features.tower import bytes_of

#: A temporary file of this age has nobody who still writes it.
STALE_SECONDS = 3600


class OnDisk(FeatureCache):
    """Keeps the features in files, for later epochs and later runs.

    Processes and runs may share a folder. It gets a sub-folder for each tower's weights and settings; delete those that
    are no longer needed.

    Args:
        folder: Where; made when the first features are written.
        limit_gib: The most that the folder may hold, in GiB, the features of other runs included.
    """

    def __init__(self, folder: str, limit_gib: float) -> None:
        super().__init__(limit_gib)
        self.folder = Path(folder)
        self.place = folder
        self._ledger = self.folder / "bytes"

    def open(self, fingerprint: str) -> None:
        """Start a run; see `FeatureCache.open`.

        Raises:
            ValueError: If the folder is a file.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"The feature cache's folder {self.place!r} is a file. Name another folder.")
        super().open(fingerprint)
        self._counted = False

    def _occupied(self) -> tuple[int, int]:
        own = others = 0
        for file in self.folder.glob("*/??/*"):
            with suppress(FileNotFoundError):  # A temporary file, which has got its proper name by now.
                size = file.stat().st_size
                mine = file.parent.parent.name == self.fingerprint
                own, others = own + size * mine, others + size * (not mine)
        return own, others

    def _free(self) -> float:
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free

    def _read(self, name: str) -> Tensor | None:
        path = self._path(name)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        with suppress(SafetensorError, KeyError):  # Damaged; of a type that torch does not have.
            for label, features in load(content).items():
                if label == self._label(name, features):
                    return features
        self._discard(path, content)
        return None

    def _write(self, name: str, features: Tensor) -> bool:
        path, content = self._path(name), save({self._label(name, features): features})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                return path.exists() or self._add(path, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            warnings.warn(f"The disk of {self.place} is full: {error}", stacklevel=3)
            return False

    def _add(self, path: Path, content: bytes) -> bool:
        total = self._total() + len(content)
        if total > self.limit:
            return False
        # Counted before it is written: a process killed in between leaves the count too high, not the folder too full.
        self._record(total)
        temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(content)
            # There whole or not at all if the process is killed. If the machine is, the checksum finds what is torn.
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _discard(self, path: Path, content: bytes) -> None:
        warnings.warn(f"{path} is damaged. It is deleted, and its features are computed again.", stacklevel=4)
        with self._locked(), suppress(FileNotFoundError):
            if path.read_bytes() == content:  # Another process may have put a whole one there.
                path.unlink()
                self._ledger.unlink(missing_ok=True)  # Counted anew: nobody knows how long it was when it was whole.

    def _total(self) -> int:
        """Return the bytes in the folder: counted at a run's first file, then read from the shared record."""
        if self._counted:
            with suppress(FileNotFoundError, ValueError):
                return int(self._ledger.read_text())
        for temporary in self.folder.glob("*/??/*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - temporary.stat().st_mtime > STALE_SECONDS:
                    temporary.unlink()
        self._counted = True
        return sum(self._occupied())

    def _record(self, total: int) -> None:
        # Written over in place, at a fixed width: emptying a file first can make the file system wait for the disk.
        self._ledger.touch()
        with self._ledger.open("r+") as file:
            file.write(f"{total:20d}")

    def _path(self, name: str) -> Path:
        return self.folder / self.fingerprint / name[-2:] / f"{name}.safetensors"

    def _label(self, name: str, features: Tensor) -> str:
        """Say all about a file's tensor in its name, so that a damaged, renamed or foreign file gives itself away."""
        shape = zlib.crc32(f"{features.dtype} {tuple(features.shape)}".encode())
        return f"{self.fingerprint} {name} {zlib.crc32(bytes_of(features), shape):08x}"

    def _locked(self) -> AbstractContextManager:
        """Let one process at a time change the folder. The lock of a killed process is free again."""
        return FileLock(self.folder / "lock").acquire(poll_interval=0.002)
