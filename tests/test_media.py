"""Images and videos are opened as a reader would see them, and what cannot be opened is named."""

from __future__ import annotations

import struct
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import other_models
import pytest
import torch
from building import damaged as damage
from building import picture
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoProcessor
from transformers.image_transforms import convert_to_rgb
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.utils.import_utils import is_torchcodec_usable
from transformers.video_utils import VideoMetadata, read_video_torchcodec
from transformers.video_utils import load_video as decode_video
from videos import begin_later, film

from vlmembed import media as images
from vlmembed.backbones import Qwen3VL, VisionLanguageModel
from vlmembed.backbones.preprocessing import ChatPreprocessor
from vlmembed.data.cells import Folder, to_items
from vlmembed.media import load_image, load_video
from vlmembed.types import Frame, Item, Part

ORIGIN = "train.jsonl, row 17, column 'positive'"


def preprocessor(checkpoint: Path, instruction: str | None = "Represent.") -> ChatPreprocessor:
    return Qwen3VL(str(checkpoint), document_instruction=instruction).make_preprocessor()


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
    photograph(tmp_path / "photograph.png", upright, orientation)
    assert load_image(tmp_path / "photograph.png").tobytes() == upright.tobytes()
    with Image.open(tmp_path / "photograph.png") as opened:
        assert load_image(opened).tobytes() == upright.tobytes()


def photograph(path: Path, upright: Image.Image, orientation: int) -> None:
    """Write the picture as a camera held that way stores it."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[274] = orientation
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    stored.save(path, exif=exif, quality=100)


def see_through(path: Path, kind: str) -> None:
    """Write an image with transparency of some kind."""
    image, palette = picture(16, 8), picture(16, 8).quantize(16)
    if kind in ("colour", "palette"):
        palette.save(path, transparency=3 if kind == "colour" else bytes(range(0, 256, 16)))
    else:
        image = image.convert("LA" if kind == "grey" else "RGBA")
        image.putalpha(Image.fromarray(np.linspace(0, 255, 128, dtype=np.uint8).reshape(8, 16)))
        image.save(path, lossless=True)


@pytest.mark.parametrize(
    ("kind", "ending"),
    [("alpha", "png"), ("alpha", "webp"), ("grey", "png"), ("colour", "png"), ("colour", "gif"), ("palette", "png")],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transparency_is_on_white_as_transformers_shows_it(tmp_path: Path, kind: str, ending: str) -> None:
    path = tmp_path / f"page.{ending}"
    see_through(path, kind)
    with Image.open(path) as opened:
        expected = convert_to_rgb(opened, return_numpy=True)
        assert np.array_equal(np.asarray(load_image(opened)), expected)
        assert not np.array_equal(np.asarray(opened.convert("RGB")), expected)
    for frame in (path, path.read_bytes()):
        assert np.array_equal(np.asarray(load_image(frame)), expected)


@pytest.mark.parametrize(
    ("low", "high", "scale"), [(0, 65_535, 256), (0, 32_768, 256), (291, 694, 4), (0, 4_095, 16), (3, 255, 1)]
)
@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bit_images_are_scaled_by_the_bits_that_they_use(
    tmp_path: Path, low: int, high: int, scale: int, ending: str
) -> None:
    greys = np.linspace(low, high, 512).round().astype(np.uint16).reshape(16, 32)
    Image.fromarray(greys).save(tmp_path / f"scan.{ending}")
    loaded = np.asarray(load_image(tmp_path / f"scan.{ending}"))
    assert loaded.shape == (16, 32, 3)
    assert all(np.array_equal(loaded[..., channel], greys // scale) for channel in range(3))


# Drafts


def to(pixels: int) -> partial[tuple[int, int]]:
    """What Qwen3-VL's processor resizes to."""
    return partial(smart_resize, factor=32, min_pixels=32 * 32, max_pixels=pixels)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((2048, 2048), (256, 256)),  # 2 × 128 is just enough.
        ((1024, 1024), (256, 256)),
        ((1016, 1016), (508, 508)),  # 254 is just too few.
        ((1026, 1026), (513, 513)),  # Not in four.
        ((1025, 1024), (1025, 1024)),
        ((512, 512), (256, 256)),
        ((508, 508), (508, 508)),
        ((256, 256), (256, 256)),
        ((64, 64), (64, 64)),
    ],
)
def test_only_a_far_too_large_jpeg_is_drafted(tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 200, 30))
    for name in ("page.jpg", "page.png"):
        image.save(tmp_path / name)
    assert load_image(tmp_path / "page.jpg", resized=to(128 * 128)).size == expected
    assert load_image(tmp_path / "page.jpg").size == size
    assert load_image(tmp_path / "page.png", resized=to(128 * 128)).size == size
    assert load_image((tmp_path / "page.jpg").read_bytes(), resized=to(128 * 128)).size == expected
    with Image.open(tmp_path / "page.jpg") as opened:
        assert load_image(opened, resized=to(128 * 128)).size == size


