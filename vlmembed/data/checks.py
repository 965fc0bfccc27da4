"""What goes silently wrong with data, looked for in some of its rows: each finding says how to mend it."""

from __future__ import annotations

import math
import mimetypes
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from vlmembed import distributed
from vlmembed.data.cells import KINDS, Folder
from vlmembed.data.evaluation import RowItems
from vlmembed.data.rows import Table
from vlmembed.data.sources import ROWS_AT_ONCE, GroupByQuery, Mixture, Source
from vlmembed.files import content_digest, digest
from vlmembed.types import EvaluationSet, Frame, Item, LazyImage, Part

#: How many rows are looked at; how many are compared with others; how many documents that are in memory already.
ROWS, COMPARED, DOCUMENTS = 200, 10_000, 100_000

#: Ends as files of media do, and has no white space; addresses, too.
FILE_NAME = re.compile(
    r"\S+\.(png|jpe?g|jp2|gif|bmp|tiff?|webp|avif|heic|mp4|m4v|mov|avi|mkv|webm|flv|mpe?g|wav|mp3|flac|ogg|opus|m4a|pdf)"
    r"([?#]\S*)?",
    re.IGNORECASE,
)
#: Names of columns: ``id``, ``docids``, ``negative_document_ids``, ``imageId``, ``pos_cand_list``; not ``paid``.
ID_COLUMN = re.compile(r"(.*(_|-|[a-z](?=I)))?([a-z]|uu|doc|image|video|page|query|corpus)?[iI][dD]s?|.*_cand_list")
#: Names of columns that may hold what the ids of another column mean.
KEY_COLUMN = re.compile(rf"{ID_COLUMN.pattern}|key|name|index|uri", re.IGNORECASE)
#: What is not the last key of a path such as ``passages[].docid``.
LAST_KEY = re.compile(r".*\.|\[\d*\]$")
#: What is no word, and no number that could be an answer.
TOKEN = re.compile(r"(?=\S*\d)(?!-?[\d.,]{1,4}$)\S+")
#: What is an id wherever it stands: a hash, a UUID, or a word and behind it three numbers, or a very long one.
ID = re.compile(
    r"[0-9a-f]{24,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|"
    r"(?P<word>[A-Za-z]+)[A-Za-z\d]*([-_:][A-Za-z]*\d+[A-Za-z]*){3,}|(?P<name>[A-Za-z]+)[A-Za-z\d]*[-_:][-_:\w]*\d{8,}"
)
#: What stands for an image or the like in texts that were written for another program.
MARK = re.compile(r"<\|?(image|img|video|audio)(_pad|[ _-]?\d+)?\|?>", re.IGNORECASE)
#: The end of an item's origin.
COLUMN = re.compile(r"column '([^']+)'(\[\d+\])?")


class DataWarning(UserWarning):
    """Something about the data that is most likely not meant."""


def warn(problems: Iterable[str]) -> None:
    """Warn of problems, which only the main process looks for."""
    for problem in problems if distributed.rank() == 0 else ():
        warnings.warn(problem, DataWarning, stacklevel=2)


def in_rows(mixture: Mixture) -> Iterator[str]:
    """Find what is wrong with training rows. Rows that cannot be read are left to training."""
    for source in mixture.sources:
        yield from _in_source(source)


def in_evaluation(evaluation: EvaluationSet) -> Iterator[str]:
    """Find what is wrong with an evaluation set."""
    if isinstance(evaluation.corpus, RowItems):
        yield from _in_source(evaluation.corpus.rows)
    else:
        for name, items in (("queries", evaluation.queries), ("corpus", evaluation.corpus)):
            first = [items[number] for number in spread(len(items), ROWS)]
            yield from _in_texts(Column(f"{evaluation.name}, {name}", name, first))
    yield from _duplicates(evaluation)


