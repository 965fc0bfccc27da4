"""Ids, contents and judgements of evaluation sets: where folders and the Hub have them, and in which forms.

Folders are laid out as those of BEIR, MTEB and ViDoRe; the forms are tables, lines of text and TREC runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import datasets
import numpy as np
from PIL.Image import Image

from vlmembed.data.cells import KINDS, Folder, content_keys, instructed, to_items
from vlmembed.data.columns import nearest
from vlmembed.data.pages import Pages
from vlmembed.data.records import text_lines
from vlmembed.data.rows import Table
from vlmembed.data.streaming import refuse_streams
from vlmembed.data.tables import Joined, configurations, splits_of
from vlmembed.types import EvaluationSet, Item, Part, Role

Qrels = dict[str, dict[str, int]]
Row = Mapping[str, Any]

#: What a cell of a table of tabs can say; not a byte order mark at its beginning, nor half of a surrogate pair.
IDS = re.compile(r"(?!\ufeff)[^\t\r\n\ud800-\udfff]+")

#: Sums of grades up to this are exact.
MOST_GRADE = 2**31

#: Names of columns, in lower case, with hyphens; the first of them that a table has is taken.
QUERY_IDS = "query-id", "qid"
DOCUMENT_IDS = "corpus-id", "docid", "did", "doc-id", "document-id"
GRADES = "score", "grade", "relevance", "rel", "label"
ITEM_IDS: dict[Role, tuple[str, ...]] = {
    "query": ("query-id", "id", "qid"),
    "document": ("corpus-id", "id", "docid", "did"),
}

#: Rows that are in memory together; images may be in them.
BLOCK = 64

#: Where query, document and grade are in a line of judgements, which may have no grade.
Layout: TypeAlias = tuple[int, int, int | None]
#: By the number of cells in a line, where there is no header.
LAYOUTS: dict[int, Layout] = {3: (0, 1, 2), 4: (0, 2, 3), 5: (0, 2, 3)}

EXPECTED = "expected query-id, corpus-id, integer grade"


#: What has rows of queries or documents.
Documents: TypeAlias = Table | Pages


def as_rows(value: str | Documents) -> Documents:
    """Open a table."""
    refuse_streams(value, "a measurement")
    return Table(value) if isinstance(value, str) else value


def features_of(table: Documents) -> datasets.Features | None:
    """Return the features of a table of Arrow."""
    raw = getattr(table, "raw", None)
    return getattr(raw.first if isinstance(raw, Joined) else raw, "features", None)


def is_read_as_stored(table: Documents) -> TypeGuard[Table]:
    """Tell a table of JSON that is read as it is: its rows need not have the same keys."""
    if isinstance(table, Pages) or table.cells is not None or table.columns or table.where or table.each:
        return False
    return features_of(table) is None


def columns_of(table: Documents) -> list[str]:
    """Return the columns of a table; of JSON that is read as it is, the keys of the first rows."""
    return table.raw_columns if is_read_as_stored(table) else table.column_names


def read_rows(table: Documents, indices: Sequence[int], names: Collection[str] | None) -> list[dict[str, Any]]:
    """Read some rows with the columns of some names; of JSON that is read as it is, others may come along."""
    if is_read_as_stored(table):
        return table.raw.__getitems__([*indices])
    return table.read(indices, names)


#: An item, or what reads it once more, with its id.
Entry = Item | Callable[[], tuple[str, Item]]


class LazyItems(Sequence[Item]):
    """Items, of which those with images in them are read when asked for, so that they are not all in memory."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return LazyItems(self.entries[index])
        entry = self.entries[index]
        return entry if isinstance(entry, Item) else entry()[1]


@dataclass
class Contents:
    """The queries, or the corpus, of an evaluation set, by their ids."""

    origin: str
    entries: dict[str, Entry] = field(default_factory=dict)
    more: dict[str, Row] = field(default_factory=dict)  # What else was asked for of each.
    groups: dict[str, str] = field(default_factory=dict)  # What subset each is of, if that was asked for.


def as_items(entries: Iterable[Entry]) -> Sequence[Item]:
    """Return the items; a list where all are in memory."""
    entries = [*entries]
    items = [entry for entry in entries if isinstance(entry, Item)]
    return items if len(items) == len(entries) else LazyItems(entries)