def test_a_draft_is_resized_to_the_size_of_the_whole(tmp_path: Path) -> None:
    """The grid of patches is the same, from at least twice the pixels along each side, at any size."""
    random = np.random.default_rng(0)
    scales = []
    for _ in range(300):
        multiple, odd = random.choice([1, 2, 4, 8]), random.integers(0, 2)
        width, height = (int(side * multiple + odd) for side in random.integers(9, 160, 2))
        pixels = int(random.integers(32 * 32, 3 * 32 * 32))
        Image.new("L", (width, height)).save(tmp_path / "page.jpg")
        loaded = load_image(tmp_path / "page.jpg", resized=to(pixels))
        scales.append(width // loaded.width)
        target = to(pixels)(height, width)
        assert to(pixels)(loaded.height, loaded.width) == target
        assert (loaded.width * scales[-1], loaded.height * scales[-1]) == (width, height)
        assert scales[-1] == 1 or (loaded.height >= 2 * target[0] and loaded.width >= 2 * target[1])
    assert all(scales.count(scale) > 10 for scale in (1, 2, 4, 8))


def test_a_draft_that_would_be_resized_otherwise_is_not_made(tmp_path: Path) -> None:
    Image.new("L", (1024, 1024)).save(tmp_path / "page.jpg")
    by_size = {(1024, 1024): (96, 64), (512, 512): (96, 64), (256, 256): (64, 64)}
    assert load_image(tmp_path / "page.jpg", resized=lambda *size: by_size[size]).size == (512, 512)


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_a_draft_is_nearer_than_another_save(tmp_path: Path, name: str) -> None:
    """Saving a file once more, at the usual quality of 75, is known to do no harm: a draft changes less."""
    photo = Image.fromarray(load_sample_image(name)).resize((3000, 2000), Image.Resampling.LANCZOS)
    photo.save(tmp_path / "photo.jpg", quality=90)
    whole = load_image(tmp_path / "photo.jpg")
    whole.save(tmp_path / "again.jpg", quality=75)
    draft = load_image(tmp_path / "photo.jpg", resized=to(600 * 600))
    assert draft.size == (1500, 1000)
    distance = partial(resized_distance, whole, to(600 * 600)(2000, 3000))
    (mean, largest), (mean_again, largest_again) = distance(draft), distance(load_image(tmp_path / "again.jpg"))
    assert mean < mean_again
    assert largest < largest_again


def resized_distance(one: Image.Image, size: tuple[int, int], other: Image.Image) -> tuple[float, float]:
    """Mean and largest difference of what the model would see, in grey levels."""
    seen = [np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC), dtype=float) for image in (one, other)]
    difference = np.abs(seen[0] - seen[1])
    return difference.mean(), difference.max()


def slopes(width: int, height: int) -> Image.Image:
    """A picture so smooth that a JPEG of it, whole or drafted, is off by its rounding alone."""
    down, right = np.mgrid[:height, :width] / max(width, height)
    return Image.fromarray((255 * np.stack([right, down, 1 - right * down], axis=-1)).round().astype(np.uint8))


# Grey levels: JPEG's rounding, of three colour planes that are mixed.
ROUNDING = 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_drafted_photograph_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    upright = slopes(1024, 512)
    photograph(tmp_path / "photograph.jpg", upright, orientation)
    draft = load_image(tmp_path / "photograph.jpg", resized=to(128 * 128))
    assert draft.size == (512, 256)
    assert resized_distance(upright, (256, 512), draft)[1] <= ROUNDING


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_drafts_keep_their_colours(tmp_path: Path, mode: str) -> None:
    stored = slopes(1024, 512).convert(mode)
    stored.save(tmp_path / "scan.jpg", quality=100)
    draft = load_image(tmp_path / "scan.jpg", resized=to(128 * 128))
    assert (draft.mode, draft.size) == ("RGB", (512, 256))
    assert resized_distance(stored.convert("RGB"), (256, 512), draft)[1] <= ROUNDING


