"""Opening images and videos, with errors that say which row of which file was at fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

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
        if upright.mode.startswith("I;16"):
            # Pillow's own conversion clips: every pixel that is not almost black would turn white.
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
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
        with Image.open(frame) as image:
            return image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
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
        ValueError: If a file is missing or cannot be decoded, or frames differ in size.
        ImportError: If PyAV is not installed.
    """
    samples = getattr(processor, "do_sample_frames", False)
    sample = processor.sample_frames if samples else default_sample_indices_fn
    if isinstance(video, tuple):
        metadata = VideoMetadata(total_num_frames=len(video))
        metadata.frames_indices = sample(metadata=metadata).tolist()
        return _stack([load_image(video[index], origin) for index in metadata.frames_indices], origin), metadata
    try:
        return read_video_pyav(str(video), sample)  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise _unreadable("video", video, origin, error) from error


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
