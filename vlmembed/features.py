"""Caches of a frozen vision tower's features: computed in the first epoch, read in the others.

Four things could make that wrong, and each is refused or cannot happen: a tower that is trained (`refuse_trainable`),
features of other weights or settings (`fingerprint`), more than there is room for (`FeatureCache.predict`, and a hard
limit), and images that never come twice (`FeatureCache.end_epoch`).
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from vlmembed.files import clear_drafts, digest, draft_of, left_drafts, write_whole

GIB = 2**30


def refuse_trainable(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise a ValueError if one of a tower's parameters is trained, so that its features would change."""
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            raise ValueError(
                f"The feature cache needs a frozen vision tower, but {name!r} is trained, so the features change in "
                "every step. Freeze it with the adapter vlmembed.adapters.Freeze(modules: [vision, merger]), keep a "
                "LoRA's target_modules out of it, or remove the feature cache from the YAML."
            )


def fingerprint(parameters: Iterable[tuple[str, Tensor]], settings: Mapping[str, Any]) -> str:
    """Identify what makes features: another name, type, shape, byte or setting (as JSON) gives another fingerprint."""
    # One weight at a time: the tower may be on a device, and the host need not hold it whole.
    weights = (_spelled(name, parameter.detach().cpu()) for name, parameter in parameters)
    return digest(chain([json.dumps(dict(settings), sort_keys=True)], chain.from_iterable(weights)))


class FeatureCache(ABC):
    """Keeps the features of images, never more of them than a limit.

    Args:
        limit_gib: The most to keep, in GiB; above 0.
    """

    location: str  #: Where the features are, in messages.
    fingerprint: str = ""  #: Says what makes the features; none before `open`.

    def __init__(self, limit_gib: float) -> None:
        if not limit_gib > 0:
            raise ValueError(f"limit_gib of a feature cache is a number above 0, got {limit_gib}.")
        self.limit = limit_gib * GIB

    def open(self, fingerprint: str) -> None:
        """Start a run. Features of another fingerprint are not served; nothing is written yet."""
        self.fingerprint = fingerprint
        self.hits = self.misses = 0  #: How often an image was asked for in this epoch and was there, and was not.
        self._predicted = self._full = False
        self._written = self._written_before = self._lookups_before = 0

    def predict(self, bytes_per_example: float, examples: int, announce: Callable[[str], None] = print) -> None:
        """Announce how much will be kept, before anything is; refuse more than the limit, or than the disk has left."""
        predicted = bytes_per_example * examples
        present, others, free = self._occupied()
        sentence = (
            f"about {_size(predicted)} predicted ({examples:,} training rows × {_size(bytes_per_example)}), limit "
            f"{_size(self.limit)}, in {self.location} ({_size(present)} are there, {_size(others)} of other weights)"
        )
        room = min(self.limit - others, present + free)
        if predicted > room:
            raise ValueError(
                f"The features do not fit the feature cache: {sentence}. There is room for {_size(room)}, by limit_gib "
                "or by what the disk has left. Raise limit_gib, delete what belongs to other weights or settings, name "
                "another folder, make the images smaller, or remove the feature cache from the YAML."
            )
        announce(f"Feature cache: {sentence}.")
        self._predicted = True

    def get(self, key: int) -> Float[Tensor, "L K H"] | None:
        """Return the features of an image, by a hash of what the tower sees of it: on the CPU, not to be changed."""
        features = self._read(f"{key:016x}")
        self.hits += features is not None
        self.misses += features is None
        return features

    @contextmanager
    def together(self, keys: Iterable[int]) -> Iterator[None]:
        """Put the features of images that were computed together: all of them are kept, or none, if a run is killed.

        What one image's features are is rounded by which others are beside it. So a resumed run computes them all anew.
        """
        yield

    def put(self, key: int, features: Float[Tensor, "L K H"]) -> None:
        """Keep an image's features, of L tokens K vectors for the layers that take them, unless the cache is full."""
        if not self._predicted:
            raise RuntimeError("Call predict before the first put: nothing is written that was not announced.")
        if self._full:
            return
        # A copy, so that one image does not keep its whole chunk in memory; and a tensor that may meet autograd, even
        # if it was computed while measuring.
        with torch.inference_mode(False):
            features = features.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._full = not self._write(f"{key:016x}", features)
        self._written += not self._full
        if self._full:
            limit = f"(limit {_size(self.limit)}, in {self.location})"
            kept = f"{self._written:,} images were kept in this run, and the next one does not fit {limit}."
            warnings.warn(f"The feature cache is full: {kept} Others are computed in every epoch.", stacklevel=2)

    def end_epoch(self, total: Callable[[int], int] = int) -> None:
        """Close the epoch's counts; refuse if features were kept before, and none was asked for in this epoch.

        ``total`` adds a number up over processes, so that all of them refuse or none does.
        """
        hits, lookups, written = total(self.hits), total(self.hits + self.misses), total(self._written_before)
        # In an epoch that was cut short, chance may do it where processes share the images out anew each time.
        comparable = lookups <= 2 * self._lookups_before and self._lookups_before <= 2 * lookups
        if written and lookups and not hits and comparable:
            raise RuntimeError(
                f"The feature cache is of no use: none of {lookups:,} images of this epoch came a second time, though "
                f"{written:,} were kept before. Remove the cache from the YAML, or random augmentation from the data."
            )
        self._lookups_before, self._written_before = lookups, self._written
        self.hits = self.misses = 0

    @abstractmethod
    def _occupied(self) -> tuple[int, int, float]:
        """Return the bytes kept under this fingerprint, those under others, and those that memory or disk has left."""

    @abstractmethod
    def _read(self, name: str) -> Tensor | None:
        """Return an image's features, if they are kept and undamaged."""

    @abstractmethod
    def _write(self, name: str, features: Tensor) -> bool:
        """Keep an image's features if there is room; return whether they are kept."""


