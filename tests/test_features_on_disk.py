"""A folder of features is never damaged, overfull or trusted too far, whoever writes in it and is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kept_features import PAYLOAD, PLENTY, TOWER, bytes_in, features_of, files, on_disk
from safetensors.torch import load_file, save_file

from vlmembed.features import GIB, STALE_SECONDS, OnDisk


def test_the_folder_of_earlier_runs_counts_towards_the_limit(tmp_path: Path) -> None:
    for run, made_by in enumerate((TOWER, "other")):
        on_disk(tmp_path, made_by=made_by).put(run, features_of(run))
    held = bytes_in(tmp_path)
    full = on_disk(tmp_path, limit=(held + PAYLOAD) / GIB)
    with pytest.warns(UserWarning, match="is full: 0 images"):
        full.put(2, features_of(2))
    shutil.rmtree(tmp_path / "other")
    again = on_disk(tmp_path, limit=(held + PAYLOAD) / GIB)
    again.put(2, features_of(2))
    assert again.get(2) is not None
    assert bytes_in(tmp_path) <= again.limit


def test_a_prediction_counts_what_is_there_once_and_what_others_left_too(tmp_path: Path) -> None:
    on_disk(tmp_path).put(1, features_of(1))
    held = bytes_in(tmp_path)
    cache = OnDisk(str(tmp_path), 1.5 * held / GIB)
    cache.open(TOWER)
    said: list[str] = []
    cache.predict(held, 1, said.append)
    assert f", {held / 2**10:.2f} KiB of them there already, limit" in said[0]
    cache.open("other")
    with pytest.raises(ValueError, match=r"0.\d+ KiB there belong to other weights or settings: delete"):
        cache.predict(held, 1)


def test_a_prediction_above_the_disk_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    cache = OnDisk(str(tmp_path / "not" / "there"), 10 * free / GIB)
    cache.open(TOWER)
    with pytest.raises(
        ValueError, match=r"do not fit the disk, which has [\d.]+ GiB left: about .* name another folder"
    ):
        cache.predict(2 * free, 1)


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes.txt' is a file"):
        OnDisk(str(tmp_path / "notes.txt"), 1).open(TOWER)


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def one_bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


def another_shape(path: Path) -> None:
    save_file({name: tensor.reshape(3, 5, 8) for name, tensor in load_file(path).items()}, path)


def another_type(path: Path) -> None:
    """The same bytes."""
    save_file({name: tensor.view(torch.int32) for name, tensor in load_file(path).items()}, path)


def a_picture(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))


def anybody_elses_tensors(path: Path) -> None:
    save_file({"features": features_of(1), "weight": torch.ones(3)}, path)


def a_type_that_torch_lacks(path: Path) -> None:
    header = json.dumps({"features": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))


def another_images(path: Path) -> None:
    shutil.copy(next(file for file in files(path.parents[2]) if file != path and TOWER in file.parts), path)


def another_towers(path: Path) -> None:
    on_disk(path.parents[2], made_by="other").put(1, features_of(3))
    shutil.copy(path.parents[2] / "other" / path.parent.name / path.name, path)


DAMAGES = [
    torn,
    emptied,
    one_bit_flipped,
    another_shape,
    another_type,
    a_picture,
    anybody_elses_tensors,
    a_type_that_torch_lacks,
    another_images,
    another_towers,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_deleted_and_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cache = on_disk(tmp_path)
    cache.put(1, features_of(1))
    (path,) = files(tmp_path)
    cache.put(2, features_of(2))
    damage(path)
    with pytest.warns(UserWarning, match=f"{re.escape(str(path))} is damaged"):
        assert cache.get(1) is None
    assert not path.exists()
    cache.put(1, features_of(1))
    served = cache.get(1)
    assert served is not None
    assert torch.equal(served, features_of(1))
    assert int((tmp_path / "bytes").read_text()) == bytes_in(tmp_path)


def test_a_file_that_another_process_made_again_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between this one's reading it and deleting it."""
    cache = on_disk(tmp_path)
    cache.put(1, features_of(1))
    read_bytes, before = Path.read_bytes, iter([b"torn"])
    monkeypatch.setattr(Path, "read_bytes", lambda path: next(before, None) or read_bytes(path))
    with pytest.warns(UserWarning, match="is damaged"):
        assert cache.get(1) is None
    assert cache.get(1) is not None


def test_files_are_spread_over_folders(tmp_path: Path) -> None:
    cache = on_disk(tmp_path)
    for image in range(600):
        cache.put(image, features_of(image, tokens=1))
    counts: dict[Path, int] = {}
    for path in files(tmp_path):
        counts[path.parent] = counts.get(path.parent, 0) + 1
    assert len(counts) == 256
    assert max(counts.values()) == 3


def test_an_old_temporary_file_is_removed_and_a_fresh_one_left(tmp_path: Path) -> None:
    on_disk(tmp_path).put(1, features_of(1))
    (path,) = files(tmp_path)
    old, fresh = path.with_name("old.tmp"), path.with_name("fresh.tmp")
    for temporary in (old, fresh):
        temporary.write_bytes(bytes(1000))
    an_hour_ago = time.time() - STALE_SECONDS - 1
    os.utime(old, (an_hour_ago, an_hour_ago))
    on_disk(tmp_path).put(2, features_of(2))
    assert (old.exists(), fresh.exists()) == (False, True)


