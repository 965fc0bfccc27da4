"""A run that is resumed, from whatever checkpoint, ends with the bits of the one that was not interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interrupted import SETTINGS, Left, Setting, differences, load, train, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def check(setting: Setting, checkpoint: Path, data: Path, folder: Path, whole: Left, number: int) -> None:
    """Resume from one checkpoint; compare what comes after it, the checkpoints that are written then included."""
    path, batches = whole.written[number]
    rest = train(setting, checkpoint, data, folder / f"from {path.stem}", path)
    losses, rows = whole.after(path, batches)
    assert rest.losses == losses, path.stem
    assert rest.rows == rows, path.stem
    later = whole.written[number + 1 :]
    assert len(rest.written) == len(later)
    for (found, _), (expected, _) in zip(rest.written, later, strict=True):
        assert found.name == expected.name
        assert differences(comparable(found, len(whole.rows) - len(rows)), comparable(expected)) == [], path.stem


def comparable(path: Path, rows_before: int = 0) -> dict[str, Any]:
    """What a checkpoint has, if metrics.csv had begun with some rows."""
    found = load(path)
    found["resuming"]["rows"] += rows_before
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.processes == 1])
def test_resumed_from_every_checkpoint(checkpoint: Path, data: Path, tmp_path: Path, name: str) -> None:
    whole = train(SETTINGS[name], checkpoint, data, tmp_path / "whole")
    for number in range(len(whole.written)):
        check(SETTINGS[name], checkpoint, data, tmp_path, whole, number)