def read_contents(
    table: Documents, role: Role, instruction: str | None, more: Collection[str] = (), group_by: str | None = None
) -> Contents:
    """Read ids and contents of all rows, and check them; a ``ValueError`` names row and value.

    Columns other than the id, ``title``, ``instruction``, ``text``, ``image``, ``video``, or ``query`` (``document`` in
    a corpus), and those that are asked for, are not read.
    """
    columns = columns_of(table)
    wanted = item_columns(columns, role, *more, group_by)
    contents = Contents(origin_of(table))
    if group_by is not None and group_by not in columns:
        raise ValueError(
            f"{contents.origin}: no column {group_by!r} to group queries by{nearest(group_by, columns)}; it has "
            f"{', '.join(columns)}."
        )
    for index, row, origin in _scan(table, wanted):
        name, item = to_item(row, role, instruction, origin, table.folder)
        if name in contents.entries:
            first = table.origins([[*contents.entries].index(name)])[0]
            raise ValueError(f"{origin}: id {name!r} is given twice; first at {first}.")
        again = partial(read_item, table, index, wanted, role, instruction)
        contents.entries[name] = again if any(map(_is_large, item.parts)) else item
        contents.more[name] = {key: row.get(key) for key in more if key in columns}
        if group_by is not None:
            contents.groups[name] = _group(row.get(group_by), f"{origin}, column {group_by!r}")
    return contents


def item_columns(columns: Collection[str], role: Role, *more: str | None) -> list[str]:
    """Return those columns that an item is made of: its id, its content, and others that are asked for."""
    known = {role, "title", "instruction", *content_keys(columns), *more}
    return [name for name in columns if name in known or spelling(name) in ITEM_IDS[role]]


def _is_large(part: Part) -> bool:
    """Tell an image in memory from one in a file."""
    values = part.value if isinstance(part.value, tuple) else (part.value,)
    return any(isinstance(value, bytes | Image) or isinstance(getattr(value, "file", None), bytes) for value in values)


def _group(value: Any, origin: str) -> str:
    if not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(
            f"{origin}: queries are grouped by a string or a whole number, got {type(value).__name__} {value!r:.100}."
        )
    return str(value).strip()


def _scan(table: Documents, names: Collection[str] | None) -> Iterator[tuple[int, Row, str]]:
    """Go through a table: index, row and origin."""
    if isinstance(table, Table) and table.cells is None and features_of(table) is None:
        names = None  # All of them, so that a row with other keys than the first is refused.
    for start in range(0, len(table), BLOCK):
        indices = range(start, min(start + BLOCK, len(table)))
        yield from zip(indices, read_rows(table, indices, names), table.origins(indices), strict=True)


def origin_of(table: Documents) -> str:
    """Say where a table is, for messages."""
    if isinstance(table, Pages):
        return table.path
    return f"{table.origin}, {table.subset}" if table.subset else table.origin


def item_id(row: Row, role: Role, origin: str) -> str:
    """Return the id of a row's item; a ``ValueError`` says that there is none, or that it is none."""
    key = _column(row, ITEM_IDS[role], origin)
    if key is None:
        raise ValueError(f"{origin}: expected one 'id' (or {', '.join(ITEM_IDS[role])}); there are {', '.join(row)}.")
    return to_id(row[key], f"{origin}, column {key!r}")


def to_id(value: Any, origin: str) -> str:
    """Return an id as text."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{origin}: an id is a string or a whole number, got {type(value).__name__} {value!r:.100}.")
    name = str(value)
    if not IDS.fullmatch(name) or name != name.strip():
        raise ValueError(
            f"{origin}: id {name!r} cannot stand in qrels.tsv: it is empty, begins or ends with white space, or has a "
            "tab, a line end or what is no character in it. Replace it wherever it is."
        )
    return name


def to_item(row: Row, role: Role, instruction: str | None, origin: str, folder: Folder) -> tuple[str, Item]:
    """Make the id and the item of a row; a ``ValueError`` names row, column and value."""
    name = item_id(row, role, origin)
    origin = f"{origin} (id {name!r})"
    own = row.get("instruction")
    items = to_items([(_cell(row, role, origin), role, origin)], folder)
    return name, instructed(items, instruction if own is None else own, f"{origin}, key 'instruction'")[0]


def read_item(
    table: Documents, index: int, names: Collection[str], role: Role, instruction: str | None
) -> tuple[str, Item]:
    """Read the id and the item of one row."""
    (row,), (origin,) = read_rows(table, [index], names), table.origins([index])
    return to_item(row, role, instruction, origin, table.folder)


def _cell(row: Row, role: Role, origin: str) -> Any:
    """Return what a row's item is made of: the cell ``query`` or ``document``, or any of text, image and video."""
    keys = [key for key in content_keys(row) if key != "page" or row["pdf"] is not None]
    parts = {key: value for key, value in row.items() if key in keys}
    if row.get(role) is not None:
        if any(parts.values()) or row.get("title"):
            others = ", ".join(key for key in row if key in (*keys, "title"))
            raise ValueError(f"{origin}: {role!r} says all of it, and there is {others} besides; choose with cells.")
        return row[role]
    if not parts and not row.get("title"):
        raise ValueError(f"{origin}: it has none of {role}, {', '.join(KINDS)}; there are {', '.join(row)}.")
    # An empty text beside an image is none; alone, it is refused.
    parts = {kind: value for kind, value in parts.items() if value != ""} or parts
    if title := row.get("title"):
        body = parts.get("text") or ""
        if not isinstance(title, str) or not isinstance(body, str):
            raise ValueError(
                f"{origin}: 'title' and 'text' are strings where both are given; got {title!r:.100}, {body!r:.100}."
            )
        parts["text"] = f"{title} {body}".strip()
    return parts