def test_a_file_its_content_and_the_open_image_are_one(checkpoint: Path, tmp_path: Path) -> None:
    picture(64, 96).save(tmp_path / "page.png")
    ours = preprocessor(checkpoint)
    frames = (picture(64, 96), tmp_path / "page.png", (tmp_path / "page.png").read_bytes())
    one, *others = (ours([item_of(frame)]) for frame in frames)
    assert all(torch.equal(other[name], value) for name, value in one.items() for other in others)


def item_of(frame: Frame) -> Item:
    return Item("document", (Part("image", frame),))


def test_a_large_photograph_is_the_same_from_a_file_and_from_a_table(checkpoint: Path, tmp_path: Path) -> None:
    """Both are drafted."""
    slopes(4096, 4096).save(tmp_path / "page.jpg")
    ours = Qwen3VL(str(checkpoint), max_pixels=256 * 256).make_preprocessor()
    frames = (tmp_path / "page.jpg", (tmp_path / "page.jpg").read_bytes())
    one, other = (ours.prepare([item_of(frame)], draft=True).images(None)[0]["pixel_values"] for frame in frames)
    assert torch.equal(one, other)
    assert not torch.equal(one, ours.prepare([item_of(frames[0])]).images(None)[0]["pixel_values"])


def test_a_video_file_is_sampled_as_the_processor_samples_it(checkpoint: Path, tmp_path: Path) -> None:
    """The processor, given all the frames and their rate, takes the same ones: two a second, with their times."""
    path = film(tmp_path / "film.mp4")
    frames, metadata = decode_video(str(path))
    assert (len(frames), metadata.fps) == (24, 8.0)
    expected = by_the_processor(checkpoint, frames, videos_kwargs={"video_metadata": [metadata]})
    assert expected["video_grid_thw"][0, 0] == 3
    assert_same_inputs(preprocessor(checkpoint, None)([Item("document", (Part("video", path),))]), expected)


def by_the_processor(checkpoint: Path, frames: Any, **options: Any) -> Any:
    return AutoProcessor.from_pretrained(checkpoint).apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "video": frames}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs=options,
    )


def assert_same_inputs(actual: Any, expected: Any) -> None:
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "webm"])
def test_a_video_in_a_table_is_that_of_the_file(checkpoint: Path, tmp_path: Path, ending: str) -> None:
    """With a key and without, by its content or by its path, as `Video` columns and videofolders have it."""
    codec = {"codec": "libvpx-vp9"} if ending == "webm" else {}
    path = film(tmp_path / f"film.{ending}", **codec)
    stored = {"bytes": path.read_bytes(), "path": None}
    named = {"bytes": None, "path": str(path)}
    cells: list[Any] = [{"video": path.name}, {"video": stored}, stored, {"video": named}, named]
    items = to_items([(cell, "document", "row 1") for cell in cells], Folder(tmp_path))
    expected, *others = [preprocessor(checkpoint, None)([item]) for item in items]
    for other in others:
        assert_same_inputs(other, expected)
    with pytest.raises(ValueError, match="row 1: cannot read the video given as bytes"):
        preprocessor(checkpoint, None)(
            to_items([({"video": {"bytes": b"no film"}}, "document", "row 1")], Folder(tmp_path))
        )


def test_frames_are_sampled_as_the_processor_samples_them(checkpoint: Path, tmp_path: Path) -> None:
    frames = [picture(64, 32, seed) for seed in range(9)]
    expected = by_the_processor(checkpoint, frames)
    paths = [tmp_path / f"{number}.png" for number in range(9)]
    for frame, path in zip(frames, paths, strict=True):
        frame.save(path)
    ours = preprocessor(checkpoint, None)
    for values in (frames, paths):
        assert_same_inputs(ours([Item("document", (Part("video", tuple(values)),))]), expected)


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
        backbone.make_preprocessor()([Item("document", (Part("video", (picture(8, 8),) * 4),), ORIGIN)])


def test_a_damaged_video_is_read_or_refused_with_its_row(checkpoint: Path, tmp_path: Path) -> None:
    preprocessor = Qwen3VL(str(checkpoint)).make_preprocessor()
    random = np.random.default_rng(0)
    good = film(tmp_path / "good.mp4", frames=8).read_bytes()
    said, path = [], tmp_path / "damaged.mp4"
    for number in range(120):
        content = damage(random, good)
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


# Containers

#: Milliseconds, of a camera that slows down in the dark.
UNEVEN = np.cumsum([0, *np.random.default_rng(0).choice([20, 40, 125, 333], 23)]).tolist()
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
H264 = {"codec": "libx264"}  # With frames that are stored in another order than they are shown.

