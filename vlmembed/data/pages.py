"""A folder of PDFs as a table of their pages."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from vlmembed.data.cells import Folder
from vlmembed.data.pdf import PAGE_PIXELS, PdfPage, count_pages
from vlmembed.media import MAX_PIXELS

#: A page of fewer would say nothing.
FEWEST_PIXELS = 1024


@dataclass(eq=False)
class Pages:
    """The pages of the PDFs in a folder, in the order of their names, for wherever a table of documents is taken.

    Columns are ``id``, which is ``reports/2024.pdf#page=3`` (the path within the folder, pages counted from 1),
    ``image``, and if asked for ``text``, null where a page shows none. Needs ``pip install "vlmembed[pdf]"``.

    Args:
        path: The folder, which is searched with its subfolders, or one PDF. What is hidden (a name that begins with a
            dot), and folders that are links, are left out.
        text: Whether rows have the text of the page, for the model to read after its image.
        max_pixels: The most pixels of a page, and nearly as many as it has: 2,000,000 are A4 at 143 dpi.
        cache: A folder for the rendered pages, which nothing clears; null for ``vlmembed_pages`` in the cache of
            ``datasets``, where those of cells are.
        allow_outside: Folders to which links in the folder may lead.
    """

    path: str
    text: bool = False
    max_pixels: int = PAGE_PIXELS
    cache: str | None = None
    allow_outside: list[str] | None = None

    def __post_init__(self) -> None:
        if not FEWEST_PIXELS <= self.max_pixels <= MAX_PIXELS:
            raise ValueError(f"max_pixels is {FEWEST_PIXELS:,} to {MAX_PIXELS:,}, got {self.max_pixels:,}.")

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def name(self) -> str:
        """The folder's name."""
        return Path(self.path).resolve().name

    @property
    def column_names(self) -> list[str]:
        """The names of the cells."""
        return ["id", "image", "text"] if self.text else ["id", "image"]

    @cached_property
    def folder(self) -> Folder:
        """Where the PDFs are."""
        return Folder.of(self.path, self.allow_outside)

    def origins(self, indices: Sequence[int]) -> list[str]:
        """See `Table.origins`."""
        return [f"{self.path}, {self._id(*self._page(index))}" for index in indices]

    def read(self, indices: Sequence[int], names: Collection[str] | None = None) -> list[dict[str, Any]]:
        """See `Table.read`; a PDF is read for its text only."""
        rows = []
        for index in indices:
            file, number = self._page(index)
            page = PdfPage(file, number, self.max_pixels, None if self.cache is None else Path(self.cache))
            row: dict[str, Any] = {"id": self._id(file, number), "image": page}
            if self.text and (names is None or "text" in names):
                try:
                    row["text"] = page.text().strip() or None
                except (OSError, ValueError) as error:
                    raise ValueError(f"{self.path}: cannot read the text of {page}: {error}.") from error
            rows.append({name: cell for name, cell in row.items() if names is None or name in names})
        return rows

    def _page(self, index: int) -> tuple[Path, int]:
        """Return the PDF, and the number of its page from 1."""
        place = bisect_right(self._ends, index)
        return self._files[place], index - (self._ends[place - 1] if place else 0) + 1

    def _id(self, file: Path, number: int) -> str:
        return f"{file.relative_to(self.folder.path).as_posix()}#page={number}"

    @cached_property
    def _files(self) -> list[Path]:
        root = Path(self.path)
        if not root.exists():
            raise ValueError(f"{self.path}: no such folder.")
        files = sorted((file for file in visible(root) if file.suffix.lower() == ".pdf"), key=Path.as_posix)
        if not files:
            raise ValueError(f"{self.path}: there is no PDF in this folder, or below it.")
        return files

    @cached_property
    def _ends(self) -> list[int]:
        """Of each PDF, the pages of it and of those before it."""
        return [*accumulate(map(self._count, self._files))]

    def _count(self, file: Path) -> int:
        self.folder.find(file.absolute(), "PDF", self.path)
        try:
            return count_pages(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: cannot read the PDF {file}: {error}, or remove the file.") from error


def visible(root: Path) -> Iterator[Path]:
    """Yield a file, or the files below a folder, but hidden ones; also links to nothing."""
    for file in [root] if root.is_file() else root.rglob("*"):
        if not file.is_dir() and not any(part.startswith(".") for part in file.relative_to(root).parts):
            yield file
