"""Pages of PDF documents: images that PDFium renders when they are needed, and that a folder then holds.

A page of some hundred bytes may ask for days and for all memory. So each is drawn in a child process that has limits of
both, where there are such (on Linux). Pages are counted and measured in this process, which reads nothing of them.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import datasets

from vlmembed.files import clear_drafts, content_digest, version_of, write_whole
from vlmembed.limits import LimitError, in_child, limit
from vlmembed.media import MAX_VIDEO_PIXELS, OtherKindError, head_of
from vlmembed.types import LazyImage

#: The most pixels of a rendered page, and nearly as many as it has: A4 at 143 dpi.
PAGE_PIXELS = 2_000_000
#: The most bytes that a PDF may have.
MAX_PDF_BYTES = limit("VLMEMBED_MAX_PDF_BYTES", 2**30)
#: The most seconds, of a processor, that a page may take to be drawn, and the most bytes of memory.
MAX_PDF_SECONDS = limit("VLMEMBED_MAX_PDF_SECONDS", 60)
MAX_PDF_MEMORY = limit("VLMEMBED_MAX_PDF_MEMORY", 2**32)
#: Part of the name of a rendered page; to be raised where `PdfPage` draws otherwise than before.
DRAWING = 1
#: PDFium must not be called by two threads at a time; a child process must not begin while another is within it.
LOCK = Lock()


class CacheError(Exception):
    """The folder of rendered pages cannot be written: no row's fault, so that none is left out for it."""


@dataclass(frozen=True)
class PdfPage(LazyImage):
    """A page of a PDF as viewers show it: cropped, turned, on white, with its annotations and filled forms.

    A rendered page stays in ``cache/CONTENT OF THE PDF/``, and nothing removes it. What the PDF does not bring, such as
    a font, PDFium takes from this machine, so that another one may draw other letters.
    """

    file: Path | bytes
    number: int  # From 1.
    max_pixels: int = PAGE_PIXELS
    cache: Path | None = None  # Null for a folder in the cache of `datasets`.

    def __str__(self) -> str:
        return f"{'a PDF given as bytes' if isinstance(self.file, bytes) else self.file}#page={self.number}"

    @cached_property
    def key(self) -> str:
        """See `LazyImage.key`."""
        return self.content if isinstance(self.file, bytes) else f"{self.file} {self.number} {self.max_pixels}"

    @property
    def content(self) -> str:
        """See `LazyImage.content`."""
        return f"{content_digest(self.file)} {self.number} {self.max_pixels}"

    @property
    def size(self) -> tuple[int, int]:
        """See `LazyImage.size`."""
        self._check_number(count_pages(self.file))
        if (size := page_sizes(self.file)[self.number - 1]) is None:
            raise OtherKindError("the page is damaged. Save the PDF again")
        return pixels(*size, self.max_pixels)[:2]

    def render(self) -> Path:
        """See `LazyImage.render`; several processes may render the same page at once."""
        return self._make(f"{self.max_pixels}-{DRAWING}.png", self._draw)

    def text(self) -> str:
        """Return the text that the page shows, line by line; a scan has none."""
        return self._make(f"{DRAWING}.txt", _read_text).read_text(encoding="utf-8")

    def _make(self, name: str, make: Callable[[Any], bytes]) -> Path:
        """Return the file of what is made of the page, and write it if it is not there."""
        cache = self.cache or Path(datasets.config.HF_DATASETS_CACHE, "vlmembed_pages")
        path = cache / content_digest(self.file) / f"{self.number}-pdfium{_pdfium().PDFIUM_INFO}-{name}"
        if not path.exists():
            try:
                content = in_child(lambda: self._made(make), MAX_PDF_SECONDS, MAX_PDF_MEMORY, LOCK)
            except LimitError as error:
                limits = "VLMEMBED_MAX_PDF_SECONDS or VLMEMBED_MAX_PDF_MEMORY"
                raise OtherKindError(f"{error}. Save it again, or set {limits}") from error
            except ValueError as error:
                raise OtherKindError(str(error)) from error
            try:
                clear_drafts(path.parent)
                write_whole(path, content)
            except OSError as error:
                raise CacheError(
                    f"{path}: a page cannot be written there: {error}. Make room, or choose another folder: 'cache' of "
                    "vlmembed.data.Pages, or the environment variable HF_DATASETS_CACHE."
                ) from error
        return path

    def _made(self, make: Callable[[Any], bytes]) -> bytes:
        with opened(self.file) as document:
            self._check_number(len(document))
            document.init_forms()
            return make(document[self.number - 1])

    def _draw(self, page: Any) -> bytes:
        width, height = page.get_size()
        *_, scale = pixels(width, height, self.max_pixels)
        content = io.BytesIO()
        page.render(scale=scale, rev_byteorder=True).to_pil().save(content, "PNG", compress_level=1)
        return content.getvalue()

    def _check_number(self, count: int) -> None:
        if not 1 <= self.number <= count:
            pages = "one page" if count == 1 else f"{count} pages, counted from 1"
            raise OtherKindError(f"it has {pages}, and no page {self.number}. Name one that it has")


