"""What turns items into model inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from vlmembed.types.items import Inputs, Item, Pair


class Preprocessor(ABC):
    """Turns items into model inputs. Runs in data loader workers: it is pickled, and never holds weights."""

    @abstractmethod
    def __call__(self, items: Sequence[Item | Pair]) -> Inputs:
        """Preprocess items into one padded chunk, images included.

        Args:
            items: B items, roles mixed as they come; or B pairs.

        Raises:
            ValueError: If an item cannot be read or would be cut in a harmful way; the message names its origin.
        """

    @abstractmethod
    def cost(self, item: Item | Pair) -> int:
        """Estimate the tokens an item will take, cheaply: items of similar cost share a chunk."""

    def prepare(self, items: Sequence[Item | Pair], draft: bool = False) -> Prepared:
        """Read the items of a batch, before it is decided which of them share a chunk.

        Args:
            items: N items, or N pairs.
            draft: Whether large images may be decoded at less than their full size where that changes little.
        """
        return Prepared(self, items)


class Prepared:
    """The items of a batch, about to be cut into chunks.

    Args:
        preprocessor: Makes the chunks.
        items: N items, or N pairs.
    """

    def __init__(self, preprocessor: Preprocessor, items: Sequence[Item | Pair]) -> None:
        self._preprocessor = preprocessor
        self._items = items

    @property
    def lengths(self) -> list[int]:
        """(N,) the tokens of each item, as well as they are known."""
        return [self._preprocessor.cost(item) for item in self._items]

    @property
    def patches(self) -> list[int]:
        """(N,) the patches that the vision tower reads of each item, where it reads them apart."""
        return [0] * len(self._items)

    @property
    def order(self) -> list[int]:
        """The items' rows, so that neighbours share a beginning, or are of similar length."""
        return sorted(range(len(self._items)), key=self.lengths.__getitem__, reverse=True)

    def shared(self, rows: Sequence[int]) -> list[int]:
        """Count, for each of some rows, the first tokens that a chunk of them takes from the row before."""
        return [0] * len(rows)

    def chunk(self, rows: Sequence[int]) -> Inputs:
        """Make one chunk of some of the items."""
        return self._preprocessor([self._items[row] for row in rows])

    def images(self, room: int | None) -> list[Inputs]:
        """Make chunks of the distinct images.

        Args:
            room: The most patches of a chunk; None for no limit.

        Returns:
            Nothing where `chunk` holds the images.
        """
        return []