def test_a_disk_that_fills_up_ends_the_keeping_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = on_disk(tmp_path)
    cache.put(1, features_of(1))

    def no_space(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.warns(UserWarning, match="No space left"), pytest.warns(UserWarning, match="cache is full: 1 images"):
        cache.put(2, features_of(2))
    with warnings.catch_warnings(action="error"):
        cache.put(3, features_of(3))
    assert cache.get(1) is not None
    assert (cache.get(2), cache.get(3)) == (None, None)
    assert not files(tmp_path, ".tmp")


def fill(folder: Path, images: range, limit: float) -> None:
    warnings.simplefilter("ignore")
    cache = on_disk(folder, limit)
    for image in images:
        if cache.get(image) is None:
            cache.put(image, features_of(image, tokens=40))
        served = cache.get(image)
        assert served is None or torch.equal(served, features_of(image, tokens=40))


def fill_from_three_processes(folder: Path, limit: float) -> None:
    """Ranks with overlapping shards, in opposite orders."""
    context = multiprocessing.get_context("fork")
    shards = [range(0, 120), range(179, 60, -1), range(40, 160)]
    processes = [context.Process(target=fill, args=(folder, shard, limit)) for shard in shards]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_processes_fill_one_folder_together(tmp_path: Path) -> None:
    fill_from_three_processes(tmp_path, PLENTY)
    cache = on_disk(tmp_path)
    for image in range(180):
        served = cache.get(image)
        assert served is not None, image
        assert torch.equal(served, features_of(image, tokens=40))
    assert len(files(tmp_path)) == 180
    assert not files(tmp_path, ".tmp")
    assert int((tmp_path / "bytes").read_text()) == bytes_in(tmp_path)


def test_processes_keep_to_the_limit_together(tmp_path: Path) -> None:
    file = 40 * 3 * 8 * 4 + 200  # A little more than each takes.
    fill_from_three_processes(tmp_path, 50 * file / GIB)
    assert 47 * file < bytes_in(tmp_path) <= 50 * file


FILLING = """
import os, pathlib, signal, sys, kept_features as tests
cache, place = tests.on_disk(pathlib.Path(sys.argv[1])), sys.argv[2]
def die_there(frame, event, argument):
    if f"{event} {frame.f_code.co_name}" == place and image == 5:
        os.kill(os.getpid(), signal.SIGKILL)
for image in range(100_000):
    sys.setprofile(die_there if place else None)
    cache.put(image, tests.features_of(image, tokens=40))
    sys.setprofile(None)
    print(image, flush=True)
"""


def fill_until_killed(folder: Path, place: str = "", seconds: float = 0) -> list[int]:
    """Fill in a process that is killed some time after it began, or where it calls or leaves a function.

    Returns:
        The images that it had kept, as it said while it lived.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", FILLING, str(folder), place],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert process.stdout is not None
    said = [process.stdout.readline()]
    if not place:
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    assert process.wait() == -signal.SIGKILL
    return [int(line) for line in said if line.endswith("\n")]


def check_nothing_is_lost(folder: Path, kept: list[int]) -> None:
    cache = on_disk(folder)
    for image in kept:
        served = cache.get(image)
        assert served is not None
        assert torch.equal(served, features_of(image, tokens=40))
    assert len(kept) <= len(files(folder)) <= len(kept) + 1
    for image in (len(kept), len(kept) + 1):
        cache.put(image, features_of(image))
        assert cache.get(image) is not None
    assert int((folder / "bytes").read_text()) == bytes_in(folder)


@pytest.mark.parametrize("seconds", [0.02, 0.1])
def test_a_killed_process_loses_and_damages_nothing(tmp_path: Path, seconds: float) -> None:
    check_nothing_is_lost(tmp_path, fill_until_killed(tmp_path, seconds=seconds))


@pytest.mark.parametrize(
    ("place", "temporary", "whole"),
    [("return _record", 0, 5), ("call write_bytes", 0, 5), ("return write_bytes", 1, 5), ("return _add", 0, 6)],
)
def test_wherever_it_is_killed(tmp_path: Path, place: str, temporary: int, whole: int) -> None:
    """With the file counted and not begun, or written under its temporary name, or in place but still locked."""
    kept = fill_until_killed(tmp_path, place)
    assert kept == [0, 1, 2, 3, 4]
    assert (len(files(tmp_path, ".tmp")), len(files(tmp_path))) == (temporary, whole)
    check_nothing_is_lost(tmp_path, kept)


@pytest.mark.parametrize("state", ["", "  12", "half a numb", None], ids=["empty", "low", "words", "missing"])
def test_the_shared_count_is_made_again_at_the_start_of_a_run(tmp_path: Path, state: str | None) -> None:
    on_disk(tmp_path).put(1, features_of(1))
    (tmp_path / "bytes").unlink() if state is None else (tmp_path / "bytes").write_text(state)
    on_disk(tmp_path).put(2, features_of(2))
    assert int((tmp_path / "bytes").read_text()) == bytes_in(tmp_path)
