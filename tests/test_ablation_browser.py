"""The report of an ablation, opened from disk in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
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
    own = (folder / "report.html").as_uri()
    assert {url for url in requests if not url.startswith("data:")} == {own}
    assert complaints == []


def column(page: Any, number: int) -> list[str]:
    """What the first table sorts a column by, from top to bottom."""
    rows = "[...document.querySelector('tbody').rows]"
    return page.evaluate(f"number => {rows}.map(row => row.children[number].dataset.value)", number)


def test_a_click_sorts_and_the_next_one_turns(opened: Any) -> None:
    page = opened()
    heading = page.locator("thead th").nth(8)
    assert heading.inner_text().startswith("s per step")
    before = column(page, 8)
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert column(page, 8) == sorted(before, key=float) != before
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(page, 8) == sorted(before, key=float, reverse=True)
    assert page.locator("table").first.locator("[aria-sort]").count() == 1


def test_the_keyboard_sorts_and_what_is_missing_stays_last(opened: Any) -> None:
    page = opened()
    button = page.locator("thead th").nth(4).locator("button")
    for _ in range(2):
        button.focus()
        page.keyboard.press("Enter")
        assert column(page, 4)[-1] == ""
    values = [float(value) for value in column(page, 4)[:-1]]
    assert values == sorted(values)
    page.locator("thead th").nth(1).locator("button").click()
    assert column(page, 1) == sorted(column(page, 1), key=str.casefold)


def test_two_settings_can_be_chosen(opened: Any) -> None:
    page = opened()
    assert page.locator(".query").count() == 6
    assert page.locator("#second option:checked").inner_text().startswith("mean (")
    page.select_option("#first", label="first (seed 0)")
    headings = page.locator(".query").first.locator("h4").all_inner_texts()
    assert [heading.split(":")[0] for heading in headings] == ["first", "mean"]
    scores = [
        [float(text.rsplit(" ", 1)[1]) for text in query.locator("h4").all_inner_texts()]
        for query in page.locator(".query").all()
    ]
    gaps = [abs(first - second) for first, second in scores]
    # Shown with three figures.
    assert all(before >= after - 0.0011 for before, after in pairwise(gaps))
    assert page.locator(".query").first.locator("li").count() == 10
    assert page.locator("li.right", has_text="✓ right").count() == page.locator("li.right").count() > 0
    page.locator("#more").click()
    assert page.locator(".query").count() == 12


def test_pictures_are_shown_and_named(opened: Any) -> None:
    page = opened()
    images = page.locator("#queries img")
    assert images.count() > 10
    images.first.scroll_into_view_if_needed()
    images.first.evaluate("image => image.decode()")
    assert images.first.evaluate("image => image.naturalWidth") == 160
    assert all(
        re.fullmatch(r"Document doc \d+, (not an|right) answer", image.get_attribute("alt")) for image in images.all()
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_screen(opened: Any, width: int, scheme: str) -> None:
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    text, ground = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (text < ground) == (scheme == "light")


def test_the_first_column_stays_in_sight_on_a_phone(opened: Any) -> None:
    page = opened(390)
    page.locator(".box").first.evaluate("box => box.scrollLeft = 600")
    name = page.locator("tbody th").first.bounding_box()
    assert 0 <= name["x"] < 40
