"""The command that shows what a model will read of its data, and its page in a real browser."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import other_models
import pytest
import yaml
from building import jsonl, picture, run_config
from PIL import Image
from test_ablation_browser import browser, opened  # noqa: F401
from test_cookbook import REPLICAS, table
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vlmembed.backbones import Qwen3VL, VisionLanguageModel
from vlmembed.cli import main
from vlmembed.data import EvaluationFolder, GroupByQuery, Mixture, RetrievalDataModule, Rows
from vlmembed.data.digits import HandwrittenNumbers, HandwrittenNumbersEvaluation
from vlmembed.losses import InfoNCE, ScoreDistillation, SoftmaxCrossEntropy
from vlmembed.modules import CrossEncoderModule, EmbeddingModule, MultiVectorModule
from vlmembed.pooling import LastToken, TokenSelection
from vlmembed.show import CHARACTERS, PIXELS, Reader, Reading, Section, show

ROOT = Path(__file__).parent.parent
HOSTILE = (
    '<script>console.log("in")</script><img src="https://example.org/x.png" onerror="console.log(1)">\x1b[31m\u202e'
)


@pytest.fixture(scope="module")
def bare(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint without its weights."""
    folder = tmp_path_factory.mktemp("bare") / "tiny"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def embedder(checkpoint: Path, **options: Any) -> EmbeddingModule:
    return EmbeddingModule(Qwen3VL(str(checkpoint), **options), LastToken(), InfoNCE())


def reranker(checkpoint: Path) -> CrossEncoderModule:
    return CrossEncoderModule(Qwen3VL(str(checkpoint)), SoftmaxCrossEntropy())


def write(path: Path, *rows: dict[str, Any]) -> str:
    return jsonl(path, rows)


def sections(model: Any, rows: int = 3, **data: Any) -> list[Section]:
    """What is shown, of data of which nothing is refused."""
    reader = Reader(model, RetrievalDataModule(**data), rows)
    shown = []
    for section in reader.sections():
        section.rows = [*section.rows]
        shown.append(section)
    assert reader.errors == []
    return shown


def readings(section: Section) -> list[Reading]:
    return [reading for row in section.rows for reading in row.readings]


def opened_image(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))