class InMemory(FeatureCache):
    """Keeps the features in the training process's memory, until it ends.

    A resumed run computes them anew, with other images beside them, so that they are rounded otherwise.

    Args:
        limit_gib: The most to keep, in GiB per process.
    """

    location = "memory"

    def open(self, fingerprint: str) -> None:
        """Start a run; a run of the same fingerprint before it has left its features."""
        if fingerprint != self.fingerprint:
            self._features: dict[str, Tensor] = {}
            self._bytes = 0
        super().open(fingerprint)

    def _occupied(self) -> tuple[int, int, float]:
        return self._bytes, 0, math.inf

    def _read(self, name: str) -> Tensor | None:
        return self._features.get(name)

    def _write(self, name: str, features: Tensor) -> bool:
        if name not in self._features:
            if self._bytes + features.nbytes > self.limit:
                return False
            self._features[name] = features
            self._bytes += features.nbytes
        return True


class OnDisk(FeatureCache):
    """Keeps the features in files, for later epochs and later runs; processes and runs may share a folder.

    Each tower's weights and settings have a sub-folder: delete those that are no longer needed.

    Args:
        folder: Where; made when the first features are written.
        limit_gib: The most that the folder may hold, in GiB, the features of other runs included.
    """

    def __init__(self, folder: str, limit_gib: float) -> None:
        super().__init__(limit_gib)
        self.folder = Path(folder)
        self.location = folder
        self._count = self.folder / "bytes"  # In the folder, for all processes that write there.
        self._counted = False

    def open(self, fingerprint: str) -> None:
        """Start a run; delete what killed runs had computed together, and kept in part."""
        super().open(fingerprint)
        for draft in left_drafts(self.folder / fingerprint, "together"):
            with suppress(FileNotFoundError):  # Another process's, that opens at the same time.
                for name in draft.read_text().split():
                    self._path(name).unlink(missing_ok=True)
                draft.unlink()

    @contextmanager
    def together(self, keys: Iterable[int]) -> Iterator[None]:
        """Put the features of images that were computed together; see `FeatureCache.together`."""
        names = [name for name in (f"{key:016x}" for key in keys) if not self._path(name).exists()]
        if names and not self._full:
            draft = draft_of(self.folder / self.fingerprint / "together")
            with suppress(OSError):  # Where there is no room for it, there is none for features.
                draft.parent.mkdir(parents=True, exist_ok=True)
                draft.write_text("\n".join(names))
            yield
            draft.unlink(missing_ok=True)
        else:
            yield

    def _occupied(self) -> tuple[int, int, float]:
        sizes = {True: 0, False: 0}
        for path in self.folder.glob("*/??/*"):
            with suppress(FileNotFoundError):  # A draft, which has got its proper name by now.
                sizes[path.parts[-3] == self.fingerprint] += path.stat().st_size
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return sizes[True], sizes[False], shutil.disk_usage(existing).free

    def _path(self, name: str) -> Path:
        return self.folder / self.fingerprint / name[-2:] / f"{name}.safetensors"

    def _read(self, name: str) -> Tensor | None:
        return read_tensor(self._path(name), f"{self.fingerprint} {name}")

    def _write(self, name: str, features: Tensor) -> bool:
        path, label = self._path(name), f"{self.fingerprint} {name}"
        content = save({signed(label, features): features})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One process writes at a time. The lock of a killed process is free again.
            with FileLock(self.folder / "lock").acquire(poll_interval=0.002):
                if path.exists():
                    return True
                total = self._total() + len(content)
                if total > self.limit:
                    return False
                # Counted before it is written: a process killed in between leaves the count too high, not the folder
                # too full. In place, at a fixed width: emptying a file can make the file system wait for the disk.
                with self._count.open("r+") as count:
                    count.write(f"{total:20d}")
                write_whole(path, content)
                return True
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            warnings.warn(f"The disk of {self.location} is full: {error}", stacklevel=3)
            return False

    def _total(self) -> int:
        """Return the bytes in the folder: summed up at this process's first file, then read from the shared count."""
        if self._counted:
            with suppress(FileNotFoundError, ValueError):
                return int(self._count.read_text())
        for shard in self.folder.glob("*/??"):
            clear_drafts(shard)
        self._count.touch()
        self._counted = True
        return sum(self._occupied()[:2])


