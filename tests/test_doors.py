"""A data set cannot have files of this machine, or of the network, read; and nothing that is read can run code."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
from building import item, picture
from PIL import Image
from videos import film

from vlmembed.backbones import Qwen3VL
from vlmembed.data import EvaluationFolder, Rows
from vlmembed.data.cells import Folder
from vlmembed.media import load_image
from vlmembed.mining import write_rows
from vlmembed.types import Example, Item, Part

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set's folder, with a picture inside and one outside, and links."""
    place = tmp_path / "data"
    (place / "pages").mkdir(parents=True)
    (tmp_path / "private").mkdir()
    for path in (place / "a.png", place / "pages" / "b.png", tmp_path / "private" / "secret.png"):
        picture(8, 8).save(path)
    (tmp_path / "private" / "film.mp4").touch()
    (place / "link.png").symlink_to(tmp_path / "private" / "secret.png")
    (place / "linked").symlink_to(tmp_path / "private")
    (place / "inner.png").symlink_to(place / "pages" / "b.png")
    return place


def rows(folder: Path, positive: Any, **options: Any) -> Rows:
    lines = [{"query": "q", "positive": "p"}, {"query": "q", "positive": positive}]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Rows(str(folder / "train.jsonl"), **options)


def images(example: Any) -> list[Any]:
    return [part.value for document in example.positives for part in document.parts]


@pytest.mark.parametrize("name", ["a.png", "./pages/../a.png", "pages/b.png", "inner.png", "{folder}/a.png"])
def test_files_inside_are_read_however_they_are_named(folder: Path, name: str) -> None:
    name = name.format(folder=folder)
    assert images(rows(folder, {"image": name})[1]) == [folder / name]


LEADING_OUT = ["../private/secret.png", "{outside}/secret.png", "link.png", "linked/secret.png", "pages/../../x.png"]


@pytest.mark.parametrize("name", LEADING_OUT)
@pytest.mark.parametrize(
    "cell",
    [
        lambda name: {"image": name},
        lambda name: {"image": ["a.png", name]},
        lambda name: {"video": name},
        lambda name: {"video": ["a.png", name]},
        lambda name: {"bytes": None, "path": name},
        lambda name: [{"type": "image", "image": name}],
        lambda name: [{"role": "user", "content": [{"type": "video", "video": name}]}],
    ],
    ids=["image", "images", "video", "frames", "encoded", "part", "message"],
)
def test_files_outside_are_refused(folder: Path, cell: Callable[[str], Any], name: str) -> None:
    outside = folder.parent / "private"
    name = name.format(outside=outside)
    with pytest.raises(ValueError, match="leads out of the data set's folder") as error:
        rows(folder, cell(name))[1]
    for said in (f"{folder}/train.jsonl, row 2, column 'positive'", repr(name), "allow_outside: ["):
        assert said in str(error.value)


def test_a_folder_is_allowed_by_name_and_no_other(folder: Path) -> None:
    outside = folder.parent / "private"
    for name in LEADING_OUT[:-1]:
        name = name.format(outside=outside)
        assert images(rows(folder, {"image": name}, allow_outside=[str(outside)])[1]) == [folder / name]
        with pytest.raises(ValueError, match="leads out"):
            rows(folder, {"image": name}, allow_outside=[str(folder / "pages"), str(folder.parent / "priv")])[1]


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.png",
        "file:///etc/passwd",
        "file:a.png",
        "data:image/png;base64,AA",
        "S3://b/a.png",
        "http:/a",
    ],
)
def test_addresses_are_refused(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("The network was used."))
    for cell in ({"image": url}, {"video": url}):
        with pytest.raises(ValueError, match=r"row 2, column 'positive': .* is a URL, and nothing is downloaded"):
            rows(folder, cell, allow_outside=["/"])[1]


@pytest.mark.parametrize("name", ["a\0b.png", "a" * 5000])
def test_impossible_names_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"row 2, column 'positive': the image file .* cannot be looked for"):
        rows(folder, {"image": name})[1]


