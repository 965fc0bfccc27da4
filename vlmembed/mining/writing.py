"""Writing training rows: JSONL, and beside it the images that are in no file yet."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from vlmembed.media import load_image
from vlmembed.types import Frame, Item, Part


class RowWriter:
    """Writes training rows that ``vlmembed.data.Rows`` reads; the file is there once all of them are.

    Images and videos in files are named by their path relative to the written file; where they are outside of its
    folder, it is said how to allow them. Open images are written as PNG into a folder beside it, each once.

    Args:
        path: The JSONL file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent / f"{path.stem}_images"
        self.count = 0
        self._outside: set[Path] = set()
        self._beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")

    def __enter__(self) -> RowWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._beside.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._beside, self.path)
            self._say_outside()
        else:
            self._beside.unlink()

    def write(
        self,
        query: Item,
        positives: Sequence[Item],
        negatives: Sequence[Item],
        scores: Sequence[float] | None = None,
    ) -> None:
        """Write one row.

        Args:
            query: What is asked.
            positives: The right answers.
            negatives: Hard negatives.
            scores: A teacher's, of the positives and then the negatives.
        """
        documents = {"positive": positives, "negatives": negatives}
        row = {"query": self._cell(query)} | {name: [*map(self._cell, items)] for name, items in documents.items()}
        given = {} if scores is None else {"scores": [*scores]}
        self._file.write(json.dumps(row | given, ensure_ascii=False) + "\n")
        self.count += 1

    def _cell(self, item: Item) -> Any:
        if [part.kind for part in item.parts] == ["text"]:
            return item.parts[0].value
        return [{"type": part.kind, part.kind: self._value(part)} for part in item.parts]

    def _value(self, part: Part) -> Any:
        if isinstance(part.value, str):
            return part.value
        return [*map(self._name, part.value)] if isinstance(part.value, tuple) else self._name(part.value)

    def _name(self, frame: Frame) -> str:
        path = (frame if isinstance(frame, Path) else self._saved(frame)).resolve()
        folder = self.path.parent.resolve()
        if not path.is_relative_to(folder):
            self._outside.add(path.parent)
        return Path(os.path.relpath(path, folder)).as_posix()

    def _say_outside(self) -> None:
        if self._outside:
            folder = os.path.commonpath(self._outside)
            print(f"{self.path} names files of {folder}: read it with Rows(path, allow_outside: [{folder}]).")

    def _saved(self, image: Image.Image) -> Path:
        path = self.folder / f"{Part('image', image).digest.hex()}.png"
        if not path.exists():
            self.folder.mkdir(exist_ok=True)
            beside = path.with_name(f".{uuid.uuid4().hex}.png")
            # As models see it: PNG would lose which side is up.
            load_image(image).save(beside)
            os.replace(beside, path)
        return path
