"""Files of rows that are read in place: of JSONL, JSON, CSV, TSV and tar, memory has only where each row is."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import shutil
import tarfile
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import numpy as np
import pyarrow
from datasets.utils.file_utils import xopen
from filelock import FileLock

from vlmembed.data.columns import nearest
from vlmembed.files import digest, version_of, whole_file
from vlmembed.media import limit

#: The most bytes that a line of a JSONL, CSV or TSV file may have, a value of a JSON file, or a text in a tar.
MAX_LINE_BYTES = limit("VLMEMBED_MAX_LINE_BYTES", 2**26)
#: What decompressing leaves free on the disk of the cache.
RESERVED_BYTES = 2**30

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TOO_LONG = f"has more than {MAX_LINE_BYTES:,} bytes; VLMEMBED_MAX_LINE_BYTES sets the limit."
DECODER = json.JSONDecoder()
#: Of what JSON has besides strings, numbers and brackets: two escapes of six characters, -Infinity.
LONGEST_TOKEN = 16


def open_bytes(path: str | Path) -> BinaryIO:
    """Open a file, also one of the Hub, whose content is decompressed if its name ends in .gz or .zst."""
    file: Any = xopen(str(path), "rb")
    if compression := COMPRESSIONS.get(Path(path).suffix.lower()):
        # Arrow's, which unlike Python's packages says so when a file has been cut off.
        file = pyarrow.CompressedInputStream(file, compression)
    return cast(BinaryIO, file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, 2**20))


def read_lines(path: str | Path, name: Path | None = None) -> Iterator[bytes]:
    """Read a file line by line; a line above ``MAX_LINE_BYTES`` is refused before it is in memory."""
    with open_bytes(path) as file:
        lines = iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(_decompressed(lines, path), start=1):
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{name or path}, row {number}: the line {TOO_LONG} Are there line ends between the rows?"
                )
            yield line


def text_lines(path: Path, name: Path | None = None) -> Iterator[str]:
    """Read a text file line by line; a ``ValueError`` names a line that is too long or not UTF-8."""
    for number, line in enumerate(read_lines(path, name), start=1):
        yield _decode(line, f"{name or path}, row {number}", is_first=number == 1)


def _decode(line: bytes, origin: str, is_first: bool = False) -> str:
    try:
        return line.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin}: not UTF-8 ({error}): {line[:100]!r}") from error


def _decompressed(pieces: Iterator[bytes], path: str | Path) -> Iterator[bytes]:
    """Pass on what is read of a file; say which one it was that cannot be decompressed."""
    try:
        yield from pieces
    except OSError as error:  # Arrow's, which has neither number nor name.
        if Path(path).suffix.lower() not in COMPRESSIONS:
            raise
        raise ValueError(f"{path}: cannot be decompressed: {error}. Is the file whole?") from error


def unpacked(path: Path, has_lines: bool = False) -> Path:
    """Return a file itself, or of a compressed one the content, once it is in the cache of ``datasets``."""
    if path.suffix.lower() not in COMPRESSIONS:
        return path
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "vlmembed"
    name = digest([str(path.resolve()), repr(version_of(path.stat()))])
    target = folder / f"{name}{path.with_suffix('').suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        if not target.exists():
            with whole_file(target) as draft, draft.open("wb") as output:
                for position, piece in enumerate(read_lines(path) if has_lines else _read_pieces(path)):
                    if position % 4096 == 0 and shutil.disk_usage(folder).free < RESERVED_BYTES:
                        raise ValueError(f"{path}: its content does not fit on the disk of {folder}.")
                    output.write(piece)
    return target


def _read_pieces(path: Path) -> Iterator[bytes]:
    with open_bytes(path) as file:
        yield from _decompressed(iter(partial(file.read, 2**16), b""), path)


class Records(ABC):
    """Rows of a file, read when asked for; only where each begins is in memory.

    Not through Arrow, which wants one type per column: a cell may be a string in one row and a mapping in the next.
    What is compressed is decompressed once, into the cache of ``datasets``.
    Raises an ``OSError`` when the file has changed: its rows would be others, unnoticed.
    """

    has_lines = False  # Which are of bounded length.

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
        self.path, self._file = path, unpacked(path, self.has_lines)
        self._version = version_of(self._file.stat())
        #: Where each row begins, and where the last one ends.
        self._bounds = self._index()
        if not len(self):
            raise ValueError(f"{path}: the file has no rows.")

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        with self._file.open("rb") as file:
            if version_of(os.fstat(file.fileno())) != self._version:
                raise OSError(f"{self.path} has changed since it was opened. Write a new version to another file.")
            return [self._read(file, int(index)) for index in indices]

    @cached_property
    def column_names(self) -> list[str]:
        """The keys of the first row."""
        return list(self.__getitems__([0])[0])

    def select_columns(self, names: Iterable[str]) -> Records:
        """Return the same table: a row is read whole."""
        return self

    def origins(self, indices: Sequence[int]) -> list[str]:
        """Say where rows stand, for messages."""
        return [f"{self.path}, row {index + 1}" for index in indices]

    @abstractmethod
    def _index(self) -> np.ndarray: ...

    @abstractmethod
    def _read(self, file: BinaryIO, index: int) -> dict[str, Any]: ...


def _between(file: BinaryIO, bounds: np.ndarray, index: int) -> bytes:
    file.seek(int(bounds[index]))
    return file.read(int(bounds[index + 1] - bounds[index]))


def _as_array(numbers: array[int]) -> np.ndarray:
    return np.frombuffer(numbers, dtype=np.int64)


class JSONLines(Records):
    """A JSONL file."""

    has_lines = True

    def _index(self) -> np.ndarray:
        bounds = array("q")
        position, end, blank = 0, 0, 0
        for line in read_lines(self._file, self.path):
            if not line.strip():
                blank = blank or len(bounds) + 1
            elif blank:  # Row numbers in messages are line numbers, so no line may be skipped.
                raise ValueError(f"{self.path}, row {blank}: a blank line; remove it.")
            else:
                bounds.append(position)
                end = position + len(line)
            position += len(line)
        bounds.append(end)
        return _as_array(bounds)

    def _read(self, file: BinaryIO, index: int) -> dict[str, Any]:
        return parse_line(_between(file, self._bounds, index), f"{self.path}, row {index + 1}")


def parse_line(line: str | bytes, origin: str) -> dict[str, Any]:
    """Return the row that a line of a JSONL file is; a ``ValueError`` says what it is instead."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: not JSON ({error}): {line[:100]!r}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{origin}: expected a JSON object, got {line[:100]!r}.")
    return row


