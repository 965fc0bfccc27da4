"""What single queries find under each setting: the queries where settings differ most, with pictures to look at."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from vlmembed.ablation.results import QUERY_FOLDER, document_path, per_query_path, read_json, top_path
from vlmembed.ablation.scores import read_column
from vlmembed.ablation.summary import Summary

#: Queries in the report, bytes of all pictures as text, letters of a query or document, and right answers of a query.
QUERIES, MOST_BYTES, LETTERS, WANTED = 30, 10 * 2**20, 300, 3


def answers(summary: Summary) -> dict[str, Any]:
    """Collect what the page shows; each setting by its first finished seed.

    Returns:
        ``metric``; ``settings``: their names, best first, and the seeds; ``other``: the one to show beside the best;
        ``documents``: id, and ``image`` (a data URI) or ``text``;
        ``queries``: id, text, perhaps an image, number of right answers, the first of them as ``wanted``, and per
        setting its score and ``top``: number of the document, score and grade. Without scores, or where no run has kept
        its answers, ``queries`` is empty.
    """
    runs = [row.runs[0] for row in summary.rows]
    settings = [{"name": row.name, "seed": run.seed} for row, run in zip(summary.rows, runs, strict=True)]
    baseline = next((index for index, row in enumerate(summary.rows) if index and row.is_baseline), 1)
    shown: dict[str, Any] = {"settings": settings, "other": baseline, "metric": "", "documents": [], "queries": []}
    if summary.scores is None:
        return shown
    evaluation, column = summary.scores.evaluation, summary.scores.column
    found = [read_json(top_path(run.folder, evaluation)) for run in runs]
    tables = [read_column(per_query_path(run.folder, evaluation), column) for run in runs]
    kept = [query for query in summary.scores.queries if all(query in each for each in found)]
    values = np.array([[table[query] for query in kept] for table in tables])
    documents = _Documents(summary.folder / "documents", evaluation)
    asked = _Documents(summary.folder / "documents" / QUERY_FOLDER, evaluation)
    chosen = [kept[index] for index in most_telling(values)[:QUERIES]]
    queries = [
        _query(query, [each[query] for each in found], [table[query] for table in tables], documents)
        | asked.content(query)
        for query in chosen
    ]
    return shown | {"metric": column, "documents": documents.entries, "queries": queries}


def most_telling(scores: Float64[np.ndarray, "K Q"]) -> list[int]:
    """Order queries by how much they tell any two settings apart.

    First those in which a pair differs most, for every pair, the widest difference first; then those that come second
    for a pair; and so on: whichever two are looked at, there is something to see.
    """
    pairs = list(combinations(range(len(scores)), 2))
    if not pairs:
        return list(range(scores.shape[1]))
    gaps = np.abs(np.stack([scores[i] - scores[j] for i, j in pairs]))
    place = np.argsort(np.argsort(-gaps, axis=1, kind="stable"), axis=1)
    place[gaps == 0] = scores.shape[1]
    return [int(query) for query in np.lexsort((-gaps.max(0), place.min(0)))]


class _Documents:
    """Each document once, numbered as it comes, with its picture while there is room."""

    def __init__(self, folder: Path, evaluation: str) -> None:
        self.folder = folder
        self.evaluation = evaluation
        self.entries: list[dict[str, str]] = []
        self._numbers: dict[str, int] = {}
        self._bytes = 0

    def number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self.entries)
            self.entries.append({"id": name, **self.content(name)})
        return self._numbers[name]

    def content(self, name: str) -> dict[str, str]:
        picture, text = (document_path(self.folder, self.evaluation, name, kind) for kind in ("jpg", "txt"))
        if text.exists():
            return {"text": _cut(text.read_text(encoding="utf-8"))}
        if not picture.exists():
            return {}
        uri = f"data:image/jpeg;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        self._bytes += len(uri)
        return {"image": uri} if self._bytes <= MOST_BYTES else {}


def _query(
    name: str, found: Sequence[Mapping[str, Any]], scores: Sequence[float], documents: _Documents
) -> dict[str, Any]:
    relevant = [document for document, grade in found[0]["relevant"].items() if grade > 0]
    tops = [[[documents.number(document), score, grade] for document, score, grade in each["top"]] for each in found]
    return {
        "id": name,
        "text": _cut(found[0]["query"] or ""),
        "relevant": len(relevant),
        "wanted": [documents.number(document) for document in relevant[:WANTED]],
        "settings": [{"score": score, "top": top} for score, top in zip(scores, tops, strict=True)],
    }


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"