def all_pages(file: Path | bytes) -> list[PdfPage]:
    """Return the pages of a PDF that are the images of one item; a ``ValueError`` where they are too many for one."""
    count = count_pages(file)
    if count * PAGE_PIXELS > MAX_VIDEO_PIXELS:
        raise OtherKindError(f"it has {count} pages, too many for one item. Name some: page: [1, 2]")
    return [PdfPage(file, number) for number in range(1, count + 1)]


def pixels(width: float, height: float, most: int) -> tuple[int, int, float]:
    """Return width and height in pixels of a page, not more than ``most`` together, and pixels per unit.

    PDFium rounds up: the scale solves ``(scale * width + 1) * (scale * height + 1) = most``.
    """
    half = (width + height) / 2
    scale = (most - 1) / (half + math.sqrt(half**2 + width * height * (most - 1)))
    return math.ceil(width * scale), math.ceil(height * scale), scale


def count_pages(file: Path | bytes) -> int:
    """Return how many pages a PDF has; a ``ValueError`` says why it cannot be read, and what to do."""
    return len(page_sizes(file))


def page_sizes(file: Path | bytes) -> list[tuple[float, float] | None]:
    """Return width and height of the pages of a PDF, in its units; null for one that is damaged."""
    return _page_sizes(file) if isinstance(file, bytes) else _file_page_sizes(file, *version_of(file.stat()))


@lru_cache(maxsize=4096)
def _file_page_sizes(file: Path, *version: int) -> list[tuple[float, float] | None]:
    return _page_sizes(file)


def _page_sizes(file: Path | bytes) -> list[tuple[float, float] | None]:
    with opened(file) as document:
        sizes: list[tuple[float, float] | None] = [None] * len(document)
        for index in range(len(sizes)):
            with suppress(_pdfium().PdfiumError):
                sizes[index] = document.get_page_size(index)
    return sizes


def _read_text(page: Any) -> bytes:
    text = page.get_textpage().get_text_bounded()
    # A hyphen at the end of a line comes as this character, and the word's other half after it.
    return text.replace("\x02", "").replace("\r\n", "\n").encode()


@contextmanager
def opened(file: Path | bytes) -> Iterator[Any]:
    """Open a PDF with PDFium for as long as the block runs; a ``ValueError`` says what is wrong with it."""
    pdfium = _pdfium()
    _check_kind(file)
    with LOCK:
        # Not by `PdfDocument` itself: where it finds no pages, it reports the error of a call before.
        if isinstance(file, bytes):
            handle = pdfium.raw.FPDF_LoadMemDocument64(file, len(file), None)
        else:
            handle = pdfium.raw.FPDF_LoadDocument(os.fsencode(file.absolute()) + b"\0", None)
        if not handle:
            raise OtherKindError(_reason(pdfium.raw, pdfium.raw.FPDF_GetLastError()))
        document = pdfium.PdfDocument(handle)
        try:
            if not len(document):
                raise OtherKindError("it has no pages. Save it again")
            yield document
        except pdfium.PdfiumError as error:
            raise OtherKindError(f"it is damaged: {error} Save it again") from error
        finally:
            document.close()


def _reason(raw: Any, error: int) -> str:
    if error == raw.FPDF_ERR_PASSWORD:
        return "it is encrypted, and opens with a password only. Save it without one (qpdf --decrypt)"
    if error == raw.FPDF_ERR_SECURITY:
        return "it is encrypted in a way that PDFium does not know. Save it without encryption"
    return "it is damaged or cut. Save it again"


def _check_kind(file: Path | bytes) -> None:
    head = head_of(file, MAX_PDF_BYTES, "VLMEMBED_MAX_PDF_BYTES")
    if b"%PDF-" not in head:  # Viewers accept some bytes before it.
        what = f"it begins with {head[:8]!r}" if head else "it is empty"
        raise OtherKindError(f"it is no PDF: {what}. Name the file that is meant (images: under the key 'image')")


def _pdfium() -> Any:
    try:
        import pypdfium2
    except ImportError as error:
        raise OtherKindError(
            'it is a PDF, and pypdfium2, which reads it, is not installed. Install it (pip install "vlmembed[pdf]")'
        ) from error
    return pypdfium2