def in_both(mixture: Mixture, evaluation: EvaluationSet) -> Iterator[str]:
    """Find queries of an evaluation set that are also training queries, by their content."""
    asked = defaultdict[Any, list[int]](list)
    for number, query in enumerate(islice(evaluation.queries, COMPARED)):
        asked[_outline(query)].append(number)
    rows = spread(len(mixture), COMPARED)
    trained: dict[int, int] = {}  # The number of a query → the row that asks it.
    example = ""
    for row, query in _queries(mixture, rows):
        for number in asked.get(_outline(query), ()):
            if number not in trained and _fingerprint(query) == _fingerprint(evaluation.queries[number]):
                trained[number] = row
                example = example or f"such as {_shown(query)}: {query.origin or f'row {row + 1} of {mixture.name}'}"
    if not trained:
        return
    count, at_least = len(trained), "" if len(rows) == len(mixture) else "at least "
    expected = min(len(evaluation.queries), COMPARED) * len(rows) / len(mixture)  # If all were trained on.
    if 2 * count > expected and _share_documents(mixture, evaluation, trained):
        yield (
            f"{evaluation.name} is measured on rows that are also trained on ({at_least}{count:,} of its "
            f"{len(evaluation.queries):,} queries, {example}), so that its metrics say what was learned by heart. Give "
            "data.train, val and test different files, or splits: "
            "{class_path: vlmembed.data.Rows, init_args: {path: …, split: …}}."
        )
    else:
        yield (
            f"{evaluation.name}: {at_least}{count:,} of the {len(evaluation.queries):,} queries are also training "
            f"queries ({example}). If that is not meant, measure on others, or leave those rows out of data.train with "
            "where: {…: {not: […]}}."
        )


# Texts that are something else


class Column:
    """The values of a column that were looked at, and how it is written in YAML."""

    def __init__(self, origin: str, name: str, items: Sequence[Item], table: Table | None = None) -> None:
        self.origin, self.name, self.items, self.table = origin, name, items, table
        # Of items that are one text and nothing else.
        self.texts = [str(item.parts[0].value) for item in items if [part.kind for part in item.parts] == ["text"]]
        match = COLUMN.search(items[0].origin) if items else None
        self.is_list = bool(match and match[2])

    @property
    def expressions(self) -> dict[str, Any]:
        """What the cells of the table are made of."""
        if self.table is None:
            return {}
        old = {new: name for name, new in (self.table.columns or {}).items()}
        return self.table.cells or {name: old.get(name, name) for name in self.table.column_names}

    @property
    def expression(self) -> Any:
        """What the cell is made of; of a text that is written ``{text: …}``, the text."""
        expression = self.expressions.get(self.name, self.name)
        return expression["text"] if isinstance(expression, dict) and [*expression] == ["text"] else expression

    def fix(self, cell: Any, **others: Any) -> str:
        """Return the YAML in which this cell is another."""
        written = {"cells": {**self.expressions, self.name: cell}, **others}
        options: Any = {"default_flow_style": True, "width": math.inf, "sort_keys": False, "allow_unicode": True}
        instead = " instead of columns" if self.table is not None and self.table.columns else ""
        return str(yaml.safe_dump(written, **options))[1:-2] + instead


def _in_source(source: Source) -> Iterator[str]:
    table: Any = source
    while isinstance(table, GroupByQuery):
        table = table.rows
    if not isinstance(table, Table):
        return  # Reading it may take long, or end the process, which is better done by a worker.
    columns = defaultdict[str, list[Item]](list)
    for row in spread(len(source), ROWS):
        with suppress(ValueError):  # Training says what is wrong, or leaves the row out.
            example = source[row]
            for item in (example.query, *example.documents):
                match = COLUMN.search(item.origin)
                # Without images, which may be large.
                parts = tuple(part if part.kind == "text" else Part(part.kind, "") for part in item.parts)
                columns[match[1] if match else item.role].append(replace(item, parts=parts))
    for name, items in columns.items():
        yield from _in_texts(Column(f"{table.origin}, column {name!r}", name, items, table))


def _in_texts(column: Column) -> Iterator[str]:
    yield from _file_names(column)
    yield from _ids(column)
    yield from _marks(column)


def _file_names(column: Column) -> Iterator[str]:
    folder = column.table.folder.path if column.table is not None else None
    names = [text for text in column.texts if FILE_NAME.fullmatch(text) or (folder and _is_file(folder, text))]
    if 2 * len(names) <= len(column.items):
        return
    media_type = mimetypes.guess_type(names[0].partition("#")[0])[0] or ""
    kind = next((kind for kind in KINDS if kind != "text" and kind in media_type), "image")
    most, path = _most(names, column.items), column.expression
    said = f"{column.origin}: {most} name files, such as {names[0]!r:.100}, and are read as texts."
    if folder is None or isinstance(path, dict):
        yield f"{said} To have the files read, give the names under the key {kind!r} instead of 'text'."
        return
    cell: Any = [{kind: one} for one in path] if isinstance(path, list) else {kind: path}
    if isinstance(path, str) and column.is_list and "[]" not in path:
        cell = {kind: f"{path}[]"}
    media = "" if _is_file(folder, names[0]) else _subfolder(folder, names[0])
    others = {"media": str(Path(column.table.media or "", media))} if media and column.table is not None else {}
    yield f"{said} To have the files read, write {column.fix(cell, **others)}."


