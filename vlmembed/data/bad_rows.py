"""Training rows that cannot be used: left out of their batches in the loader's workers, and written down."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock
from torch.utils.data import Dataset

from vlmembed.data.collate import ExampleCollator
from vlmembed.data.loader import ExampleLists
from vlmembed.types import BadRow, Batch, Example, RankingBatch

#: What was read of a row: its number, from 0 on, and the example.
NumberedExample = tuple[int, Example]

#: The most characters of a reason that are kept; a library's own message may quote what it could not read.
LONGEST_REASON = 1000


class ReadableRows(Dataset[list[NumberedExample | BadRow]]):
    """Training rows by lists of row numbers, and a `BadRow` in place of each that cannot be read.

    Only a ``ValueError`` is a row's fault. A file that is gone, or a bug, is not.

    Args:
        examples: The rows, without mercy.
    """

    def __init__(self, examples: ExampleLists) -> None:
        self.examples = examples

    def __getitem__(self, rows: Sequence[int]) -> list[NumberedExample | BadRow]:
        return [self._read(row) for row in rows]

    def _read(self, row: int) -> NumberedExample | BadRow:
        try:
            (example,) = self.examples[[row]]
        except ValueError as error:
            return _bad(row, error)
        return row, example


class UsableRows:
    """Makes a batch of the rows that can be used, in a loader worker.

    Where the batch of all that were read fails, each is tried by itself. So which rows are left out depends on nothing
    but the rows: a resumed run, and any number of processes, leaves out the same.

    Args:
        collate: Makes batches of examples.
    """

    def __init__(self, collate: ExampleCollator) -> None:
        self.collate = collate

    def __call__(self, found: Sequence[NumberedExample | BadRow]) -> Batch | RankingBatch:
        """Make a batch.

        Raises:
            ValueError: If no row is left, or what is wrong is no single row's fault.
        """
        bad = [each for each in found if isinstance(each, BadRow)]
        good = [each for each in found if not isinstance(each, BadRow)]
        try:
            return self._batch(good, bad)
        except ValueError:
            refused = [each for row, example in good if (each := self._refusal(row, example)) is not None]
            if not refused:
                raise
        left_out = {each.row for each in refused}
        return self._batch([each for each in good if each[0] + 1 not in left_out], bad + refused)

    def _batch(self, good: Sequence[NumberedExample], bad: Sequence[BadRow]) -> Batch | RankingBatch:
        if not good:
            raise ValueError(
                f"None of the {len(bad)} rows of a batch can be used, and there is nothing to train on. Repair or "
                f"remove them, or raise batch_size. The first: {bad[0].reason}"
            )
        return replace(self.collate([example for _, example in good]), bad_rows=tuple(bad))

    def _refusal(self, row: int, example: Example) -> BadRow | None:
        try:
            self.collate.check(example)
        except ValueError as error:
            # An error that names nothing of the row is about the configuration.
            if any(item.origin and item.origin in str(error) for item in (example.query, *example.documents)):
                return _bad(row, error)
            raise
        return None


class BadRowFile:
    """``bad_rows.jsonl`` of a run: which training rows were left out, each once, and why.

    All processes write to it, each what its own batches lack. A run that is resumed in its folder goes on with the
    file, so that it does not start to count again.

    Args:
        folder: The run's.
        limit: How many rows may be left out.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.path = folder / "bad_rows.jsonl"
        self.limit = limit
        self._known: set[int] = set()

    def add(self, rows: Sequence[BadRow]) -> None:
        """Write down and warn of the rows that are not there yet.

        Raises:
            ValueError: If they are more than the limit now.
        """
        new = {each.row: each for each in rows if each.row not in self._known}
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(".bad_rows.lock")).acquire(poll_interval=0.002):
            written = self._append(new)
        self._known = written | new.keys()
        if len(self._known) > self.limit:
            raise ValueError(
                f"{len(self._known)} training rows cannot be used, more than max_bad_rows={self.limit}. {self.path} "
                "has them all. Repair or remove them, or raise data.init_args.max_bad_rows. "
                f"The last: {rows[-1].reason}"
            )

    def _append(self, new: dict[int, BadRow]) -> set[int]:
        """Add what other processes, and the run before, have not; return what was there."""
        content = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        written: set[int] = set()
        for line in content.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # Cut short, when a process or the disk had its end.
                written.add(json.loads(line)["row"])
        with self.path.open("a", encoding="utf-8") as file:
            if content and not content.endswith("\n"):
                file.write("\n")
            for row, each in new.items():
                if row not in written:
                    file.write(json.dumps(asdict(each)) + "\n")
                    warnings.warn(f"Left out of training: {each.reason} ({self.path})", stacklevel=4)
        return written


def _bad(row: int, error: ValueError) -> BadRow:
    return BadRow(row + 1, str(error)[:LONGEST_REASON])
