"""Opening an image file that may be anything: which kinds are read, and how much one may take."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import constants
from PIL import Image, ImageOps
from transformers import BaseVideoProcessor
from transformers.utils import requires_backends
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

from vlmembed.types import Frame

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


#: ``https://…``, ``file:/…``, ``data:…``, but not ``figure:1.png``.
URL = re.compile(r"[a-z][a-z0-9+.-]+:/|(file|data):", re.IGNORECASE)


@dataclass(frozen=True)
class Folder:
    """Where the images and videos of a data set are.

    A data set that somebody else wrote could name any file of this machine, to have it embedded, shown in a report or
    written into another data set. So a path that leads out of the folder is refused, whether it is absolute, goes up,
    or goes through a link; and nothing is ever downloaded.

    Args:
        path: Where relative paths start.
        others: Folders whose files may be named besides.
    """

    path: Path
    others: tuple[Path, ...] = ()

    def find(self, value: Any, kind: str, origin: str) -> Path:
        """Return the file that a cell names.

        Args:
            value: The path, relative to the folder or absolute.
            kind: What it should be, for error messages: ``image`` or ``video``.
            origin: Where the cell came from, for error messages.

        Raises:
            ValueError: If it is no path, leads out of the folder, or there is no such file.
        """
        if not isinstance(value, str | Path) or not str(value):
            raise ValueError(
                f"{origin}: expected the path of an {kind} file, got {type(value).__name__} {value!r:.100}."
            )
        if URL.match(str(value)):
            raise ValueError(
                f"{origin}: the {kind} {value!r:.100} is a URL, and nothing is downloaded. Put the file into "
                f"{self.path}, and give its path."
            )
        path = self.path / value
        try:
            str(value).encode()
            real, found = Path(os.path.realpath(path)), path.is_file()
        except (OSError, ValueError) as error:  # Too long; with a null byte; with what is no character.
            raise ValueError(f"{origin}: the {kind} file {value!r:.100} cannot be looked for: {error}.") from error
        if not any(real.is_relative_to(allowed) for allowed in self._allowed):
            raise ValueError(
                f"{origin}: the {kind} file {str(value)!r} leads out of the data set's folder {self.path}, to {real}. "
                "Move the file there, or if you trust this data set to name files of another folder, allow that one: "
                f"allow_outside: [{real.parent}] beside 'path' (vlmembed.data.Rows, vlmembed.data.EvaluationFolder)."
            )
        if not found:
            raise ValueError(f"{origin}: the {kind} file {path} does not exist.")
        return path

    @cached_property
    def _allowed(self) -> tuple[Path, ...]:
        return tuple(Path(os.path.realpath(folder)) for folder in (self.path, *self.others))


def folder_of(path: Path, allow_outside: Iterable[str] | None) -> Folder:
    """Return the folder of a data set.

    Args:
        path: Its file, its folder, or its Hub id. What is not one file may also name what ``datasets`` has downloaded
            or unpacked, because that is where its own files are.
        allow_outside: Folders whose files may be named besides.
    """
    others = tuple(map(Path, allow_outside or ()))
    if path.is_file():
        return Folder(path.parent, others)
    config = datasets.config
    downloads = constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH
    return Folder(path, (*others, *map(Path, downloads)))


#: Containers of FFmpeg that hold their pictures themselves; a playlist would name other files, or addresses.
CONTAINERS = "asf,avi,flv,gif,matroska,mov,mp4,mpeg,mpegts,ogg,webm"

#: A draft keeps at least this many times the width and the height that it will be resized to.
DRAFT_MARGIN = 2


def load_image(
    frame: Frame, origin: str = "", resized: Callable[[int, int], tuple[int, int]] | None = None
) -> Image.Image:
    """Open an image upright and in RGB. Of an animation that is its first picture; transparency is dropped.

    Args:
        frame: An image file, or an image that is open already.
        origin: Where it came from, for the error message.
        resized: From height and width to those that the processor will resize to, treating both alike. With it, a
            JPEG file far above that size is decoded at 1/2, 1/4 or 1/8; the processor resizes it to the same size.

    Raises:
        ValueError: If the file is missing, is above a limit of `vlmembed.images`, cannot be decoded, or says not what
            is white; or ``resized`` refuses its size.
    """
    try:
        image = open_image(frame) if isinstance(frame, Path) else frame
        if resized is not None and isinstance(frame, Path):
            _draft(image, resized)
        upright: Image.Image = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            # Pillow's own conversion clips: every pixel that is not almost black would turn white.
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        _check_range(upright)
        return upright.convert("RGB")
    except UNREADABLE as error:
        raise _unreadable("image", frame, origin, error) from error


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
        with open_image(frame) as image:
            return image.size
    except UNREADABLE as error:
        raise _unreadable("image", frame, origin, error) from error


def load_video(
    video: Path | tuple[Frame, ...], processor: BaseVideoProcessor, origin: str = ""
) -> tuple[np.ndarray, VideoMetadata]:
    """Open the frames of a video that a checkpoint's video processor samples, and no others.

    Args:
        video: A video file, decoded with PyAV, or all the frames.
        processor: Decides which frames.
        origin: Where it came from, for the error message.

    Returns:
        The frames (F, height, width, 3), and which ones of the video they are.

    Raises:
        ValueError: If a file is missing, is a playlist or cannot be decoded, frames differ in size, or they have more
            pixels than the limit of `vlmembed.images`.
        ImportError: If PyAV is not installed.
    """
    samples = getattr(processor, "do_sample_frames", False)
    sample = partial(_sample, processor.sample_frames if samples else default_sample_indices_fn)
    if isinstance(video, tuple):
        width, height = image_size(video[0], origin)
        metadata = VideoMetadata(total_num_frames=len(video), width=width, height=height)
        try:
            metadata.frames_indices = sample(metadata=metadata).tolist()
        except ValueError as error:
            raise _unreadable("video", video[0], origin, error) from error
        return _stack([load_image(video[index], origin) for index in metadata.frames_indices], origin), metadata
    try:
        return read_video_pyav(_container(video), sample)  # type: ignore[arg-type]
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

    A 12-megapixel file for 600 × 600 is ready in 50 ms instead of 160. What the model sees differs by 0.1 to 0.3 grey
    levels of 255 on average in a photograph (at most 4), and by 0.5 in a page of text (at most 15): on average, less
    than if the file had been saved once more at quality 75.
    """
    width, height = image.size
    target = resized(height, width)
    for scale in (8, 4, 2):
        draft = height // scale, width // scale
        # Where a side does not divide, libjpeg rounds up, and the picture would be stretched by part of a pixel.
        exact = (draft[0] * scale, draft[1] * scale) == (height, width)
        large = all(side >= DRAFT_MARGIN * goal for side, goal in zip(draft, target, strict=True))
        if exact and large and resized(*draft) == target:
            image.draft(None, draft[::-1])
            return