FILMS = {
    "film.mp4": H264,
    "film.mov": H264,
    "film.mkv": H264,
    "film.webm": {"codec": "libvpx"},
    "film.avi": {},
    "film.flv": {"codec": "flv"},
    "fragments.mp4": H264 | {"container_options": FRAGMENTS},
    "live.webm": {"codec": "libvpx", "container_options": {"live": "1"}},  # Neither a length nor a count of frames.
    "uneven.mp4": H264 | {"times": UNEVEN},
    "uneven.mkv": H264 | {"times": UNEVEN},
    "uneven.webm": {"codec": "libvpx", "times": UNEVEN},
    "late.mp4": H264 | {"times": [5000 + 125 * number for number in range(24)]},
    "ten_bits.mkv": H264 | {"pixels": "yuv420p10le"},
    "turned.mp4": H264 | {"rotation": 90},
    "turned.mkv": H264 | {"rotation": 180},
}


class EveryFrame:
    """A processor that takes all frames."""

    do_sample_frames = True

    def sample_frames(self, metadata: VideoMetadata) -> np.ndarray:
        return np.arange(metadata.total_num_frames)


def read(path: Path) -> tuple[np.ndarray, VideoMetadata]:
    return load_video(path, EveryFrame(), ORIGIN)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FILMS)
