"""The page of ``search``: what is behind it, and itself in a real browser."""

from __future__ import annotations

import shutil
import sys
from base64 import b64decode
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from building import encoder, jsonl, multi_vector, picture, slow_maxsim
from PIL import Image

from vlmembed.cli import main
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.pooling import TokenProjection
from vlmembed.search.page import Side, launch, make_page, question

KINDS = ("one", "other", "several")
#: What must come out as it is: gradio's templates know ``${…}`` and ``{{…}}``.
TEXTS = ["<b>bold</b> & <script>alert(1)</script>", "${1 + 1} {{value}}", "many words " * 80]


@pytest.fixture(scope="module")
def world(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, one of them with several vectors an item, and the index of each over texts and pictures."""
    folder = tmp_path_factory.mktemp("world")
    for number in range(3):
        picture(64, 64 + 400 * number, number).save(folder / f"{number}.png")
    rows = [*({"id": f"t{place}", "text": text} for place, text in enumerate(TEXTS))]
    rows += [{"id": f"p{number}", "image": f"{number}.png", "text": "a caption"[: 9 * number]} for number in range(3)]
    jsonl(folder / "corpus.jsonl", [{key: value for key, value in row.items() if value} for row in rows])
    for kind, instruction in (("one", "Find it."), ("other", "Another.")):
        write_folder(encoder(checkpoint, query_instruction=instruction), folder / kind, dimensions=[32])
    built = multi_vector(checkpoint, projection=TokenProjection(64)).encoder
    write_folder(built, folder / "several", dimensions=[32])
    for kind in KINDS:
        corpus = ["--corpus", str(folder / "corpus.jsonl"), "--output", str(folder / f"{kind}_index")]
        main(["encode", "--model", str(folder / kind), *corpus])
    return folder


@pytest.fixture(scope="module")
def sides(world: Path) -> list[Side]:
    return [Side(str(world / f"{kind}_index"), str(world / kind)) for kind in KINDS]


def similarities(query: Any, documents: Any, size: int) -> torch.Tensor:
    """The formulas: the cosine; of several vectors, the sum of each query vector's largest."""
    if isinstance(documents, torch.Tensor):
        return torch.nn.functional.cosine_similarity(query[:, :size], documents[:, :size])
    first, *others = [item[:, :size] for item in (*query.split(), *documents.split())]
    return slow_maxsim([first], others)[0]


@pytest.mark.parametrize("dimension", [32, None])
@pytest.mark.parametrize(("text", "image"), [("a caption", None), (None, "1.png"), ("a caption", "2.png")])
def test_what_is_found_is_nearest(
    text: str | None, image: str | None, dimension: int | None, sides: list[Side], world: Path
) -> None:
    query = question(text, image and world / image)
    scores = []
    for side in sides:
        size = dimension or side.index.dimension
        items = [side.documents[row] for row in range(len(side.documents))]
        expected = similarities(side.engine.encode([query], "query"), side.engine.encode(items, "document"), size)
        hits = side.find(query, size, 4)
        # float32, and batches of other sizes; MaxSim adds up some ten cosines.
        near = partial(pytest.approx, abs=1e-4 if side.index.is_multi_vector else 1e-5)
        assert [score for *_, score in hits] == near(expected.sort(descending=True).values[:4].tolist())
        assert all(expected[row].item() == near(score) for row, _, score in hits)
        assert [name for _, name, _ in hits] == [side.index.ids[row].as_py() for row, *_ in hits]
        scores.append([score for *_, score in hits])
    assert scores[0] != scores[1] or text is image


def test_documents_are_shown_as_they_are_and_small(sides: list[Side]) -> None:
    shown = sides[0].answer("caption", None, 64, 6)
    assert shown.count("<li>") == 6
    assert shown.count("<img") == 3
    assert "<script" not in shown
    assert "{" not in shown
    assert "many words …" in shown
    assert ".png" not in shown
    assert max(Image.open(BytesIO(b64decode(sides[0]._content(5).split("base64,")[1].split('"')[0]))).size) == 320


@pytest.mark.parametrize("kind", ["nothing", "spaces", "broken", "text only", "changed"])
def test_what_cannot_be_answered_is_said_on_the_page(
    kind: str, sides: list[Side], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, text = world / "0.png", " " if kind == "spaces" else None
    if kind == "broken":
        image = tmp_path / "broken.png"
        image.write_bytes(b"no image")
    if kind == "text only":
        monkeypatch.setattr(sides[0].engine, "encoder", None)
        monkeypatch.setattr(type(sides[0].engine.served), "modalities", ["text"])
    if kind == "changed":
        sides = [Side(str(world / "one_index"), str(world / "one"))]
        monkeypatch.setattr(sides[0].documents, "_place", lambda row: 0)
    shown = sides[0].answer(text, None if kind in ("nothing", "spaces") else str(image), 64, 6)
    reason = {"broken": "The query", "text only": "reads no image", "changed": "has changed since"}.get(kind, "Type a")
    assert 'role="note"' in shown if kind == "changed" else shown.startswith('<p class="message" role="alert">')
    assert reason in shown


@pytest.mark.parametrize(
    "other", [{"query": "x"}, {"dimension": 32}, {"other_index": "one_index"}, {"page": "false", "other_model": "one"}]
)
def test_options_that_the_page_does_not_take_are_refused(other: dict[str, Any], world: Path, capsys: Any) -> None:
    pytest.importorskip("gradio")
    options = {"index": "one_index", "model": "one", "page": "true", **other}
    with pytest.raises((ValueError, SystemExit)) as refused:
        main(["search", *(f"--{name}={value}" for name, value in options.items())])
    assert "other_index and other_model go" in f"{refused.value}{capsys.readouterr().err}"


def test_without_gradio_it_says_what_to_install(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises((ValueError, SystemExit)) as refused:
        main(["search", "--index", str(world / "one_index"), "--model", str(world / "one"), "--page", "true"])
    assert 'pip install "vlmembed[page]"' in f"{refused.value}{capsys.readouterr().err}"


@pytest.fixture
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser's tests need playwright (the test extra)")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("the browser's tests need chromium or google-chrome on the path")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_a_question_is_answered_in_a_browser(browser: Any, sides: list[Side], tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio (the page extra)")
    made = make_page(sides[1:], 100)  # The second has several vectors an item.
    _, url, _ = launch(made, prevent_thread_lock=True, quiet=True)
    try:
        tab, requests, complaints = browser.new_page(), [], []
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(url)
        tab.get_by_label("Question").fill("a caption")
        tab.get_by_label("Question").press("Enter")
        tab.wait_for_function("document.querySelectorAll('.hits').length == 2")
        assert tab.locator(".hits").first.locator("li").count() == 6
        assert tab.locator(".hits").first.locator("b").all_inner_texts() == [*"123456"]
        assert tab.evaluate("[...document.querySelectorAll('.hits img')].every(image => image.naturalWidth > 0)")
        texts = tab.locator(".hits").first.locator("p").all_text_contents()
        assert {*TEXTS[:2]} <= {*texts}
        for column, hits in enumerate(tab.locator(".hits").all()):
            before = hits.inner_html()
            tab.get_by_label("32", exact=True).nth(column).check()
            changed = "all.length == 2 && all[column].innerHTML != before"
            tab.wait_for_function(
                f"([column, before]) => {{ const all = document.querySelectorAll('.hits'); return {changed} }}",
                arg=[column, before],
            )
        (tmp_path / "broken.png").write_bytes(b"no image")
        tab.locator("input[type=file]").set_input_files(tmp_path / "broken.png")
        tab.wait_for_function("document.querySelectorAll('[role=alert].message').length == 2")
    finally:
        made.close()
    local = ("data:", "blob:", url)
    assert [address for address in requests if not address.startswith(local)] == []
    assert complaints == []