def test_what_is_no_plain_file_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")  # To open it would be to wait for ever.
    for name in ("pipe.png", "pages"):
        with pytest.raises(ValueError, match=f"row 2, column 'positive': the image file .*{name} does not exist"):
            rows(folder, {"image": name})[1]


def test_an_evaluation_folder_has_the_same_doors(folder: Path) -> None:
    (folder / "queries.jsonl").write_text('{"id": "q", "text": "q"}\n')
    (folder / "corpus.jsonl").write_text('{"id": "d", "image": "a.png"}\n{"id": "e", "image": "link.png"}\n')
    (folder / "qrels.tsv").write_text("q\td\t1\n")
    message = r"corpus\.jsonl, row 2 \(id 'e'\): the image file 'link\.png' leads out .*allow_outside"
    with pytest.raises(ValueError, match=message):
        EvaluationFolder(str(folder)).load()
    allowed = EvaluationFolder(str(folder), allow_outside=[str(folder.parent / "private")]).load()
    assert allowed.corpus[1].parts[0].value == folder / "link.png"


# Data sets of ``datasets``, whose images are a type of their own.


def table(folder: Path, names: list[str]) -> Rows:
    features = datasets.Features(
        {
            "query": datasets.Value("string"),
            "positive": datasets.Image(),
            "negatives": datasets.List({"image": datasets.Image(), "text": datasets.Value("string")}),
        }
    )
    columns = {
        "query": ["q"] * len(names),
        "positive": [{"bytes": None, "path": "a.png"}] * len(names),
        "negatives": [[{"image": {"bytes": None, "path": name}, "text": "n"}] for name in names],
    }
    made = datasets.Dataset.from_dict(columns, features=features)
    # Not by `to_parquet`, which puts the files into the table.
    pyarrow.parquet.write_table(made.data.table, folder / "train.parquet")
    return Rows(str(folder / "train.parquet"))


def test_paths_in_a_table_start_at_its_folder_and_stay_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("The network was used."))
    found = table(folder, ["pages/b.png", "../private/secret.png", "https://example.org/a.png"])
    assert images(found[0]) == [folder / "a.png"]
    assert [part.value for part in found[0].negatives[0].parts] == [folder / "pages" / "b.png", "n"]
    with pytest.raises(ValueError, match=r"train\.parquet, row 2, column 'negatives'\[0\]: .*secret\.png' leads out"):
        found[1]
    with pytest.raises(ValueError, match=r"train\.parquet, row 3, column 'negatives'\[0\]: .* is a URL"):
        found[2]


def test_a_folder_of_images_is_read_as_it_was(folder: Path) -> None:
    for link in ("link.png", "linked", "inner.png"):
        (folder / link).unlink()
    (folder / "pages" / "b.png").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "query": "q"}\n')
    found = Rows(str(folder), columns={"image": "positive"})
    assert images(found[0]) == [folder / "a.png"]