def _check_range(image: Image.Image) -> None:
    """Refuse integers and fractions that are no grey levels: Pillow would turn everything above 255 white."""
    if image.mode in ("I", "F"):
        low, high = np.asarray(image).min(), np.asarray(image).max()
        if not 0 <= low <= high <= 255:
            raise ValueError(
                f"values from {low} to {high} in mode {image.mode!r} do not say what is white; use 8 or 16 bits"
            )


def _container(video: Path) -> str:
    """Return the path of a video that is in one file, for FFmpeg: absolute, as it takes ``concat:…`` for no file."""
    requires_backends(load_video, ["av"])
    import av

    path = str(video.absolute())
    with av.open(path, options={"format_whitelist": CONTAINERS}):
        return path


def _stack(frames: list[Image.Image], origin: str) -> np.ndarray:
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise ValueError(
            f"{origin or 'An item'} has a video with frames of different sizes: {sizes[0]} and {sizes[-1]}. "
            "Resize them to one size, or give them as images."
        )
    return np.stack([np.asarray(frame) for frame in frames])


def _unreadable(kind: str, file: Frame, origin: str, error: Exception) -> ValueError:
    where = f"{origin}: " if origin else ""
    return ValueError(
        f"{where}cannot read the {kind} {file} ({type(error).__name__}: {error}). Replace the file or remove the row."
    )
