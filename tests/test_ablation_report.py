"""The report of an ablation: its numbers, in all three forms, and what it says of what is missing."""

from __future__ import annotations

import html
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ablation_folders import (
    HOSTILE,
    POOLINGS,
    QUERIES,
    SEEDS,
    build,
    build_unfinished,
    configure,
    trial_folder,
    write_trial,
)

from vlmembed.ablation.record import content_path
from vlmembed.ablation.report import validation_name, write_report
from vlmembed.ablation.statistics import compare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_unfinished(tmp_path_factory.mktemp("trials") / "pooling")


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text()


def numbers(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "report.csv", index_col="pooling", float_precision="round_trip")


def scores_of(folder: Path) -> dict[str, np.ndarray]:
    scores = {}
    for pooling in POOLINGS:
        paths = [trial_folder(folder, pooling, seed) / "measured" / "numbers" / "per_query.csv" for seed in SEEDS]
        scores[pooling] = np.array([pd.read_csv(path)["ndcg@10"] for path in paths if path.exists()])
    return scores


def test_numbers_are_those_of_the_trials(folder: Path) -> None:
    """Means, spread, and for all pairs what `compare` says."""
    scores, table = scores_of(folder), numbers(folder)
    assert list(table.index) == sorted(scores, key=lambda pooling: -scores[pooling].mean())
    names, expected = list(table.index), compare([scores[pooling] for pooling in table.index])
    for index, (pooling, row) in enumerate(table.iterrows()):
        assert row["rank"] == index + 1
        assert row["mean"] == pytest.approx(scores[pooling].mean())
        assert row["standard_deviation"] == pytest.approx(scores[pooling].mean(1).std(ddof=1))
        assert row["least"] == pytest.approx(scores[pooling].mean(1).min())
        for other, name in ((0, "best"), (names.index("mean"), "baseline")):
            if index == other:
                assert row.filter(like=f"{name}_").isna().all()
                continue
            pair = expected[index, other]
            ends = [pair.difference - pair.margin, pair.difference + pair.margin]
            assert row[[f"{name}_low", f"{name}_high"]].tolist() == pytest.approx(ends)
            assert row[f"{name}_difference"] == pytest.approx(scores[pooling].mean() - scores[names[other]].mean())
            assert row[f"{name}_p"] == pytest.approx(pair.corrected)
            assert (row[f"{name}_verdict"] == "within noise") == (pair.corrected >= 0.05)
    assert set(table["best_verdict"].dropna()) == {"worse", "within noise"}
    assert table.loc["first", "seeds"] == "0 2"
    assert table.loc["mean", "seconds_per_step"] == pytest.approx(0.205 * 1.01)  # the median of three


