"""What the data cookbook says to write, on replicas of the data sets that it names."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from building import call, csv_logger, data_module, jsonl, picture, run_config
from videos import film

from vlmembed.types import Example, Item

PAGE = Path(__file__).parent.parent / "vlmembed/data/README.md"


def png(number: int) -> bytes:
    content = io.BytesIO()
    picture(64, 48, number).save(content, "PNG")
    return content.getvalue()


def stored(number: int) -> dict[str, Any]:
    """An image in a Parquet file."""
    return {"bytes": png(number), "path": f"{number}.png"}


def images(folder: str, names: Iterable[str]) -> None:
    for number, name in enumerate(names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))


def hub(name: str, tables: dict[tuple[str, str], list[dict[str, Any]]], *pictured: str) -> None:
    """A data set as it lies on the Hub: configuration and split → rows."""
    configs: dict[str, list[dict[str, str]]] = {}
    for (config, split), rows in tables.items():
        file = f"{config}/{split}-00000-of-00001.parquet"
        table = datasets.Dataset.from_list(rows)
        for column in {*pictured} & {*table.column_names}:
            table = table.cast_column(column, datasets.Image())
        Path(name, config).mkdir(parents=True, exist_ok=True)
        table.to_parquet(Path(name, file))
        configs.setdefault(config, []).append({"split": split, "path": file})
    listed = [{"config_name": config, "data_files": files} for config, files in configs.items()]
    Path(name, "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n")


# Each makes a replica in the working directory, and returns what its rows are: query, positives, negatives.

Expected = list[tuple[list[Any], list[list[Any]], list[list[Any]]]]


def colpali() -> Expected:
    rest = {"answer": "42", "options": None, "page": "1", "model": "m", "prompt": "p", "answer_type": "t"}
    rows = [
        {"image": stored(n), "image_filename": f"{n}.jpg", "query": f"q{n}", "source": source, **rest}
        for n, source in enumerate(["pdf", "tatdqa", "docvqa", "pdf", "arxiv_qa"])
    ]
    hub("vidore/colpali_train_set", {("default", "train"): rows, ("default", "test"): rows[:1]}, "image")
    return [([f"q{n}"], [[png(n)]], []) for n in (0, 2, 3)]


def visual_documents() -> Expected:
    names = [f"negative_{k}" for k in range(4)]
    rows = [
        {"query": f"q{n}", "image": stored(n), **{name: stored(10 * n + k) for k, name in enumerate(names)}}
        for n in range(3)
    ]
    tables = {(config, "train"): rows for config in ("train", "eval", "full")}
    hub("tomaarsen/llamaindex-vdr-en-train-preprocessed", tables, "image", *names)
    return [([f"q{n}"], [[png(n)]], [[png(10 * n + k)] for k in range(4)]) for n in range(3)]


def multilingual() -> Expected:
    queries = ["Frage 0", None, "Frage 2", "Frage 3"]
    rows = [
        {"id": f"de_{n}", "query": query, "image": stored(n), "negatives": [f"de_{(n + 1) % 4}"], "language": "de"}
        for n, query in enumerate(queries)
    ]
    hub("llamaindex/vdr-multilingual-train", {(language, "train"): rows for language in ("de", "en")}, "image")
    return [([f"Frage {n}"], [[png(n)]], [[png((n + 1) % 4)]]) for n in (0, 2, 3)]


def mmeb() -> Expected:
    mark = "<|image_1|>"
    images("TIGER-Lab/MMEB-train/images", ["OK-VQA/Train/a.png", "OK-VQA/Train/b.png"])
    columns = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
    first = (f"{mark}\nAnswer: what?\n", "OK-VQA/Train/a.png", "a crane", "", "a goose", "")
    second = ("A bird.", "", f"{mark}\nRepresent it.", "OK-VQA/Train/b.png", "", "")
    rows = [dict(zip(columns, row, strict=True)) for row in (first, second)]
    hub("TIGER-Lab/MMEB-train", {("OK-VQA", split): rows for split in ("original", "diverse_instruction")})
    return [
        (["a.png", "\nAnswer: what?\n"], [["a crane"]], [["a goose"]]),
        (["A bird."], [["b.png", "\nRepresent it."]], []),
    ]


def megapairs() -> Expected:
    images("images", ["1/q.png", "1/t.png", "1/h.png", "1/g.png"])
    row = {"q_img": "1/q.png", "q_text": ["in red", "at night"], "t_img": "1/t.png", "hns": ["1/h.png", "1/g.png"]}
    jsonl("megapairs.jsonl", [row])
    return [(["q.png", text], [["t.png"]], [["h.png"], ["g.png"]]) for text in ("in red", "at night")]


def mbeir() -> Expected:
    images("mbeir_images", ["1.png", "2.png"])
    pool = [
        {"did": "2:1", "txt": "A page.", "img_path": "mbeir_images/1.png", "modality": "image,text"},
        {"did": "2:2", "txt": "No image.", "img_path": None, "modality": "text"},
    ]
    jsonl("cand_pool/webqa.jsonl", [{**row, "src_content": None} for row in pool])
    query = {"query_txt": "Which?", "query_img_path": None, "query_modality": "text"}
    query |= {"query_src_content": None, "task_id": 2}
    second = {**query, "query_txt": None, "query_img_path": "mbeir_images/2.png"}
    rows = [
        {"qid": "2:5", **query, "pos_cand_list": ["2:1"], "neg_cand_list": ["2:2"]},
        {"qid": "2:6", **second, "pos_cand_list": ["2:2", "2:1"], "neg_cand_list": []},
    ]
    jsonl("query/train/webqa.jsonl", rows)
    page, text = ["A page.", "1.png"], ["No image."]
    return [(["Which?"], [page], [text]), (["2.png"], [text, page], [])]


def passages() -> Expected:
    def listed(*names: str) -> list[dict[str, str]]:
        return [{"docid": name, "title": name, "text": f"about {name}"} for name in names]

    rows = [
        {"query_id": str(n), "query": f"q{n}", "positive_passages": listed("a"), "negative_passages": listed("b", "c")}
        for n in range(2)
    ]
    hub("Tevatron/msmarco-passage", {("default", "train"): rows})
    return [([f"q{n}"], [["a about a"]], [["b about b"], ["c about c"]]) for n in range(2)]


def ids_into_a_corpus() -> Expected:
    corpus = [{"docid": f"d{n}", "text": None if n == 1 else f"t{n}", "image": stored(n)} for n in range(3)]
    rows = [
        {"query_id": f"{n}", "query_text": f"q{n}", "query_image": None, "positive_document_ids": [f"d{n}"],
         "negative_document_ids": [f"d{n + 1}"], "answers": ["x"]}
        for n in range(2)
    ]  # fmt: skip
    hub("Tevatron/wiki-ss-nq", {("default", "train"): rows})
    hub("Tevatron/wiki-ss-corpus", {("default", "train"): corpus}, "image")
    documents = [["t0", png(0)], [png(1)], ["t2", png(2)]]
    return [([f"q{n}"], [documents[n]], [documents[n + 1]]) for n in range(2)]


def swift() -> Expected:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    images("images", ["a.png", "b.png", "c.png"])
    row = {
        "messages": said("<image>What?"),
        "images": ["a.png"],
        "positive_messages": [said("Seen on <image>.")],
        "positive_images": [["b.png"]],
        "negative_messages": [said("<image><image>"), said("nothing")],
        "negative_images": [["c.png", "a.png"], []],
    }
    jsonl("swift.jsonl", [row, {**row, "messages": said("Why?"), "images": []}])
    documents: Any = ([["Seen on ", "b.png", "."]], [["c.png", "a.png"], ["nothing"]])
    return [(["a.png", "What?"], *documents), (["Why?"], *documents)]


def flickr() -> Expected:
    rows = [{"image": stored(n), "caption": [f"{n}.{k}" for k in range(5)], "img_id": str(n)} for n in range(2)]
    hub("nlphuji/flickr30k", {("default", "test"): rows}, "image")
    return [([f"{n}.{k}"], [[png(n)]], []) for n in range(2) for k in range(5)]


def coco() -> Expected:
    images("train2017", ["000000000009.png", "000000000025.png"])
    files = [
        {"id": 9, "file_name": "000000000009.png", "license": 3},
        {"id": 25, "file_name": "000000000025.png", "license": 1},
    ]
    captions = [{"id": n, "image_id": image, "caption": f"c{n}"} for n, image in enumerate((25, 9, 25))]
    content = {"info": {"year": 2017}, "licenses": [], "images": files, "annotations": captions}
    jsonl("annotations/captions_train2017.json", [content])
    names = ("000000000025.png", "000000000009.png", "000000000025.png")
    return [([f"c{n}"], [[name]], []) for n, name in enumerate(names)]


def msrvtt() -> Expected:
    Path("videos").mkdir()
    for n in range(2):
        film(Path(f"videos/video{n}.mp4"), frames=[picture(64, 32, n + k) for k in range(8)])
    jsonl(
        "msrvtt_train.jsonl", [{"video": f"video{n}.mp4", "caption": [f"{n}.{k}" for k in range(2)]} for n in range(2)]
    )
    return [([f"{n}.{k}"], [[f"video{n}.mp4"]], []) for n in range(2) for k in range(2)]


def cirr() -> Expected:
    images("img_raw/train/1", ["a.png", "b.png"])
    rows = [
        {"pairid": n, "reference": "a", "target_hard": "b", "target_soft": {"b": 1.0}, "caption": f"c{n}"}
        for n in range(2)
    ]
    jsonl("captions/cap.rc2.train.json", [rows])
    jsonl("image_splits/split.rc2.train.json", [{"a": "./train/1/a.png", "b": "./train/1/b.png"}])
    return [(["a.png", f"c{n}"], [["b.png"]], []) for n in range(2)]


def webdataset() -> Expected:
    Path("shards").mkdir()
    for shard in range(2):
        with tarfile.open(f"shards/{shard:05d}.tar", "w") as archive:
            for n in range(2):
                for kind, content in (("png", png(2 * shard + n)), ("txt", f"t{2 * shard + n}".encode())):
                    member = tarfile.TarInfo(f"{n:09d}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return [([f"t{n}"], [[png(n)]], []) for n in range(4)]


def image_folder() -> Expected:
    images("photographs", ["a.png", "b.png"])
    jsonl("photographs/metadata.jsonl", [{"file_name": f"{name}.png", "text": f"photograph {name}"} for name in "ab"])
    return [([f"photograph {name}"], [[f"{name}.png"]], []) for name in "ab"]


def shards() -> Expected:
    Path("pages").mkdir()
    for shard in range(2):
        rows = [{"question": f"q{2 * shard + n}", "page": png(2 * shard + n)} for n in range(2)]
        datasets.Dataset.from_list(rows).to_parquet(f"pages/{shard}.parquet")
    return [([f"q{n}"], [[png(n)]], []) for n in range(4)]


REPLICAS: dict[str, Callable[[], Expected]] = {
    "vidore/colpali_train_set": colpali,
    "tomaarsen/llamaindex-vdr-en-train-preprocessed": visual_documents,
    "llamaindex/vdr-multilingual-train": multilingual,
    "TIGER-Lab/MMEB-train": mmeb,
    "MegaPairs (BGE-VL)": megapairs,
    "M-BEIR": mbeir,
    "Tevatron, passages in the rows": passages,
    "Tevatron, ids into a corpus": ids_into_a_corpus,
    "ms-swift": swift,
    "Flickr30k": flickr,
    "COCO captions": coco,
    "MSR-VTT": msrvtt,
    "CIRR": cirr,
    "WebDataset shards": webdataset,
    "a folder of images with metadata.jsonl": image_folder,
    "Parquet shards, images as bytes": shards,
}


def table(marker: str) -> dict[str, Any]:
    """The YAML of each row of a table of the page."""
    text = PAGE.read_text().split(f"<!-- {marker} -->\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (.*?) \| `(.*)` \|$", text, re.MULTILINE)
    return {name: yaml.safe_load(code.replace(r"\|", "|")) for name, code in rows}


def content(item: Item) -> list[Any]:
    """The texts of an item, the content of its images, and the names of its files, in order."""
    return [part.value.name if isinstance(part.value, Path) else part.value for part in item.parts]


def contents_of(row: Example) -> tuple[list[Any], list[list[Any]], list[list[Any]]]:
    return content(row.query), [*map(content, row.positives)], [*map(content, row.negatives)]


def fit(checkpoint: Path, train: Any, steps: int) -> dict[str, Any]:
    """Train a little; return the source as the run's folder has it."""
    run = run_config(checkpoint, batch_size=2, train=train)
    run["trainer"] |= {"max_steps": steps, "enable_model_summary": False, "exporter": None, "logger": csv_logger("run")}
    call("fit", run)
    assert len(Path("runs/run/version_0/metrics.csv").read_text().splitlines()) == steps + 1
    saved: dict[str, Any] = yaml.safe_load(Path("runs/run/version_0/config.yaml").read_text())["data"]["init_args"]
    return saved["train"]