def test_every_frame_of_a_film_is_read_upright_with_its_rate(tmp_path: Path, name: str) -> None:
    """Frame by frame darker from left to right, as they were written."""
    greys = [10 * number for number in range(24)]
    shown = [Image.fromarray(np.uint8([[grey] * 32 + [255] * 32] * 32)).convert("RGB") for grey in greys]
    frames, metadata = read(film(tmp_path / name, shown, **FILMS[name]))
    turned = FILMS[name].get("rotation", 0)
    frames = np.rot90(frames, -turned // 90, axes=(1, 2))
    assert np.abs(frames[:, 4:-4, 4:28].mean(axis=(1, 2, 3)) - greys).max() < 6  # Of 10 from frame to frame.
    assert frames[:, 4:-4, 36:-4].min() > 240
    assert (metadata.width, metadata.height) == ((32, 64) if turned % 180 else (64, 32))
    assert metadata.total_num_frames == len(metadata.frames_indices) == 24
    if "uneven" in name or "flv" in name:  # How long the last one is shown is for the container to say, or not.
        last = UNEVEN[-1] if "uneven" in name else 23 * 125
        assert metadata.fps == pytest.approx(24 / (last / 1000), rel=0.06)
    else:
        assert metadata.fps == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.webm"])
def test_a_film_of_one_frame_is_read(tmp_path: Path, name: str, frames: int) -> None:
    assert len(read(film(tmp_path / name, frames, **FILMS[name]))[0]) == frames


def test_what_an_edit_list_leaves_out_is_not_shown(tmp_path: Path) -> None:
    whole, _ = read(film(tmp_path / "film.mp4", **H264))
    rest, metadata = read(begin_later(tmp_path / "film.mp4", 1))
    assert (len(rest), metadata.fps) == (16, 8)
    assert np.array_equal(rest, whole[8:])


def test_a_cut_film_is_refused(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(
        ValueError, match=rf"{ORIGIN}: cannot read the video {path} .*it is cut or damaged: of 24 frames 1"
    ):
        read(path)


@pytest.mark.skipif(not is_torchcodec_usable("video"), reason="needs torchcodec and the libraries of FFmpeg")
@pytest.mark.parametrize("name", FILMS)
def test_frames_are_those_of_torchcodec_bit_by_bit(tmp_path: Path, name: str) -> None:
    """It is what transformers' video processors, and so Sentence Transformers, open files with."""
    path = film(tmp_path / name, **FILMS[name])
    expected, served = read_video_torchcodec(str(path), EveryFrame().sample_frames)
    frames, metadata = read(path)
    assert np.array_equal(frames, expected.permute(0, 2, 3, 1))
    names = ("total_num_frames", "fps", "duration", "width", "height")
    assert [metadata[name] for name in names] == pytest.approx([served[name] for name in names])


# Kinds


KINDS = {
    b"%PDF-1.7": "a PDF document. Give it under the key 'pdf'",
    b"8BPS\0\1": "a Photoshop file",
    b"gimp xcf v011": "a GIMP file",
    b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>': "a drawing",
    b"\xef\xbb\xbf\n<SVG>": "a drawing",
    b"\n<!DOCTYPE html><title>404</title>": "a web page",
    b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml": "an Office document",
    b"PK\x03\x04" + bytes(26) + b"page.png": "an archive. Unpack it",
    b"ID3\x04": "sound",
    b"\xff\xfb\x90": "sound",
    b"II*\0\x10\0\0\0CR\2\0": "a raw photograph",
    b"\0\0\1\0\1\0": "an image of a kind that is not read",
    b"\xff\x0a": "an image of a kind that is not read",
    b"version https://git-lfs.github.com/spec/v1": "a pointer of Git LFS, not the file itself. Fetch it",
}


@pytest.mark.parametrize("content", KINDS, ids=lambda content: ascii(content[:12]))
def test_what_is_no_image_is_called_what_it_is_by_its_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "page.png").write_bytes(content + bytes(600))
    for read_it in (lambda: load_image(tmp_path / "page.png", ORIGIN), lambda: read(tmp_path / "page.png")):
        with pytest.raises(
            ValueError, match=rf"{ORIGIN}: cannot read .*page\.png: it is {KINDS[content]}.*remove the row"
        ):
            read_it()


def test_a_video_is_no_image_and_an_image_no_video(tmp_path: Path) -> None:
    for name in ("film.mp4", "film.mkv", "film.avi"):
        film(tmp_path / name, 2)
        with pytest.raises(ValueError, match=f"{name}: it is a video. Give it under the key 'video'"):
            load_image(tmp_path / name)
    for name in ("page.png", "page.jpg", "page.webp", "page.tiff", "page.bmp", "page.avif", "page.jp2", "page.ppm"):
        picture(8, 8).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: it is an image. Give it under the key 'image'"):
            read(tmp_path / name)


def test_a_raw_photograph_is_not_read_as_its_preview(tmp_path: Path) -> None:
    picture(16, 8).save(tmp_path / "photo.dng", "TIFF", tiffinfo={254: 1})
    with pytest.raises(ValueError, match=r"it is a raw photograph\. Develop it to JPEG"):
        load_image(tmp_path / "photo.dng")


def test_a_heic_photograph_is_read_or_says_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    slopes(128, 64).save(tmp_path / "photo.heic", quality=100)
    assert resized_distance(slopes(128, 64), (64, 128), load_image(tmp_path / "photo.heic"))[1] <= 2 * ROUNDING
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(
        ValueError, match=r"it is a HEIC photograph. Install .*vlmembed\[heic\].*, or convert it to JPEG"
    ):
        load_image(tmp_path / "photo.heic")


# What Sentence Transformers is given: a path, or an opened image.


def deep(colours: int, values: np.ndarray, transparent: int | None = None) -> bytes:
    """Return a PNG of one row with 16 bits a channel."""
    header = struct.pack(">IIBBBBB", len(values), 1, 16, {1: 0, 2: 4, 3: 2, 4: 6}[colours], 0, 0, 0)
    chunks = {b"IHDR": header}
    if transparent is not None:
        chunks[b"tRNS"] = struct.pack(">H", transparent)
    chunks |= {b"IDAT": zlib.compress(b"\0" + values.astype(">u2").tobytes()), b"IEND": b""}
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_transparency_of_16_bits_is_on_white() -> None:
    assert np.asarray(load_image(deep(2, np.zeros((1, 2), int)))).tolist() == [[[255] * 3]]
    assert np.asarray(load_image(deep(4, np.array([[0, 0, 0, 32768]])))).tolist() == [[[127] * 3]]
    assert np.asarray(load_image(deep(1, np.array([0, 256, 65535]), transparent=0)))[0, :, 0].tolist() == [255, 1, 255]


def test_16_bits_a_channel_of_which_the_upper_are_unused_are_refused() -> None:
    assert np.asarray(load_image(deep(3, np.array([[65535, 4096, 0]])))).tolist() == [[[255, 16, 0]]]
    with pytest.raises(ValueError, match="of its 16 bits a channel the upper ones, which are read, are black"):
        load_image(deep(3, np.array([[694, 291, 4095]])))


@pytest.mark.parametrize("ending", ["png", "webp", "avif", "tiff", "jpg"])
def test_orientation_holds_in_every_format_that_has_it(tmp_path: Path, ending: str) -> None:
    photograph(tmp_path / f"photograph.{ending}", slopes(128, 64), 6)
    for frame in (tmp_path / f"photograph.{ending}", (tmp_path / f"photograph.{ending}").read_bytes()):
        assert resized_distance(slopes(128, 64), (64, 128), load_image(frame))[1] <= 2 * ROUNDING
