"""Training rows that cannot be used: left out of their batches in loader workers, and written down by the run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch.utils.data import Dataset

from vlmembed.types import BadRow, Example

#: What was read of a row: its number, from 0 on, and the example.
NumberedExample = tuple[int, Example]

#: The most characters of a reason; a library's message may quote what it could not read.
LONGEST_REASON = 1000


class ReadableRows(Dataset[list[NumberedExample | BadRow]]):
    """Rows of a ``vlmembed.data.Source`` by lists of numbers, and a `BadRow` in place of one that raises ValueError."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, indices: Sequence[int]) -> list[NumberedExample | BadRow]:
        try:
            return [*zip(indices, self.rows.__getitems__(indices), strict=True)]
        except ValueError as error:
            if len(indices) == 1:
                return [BadRow(indices[0] + 1, str(error)[:LONGEST_REASON])]
            return [row for index in indices for row in self[[index]]]


class SkipBadRows:
    """Makes a batch (by ``collate``) of the rows that can be used, in a loader worker.

    Where that fails, ``check`` tries the rows one by one: which are left out depends on nothing but the rows.
    """

    def __init__(self, collate: Callable[[list[Example]], Any], check: Callable[[Example], None]) -> None:
        self.collate = collate
        self.check = check

    def __call__(self, rows: Sequence[NumberedExample | BadRow]) -> Any:
        """Make a batch; a ``ValueError`` says that no row is left, or what is no single row's fault."""
        bad = [row for row in rows if isinstance(row, BadRow)]
        good = [row for row in rows if not isinstance(row, BadRow)]
        try:
            return self._batch(good, bad)
        except ValueError:
            refused = []
            for index, example in good:
                try:
                    self.check(example)
                except ValueError as error:
                    # An error that names nothing of the row is about the configuration.
                    if not any(
                        item.origin and item.origin in str(error) for item in (example.query, *example.documents)
                    ):
                        raise
                    refused.append(BadRow(index + 1, str(error)[:LONGEST_REASON]))
            if not refused:
                raise
        left_out = {row.row for row in refused}
        return self._batch([row for row in good if row[0] + 1 not in left_out], bad + refused)

    def _batch(self, good: Sequence[NumberedExample], bad: Sequence[BadRow]) -> Any:
        if not good:
            raise ValueError(
                f"None of the {len(bad)} rows of a batch can be used, and there is nothing to train on. Repair or "
                f"remove them, or raise batch_size. The first: {bad[0].reason}"
            )
        return replace(self.collate([example for _, example in good]), bad_rows=tuple(bad))


class BadRowFile:
    """``bad_rows.jsonl`` of a run: which training rows were left out, once each, and why.

    All processes write to it, and a resumed run appends to it, so that it does not start to count again.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.path = folder / "bad_rows.jsonl"
        self.limit = limit
        self._known: set[tuple[int, str]] = set()  # Of a stream's parts, rows have the same numbers.

    def add(self, rows: Sequence[BadRow]) -> None:
        """Write down and warn of rows that are not there yet; a ``ValueError`` if they are more than the limit now."""
        new = {key: row for row in rows if (key := (row.row, row.reason)) not in self._known}
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(".bad_rows.lock")).acquire(poll_interval=0.002):
            self._known = self._append(new) | new.keys()
        if len(self._known) > self.limit:
            raise ValueError(
                f"{len(self._known)} training rows cannot be used, more than max_bad_rows={self.limit}. {self.path} "
                "has them all. Repair or remove them, or raise data.init_args.max_bad_rows. "
                f"The last: {rows[-1].reason}"
            )

    def _append(self, new: dict[tuple[int, str], BadRow]) -> set[tuple[int, str]]:
        """Add what other processes, and the run before, have not; return what was there."""
        content = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        written: set[tuple[int, str]] = set()
        for line in content.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # Cut short, when a process or the disk had its end.
                row = json.loads(line)
                written.add((row["row"], row["reason"]))
        with self.path.open("a", encoding="utf-8") as file:
            if content and not content.endswith("\n"):
                file.write("\n")
            for key, bad in new.items():
                if key not in written:
                    file.write(json.dumps(asdict(bad)) + "\n")
                    warnings.warn(f"Left out of training: {bad.reason} ({self.path})", stacklevel=4)
        return written
