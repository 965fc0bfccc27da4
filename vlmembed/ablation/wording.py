"""What the report says in sentences: the same in every form of it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from os.path import relpath
from pathlib import Path

import yaml

from vlmembed.ablation.answers import QUERIES
from vlmembed.ablation.statistics import ALPHA
from vlmembed.ablation.summary import Row, Summary
from vlmembed.ablation.tables import p_text, score
from vlmembed.secrets import mask

PACKAGES = ("vlmembed", "torch", "transformers", "lightning", "numpy")
#: More names than this are counted.
MOST_NAMES = 6


READING = {
    "What is compared": (
        "A setting’s {metric} is the mean over its seeds and all queries. “Over seeds” is the standard deviation "
        "of the means of its n runs; the least and the most of them stand below."
    ),
    "What was resampled": (
        "Queries, {draws} times with replacement, and the same ones for all settings: a paired bootstrap. A query’s "
        "score is averaged over the seeds first; runs with other seeds are not further queries."
    ),
    "What seeds add": "{seeds}",
    "The interval": (
        "Of 100 such experiments, with other queries and seeds, about 95 give an interval that holds the true "
        "difference. Each interval speaks of its own pair only, without the correction below."
    ),
    "p, and Holm": (
        "p is how often chance alone makes a difference at least as large as the one seen, in either direction. "
        "Among many comparisons some look large by chance, so p is corrected after Holm (1979), for all pairs of "
        "settings: the best was chosen after looking, and might have been any."
    ),
    "“Within noise”": (
        "The corrected p is {alpha} or more: these queries and seeds do not tell the two apart. It does not say that "
        "they are equal. More queries or more seeds may tell."
    ),
    "What the best is worth": (
        "The first of many is first by luck as well, so its own number is a little too high. For a number to publish, "
        "measure it once on queries that had no part in the choice; those of {metric} had."
    ),
    "Cost": (
        "Seconds per step are the median of a run’s training steps without the first two, then over seeds. Peak "
        "memory is the GPU’s, or the process’s where there is none. Bytes per embedding are those of float32."
    ),
    "Answers": (
        "Up to {queries} queries on which settings differ most, of those whose answers were kept (the first 200 by "
        "name); of each setting, the run with its first seed."
    ),
}


def lead(summary: Summary) -> list[str]:
    """Say what came out, in up to three sentences."""
    if not summary.rows or summary.scores is None:
        return ["No run has finished yet."]
    best = summary.rows[0]
    queries, seeds = len(summary.scores.queries), _number(len(best.runs), "seed")
    measured = f"{summary.ablation.metric} {score(best.mean)}, over {seeds} and {queries} queries"
    return [f"First comes {_quoted(best.name)}: {measured}.", *_company(summary), *_against_baseline(summary)]


def facts(summary: Summary) -> list[str]:
    """Count runs, seeds, queries and hours."""
    finished = [run for row in summary.rows for run in row.runs]
    asked = len(finished) + len(summary.failed) + len(summary.missing)
    hours = sum(run.seconds for run in [*finished, *summary.failed]) / 3600
    spent = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
    counts = [
        f"{len(finished)} of {asked} runs finished",
        f"{_number(len(summary.rows), 'setting')}",
        f"{spent} of runs",
    ]
    return counts


def warnings(summary: Summary) -> list[str]:
    """Say what a reader must know before believing the numbers."""
    found = []
    if summary.failed:
        found.append(f"{_number(len(summary.failed), 'run')} failed; the errors are below.")
    if summary.missing:
        found.append(f"{_number(len(summary.missing), 'run')} not there yet: {_some(_runs(summary.missing))}.")
    if summary.surplus:
        found.append(
            f"{_number(summary.surplus, 'run')} in the folder, which the configuration no longer asks for, left out."
        )
    if len(summary.rows) == 1:
        found.append("One setting alone: there is nothing to compare it with.")
    found += _about_seeds(summary.rows)
    if summary.ablation.jobs > 1:
        found.append(f"Up to {summary.ablation.jobs} runs at once: on one machine they disturb each other’s times.")
    return found


def reading(summary: Summary) -> dict[str, str]:
    """Say how the numbers were made, and what they do not say: heading → text."""
    values = {
        "metric": summary.ablation.metric,
        "draws": f"{summary.comparisons.draws:,}" if summary.comparisons else "",
        "seeds": _seed_text(summary),
        "alpha": ALPHA,
        "queries": QUERIES,
    }
    return {heading: text.format(**values) for heading, text in READING.items()}


def versions() -> str:
    """Name what this was made with."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)])


def configuration(summary: Summary) -> str:
    """Write the configuration: without secrets, and with paths from the output folder, wherever that lies."""
    base = Path(relpath(summary.ablation.base, summary.folder.resolve()))
    written = replace(summary.ablation, base=base, output_dir=Path(".")).to_yaml()
    return yaml.safe_dump(mask(yaml.safe_load(written)), sort_keys=False, allow_unicode=True)


def _company(summary: Summary) -> list[str]:
    if len(summary.rows) < 2:
        return []
    if not summary.close:
        return ["No other setting is within noise of it."]
    others = len(summary.rows) - 1
    return [
        f"Within noise of it: {_some([_quoted(row.name) for row in summary.close])} ({len(summary.close)} of {others})."
    ]


def _against_baseline(summary: Summary) -> list[str]:
    stand = summary.rows[0].baseline
    if stand is None:
        return []
    side = "above" if stand.difference >= 0 else "below"
    text = f"It is {score(abs(stand.difference))} {side} its baseline, {_quoted(stand.other)}"
    return [f"{text} (p {p_text(stand.p_value)}{'' if stand.found else ', within noise'})."]


def _about_seeds(rows: Sequence[Row]) -> list[str]:
    counts = {len(row.runs) for row in rows}
    if counts == {1}:
        return [
            "One seed each: whether training again would give the same order is not known, and not in the intervals."
        ]
    if len(counts) > 1:
        few = [_quoted(row.name) for row in rows if len(row.runs) < max(counts)]
        return [f"Fewer seeds than the others: {_some(few)}."]
    return []


def _seed_text(summary: Summary) -> str:
    if all(len(row.runs) < 2 for row in summary.rows):
        return "Nothing here: no setting has two seeds, so these trained models are compared, not what made them."
    deviation = summary.comparisons.seed_deviation if summary.comparisons else 0.0
    return (
        "Training again with another seed shifts a run’s mean, for all queries alike, which no resampling of queries "
        f"shows. From all settings together this shift is estimated at {score(deviation)} (standard deviation, "
        "without what the queries explain). It is drawn along, with all that few runs leave open about it."
    )


def _runs(runs: Sequence[tuple[str, int]]) -> list[str]:
    return [f"{_quoted(name)} (seed {seed})" for name, seed in runs]


def _quoted(name: str) -> str:
    return f"“{name}”"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
