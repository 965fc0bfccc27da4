"""The report of an ablation: one page that needs nothing else, and the same numbers as Markdown and CSV."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from vlmembed.ablation.plan import read_ablation
from vlmembed.ablation.record import content_path
from vlmembed.ablation.run import Trial, read_trials
from vlmembed.ablation.statistics import ALPHA, PairwiseComparison, compare, seed_variance
from vlmembed.files import read_json, write_whole

#: Of each cost, the heading of its column, how it is written, and its divisor.
COSTS = {
    "seconds_per_step": ("s per step", "{:.3g}", 1),
    "peak_memory_bytes": ("peak MiB", "{:,.0f}", 2**20),
    "trained_parameters": ("trained parameters", "{:,.0f}", 1),
    "pooling_parameters": ("of the pooling", "{:,.0f}", 1),
    "document_bytes": ("bytes per document", "{:,.0f}", 1),
    "search_seconds": ("ms per search", "{:.3g}", 1e-3),
}
#: Queries shown of each kind, characters of a query or document, and positives of a query.
QUERIES, CHARACTERS, POSITIVES = 4, 300, 4
#: Colours of the first settings in charts, and characters of a name there.
COLOURS, LONGEST = ["#3f83d6", "#d9782d", "#2f9e77", "#a266c9", "#a98b00", "#d2568b"], 28
#: A colour that stands for the page's own text colour while matplotlib draws.
INK = "#010203"
CHART_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3},
    **{"legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "vlmembed", "text.parse_math": False},
}


class Summary:
    """An ablation, as far as it has come: its output folder read, and its settings compared."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ablation = folder, read_ablation(folder / "ablation.yaml")
        known = {(name_of(trial.setting), trial.seed): trial for trial in read_trials(folder)}
        planned = [(name_of(setting), seed) for setting in self.ablation.settings for seed in self.ablation.seeds]
        #: The trials that were asked for and have ended; in the end the best setting's first.
        self.ended = [known[key] for key in planned if key in known]
        self.missing = [f"“{name}” (seed {seed})" for name, seed in planned if (name, seed) not in known]
        self.surplus = len(known) - len(self.ended)
        #: The evaluation set of the metric that settings are compared by, and a row (setting, seed), a column query.
        self.evaluation, self.scores = "", pd.DataFrame()
        self.pairs: dict[tuple[int, int], PairwiseComparison] = {}
        if self.finished:
            self.evaluation, scores = read_scores(self.ablation.metric, self.finished)
            ranks = scores.mean(axis=1).groupby(level=0).mean().rank(ascending=False, method="first")
            self.ended.sort(key=lambda trial: ranks.get(name_of(trial.setting), len(planned)))
            self.scores = scores.loc[[*self.settings]]
            self.pairs = compare(self.arrays)

    @property
    def finished(self) -> list[Trial]:
        """The trials that the rows of the scores are of."""
        return [trial for trial in self.ended if trial.status == "finished"]

    @property
    def settings(self) -> dict[str, Mapping[str, str]]:
        """The settings with a finished trial by name, best first."""
        return {name_of(trial.setting): trial.setting for trial in self.finished}

    @property
    def arrays(self) -> list[np.ndarray]:
        """The scores of each setting: a row per seed and a column per query."""
        return [table.to_numpy() for _, table in self.scores.groupby(level=0, sort=False)] if self.finished else []

    def baseline_of(self, name: str) -> str | None:
        """Return what a setting is compared to: the baseline's labels, and the setting's own where that has none."""
        baseline = name_of({**self.settings[name], **self.ablation.baseline})
        return baseline if self.ablation.baseline and baseline in self.settings else None


