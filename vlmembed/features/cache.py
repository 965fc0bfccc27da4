"""The cache of features: what is common to memory and disk, and the one in memory."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

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
