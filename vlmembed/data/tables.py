"""Files and data sets as tables: ``len(table)``, ``table[index] -> mapping`` and ``table.column_names``."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import datasets
import numpy as np


class JSONLines:
    """A JSONL file, read line by line when asked for.

    Not read through Arrow, which wants one type per column: here a cell may be a string in one row and a mapping in the
    next. Only the offset of each line is kept in memory.

    Args:
        path: One JSON object per line, UTF-8.

    Raises:
        ValueError: If the file does not exist, has no rows, or has a blank line between rows.
        OSError: When reading a row of a file that is another one by now: its rows would be others, unnoticed.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
        self.path = path
        self._offsets = self._scan()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            self._refuse_changes(file)
            file.seek(int(self._offsets[index]))
            line = file.readline()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}, row {index + 1}: not JSON ({error}): {line[:100]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, row {index + 1}: expected a JSON object, got {line[:100]!r}.")
        return row

    @cached_property
    def column_names(self) -> list[str]:
        """The keys of the first row."""
        return list(self[0])

    def _scan(self) -> np.ndarray:
        offsets: list[int] = []
        position, lines = 0, 0
        with self.path.open("rb") as file:
            self._version = _version(file)
            for line in file:
                lines += 1
                if line.strip():
                    offsets.append(position)
                    if len(offsets) != lines:
                        # Row numbers in messages are line numbers, so no line may be skipped.
                        raise ValueError(f"{self.path}, row {lines - 1}: a blank line; remove it.")
                position += len(line)
        if not offsets:
            raise ValueError(f"{self.path}: the file has no rows.")
        return np.array(offsets)

    def _refuse_changes(self, file: BinaryIO) -> None:
        if _version(file) != self._version:
            raise OSError(
                f"{self.path} has changed since it was opened. Write a new version of a data set to another file, and "
                "start again."
            )


def _version(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


Table: TypeAlias = JSONLines | datasets.Dataset


def open_table(path: str, split: str, subset: str | None = None) -> Table:
    """Open a JSONL, CSV or Parquet file, a folder saved with ``save_to_disk``, or what ``load_dataset`` opens.

    Args:
        path: A file, a folder, or a Hub id.
        split: Which part of a data set that has several; a file has only one.
        subset: Which configuration of a data set that has several.

    Raises:
        ValueError: If there is no such file or split, or it has no rows.
    """
    place = Path(path)
    if place.suffix in (".jsonl", ".ndjson"):
        return JSONLines(place)
    if place.suffix in (".csv", ".parquet", ".json") and not place.is_file():
        raise ValueError(f"{path}: no such file.")
    if place.suffix == ".csv":
        table = _read_csv(place)
    elif place.suffix in (".parquet", ".json"):
        table = datasets.load_dataset(place.suffix[1:], data_files=path, split="train")
    elif (place / "dataset_dict.json").exists() or (place / "state.json").exists():
        table = _choose(datasets.load_from_disk(path), split, path)
    else:
        table = datasets.load_dataset(path, subset, split=split)
    _leave_encoded(table)
    if not len(table):
        raise ValueError(f"{path}: the data set has no rows.")
    return table


def _read_csv(path: Path) -> datasets.Dataset:
    # Not datasets' own reader: it guesses types, so the text "None" becomes nothing and "1984" a number.
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    names = rows[0] if rows else []
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(names):
            raise ValueError(f"{path}, row {number}: {len(row)} cells under {len(names)} columns: {row!r:.200}")
    return datasets.Dataset.from_dict({name: [row[k] for row in rows[1:]] for k, name in enumerate(names)})


def _leave_encoded(table: datasets.Dataset) -> None:
    """Have images and the like come as they are stored: opened by `datasets`, they could be of any size, or a URL."""
    table.info.features = datasets.Features({name: _encoded(feature) for name, feature in table.features.items()})


def _encoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _encoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_encoded(feature.feature))
    is_medium = hasattr(feature, "decode") and not isinstance(feature, datasets.Json)
    return replace(feature, decode=False) if is_medium else feature


def _choose(saved: datasets.Dataset | datasets.DatasetDict, split: str, path: str) -> datasets.Dataset:
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"{path}: no split {split!r}; it has {', '.join(saved)}. Choose with Rows(path, split=…).")
    return saved[split]
