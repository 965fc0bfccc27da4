"""One of each bad, or merely unusual, input: how it is made, and what it should be read as."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

#: Bytes of a text that is cut, but not refused.
MEGABYTE = 2**20


@dataclass(frozen=True)
class Input:
    """A training row's ``positive``, or a whole line.

    Args:
        name: In the table.
        make: Writes its files into a folder, and returns the cell; or the line, if that is bytes; or the row, if that
            is a ``dict`` with a ``query``.
        like: Makes a plain cell that should be read as the very same; None if the input should be refused.
        words: What it should be read as.
    """

    name: str
    make: Callable[[Path], Any]
    like: Callable[[Path], Any] | None = None
    words: str = ""


def picture(width: int = 64, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width: int, height: int, rows: int | None = None, extra: bytes = b"") -> bytes:
    """A PNG of black pixels, one bit each, with the data of some rows."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + (width + 7) // 8) * (height if rows is None else rows)), 9)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def saved(image: Image.Image, name: str = "page.png", **options: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        image.save(folder / name, **options)
        return {"image": name}

    return make


def written(content: bytes, name: str = "page.png") -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        (folder / name).write_bytes(content)
        return {"image": name}

    return make


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def held(folder: Path) -> Any:
    exif = Image.Exif()
    exif[274] = 6
    picture().transpose(Image.Transpose.ROTATE_90).save(folder / "page.png", exif=exif)
    return {"image": "page.png"}


def seen_through(folder: Path) -> Any:
    image = picture()
    image.putalpha(100)
    return saved(image)(folder)


def on_white(folder: Path) -> Any:
    saved(picture().quantize(16), "palette.png", transparency=3)(folder)
    return composed(folder, "palette.png")


def composed(folder: Path, name: str = "page.png") -> Any:
    image = Image.open(folder / name).convert("RGBA")
    return saved(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"), "q.png")(folder)


def moving(kind: str) -> Callable[[Path], Any]:
    others = [Image.new("RGB", (64, 32), colour) for colour in ("lime", "blue")]
    return saved(Image.new("RGB", (64, 32), "red"), f"page.{kind}", save_all=True, append_images=others, lossless=True)


def link(folder: Path) -> Any:
    (folder / "page.png").symlink_to("/etc/passwd")
    return {"image": "page.png"}


def pipe(folder: Path) -> Any:
    os.mkfifo(folder / "page.png")
    return {"image": "page.png"}


def large_file(folder: Path) -> Any:
    with (folder / "page.png").open("wb") as file:
        file.write(png(1, 1))
        file.truncate(2**28 + 1)
    return {"image": "page.png"}


def cell(value: Any) -> Callable[[Path], Any]:
    return lambda _: value


def row(**columns: Any) -> Callable[[Path], Any]:
    return lambda _: {"query": "a question", "positive": "p", "negative": "n", **columns}


def line(text: str | bytes) -> Callable[[Path], Any]:
    return lambda _: text if isinstance(text, bytes) else text.encode()


def overfull(folder: Path) -> Any:
    return written(png(9, 3, rows=50_000_000))(folder)


def commented(folder: Path) -> Any:
    return written(png(9, 3, extra=chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(10**8)))))(folder)


MESSAGE = '{"role": "user", "content": '
GREYS = np.arange(0, 65536, 32, dtype=np.uint16).reshape(32, 64)
EIGHT_BITS = (GREYS >> 8).astype(np.uint8)
RED = Image.new("RGB", (64, 32), "red")
PLAIN = saved(picture(), "plain.png")
BLACK = saved(Image.new("RGB", (9, 3)), "plain.png")

IMAGES = [
    Input("CMYK", saved(Image.new("CMYK", (64, 32), (0, 255, 255, 0)), "p.tiff"), saved(RED, "q.png"), "RGB"),
    Input("palette", saved(picture().quantize(16)), saved(picture().quantize(16).convert("RGB"), "q.png"), "RGB"),
    Input(
        "palette, one colour transparent",
        saved(picture().quantize(16), transparency=3),
        on_white,
        "RGB, that colour white, as transformers does it",
    ),
    Input(
        "transparent",
        seen_through,
        lambda folder: (seen_through(folder), composed(folder))[1],
        "RGB, on white, as transformers does it",
    ),
    Input(
        "16 bits", saved(Image.fromarray(GREYS)), saved(Image.fromarray((GREYS >> 8).astype("u1")), "q.png"), "8 bits"
    ),
    Input(
        "32 bits, values above 255",
        saved(Image.fromarray(GREYS.astype(np.int32)), "p.tiff"),
        saved(Image.fromarray((GREYS >> 8).astype("u1")), "q.png"),
        "8 bits",
    ),
    Input("numbers below 0", saved(Image.fromarray(GREYS.astype(np.int32) - 9), "p.tiff")),
    Input("1 bit", written(png(9, 3)), BLACK, "black and white"),
    Input("animated GIF", moving("gif"), saved(RED, "q.png"), "its first picture"),
    Input("animated WebP", moving("webp"), saved(RED, "q.png"), "its first picture"),
    Input("EXIF-rotated", held, PLAIN, "upright"),
    Input("1 × 1", saved(picture(1, 1)), saved(picture(1, 1), "q.png"), "one image token"),
    Input("1 × 200", saved(picture(1, 200)), saved(picture(1, 200), "q.png"), "a strip"),
    Input("1 × 20,000", saved(picture(1, 20_000))),
    Input("20,000 × 20,000 in 49 kB", written(png(20_000, 20_000))),
    Input("2,000,000,000 × 1 declared", written(png(2_000_000_000, 1, rows=0))),
    Input(
        "150 MB of pixels in a PNG of 9 × 3", lambda folder: written(png(9, 3, rows=50_000_000))(folder), BLACK, "9 × 3"
    ),
    Input("100 MB of compressed comment in a PNG", commented),
    Input("cut PNG", written(encoded(picture())[:2000])),
    Input("cut JPEG", written(encoded(picture(), "JPEG")[:1500], "page.jpg")),
    Input("PNG called .jpg", written(encoded(picture()), "page.jpg"), PLAIN, "what it is"),
    Input("text called .png", written(b"no image")),
    Input("HTML called .png", written(b"<html>404</html>")),
    Input("SVG", written(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "page.svg")),
    Input("PostScript called .png", written(encoded(picture(), "EPS"))),
    Input("PDF called .png", written(b"%PDF-1.7")),
    Input("PSD", written(b"8BPS\0\1", "page.psd")),
    Input("DOCX called .png", written(b"PK\3\4" + bytes(26) + b"[Content_Types].xml")),
    Input("MP3 called .png", written(b"ID3\4")),
    Input("pointer of Git LFS", written(b"version https://git-lfs.github.com/spec/v1\n")),
    Input("empty file", written(b"")),
    Input("file of 256 MiB and 1 byte", large_file),
    Input("folder", lambda folder: (folder / "page.png").mkdir() or {"image": "page.png"}),
    Input("pipe", pipe),
    Input("no such file", cell({"image": "gone.png"})),
]

