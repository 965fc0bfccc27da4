"""The documents behind the rows of an index, read from the corpus that it was made of."""

from __future__ import annotations

import json
from bisect import bisect_right
from threading import Lock

from vlmembed.data.streaming import refuse_streams
from vlmembed.search.corpus import Corpus, CorpusSource, open_corpus
from vlmembed.search.index import SIDE_FILE, Index
from vlmembed.types import Item


def corpus_of(index: Index, corpus: CorpusSource | None = None) -> tuple[Corpus, str]:
    """Open the corpus that an index was made of, where it was or is said to be; it comes with its name for messages."""
    value = index.manifest.get("corpus") if corpus is None else corpus
    if value is None or isinstance(value, dict | list):
        raise ValueError(f"{index.folder}: its manifest does not say where its corpus is. Give it as 'corpus'.")
    name = value if isinstance(value, str) else type(value).__name__
    refuse_streams(value, "looking documents up")
    try:
        return open_corpus(value, index.manifest.get("role", "document")), name
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{index.folder}: its corpus {name!r} cannot be opened: {str(error).rstrip('.')}. If it has moved, or was "
            "given as a class, give 'corpus'."
        ) from error


class Documents:
    """The items of an index by row, each read when it is asked for, from several threads too.

    A ``ValueError`` says that the corpus is not there, or is another than the index was made of.

    Args:
        index: The index.
        corpus: Where the corpus is now; null for where it was.
    """

    def __init__(self, index: Index, corpus: CorpusSource | None = None) -> None:
        self._index, self._lock = index, Lock()
        self._corpus, self._name = corpus_of(index, corpus)
        self._unreadable = _unreadable(index)
        if len(self._corpus) != index.count + len(self._unreadable):
            self._refuse(f"{len(self._corpus)} items, and the index {index.count + len(self._unreadable)}")

    def __len__(self) -> int:
        return self._index.count

    def __getitem__(self, row: int) -> Item:
        with self._lock:
            name, item = self._corpus.read(self._place(row))
        if name != (expected := self._index.ids[row].as_py()):
            self._refuse(f"{name!r} where the index has {expected!r} ({item.origin})")
        return item

    def _place(self, row: int) -> int:
        """Return where the item of a row is in the corpus, of which the index lacks what could not be read."""
        place = row
        while place != (shifted := row + bisect_right(self._unreadable, place)):
            place = shifted
        return place

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"{self._index.folder}: the corpus {self._name} has changed since it was encoded; it has {what}. "
            "Encode it again."
        )


def _unreadable(index: Index) -> list[int]:
    """Return the places in the corpus that could not be read, ascending."""
    path = index.folder / SIDE_FILE
    if not path.is_file():
        return []
    return sorted(json.loads(line)["row"] for line in path.read_text(encoding="utf-8").splitlines() if line)
