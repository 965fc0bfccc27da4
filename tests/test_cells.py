from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmembed.data.cells import Folder, to_items
from vlmembed.media import load_image
from vlmembed.types import Item, Part, Role

ORIGIN = "train.jsonl, row 17, column 'positive'"


def to_item(cell: Any, role: Role, folder: Folder, origin: str) -> Item:
    return to_items([(cell, role, origin)], folder)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    Image.new("RGB", (3, 5), "blue").save(tmp_path / "b.png")
    (tmp_path / "film.mp4").write_bytes(b"film")
    (tmp_path / "other.mp4").write_bytes(b"other")
    return tmp_path


def parts(cell: Any, folder: Path) -> tuple[Part, ...]:
    return to_item(cell, "document", Folder(folder), ORIGIN).parts


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_string_is_text_even_if_a_file_has_its_name(folder: Path) -> None:
    assert parts("a.png", folder) == (Part("text", "a.png"),)
    assert parts(str(folder / "a.png"), folder) == (Part("text", str(folder / "a.png")),)


def test_the_item_knows_its_role_and_origin(folder: Path) -> None:
    item = to_item("cat", "query", Folder(folder), ORIGIN)
    assert (item.role, item.origin) == ("query", ORIGIN)


def test_an_open_image(folder: Path) -> None:
    image = Image.new("RGB", (2, 3))
    assert parts(image, folder) == (Part("image", image),)
    assert parts({"image": image}, folder) == (Part("image", image),)


def test_paths_start_at_the_folder_unless_absolute(folder: Path) -> None:
    expected = (Part("image", folder / "a.png"),)
    assert parts({"image": "a.png"}, folder) == expected
    assert parts({"image": str(folder / "a.png")}, folder) == expected
    assert parts({"image": Path("a.png")}, folder) == expected


def test_an_encoded_image_alone_and_in_a_mapping(folder: Path) -> None:
    image = Image.new("RGB", (2, 3), "green")
    value = {"bytes": encoded(image), "path": "gone.png"}
    for cell in (value, {"image": value}):
        (part,) = parts(cell, folder)
        assert load_image(part.value).tobytes() == image.tobytes()
    assert parts({"image": {"bytes": None, "path": "a.png"}}, folder) == (Part("image", folder / "a.png"),)


def test_the_order_of_keys_is_the_order_of_parts(folder: Path) -> None:
    text, image = Part("text", "cat"), Part("image", folder / "a.png")
    assert parts({"text": "cat", "image": "a.png"}, folder) == (text, image)
    assert parts({"image": "a.png", "text": "cat"}, folder) == (image, text)


def test_lists_of_values(folder: Path) -> None:
    assert parts({"image": ["b.png", "a.png"], "text": ["x", "y"]}, folder) == (
        Part("image", folder / "b.png"),
        Part("image", folder / "a.png"),
        Part("text", "x"),
        Part("text", "y"),
    )


def test_a_video_is_a_file_or_its_frames(folder: Path) -> None:
    frames = (folder / "b.png", folder / "a.png")
    film, other = Part("video", folder / "film.mp4"), Part("video", folder / "other.mp4")
    assert parts({"video": "film.mp4"}, folder) == (film,)
    assert parts({"video": ["b.png", "a.png"]}, folder) == (Part("video", frames),)
    assert parts({"video": ["other.mp4", "film.mp4"]}, folder) == (other, film)
    assert parts({"video": [["b.png", "a.png"], "film.mp4"]}, folder) == (Part("video", frames), film)


def test_chat_content_and_messages(folder: Path) -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "cat"}]
    expected = (Part("image", folder / "a.png"), Part("text", "cat"))
    assert parts(content, folder) == expected
    assert parts({"role": "user", "content": content}, folder) == expected
    assert parts([{"role": "user", "content": content}], folder) == expected
    assert parts([{"role": "user", "content": "cat"}], folder) == (Part("text", "cat"),)


def test_nulls_that_arrow_adds_are_skipped(folder: Path) -> None:
    assert parts({"text": "cat", "image": None}, folder) == (Part("text", "cat"),)
    content = [{"type": "text", "text": "cat", "image": None}]
    assert parts(content, folder) == (Part("text", "cat"),)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "the cell is empty"),
        ("", "the text is empty"),
        (" \n", "the text is empty"),
        ({}, "the cell is empty"),
        ([], "a list of content parts, got list"),
        ({"text": None}, "the cell is empty"),
        ({"text": "", "image": "a.png"}, "the text is empty"),
        ({"text": 7}, "a text is a string, got int 7"),
        (7, "got int 7"),
        (["cat", "dog"], "got list"),
        ({"caption": "cat"}, "unknown key 'caption'"),
        ({"image": "gone.png"}, "the image file .*gone.png does not exist"),
        ({"image": 3}, "expected the path of an image file, got int 3"),
        ({"image": {"bytes": None, "path": None}}, "expected the path of an image file, got NoneType"),
        ({"image": {"bytes": "noise", "path": "x.png"}}, "the bytes of image 'x.png' are str 'noise'"),
        ({"image": {"bytes": 7, "path": None}}, "the bytes of image None are int 7"),
        ({"video": "gone.mp4"}, "the video file .*gone.mp4 does not exist"),
        ({"video": ["a.png", "gone.png"]}, "the image file .*gone.png does not exist"),
        ({"video": [[]]}, "a video without frames"),
        ([{"type": "text", "image": "a.png"}], "a content part is"),
        ([{"type": "text", "text": "cat", "image": "a.png"}], "a content part is"),
        ([{"type": "image_url", "image_url": "a.png"}], "unknown key 'image_url'"),
        ([{"role": "system", "content": "Find."}], "got role 'system'"),
        ([{"role": "user", "content": None}], "the cell is empty"),
    ],
)
def test_bad_cells_are_refused_with_their_origin(cell: Any, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        to_item(cell, "document", Folder(folder), ORIGIN)
    assert str(error.value).startswith(ORIGIN)

