"""Images and videos are opened as a reader would see them, and what cannot be opened is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import other_models
import pytest
import torch
from building import item, picture
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import load_video as decode_video
from videos import film

from vlmembed.backbones import Qwen3VL, VisionLanguageModel
from vlmembed.backbones.media import load_image
from vlmembed.backbones.preprocessing import ChatPreprocessor
from vlmembed.types import Item, Part

ORIGIN = "train.jsonl, row 17, column 'positive'"


def preprocessor(checkpoint: Path, instruction: str | None = "Represent.") -> ChatPreprocessor:
    return Qwen3VL(str(checkpoint), document_instruction=instruction).preprocessor


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "folder"])
def test_an_unreadable_image_is_named_with_its_row(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    path = damaged(tmp_path / "page.png", damage)
    with pytest.raises(
        ValueError, match=rf"{ORIGIN}: cannot read the image {path} .*Replace the file or remove the row"
    ):
        preprocessor(checkpoint)([Item("document", (Part("text", "a"), Part("image", path)), ORIGIN)])
    with pytest.raises(ValueError, match=rf"{ORIGIN}: cannot read the image {path}"):
        preprocessor(checkpoint)([Item("document", (Part("video", (picture(8, 8), path)),), ORIGIN)])


def damaged(path: Path, damage: str) -> Path:
    picture(64, 64).save(path)
    content = {"empty": b"", "text": b"not an image", "cut": path.read_bytes()[:2000]}.get(damage)
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    """A camera stores the picture as its sensor saw it, and how it was held."""
    upright = picture(48, 32)
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "photograph.png", exif=exif)
    assert load_image(tmp_path / "photograph.png").tobytes() == upright.tobytes()
    with Image.open(tmp_path / "photograph.png") as opened:
        assert load_image(opened).tobytes() == upright.tobytes()


def test_palette_images_keep_their_colours(tmp_path: Path) -> None:
    palette = picture(16, 8).quantize(16)
    palette.save(tmp_path / "palette.png")
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    assert np.array_equal(np.asarray(load_image(tmp_path / "palette.png")), colours[np.asarray(palette)])


def test_cmyk_images_keep_their_colours(tmp_path: Path) -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red.save(tmp_path / "print.tiff")
    assert load_image(tmp_path / "print.tiff").getpixel((3, 3)) == (255, 0, 0)


def test_alpha_is_dropped_as_transformers_drops_it(tmp_path: Path) -> None:
    opaque = picture(16, 8)
    seen_through = opaque.copy()
    seen_through.putalpha(100)
    seen_through.save(tmp_path / "alpha.png")
    assert load_image(tmp_path / "alpha.png").tobytes() == opaque.tobytes()


def test_16_bit_images_keep_their_greys(tmp_path: Path) -> None:
    greys = np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)
    Image.fromarray(greys).save(tmp_path / "scan.png")
    loaded = np.asarray(load_image(tmp_path / "scan.png"))
    assert loaded.shape == (16, 32, 3)
    assert all(np.array_equal(loaded[..., channel], greys // 256) for channel in range(3))


def test_a_file_and_the_open_image_are_one(checkpoint: Path, tmp_path: Path) -> None:
    picture(64, 96).save(tmp_path / "page.png")
    ours = preprocessor(checkpoint)
    one, other = (ours([item(value)]) for value in (picture(64, 96), tmp_path / "page.png"))
    assert all(torch.equal(other[name], value) for name, value in one.items())


def test_a_video_file_is_sampled_as_the_processor_samples_it(checkpoint: Path, tmp_path: Path) -> None:
    """The processor, given all the frames and their rate, takes the same ones: two a second, with their times."""
    path = film(tmp_path / "film.mp4")
    frames, metadata = decode_video(str(path))
    assert (len(frames), metadata.fps) == (24, 8.0)
    expected = AutoProcessor.from_pretrained(checkpoint).apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "video": frames}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"videos_kwargs": {"video_metadata": [metadata]}},
    )
    actual = preprocessor(checkpoint, None)([Item("document", (Part("video", path),))])
    assert expected["video_grid_thw"][0, 0] == 3
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_frames_are_sampled_as_the_processor_samples_them(checkpoint: Path, tmp_path: Path) -> None:
    frames = [picture(64, 32, seed) for seed in range(9)]
    expected = AutoProcessor.from_pretrained(checkpoint).apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "video": frames}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    paths = [tmp_path / f"{number}.png" for number in range(9)]
    for frame, path in zip(frames, paths, strict=True):
        frame.save(path)
    ours = preprocessor(checkpoint, None)
    for values in (frames, paths):
        actual = ours([Item("document", (Part("video", tuple(values)),))])
        assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "folder"])
def test_an_unreadable_video_is_named_with_its_row(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    path = damaged(tmp_path / "film.png", damage)
    with pytest.raises(ValueError, match=f"{ORIGIN}: cannot read the video {path}"):
        preprocessor(checkpoint)([Item("document", (Part("video", path),), ORIGIN)])


def test_frames_of_different_sizes_are_refused(checkpoint: Path) -> None:
    frames = tuple(picture(32 * number, 32) for number in range(1, 5))
    with pytest.raises(ValueError, match=rf"{ORIGIN} has a video with frames of different sizes: \(32, 32\) and \(128"):
        preprocessor(checkpoint)([Item("document", (Part("video", frames),), ORIGIN)])


def test_a_video_for_a_model_without_video_is_refused(tmp_path: Path) -> None:
    backbone = VisionLanguageModel(other_models.idefics3(tmp_path / "tiny"))
    with pytest.raises(ValueError, match=rf"{ORIGIN} has a video, and this checkpoint's processor takes none"):
        backbone.preprocessor([Item("document", (Part("video", (picture(8, 8),) * 4),), ORIGIN)])