def _is_file(folder: Path, text: str) -> bool:
    """Whether a text names a file within a folder."""
    with suppress(ValueError):
        return bool(Folder(folder).find(text, "media", ""))
    return False


def _subfolder(folder: Path, text: str) -> str:
    """Return which folder within a folder has a file."""
    if not folder.is_dir():
        return ""
    return next((one.name for one in islice(folder.iterdir(), 1000) if one.is_dir() and _is_file(one, text)), "")


def _ids(column: Column) -> Iterator[str]:
    texts, table = [text for text in column.texts if not re.search(r"\s", text)], column.table
    if 2 * len(texts) <= len(column.items) or 2 * sum(map(bool, map(FILE_NAME.fullmatch, texts))) > len(texts):
        return
    # Of ids the first word is the same: of dates such as 3-Mar-2020, it is not.
    words = Counter(match["word"] or match["name"] for match in map(ID.fullmatch, texts) if match)
    lookup: dict[str, Any] = {"path": "FILE", "key": "ID COLUMN", "cell": {"text": "TEXT COLUMN"}}
    if table is not None and (key := _id_column(column, texts)):
        cells = {**column.expressions, column.name: {"text": "TEXT COLUMN"}}
        cell = next(cells[name] for name in ("positive", "document", column.name) if name in cells)
        lookup, what = {"key": key, "cell": cell}, f"are ids of the column {key!r}"
    elif isinstance(column.expression, str) and ID_COLUMN.fullmatch(LAST_KEY.sub("", column.expression)):
        what = "are ids by the name of their column"
    elif 2 * max(words.values(), default=0) > len(column.items):
        what = "look like ids"
    else:
        return
    fix = "the texts themselves"
    if table is not None:
        fix = column.fix({"ids": column.expression, "table": "documents"}, tables={"documents": lookup})
    yield (
        f"{column.origin}: {_most(texts, column.items)}, such as {texts[0]!r:.100}, {what}, and are read as texts. To "
        f"have read what they stand for, write {fix}."
    )


def _id_column(column: Column, texts: Sequence[str]) -> str | None:
    """Return which other column of the table holds most of the texts."""
    assert column.table is not None
    raw = column.table.raw
    tokens = [text for text in texts if TOKEN.fullmatch(text)]
    names = [name for name in raw.column_names if KEY_COLUMN.fullmatch(name) and name != column.expression]
    if not names or not tokens:
        return None
    numbers, ids = spread(len(raw), COMPARED), defaultdict[str, set[str]](set)
    selected = raw.select_columns(names)
    for start in range(0, len(numbers), ROWS):
        with suppress(ValueError):  # A row that is not JSON.
            for row in selected.__getitems__(numbers[start : start + ROWS]):
                for name in names:
                    ids[name].add(str(row.get(name)))
    for name in names:
        hits = sum(text in ids[name] for text in tokens)
        if hits > 1 and 2 * hits > len(texts) * len(numbers) / len(raw):
            return name
    return None


def _marks(column: Column) -> Iterator[str]:
    marks, beside = Counter[str](), 0
    for item in column.items:
        texts = [str(part.value) for part in item.parts if part.kind == "text"]
        if match := next(filter(None, map(MARK.search, texts)), None):
            marks[match[0]] += 1
            beside += len(texts) < len(item.parts)
    if beside < 2 and 10 * marks.total() < max(1, len(column.items)):
        return
    mark = marks.most_common(1)[0][0]
    kind = next(kind for kind in ("image", "video", "audio") if kind[:2] in mark.lower())
    said = f"{column.origin}: {_most([*marks.elements()], column.items)} have a mark such as {mark!r} in their text, "
    said += f"which the model reads as letters, and not as the {kind} that it stands for."
    if column.table is None:
        yield f"{said} Give a list of parts: [{{type: {kind}, {kind}: …}}, {{type: text, text: …}}]."
        return
    expression = column.expression if isinstance(column.expression, dict) else {"text": column.expression}
    cell = {"text": expression.get("text", "TEXT COLUMN"), "marks": {mark: {kind: expression.get(kind, "COLUMN")}}}
    yield f"{said} To have it read there, write {column.fix(cell)}."