def test_an_embedders_items_are_as_the_processor_has_them(bare: Path, tmp_path: Path) -> None:
    """In the oracle's hands: the checkpoint's processor, called by itself."""
    large, small = picture(1000, 700, 1), picture(50, 90, 2)
    large.save(tmp_path / "large.png")
    small.save(tmp_path / "small.png")
    path = write(
        tmp_path / "train.jsonl",
        {
            "query": "what is it",
            "positive": {"text": "before", "image": ["large.png", "small.png"]},
            "negatives": ["no", {"image": "small.png"}],
        },
    )
    model = embedder(bare, query_instruction="Find it.", document_instruction=None, max_pixels=128 * 128)
    (section,) = sections(model, train=path)
    assert section.title == "data.train: train, 1 rows"
    query, positive, *negatives = readings(section)
    assert [reading.label for reading in (query, positive, *negatives)] == ["query", *["positive"], *["negative"] * 2]
    assert [reading.roles for reading in (query, positive)] == ["query", "document"]
    assert [reading.instruction for reading in (query, positive)] == ["Find it.", "none"]
    assert [part.kind for part in positive.parts] == ["text", "image", "image"]

    processor = AutoProcessor.from_pretrained(bare)
    size = {"shortest_edge": processor.image_processor.size["shortest_edge"], "longest_edge": 128 * 128}
    processor.image_processor.size = size
    content = [{"type": "text", "text": "before"}, {"type": "image", "image": large}, {"type": "image", "image": small}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    ids = inputs["input_ids"][0]
    assert positive.tokens == f"{len(ids)} tokens"
    text = re.sub(r"(<\|image_pad\|>) × (\d+) ", lambda match: match[1] * int(match[2]), positive.chat)
    assert text == processor.tokenizer.decode(ids).strip()
    for image, part in ((large, positive.parts[1]), (small, positive.parts[2])):
        height, width = smart_resize(image.height, image.width, 32, size["shortest_edge"], size["longest_edge"])
        assert part.text == f"{image.width} × {image.height} → {width} × {height}"
        assert max(opened_image(part.images[0]).size) <= max(width, height)


@pytest.mark.parametrize("direction", ["scores", "labels"])
def test_what_documents_are_to_the_query_is_said(bare: Path, tmp_path: Path, direction: str) -> None:
    row: dict[str, Any] = {"query": "q", "positive": "p", "negative": "n", "scores": [2.5, -1]}
    loss: Any = ScoreDistillation()
    if direction == "labels":
        row, loss = {"query": "q", "document": ["p", "n"], "label": [3, 0]}, InfoNCE()
    model = EmbeddingModule(Qwen3VL(str(bare)), LastToken(), loss)
    (section,) = sections(model, train=write(tmp_path / "train.jsonl", row))
    expected = (
        ["positive, score 2.5", "negative, score -1"]
        if direction == "scores"
        else ["positive, label 3", "negative, label 0"]
    )
    assert [reading.label for reading in readings(section)] == ["query", *expected]


def test_a_cross_encoder_reads_pairs(bare: Path, tmp_path: Path) -> None:
    picture(64, 64).save(tmp_path / "page.png")
    rows = [{"query": "q", "positive": {"image": "page.png"}, "negatives": ["no", "never"]}] * 2
    path = write(tmp_path / "train.jsonl", *rows)
    train, test = sections(reranker(bare), rows=1, train=path, test=path)
    assert [reading.label for reading in readings(train)] == ["query with positive", *["query with negative"] * 2]
    first = readings(train)[0]
    assert first.roles == "query and document"
    assert "Given a search query" in first.instruction
    assert [part.kind for part in first.parts] == ["text", "image"]
    assert "<Query>:q\n<Document>:<|vision_start|><|image_pad|> × 4 <|vision_end|>" in first.chat
    assert test.title == "data.test: train, 1 queries, 3 documents"
    assert sorted(reading.label.split(", ")[1] for reading in readings(test)) == ["grade 0", "grade 0", "grade 1"]


def test_tokens_with_a_vector_are_counted(bare: Path, tmp_path: Path) -> None:
    """Of 64 × 64 pixels four tokens; of a query all."""
    picture(64, 64).save(tmp_path / "page.png")
    path = write(tmp_path / "train.jsonl", {"query": "q", "positive": {"image": "page.png", "text": "a caption"}})
    model = MultiVectorModule(Qwen3VL(str(bare)), InfoNCE(), document_tokens=TokenSelection("images"))
    query, document = readings(sections(model, train=path)[0])
    assert query.tokens == "20 tokens, 20 with a vector"
    assert document.tokens.endswith(" tokens, 4 with a vector")


def test_evaluation_sets_sources_and_videos(bare: Path, tmp_path: Path) -> None:
    frames = [f"{number}.png" for number in range(6)]
    for number, name in enumerate(frames):
        picture(64, 32, number).save(tmp_path / name)
    folder = tmp_path / "pages"
    write(folder / "corpus.jsonl", *({"id": f"d{number}", "text": f"document {number}"} for number in range(30)))
    write(folder / "queries.jsonl", *({"id": f"q{number}", "text": f"query {number}"} for number in range(3)))
    (folder / "qrels.tsv").write_text("q0\td3\t1\nq0\td2\t2\nq0\tgone\t1\nq1\td1\t1\nq2\td0\t1\n")
    one = write(tmp_path / "one.jsonl", {"query": "a", "positive": {"video": [frames]}})
    two = write(tmp_path / "two.jsonl", *({"query": f"b{number}", "positive": "c"} for number in range(3)))
    mixture = Mixture([Rows(one), GroupByQuery(Rows(two))], weights=[1, 1])
    with pytest.warns(UserWarning, match="gone"):
        first, second, third = sections(embedder(bare), rows=2, train=mixture, val=str(folder))
    assert [first.title, second.title] == [
        "data.train: one, 1 rows, 2 in an epoch",
        "data.train: two, 3 rows, 2 in an epoch",
    ]
    (video,) = readings(first)[1].parts
    assert re.fullmatch(r"\d of 6 frames, 64 × 32 → \d+ × \d+", video.text)
    assert 1 <= len(video.images) <= 4
    assert [row.name for row in second.rows] == ["Row 1", "Row 2"]
    assert third.title == "data.val: pages, 3 queries, 30 documents"
    labels = [[reading.label for reading in row.readings] for row in third.rows]
    assert labels == [["query", "document d2, grade 2", "document d3, grade 1"], ["query", "document d1, grade 1"]]


@pytest.mark.parametrize("make", [other_models.idefics3, other_models.qwen2_5_vl], ids=lambda make: make.__name__)
def test_other_models(make: Any, tmp_path: Path) -> None:
    picture(64, 48).save(tmp_path / "page.png")
    model = EmbeddingModule(VisionLanguageModel(str(make(tmp_path / "model"))), LastToken(), InfoNCE())
    (section,) = sections(
        model, train=write(tmp_path / "train.jsonl", {"query": "q", "positive": {"image": "page.png"}})
    )
    query, positive = readings(section)
    # Idefics3 cuts the image into tiles of 32 × 32, and adds one of all of it; Qwen2.5-VL rounds to 28.
    expected = r"64 × 48 → 32 × 32 in \d tiles" if make is other_models.idefics3 else "64 × 48 → 56 × 56"
    assert re.fullmatch(expected, positive.parts[0].text)
    assert " × " in positive.chat
    assert query.chat.count("q") >= 1


def test_what_is_long_is_cut_and_said(bare: Path, tmp_path: Path) -> None:
    words = "many words " * 1000
    Image.new("RGB", (3000, 100)).save(tmp_path / "wide.png")
    negatives = [f"wrong {number}" for number in range(20)]
    row = {"query": words, "positive": {"image": "wide.png"}, "negatives": negatives}
    (section,) = sections(embedder(bare, max_length=400), train=write(tmp_path / "train.jsonl", row))
    (shown,) = section.rows
    query, positive = shown.readings[:2]
    assert re.fullmatch(r"400 tokens of [\d,]{5,}, at max_length", query.tokens)
    assert len(query.parts[0].text) < CHARACTERS + 50
    assert query.parts[0].text.endswith(f"({len(words):,} characters)")
    assert max(opened_image(positive.parts[0].images[0]).size) == PIXELS
    assert (len(shown.readings), shown.hidden) == (9, 13)


def test_control_characters_do_not_reach_the_terminal(bare: Path, tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "train.jsonl", {"query": HOSTILE, "positive": "a\tb\nc\r\x00"})
    show(embedder(bare), RetrievalDataModule(train=path), 3, tmp_path / "page.html")
    printed = capsys.readouterr().out
    assert not re.search("[\0-\x08\x0b-\x1f\x7f\u202e]", printed)
    assert r"\x1b[31m\u202e" in printed


BAD = {
    "missing image": {"query": "x", "positive": {"image": "gone.png"}},
    "empty query": {"query": "", "positive": "y"},
    "no image": {"query": "x", "positive": {"image": "train.jsonl"}},
    "image mark": {"query": "x<|image_pad|>", "positive": "y"},
    "another column": {"query": "x", "positive": "y", "negatvie": "z"},
}


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_a_bad_row_is_refused_as_in_training(
    row: dict[str, Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", {"query": "good", "positive": "row"}, row, {"query": "also", "positive": "good"})
    config = run_config(checkpoint, train="train.jsonl", batch_size=3)
    config["trainer"] |= {"logger": False, "enable_checkpointing": False}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError) as trained:  # noqa: PT011
        main(["fit", "--config", "run.yaml"])
    with pytest.raises(ValueError, match=re.escape(str(trained.value))):
        main(["show", "--config", "run.yaml", "--rows", "3"])
    printed, page = capsys.readouterr().out, Path("show.html").read_text()
    assert "row 2" in str(trained.value)
    assert printed.count("CANNOT BE USED") == page.count("It cannot be used") == 1
    assert "also" in printed.split("CANNOT BE USED")[1]
    # Where training leaves it out, it is shown and not refused.
    main(["show", "--config", "run.yaml", "--rows", "3", "--data.init_args.on_bad_row=skip"])
    assert capsys.readouterr().out.count("CANNOT BE USED") == 1


def test_an_evaluation_set_that_cannot_be_opened_hides_nothing_else(bare: Path, tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "train.jsonl", {"query": "good", "positive": "row"})
    data = RetrievalDataModule(train=path, val=str(tmp_path / "gone.jsonl"), test=path)
    with pytest.raises(ValueError, match=r"gone\.jsonl: no such file"):
        show(embedder(bare), data, 3, tmp_path / "page.html")
    printed = capsys.readouterr().out
    assert printed.count("text: good") == 2
    assert "measured on rows that are also trained on" in printed
    assert "measured on rows that are also trained on" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("rows", "output"), [(0, "page.html"), (1, "train.jsonl")])
def test_options_that_make_no_sense_are_refused(bare: Path, tmp_path: Path, rows: int, output: str) -> None:
    path = write(tmp_path / "train.jsonl", {"query": "good", "positive": "row"})
    before = Path(path).read_text()
    with pytest.raises(ValueError, match=r"rows is 1 or more, and output ends in \.html"):
        show(embedder(bare), RetrievalDataModule(train=path), rows, tmp_path / output)
    assert Path(path).read_text() == before


@pytest.mark.parametrize("name", ["quickstart", "quickstart_reranker"])
def test_the_quick_starts(name: str, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run = yaml.safe_load((ROOT / "configs/quickstart_reranker.yaml").read_text())["data"]["init_args"]["test"][
        "init_args"
    ]
    Path(run["run"]).parent.mkdir(parents=True)
    (query, judged), *_ = HandwrittenNumbersEvaluation().load().qrels.items()
    Path(run["run"]).write_text(
        "".join(f"{query} Q0 {document} {rank} {9 - rank} x\n" for rank, document in enumerate(judged))
    )
    main(
        [
            "show",
            "--config",
            str(ROOT / f"configs/{name}.yaml"),
            f"--model.init_args.backbone.init_args.checkpoint={bare}",
        ]
    )
    printed = capsys.readouterr().out
    assert "Warning" not in printed
    assert "image: 96 × 32 → 96 × 32" in printed
    assert "<|image_pad|> × 3 " in printed
    assert printed.count("\n== data.") == (3 if name == "quickstart" else 2)
    assert "Page: show.html" in printed
    assert not Path("runs/quickstart").exists()


# In a browser

THREE = ("tomaarsen/llamaindex-vdr-en-train-preprocessed", "TIGER-Lab/MMEB-train", "ms-swift")


def replica(name: str) -> Rows:
    """Make a replica of a data set, in the working directory, and read it as the cookbook says."""
    REPLICAS[name]()
    return Rows(**table("training sets")[name])


@pytest.fixture(scope="module")
def folder(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of hostile rows, with images in files, in a table, and of a video; of replicas, and of the quick start."""
    folder = tmp_path_factory.mktemp("page")
    for number in range(3):
        picture(900, 300, number).save(folder / f"{number}.png")
    images = [{"bytes": (folder / f"{number}.png").read_bytes(), "path": None} for number in range(3)]
    texts = [HOSTILE, "{{ 7 * 7 }}{% raw %}", "long" * 400]
    features = datasets.Features({"query": datasets.Value("string"), "positive": datasets.Image()})
    rows = datasets.Dataset.from_dict({"query": texts, "positive": images}, features=features)
    rows.to_parquet(folder / "table.parquet")
    name = '"><script>console.log(2)</script>'
    write(folder / "pages" / "corpus.jsonl", {"id": name, "image": "../1.png", "text": HOSTILE})
    write(folder / "pages" / "queries.jsonl", {"id": name, "text": HOSTILE})
    (folder / "pages" / "qrels.tsv").write_text(f"{name}\t{name}\t1\n")
    bad = {"query": {"image": HOSTILE}, "positive": "x"}
    write(folder / "bad.jsonl", {"query": "x", "positive": {"video": [["0.png", "1.png"]]}}, bad)
    evaluation = EvaluationFolder(str(folder / "pages"), HOSTILE, [str(folder)])
    model = embedder(bare, query_instruction=HOSTILE)
    with contextlib.chdir(folder):
        replicas: list[Any] = [replica(name) for name in THREE]
        train = ["table.parquet", "bad.jsonl", *replicas, HandwrittenNumbers()]
        data = RetrievalDataModule(train=train, val=[evaluation, HandwrittenNumbersEvaluation("val")])
        with pytest.raises(ValueError, match="row 2"):
            show(model, data, 3, folder / "report.html")
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_screen(opened: Any, width: int, scheme: str) -> None:  # noqa: F811
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = "element => [getComputedStyle(element).color, getComputedStyle(document.body).backgroundColor]"
    for selector in ("body", ".text", "pre", ".error"):
        text, ground = (
            sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in page.locator(selector).first.evaluate(colours)
        )
        assert (text < ground) == (scheme == "light")
    widths = page.locator("img").evaluate_all("images => images.map(image => [image.naturalWidth, image.width])")
    of_replicas = (
        3 * 5 + 2 + 4 + 3
    )  # Pages and four negatives each; two images; of marks, and in the second query none.
    of_quick_start = 3 + 3 * 2  # Two for each of three queries.
    assert len(widths) == 3 + 2 + 1 + of_replicas + of_quick_start
    assert all(0 < natural <= PIXELS and shown <= width for natural, shown in widths)


def test_hostile_rows_are_text(opened: Any, folder: Path) -> None:  # noqa: F811
    page = opened()
    assert page.locator("script").count() == 0
    shown = page.locator(".text").all_inner_texts()
    assert HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e") in shown
    assert "{{ 7 * 7 }}{% raw %}" in shown
    assert page.locator(".error").count() == 2  # The hostile query is also a training query.
    page.locator("summary").first.click()
    assert page.locator("pre").first.is_visible()
    assert (folder / "report.html").stat().st_size < 2**20
