"""Little films."""

from __future__ import annotations

from pathlib import Path

import av
from building import picture


def film(path: Path, frames: int = 24, rate: int = 8) -> Path:
    """Write a film of 64 × 32 pixels, every frame another picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for seed in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(64, 32, seed))))
        container.mux(stream.encode())
    return path
