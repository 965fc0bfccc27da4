"""The report of an ablation: one page that needs nothing else, and the same numbers as Markdown and CSV."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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

from vlmembed.ablation.plan import Ablation, read_ablation
from vlmembed.ablation.record import content_path
from vlmembed.ablation.run import Trial, read_trials
from vlmembed.ablation.statistics import ALPHA, PairwiseComparison, compare, seed_variance
from vlmembed.files import write_whole

#: Of each cost, the heading of its column, how it is written, and its divisor.
COSTS = {
    "seconds_per_step": ("s per step", "{:.3g}", 1),
    "peak_memory_bytes": ("peak MiB", "{:,.0f}", 2**20),
    "trained_parameters": ("trained parameters", "{:,.0f}", 1),
    "pooling_parameters": ("of the pooling", "{:,.0f}", 1),
    "embedding_bytes": ("bytes per embedding", "{:,.0f}", 1),
}
#: Queries shown of each kind, characters of a query or document, and positives of a query.
QUERIES, CHARACTERS, POSITIVES = 4, 300, 4
#: Colours of the first settings in charts, characters of a name there, and points of a line without markers.
COLOURS, LONGEST, MARKERS = ["#3f83d6", "#d9782d", "#2f9e77", "#a266c9", "#a98b00", "#d2568b"], 28, 10
#: A colour that stands for the page's own text colour while matplotlib draws.
INK = "#010203"
CHART_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3},
    **{"legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "vlmembed", "text.parse_math": False},
}
READING = f"""A setting’s metric is the mean over its seeds and all queries; ± over seeds is the standard deviation of
the means of its n trials. Settings are compared by a paired test over queries, of which each is averaged over seeds
first; the variance that seeds add is estimated where there are several. ± behind a difference is its 95 %
interval. p is how often chance alone makes a difference at least as large, corrected after Holm (1979) for all pairs of
settings, as the best was chosen after looking. Within noise: p is {ALPHA} or more, so these queries and seeds do not
tell the two apart, which does not make them equal. For a number to publish, measure the best once more on queries that
had no part in the choice. Seconds per step are medians, without the first two; peak memory is the GPU’s, or the
process’s where there is none; bytes per embedding are those of float32.""".replace("\n", " ")


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, a sentence, and any of a table of texts, charts, texts to unfold, and queries."""

    heading: str
    note: str = ""
    table: pd.DataFrame | None = None
    charts: Sequence[Markup] = ()
    details: Mapping[str, str] = field(default_factory=dict)
    queries: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Summary:
    """An ablation, as far as it has come."""

    folder: Path
    ablation: Ablation
    ended: Sequence[Trial]  # the trials that were asked for and have ended; the best setting's first
    missing: Sequence[str]  # those that have not ended
    surplus: int  # how many other trials the folder holds
    evaluation: str = ""  # the evaluation set of the metric that settings are compared by
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)  # that metric: row (setting, seed), column query
    pairs: Mapping[tuple[int, int], PairwiseComparison] = field(default_factory=dict)

    @property
    def finished(self) -> list[Trial]:
        """The trials that the rows of the scores are of."""
        return [trial for trial in self.ended if trial.status == "finished"]

    @property
    def settings(self) -> dict[str, Mapping[str, str]]:
        """The settings with a finished trial by name, best first."""
        return {name_of(trial.setting): trial.setting for trial in self.finished}

    def baseline_of(self, name: str) -> str | None:
        """Return what a setting is compared to: the baseline's labels, and the setting's own where that has none."""
        baseline = name_of({**self.settings[name], **self.ablation.baseline})
        return baseline if self.ablation.baseline and baseline in self.settings else None