PATHS = [
    Input("absolute path outside", cell({"image": "/etc/passwd"})),
    Input("path that goes up", cell({"image": "../../etc/passwd"})),
    Input("link that leads out", link),
    Input("https address", cell({"image": "https://example.org/a.png"})),
    Input("file address", cell({"image": "file:///etc/passwd"})),
    Input("data address", cell({"image": "data:image/png;base64,AA=="})),
    Input("null byte in the path", cell({"image": "a\0.png"})),
    Input("path of 5,000 letters", cell({"image": "a" * 5000})),
    Input("half a character in the path", line('{"query": "q", "positive": {"image": "\\udcff.png"}}')),
]

TEXTS = [
    Input("empty", cell("")),
    Input("white space", cell(" \n\t")),
    Input("1 MB of words", cell("word " * (MEGABYTE // 5)), cell("word " * 1000), "its first `max_length` tokens"),
    Input("1 MB without a space", cell("a" * MEGABYTE), cell("a" * 5000), "its first `max_length` tokens"),
    Input("3 MB", cell("word " * (3 * MEGABYTE // 5))),
    Input("emoji, combining marks, right to left", cell("😀 e\u0301 שלום"), cell("😀 e\u0301 שלום"), "itself"),
    Input("null byte", cell("a\0b"), cell("a\0b"), "itself"),
    Input("half a character", line('{"query": "q", "positive": "\\ud83d"}')),
    Input("what stands for an image", cell("see <|image_pad|>")),
    Input("path of an image", lambda folder: (saved(picture())(folder), "page.png")[1], cell("page.png"), "a text"),
]

TYPES = [
    Input("number", cell(7)),
    Input("true", cell(True)),
    Input("null", cell(None)),
    Input("empty list", cell([])),
    Input("empty mapping", cell({})),
    Input("unknown key", cell({"audio": "a.wav"})),
    Input("text that is a list", cell({"text": [["a"]]})),
    Input("bytes that are no bytes", cell({"bytes": "AAAA", "path": None})),
    Input("path that is a number", cell({"image": 7})),
    Input("content part without content", cell([{"type": "image"}])),
    Input("content part of a strange type", cell([{"type": [1], "image": "a.png"}])),
    Input("answer of an assistant", cell([{"role": "assistant", "content": "a"}])),
    Input("nested 700 deep", line(f'{{"query": "q", "positive": {"".join([MESSAGE] * 700)}"a"{"}" * 701}')),
    Input("nested 100,000 deep", line('{"query": "q", "positive": ' + "[" * 100_000)),
    Input("query that is a number", row(query=7)),
    Input("query that is a list", row(query=["a", "b"])),
]

ROWS = [
    Input("no JSON", line('{"query": "q", ')),
    Input("no object", line("[1, 2]")),
    Input("no UTF-8", line(b'{"query": "\xff", "positive": "p"}')),
    Input("column missing", line('{"query": "q"}')),
    Input("column too many", row(other="x")),
    Input("score NaN", line('{"query": "q", "positive": "p", "negative": "n", "scores": [NaN, 0.5]}')),
    Input("score Infinity", line('{"query": "q", "positive": "p", "negative": "n", "scores": [1, -Infinity]}')),
    Input("score 1e300", row(scores=[1e300, 0.5])),
    Input("score of 400 digits", row(scores=[10**400, 0.5])),
    Input("score that is a text", row(scores=["1", 0.5])),
    Input("too few scores", row(scores=[1.0])),
    Input("label that is a text", line('{"query": "q", "document": "p", "label": "yes"}')),
    Input("label below 0", line('{"query": "q", "document": "p", "label": -1}')),
    Input("label NaN", line('{"query": "q", "document": "p", "label": NaN}')),
]

TABLE = {"Images": IMAGES, "Paths": PATHS, "Texts": TEXTS, "Types": TYPES, "Rows": ROWS}


def content(given: Any) -> bytes:
    """Return the line of a JSONL file."""
    if isinstance(given, bytes):
        return given
    if isinstance(given, dict) and "query" in given:
        return json.dumps(given).encode()
    return json.dumps({"query": "a question", "positive": given, "negative": "n"}).encode()
