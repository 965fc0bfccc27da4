"""What a frozen vision tower makes of each image, kept across epochs.

A frozen tower makes the same features of the same image in every epoch, so the first epoch can keep them and the others
read them. Four things could make that wrong, and each is refused or cannot happen: a tower that is trained
(`refuse_trainable`), features of other weights or settings (`fingerprint`), more than there is room for
(`FeatureCache.predict`, and a hard limit), and images that never come twice (`FeatureCache.end_epoch`).

    cache.open(fingerprint(tower.state_dict().items(), settings))
    cache.predict(bytes_per_example, examples)
    features = cache.get(key)
    if features is None:
        features = tower(image)
        cache.put(key, features)
    cache.end_epoch()
"""

from __future__ import annotations
from collections import OrderedDict
from collections.abc import Sequence
from vlmembed.types import Inputs

import errno
import hashlib
import json
import math
import os
import shutil
import time
import uuid
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

__all__ = ["FeatureCache", "InMemory", "Key", "OnDisk", "fingerprint", "refuse_trainable"]


def refuse_trainable(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Check that a tower's features cannot change.

    Args:
        named_parameters: The tower's, after the adapters.

    Raises:
        ValueError: If one of them is trained.
    """
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            raise ValueError(
                f"The feature cache needs a frozen vision tower, but {name!r} is trained, so the features change in "
                "every step. Freeze it with the adapter vlmembed.adapters.Freeze(modules: [vision, merger]), keep a "
                "LoRA's target_modules out of it, or remove the feature cache from the YAML."
            )


def fingerprint(parameters: Iterable[tuple[str, Tensor]], settings: Mapping[str, Any]) -> str:
    """Identify what makes features.

    Args:
        parameters: The tower's weights and buffers, as in ``state_dict().items()``, on any device.
        settings: All else that decides about the features, as JSON knows it: the processor's settings, the precision.

    Returns:
        32 hexadecimal digits: others where a name, type, shape, byte or setting is another.

    Raises:
        TypeError: If a setting is nothing that JSON knows.
    """
    hashed = hashlib.blake2b(json.dumps(dict(settings), sort_keys=True).encode(), digest_size=16)
    for name, parameter in parameters:
        hashed.update(f"\0{name} {parameter.dtype} {tuple(parameter.shape)}\0".encode())
        # One at a time: the tower may be on a device, and the host need not hold it whole.
        hashed.update(bytes_of(parameter.detach().cpu()))
    return hashed.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return what a tensor on the CPU holds, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


#: Identifies an image as the tower sees it: a hash of its resized pixels and their grid.
Key = bytes | int

GIB = 2**30


class FeatureCache(ABC):
    """Keeps the features of images, never more of them than a limit.

    Args:
        limit_gib: The most to keep, in GiB.

    Raises:
        ValueError: If the limit is not above 0.
    """

    #: Where the features are, in messages.
    place: str
    #: Says what makes the features; none before `open`.
    fingerprint: str = ""

    def __init__(self, limit_gib: float) -> None:
        if not limit_gib > 0:
            raise ValueError(f"limit_gib of a feature cache is a number above 0, got {limit_gib}.")
        self.limit = limit_gib * GIB

    def open(self, fingerprint: str) -> None:
        """Start a run; nothing is written yet.

        Args:
            fingerprint: See `vlmembed.features.fingerprint`. Features that were made by anything else are not served.
        """
        self.fingerprint = fingerprint
        #: How often an image was asked for in this epoch and was there, and was not.
        self.hits = self.misses = 0
        self._predicted = self._full = False
        self._kept = self._kept_before = self._lookups_before = 0

    def predict(self, bytes_per_example: float, examples: int, announce: Callable[[str], None] = print) -> None:
        """Say how much will be kept, before anything is.

        Args:
            bytes_per_example: The size of the features of one training row's images.
            examples: The training rows.
            announce: Is given the sentence; where several processes run, let one of them speak.

        Raises:
            ValueError: If it is more than the limit, or than the disk has left.
        """
        predicted = bytes_per_example * examples
        present, others = self._occupied()
        already = f", {_size(present)} of them there already" if present else ""
        sentence = (
            f"about {_size(predicted)} predicted ({examples:,} training rows × {_size(bytes_per_example)}){already}, "
            f"limit {_size(self.limit)}, in {self.place}"
        )
        advice = "make the images smaller, or remove the feature cache from the YAML"
        if predicted + others > self.limit:
            old = (
                f" {_size(others)} there belong to other weights or settings: delete what is not needed."
                if others
                else ""
            )
            raise ValueError(
                f"The features do not fit the feature cache: {sentence}.{old} "
                f"Set limit_gib to {math.ceil((predicted + others) / GIB * 10) / 10} or more, {advice}."
            )
        if predicted - present > self._free():
            raise ValueError(
                f"The features do not fit the disk, which has {_size(self._free())} left: {sentence}. "
                f"Free some space, name another folder, {advice}."
            )
        announce(f"Feature cache: {sentence}.")
        self._predicted = True

    def get(self, key: Key) -> Float[Tensor, "L K H"] | None:
        """Return an image's features, on the CPU and not to be changed in place; None where they are not kept."""
        features = self._read(_name(key))
        self.hits += features is not None
        self.misses += features is None
        return features

    def put(self, key: Key, features: Float[Tensor, "L K H"]) -> None:
        """Keep an image's features, unless the cache is full.

        Args:
            key: The image.
            features: Of its L tokens, what stands in for their embeddings and what later layers add (DeepStack), K
                vectors in all. Of any type, on any device.

        Raises:
            RuntimeError: If `predict` was not called.
        """
        if not self._predicted:
            raise RuntimeError("Call predict before the first put: nothing is written that was not announced.")
        if self._full:
            return
        # A copy, so that one image does not keep its whole chunk in memory; and a tensor that may meet autograd, even
        # if it was computed while measuring.
        with torch.inference_mode(False):
            kept = features.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if self._write(_name(key), kept):
            self._kept += 1
            return
        self._full = True
        warnings.warn(
            f"The feature cache is full: {self._kept:,} images were kept in this run, and {_size(kept.nbytes)} more do "
            f"not fit (limit {_size(self.limit)}, in {self.place}). Further images are computed in every epoch.",
            stacklevel=2,
        )

    def end_epoch(self, total: Callable[[int], int] = int) -> None:
        """Close the epoch's counts.

        Args:
            total: Adds a number up over processes, so that all of them refuse or none does.

        Raises:
            RuntimeError: If features were kept in earlier epochs, and none of them was asked for in this one.
        """
        hits, lookups, kept = total(self.hits), total(self.hits + self.misses), total(self._kept_before)
        # In an epoch that was cut short, chance may do it where processes share the images out anew each time.
        comparable = lookups <= 2 * self._lookups_before and self._lookups_before <= 2 * lookups
        if kept and lookups and not hits and comparable:
            raise RuntimeError(
                f"The feature cache is of no use: none of {lookups:,} images of this epoch came a second time, though "
                f"{kept:,} were kept before. The data are augmented at random, or new in every epoch. Remove the "
                "feature cache from the YAML, or the augmentation from the data."
            )
        self._lookups_before, self._kept_before = lookups, self._kept
        self.hits = self.misses = 0

    @abstractmethod
    def _occupied(self) -> tuple[int, int]:
        """Return the bytes kept under this fingerprint, and under others."""

    @abstractmethod
    def _free(self) -> float:
        """Return the bytes that the place has left, whatever the limit."""

    @abstractmethod
    def _read(self, name: str) -> Tensor | None:
        """Return an image's features, if they are kept and undamaged."""

    @abstractmethod
    def _write(self, name: str, features: Tensor) -> bool:
        """Keep an image's features if there is room; return whether they are kept."""


class InMemory(FeatureCache):
    """Keeps the features in the training process's memory, until it ends.

    Where several processes run, each keeps its own: an image is computed once by every process that meets it. A run
    that goes on from a checkpoint computes them anew, with other images beside them, so that they are rounded
    otherwise; ``OnDisk`` keeps them to the bit.

    Args:
        limit_gib: The most to keep, in GiB per process.
    """

    place = "memory"

    def open(self, fingerprint: str) -> None:
        """Start a run; see `FeatureCache.open`."""
        if fingerprint != self.fingerprint:
            self._features: dict[str, Tensor] = {}
            self._bytes = 0
        super().open(fingerprint)

    def _occupied(self) -> tuple[int, int]:
        return self._bytes, 0

    def _free(self) -> float:
        return math.inf

    def _read(self, name: str) -> Tensor | None:
        return self._features.get(name)

    def _write(self, name: str, features: Tensor) -> bool:
        if name in self._features:
            return True
        if self._bytes + features.nbytes > self.limit:
            return False
        self._features[name] = features
        self._bytes += features.nbytes
        return True


def _name(key: Key) -> str:
    return key.hex() if isinstance(key, bytes) else f"{key:016x}"


def _size(count: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if count >= size / 10:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**10:.2f} KiB"


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


class RecentFeatures:
    """Keeps the features of the images that were asked for last, in main memory.

    Args:
        encoder: Whose vision tower makes them; its weights stay as they are.
        limit_gib: The most to keep, in GiB.
    """

    def __init__(self, encoder, limit_gib: float = 1.0) -> None:
        self._encoder = encoder
        self._limit = limit_gib * GIB
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        self._bytes = 0

    def encode_images(self, images: Sequence[Inputs]) -> list[Tensor]:
        """Return the features of some chunks of images, as `Encoder.encode_images` does."""
        found, new = self._encoder.encode_missing_images(images, self._kept.get)
        for key in found:
            self._kept.move_to_end(key)
        for key, features in new.items():
            # A copy, so that one image does not keep its whole chunk in memory.
            self._kept[key] = features.to("cpu", copy=True)
            self._bytes += features.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        found |= new
        return [found[key] for chunk in images for key in chunk["keys"].tolist()]
