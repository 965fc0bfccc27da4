"""A stream that is read by row number, forward: of what does not fit on a disk, a corpus."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import datasets

from vlmembed.data.rows import with_element
from vlmembed.data.streaming import StreamingRows, as_dataset
from vlmembed.data.tables import LINES, undecoded

#: Rows that are in memory together; images may be in them.
BLOCK = 64


class Cursor:
    """The rows of a stream by their number, as a table of ``vlmembed.data`` has them.

    It goes forward, and begins again for a row before the block that is in memory. Lines that are blank, and rows that
    ``where`` leaves out, have no number; with ``each``, every element that is read has one.
    """

    _table: Any  # The block's rows.

    def __init__(self, stream: StreamingRows) -> None:
        self._stream, first = stream, stream.raw
        self.column_names = [*first.column_names]
        #: Those of Arrow's columns; None of JSON.
        self.features = first.features if isinstance(first, datasets.Dataset) else None
        # Of each row its number in the stream, and its element of `each`; and rows up to the end of each block.
        self._numbers, self._elements, self._ends = array("q"), array("i"), array("q")
        self._blocks, self._block, self._is_whole = self._read(), -1, False

    def __len__(self) -> int:
        while self._extend():
            pass
        return len(self._numbers)

    def ranges(self) -> Iterator[range]:
        """Number the rows of each block; those that are not known yet while they are read."""
        block, start = 0, 0
        while block < len(self._ends) or self._extend():
            yield range(start, self._ends[block])
            block, start = block + 1, self._ends[block]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        rows, each = list[Any](), self._stream.each
        try:
            for block, of_block in groupby(indices, lambda index: bisect_right(self._ends, index)):
                self._go_to(block)
                rows += self._table.__getitems__([self._numbers[index] - self._first for index in of_block])
        except IndexError as error:
            raise OSError(f"{self._stream.origin} has changed since it was opened; it has fewer rows now.") from error
        return [with_element(row, each, self._elements[index]) for row, index in zip(rows, indices, strict=True)]

    def select_columns(self, names: Iterable[str]) -> Cursor:
        """Return the same table: a row is read whole."""
        return self

    def origins(self, indices: Sequence[int]) -> list[str]:
        """Say where rows stand, for messages."""
        origin, at_element = self._stream.origin, self._stream.at_element
        return [at_element(f"{origin}, row {self._numbers[index] + 1}", self._elements[index]) for index in indices]

    def _read(self) -> Iterator[tuple[int, Any]]:
        """Read from the beginning: of each block the number of its first row, and its rows."""
        first = 0
        try:
            stream = self._stream.open()
            for block in stream.iter(BLOCK):
                if stream.features == LINES:
                    yield first, self._stream.block(block, stream, first=first)
                else:
                    yield first, undecoded(as_dataset(block, stream.features))
                first += len(block)
        except Exception as error:  # Of a file, of the network, of what decompresses.
            raise OSError(f"{self._stream.origin}: the stream broke off after row {first}: {error}") from error

    def _extend(self) -> bool:
        """Go to the first block that is not known; False if there is none."""
        try:
            if not self._is_whole:
                self._go_to(len(self._ends))
        except IndexError:
            self._is_whole = True
        return not self._is_whole

    def _go_to(self, block: int) -> None:
        """Have a block in memory; an ``IndexError`` says that the stream ends before."""
        if block < self._block:
            self._blocks, self._block = self._read(), -1
        while self._block < block:
            self._first, self._table = next(self._blocks, (0, None))
            if self._table is None:
                self._blocks, self._block = self._read(), -1
                raise IndexError(block)
            self._block += 1
            if self._block == len(self._ends):
                self._note()

    def _note(self) -> None:
        """Write down which rows a block has that is read the first time."""
        for index in range(len(self._table)):
            for element in self._elements_of(index):
                self._numbers.append(self._first + index)
                self._elements.append(element)
        self._ends.append(len(self._numbers))

    def _elements_of(self, index: int) -> Sequence[int]:
        """See `Table.elements`; of a row that cannot be read -1, so that reading it says why; of a blank one none."""
        if self.features is not None and not self._stream.where and self._stream.each is None:
            return [-1]
        try:
            row = self._table.__getitems__([index])[0]
        except ValueError:
            return [-1]
        return [] if row is None else self._stream.elements(row)
