"""The report of an ablation, opened from disk in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ablation_folders import build_unfinished


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_unfinished(tmp_path_factory.mktemp("runs") / "pooling")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser's tests need playwright (the test extra)")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"the browser's tests need one of {', '.join(names)} on the path")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, folder: Path) -> Iterator[Any]:
    """Opens the report in a window of some width; at the end nothing may have gone out or gone wrong."""
    requests, complaints, contexts = [], [], []

    def open_page(width: int = 1280, scheme: str = "light") -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((folder / "report.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert {url for url in requests if not url.startswith("data:")} == {(folder / "report.html").as_uri()}
    assert complaints == []


def column(page: Any, number: int) -> list[str]:
    """The first table's texts in a column, from top to bottom."""
    rows = "[...document.querySelector('tbody').rows]"
    return page.evaluate(f"number => {rows}.map(row => row.children[number].textContent)", number)


def test_a_click_sorts_the_next_one_turns_and_what_is_missing_stays_last(opened: Any) -> None:
    page = opened()
    headings = page.locator("thead").first.locator("th")
    names = [text.split(" ↕")[0] for text in headings.all_inner_texts()]
    seconds, best = names.index("s per step"), names.index("to the best")
    before = column(page, seconds)
    for state, sign in (("ascending", 1), ("descending", -1)):
        headings.nth(seconds).locator("button").click()
        assert headings.nth(seconds).get_attribute("aria-sort") == state
        assert column(page, seconds) == sorted(before, key=lambda text: sign * float(text)) != before
    for sign in (1, -1):
        headings.nth(best).locator("button").focus()
        page.keyboard.press("Enter")
        *texts, last = column(page, best)
        assert last == "–"
        values = [float(text.split()[0].replace("−", "-")) for text in texts]
        assert values == sorted(values, key=lambda value: sign * value)
    assert page.locator("[aria-sort]").count() == 1
    headings.nth(0).locator("button").click()
    assert column(page, 0) == sorted(column(page, 0), key=str.casefold)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_screen(opened: Any, width: int, scheme: str) -> None:
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = "element => [getComputedStyle(element).color, getComputedStyle(document.body).backgroundColor]"
    for element in (page.locator("body"), page.locator("svg text").first):
        text, ground = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in element.evaluate(colours))
        assert (text < ground) == (scheme == "light")
    page.locator(".box").first.evaluate("box => box.scrollLeft = 600")
    assert 0 <= page.locator("tbody th").first.bounding_box()["x"] < 40
    image = page.locator("img").first
    image.scroll_into_view_if_needed()
    assert image.evaluate("image => image.naturalWidth") == 160