def _most(values: Sequence[Any], items: Sequence[Item]) -> str:
    return f"{len(values):,} of the {len(items):,} values that were looked at"


# Equal content


def _duplicates(evaluation: EvaluationSet) -> Iterator[str]:
    """Find documents of a corpus that have the content of another one."""
    corpus = evaluation.corpus
    if isinstance(corpus, RowItems) and not any(
        isinstance(part.value, Path) for number in spread(len(corpus), 20) for part in corpus[number].parts
    ):
        return  # Equal ones are one document already, unless they are two files.
    if evaluation.subsets is not None and evaluation.candidates is not None:
        return  # Those of another subset are none that a query is ranked against.
    limit = min(len(corpus), DOCUMENTS if isinstance(corpus, list) else COMPARED)
    alike, same = defaultdict[Any, list[int]](list), defaultdict[Any, list[int]](list)
    for number in range(limit):
        alike[_outline(corpus[number])].append(number)
    for numbers in alike.values():
        for number in numbers if len(numbers) > 1 else ():
            document = corpus[number]
            same[_outline(document), _fingerprint(document)].append(number)
    groups = [numbers for numbers in same.values() if len(numbers) > 1]
    if groups:
        first, again, *_ = (corpus[number].origin or evaluation.document_names[number] for number in groups[0])
        count, looked = sum(map(len, groups)) - len(groups), f"{'' if limit == len(corpus) else 'first '}{limit:,}"
        yield (
            f"{evaluation.name}: {count:,} of the {looked} documents of the corpus have the content of an earlier one "
            f"(such as {again}: that of {first}). Metrics count each: where one is judged relevant and its copy "
            "is not, finding the copy counts as wrong. Keep one of each in the corpus, and let the judgements name it."
        )


def _outline(item: Item) -> int:
    """A number that is the same for items of equal content, found without reading files."""
    return hash(_described(item, _extent))


def _fingerprint(item: Item) -> tuple[Any, ...]:
    """What is the same for items of equal content, and for no others."""
    return _described(item, _hashed)


def _described(item: Item, describe: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Return the words of an item's texts, and what a function says of all else, in order."""

    def of(value: Any) -> Any:
        try:
            return " ".join(value.split()) if isinstance(value, str) else describe(value)
        except (OSError, ValueError):  # Measuring says that it is not there.
            return str(value)

    values = ((part.kind, part.value if isinstance(part.value, tuple) else (part.value,)) for part in item.parts)
    return tuple((kind, *map(of, several)) for kind, several in values)


def _extent(value: Frame) -> Any:
    if isinstance(value, Image.Image):
        return value.mode, value.size
    if isinstance(value, LazyImage):
        return value.size
    return value.stat().st_size if isinstance(value, Path) else len(value)


def _hashed(value: Frame) -> Any:
    if isinstance(value, LazyImage):
        return value.content
    if isinstance(value, Image.Image):
        return digest([value.tobytes()])
    return content_digest(value if isinstance(value, Path) else bytes(value))


def _queries(mixture: Mixture, rows: Sequence[int]) -> Iterator[tuple[int, Item]]:
    """Yield row and query of those rows whose query can be read."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        piece = rows[start : start + ROWS_AT_ONCE]
        try:
            yield from zip(piece, mixture.read_queries(piece), strict=True)
        except ValueError:
            if len(piece) > 1:
                for row in piece:
                    yield from _queries(mixture, [row])


def _share_documents(mixture: Mixture, evaluation: EvaluationSet, trained: dict[int, int]) -> bool:
    """Whether most of some queries have a document that answers them in training and in the evaluation set alike."""
    columns = {name: column for column, name in enumerate(evaluation.document_names)}
    looked = shared = 0
    for number, row in islice(trained.items(), 20):
        try:
            positives = mixture[row].positives
        except ValueError:
            continue
        grades = evaluation.qrels.get(evaluation.query_names[number], {})
        relevant = [columns[name] for name, grade in grades.items() if grade > 0 and name in columns][:20]
        looked += 1
        shared += not {*map(_fingerprint, positives)}.isdisjoint(
            _fingerprint(evaluation.corpus[one]) for one in relevant
        )
    return 2 * shared > looked


def _shown(item: Item) -> str:
    """Return the first words of an item, or what else it is."""
    return next(
        (f"{part.value!r:.80}" for part in item.parts if part.kind == "text"), f"an item of {item.parts[0].kind}s"
    )


def spread(count: int, most: int) -> list[int]:
    """Return numbers below a count, all of them or as many as may be, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()