@lru_cache(maxsize=1024)
def spelling(name: str) -> str:
    """Return a column's name as ids are looked for."""
    return name.lower().replace("_", "-").strip("-")


def _column(names: Iterable[str], spellings: Sequence[str], origin: str) -> str | None:
    """Return the column that is spelled like the first possible of some names; None if there is none."""
    for possible in spellings:
        columns = [name for name in names if spelling(name) == possible]
        if len(columns) > 1:
            raise ValueError(f"{origin}: expected one {possible!r}; there are {' and '.join(columns)}.")
        if columns:
            return columns[0]
    return None


#: A query's id, a document's, its grade, and where that is said.
Judgement: TypeAlias = tuple[str, str, Any, str]


def read_judgements(value: str | Documents) -> tuple[Qrels, str]:
    """Read judgements of a table or of a file of lines; they come with where they are.

    A ``ValueError`` names a grade that is no whole number, or that contradicts an earlier one.
    """
    if isinstance(value, str) and Path(value).suffix in LINES:
        origin, judgements = value, _of_lines(Path(value))
    else:
        table = as_rows(value)
        origin, judgements = origin_of(table), _of_table(table)
    qrels: Qrels = {}
    for query, document, grade, place in judgements:
        number = _number(grade)
        if not number.is_integer() or abs(number) > MOST_GRADE:
            raise ValueError(f"{place}: {EXPECTED}; got {query!r}, {document!r}, {grade!r:.100}.")
        if qrels.setdefault(query, {}).setdefault(document, int(number)) != number:
            raise ValueError(f"{place}: {query!r} and {document!r} had another grade before: {grade!r}.")
    return qrels, origin


def _of_table(table: Documents) -> Iterator[Judgement]:
    """Read a table of query id, corpus id and grade, which is 1 where there is no such column."""
    names, origin = columns_of(table), origin_of(table)
    query, document, grade = (_column(names, spellings, origin) for spellings in (QUERY_IDS, DOCUMENT_IDS, GRADES))
    if query is None or document is None:
        missing, spellings = ("query", QUERY_IDS) if query is None else ("corpus", DOCUMENT_IDS)
        raise ValueError(
            f"{origin}: judgements have no column of the {missing} id ({', '.join(spellings)}); there are "
            f"{', '.join(names)}. Name it with columns: {{…: {missing}-id}}."
        )
    for _, row, place in _scan(table, [name for name in (query, document, grade) if name is not None]):
        ids = [to_id(row.get(key), f"{place}, column {key!r}") for key in (query, document)]
        yield ids[0], ids[1], 1 if grade is None else row.get(grade), place


def _of_lines(path: Path) -> Iterator[Judgement]:
    """Read lines of judgements, separated by tabs or else by white space.

    They are query id, corpus id and grade; or query id, 0, corpus id and grade, as TREC has it, and perhaps one more,
    as M-BEIR has it; or what a header says.
    """
    width = 0
    layout: Layout | None = None
    separator: str | None = None
    for number, line in _text_lines(path, "query-id, corpus-id and grade, separated by tabs"):
        if not width:
            separator = "\t" if "\t" in line else None
        cells = [cell.strip() for cell in line.split(separator)]
        if not width:
            width, header = len(cells), _header(cells, separator, str(path))
            layout = header or LAYOUTS.get(width)
            if header:
                continue
        is_trec = layout == LAYOUTS[4]
        if layout is None or len(cells) != width or (is_trec and cells[1].lower() not in ("0", "q0")):
            raise ValueError(f"{path}, row {number}: {EXPECTED}; got {line!r:.200}.")
        query, document, grade = layout
        yield cells[query], cells[document], 1 if grade is None else cells[grade], f"{path}, row {number}"