class Delimited(Records):
    """A CSV or TSV file with a header, all of whose cells are strings, since nothing says otherwise.

    Not ``datasets``' reader: it guesses types, so the text "None" becomes nothing and "1984" a number.
    """

    has_lines = True

    def __init__(self, path: Path, delimiter: str = ","):
        self._delimiter = delimiter
        super().__init__(path)

    def _index(self) -> np.ndarray:
        bounds, position = array("q"), 0

        def lines() -> Iterator[str]:
            nonlocal position
            for number, line in enumerate(read_lines(self._file, self.path), start=1):
                position += len(line)
                yield _decode(line, f"{self.path}, row {number}", is_first=number == 1)

        reader = self._reader(lines())
        try:
            self._names: list[str] = next(reader, [])
            bounds.append(position)  # Of lines, the reader takes no more than the row has.
            for row in reader:
                if len(row) != len(self._names):
                    counts = f"{len(row)} cells under {len(self._names)} columns"
                    raise ValueError(f"{self.path}, row {len(bounds)}: {counts}: {row!r:.200}")
                bounds.append(position)
        except csv.Error as error:
            kind = "CSV" if self._delimiter == "," else "TSV"
            hint = "is a quote left open, or one inside a quoted cell not doubled?"
            raise ValueError(f"{self.path}, line {reader.line_num}: not {kind}: {error}; {hint}") from error
        if twice := [name for name in self._names if self._names.count(name) > 1]:
            raise ValueError(f"{self.path}: two columns are called {twice[0]!r}.")
        return _as_array(bounds)

    def _read(self, file: BinaryIO, index: int) -> dict[str, Any]:
        text = _between(file, self._bounds, index).decode()
        return dict(zip(self._names, next(self._reader([text])), strict=True))

    def _reader(self, lines: Iterable[str]) -> Any:
        csv.field_size_limit(MAX_LINE_BYTES)
        return csv.reader(lines, delimiter=self._delimiter, strict=True)


