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
from building import evaluation_folder, item, jsonl, picture
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
    return Rows(jsonl(folder / "train.jsonl", lines), **options)


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
    corpus = [{"id": "d", "image": "a.png"}, {"id": "e", "image": "link.png"}]
    evaluation_folder(folder, corpus, [{"id": "q", "text": "q"}], "q\td\t1\n")
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


# What a data set says of itself: where its rows are.

ROW = '{"query": "q", "positive": "p"}\n'
#: Where a data set may look for its rows, apart from its folder.
ELSEWHERE = {
    "above": "../secret.jsonl",
    "above a folder": "pages/../../secret.jsonl",
    "above, by a pattern": "../s*.jsonl",
    "absolute": "{root}/secret.jsonl",
    "an address": "http://127.0.0.1:9/x.jsonl",
    "of a file": "file://{root}/secret.jsonl",
    "chained": "simplecache::http://127.0.0.1:9/x.jsonl",
    "chained above": "zip://x.jsonl::../secret.zip",
}
CONFIGS = {
    "alone": ("README.md", "- {{config_name: default, data_files: '{}'}}"),
    "in a list": ("README.md", "- config_name: default\n  data_files: [{{split: train, path: [train.jsonl, '{}']}}]"),
    "of another subset": (
        "README.md",
        "- {{config_name: a, data_files: train.jsonl}}\n- {{config_name: b, data_files: '{}'}}",
    ),
    "a folder": ("README.md", "- {{config_name: default, data_dir: '{}'}}"),
    "in another file": (".huggingface.yaml", "- {{config_name: default, data_files: '{}'}}"),
}


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` opens, with rows beside it that are none of its own; and no network."""
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("The network was used."))
    (tmp_path / "secret.jsonl").write_text(ROW)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(ROW)
    return tmp_path / "data"


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("form", CONFIGS)
def test_a_folder_names_no_rows_elsewhere(data_set: Path, where: str, form: str) -> None:
    (name, configs), value = CONFIGS[form], ELSEWHERE[where].format(root=data_set.parent)
    content = f"configs:\n{configs.format(value)}\n"
    (data_set / name).write_text(f"---\n{content}---\n# A data set\n" if name == "README.md" else content)
    with pytest.raises(ValueError, match=f"{data_set}, {name}: the data .*(leads out of|is a URL, and nothing)"):
        len(Rows(str(data_set)))


def test_a_data_set_of_the_hub_names_no_rows_elsewhere(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is looked for: only its page is asked for."""
    (data_set / "README.md").write_text("---\nconfigs: [{config_name: a, data_files: 'http://127.0.0.1:9/x'}]\n---\n")
    monkeypatch.setattr("vlmembed.data.tables.hf_hub_download", lambda *_, **__: str(data_set / "README.md"))
    with pytest.raises(ValueError, match=r"somebody/pages, README.md: the data 'http://127.*' is a URL"):
        len(Rows("somebody/pages"))


@pytest.mark.parametrize("content", ["configs: [", "configs: here", "configs: [here]", "- a list", "configs: {a: b}"])
def test_a_page_that_cannot_be_read_is_named(data_set: Path, content: str) -> None:
    (data_set / "README.md").write_text(f"---\n{content}\n---\n")
    with pytest.raises(ValueError, match=f"^{data_set}: cannot be opened: "):
        len(Rows(str(data_set)))


def test_a_link_is_no_way_out(data_set: Path) -> None:
    """Neither of rows in a folder, nor of a saved data set's, nor of an evaluation folder's."""
    (data_set / "train.jsonl").unlink()
    (data_set / "train.jsonl").symlink_to(data_set.parent / "secret.jsonl")
    with pytest.raises(ValueError, match=f"^{data_set}: the data file .*train.jsonl' leads out"):
        len(Rows(str(data_set)))
    assert len(Rows(str(data_set), allow_outside=[str(data_set.parent)])) == 1
    assert len(Rows(str(data_set / "train.jsonl"))) == 1  # The YAML names it, and no data set does.
    saved(data_set.parent / "one"), saved(data_set.parent / "other")
    (rows,) = (data_set.parent / "one").glob("*.arrow")
    rows.unlink()
    rows.symlink_to(data_set.parent / "other" / rows.name)
    with pytest.raises(ValueError, match=r"one: the data file .*\.arrow' leads out"):
        len(Rows(str(data_set.parent / "one")))
    evaluation_folder(data_set, [], [{"id": "q", "text": "q"}], "q\td\t1\n")
    (data_set / "corpus.jsonl").unlink()
    (data_set / "corpus.jsonl").symlink_to(data_set.parent / "secret.jsonl")
    with pytest.raises(ValueError, match=f"^{data_set}: the data file 'corpus.jsonl' leads out"):
        EvaluationFolder(str(data_set)).load()


def saved(path: Path) -> Path:
    datasets.Dataset.from_list([{"query": "q", "positive": path.name}]).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["../other/{rows}", "{root}/other/{rows}"])
def test_a_saved_data_set_names_no_rows_elsewhere(data_set: Path, name: str) -> None:
    one, _ = (saved(data_set.parent / folder) for folder in ("one", "other"))
    state = json.loads((one / "state.json").read_text())
    rows = state["_data_files"][0]["filename"]
    state["_data_files"] = [{"filename": name.format(rows=rows, root=data_set.parent)}]
    (one / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"^.*/one: the data file .*/other/.*\.arrow' leads out"):
        len(Rows(str(one)))
    (data_set / "dataset_dict.json").write_text('{"splits": ["../other"]}')
    with pytest.raises(ValueError, match=r"^.*/data: the data file .*/other/.*\.arrow' leads out"):
        len(Rows(str(data_set), split="../other"))


def test_a_folder_runs_no_code(data_set: Path) -> None:
    for name in ("data.py", "loader.py"):
        (data_set / name).write_text(f"open({str(data_set / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=f"^{data_set}: cannot be opened: Dataset scripts are no longer supported"):
        len(Rows(str(data_set)))
    assert not (data_set / "ran").exists()


@pytest.mark.parametrize("path", ["json", "csv", "text"])
def test_a_reader_of_the_library_is_no_data_set(data_set: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset("json")` would read every file of the folder that the command runs in."""
    monkeypatch.chdir(data_set)
    with pytest.raises(ValueError, match=f"^{path}: the data file .* leads out"):
        len(Rows(path))


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


def test_a_video_is_a_file_whatever_its_name(checkpoint: Path, here: Path) -> None:
    film(here / "film.mp4").rename(here / "concat:gone.mp4")
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
    ("search/ranking.py", "import_module"): "Of engines that the package itself lists.",
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
    for call in re.findall(r"torch\.load\((.*)\)", (package / "training/checkpoint_files.py").read_text()):
        assert re.search(r"weights_only=(True|weights_only)\b", call)