def write_report(folder: Path) -> Path:
    """Write ``report.html``, ``report.csv`` and ``report.md`` of an output folder, and return the path of the first.

    Raises:
        ValueError: If the folder's ``ablation.yaml`` or what its trials have left cannot be read, or trials were
            measured on different queries.
    """
    summary = summarize(folder)
    numbers, ablation, sections = numbers_table(summary), summary.ablation, []
    if summary.finished:
        note = "Click on a heading to sort. Differences stand with their 95 % interval; p is corrected for all pairs."
        sections += [Section("Settings", note, settings_table(summary, numbers)), _charts(summary, numbers)]
        sections += _shown_queries(summary)
        note = "Means over seeds. A number behind a name is the dimension that embeddings were cut to."
        metrics = numbers[[name for name in numbers if "/" in name]].map("{:.4f}".format).replace("nan", "–")
        sections.append(Section("All metrics", note, metrics))
    errors = {f"{name_of(trial.setting)}, seed {trial.seed}": trial.error for trial in summary.ended if trial.error}
    if errors:
        sections.append(Section("Failed trials", details=errors))
    written = replace(ablation, base=Path(relpath(ablation.base, folder.resolve())), output_dir=Path(".")).to_yaml()
    packages = [f"{name} {version(name)}" for name in ("vlmembed", "torch", "transformers", "lightning", "scipy")]
    sections.append(Section("What was run", f"With {', '.join(packages)}.", details={"Configuration": written}))
    sections.append(Section("How to read this", READING))
    title, lead, notes = f"Ablation of {' and '.join(ablation.grid)}", _lead(summary), _notes(summary)
    labels = pd.DataFrame([*summary.settings.values()], numbers.index, [*ablation.grid])
    write_whole(folder / "report.csv", pd.concat([labels, numbers], axis=1).to_csv(index=False).encode())
    write_whole(folder / "report.md", _markdown(title, [lead, *notes], sections).encode())
    write_whole(folder / "report.html", render_page(title, lead, notes, sections).encode())
    return folder / "report.html"


def summarize(folder: Path) -> Summary:
    """Read an output folder and compare its settings; raises as ``write_report`` does."""
    ablation = read_ablation(folder / "ablation.yaml")
    known = {(name_of(trial.setting), trial.seed): trial for trial in read_trials(folder)}
    planned = [(name_of(setting), seed) for setting in ablation.settings for seed in ablation.seeds]
    ended = [known[key] for key in planned if key in known]
    missing = [f"“{name}” (seed {seed})" for name, seed in planned if (name, seed) not in known]
    summary = Summary(folder, ablation, ended, missing, len(known) - len(ended))
    if not summary.finished:
        return summary
    evaluation, scores = read_scores(ablation.metric, summary.finished)
    best_first = scores.mean(axis=1).groupby(level=0).mean().sort_values(ascending=False).index
    scores = scores.loc[best_first]
    ranks = {name: rank for rank, name in enumerate(best_first)}
    ended.sort(key=lambda trial: ranks.get(name_of(trial.setting), len(ranks)))
    pairs = compare(_arrays(scores))
    return replace(summary, evaluation=evaluation, scores=scores, pairs=pairs)


def name_of(setting: Mapping[str, str]) -> str:
    """Return what a setting is called: its labels, in the order of the axes."""
    return " · ".join(setting.values())


def read_scores(metric: str, trials: Sequence[Trial]) -> tuple[str, pd.DataFrame]:
    """Read a metric by its logged name: the evaluation set, and a row per trial with a column per query.

    Raises:
        ValueError: If a trial has not measured it, or on other queries than the first.
    """
    name, rows = metric.partition("/")[2], list[pd.Series]()
    for trial in trials:
        measured, columns = trial.folder / "measured", []
        for path in measured.rglob("per_query.csv"):
            # Ids such as 007 and NA are texts.
            reading: Any = {"index_col": "query", "dtype": {"query": str}, "keep_default_na": False}
            table = pd.read_csv(path, float_precision="round_trip", **reading)
            evaluation = path.parent.relative_to(measured).as_posix()
            columns += [(evaluation, column, table[column].astype(float)) for column in table]
        meant = [column for column in columns if name in (column[1], f"{column[0]}/{column[1]}")]
        if len(meant) != 1:
            known = sorted(f"{column[0]}/{column[1]}" for column in columns)
            raise ValueError(f"{measured}: metric {metric!r} means {len(meant)} of the columns, which are {known}")
        ((evaluation, _, row),) = meant
        if rows and list(row.index) != list(rows[0].index):
            raise ValueError(f"{measured / evaluation}: other queries than in {trials[0].folder}, so not comparable")
        rows.append(row.rename((name_of(trial.setting), trial.seed)))
    return evaluation, pd.DataFrame(rows, pd.MultiIndex.from_tuples([row.name for row in rows]))