class _Scanner:
    """Steps through a JSON text of which one value is in memory at a time; positions count bytes.

    The text is read as Latin-1, in which a character is a byte, and what is structure in JSON looks as in UTF-8.
    """

    def __init__(self, file: BinaryIO, origin: str):
        self._file, self._origin = file, origin
        self.position = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0

    def peek(self) -> str:
        """Step to the next character that is not white space, and return it; nothing at the end."""
        while text := self._ahead(64):
            rest = text.lstrip(" \t\r\n")
            self.position += len(text) - len(rest)
            if rest:
                return rest[0]
        return ""

    def take(self, expected: str) -> str:
        """Step over the next character, which must be one of some."""
        character = self.peek()
        if not character or character not in expected:
            wanted, got = " or ".join(map(repr, expected)), repr(character) if character else "the end"
            raise ValueError(f"{self._origin}, byte {self.position + 1}: not JSON: expected {wanted}, got {got}.")
        self.position += 1
        return character

    def value(self) -> str:
        """Step over the next value, and return its text."""
        self.peek()
        size = 0
        while size <= MAX_LINE_BYTES:
            size = min(max(4 * size, 2**12), MAX_LINE_BYTES + 1)
            text = self._ahead(size)
            try:
                end = DECODER.raw_decode(text)[1]
            except json.JSONDecodeError as error:
                is_at_end = error.msg.startswith("Unterminated string") or error.pos > len(text) - LONGEST_TOKEN
                if len(text) < size or not is_at_end:  # Else the value goes on behind the text.
                    place = f"{self._origin}, byte {self.position + error.pos + 1}"
                    raise ValueError(f"{place}: not JSON ({error.msg}).") from error
                continue
            except RecursionError as error:
                raise ValueError(
                    f"{self._origin}, byte {self.position + 1}: the value is nested too deeply."
                ) from error
            if end < size:  # Else it may be half of a number.
                self.position += end
                return text[:end]
        raise ValueError(f"{self._origin}, byte {self.position + 1}: the value {TOO_LONG}")

    def _ahead(self, size: int) -> str:
        self._file.seek(self.position)
        return self._file.read(size).decode("latin-1")

    def elements(self) -> Iterator[int]:
        """Step through a list or an object, and yield where each element begins, for the caller to step over."""
        closing = {"[": "]", "{": "}"}[self.take("[{")]
        if self.peek() == closing:
            self.take(closing)
            return
        while True:
            self.peek()
            yield self.position
            if self.take("," + closing) == closing:
                return

    def key(self) -> str:
        """Step over the key of an object and the colon, and return the key."""
        if self.peek() != '"':
            self.take('"')
        key = json.loads(self.value().encode("latin-1"))
        self.take(":")
        return str(key)

    def bounds(self) -> tuple[str, np.ndarray]:
        """Step over a list; return whether it is of objects or other values, where these begin, and its end."""
        bounds, form = array("q"), "values"
        for start in self.elements():
            if not bounds and self.peek() == "{":
                form = "objects"
            bounds.append(start)
            self.value()
        bounds.append(self.position)
        return form, _as_array(bounds)


