"""Any image file is either read right or refused with its row, and what is refused takes no memory.

More of the kind: `test_media.py` (missing, empty, cut, rotated, 16-bit), `test_malformed_rows.py` (palette, CMYK),
`test_sources.py` (types, texts), `test_doors.py` (what leads elsewhere).
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from building import damaged, item, picture
from PIL import Image

from vlmembed import media as images
from vlmembed.backbones import Qwen3VL
from vlmembed.data.cells import Folder, to_items
from vlmembed.limits import limit
from vlmembed.media import image_size, load_image
from vlmembed.types import Item, Part

FORK = multiprocessing.get_context("fork")
ORIGIN = "train.jsonl, row 17, column 'positive'"


def black(width: int, height: int, rows: int | None = None) -> bytes:
    """Return a PNG of black pixels, one bit each, cut after some rows; 20,000 × 20,000 of them are 49 kB."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + (width + 7) // 8) * (height if rows is None else rows)), 9)
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, (b"IHDR", b"IDAT", b"IEND"), (header, pixels, b"")))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def declaring(kind: str, width: int, height: int, folder: Path) -> bytes:
    """Return a small file whose header declares another size."""
    picture(16, 16).save(folder / f"small.{kind}")
    content = bytearray((folder / f"small.{kind}").read_bytes())
    if kind == "jpg":
        struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, height, width)
    elif kind == "bmp":
        struct.pack_into("<ii", content, 18, width, height)
    else:
        struct.pack_into("<HH", content, 6, width, height)
    return bytes(content)


HUGE: dict[str, Callable[[Path], bytes]] = {
    "png of 20,000 x 20,000": lambda _: black(20_000, 20_000),
    "png of 2,000,000,000 x 1": lambda _: black(2_000_000_000, 1, rows=0),
    "jpg of 20,000 x 20,000": lambda folder: declaring("jpg", 20_000, 20_000, folder),
    "jpg of 11,000 x 10,000": lambda folder: declaring("jpg", 11_000, 10_000, folder),
    "bmp of 100,000 x 100,000": lambda folder: declaring("bmp", 100_000, 100_000, folder),
    "gif of 60,000 x 60,000": lambda folder: declaring("gif", 60_000, 60_000, folder),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_image_is_refused_with_its_row(tmp_path: Path, kind: str) -> None:
    content = HUGE[kind](tmp_path)
    assert len(content) < 100_000
    path = tmp_path / "page"
    path.write_bytes(content)
    reason = "pixels are more than the limit of 100,000,000; VLMEMBED_MAX_IMAGE_PIXELS sets it"
    for refused in (
        lambda: load_image(path, ORIGIN),
        lambda: image_size(path, ORIGIN),
        lambda: load_image(content, ORIGIN),
        lambda: image_size(content, ORIGIN),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            refused()
        assert str(error.value).startswith(ORIGIN)


def open_all(paths: list[Path], environment: dict[str, str], said: Any) -> None:
    """Open files by their paths and by their contents, and say what came of each, and what memory all but one took."""
    os.environ.update(environment)
    media, found, peaks = importlib.reload(images), [], []
    warnings.simplefilter("ignore")
    for path in paths:
        for file in (path, path.read_bytes()):
            try:
                media.open_image(file)
                found.append("opened")
            except media.UNREADABLE as error:
                found.append(str(error))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    said.send((found, peaks[-1] - peaks[0]))


def opened_elsewhere(folder: Path, contents: Iterable[bytes], **environment: str) -> tuple[list[str], int]:
    """In a process of its own, whose peak is not that of other tests, and which reads the environment anew."""
    paths = []
    for number, content in enumerate(contents):
        paths.append(folder / str(number))
        paths[-1].write_bytes(content)
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=open_all, args=(paths, environment, theirs))
    process.start()
    said: tuple[list[str], int] = ours.recv()
    process.join()
    return said


def test_a_refused_image_takes_no_memory(tmp_path: Path) -> None:
    """Decoded, the smallest would take 110 MB."""
    said, peak = opened_elsewhere(tmp_path, [make(tmp_path) for make in HUGE.values()])
    assert len(said) == 2 * len(HUGE)
    assert "opened" not in said
    assert peak < 10_000  # KiB: what Pillow's readers of other formats take to be imported.


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "page.png").open("wb") as file:
        file.write(black(1, 1))
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(ValueError, match=rf"{ORIGIN}: .* bytes are more than .*VLMEMBED_MAX_IMAGE_BYTES"):
        load_image(tmp_path / "page.png", ORIGIN)