def _arrays(scores: pd.DataFrame) -> list[np.ndarray]:
    """Part the scores by setting."""
    return [table.to_numpy() for _, table in scores.groupby(level=0, sort=False)]


def numbers_table(summary: Summary) -> pd.DataFrame:
    """Make a row per setting, best first, with all figures of all values."""
    if not summary.finished:
        return pd.DataFrame()
    rows, names = [], list(summary.settings)
    for rank, (name, values) in enumerate(summary.scores.mean(axis=1).groupby(level=0, sort=False)):
        seeds = " ".join(str(seed) for _, seed in values.index)
        row = {"rank": rank + 1, "seeds": seeds, "mean": values.mean(), "standard_deviation": values.std()}
        row |= {"least": values.min(), "most": values.max()}
        for title, other in (("best", names[0]), ("baseline", summary.baseline_of(name))):
            pair = summary.pairs.get((rank, names.index(other))) if other else None
            row |= dict.fromkeys(f"{title}_{part}" for part in ("difference", "low", "high", "p", "verdict"))
            if pair:
                low, high = pair.difference - pair.margin, pair.difference + pair.margin
                row |= {f"{title}_difference": pair.difference, f"{title}_low": low, f"{title}_high": high}
                row |= {f"{title}_p": pair.corrected, f"{title}_verdict": pair.verdict}
        rows.append(row)
    index = summary.scores.index
    # The median of costs, because a trial that was disturbed should not count.
    costs = pd.DataFrame([trial.cost for trial in summary.finished], index).reindex(columns=[*COSTS])
    metrics = pd.DataFrame([trial.metrics for trial in summary.finished], index)
    parts = [table.groupby(level=0, sort=False) for table in (costs, metrics)]
    return pd.concat([pd.DataFrame(rows, names), parts[0].median(), parts[1].mean()], axis=1)


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
            shown = isinstance(verdict, str)
            interval = f"{difference:+.4f} ± {high - difference:.4f}".replace("-", "−") if shown else "–"
            texts |= {f"to the {title}": interval, f"p, {title}": f"{p_text(p)}, {verdict}" if shown else "–"}
        for cost, (heading, form, divisor) in COSTS.items():
            texts[heading] = form.format(row[cost] / divisor).replace("nan", "–")
        rows[f"{name} (baseline)" if summary.baseline_of(name) == name else name] = texts
    table = pd.DataFrame.from_dict(rows, orient="index")
    same = table["to the baseline"].equals(table["to the best"])
    # A column without a comparison says nothing, nor does one that repeats another.
    return table[[name for name in table if set(table[name]) != {"–"} and not (same and name.endswith("baseline"))]]


