"""Any video file is either read or refused with its row, and none takes memory without bound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from building import picture
from videos import film

from vlmembed import media as images
from vlmembed.backbones import Qwen3VL
from vlmembed.types import Item, Part

ORIGIN = "train.jsonl, row 17, column 'positive'"


def test_a_damaged_video_is_read_or_refused_with_its_row(checkpoint: Path, tmp_path: Path) -> None:
    preprocessor = Qwen3VL(str(checkpoint)).make_preprocessor()
    random = np.random.default_rng(0)
    good = film(tmp_path / "good.mp4", frames=8).read_bytes()
    said, path = [], tmp_path / "damaged.mp4"
    for number in range(120):
        content = bytearray(good)
        for place in random.integers(0, len(good), random.integers(1, 6)).tolist():
            length = int(random.choice([0, 1, 4]))
            content[place : place + length] = random.bytes(int(random.choice([0, 1, 4])))
        path.write_bytes(content[: random.integers(len(good))] if number % 4 == 0 else content)
        try:
            assert preprocessor([Item("document", (Part("video", path),), ORIGIN)])["input_ids"].shape[0] == 1
        except ValueError as error:
            said.append(str(error))
    assert 10 < len(said) < 120
    assert all(each.startswith(f"{ORIGIN}: cannot read the video {path}") for each in said)


@pytest.mark.parametrize("kind", ["file", "frames"])
def test_a_video_of_too_many_pixels_is_refused_before_it_is_decoded(
    checkpoint: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessor = Qwen3VL(str(checkpoint)).make_preprocessor()
    value = (
        film(tmp_path / "film.mp4", rate=2) if kind == "file" else tuple(picture(64, 32, seed) for seed in range(24))
    )
    item = Item("document", (Part("video", value),), ORIGIN)
    frames = preprocessor([item])["video_grid_thw"][0, 0].item() * 2  # Two frames make a patch.
    monkeypatch.setattr(images, "MAX_VIDEO_PIXELS", frames * 64 * 32)
    preprocessor([item])
    monkeypatch.setattr(images, "MAX_VIDEO_PIXELS", frames * 64 * 32 - 1)
    with pytest.raises(ValueError, match=r"frames of 64 × 32 are .* pixels, .*VLMEMBED_MAX_VIDEO_PIXELS") as error:
        preprocessor([item])
    assert str(error.value).startswith(ORIGIN)
