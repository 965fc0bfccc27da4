"""Tables of rows as `datasets` or JSONL has them, in files, folders and on the Hub."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import yaml
from huggingface_hub import hf_hub_download, metadata_load

from vlmembed.data.cells import URL, Folder
from vlmembed.media import limit

#: The most bytes that a line of a JSONL or TSV file may have.
MAX_LINE_BYTES = limit("VLMEMBED_MAX_LINE_BYTES", 2**26)


def read_lines(path: Path) -> Iterator[bytes]:
    """Read a file line by line; a line above ``MAX_LINE_BYTES`` is refused before it is in memory."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), start=1):
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}, row {number}: the line has more than {MAX_LINE_BYTES:,} bytes; VLMEMBED_MAX_LINE_BYTES "
                    "sets the limit. Are there line ends between the rows?"
                )
            yield line


def text_lines(path: Path) -> Iterator[str]:
    """Read a text file line by line; a ``ValueError`` names a line that is too long or not UTF-8."""
    for number, line in enumerate(read_lines(path), start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, row {number}: not UTF-8 ({error}): {line[:100]!r}") from error


class JSONLines:
    """A JSONL file, read when asked for; only the offset of each line is in memory.

    Not through Arrow, which wants one type per column: a cell may be a string in one row and a mapping in the next.
    Raises an ``OSError`` when the file has changed: its rows would be others, unnoticed.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
        self.path, self._version = path, _version(path.stat())
        offsets: list[int] = []
        position, blank = 0, 0
        for line in read_lines(path):
            if not line.strip():
                blank = blank or len(offsets) + 1
            elif blank:  # Row numbers in messages are line numbers, so no line may be skipped.
                raise ValueError(f"{path}, row {blank}: a blank line; remove it.")
            else:
                offsets.append(position)
            position += len(line)
        if not offsets:
            raise ValueError(f"{path}: the file has no rows.")
        self._offsets = np.array(offsets)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = []
        with self.path.open("rb") as file:
            if _version(os.fstat(file.fileno())) != self._version:
                raise OSError(f"{self.path} has changed since it was opened. Write a new version to another file.")
            for index in indices:
                file.seek(int(self._offsets[index]))
                line = file.readline()
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{self.path}, row {index + 1}: not JSON ({error}): {line[:100]!r}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{self.path}, row {index + 1}: expected a JSON object, got {line[:100]!r}.")
                rows.append(row)
        return rows

    @cached_property
    def column_names(self) -> list[str]:
        """The keys of the first row."""
        return list(self.__getitems__([0])[0])


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


RawTable: TypeAlias = JSONLines | datasets.Dataset


def open_table(path: str, split: str, subset: str | None, folder: Folder, revision: str | None = None) -> RawTable:
    """Open what a path or a Hub id stands for; a ``ValueError`` if there is no such file or split, or no row."""
    file = Path(path)
    kind = file.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        return JSONLines(file)
    if kind in (".csv", ".json", ".parquet") and not file.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        if file.is_file():
            table = _read_file(file, kind)
        elif (file / "dataset_dict.json").exists() or (file / "state.json").exists():
            table = _open_saved(path, split, folder)
        else:
            table = _load(path, split, subset, folder, revision)
    except Exception as error:  # Of many kinds, and often raised from what is the reason.
        if isinstance(error, ValueError) and str(error).startswith(path):
            raise
        raise ValueError(f"{path}: cannot be opened: {error.__cause__ or error}") from error
    # Images and the like come as they are stored: opened by `datasets`, they could be of any size, or a URL.
    table.info.features = datasets.Features({name: _encoded(feature) for name, feature in table.features.items()})
    if not len(table):
        raise ValueError(f"{path}: the data set has no rows.")
    return table


def _read_file(path: Path, kind: str) -> datasets.Dataset:
    if kind == ".csv":
        return _read_csv(path)
    if kind not in (".json", ".parquet"):
        raise ValueError(
            f"{path}: unknown kind of file {kind!r}. Rows are in .jsonl, .ndjson, .csv, .json or .parquet files, not "
            "compressed, or in a folder that datasets.load_dataset opens."
        )
    if kind == ".json":
        _refuse_long_lines(path)
    return datasets.load_dataset(kind[1:], data_files=glob.escape(str(path)), split="train")


def _read_csv(path: Path) -> datasets.Dataset:
    # Not datasets' reader: it guesses types, so the text "None" becomes nothing and "1984" a number.
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(text_lines(path), strict=True)
    try:
        names, *rows = [*reader] or [[]]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}; is a quote left open?") from error
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}.")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise ValueError(f"{path}, row {number}: {len(row)} cells under {len(names)} columns: {row!r:.200}")
    return datasets.Dataset.from_dict({name: [row[k] for row in rows] for k, name in enumerate(names)})


def _open_saved(path: str, split: str, folder: Folder) -> datasets.Dataset:
    """Open what ``save_to_disk`` wrote; its own files name those that hold the rows."""
    table = datasets.load_from_disk(path, keep_in_memory=False)
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise ValueError(f"{path}: no split {split!r}; it has {', '.join(table)}. Choose with Rows(split=…).")
        table = table[split]
    for file in table.cache_files:
        folder.locate(os.path.abspath(file["filename"]), "data", path)
    return table


def _load(path: str, split: str, subset: str | None, folder: Folder, revision: str | None) -> datasets.Dataset:
    """Open a folder or a Hub id as ``load_dataset`` does, of whose files none lies elsewhere."""
    _refuse_other_files(path, folder)
    builder = datasets.load_dataset_builder(path, subset, revision=revision)
    files = [file for files in (builder.config.data_files or {}).values() for file in files]
    local = [file for file in files if not file.startswith(f"hf://datasets/{path.removeprefix('hf://datasets/')}@")]
    prepared = Path(builder.cache_dir).exists()
    for file in local:  # Also links, and what the pages of older releases say.
        located = folder.locate(file if URL.match(file) else os.path.abspath(file), "data", path)
        if not prepared and located.suffix in (".json", ".jsonl", ".ndjson"):
            _refuse_long_lines(located)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _refuse_other_files(path: str, folder: Folder) -> None:
    """Refuse a data set whose page names files elsewhere before they are looked for: an address would be asked."""
    for name, config in _configurations(path):
        for pattern in _strings([config.get("data_files"), config.get("data_dir")]):
            # Chained, as in zip://x::http://y, any part may be an address.
            folder.locate(pattern.replace("::", "://"), "data", f"{path}, {name}")


def _configurations(path: str, revision: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what the page of a folder or Hub id says of each configuration, and the name of the page."""
    for name in ("README.md", ".huggingface.yaml"):
        try:
            page, offline = Path(path, name), datasets.config.HF_HUB_OFFLINE
            if not Path(path).is_dir():
                options: Any = {"repo_type": "dataset", "revision": revision, "local_files_only": offline}
                page = Path(hf_hub_download(path, name, **options))
            metadata = metadata_load(page) if name == "README.md" else yaml.safe_load(page.read_text())
        except OSError:  # There is none, or no Hub; the data set may be in a cache.
            continue
        for config in (metadata or {}).get("configs") or ():
            yield name, config


def configurations(path: str, revision: str | None = None) -> dict[str, list[str]]:
    """Return the configurations that the page of a folder or Hub id names, and the splits of each that it names."""
    splits: dict[str, list[str]] = {}
    for _, config in _configurations(path, revision):
        files = config.get("data_files")
        entries = files if isinstance(files, list) else []
        named = [entry["split"] for entry in entries if isinstance(entry, dict) and "split" in entry]
        splits[str(config.get("config_name", "default"))] = [*map(str, named or (["train"] if files else []))]
    return splits


def splits_of(path: str, folder: Folder) -> list[str]:
    """Return the splits of a folder; none where it is one saved data set."""
    if (Path(path) / "dataset_dict.json").exists():
        return [*json.loads((Path(path) / "dataset_dict.json").read_text())["splits"]]
    if (Path(path) / "state.json").exists():
        return []
    _refuse_other_files(path, folder)
    return [*map(str, datasets.load_dataset_builder(path).config.data_files or ())]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(inner)


def _refuse_long_lines(path: Path) -> None:
    """Refuse a file that a library would take into memory whole; a file within the limit has no such line."""
    if path.stat().st_size > MAX_LINE_BYTES:
        deque(read_lines(path), maxlen=0)


def _encoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _encoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_encoded(feature.feature))
    is_medium = hasattr(feature, "decode") and not isinstance(feature, datasets.Json)
    return replace(feature, decode=False) if is_medium else feature