def test_streaming(checkpoint: Path, here: Path) -> None:
    """One row more than the readers (loader workers) have batches of."""
    written = yaml.safe_load(PAGE.read_text().split("<!-- streaming -->\n```yaml\n")[1].split("```")[0])
    jsonl("rows.jsonl", [{"question": f"q{n}", "positive": f"a{n}"} for n in range(5)])
    fit(checkpoint, written["data"]["init_args"]["train"], steps=3)


def test_every_training_set_of_the_page_has_a_replica() -> None:
    assert table("training sets").keys() == REPLICAS.keys()


@pytest.mark.parametrize("name", REPLICAS)
@pytest.mark.usefixtures("here")
def test_training_set(name: str) -> None:
    expected = REPLICAS[name]()
    rows: Any = data_module(train=source_of(name)).train
    assert [contents_of(rows[k]) for k in range(len(rows))] == expected


def source_of(name: str) -> dict[str, Any]:
    return {"class_path": "vlmembed.data.Rows", "init_args": table("training sets")[name]}


#: Those of images in tables, of images in files beside marks, of a table that is looked up in, and of videos.
SHORT = ("vidore/colpali_train_set", "TIGER-Lab/MMEB-train", "M-BEIR", "MSR-VTT")


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.exhaustive) for name in REPLICAS]
)
@pytest.mark.usefixtures("here")
def test_a_run_trains_on(name: str, checkpoint: Path) -> None:
    REPLICAS[name]()
    saved, written = fit(checkpoint, source_of(name), steps=2), source_of(name)
    # The order of a cell's parts is kept: another order is another embedding.
    assert [*map(str, saved["init_args"]["cells"].values())] == [*map(str, written["init_args"]["cells"].values())]
