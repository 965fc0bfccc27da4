"""Features of images that come again soon, while weights stay as they are: in measuring and predicting."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from vlmembed.encoder import Encoder
from vlmembed.memory import GIB
from vlmembed.types import Inputs


class RecentFeatures:
    """Keeps the features of the images that were asked for last, in main memory.

    Args:
        encoder: Whose vision tower makes them; its weights stay as they are.
        limit_gib: The most to keep, in GiB.
    """

    def __init__(self, encoder: Encoder, limit_gib: float = 1.0) -> None:
        self._encoder = encoder
        self._limit = limit_gib * GIB
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        self._bytes = 0

    def encode_images(self, images: Sequence[Inputs]) -> list[Tensor]:
        """Return the features of some chunks of images, as `Encoder.encode_images` does."""
        features, new = self._encoder.encode_missing_images(images, self._get)
        for key, image in new.items():
            # A copy, so that one image does not keep its whole chunk in memory.
            self._kept[key] = image.to("cpu", copy=True)
            self._bytes += image.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return features

    def _get(self, key: int) -> Tensor | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)