def p_text(value: float) -> str:
    """Write a p-value."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _lead(summary: Summary) -> str:
    """Say what came out."""
    if not summary.finished:
        return "No trial has finished yet."
    names, first = list(summary.settings), _arrays(summary.scores)[0]
    text = f"The best is “{names[0]}”: {summary.ablation.metric} {first.mean():.4f}, "
    text += f"over {len(first)} seeds and {first.shape[1]} queries."
    close = [f"“{names[j]}”" for (i, j), pair in summary.pairs.items() if not i and pair.verdict == "within noise"]
    if len(names) > 1:
        text += f" Within noise of it: {', '.join(close) or 'no other'} ({len(close)} of {len(names) - 1} others)."
    baseline = summary.baseline_of(names[0])
    if baseline and baseline != names[0]:
        pair = summary.pairs[0, names.index(baseline)]
        verdict = f"p {p_text(pair.corrected)}, {pair.verdict}"
        text += f" It is {pair.difference:.4f} above its baseline, “{baseline}” ({verdict})."
    return text


def _notes(summary: Summary) -> list[str]:
    """Say how far the ablation has come, and what a reader must know before believing the numbers."""
    finished, jobs, failed = len(summary.finished), summary.ablation.jobs, len(summary.ended) - len(summary.finished)
    planned, hours = len(summary.ended) + len(summary.missing), sum(trial.seconds for trial in summary.ended) / 3600
    arrays = _arrays(summary.scores) if finished else []
    counts = [len(array) for array in arrays]
    few = [f"“{name}”" for name, count in zip(summary.settings, counts, strict=True) if count < max(counts)]
    deviation = seed_variance(arrays)[0] ** 0.5
    notes = {
        f"{finished} of {planned} trials finished, in {hours:.2f} hours.": True,
        f"{failed} failed; the errors are below.": failed,
        f"{len(summary.missing)} not there yet: {', '.join(summary.missing)}.": summary.missing,
        f"{summary.surplus} more in the folder, which the configuration does not ask for, left out.": summary.surplus,
        "One setting alone: there is nothing to compare it with.": len(counts) == 1,
        "One seed each: whether training again would give the same order is not known.": max(counts, default=0) == 1,
        f"Another seed moves a trial’s mean by {deviation:.4f} (standard deviation over all settings).": deviation,
        f"Fewer seeds than the others: {', '.join(few)}.": few,
        f"Up to {jobs} trials at once: on one machine they disturb each other’s times.": jobs > 1,
    }
    return [note for note, is_met in notes.items() if is_met]


def _shown_queries(summary: Summary) -> list[Section]:
    """Show what single queries find: where settings differ most, the best, and the worst.

    Shown are the best setting, the baseline, and those with the highest and the lowest score of the query, each by its
    first finished seed.
    """
    names, documents = list(summary.settings), summary.folder / "documents" / summary.evaluation
    first = {name_of(trial.setting): trial.folder for trial in reversed(summary.finished)}
    paths = [first[name] / "measured" / summary.evaluation / "top.json" for name in names]
    tops = [json.loads(path.read_text(encoding="utf-8")) if path.exists() else {} for path in paths]
    recorded = [query for query in summary.scores if all(query in top for top in tops)]
    if not recorded:
        return []
    scores = summary.scores[recorded].groupby(level=0, sort=False).first().to_numpy()  # (K, Q)
    baseline = names.index(summary.baseline_of(names[0]) or names[0])
    mean, spread = scores.mean(0), np.ptp(scores, axis=0)
    kinds = {"Queries on which settings differ most": -spread, "Best queries": -mean, "Worst queries": mean}
    sections = []
    for heading, key in kinds.items():
        queries = []
        for column in np.argsort(key, kind="stable")[:QUERIES].tolist():
            query, values, sides = recorded[column], scores[:, column], []
            for index in sorted({0, baseline, int(values.argmax()), int(values.argmin())}):
                top = [(_content(documents, name), score, grade) for name, score, grade in tops[index][query]["top"]]
                sides.append((f"{names[index]}: {values[index]:.3f}", top))
            relevant = [*tops[0][query]["relevant"]]
            positives = [_content(documents, name) for name in relevant[:POSITIVES]]
            asked = _content(summary.folder / "documents" / "queries" / summary.evaluation, query)
            queries.append({"asked": asked, "positives": positives, "count": len(relevant), "sides": sides})
        note = f"{summary.ablation.metric} and the first documents. A tick and a thick frame mark positives."
        sections.append(Section(heading, note, queries=queries))
    return sections


def _content(folder: Path, name: str) -> dict[str, str]:
    """Read what can be shown of a document or query: an image, and a text, which is its id where it has neither."""
    image, text = (content_path(folder, name, kind) for kind in ("jpg", "txt"))
    data = base64.b64encode(image.read_bytes()).decode() if image.exists() else ""
    words = text.read_text(encoding="utf-8") if text.exists() else "" if data else name
    words = words if len(words) <= CHARACTERS else f"{words[: CHARACTERS - 1]}…"
    return {"id": name, "image": f"data:image/jpeg;base64,{data}" if data else "", "text": words}


@rc_context(CHART_STYLE)
def _charts(summary: Summary, numbers: pd.DataFrame) -> Section:
    """Draw quality with its intervals, quality against cost, and learning."""
    metric, names = summary.ablation.metric, list(summary.settings)
    figure = Figure(figsize=(5.5, 0.9 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot(xlabel=metric)
    margins = [0.0, *(summary.pairs[index, 0].margin for index in range(1, len(names)))]
    axes.errorbar(numbers["mean"], range(len(names)), xerr=margins, fmt="o", color=INK, markersize=5, capsize=3)
    for index, array in enumerate(_arrays(summary.scores)):
        axes.plot(array.mean(1), [index] * len(array), "o", color=COLOURS[0], markersize=4, alpha=0.7)
    axes.set_yticks(range(len(names)), [_shortened(name) for name in names])
    axes.invert_yaxis()
    logs = {trial.folder: pd.read_csv(trial.folder / "metrics.csv") for trial in summary.finished}
    validation = validation_name(metric, [column for log in logs.values() for column in log])
    seconds, learning = {}, {}
    for name, row in numbers.iterrows():
        seconds[name] = pd.DataFrame({"mean": [row["mean"]]}, index=[row["seconds_per_step"]])
        if validation:
            tables = [logs[trial.folder] for trial in summary.finished if name_of(trial.setting) == name]
            values = pd.concat(tables).reindex(columns=["step", validation]).dropna()
            learning[name] = values.groupby("step")[validation].agg(["mean", "min", "max"])
    charts = [to_svg(figure, f"{metric} of each setting, best first; the numbers are in the table")]
    charts.append(line_chart(seconds, "seconds per training step", metric))
    charts += [line_chart(learning, "training step", validation)] if validation else []
    note = "Dots are single seeds, bars the 95 % interval of the difference from the best, shades the range over seeds."
    return Section("Charts", note, charts=charts)


def validation_name(metric: str, logged: Sequence[str]) -> str:
    """Return the logged validation metric that is closest to another one; an empty text if there is none.

    That is the same name under ``val/``; else the same measure, whole or on another evaluation set.
    """
    rest = metric.partition("/")[2]
    measure = next(part for part in reversed(rest.split("/")) if not part.isdecimal())
    others = [name for name in logged if name.startswith("val/") and name.endswith(f"/{measure}")]
    return next((name for name in (f"val/{rest}", f"val/{measure}", *others) if name in logged), "")


def line_chart(curves: Mapping[str, pd.DataFrame], x_label: str, y_label: str) -> Markup:
    """Draw a line per setting, its mean, and perhaps min and max, by x; the first settings in colour."""
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    for index, (name, curve) in enumerate(curves.items()):
        colour, label = (COLOURS[index], _shortened(name)) if index < len(COLOURS) else (INK, None)
        line = "o-" if len(curve) < MARKERS else "-"
        axes.plot(curve.index, curve["mean"], line, color=colour, label=label, alpha=1 if label else 0.3)
        if label and "min" in curve:
            axes.fill_between(curve.index, curve["min"], curve["max"], color=colour, alpha=0.15, linewidth=0)
    figure.legend(loc="outside lower center", ncols=2)
    return to_svg(figure, f"{y_label} by {x_label}, for each setting")


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def to_svg(figure: Figure, title: str) -> Markup:
    """Write a figure as inline SVG in the page's colours; the title is for those who do not see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    head, body = file.getvalue().split("<svg", 1)[1].split(">", 1)
    # The width is the page's, and identifiers that nothing refers to would repeat from chart to chart.
    view, body = head[head.index("viewBox") :].split(" xmlns")[0], re.sub(r' id="[A-Za-z.2]+_\d+"', "", body)
    name = f'role="img" aria-label="{html.escape(title)}"'
    return Markup(f"<svg {view} {name}>{body.replace(INK, 'currentColor')}")


def render_page(title: str, lead: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """Render a page that needs nothing else; whatever comes from data is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(autoescape=True, loader=loader, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["table"] = lambda table: Markup(table.rename_axis("setting", axis="columns").to_html(border=0))
    template = environment.get_template("report.html.jinja")
    return template.render(title=title, lead=lead, notes=notes, sections=sections)


def _markdown(title: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """Write what is not drawn."""
    blocks = [f"# {plain(title)}", *map(plain, notes)]
    for section in sections:
        if section.charts or section.queries:
            continue
        blocks += [f"## {section.heading}", plain(section.note)]
        if section.table is not None:
            rows = [["setting", *section.table], ["---"] * (1 + section.table.shape[1])]
            rows += [[plain(cell) for cell in row] for row in section.table.itertuples(name=None)]
            blocks.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        for label, text in section.details.items():
            blocks += [plain(label), f"<pre>{html.escape(text, quote=False)}</pre>"]
    return "\n\n".join(block for block in blocks if block) + "\n"


def plain(text: str) -> str:
    """Escape a text for Markdown, on one line: it shows as it is."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\`*_\[\]|#~$]", lambda mark: f"\\{mark.group()}", line)