def _header(cells: Sequence[str], separator: str | None, origin: str) -> Layout | None:
    """Return where query, document and grade are, if the first line is a header."""
    query, document, grade = (_column(cells, spellings, origin) for spellings in (QUERY_IDS, DOCUMENT_IDS, GRADES))
    if query is not None and document is not None:
        return cells.index(query), cells.index(document), None if grade is None else cells.index(grade)
    return LAYOUTS[3] if separator and len(cells) == 3 and math.isnan(_number(cells[2])) else None


def read_run(path: Path, evaluation: EvaluationSet) -> dict[str, dict[str, float]]:
    """Read a TREC run of an evaluation set: query name → document name → score."""
    queries, documents = {*evaluation.query_names}, {*evaluation.document_names}
    run: dict[str, dict[str, float]] = {}
    for number, line in _text_lines(path, "lines 'query Q0 document rank score tag', a TREC run"):
        cells, origin = line.split(), f"{path}, row {number}"
        if len(cells) != 6:
            raise ValueError(f"{origin}: expected 'query Q0 document rank score tag', got {line.strip()!r:.200}.")
        query, document, score = cells[0], cells[2], _number(cells[4])
        if not math.isfinite(score):
            raise ValueError(f"{origin}: score {cells[4]!r} is not a finite number.")
        if query not in queries:
            raise ValueError(
                f"{origin}: query {query!r} is none of the {len(queries)} judged queries of {evaluation.name!r}; "
                "remove its lines, or give the evaluation set that the run was made on."
            )
        if document not in documents:
            raise ValueError(f"{origin}: document {document!r} is not in the corpus of {evaluation.name!r}.")
        if document in run.setdefault(query, {}):
            raise ValueError(f"{origin}: query {query!r} has document {document!r} twice.")
        run[query][document] = score
    return run


def trec_lines(query: str, documents: Iterable[tuple[str, float]]) -> Iterator[str]:
    """Yield a query's lines of a TREC run, ``query Q0 document rank score vlmembed``, from the best document on."""
    for rank, (name, score) in enumerate(documents, start=1):
        # Nine digits bring every float32 back: whoever reads the run gets this order from it.
        yield f"{query} Q0 {name} {rank} {score:.9g} vlmembed\n"