class JSONFile(Records):
    """A JSON file that is one value; which rows it has follows from its form.

    - A list of objects: these; a list of anything else: a column ``value``.
    - An object of one list of objects, ``{"info": …, "data": […]}``: these. Of several, ``key`` chooses one.
    - An object of lists of one length: columns.
    - An object without lists, or where ``key`` is ``*``: columns ``key`` and ``value``.
    """

    def __init__(self, path: Path, key: str | None = None):
        self._key, self._columns = key, dict[str, np.ndarray]()
        super().__init__(path)

    def _index(self) -> np.ndarray:
        with self._file.open("rb", 2**20) as file:
            scanner = _Scanner(file, str(self.path))
            if self._key not in (None, "*"):
                self._go_to(str(self._key), scanner)
            self._form, bounds = scanner.bounds() if scanner.peek() == "[" else self._object(scanner)
            if self._key in (None, "*") and scanner.peek():
                raise ValueError(f"{self.path}, byte {scanner.position + 1}: not JSON: something follows the end.")
        return bounds

    def _go_to(self, wanted: str, scanner: _Scanner) -> None:
        keys = []
        for _ in scanner.elements() if scanner.peek() == "{" else ():
            keys.append(scanner.key())
            if keys[-1] == wanted:
                return
            scanner.bounds() if scanner.peek() == "[" else scanner.value()
        has = f"it has {', '.join(keys[:20])}{', …' if len(keys) > 20 else ''}" if keys else "it is no object"
        raise ValueError(f"{self.path}: no key {wanted!r}{nearest(wanted, keys)}; {has} (subset chooses one).")

    def _object(self, scanner: _Scanner) -> tuple[str, np.ndarray]:
        lists: dict[str, tuple[str, np.ndarray]] = {}
        keys, bounds = [], array("q")
        for start in scanner.elements():
            bounds.append(start)
            keys.append(scanner.key())
            if scanner.peek() == "[" and self._key != "*":
                lists[keys[-1]] = scanner.bounds()
            else:
                scanner.value()
        bounds.append(scanner.position)
        if not lists:
            return "pairs", _as_array(bounds)
        of_objects = [key for key, (form, _) in lists.items() if form == "objects"]
        if len(of_objects) == 1 and (len(lists) == 1 or len(lists) < len(keys)):
            return lists[of_objects[0]]
        lengths = {key: len(places) - 1 for key, (_, places) in lists.items()}
        if len(of_objects) > 1 or len(lists) < len(keys) or len({*lengths.values()}) > 1:
            shown = ", ".join(f"{key} ({length})" for key, length in [*lengths.items()][:20])
            raise ValueError(
                f"{self.path}: which rows are meant? It is an object with lists {shown}. Choose one, such as "
                f"subset: {(of_objects or [*lists])[0]}; or subset: '*' for columns 'key' and 'value'."
            )
        self._columns = {key: places for key, (_, places) in lists.items()}
        return "columns", next(iter(self._columns.values()))

    def _read(self, file: BinaryIO, index: int) -> dict[str, Any]:
        if self._form == "columns":
            return {name: self._value(file, bounds, index) for name, bounds in self._columns.items()}
        if self._form == "pairs":
            text = self._text(file, self._bounds, index)
            key, end = DECODER.raw_decode(text)
            return {"key": key, "value": DECODER.raw_decode(text[end:].lstrip(" \t\r\n:"))[0]}
        value = self._value(file, self._bounds, index)
        if self._form == "values":
            return {"value": value}
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}, row {index + 1}: expected a JSON object, got {value!r:.100}.")
        return value

    def _value(self, file: BinaryIO, bounds: np.ndarray, index: int) -> Any:
        return DECODER.raw_decode(self._text(file, bounds, index))[0]

    def _text(self, file: BinaryIO, bounds: np.ndarray, index: int) -> str:
        return _decode(_between(file, bounds, index), f"{self.path}, row {index + 1}")


def open_json(path: Path, key: str | None = None) -> Records:
    """Open a JSON file, or one that has JSON in each line."""
    if key is None and path.is_file():
        with unpacked(path).open("rb") as file:
            is_object = file.read(1024).removeprefix(codecs.BOM_UTF8).startswith(b"{")
            file.seek(0)
            ends = is_object and file.readline(MAX_LINE_BYTES + 1).rstrip().endswith(b"}")
            if ends and file.read(1024).lstrip().startswith(b"{"):
                return JSONLines(path)
    return JSONFile(path, key)


