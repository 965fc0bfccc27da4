"""The report of an ablation: one page that needs nothing else, and the same numbers as CSV and Markdown."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vlmembed.ablation import wording
from vlmembed.ablation.answers import answers
from vlmembed.ablation.figures import figures, styles_of
from vlmembed.ablation.summary import Summary, summarize
from vlmembed.ablation.tables import Table, metrics_table, settings_table, to_csv
from vlmembed.files import write_whole

FOLDER = Path(__file__).parent
#: Marks that mean something to Markdown, besides those of HTML.
MARKS = re.compile(r"[\\`*_\[\]|#~$]")


def write_report(folder: Path) -> Path:
    """Write ``report.html``, ``report.csv`` and ``report.md`` from the runs that have ended so far.

    Args:
        folder: An ablation's output folder.

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError: If the folder's ``ablation.yaml`` or what its runs have left cannot be read, or runs were measured
            on different queries.
    """
    summary = summarize(folder)
    facts = _facts(summary)
    page = folder / "report.html"
    write_whole(folder / "report.csv", to_csv(summary).encode())
    write_whole(folder / "report.md", _markdown().get_template("report.md.jinja").render(facts).encode())
    write_whole(page, html_environment().get_template("report.html.jinja").render(facts).encode())
    return page


def escape_markdown(value: object) -> str:
    """Make text that shows as it is, on one line, wherever in a line it stands but at its start."""
    if isinstance(value, Markup):
        return value
    line = html.escape(" ".join(str(value).split()), quote=False)
    return MARKS.sub(lambda mark: f"\\{mark.group()}", line)


def html_environment() -> Environment:
    """Return what renders the pages: whatever comes from data is escaped."""
    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _markdown() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=False,  # Names are escaped for Markdown, which takes HTML as well.
        finalize=escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["table"] = _markdown_table
    environment.filters["block"] = lambda text: Markup(html.escape(text, quote=False))
    return environment


def _markdown_table(table: Table) -> Markup:
    texts = [[f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in row] for row in table.rows]
    headings = [column.heading for column in table.columns]
    first, *rest = ([escape_markdown(text) for text in row] for row in [headings, *texts])
    marks = ["---:" if column.numeric else "---" for column in table.columns]
    return Markup("\n".join("| " + " | ".join(row) + " |" for row in [first, marks, *rest]))


def _facts(summary: Summary) -> dict[str, Any]:
    styles = styles_of(summary.rows)
    return {
        "title": summary.folder.resolve().name,
        "axes": list(summary.ablation.grid),
        "metric": summary.ablation.metric,
        "lead": wording.lead(summary),
        "facts": wording.facts(summary),
        "warnings": wording.warnings(summary),
        "settings": settings_table(summary, styles),
        "metrics": metrics_table(summary),
        "failed": summary.failed,
        "figures": figures(summary, styles) if summary.rows else {},
        "answers": answers(summary),
        "reading": wording.reading(summary),
        "configuration": wording.configuration(summary),
        "versions": wording.versions(),
    }