def test_the_limits_are_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images.open_image(black(10_000, 10_000))
    # More pixels than Pillow opens by itself, 179 million; and 49 kB.
    contents = [black(18_000, 10_000), black(18_001, 10_000), black(20_000, 20_000)]
    limits = {"VLMEMBED_MAX_IMAGE_PIXELS": "180000000", "VLMEMBED_MAX_IMAGE_BYTES": "40000"}
    said, _ = opened_elsewhere(tmp_path, contents, **limits)
    assert said[:2] == ["opened"] * 2
    assert all("more than the limit of 180,000,000" in each for each in said[2:4])
    assert all("bytes are more than the limit of 40,000;" in each for each in said[4:])
    for value in ("", "0", "1e8", "-1"):
        monkeypatch.setenv("VLMEMBED_MAX_IMAGE_PIXELS", value)
        with pytest.raises(ValueError, match="VLMEMBED_MAX_IMAGE_PIXELS is a whole number"):
            limit("VLMEMBED_MAX_IMAGE_PIXELS", 1)


# Shapes


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (1, 31), (3, 500)])
def test_small_and_long_images_are_read(checkpoint: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    picture(*size).save(tmp_path / "page.png")
    ours = Qwen3VL(str(checkpoint)).make_preprocessor()
    one, other = (ours([item(value)]) for value in (picture(*size), tmp_path / "page.png"))
    assert all(torch.equal(other[name], value) for name, value in one.items())
    assert one["image_grid_thw"].min() >= 1


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (10, 2010)])
@pytest.mark.parametrize("opened", [False, True], ids=["file", "open"])
def test_an_image_that_the_processor_refuses_is_named(
    checkpoint: Path, tmp_path: Path, size: tuple[int, int], opened: bool
) -> None:
    picture(*size).save(tmp_path / "strip.png")
    value = picture(*size) if opened else tmp_path / "strip.png"
    good = Item("document", (Part("image", picture(64, 64)),), "train.jsonl, row 16")
    bad = Item("document", (Part("text", "a"), Part("image", value)), ORIGIN)
    ours = Qwen3VL(str(checkpoint)).make_preprocessor()
    for preprocess in (ours, ours.prepare, lambda items: ours.prepare(items, draft=True)):
        with pytest.raises(ValueError, match="aspect ratio") as error:
            preprocess([good, bad, good])
        assert str(error.value).startswith(ORIGIN)


# Formats


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_picture_is_read(tmp_path: Path, kind: str) -> None:
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue"))
    first.save(tmp_path / "moving", kind, save_all=True, append_images=others, lossless=True)
    with Image.open(tmp_path / "moving") as opened:
        assert opened.n_frames == 3
    assert load_image(tmp_path / "moving").tobytes() == first.tobytes()


@pytest.mark.parametrize("ending", ["jpg", "tiff", "txt", ""])
def test_the_ending_of_a_name_means_nothing(tmp_path: Path, ending: str) -> None:
    picture(16, 8).save(tmp_path / f"page.{ending}", "PNG")
    assert load_image(tmp_path / f"page.{ending}").tobytes() == picture(16, 8).tobytes()


def test_black_and_white_is_black_and_white(tmp_path: Path) -> None:
    (tmp_path / "fax.png").write_bytes(black(9, 3))
    assert not np.asarray(load_image(tmp_path / "fax.png")).any()
    Image.new("1", (9, 3), 1).save(tmp_path / "fax.png")
    assert np.asarray(load_image(tmp_path / "fax.png")).min() == 255