class Tar(Records):
    """A shard of a WebDataset: a row is the files beside each other whose names differ in their endings only.

    The endings are the columns. Of .txt and the like a cell is the text, of .json what is in it, of .cls a number, of
    others ``{"bytes": …, "path": …}``. As `datasets` has them, there are also ``__key__`` and ``__url__``, the name
    without ending and the path of the tar. Nothing is unpacked.
    """

    def _index(self) -> np.ndarray:
        fields, keys, places = list[str](), list[bytes](), array("q")
        for key, beside in groupby(self._members(), itemgetter(0)):
            where, members = f"{self.path}, row {len(keys) + 1}", dict[str, tarfile.TarInfo]()
            for _, field, member in beside:
                if field in members:
                    raise ValueError(f"{self.path}: the member {member.name} comes twice.")
                if field.rpartition(".")[2].lower() in DECODED and member.size > MAX_LINE_BYTES:
                    raise ValueError(f"{where}: the member {member.name} {TOO_LONG}")
                members[field] = member
            fields = fields or [*members]
            if members.keys() != {*fields}:
                raise ValueError(
                    f"{where}: the files of {key} end in {', '.join(sorted(members))}, those of row 1 in "
                    f"{', '.join(sorted(fields))}. Every row needs the same, beside each other in the tar."
                )
            keys.append(key.encode("utf-8", "surrogateescape"))
            places.extend(place for field in fields for place in (members[field].offset_data, members[field].size))
        if len({*keys}) < len(keys):
            ((twice, _),) = Counter(keys).most_common(1)
            raise ValueError(
                f"{self.path}: the members {os.fsdecode(twice)}.* do not stand beside each other, so they are no rows. "
                "Pack the tar again, by name: tar --sort=name."
            )
        self._fields, self._keys = fields, np.array(keys)
        self._places = _as_array(places).reshape(len(keys), len(fields), 2)
        return np.arange(len(keys) + 1)

    def _members(self) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        """Yield the files, with their names without the endings, and these."""
        try:
            with tarfile.open(self._file, "r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # Else it remembers all.
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, field = name.partition(".")
                    if member.isdir() or name.startswith((".", "__")):
                        continue
                    if problem := _problem(member, field):
                        raise ValueError(f"{self.path}: the member {member.name} {problem}.")
                    yield folder + slash + stem, field, member
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{self.path}: not a tar that can be read: {error}. Is the file whole?") from error

    def _read(self, file: BinaryIO, index: int) -> dict[str, Any]:
        key = os.fsdecode(self._keys[index])
        row: dict[str, Any] = {}
        for field, (start, size) in zip(self._fields, self._places[index].tolist(), strict=True):
            file.seek(start)
            row[field] = self._cell(file.read(size), field, f"{key}.{field}", index)
        return {**row, "__key__": key, "__url__": str(self.path)}

    def _cell(self, content: bytes, field: str, name: str, index: int) -> Any:
        decode = DECODED.get(field.rpartition(".")[2].lower())
        if decode is None:
            return {"bytes": content, "path": name}
        try:
            return decode(content)
        except (ValueError, RecursionError) as error:
            kind = {json.loads: "JSON", int: "a whole number"}.get(decode, "UTF-8")
            raise ValueError(
                f"{self.path}, row {index + 1}: the member {name} is not {kind} ({error}): {content[:100]!r}"
            ) from error


def _problem(member: tarfile.TarInfo, field: str) -> str:
    """Say why a member of a tar is no file of a row, if it is none."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "leads out of the tar; pack it again"
    if not member.isreg() or member.issparse():
        return "is no plain file (a link?); pack it as one"
    return "" if field else "has no ending, so it belongs to no row; pack it with one"


#: How files with these endings are read, of those that WebDataset knows; what can run or fill the memory is not.
DECODED: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(("txt", "text", "transcript"), bytes.decode),
    **dict.fromkeys(("cls", "cls2", "index", "inx", "id"), int),
    **dict.fromkeys(("json", "jsn"), json.loads),
}
