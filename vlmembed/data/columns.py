"""The language of columns: how cells are made of a data set's columns, and which rows are read. README.md shows it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain, islice, zip_longest
from string import Formatter
from typing import Any, TypeAlias

from vlmembed.data.cells import KINDS, URL, Folder, content_keys, is_content

# Not `Any`, of which the parser of YAML would read every string once more, as YAML.
Scalar: TypeAlias = str | int | float | bool | None
_Inner: TypeAlias = Scalar | list[Scalar] | dict[str, Scalar | list[Scalar]]
_Middle: TypeAlias = Scalar | list[_Inner] | dict[str, _Inner]
#: How a cell is made: a path (``passages[].text``), a template (``{title}: {text}``), a list of these, or a mapping.
Expression: TypeAlias = Scalar | list[_Middle] | dict[str, _Middle]
#: What a value must be: a value, one of a list, or a mapping with ``not``, ``min``, ``max``.
Condition: TypeAlias = Scalar | list[Scalar] | dict[str, Scalar | list[Scalar]]

Row = Mapping[str, Any]
#: Makes a value of a row; a ``ValueError`` says what is wrong with it.
Read = Callable[[Row], Any]
#: Finds what an id stands for.
Find = Callable[[Any], Any]

#: So many names are looked through for one that was perhaps meant: each takes some microseconds.
NAMES = 10_000
STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d*)\]")


class Several(list[Any]):
    """One value for each element of a list, as ``[]`` asks for."""


@dataclass
class Language:
    """Reads expressions over the columns of one data set, once: what they make of a row is cheap.

    Raises a ``ValueError`` that names what is no expression, or no column, and what is nearest.
    """

    columns: Sequence[str]
    origin: str
    tables: Mapping[str, Find] = field(default_factory=dict)
    #: Where the files are that the cells name, if not in the folder of the rows that they become part of.
    folder: Folder | None = None
    #: The columns that are read.
    used: set[str] = field(default_factory=set)

    def reader(self, expression: Any) -> Read:
        """Return what makes a value of a row, by an expression."""
        if isinstance(expression, str):
            is_template = "{" in expression and expression not in self.columns
            return self._template(expression) if is_template else self.path(expression)
        if isinstance(expression, list):
            reads = [self.reader(inner) for inner in expression]
            return lambda row: [value for read in reads for value in _flat(read(row)) if not _is_empty(value)]
        if not isinstance(expression, Mapping):
            raise ValueError(
                f"{self.origin}: {expression!r} is no column; a constant is written {{constant: {expression}}}."
            )
        keys = {*expression}
        if keys == {"constant"}:
            return lambda row: expression["constant"]
        if keys == {"ids", "table"}:
            return self._lookup(expression["ids"], expression["table"])
        if keys == {"text", "marks"}:
            return self._marks(expression["text"], expression["marks"])
        return self._parts(expression)

    def path(self, path: str) -> Read:
        """Return what is at a path: ``column``, ``column.key``, ``column[0]``, or ``column[].key`` of every element."""
        if path in self.columns:
            self.used.add(path)
            return lambda row: row.get(path)
        steps = [name or (int(index) if index else Several) for name, index in STEP.findall(path)]
        if not steps or STEP.sub("", path) or steps[0] not in self.columns:
            known, wanted = [*map(str, self.columns)], str(steps[0]) if steps else path
            raise ValueError(
                f"{self.origin}: no column {wanted!r}{nearest(wanted, known)}; it has {', '.join(known)}. "
                "A text that is the same in every row is written {constant: …}."
            )
        column = str(steps[0])
        self.used.add(column)
        return lambda row: _walk(row.get(column), steps[1:], path)

    def _template(self, template: str) -> Read:
        try:
            pieces = [*Formatter().parse(template)]
        except ValueError as error:
            raise ValueError(
                f"{self.origin}: {template!r} is no template: {error}. Braces are written twice."
            ) from None
        for _, name, form, conversion in pieces:
            if form or conversion or name == "":
                raise ValueError(f"{self.origin}: the template {template!r} has {{{name}}}, not the name of a column.")
        literals = [literal for literal, *_ in pieces]
        reads = [self.path(name) for _, name, *_ in pieces if name is not None]

        def fill(values: Sequence[Any]) -> str | None:
            if all(_is_empty(value) for value in values):
                return None
            texts = [_as_text(value, template) for value in values]
            return "".join(chain.from_iterable(zip_longest(literals, texts, fillvalue=""))).strip()

        return lambda row: _spread([read(row) for read in reads], fill, template)

    def _lookup(self, ids: Any, table: Any) -> Read:
        if table not in self.tables:
            known = ", ".join(self.tables) or "none"
            raise ValueError(f"{self.origin}: no table {table!r}{nearest(str(table), self.tables)}; there are {known}.")
        read, find = self.reader(ids), self.tables[table]

        def look_up(row: Row) -> Any:
            value = read(row)
            return Several(map(find, value)) if isinstance(value, list) else find(value)

        return look_up

    def _parts(self, expression: Mapping[str, Any]) -> Read:
        if unknown := [key for key in expression if key not in content_keys(expression)]:
            raise ValueError(
                f"{self.origin}: unknown key {unknown[0]!r} of {dict(expression)}{nearest(str(unknown[0]), KINDS)}; a "
                f"cell of several columns has {', '.join(KINDS)}, or marks beside text; others are constant, or ids "
                "and table."
            )
        reads = [self.reader(inner) for inner in expression.values()]

        def join(values: Sequence[Any]) -> dict[str, Any] | None:
            parts = zip(expression, values, strict=True)
            return {kind: self._located(kind, value) for kind, value in parts if not _is_empty(value)} or None

        return lambda row: _spread([read(row) for read in reads], join, expression)

    def _marks(self, text: Any, marks: Any) -> Read:
        """Replace marks such as ``<image>`` by the parts that they stand for, in their order."""
        if not isinstance(marks, Mapping) or not all(isinstance(part, Mapping) for part in marks.values()):
            raise ValueError(f"{self.origin}: marks is {marks!r}; it is written {{'<image>': {{image: column}}}}.")
        if any("page" in part for part in marks.values()):
            raise ValueError(f"{self.origin}: of a mark, a page is written {{pdf: '{{file}}#page={{page}}'}}.")
        reads = [self.reader(text), *(self._parts(part) for part in marks.values())]
        split = re.compile("(" + "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) + ")").split

        def replace(values: Sequence[Any]) -> list[dict[str, Any]] | None:
            pieces = split(values[0] or "")
            queues = {}
            for mark, parts in zip(marks, values[1:], strict=True):
                queue = [(kind, value) for kind, files in (parts or {}).items() for value in _flat(files)]
                if pieces.count(mark) != len(queue):
                    raise ValueError(
                        f"the text {values[0]!r:.100} has {pieces.count(mark)} marks {mark!r}, and there are "
                        f"{len(queue)} files to put there."
                    )
                queues[mark] = iter(queue)
            kinds = [next(queues[piece]) if piece in queues else ("text", piece) for piece in pieces]
            return [{"type": kind, kind: value} for kind, value in kinds if not _is_empty(value)] or None

        return lambda row: _spread([read(row) for read in reads], replace, marks)

    def _located(self, kind: str, value: Any) -> Any:
        """Make the path of a file that lies in another table's folder absolute."""
        if self.folder is None or kind in ("text", "page"):
            return value
        if isinstance(value, list):
            return [self._located(kind, inner) for inner in value]
        return str(self.folder.path / value) if isinstance(value, str) and not URL.match(value) else value

    def where(self, conditions: Mapping[str, Any]) -> Callable[[Row], bool]:
        """Return whether a row meets all conditions."""
        tests = [
            (self.path(path), _condition(wanted, f"{self.origin}: where: {path}"))
            for path, wanted in conditions.items()
        ]
        return lambda row: all(any(map(meets, _flat(read(row)))) for read, meets in tests)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a question for the name that was perhaps meant, of the first so many."""
    close = get_close_matches(name, [*islice(names, NAMES)], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _condition(wanted: Any, origin: str) -> Callable[[Any], bool]:
    if isinstance(wanted, list):
        tests = [_condition(inner, origin) for inner in wanted]
        return lambda value: any(test(value) for test in tests)
    if not isinstance(wanted, Mapping):
        # A CSV file has texts only.
        text = str(wanted) if isinstance(wanted, int | float) and not isinstance(wanted, bool) else wanted
        return lambda value: value == wanted or (isinstance(value, str) and value == text)
    if unknown := wanted.keys() - {"not", "min", "max"}:
        raise ValueError(f"{origin} is {dict(wanted)}: {min(unknown)!r} is none of not, min, max.")
    excluded = _condition(wanted["not"], origin) if "not" in wanted else lambda value: False
    low, high = (wanted.get(name) for name in ("min", "max"))
    if not all(bound is None or isinstance(bound, int | float) for bound in (low, high)):
        raise ValueError(f"{origin} is {dict(wanted)}: min and max are numbers.")

    def within(value: Any) -> bool:
        if low is None and high is None:
            return True
        try:
            return (-math.inf if low is None else low) <= float(value) <= (math.inf if high is None else high)
        except (TypeError, ValueError):
            return False

    return lambda value: within(value) and not excluded(value)


def _walk(value: Any, steps: Sequence[Any], path: str) -> Any:
    for number, step in enumerate(steps):
        if value is None:
            return None
        if step is Several:
            if isinstance(value, Mapping):  # A list of mappings, as older releases of `datasets` hold it.
                value = [dict(zip(value, values, strict=False)) for values in zip(*value.values(), strict=False)]
            if not isinstance(value, list):
                raise ValueError(f"in {path!r}, [] stands for the elements of a list; got {_shown(value)}.")
            inner = [_walk(element, steps[number + 1 :], path) for element in value]
            return Several(one for element in inner for one in (element if isinstance(element, Several) else [element]))
        if isinstance(step, int):
            if not isinstance(value, list) or step >= len(value):
                raise ValueError(f"in {path!r}, there is no element {step} of {_shown(value)}.")
            value = value[step]
        elif not isinstance(value, Mapping):
            raise ValueError(f"in {path!r}, {step!r} is the key of a mapping; got {_shown(value)}.{_list_hint(value)}")
        elif step not in value:
            raise ValueError(f"in {path!r}, there is no {step!r}{nearest(step, value)} in {_shown([*value])}.")
        else:
            value = value[step]
    return value


def _list_hint(value: Any) -> str:
    return " Elements of a list are written column[].key." if isinstance(value, list) else ""


def _spread(values: Sequence[Any], combine: Callable[[Sequence[Any]], Any], expression: Any) -> Any:
    """Combine values; where some are several, once for each element, the others repeated."""
    lengths = {len(value) for value in values if isinstance(value, Several)}
    if not lengths:
        return combine(values)
    if len(lengths) > 1:
        raise ValueError(f"{expression} joins lists of {' and '.join(map(str, sorted(lengths)))} elements.")
    rows = range(lengths.pop())
    return Several(combine([value[row] if isinstance(value, Several) else value for value in values]) for row in rows)


def _flat(value: Any) -> list[Any]:
    """Return the elements of a list, or the one value."""
    return value if isinstance(value, list) and not is_content(value) else [value]


def _as_text(value: Any, template: str) -> str:
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise ValueError(f"the template {template!r} takes texts and numbers; got {_shown(value)}.{_list_hint(value)}")
    return "" if value is None else str(value)


def _is_empty(value: Any) -> bool:
    """Tell what many data sets write where there is nothing."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.100}"
