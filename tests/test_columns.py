"""The language of columns, on replicas of the schemas of published data sets."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
from building import jsonl
from test_cookbook import content, contents_of, images

from vlmembed.data import Lookup, Rows, Table

IMAGES = ("a.png", "b.png", "c.png", "d.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with four images beside it, in ``images``."""
    images(str(tmp_path / "images"), IMAGES)
    return tmp_path


def write(path: Path, *rows: dict[str, Any]) -> str:
    return jsonl(path, rows)


def contents(rows: Rows) -> list[Any]:
    return [*map(contents_of, (rows[k] for k in range(len(rows))))]


def test_marks_without_images_are_refused(folder: Path) -> None:
    row = {"messages": [{"content": "<image>and<image> are alike"}], "images": ["a.png"], "positive": "p"}
    query = {"text": "messages[0].content", "marks": {"<image>": {"image": "images"}}}
    rows = Rows(write(folder / "u.jsonl", row), media="images", cells={"query": query, "positive": "positive"})
    with pytest.raises(ValueError, match=r"u\.jsonl, row 1, column 'query': .* has 2 marks '<image>', .* 1 files"):
        rows[0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nested_lists_templates_and_constants(tmp_path: Path, kind: str) -> None:
    """As in Tevatron's older form."""
    passages = [{"docid": "1", "title": "Crane", "text": "A bird."}, {"docid": "2", "title": "", "text": "A {tool}."}]
    row = {"query": "crane", "positive_passages": passages[:1], "negative_passages": passages, "year": 1984}
    path = write(tmp_path / "t.jsonl", row)
    if kind == "parquet":
        path = str(tmp_path / "t.parquet")
        datasets.Dataset.from_list([row]).to_parquet(path)
    rows = Rows(
        path,
        cells={
            "query": "{query}, {{{year}}}",
            "positive": "positive_passages[].text",
            "negatives": "{negative_passages[].title} {negative_passages[].text}",
        },
    )
    assert contents(rows) == [(["crane, {1984}"], [["A bird."]], [["Crane A bird."], ["A {tool}."]])]
    graded = Rows(path, cells={"query": "query", "document": "positive_passages[0].title", "label": {"constant": 1}})
    assert content(graded[0].positives[0]) == ["Crane"]


def test_ids_are_looked_up_in_a_pool(folder: Path) -> None:
    """As in M-BEIR."""
    pool = write(
        folder / "pool/pool.jsonl",
        {"did": "7:1", "txt": "a cat", "img_path": "a.png"},
        {"did": "7:2", "txt": None, "img_path": "b.png"},
        {"did": 3, "txt": "no image", "img_path": None},
    )
    path = write(folder / "train/t.jsonl", {"q": "cat?", "pos": ["7:1"], "neg": ["7:2", 3]}, {"q": "x", "pos": ["9"]})
    (folder / "pool/images").symlink_to(folder / "images")
    lookup = Lookup("did", {"image": "img_path", "text": "txt"}, pool, media="images")
    lookup.media = str(folder / "images")
    cells: dict[str, Any] = {
        "query": "q",
        "positive": {"ids": "pos", "table": "pool"},
        "negatives": [{"ids": "neg", "table": "pool"}],
    }
    rows = pickle.loads(pickle.dumps(Rows(path, cells=cells, tables={"pool": lookup})))
    assert content(rows[0].positives[0]) == ["a.png", "a cat"]
    assert [*map(content, rows[0].negatives)] == [["b.png"], ["no image"]]
    with pytest.raises(
        ValueError, match=r"t\.jsonl, row 2, column 'positive': the id '9' is in no row of .*pool\.jsonl"
    ):
        rows[1]


def test_ids_of_the_data_set_itself_have_a_media_folder_of_their_own(folder: Path) -> None:
    path = write(
        folder / "t.jsonl", {"q": "first", "id": 1, "img": "a.png", "pos": 2}, {"q": "x", "id": 2, "img": "b.png"}
    )
    cells: dict[str, Any] = {"query": "q", "positive": {"ids": "pos", "table": "own"}}
    rows = Rows(path, cells=cells, tables={"own": Lookup("id", {"image": "img"}, media="images")})
    assert content(rows[0].positives[0]) == ["b.png"]


def test_one_row_for_each_caption(folder: Path) -> None:
    """As in Flickr30k and MSR-VTT; captions that are null or none make no row."""
    path = write(
        folder / "t.jsonl",
        {"image": "a.png", "caption": ["one", "two"]},
        {"image": "b.png", "caption": "three"},
        {"image": "c.png", "caption": []},
        {"image": "d.png", "caption": None},
    )
    rows = Rows(path, media="images", each="caption", cells={"query": "caption", "positive": {"image": "image"}})
    assert contents(rows) == [(["one"], [["a.png"]], []), (["two"], [["a.png"]], []), (["three"], [["b.png"]], [])]
    assert rows[1].query.origin.endswith("t.jsonl, row 1, caption[1], column 'query'")
    assert [query.parts[0].value for query in rows.read_queries([2, 0])] == ["three", "one"]


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ({"source": "pdf"}, [0]),
        ({"source": ["pdf", "web"]}, [0, 1]),
        ({"source": {"not": ["pdf", None]}}, [1, 3]),
        ({"year": {"min": 1990, "max": 2001}}, [1, 2]),
        ({"year": 2001}, [2]),
        ({"tags": "x", "year": {"not": 2020}}, [0]),
        ({"meta.lang": "de"}, [3]),
        ({"ok": False}, [1, 3]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_filters(tmp_path: Path, where: dict[str, Any], left: list[int], kind: str) -> None:
    table = [
        {"source": "pdf", "year": 1984, "tags": ["x", "y"], "meta": {"lang": "en"}, "ok": True},
        {"source": "web", "year": 1990, "tags": [], "meta": {"lang": "en"}, "ok": False},
        {"source": None, "year": 2001, "tags": ["y"], "meta": None, "ok": True},
        {"source": "scan", "year": 2020, "tags": ["x"], "meta": {"lang": "de"}, "ok": False},
    ]
    path = write(tmp_path / "t.jsonl", *[{**row, "n": str(number)} for number, row in enumerate(table)])
    if kind == "csv":
        if {"tags", "meta.lang", "ok"} & where.keys() or where.get("source") == {"not": ["pdf", None]}:
            pytest.skip("a CSV file has texts only")
        lines = [f"{row['source'] or ''},{row['year']},{number}\n" for number, row in enumerate(table)]
        path = str(tmp_path / "t.csv")
        Path(path).write_text("source,year,n\n" + "".join(lines))
    rows = Rows(path, cells={"query": "n", "positive": "n"}, where=where)
    assert [int(rows[k].query.parts[0].value) for k in range(len(rows))] == left


ROW = {"query": "q", "passages": [{"title": "t", "text": "x"}], "image_path": "a.png", "empty": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cells": {"positive": "pasages[].text"}}, "no column 'pasages' .did you mean 'passages'.*it has query, pass"),
        ({"cells": {"positive": "{tile} x"}}, "no column 'tile'"),
        ({"cells": {"positive": "passages[].txt"}}, r"row 1, column 'positive': .* no 'txt' .did you mean 'text'"),
        ({"cells": {"positive": "passages.text"}}, r"'text' is the key of a mapping; got list .* column\[\]\.key"),
        ({"cells": {"positive": "query[].text"}}, r"\[\] stands for the elements of a list; got str 'q'"),
        ({"cells": {"positive": "passages[3]"}}, "there is no element 3"),
        ({"cells": {"positive": "{passages}"}}, "takes texts and numbers; got list"),
        ({"cells": {"positive": "{query"}}, "is no template"),
        ({"cells": {"positive": "{query!r}"}}, "not the name of a column"),
        ({"cells": {"positive": "{}"}}, "not the name of a column"),
        ({"cells": {"positive": 3}}, "cells: positive: 3 is no column; a constant is written"),
        ({"cells": {"positive": {"imge": "image_path"}}}, "unknown key 'imge' .*did you mean 'image'"),
        ({"cells": {"positive": {"text": "query", "marks": "<image>"}}}, "marks is '<image>'; it is written"),
        (
            {"cells": {"positive": {"ids": "query", "table": "pol"}}, "tables": {"pool": Lookup("query", "query")}},
            "'pool'",
        ),
        ({"cells": {"positive": "empty"}}, "row 1, column 'positive': the cell is empty"),
        ({"cells": {"positive": "query", "postive": "query"}}, "column 'postive' is unknown"),
        ({"cells": {"positive": "query"}, "columns": {}}, "not both"),
        ({"cells": {"positive": "query"}, "where": {"query": "p"}}, "none of the 1 rows is left by where: .*'p'"),
        ({"cells": {"positive": "query"}, "where": {"lang": "p"}}, "no column 'lang'"),
        ({"cells": {"positive": "query"}, "where": {"query": {"nott": "p"}}}, "'nott' is none of not, min, max"),
        ({"cells": {"positive": "query"}, "where": {"query": {"min": "p"}}}, "min and max are numbers"),
        ({"cells": {"positive": "query"}, "each": "captions"}, "no column 'captions'"),
        ({"cells": {"positive": "query"}, "media": "pictures"}, "the folder of its media, .*pictures, does not exist"),
        ({"cells": {"positive": {"image": "image_path"}}}, "the image file .*a.png does not exist"),
        ({"cells": {"positive": "query"}, "tables": {"self": Lookup("query")}}, "it has none of text, image"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    arguments["cells"] = {"query": "query", **arguments["cells"]}
    rows = Rows(write(tmp_path / "t.jsonl", ROW), **arguments)
    with pytest.raises(ValueError, match=rf"t\.jsonl.*{message}"):
        len(rows), rows[0]


def test_ids_that_come_twice_and_lists_of_other_lengths_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"id": 1, "text": "a", "a": [1, 2], "b": [1]}, {"id": "1", "text": "b"})
    cells: dict[str, Any] = {"query": "text", "positive": {"ids": "id", "table": "self"}}
    with pytest.raises(ValueError, match=r"row 2: id '1' is also that of row 1"):
        len(Rows(path, cells=cells, tables={"self": Lookup("id")}))
    rows = Rows(path, cells={"query": "text", "positive": "{a[]} {b[]}"})
    with pytest.raises(ValueError, match=r"row 1, column 'positive': .* joins lists of 1 and 2 elements"):
        rows[0]


def test_a_table_has_any_columns(tmp_path: Path) -> None:
    table = Table(write(tmp_path / "t.jsonl", {"docid": 3, "body": "x"}), cells={"id": "docid", "text": "body"})
    assert (len(table), table.column_names, table.read([0])) == (1, ["id", "text"], [{"id": 3, "text": "x"}])


def test_paths_do_not_leave_the_folder_by_cells(folder: Path) -> None:
    path = write(folder / "data/t.jsonl", {"q": "x", "p": "../images/a.png"}, {"q": "y", "p": "https://h/a.png"})
    rows = Rows(path, cells={"query": "q", "positive": {"image": "p"}})
    with pytest.raises(ValueError, match="leads out of the data set's folder"):
        rows[0]
    with pytest.raises(ValueError, match="is a URL"):
        rows[1]


@pytest.mark.parametrize("kind", ["list", "glob"])
def test_several_files_are_one_table(tmp_path: Path, kind: str) -> None:
    files = [write(tmp_path / f"shards/{k}.jsonl", {"q": f"q{k}", "p": [f"p{k}"]}) for k in range(3)]
    path: Any = files if kind == "list" else str(tmp_path / "shards/*.jsonl")
    rows = Rows(path, cells={"query": "q", "positive": "p"}, where={"q": {"not": "q1"}})
    assert contents(rows) == [(["q0"], [["p0"]], []), (["q2"], [["p2"]], [])]
    assert (rows.name, rows[1].query.origin) == (
        {"list": "0", "glob": "shards"}[kind],
        f"{files[2]}, row 1, column 'query'",
    )
    with pytest.raises(ValueError, match=r"shards/.*: no column 'question'"):
        len(Rows(path, cells={"query": "question", "positive": "p"}))