def write_report(folder: Path) -> Path:
    """Write ``report.html``, ``report.csv`` and ``report.md`` of an output folder, and return the path of the first."""
    summary = Summary(folder)
    numbers, ablation, tables = numbers_table(summary), summary.ablation, dict[str, pd.DataFrame]()
    if summary.finished:
        # A number behind a name is the dimension that embeddings were cut to.
        metrics = numbers[[name for name in numbers if "/" in name]].map("{:.4f}".format).replace("nan", "–")
        tables = {"Settings": settings_table(summary, numbers), "All metrics, means over seeds": metrics}
    title, notes = f"Ablation of {' and '.join(ablation.grid)}", _notes(summary)
    loader = FileSystemLoader([Path(__file__).parent, Path(__file__).parent.parent])
    # Whatever comes from data is escaped.
    environment = Environment(autoescape=True, loader=loader, undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template("report.html.jinja").render(
        title=title,
        notes=notes,
        tables={name: Markup(table.rename_axis("setting", axis=1).to_html(border=0)) for name, table in tables.items()},
        chart=_chart(summary, numbers) if summary.finished else "",
        queries=_shown_queries(summary),
        errors={f"{name_of(trial.setting)}, seed {trial.seed}": trial.error for trial in summary.ended if trial.error},
        ablation=replace(ablation, base=Path(relpath(ablation.base, folder.resolve())), output_dir=Path(".")),
        versions=[f"{name} {version(name)}" for name in ("vlmembed", "torch", "transformers", "lightning", "scipy")],
        alpha=ALPHA,
    )
    labels = pd.DataFrame([*summary.settings.values()], numbers.index, [*ablation.grid])
    write_whole(folder / "report.csv", pd.concat([labels, numbers], axis=1).to_csv(index=False).encode())
    write_whole(folder / "report.md", _markdown(title, notes, tables).encode())
    write_whole(folder / "report.html", page.encode())
    return folder / "report.html"


def name_of(setting: Mapping[str, str]) -> str:
    """Return what a setting is called: its labels, in the order of the axes."""
    return " · ".join(setting.values())


def read_scores(metric: str, trials: Sequence[Trial]) -> tuple[str, pd.DataFrame]:
    """Read a metric by its logged name: the evaluation set, and a row per trial with a column per query."""
    name, rows = metric.partition("/")[2], dict[tuple[str, int], pd.Series]()
    for trial in trials:
        measured, columns = trial.folder / "measured", dict[tuple[str, str], pd.Series]()
        for path in measured.rglob("per_query.csv"):
            # Ids such as 007 and NA are texts.
            reading: Any = {"index_col": "query", "dtype": {"query": str}, "keep_default_na": False}
            table = pd.read_csv(path, float_precision="round_trip", **reading).astype(float)
            columns |= {(path.parent.relative_to(measured).as_posix(), column): table[column] for column in table}
        meant = [key for key in columns if name in (key[1], "/".join(key))]
        if len(meant) != 1:
            known = sorted(map("/".join, columns))
            raise ValueError(f"{measured}: metric {metric!r} means {len(meant)} of the columns, which are {known}")
        rows[name_of(trial.setting), trial.seed] = row = columns[meant[0]]
        if list(row.index) != list(next(iter(rows.values())).index):
            raise ValueError(f"{measured / meant[0][0]}: other queries than in {trials[0].folder}, so not comparable")
    return meant[0][0], pd.DataFrame(rows).T


def numbers_table(summary: Summary) -> pd.DataFrame:
    """Make a row per setting, best first, with all figures of all values."""
    if not summary.finished:
        return pd.DataFrame()
    names, index = list(summary.settings), summary.scores.index
    means = summary.scores.mean(axis=1).groupby(level=0, sort=False)
    numbers = means.agg(mean="mean", standard_deviation="std", least="min", most="max")
    numbers.insert(0, "seeds", [" ".join(str(seed) for _, seed in values.index) for _, values in means])
    numbers.insert(0, "rank", range(1, len(names) + 1))
    parts = [numbers]
    for title in ("best", "baseline"):
        table = pd.DataFrame(index=names, columns=["difference", "low", "high", "p", "verdict"])
        for rank, name in enumerate(names):
            other = names[0] if title == "best" else summary.baseline_of(name)
            if other and (pair := summary.pairs.get((rank, names.index(other)))):
                low, high = pair.difference - pair.margin, pair.difference + pair.margin
                table.loc[name] = [pair.difference, low, high, pair.corrected, pair.verdict]
        parts.append(table.add_prefix(f"{title}_"))
    # The median of costs, because a trial that was disturbed should not count.
    costs = pd.DataFrame([trial.cost for trial in summary.finished], index).reindex(columns=[*COSTS])
    metrics = pd.DataFrame([trial.metrics for trial in summary.finished], index)
    parts += [costs.groupby(level=0, sort=False).median(), metrics.groupby(level=0, sort=False).mean()]
    return pd.concat(parts, axis=1)


def settings_table(summary: Summary, numbers: pd.DataFrame) -> pd.DataFrame:
    """Write the main table's texts, which are the same in HTML and in Markdown."""
    rows = {}
    for name, row in numbers.to_dict("index").items():
        spread = f"±{row['standard_deviation']:.4f}, n {len(row['seeds'].split())}".replace("±nan, ", "")
        # Time stands beside quality, the other costs at the end.
        texts = {"rank": str(row["rank"]), summary.ablation.metric: f"{row['mean']:.4f}"}
        texts |= {"over seeds": spread, "s per step": "–"}
        for title in ("best", "baseline"):
            difference, high, p, verdict = (row[f"{title}_{part}"] for part in ("difference", "high", "p", "verdict"))
            texts |= {f"to the {title}": "–", f"p, {title}": "–"}
            if isinstance(verdict, str):
                texts[f"to the {title}"] = f"{difference:+.4f} ± {high - difference:.4f}".replace("-", "−")
                texts[f"p, {title}"] = f"{'<0.001' if p < 0.001 else f'{p:.3f}'}, {verdict}"
        for cost, (heading, form, divisor) in COSTS.items():
            texts[heading] = form.format(row[cost] / divisor).replace("nan", "–")
        rows[f"{name} (baseline)" if summary.baseline_of(name) == name else name] = texts
    table = pd.DataFrame.from_dict(rows, orient="index")
    same = table["to the baseline"].equals(table["to the best"])
    # A column without a comparison says nothing, nor does one that repeats another.
    return table[[name for name in table if set(table[name]) != {"–"} and not (same and name.endswith("baseline"))]]


def _notes(summary: Summary) -> list[str]:
    """Say what came out, how far the ablation has come, and what a reader must know before believing the numbers."""
    arrays, names, jobs = summary.arrays, list(summary.settings), summary.ablation.jobs
    finished, hours = len(summary.finished), sum(trial.seconds for trial in summary.ended) / 3600
    planned, failed = len(summary.ended) + len(summary.missing), len(summary.ended) - finished
    lead = "No trial has finished yet."
    if finished:
        lead = (
            f"The best is “{names[0]}”: {summary.ablation.metric} {arrays[0].mean():.4f}, over {len(arrays[0])} seeds "
        )
        lead += f"and {arrays[0].shape[1]} queries."
        close = [f"“{names[j]}”" for (i, j), pair in summary.pairs.items() if not i and pair.verdict == "within noise"]
        lead += f" Within noise of it: {', '.join(close) or 'no other'} ({len(close)} of {len(names) - 1} others)."
    counts, deviation = [len(array) for array in arrays], seed_variance(arrays)[0] ** 0.5
    few = [f"“{name}”" for name, count in zip(names, counts, strict=True) if count < max(counts)]
    notes = {
        f"{finished} of {planned} trials finished, in {hours:.2f} hours.": True,
        f"{failed} failed; report.html has the errors.": failed,
        f"{len(summary.missing)} not there yet: {', '.join(summary.missing)}.": summary.missing,
        f"{summary.surplus} more in the folder, which the configuration does not ask for, left out.": summary.surplus,
        "One setting alone: there is nothing to compare it with.": len(counts) == 1,
        "One seed each: whether training again would give the same order is not known.": max(counts, default=0) == 1,
        f"Another seed moves a trial’s mean by {deviation:.4f} (standard deviation over all settings).": deviation,
        f"Fewer seeds than the others: {', '.join(few)}.": few,
        f"Up to {jobs} trials at once: on one machine they disturb each other’s times.": jobs > 1,
    }
    return [lead, *(note for note, is_met in notes.items() if is_met)]


def _shown_queries(summary: Summary) -> dict[str, list[dict[str, Any]]]:
    """Show what single queries find: where settings differ most, the best, and the worst.

    Shown are the best setting, the baseline, and those with the highest and the lowest score of the query, each by its
    first finished seed.
    """
    names, documents = list(summary.settings), summary.folder / "documents"
    first = {name_of(trial.setting): trial.folder for trial in reversed(summary.finished)}
    paths = [first[name] / "measured" / summary.evaluation / "top.json" for name in names]
    tops = [read_json(path) if path.exists() else {} for path in paths]
    recorded = [query for query in summary.scores if all(query in top for top in tops)]
    if not recorded:
        return {}
    scores = summary.scores[recorded].groupby(level=0, sort=False).first().to_numpy()  # (K, Q)
    baseline = names.index(summary.baseline_of(names[0]) or names[0])
    mean, spread = scores.mean(0), np.ptp(scores, axis=0)
    kinds = {"Queries on which settings differ most": -spread, "Best queries": -mean, "Worst queries": mean}
    shown: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for kind, key in kinds.items():
        for column in np.argsort(key, kind="stable")[:QUERIES].tolist():
            query, values, sides = recorded[column], scores[:, column], []
            corpus, relevant = documents / summary.evaluation, [*tops[0][query]["relevant"]]
            for index in sorted({0, baseline, int(values.argmax()), int(values.argmin())}):
                top = [(_content(corpus, name), score, grade) for name, score, grade in tops[index][query]["top"]]
                sides.append((f"{names[index]}: {values[index]:.3f}", top))
            positives = [_content(corpus, name) for name in relevant[:POSITIVES]]
            asked = _content(documents / "queries" / summary.evaluation, query)
            shown[kind].append({"asked": asked, "positives": positives, "count": len(relevant), "sides": sides})
    return shown


def _content(folder: Path, name: str) -> dict[str, str]:
    """Read what can be shown of a document or query: an image, and a text, which is its id where it has neither."""
    image, text = (content_path(folder, name, kind) for kind in ("jpg", "txt"))
    data = base64.b64encode(image.read_bytes()).decode() if image.exists() else ""
    words = text.read_text(encoding="utf-8") if text.exists() else "" if data else name
    words = words if len(words) <= CHARACTERS else f"{words[: CHARACTERS - 1]}…"
    return {"id": name, "image": f"data:image/jpeg;base64,{data}" if data else "", "text": words}


@rc_context(CHART_STYLE)
def _chart(summary: Summary, numbers: pd.DataFrame) -> Markup:
    """Draw quality with its intervals, quality against cost, and learning: inline SVG in the page's colours."""
    metric, names, pairs = summary.ablation.metric, list(summary.settings), summary.pairs
    logs = [pd.read_csv(trial.folder / "metrics.csv").assign(name=name_of(trial.setting)) for trial in summary.finished]
    log = pd.concat(logs)
    validation = validation_name(metric, [*log])
    heights = [0.9 + 0.3 * len(names), 4, 4][: 3 if validation else 2]
    figure = Figure(figsize=(7, sum(heights)), layout="constrained")
    quality, cost, *learning = figure.subplots(len(heights), height_ratios=heights)
    margins = [pairs[index, 0].margin if index else 0.0 for index in range(len(names))]
    quality.errorbar(numbers["mean"], range(len(names)), xerr=margins, fmt="o", color=INK, markersize=5, capsize=3)
    labels = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
    quality.set_yticks(range(len(names)), labels)
    quality.invert_yaxis()
    quality.set_xlabel(metric)
    cost.set(xlabel="seconds per training step", ylabel=metric)
    for index, (name, array) in enumerate(zip(names, summary.arrays, strict=True)):
        quality.plot(array.mean(1), [index] * len(array), "o", color=COLOURS[0], markersize=4, alpha=0.7)
        # The first settings are in colour.
        style: Any = {"color": INK, "alpha": 0.3}
        if index < len(COLOURS):
            style = {"color": COLOURS[index], "label": labels[index]}
        cost.plot(*numbers.loc[name, ["seconds_per_step", "mean"]], "o", **style)
        for axes in learning:
            axes.set(xlabel="training step", ylabel=validation)
            curve = log[log["name"] == name].groupby("step")[validation].agg(["mean", "min", "max"]).dropna()
            axes.plot(curve.index, curve["mean"], ".-", **style)
            axes.fill_between(curve.index, curve["min"], curve["max"], alpha=0.1, color=style["color"], linewidth=0)
    figure.legend(*cost.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    title = f"{metric} of each setting, best first; {metric} by seconds per training step"
    return to_svg(figure, title + (f"; {validation} by training step" if validation else ""))


def validation_name(metric: str, logged: Sequence[str]) -> str:
    """Return the logged validation metric that is closest: the same name under ``val/``, or the same measure."""
    rest = metric.partition("/")[2]
    measure = next(part for part in reversed(rest.split("/")) if not part.isdecimal())
    others = [name for name in logged if name.startswith("val/") and name.endswith(f"/{measure}")]
    return next((name for name in (f"val/{rest}", f"val/{measure}", *others) if name in logged), "")


def to_svg(figure: Figure, title: str) -> Markup:
    """Write a figure as inline SVG; the title is for those who do not see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    head, body = file.getvalue().split("<svg", 1)[1].split(">", 1)
    view = head[head.index("viewBox") :].split(" xmlns")[0]  # The width is the page's.
    return Markup(f'<svg {view} role="img" aria-label="{html.escape(title)}">{body.replace(INK, "currentColor")}')


def _markdown(title: str, notes: Sequence[str], tables: Mapping[str, pd.DataFrame]) -> str:
    """Write the notes and the tables."""
    blocks = [f"# {plain(title)}", *map(plain, notes)]
    for heading, table in tables.items():
        rows = [["setting", *table], ["---"] * (1 + table.shape[1])]
        rows += [[plain(cell) for cell in row] for row in table.itertuples(name=None)]
        blocks += [f"## {heading}", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    return "\n\n".join(blocks) + "\n"


def plain(text: str) -> str:
    """Escape a text for Markdown, on one line: it shows as it is."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\`*_\[\]|#~$]", lambda mark: f"\\{mark.group()}", line)