def test_what_was_downloaded_belongs_to_a_folder_but_not_to_a_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the files of a Hub data set, or of an archive in a folder, lie once they are here."""
    downloaded = folder.parent / "private" / "secret.png"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(downloaded.parent))
    with pytest.raises(ValueError, match="leads out"):
        rows(folder, {"image": str(downloaded)})[1]
    for path in (folder, Path("somebody/pages")):
        assert Folder.of(str(path), None).find(str(downloaded), "image", "row 1") == downloaded


def test_images_in_a_saved_data_set_need_no_file(folder: Path, tmp_path: Path) -> None:
    columns = {"query": ["q"], "positive": [str(tmp_path / "private" / "secret.png")]}
    made = datasets.Dataset.from_dict(columns).cast_column("positive", datasets.Image())
    made.save_to_disk(tmp_path / "saved")
    (tmp_path / "private" / "secret.png").unlink()
    (found,) = images(Rows(str(tmp_path / "saved"))[0])
    assert load_image(found).tobytes() == picture(8, 8).tobytes()


# What the framework writes, it reads.


def test_written_rows_say_what_must_be_allowed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside, outside = (Item("document", (Part("image", folder / name),)) for name in ("a.png", "link.png"))
    write_rows(folder / "mined.jsonl", [Example(item("q", role="query"), (inside,))])
    assert not capsys.readouterr().out
    assert images(Rows(str(folder / "mined.jsonl"))[0]) == [folder / "a.png"]
    write_rows(folder / "mined.jsonl", [Example(item("q", role="query"), (outside,))])
    private = folder.parent / "private"
    assert f"allow_outside: [{private}]" in capsys.readouterr().out
    with pytest.raises(ValueError, match="leads out"):
        Rows(str(folder / "mined.jsonl"))[0]
    (found,) = images(Rows(str(folder / "mined.jsonl"), allow_outside=[str(private)])[0])
    assert found.resolve() == private / "secret.png"


# Files that would have something else read, or run.


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{film}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/film.mp4\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{film}'\n",
    ],
)
@pytest.mark.parametrize("name", ["list.m3u8", "film.mp4"])
def test_a_playlist_is_no_video(checkpoint: Path, tmp_path: Path, playlist: str, name: str) -> None:
    real = film(tmp_path / "real.mp4")
    (tmp_path / name).write_text(playlist.format(film=real.name))
    preprocessor = Qwen3VL(str(checkpoint)).make_preprocessor()
    assert preprocessor([Item("document", (Part("video", real),))])["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match=f"row 9: cannot read the video {tmp_path / name}"):
        preprocessor([Item("document", (Part("video", tmp_path / name),), "row 9")])


def test_a_video_is_a_file_whatever_its_name(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film(tmp_path / "film.mp4").rename(tmp_path / "concat:gone.mp4")
    monkeypatch.chdir(tmp_path)
    items = [Item("document", (Part("video", Path("concat:gone.mp4")),))]
    assert Qwen3VL(str(checkpoint)).make_preprocessor()(items)["input_ids"].shape[0] == 1


def test_an_image_that_another_program_would_interpret_is_refused(tmp_path: Path) -> None:
    picture(8, 8).save(tmp_path / "page.eps")
    (tmp_path / "page.eps").rename(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as opened:
        assert opened.format == "EPS"
    with pytest.raises(
        ValueError, match=r"row 9: cannot read the image .*it is PostScript \(EPS\)\. Convert it to PNG"
    ):
        load_image(tmp_path / "page.png", "row 9")


#: Whatever could run what a file says, apart from importing the classes that a YAML names.
UNSAFE = re.compile(
    r"\b(torch|np|numpy|joblib)\.load\(|\b(c?[pP]ickle|dill|marshal|shelve|joblib|runpy)\b(?! *:)|read_pickle|"
    r"allow_pickle|(?<![\w.])(eval|exec|__import__|compile)\(|import_module|shell=True|yaml\.(unsafe_|full_)?load\(|"
    r"trust_remote_code=True|weights_only=False"
)
REASONS = {
    ("cli.py", "import_module"): "Of the commands that the package itself lists.",
    ("training/checkpoint_files.py", "torch.load("): "weights_only=True.",
    ("training/checkpoint_files.py", "pickle"): "The errors by which a checkpoint that is not read gives itself away.",
    ("export/verify.py", "np.load("): "numpy refuses pickles unless told otherwise; written by the process before.",
    ("export/exporter.py", "trust_remote_code=True"): "Words, about a pooling of the user's own.",
    ("data/sources.py", "pickle"): "Words, about sources of a user's own.",
}


def test_nothing_loads_what_could_run_code() -> None:
    package = ROOT / "vlmembed"
    found = {
        (path.relative_to(package).as_posix(), match[0])
        for path in package.rglob("*.py")
        for match in UNSAFE.finditer(path.read_text())
    }
    assert found == REASONS.keys()
    for name in ("training/checkpoint_files.py",):
        for call in re.findall(r"torch\.load\((.*)\)", (package / name).read_text()):
            assert re.search(r"weights_only=(True|weights_only)\b", call)