def tables(page: str) -> list[list[list[str]]]:
    """The texts of the tables of a page."""
    rows = [re.findall(r"<tr.*?</tr>", table, re.DOTALL) for table in re.findall(r"<table.*?</table>", page, re.DOTALL)]
    return [
        [[html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in table] for table in rows
    ]


def sheets(text: str) -> list[list[list[str]]]:
    """The texts of the tables of a Markdown file, read as GitHub does: cells part at bars that nothing escapes."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    rows = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block] for block in blocks]
    return [[[html.unescape(re.sub(r"\\(.)", r"\1", cell.strip())) for cell in row] for row in block] for block in rows]


def test_three_forms_hold_the_same_numbers(folder: Path, page: str) -> None:
    pages, marked, sheet = tables(page), sheets((folder / "report.md").read_text()), numbers(folder)
    assert [[head, *rows] for head, _, *rows in marked] == pages
    headings = ["setting", "rank", "test/ndcg@10", "over seeds", "s per step", "to the best", "p, best"]
    headings += ["to the baseline", "p, baseline", "peak MiB", "trained parameters", "of the pooling"]
    headings += ["bytes per document", "ms per search"]
    assert pages[0][0] == headings
    for row, (name, line) in zip(pages[0][1:], sheet.iterrows(), strict=True):
        texts = dict(zip(headings, row, strict=True))
        assert row[:3] == [f"{name} (baseline)" if name == "mean" else name, str(line["rank"]), f"{line['mean']:.4f}"]
        assert texts["over seeds"] == f"±{line['standard_deviation']:.4f}, n {len(line['seeds'].split())}"
        assert float(texts["s per step"]) == pytest.approx(line["seconds_per_step"], abs=5e-4)
        assert texts["trained parameters"] == f"{line['trained_parameters']:,.0f}"
        if name != "mean":
            margin = line["baseline_high"] - line["baseline_difference"]
            assert texts["to the baseline"].replace("−", "-") == f"{line['baseline_difference']:+.4f} ± {margin:.4f}"
            assert texts["p, baseline"].endswith(line["baseline_verdict"])
    for row, (name, line) in zip(pages[1][1:], sheet.iterrows(), strict=True):
        assert row == [name, *(f"{line[metric]:.4f}" for metric in pages[1][0][1:])]


def test_names_cannot_break_the_page_and_it_loads_nothing(folder: Path, page: str) -> None:
    assert HOSTILE not in page
    assert "<script>alert" not in page + (folder / "report.md").read_text()
    assert page.count("<script") == page.count("</script") == 1
    addresses = re.findall(r"""(?:src|href|action)=["']([^"']*)""", page)
    assert addresses
    assert all(address.startswith(("#", "data:image/jpeg;base64,")) for address in addresses)
    assert not re.search(r"@import|https?://|\bfetch\(|XMLHttpRequest|import\(|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_it_says_how_far_the_ablation_has_come(folder: Path, page: str) -> None:
    for text in (page, (folder / "report.md").read_text()):
        assert "22 of 24 trials finished" in text
        assert "1 failed" in text
        assert "1 not there yet: “first” (seed 1)" in text
        assert "Fewer seeds than the others: “latent attention”, “first”" in text
    for text in ("RuntimeError: &lt;script&gt;", "class_path: vlmembed.pooling.Mean", "How to read this"):
        assert text in page


def test_headings_and_charts_are_for_every_reader(page: str) -> None:
    levels = [int(level) for level in re.findall(r"<h(\d)", page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    labels = re.findall(r'<svg viewBox="[^"]+" role="img" aria-label="([^"]+)"', page)
    assert [label.split("; ") for label in labels] == [
        [
            "test/ndcg@10 of each setting, best first",
            "test/ndcg@10 by seconds per training step",
            "val/ndcg@10 by training step",
        ]
    ]
    # Charts have the page's text colour, on its ground.
    assert "currentColor" in page
    assert "fill: #ffffff" not in page


def test_a_report_can_be_written_again(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("report.*")}
    assert write_report(folder) == folder / "report.html"
    assert {path.name: path.read_bytes() for path in folder.glob("report.*")} == before
    assert not list(folder.glob(".report*"))


def test_one_seed_and_one_setting(tmp_path: Path) -> None:
    text = write_report(build(tmp_path / "seed", seeds=[7])).read_text()
    assert "One seed each" in text
    assert numbers(tmp_path / "seed")["standard_deviation"].isna().all()
    text = write_report(build(tmp_path / "setting", poolings=["mean"], baseline=None)).read_text()
    assert "One setting alone" in text
    assert "to the best" not in text
    assert len(numbers(tmp_path / "setting")) == 1


def test_no_trial_yet(tmp_path: Path) -> None:
    configure(tmp_path, list(POOLINGS), SEEDS)
    text = write_report(tmp_path).read_text()
    assert "No trial has finished yet." in text
    assert "0 of 24 trials finished" in text


def test_trials_that_nobody_asked_for_are_left_out(tmp_path: Path) -> None:
    build(tmp_path, poolings=["mean", "last", "first"])
    configure(tmp_path, ["mean", "last"], [0, 1])
    assert "5 more in the folder" in write_report(tmp_path).read_text()
    assert numbers(tmp_path)["seeds"].to_dict() == {"last": "0 1", "mean": "0 1"}


def test_a_baseline_that_is_missing_or_the_best_is_not_shown(tmp_path: Path) -> None:
    build(tmp_path / "missing", poolings=["mean", "last", "first"])
    shutil.rmtree(trial_folder(tmp_path / "missing", "mean", 0).parent)
    assert "to the baseline" not in write_report(tmp_path / "missing").read_text()
    text = write_report(build(tmp_path / "best", poolings=["mean", "first"])).read_text()
    assert "to the best" in text
    assert "to the baseline" not in text
    row = numbers(tmp_path / "best").loc["first"]
    assert row["baseline_difference"] == row["best_difference"] < 0


def test_other_queries_and_an_unmeasured_metric_are_refused(tmp_path: Path) -> None:
    build(tmp_path, poolings=["mean", "last"])
    path, config = (
        trial_folder(tmp_path, "last", 1) / "measured" / "numbers" / "per_query.csv",
        tmp_path / "ablation.yaml",
    )
    text = path.read_text()
    path.write_text(text.replace("q7,", "q700,"))
    with pytest.raises(ValueError, match=r"last/seed-1/measured/numbers: other queries than in .*mean/seed-0"):
        write_report(tmp_path)
    path.write_text(text)
    config.write_text(config.read_text().replace("test/ndcg@10", "test/mrr@10"))
    with pytest.raises(ValueError, match=r"'test/mrr@10' means 0 of the columns, which are .*numbers/recall@1"):
        write_report(tmp_path)


def test_an_axis_that_the_baseline_leaves_open_is_matched(tmp_path: Path) -> None:
    """With two axes and a baseline of one, each setting has its own; an axis may be called like one of our columns."""
    configure(tmp_path, ["mean", "last"], [0], "mean")
    text = (tmp_path / "ablation.yaml").read_text()
    ranks = "  rank: {key: model.init_args.adapters, values: {small: 1, large: 2}}\n"
    (tmp_path / "ablation.yaml").write_text(f"{text}{ranks}")
    generator = np.random.default_rng(0)
    means = {("mean", "small"): 0.5, ("mean", "large"): 0.6, ("last", "small"): 0.7, ("last", "large"): 0.4}
    for (pooling, rank), mean in means.items():
        scores = generator.normal(mean, 0.1, QUERIES).clip(0, 1)
        write_trial(tmp_path / rank, {"pooling": pooling, "rank": rank}, 0, scores, generator)
        shutil.move(trial_folder(tmp_path / rank, pooling, 0), tmp_path / "settings" / f"{pooling}-{rank}" / "seed-0")
    write_report(tmp_path)
    rows = pd.read_csv(tmp_path / "report.csv").set_index(["pooling", "rank"])
    for rank in ("small", "large"):
        expected = rows.loc[("last", rank), "mean"] - rows.loc[("mean", rank), "mean"]
        assert rows.loc[("last", rank), "baseline_difference"] == pytest.approx(expected)
        assert np.isnan(rows.loc[("mean", rank), "baseline_difference"])


def test_queries_are_shown_where_settings_differ_and_at_both_ends(folder: Path, page: str) -> None:
    """By the first seed of each setting, with images, texts, and a mark for positives."""
    first = np.array([scores[0] for scores in scores_of(folder).values()])
    for heading, key in (("differ most", -np.ptp(first, axis=0)), ("Best", -first.mean(0)), ("Worst", first.mean(0))):
        section = re.split(r"<section>", page.split(heading)[1])[0]
        asked = re.findall(r'<figure><div class="shown">(q\d+)</div>', re.sub(r"\s*\n\s*", "", section))
        assert asked == [f"q{index}" for index in np.argsort(key, kind="stable")[:4]]
    assert re.search(r'<img src="data:image/jpeg;base64,[^"]+" alt="positive doc \d+">', page)
    assert re.search(r'<img src="data:image/jpeg;base64,[^"]+" alt="negative doc \d+">', page)


def test_a_query_is_shown_with_its_image_and_its_text(tmp_path: Path) -> None:
    build(tmp_path, poolings=["mean", "last"])
    asked = tmp_path / "documents" / "queries" / "numbers"
    asked.mkdir(parents=True)
    for index in range(QUERIES):
        shutil.copy(
            content_path(tmp_path / "documents" / "numbers", "doc 1", "jpg"), content_path(asked, f"q{index}", "jpg")
        )
        content_path(asked, f"q{index}", "txt").write_text(f"the same, but {index}")
    assert re.search(r'alt="query q(\d+)">the same, but \1</div>', write_report(tmp_path).read_text())


@pytest.mark.parametrize(
    ("metric", "names", "expected"),
    [
        ("test/ndcg@10", ["step", "val/ndcg@10", "val/recall@1"], "val/ndcg@10"),
        ("test/ndcg@10/32", ["val/ndcg@10/32", "val/ndcg@10"], "val/ndcg@10/32"),
        ("test/ndcg@10/32", ["val/ndcg@10"], "val/ndcg@10"),
        ("test/birds/ndcg@10", ["val/pages/ndcg@10", "val/birds/ndcg@10"], "val/birds/ndcg@10"),
        ("test/birds/ndcg@10", ["test/pages/ndcg@10", "val/pages/ndcg@10"], "val/pages/ndcg@10"),
        ("test/ndcg@10", ["train/loss", "val/recall@1"], ""),
    ],
)
def test_validation_is_what_comes_closest(metric: str, names: list[str], expected: str) -> None:
    assert validation_name(metric, names) == expected