class RecentFeatures:
    """Keeps the features of the images that were asked for last, in main memory: for measuring and predicting."""

    def __init__(self, encoder: Any, limit_gib: float = 1.0) -> None:
        self._encoder = encoder
        self._limit = limit_gib * GIB
        self._features: OrderedDict[int, Tensor] = OrderedDict()
        self._bytes = 0

    def encode_images(self, images: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Return the features of some chunks of images, as `Encoder.encode_images` does."""

        def recent(key: int) -> Tensor | None:
            if key in self._features:
                self._features.move_to_end(key)
            return self._features.get(key)

        features, new = self._encoder.encode_missing_images(images, recent)
        for key, image in new.items():
            # A copy, so that one image does not keep its whole chunk in memory.
            self._features[key] = image.to("cpu", copy=True)
            self._bytes += image.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._features.popitem(last=False)[1].nbytes
        return features


def read_tensor(path: Path, label: str) -> Tensor | None:
    """Return the tensor of a file, to the bit; None where there is none, or (it is deleted) no undamaged one."""
    try:
        with suppress(SafetensorError, KeyError):  # Damaged; of a type that torch does not have.
            for name, tensor in load(path.read_bytes()).items():
                if name == signed(label, tensor):
                    return tensor
    except FileNotFoundError:
        return None
    warnings.warn(f"{path} is damaged, or another's. It is deleted, and what it held is computed again.", stacklevel=4)
    path.unlink(missing_ok=True)
    return None


def signed(label: str, tensor: Tensor) -> str:
    """Name a tensor by a label and a checksum, so that a damaged, renamed or foreign file gives itself away."""
    spelling, content = _spelled(label, tensor)
    return f"{label} {zlib.crc32(content, zlib.crc32(spelling.encode())):08x}"  # Four times faster than a digest.


def _spelled(name: str, tensor: Tensor) -> tuple[str, memoryview]:
    """Return what a tensor on the CPU is, and its bytes, without a copy where it is contiguous."""
    content = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return f"{name} {tensor.dtype} {tuple(tensor.shape)}", memoryview(content)  # type: ignore[arg-type]


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"
