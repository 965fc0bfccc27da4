"""Opening of images and videos: the formats that are read, the largest sizes, and the way to RGB."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import BaseVideoProcessor
from transformers.utils import requires_backends
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

from vlmembed.types import Frame

#: Raster images that say all there is to see. Among Pillow's others, some have another program interpret the file.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

#: Containers of FFmpeg that hold their frames themselves; a playlist would name other files, or addresses.
CONTAINERS = "asf,avi,flv,gif,matroska,mov,mp4,mpeg,mpegts,ogg,webm"

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

#: A draft keeps at least this many times the width and the height that it will be resized to.
DRAFT_MARGIN = 2


def limit(variable: str, default: int) -> int:
    """Return what an environment variable sets, a whole number above 0.

    Limits are environment variables because they hold in every process, and change no result but what is refused.
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

    Raises one of ``UNREADABLE`` if it is above a limit, broken, not there, or of none of ``FORMATS``, whatever its name
    ends in.
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


def load_image(
    frame: Frame, origin: str = "", resized: Callable[[int, int], tuple[int, int]] | None = None
) -> Image.Image:
    """Open an image upright and in RGB, transparency on white, as transformers' image processors show it to a model.

    Of an animation that is its first frame. Greys of 16 bits are scaled by the bits that the brightest one needs. With
    ``resized`` (from height and width to those that the processor will resize to), a JPEG far above that size is
    decoded at 1/2, 1/4 or 1/8. A ``ValueError`` names the origin and what cannot be read.
    """
    try:
        image = frame if isinstance(frame, Image.Image) else open_image(frame)
        if resized is not None and not isinstance(frame, Image.Image):
            _draft(image, resized)
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = _grey(image)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except UNREADABLE as error:
        raise _unreadable("image", frame, origin, error) from error


def load_images(
    frames: Mapping[bytes, tuple[Frame, str]], resized: Callable[[int, int], tuple[int, int]] | None = None
) -> dict[bytes, Image.Image]:
    """Open the images of a batch, each under its key, with where it came from; see `load_image`."""
    return {key: load_image(frame, origin, resized) for key, (frame, origin) in frames.items()}


def image_size(frame: Frame, origin: str = "") -> tuple[int, int]:
    """Return width and height in pixels, of no more than a file's header; a ``ValueError`` as of `load_image`."""
    if isinstance(frame, Image.Image):
        return frame.size
    try:
        with open_image(frame) as image:
            return image.size
    except UNREADABLE as error:
        raise _unreadable("image", frame, origin, error) from error


def load_video(
    video: Path | tuple[Frame, ...], processor: BaseVideoProcessor, origin: str = ""
) -> tuple[np.ndarray, VideoMetadata]:
    """Open the frames (F, height, width, 3) of a video that a checkpoint's video processor samples, and no others.

    Video files are decoded with PyAV. A ``ValueError`` says that one is missing, is a playlist or cannot be decoded,
    that frames differ in size, or that they have more pixels than the limit.
    """
    samples = getattr(processor, "do_sample_frames", False)
    sample = partial(_sample, processor.sample_frames if samples else default_sample_indices_fn)
    if isinstance(video, tuple):
        width, height = image_size(video[0], origin)
        # Frames alone have no rate; transformers' processors then assume this one, and warn.
        metadata = VideoMetadata(total_num_frames=len(video), fps=24.0, width=width, height=height)
        try:
            metadata.frames_indices = sample(metadata=metadata).tolist()
        except ValueError as error:
            raise _unreadable("video", video[0], origin, error) from error
        images = [load_image(video[index], origin) for index in metadata.frames_indices]
        sizes = sorted({image.size for image in images})
        if len(sizes) > 1:
            raise ValueError(
                f"{origin or 'An item'} has a video with frames of different sizes: {sizes[0]} and {sizes[-1]}. "
                "Resize them to one size, or give them as images."
            )
        return np.stack([np.asarray(image) for image in images]), metadata
    requires_backends(load_video, ["av"])
    import av

    try:
        path = str(video.absolute())  # FFmpeg takes ``concat:…`` for no file.
        with av.open(path, options={"format_whitelist": CONTAINERS}):
            return read_video_pyav(path, sample)  # type: ignore[arg-type]
    except UNREADABLE as error:
        raise _unreadable("video", video, origin, error) from error


def _sample(choose: Callable[..., np.ndarray], metadata: VideoMetadata, **options: Any) -> np.ndarray:
    """Choose frames, and refuse more of them than there is room for, before they are decoded."""
    frames = choose(metadata=metadata, **options)
    pixels = len(frames) * (metadata.width or 0) * (metadata.height or 0)
    if pixels > MAX_VIDEO_PIXELS:
        raise ValueError(
            f"{len(frames)} frames of {metadata.width:,} × {metadata.height:,} are {pixels:,} pixels, more than the "
            f"limit of {MAX_VIDEO_PIXELS:,}; VLMEMBED_MAX_VIDEO_PIXELS sets it"
        )
    return frames


def _draft(image: Image.Image, resized: Callable[[int, int], tuple[int, int]]) -> None:
    """Have libjpeg decode a far too large JPEG at a fraction of its size. Other formats are left as they are.

    Three times as fast. What the model sees differs by 0.1 to 0.5 grey levels of 255 on average (at most 15, in a page
    of text): less than if the file had been saved once more at quality 75.
    """
    width, height = image.size
    target = resized(height, width)
    for scale in (8, 4, 2):
        draft = height // scale, width // scale
        # Where a side does not divide, libjpeg rounds up, and the image would be stretched by part of a pixel.
        exact = (draft[0] * scale, draft[1] * scale) == (height, width)
        large = all(side >= DRAFT_MARGIN * goal for side, goal in zip(draft, target, strict=True))
        if exact and large and resized(*draft) == target:
            image.draft(None, draft[::-1])
            return


def _grey(image: Image.Image) -> Image.Image:
    """Bring greys of more than 8 bits to 8; Pillow would clip them, so that all that is not almost black is white."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        # A scanner of 10 or 12 bits leaves the upper ones unused: its white is not 65,535.
        return Image.fromarray((values >> max(0, int(values.max()).bit_length() - 8)).astype(np.uint8))
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 255:
        raise ValueError(
            f"values from {low} to {high} in mode {image.mode!r} do not say what is white; use 8 or 16 bits"
        )
    return image


def _unreadable(kind: str, frame: Frame, origin: str, error: Exception) -> ValueError:
    where, name = f"{origin}: " if origin else "", "given as bytes" if isinstance(frame, bytes) else frame
    return ValueError(
        f"{where}cannot read the {kind} {name} ({type(error).__name__}: {error}). Replace the file or remove the row."
    )
