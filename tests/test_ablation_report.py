from __future__ import annotations

import csv
import re
import shutil
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from ablation_folders import (
    HOSTILE,
    POOLINGS,
    QUERIES,
    SEEDS,
    build,
    build_unfinished,
    configure,
    run_folder,
    write_run,
)

from vlmembed.ablation import answers as answers_module
from vlmembed.ablation.answers import most_telling
from vlmembed.ablation.curves import validation_name
from vlmembed.ablation.drawing import Scale, place_labels, spread
from vlmembed.ablation.report import write_report
from vlmembed.ablation.results import QUERY_FOLDER, document_path, per_query_path
from vlmembed.ablation.scatter import Point, pareto_front
from vlmembed.ablation.statistics import compare
from vlmembed.ablation.summary import summarize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_unfinished(tmp_path_factory.mktemp("runs") / "pooling")


class Tables(HTMLParser):
    """Collects the tables of a page: of each cell, what it shows and what it sorts by."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, str | None]]]] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self._cell: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        self.addresses += [given[name] or "" for name in ("src", "href", "xlink:href", "action") if name in given]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell, self._value = [], given.get("data-value")

    def handle_data(self, data: str) -> None:
        if self._cell is not None and data.strip():
            self._cell.append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            text, *notes = self._cell
            self.tables[-1][-1].append((" ".join([text, *(f"({note})" for note in notes)]), self._value))
            self._cell = None


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "report.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_markdown(folder: Path) -> list[list[list[str]]]:
    """Read the tables as GitHub would: cells part at bars that nothing escapes, entities and escapes are undone."""
    tables: list[list[list[str]]] = []
    before = ""
    for line in (folder / "report.md").read_text().splitlines():
        if line.startswith("| "):
            if not before.startswith("| "):
                tables.append([])
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            tables[-1].append([plain(cell) for cell in cells])
        before = line
    return [[table[0], *table[2:]] for table in tables]


def plain(cell: str) -> str:
    marks = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}
    return re.sub(r"\\(.)|&\w+;", lambda mark: mark.group(1) or marks[mark.group()], cell)


def test_the_numbers_are_those_of_the_runs(folder: Path) -> None:
    rows = {row["pooling"]: row for row in read_csv(folder)}
    scores = {}
    for pooling in POOLINGS:
        runs = [run_folder(folder, pooling, seed) for seed in SEEDS]
        files = [path for path in (per_query_path(run, "numbers") for run in runs) if path.exists()]
        scores[pooling] = np.array([[float(row["ndcg@10"]) for row in csv.DictReader(path.open())] for path in files])
    best = max(scores, key=lambda pooling: scores[pooling].mean())
    assert [row["pooling"] for row in read_csv(folder)] == sorted(scores, key=lambda each: -scores[each].mean())
    for pooling, own in scores.items():
        row = rows[pooling]
        assert float(row["mean"]) == pytest.approx(own.mean())
        assert float(row["standard_deviation"]) == pytest.approx(own.mean(1).std(ddof=1))
        assert float(row["least"]) == pytest.approx(own.mean(1).min())
        for other, name in ((best, "best"), ("mean", "baseline")):
            found = row[f"{name}_difference"]
            assert (found == "") == (pooling == other)
            assert float(found or 0) == pytest.approx(own.mean() - scores[other].mean(), abs=1e-12)
    assert rows["first"]["seeds"] == "0 2"
    assert float(rows["mean"]["seconds_per_step"]) == pytest.approx(0.205 * 1.01)  # the median of three


def test_intervals_and_p_values_are_those_of_all_pairs(folder: Path) -> None:
    summary = summarize(folder)
    assert summary.scores is not None
    expected = compare(summary.scores.settings)
    names = [row.name for row in summary.rows]
    for index, row in enumerate(read_csv(folder)):
        for other, name in ((0, "best"), (names.index("mean"), "baseline")):
            if index == other:
                assert row[f"{name}_p"] == row[f"{name}_verdict"] == ""
                continue
            margin = expected.margins[index, other]
            assert float(row[f"{name}_low"]) == pytest.approx(expected.differences[index, other] - margin)
            assert float(row[f"{name}_high"]) == pytest.approx(expected.differences[index, other] + margin)
            assert float(row[f"{name}_p"]) == expected.corrected[index, other]
            noise = expected.corrected[index, other] >= 0.05
            assert (row[f"{name}_verdict"] == "within noise") == noise
    verdicts = {row["best_verdict"] for row in read_csv(folder)}
    assert verdicts == {"", "worse", "within noise"}


def test_the_three_forms_hold_the_same_numbers(folder: Path) -> None:
    pages = Tables((folder / "report.html").read_text()).tables
    sheets, rows = read_markdown(folder), read_csv(folder)
    assert len(pages) == len(sheets) == 2
    for page, sheet in zip(pages, sheets, strict=True):
        assert [[text for text, _ in line] for line in page] == sheet
        assert len(page) == 1 + len(POOLINGS)
    keys = {
        "test/ndcg@10": "mean",
        "over seeds": "standard_deviation",
        "to the best": "best_difference",
        "p, best": "best_p",
        "to the baseline": "baseline_difference",
        "p, baseline": "baseline_p",
        "s per step": "seconds_per_step",
        "peak MiB": "peak_memory_bytes",
        "trained parameters": "trained_parameters",
        "of the pooling": "pooling_parameters",
        "bytes per embedding": "embedding_bytes",
    }
    headings = [text for text, _ in pages[0][0]]
    assert headings == ["rank", "pooling", *keys]
    for line, row in zip(pages[0][1:], rows, strict=True):
        assert [value for _, value in line] == [row["rank"], row["pooling"], *(row[key] for key in keys.values())]
        assert line[2][0] == f"{float(row['mean']):.4f}"
    for line, row in zip(pages[1][1:], rows, strict=True):
        assert [value for _, value in line[2:]] == [row[text] for text, _ in pages[1][0][2:]]


def test_names_cannot_break_the_page(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert HOSTILE not in page
    assert "<script>alert" not in page
    assert "<script>alert" not in (folder / "report.md").read_text()
    assert Tables(page).tags.count("script") == 2  # the answers, and the code that shows them
    assert page.count("</script") == 2


def test_the_page_loads_nothing(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert all(address.startswith(("#", "data:")) for address in Tables(page).addresses)
    assert not re.search(r"""url\(|@import|https?://|\bfetch\(|XMLHttpRequest|import\(""", page)
    assert "default-src 'none'" in page


def test_the_page_says_how_far_it_has_come(folder: Path) -> None:
    for form in ("report.html", "report.md"):
        text = (folder / form).read_text()
        assert "22 of 24 runs finished" in text
        assert "1 run failed" in text
        assert "1 run not there yet: “first” (seed 1)" in text
        assert "Fewer seeds than the others: “latent attention”, “first”" in text
        assert "RuntimeError: &lt;script&gt;" in text
        assert "How to read this" in text
        assert "all pairs" in text
        assert "Python 3" in text


def test_headings_are_in_order(folder: Path) -> None:
    levels = [int(tag[1]) for tag in Tables((folder / "report.html").read_text()).tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_every_figure_is_drawn_and_told(folder: Path) -> None:
    charts = re.findall(r'<svg class="chart"[^>]*role="img" aria-label="([^"]+)"', (folder / "report.html").read_text())
    subjects = ["val/ndcg@10 by training step", "test/ndcg@10 by embedding dimension"]
    subjects += ["test/ndcg@10 by seconds per training step", "test/ndcg@10 by bytes per embedding"]
    assert [chart.split(":")[0].split(".")[0] for chart in charts] == subjects
    assert all("attention, 4 queries" in chart for chart in charts)


def test_a_report_can_be_written_again(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("report.*")}
    assert write_report(folder) == folder / "report.html"
    assert {path.name: path.read_bytes() for path in folder.glob("report.*")} == before
    assert not list(folder.glob(".report*"))


def test_one_seed(tmp_path: Path) -> None:
    page = write_report(build(tmp_path, seeds=[7])).read_text()
    assert "One seed each" in page
    assert "no setting has two seeds" in page
    assert {row["standard_deviation"] for row in read_csv(tmp_path)} == {""}


def test_one_setting(tmp_path: Path) -> None:
    page = write_report(build(tmp_path, poolings=["mean"], baseline=None)).read_text()
    assert "One setting alone" in page
    assert "to the best" not in page
    assert 'id="answers"' not in page
    assert len(read_csv(tmp_path)) == 1


def test_no_run_yet(tmp_path: Path) -> None:
    configure(tmp_path, list(POOLINGS), SEEDS)
    page = write_report(tmp_path).read_text()
    assert "No run has finished yet." in page
    assert "0 of 24 runs finished" in page
    assert read_csv(tmp_path) == []


def test_runs_that_nobody_asked_for_are_left_out(tmp_path: Path) -> None:
    build(tmp_path, poolings=["mean", "last", "first"])
    configure(tmp_path, ["mean", "last"], [0, 1])
    assert "5 runs in the folder" in write_report(tmp_path).read_text()
    assert {row["pooling"]: row["seeds"] for row in read_csv(tmp_path)} == {"last": "0 1", "mean": "0 1"}


def test_a_baseline_that_has_not_finished_is_not_compared_with(tmp_path: Path) -> None:
    build(tmp_path, poolings=["mean", "last", "first"])
    for seed in SEEDS:
        shutil.rmtree(run_folder(tmp_path, "mean", seed))
    assert "to the baseline" not in write_report(tmp_path).read_text()


def test_a_baseline_that_is_the_best_is_not_shown_twice(tmp_path: Path) -> None:
    page = write_report(build(tmp_path, poolings=["mean", "first"])).read_text()
    assert "to the best" in page
    assert "to the baseline" not in page
    rows = read_csv(tmp_path)
    assert rows[1]["baseline_difference"] == rows[1]["best_difference"] != ""


def test_runs_measured_on_other_queries_are_refused(tmp_path: Path) -> None:
    build(tmp_path, poolings=["mean", "last"])
    path = per_query_path(run_folder(tmp_path, "last", 1), "numbers")
    path.write_text(path.read_text().replace("q7,", "q700,"))
    with pytest.raises(ValueError, match=r"last/seed-1/measured/numbers/per_query\.csv has other queries than"):
        write_report(tmp_path)


def test_a_metric_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    build(tmp_path, poolings=["mean"])
    path = tmp_path / "ablation.yaml"
    path.write_text(path.read_text().replace("test/ndcg@10", "test/mrr@10"))
    with pytest.raises(ValueError, match=r"'test/mrr@10' means 0 of the columns measured in .*numbers/recall@1"):
        write_report(tmp_path)


def test_an_axis_that_the_baseline_leaves_open_is_matched(tmp_path: Path) -> None:
    """With two axes and a baseline of one, each setting has its own: the same label on the other axis."""
    configure(tmp_path, ["mean", "last"], [0], "mean")
    text = (tmp_path / "ablation.yaml").read_text()
    rates = "  rate: {key: model.init_args.optimizer.init_args.lr, values: {small: 0.1, large: 0.2}}\n"
    (tmp_path / "ablation.yaml").write_text(f"{text}{rates}")
    generator = np.random.default_rng(0)
    means = {("mean", "small"): 0.5, ("mean", "large"): 0.6, ("last", "small"): 0.7, ("last", "large"): 0.4}
    for (pooling, rate), mean in means.items():
        scores = generator.normal(mean, 0.1, QUERIES).clip(0, 1)
        write_run(tmp_path / rate, {"pooling": pooling, "rate": rate}, 0, scores, generator)
        shutil.move(run_folder(tmp_path / rate, pooling, 0), tmp_path / "settings" / f"{pooling}-{rate}" / "seed-0")
    write_report(tmp_path)
    rows = {(row["pooling"], row["rate"]): row for row in read_csv(tmp_path)}
    for rate in ("small", "large"):
        expected = float(rows["last", rate]["mean"]) - float(rows["mean", rate]["mean"])
        assert float(rows["last", rate]["baseline_difference"]) == pytest.approx(expected)
        assert rows["mean", rate]["baseline_difference"] == ""


def test_pictures_end_where_the_room_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, poolings=["mean", "last"])
    monkeypatch.setattr(answers_module, "MOST_BYTES", 10_000)
    page = write_report(tmp_path).read_text()
    assert 0 < sum(map(len, re.findall(r"data:image/jpeg;base64,[^\"]+", page))) <= 10_000


def test_a_query_that_is_a_picture_is_shown(tmp_path: Path) -> None:
    build(tmp_path, poolings=["mean", "last"])
    first, *_ = (query["id"] for query in answers_module.answers(summarize(tmp_path))["queries"])
    asked = document_path(tmp_path / "documents" / QUERY_FOLDER, "numbers", first, "jpg")
    asked.parent.mkdir(parents=True)
    shutil.copy(document_path(tmp_path / "documents", "numbers", "doc 1", "jpg"), asked)
    queries = answers_module.answers(summarize(tmp_path))["queries"]
    assert [query["id"] for query in queries if query.get("image", "").startswith("data:image/jpeg")] == [first]


def test_every_pair_of_settings_has_its_most_telling_query_early() -> None:
    scores = np.random.default_rng(0).random((5, 100))
    scores[:, ::10] = 0.5
    order = most_telling(scores)
    assert sorted(order) == list(range(100))
    tops = {int(abs(scores[i] - scores[j]).argmax()) for i, j in combinations(range(5), 2)}
    assert set(order[: len(tops)]) == tops
    assert set(order[-10:]) == set(range(0, 100, 10))
    widest = [max(abs(scores[i, query] - scores[j, query]) for i, j in combinations(range(5), 2)) for query in order]
    assert widest[0] == max(widest)


def test_the_front_is_what_nobody_beats() -> None:
    generator = np.random.default_rng(0)
    points = [Point(str(n), "", *generator.integers(0, 12, 2).tolist()) for n in range(60)]
    expected = {
        point
        for point in points
        if not any(
            other.cost <= point.cost
            and other.quality >= point.quality
            and (other.cost, other.quality) != (point.cost, point.quality)
            for other in points
        )
    }
    front = pareto_front(points)
    assert set(front) == expected
    assert [point.cost for point in front] == sorted(point.cost for point in front)


@pytest.mark.parametrize(
    ("metric", "names", "expected"),
    [
        ("test/ndcg@10", ["step", "val/ndcg@10", "val/recall@1"], "val/ndcg@10"),
        ("test/ndcg@10/32", ["val/ndcg@10/32", "val/ndcg@10"], "val/ndcg@10/32"),
        ("test/ndcg@10/32", ["val/ndcg@10"], "val/ndcg@10"),
        ("test/birds/ndcg@10", ["val/pages/ndcg@10", "val/birds/ndcg@10"], "val/birds/ndcg@10"),
        ("test/birds/ndcg@10", ["test/pages/ndcg@10", "val/pages/ndcg@10"], "val/pages/ndcg@10"),
        ("test/ndcg@10", ["train/loss", "val/recall@1"], None),
    ],
)
def test_validation_is_what_comes_closest(metric: str, names: list[str], expected: str | None) -> None:
    assert validation_name(metric, names) == expected


def test_ticks_are_round_and_within() -> None:
    assert Scale(0.613, 0.998, 0, 1).ticks() == pytest.approx([0.7, 0.8, 0.9])
    assert Scale(0, 240, 0, 1).ticks() == pytest.approx([0, 50, 100, 150, 200])
    assert Scale(32, 128, 0, 100, logarithmic=True)(64) == pytest.approx(50)


def test_labels_stay_apart_and_in_order() -> None:
    places = [50.0, 51.0, 10.0, 99.0, 98.0, 50.5]
    moved = spread(places, 0, 100, 13)
    assert [index for index, _ in sorted(enumerate(moved), key=lambda pair: pair[1])] == [2, 0, 5, 1, 4, 3]
    assert np.diff(sorted(moved)).min() >= 13 - 1e-9
    assert 0 <= min(moved) <= max(moved) <= 100
    crowd = spread([50.0] * 30, 0, 100, 13)
    assert -1e-9 <= min(crowd) <= max(crowd) <= 100 + 1e-9


def test_labels_of_points_cover_nothing() -> None:
    generator = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in generator.uniform((50, 30), (440, 250), (25, 2))]
    labels = [label for label in place_labels(points, [("a longer name", "#1")] * 25, (46, 20, 480, 256)) if label]
    boxes = [label.box for label in labels]
    assert len(labels) > 15
    for a, b in combinations(boxes, 2):
        assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
    assert all(left >= 46 and top >= 20 and right <= 480 and bottom <= 256 for left, top, right, bottom in boxes)
