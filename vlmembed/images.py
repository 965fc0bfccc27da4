"""Opening an image file that may be anything: which kinds are read, and how much one may take."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

from PIL import Image

#: Raster images that say all there is to see. Among Pillow's others, some have another program interpret the file.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

#: What Pillow raises on files that are missing, broken, or no images.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def limit(variable: str, default: int) -> int:
    """Return what an environment variable sets, a whole number above 0.

    Raises:
        ValueError: If it is something else.
    """
    value = os.environ.get(variable, str(default))
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"The environment variable {variable} is a whole number above 0, got {value!r}.")
    return int(value)


#: The most pixels that an image file may have: 300 MB once it is decoded to RGB. An A3 page at 600 dpi has 70 million.
MAX_PIXELS = limit("VLMEMBED_MAX_IMAGE_PIXELS", 100_000_000)
#: The most bytes that an image file may have.
MAX_BYTES = limit("VLMEMBED_MAX_IMAGE_BYTES", 2**28)

#: The most pixels that may be taken of a video, all frames together: 6 GB in RGB. 960 frames of Full HD have as many.
MAX_VIDEO_PIXELS = limit("VLMEMBED_MAX_VIDEO_PIXELS", 2_000_000_000)

# Pillow has one limit for the whole process: it warns above it, and refuses above twice as much.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def open_image(file: Path | bytes) -> Image.Image:
    """Read the header of an image: nothing is decoded, so a file that is refused takes no memory.

    The limits are environment variables, because they hold for everything that opens images, in every process, and
    because they change no result: they only say what is refused.

    Args:
        file: A file of one of ``FORMATS``, whatever its name ends in, or the content of one.

    Raises:
        ValueError: If it is above a limit.
        OSError: If there is no such file, or it is no such image; or another of ``UNREADABLE`` if it is broken.
    """
    size = file.stat().st_size if isinstance(file, Path) else len(file)
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes are more than the limit of {MAX_BYTES:,}; VLMEMBED_MAX_IMAGE_BYTES sets it")
    reason = f"pixels are more than the limit of {MAX_PIXELS:,}; VLMEMBED_MAX_IMAGE_PIXELS sets it"
    try:
        image = Image.open(file if isinstance(file, Path) else io.BytesIO(file), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"its {reason}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{width:,} × {height:,} {reason}")
    return image
