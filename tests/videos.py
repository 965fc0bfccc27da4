"""Little films."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from building import picture
from PIL import Image


def film(
    path: Path,
    frames: int | Sequence[Image.Image] = 24,
    rate: int = 8,
    codec: str = "mpeg4",
    times: Sequence[int] | None = None,
    rotation: int = 0,
    options: Mapping[str, str] | None = None,
    pixels: str = "yuv420p",
    **muxing: Any,
) -> Path:
    """Write a film of 64 × 32 pixels, every frame another picture; ``times`` are in milliseconds."""
    shown = [picture(64, 32, seed) for seed in range(frames)] if isinstance(frames, int) else frames
    with av.open(str(path), "w", **muxing) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.width, stream.height, stream.pix_fmt = *shown[0].size, pixels
        if rotation:
            stream.set_display_rotation(rotation)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(shown):
            frame = av.VideoFrame.from_image(image)
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def begin_later(path: Path, seconds: int) -> Path:
    """Have the edit list of an MP4 leave out its beginning."""
    content = bytearray(path.read_bytes())
    (scale,) = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)
    place = content.index(b"elst") + 12
    duration, start = struct.unpack_from(">Ii", content, place)
    struct.pack_into(">Ii", content, place, duration - 1000 * seconds, start + scale * seconds)
    path.write_bytes(content)
    return path
