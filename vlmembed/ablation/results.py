"""What an ablation leaves on disk: one folder per run, and in it what came of the run."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmembed.files import write_whole

#: In the output folder: the configuration as it was run.
CONFIGURATION = "ablation.yaml"

#: Beside the documents of all evaluation sets: their queries.
QUERY_FOLDER = "queries"


@dataclass(frozen=True)
class Result:
    """One run that has ended.

    Args:
        setting: Of each axis, the label.
        seed: The run's seed.
        status: Whether it ran to its end.
        error: The last lines of what a failed run printed.
        seconds: Wall-clock time of the whole run.
        metrics: Of each logged name (``test/ndcg@10``), the value of the trained model.
        cost: ``seconds_per_step``, ``steps_per_epoch``, ``peak_memory_bytes``, ``trained_parameters``,
            ``pooling_parameters``, ``embedding_dimension``, ``embedding_bytes``; empty where training did not end.
        folder: The run's folder; not in the file.
    """

    setting: Mapping[str, str]
    seed: int
    status: Literal["finished", "failed"]
    error: str | None
    seconds: float
    metrics: Mapping[str, float]
    cost: Mapping[str, float]
    folder: Path

    def write(self) -> None:
        """Write ``result.json``, whole or not at all."""
        fields = {name: value for name, value in vars(self).items() if name != "folder"}
        write_whole(result_path(self.folder), json.dumps(fields, indent=1).encode())


def read_results(folder: Path) -> list[Result]:
    """Read every run in an output folder that has ended, sorted by setting and seed."""
    found = [read_result(path.parent) for path in folder.glob("settings/*/seed-*/result.json")]
    return sorted((result for result in found if result), key=lambda result: (result.folder.parent.name, result.seed))


def read_result(run: Path) -> Result | None:
    """Read what came of one run, or None if it has not ended."""
    path = result_path(run)
    return Result(**json.loads(path.read_text(encoding="utf-8")), folder=run) if path.exists() else None


def run_folder(output: Path, slug: str, seed: int) -> Path:
    """Return the folder of one run of a setting."""
    return output / "settings" / slug / f"seed-{seed}"


def result_path(run: Path) -> Path:
    """Return where a run's result is; it is there once the run has ended."""
    return run / "result.json"


def cost_path(run: Path) -> Path:
    """Return where a run's training writes what it cost."""
    return run / "cost.json"


def per_query_path(run: Path, name: str) -> Path:
    """Return where the metrics of each query of evaluation set ``name`` are: ``query``, and a column per metric."""
    return run / "measured" / name / "per_query.csv"


def top_path(run: Path, name: str) -> Path:
    """Return where the first documents of each query of evaluation set ``name`` are."""
    return run / "measured" / name / "top.json"


def document_path(documents: Path, name: str, document: str, kind: Literal["jpg", "txt"]) -> Path:
    """Return where a document of evaluation set ``name`` is shown.

    Args:
        documents: The output folder's ``documents``.
        name: The evaluation set.
        document: The document's id, which may hold any character.
        kind: Its first image, made small, or its text.
    """
    return documents / name / f"{hashlib.sha1(document.encode()).hexdigest()[:16]}.{kind}"


def last_values(metrics: Path) -> dict[str, float]:
    """Read the last value of each measured name in a ``metrics.csv``: that of the trained model."""
    values: dict[str, float] = {}
    if metrics.exists():
        with metrics.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                values |= {name: float(row[name]) for name in row if name.startswith(("val/", "test/")) and row[name]}
    return values


def read_json(path: Path) -> Any:
    """Read a JSON file, or an empty mapping if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def csv_text(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """Write a table as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()
