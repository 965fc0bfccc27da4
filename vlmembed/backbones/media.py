"""Opening images, with errors that say which row of which file was at fault."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vlmembed.types import Frame


def load_image(frame: Frame, origin: str = "") -> Image.Image:
    """Open an image upright and in RGB.

    Args:
        frame: An image file, or an image that is open already.
        origin: Where it came from, for the error message.

    Raises:
        ValueError: If the file is missing, or is not an image that Pillow can decode.
    """
    try:
        image = Image.open(frame) if isinstance(frame, Path) else frame
        upright: Image.Image = ImageOps.exif_transpose(image)
        return upright.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise _unreadable(frame, origin, error) from error


def image_size(frame: Frame, origin: str = "") -> tuple[int, int]:
    """Return width and height in pixels, reading no more of a file than its header.

    Args:
        frame: An image file, or an image that is open already.
        origin: Where it came from, for the error message.

    Raises:
        ValueError: If the file is missing, or is not an image.
    """
    if isinstance(frame, Image.Image):
        return frame.size
    try:
        with Image.open(frame) as image:
            return image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise _unreadable(frame, origin, error) from error


def _unreadable(frame: Frame, origin: str, error: Exception) -> ValueError:
    where = f"{origin}: " if origin else ""
    return ValueError(
        f"{where}cannot read the image {frame} ({type(error).__name__}: {error}). Replace the file or remove the row."
    )