@pytest.mark.parametrize("kind", ["ppm", "tiff"])
def test_16_bits_that_pillow_opens_as_32_are_scaled_by_those_that_they_use(tmp_path: Path, kind: str) -> None:
    """Pillow would turn all of them that are above 255 white."""
    greys = np.arange(0, 60_000, 1000, dtype=np.int32).reshape(6, 10)
    Image.fromarray(greys).save(tmp_path / f"scan.{kind}")
    assert np.array_equal(np.asarray(load_image(tmp_path / f"scan.{kind}"))[..., 0], greys // 256)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.int32([0, 100, 2**31 - 1]), [0, 0, 255]),
        (np.uint16([0, 1, 3]), [0, 64, 192]),
        (np.float32([0, 0.5, 1]), [0, 127, 255]),
        (np.float32([0, 100.5, 255]), [0, 100, 255]),
    ],
)
def test_greys_are_never_black_without_a_word(values: np.ndarray, expected: list[int]) -> None:
    assert np.asarray(load_image(Image.fromarray(values[None])))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    "values", [np.int32([-1, 9]), np.float32([-0.1, 1]), np.float32([0, 256]), np.float32([np.nan])]
)
def test_values_that_do_not_say_what_is_white_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values[None]).save(tmp_path / "scan.tiff")
    with pytest.raises(ValueError, match=rf"{ORIGIN}: cannot read the image .*do not say what is white"):
        load_image(tmp_path / "scan.tiff", ORIGIN)


def test_an_encoded_photograph_is_turned_upright_before_it_is_compared(tmp_path: Path) -> None:
    """Two photographs of equal pixels, held differently, are not one."""
    exif = Image.Exif()
    exif[274] = 6
    picture(16, 8).save(tmp_path / "held.png", exif=exif)
    picture(16, 8).save(tmp_path / "plain.png")
    cells = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in ("held.png", "plain.png")]
    held, plain = to_items([(cell, "document", ORIGIN) for cell in cells], Folder(tmp_path))
    assert held.id != plain.id
    (frame,) = held.parts[0].frames
    assert load_image(frame).tobytes() == picture(16, 8).transpose(Image.Transpose.ROTATE_270).tobytes()


# At random


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "tiff", "bmp", "ppm", "jp2", "avif"])
def test_a_damaged_file_is_read_or_refused_with_its_row(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 of each format, with bytes changed, cut out and put in."""
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)  # Damage may declare any size, and large ones take long.
    random = np.random.default_rng(0)
    picture(24, 16).save(tmp_path / f"good.{kind}")
    good = (tmp_path / f"good.{kind}").read_bytes()
    said = []
    for _ in range(200):
        path = tmp_path / "damaged"
        path.write_bytes(damaged(random, good, random.choice([40, 400, 4000])))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert load_image(path, ORIGIN).mode == "RGB"
        except ValueError as error:
            said.append(str(error))
    assert 10 < len(said) < 200
    assert all(each.startswith(f"{ORIGIN}: cannot read the image {path}") for each in said)


# Texts


@pytest.mark.parametrize("piece", ["many words ", "a", " ", "7", "\0", "e\u0301", "😀", "<|im_end|>"], ids=ascii)
def test_a_text_of_a_megabyte_is_cut_within_seconds(checkpoint: Path, piece: str) -> None:
    """Also where nothing tells a tokenizer that a word ends."""
    preprocessor = Qwen3VL(str(checkpoint), max_length=64).make_preprocessor()
    text = "x" + piece * (2**20 // len(piece.encode()))
    start = time.monotonic()
    cut = preprocessor([item(text), item("a")])
    assert time.monotonic() - start < 20  # It takes two.
    assert cut["input_ids"].shape == (2, 64)


def test_a_longer_text_is_refused_with_its_row(tmp_path: Path) -> None:
    for text, size in (("a" * (2**21 + 1), "2,097,153"), ("é" * (2**20 + 1), "2,097,154")):
        with pytest.raises(ValueError, match=f"the text has {size} bytes, .*VLMEMBED_MAX_TEXT_BYTES") as error:
            to_items([(text, "document", ORIGIN)], Folder(tmp_path))
        assert str(error.value).startswith(ORIGIN)
    (item,) = to_items([("é" * 2**20, "document", ORIGIN)], Folder(tmp_path))
    assert item.parts[0].kind == "text"
