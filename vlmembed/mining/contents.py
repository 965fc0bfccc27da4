"""What an item is by what it shows, wherever its files are, and what Sentence Transformers is given of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from vlmembed.media import load_image
from vlmembed.types import Item, Part

#: So many groups of items are in memory at the same time.
GROUPS = 256
#: Batches whose images are open at the same time. Sentence Transformers sorts them by length.
BATCHES = 8


@dataclass(frozen=True)
class Content:
    """What identifies an item.

    Args:
        whole: Equal for items that show and say the same.
        pictures: Equal for items that show the same images or videos, whatever they say; empty where there are none.
    """

    whole: str
    pictures: str


def identify(item: Item) -> Content:
    """Return what identifies an item: its texts, and the pixels of its images, not their files.

    Raises:
        ValueError: If an image cannot be read, naming the item.
    """
    digests = [_digest(part, item.origin) for part in item.parts]
    shown = sorted(digest for part, digest in zip(item.parts, digests, strict=True) if part.kind != "text")
    return Content(" ".join(digests), " ".join(shown))


def _digest(part: Part, origin: str) -> str:
    hashed = hashlib.blake2b(part.kind.encode(), digest_size=16)
    if part.kind == "text":
        hashed.update(str(part.value).encode())
    elif isinstance(part.value, Path) and part.kind == "video":
        with part.value.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashed).hexdigest()
    for frame in part.frames:
        image = load_image(frame, origin)
        hashed.update(f"{image.size}".encode())
        hashed.update(image.tobytes())
    return hashed.hexdigest()


class DistinctItems(Sequence[Item]):
    """Items of different content, in the order of their first appearance, and read when asked for.

    Attributes:
        contents: What identifies each.
    """

    def __init__(self) -> None:
        self.contents: list[Content] = []
        self._numbers: dict[str, int] = {}
        self._readers: list[Callable[[], Item]] = []

    def add(self, content: Content, read: Callable[[], Item]) -> int:
        """Return the item's number, which is a new one if there is none of its content."""
        number = self._numbers.setdefault(content.whole, len(self.contents))
        if number == len(self.contents):
            self.contents.append(content)
            self._readers.append(read)
        return number

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [read() for read in self._readers[index]]
        return self._readers[index]()


def identified(groups: Iterable[Sequence[Item]]) -> Iterator[list[Content]]:
    """Identify groups of items, some groups at a time, in threads: decoding leaves Python's lock to others."""
    groups = iter(groups)
    with ThreadPoolExecutor() as threads:
        while some := [*islice(groups, GROUPS)]:
            contents = threads.map(identify, chain.from_iterable(some))
            yield from ([*islice(contents, len(group))] for group in some)


def opened(item: Item) -> dict[str, Any]:
    """Return what Sentence Transformers takes for an item: its texts, open images and videos, by kind.

    Raises:
        ValueError: If the item shows kinds by turns, which such a mapping cannot say.
    """
    groups = [(kind, [*parts]) for kind, parts in groupby(item.parts, key=lambda part: part.kind)]
    content = {kind: [_opened(part, item.origin) for part in parts] for kind, parts in groups}
    if len(content) < len(groups):
        raise ValueError(
            f"{item.origin}: texts and images by turns ({', '.join(kind for kind, _ in groups)}) cannot be given to "
            "Sentence Transformers in order. Put all images together."
        )
    return {kind: values[0] if len(values) == 1 else values for kind, values in content.items()}


def _opened(part: Part, origin: str) -> Any:
    if part.kind == "text":
        return part.value
    if part.kind == "image":
        return load_image(part.frames[0], origin)
    return [load_image(frame, origin) for frame in part.frames] or str(Path(str(part.value)).absolute())
