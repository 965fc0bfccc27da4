"""Opening images and videos, with errors that say which row of which file was at fault."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import BaseVideoProcessor
from transformers.utils import requires_backends
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

from vlmembed import images
from vlmembed.images import UNREADABLE, open_image
from vlmembed.types import Frame

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
    if pixels > images.MAX_VIDEO_PIXELS:
        raise ValueError(
            f"{len(frames)} frames of {metadata.width:,} × {metadata.height:,} are {pixels:,} pixels, more than the "
            f"limit of {images.MAX_VIDEO_PIXELS:,}; VLMEMBED_MAX_VIDEO_PIXELS sets it"
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
