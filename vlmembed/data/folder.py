"""The folder of a data set, which the files that its rows name may not leave."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants

#: ``https://…``, ``file:/…``, ``data:…``, but not ``figure:1.png``.
URL = re.compile(r"[a-z][a-z0-9+.-]+:/|(file|data):", re.IGNORECASE)


@dataclass(frozen=True)
class Folder:
    """Where the images and videos of a data set are.

    A data set that somebody else wrote could name any file of this machine, to have it embedded, shown in a report or
    written into another data set. So a path that leads out of the folder is refused, whether it is absolute, goes up,
    or goes through a link; and nothing is ever downloaded.

    Args:
        path: Where relative paths start.
        others: Folders whose files may be named besides.
    """

    path: Path
    others: tuple[Path, ...] = ()

    def find(self, value: Any, kind: str, origin: str) -> Path:
        """Return the file that a cell names.

        Args:
            value: The path, relative to the folder or absolute.
            kind: What it should be, for error messages: ``image`` or ``video``.
            origin: Where the cell came from, for error messages.

        Raises:
            ValueError: If it is no path, leads out of the folder, or there is no such file.
        """
        if not isinstance(value, str | Path) or not str(value):
            raise ValueError(
                f"{origin}: expected the path of an {kind} file, got {type(value).__name__} {value!r:.100}."
            )
        if URL.match(str(value)):
            raise ValueError(
                f"{origin}: the {kind} {value!r:.100} is a URL, and nothing is downloaded. Put the file into "
                f"{self.path}, and give its path."
            )
        path = self.path / value
        try:
            str(value).encode()
            real, found = Path(os.path.realpath(path)), path.is_file()
        except (OSError, ValueError) as error:  # Too long; with a null byte; with what is no character.
            raise ValueError(f"{origin}: the {kind} file {value!r:.100} cannot be looked for: {error}.") from error
        if not any(real.is_relative_to(allowed) for allowed in self._allowed):
            raise ValueError(
                f"{origin}: the {kind} file {str(value)!r} leads out of the data set's folder {self.path}, to {real}. "
                "Move the file there, or if you trust this data set to name files of another folder, allow that one: "
                f"allow_outside: [{real.parent}] beside 'path' (vlmembed.data.Rows, vlmembed.data.EvaluationFolder)."
            )
        if not found:
            raise ValueError(f"{origin}: the {kind} file {path} does not exist.")
        return path

    @cached_property
    def _allowed(self) -> tuple[Path, ...]:
        return tuple(Path(os.path.realpath(folder)) for folder in (self.path, *self.others))


def folder_of(path: Path, allow_outside: Iterable[str] | None) -> Folder:
    """Return the folder of a data set.

    Args:
        path: Its file, its folder, or its Hub id. What is not one file may also name what ``datasets`` has downloaded
            or unpacked, because that is where its own files are.
        allow_outside: Folders whose files may be named besides.
    """
    others = tuple(map(Path, allow_outside or ()))
    if path.is_file():
        return Folder(path.parent, others)
    config = datasets.config
    downloads = constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH
    return Folder(path, (*others, *map(Path, downloads)))