def first_documents(scores: Mapping[str, float], depth: int) -> list[str]:
    """Return the names of the highest scores; equal ones (in float32) by name, descending, as ``trec_eval`` does."""
    return sorted(scores, key=lambda name: (np.float32(scores[name]), name), reverse=True)[:depth]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _text_lines(path: Path, content: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines that are not blank; refuse a file that has none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it holds {content}.")
    is_empty = True
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            is_empty = False
            yield number, line.rstrip("\r\n")
    if is_empty:
        raise ValueError(f"{path}: the file has no rows.")


#: A configuration: ``corpus``, ``english-queries``, ``qrels_fr``; MTEB calls judgements ``default``.
CONFIGURATION = re.compile(r"(?:(.+)[-_])?(corpus|quer(?:ies|y)|qrels)(?:[-_](.+))?|(default)")

#: What holds judgements line by line.
LINES = (".tsv", ".txt", ".trec", ".qrels")

#: Other names of a split.
SPLITS = {"validation": ("validation", "dev", "val", "valid")}


@dataclass(frozen=True)
class Place:
    """Where a table is: a file, a folder, or a configuration of a folder or Hub id."""

    path: str
    configuration: str | None = None
    named_splits: tuple[str, ...] = ()

    def splits(self, root: Folder) -> tuple[str, ...]:
        """The splits that there are; nothing for what is read whole."""
        path = Path(self.path)
        if self.configuration is not None or not path.is_dir():
            return self.named_splits
        return tuple(sorted(file.stem for file in self.lines)) or tuple(splits_of(self.path, root))

    @property
    def lines(self) -> list[Path]:
        """The files of judgements, line by line, of a folder, by split; or the only one."""
        path = Path(self.path)
        files = path.iterdir() if path.is_dir() else [path]
        return [file for file in files if file.suffix in LINES] if self.configuration is None else []

    def check(self, root: Folder) -> None:
        """Refuse links that lead out of the folder."""
        for path in [Path(self.path), *self.lines] if self.configuration is None else []:
            root.locate(str(path.relative_to(root.path)), "data", str(root.path))

    def file_of(self, split: str) -> Path | None:
        """Return the judgements of a split, line by line."""
        path = Path(self.path)
        return next((file for file in self.lines if file.stem == split or file == path), None)

    def choose(self, root: Folder, wanted: str, is_exact: bool) -> str:
        """Return the split that is wanted, or, if that need not be exact, the only one there is."""
        splits = self.splits(root)
        if is_exact and not splits and self.configuration is None:
            raise ValueError(f"{self.path}: it has no splits, so none is called {wanted!r}; leave 'split' out.")
        for name in SPLITS.get(wanted, (wanted,)):
            if name in splits or not splits:
                return name
        if len(splits) == 1 and not is_exact:
            return splits[0]
        what = self.path + (f", {self.configuration}" if self.configuration else "")
        raise ValueError(
            f"{what}: no split {wanted!r}; it has {', '.join(splits)}. Choose with vlmembed.data.EvaluationFolder and "
            "its 'split'."
        )

    def open(self, root: Folder, wanted: str, revision: str | None, allow_outside: list[str] | None) -> Table:
        """Return what is there, of the split that is wanted, or the only one."""
        split = self.choose(root, wanted, is_exact=False)
        return Table(self.path, split, self.configuration, revision=revision, allow_outside=allow_outside)


#: Of one evaluation set: ``corpus``, ``queries`` and ``qrels``.
Places = dict[str, Place]


def find_sets(path: str, revision: str | None = None) -> dict[str, Places]:
    """Return the evaluation sets of a folder or Hub id by their subset, which is empty for the one without.

    Nothing where the path is no evaluation set. Of a folder, its own files count before what its page names.
    """
    folder = Path(path)
    own = _on_disk(folder) if folder.is_dir() else None
    try:
        sets = _configured(path, revision)
    except Exception as error:  # Of many kinds: a page may be anything, and an id no id.
        if own is None:
            raise ValueError(f"{path}: what its page says of configurations cannot be read: {error}") from error
        sets = {}
    if own is not None and (not sets or Path(own["qrels"].path).exists()):
        sets[""] = own
    return sets


def _on_disk(folder: Path) -> Places | None:
    """Look for files and folders of the known names."""
    corpus = _entry(folder, "corpus")
    queries = _entry(folder, "queries") or _entry(folder, "query")
    is_usual = any((folder / name).exists() for name in ("corpus.jsonl", "queries.jsonl"))
    if not is_usual and (corpus is None or queries is None):
        return None
    places = {
        "corpus": corpus or folder / "corpus.jsonl",
        "queries": queries or folder / "queries.jsonl",
        "qrels": _entry(folder, "qrels") or folder / "qrels.tsv",
    }
    return {role: Place(str(place)) for role, place in places.items()}


def _entry(folder: Path, name: str) -> Path | None:
    """Return the file of a name, whatever its suffix, or the folder of that name."""
    entries = sorted(entry for entry in folder.iterdir() if entry.name.partition(".")[0] == name)
    usual = [entry for entry in entries if entry.name in (f"{name}.jsonl", f"{name}.tsv")]
    files = usual[:1] or [entry for entry in entries if not entry.is_dir()]
    if len(files) > 1:
        raise ValueError(f"{folder}: {' and '.join(file.name for file in files)} are two forms of the same; keep one.")
    return next(iter(files or entries), None)


def _configured(path: str, revision: str | None) -> dict[str, Places]:
    """Sort the configurations that a page names."""
    sets: dict[str, Places] = {}
    for name, splits in configurations(path, revision).items():
        if match := CONFIGURATION.fullmatch(name):
            before, role, after, is_default = match.groups()
            role = "qrels" if is_default else "queries" if role == "query" else role
            places = sets.setdefault("-".join(filter(None, (before, after))), {})
            if not is_default or role not in places:
                places[role] = Place(path, name, tuple(splits))
    shared = {role: place for role, place in sets.get("", {}).items() if role == "corpus"}
    complete = {subset: shared | places for subset, places in sets.items()}
    return {subset: places for subset, places in complete.items() if len(places) == 3}
