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
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kept_features import PAYLOAD, PLENTY, TOWER, bytes_in, features_of, files, on_disk
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmembed.features import GIB, OnDisk


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
    size = bytes_in(tmp_path)
    cache = OnDisk(str(tmp_path), 1.5 * size / GIB)
    cache.open(TOWER)
    cache.predict(size, 1)
    cache.open("other")
    with pytest.raises(ValueError, match=r"Raise limit_gib, delete what belongs to other weights"):
        cache.predict(size, 1)


def test_a_prediction_above_the_disk_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    cache = OnDisk(str(tmp_path / "not" / "there"), 10 * free / GIB)
    cache.open(TOWER)
    with pytest.raises(ValueError, match=r"room for [\d.]+ GiB.* by what the disk has left.* name another folder"):
        cache.predict(2 * free, 1)


def one_bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


def a_type_that_torch_lacks(path: Path) -> None:
    header = json.dumps({"features": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))


def another_image(path: Path) -> None:
    shutil.copy(next(file for file in files(path.parents[2]) if file != path and TOWER in file.parts), path)


def another_tower(path: Path) -> None:
    on_disk(path.parents[2], made_by="other").put(1, features_of(3))
    shutil.copy(path.parents[2] / "other" / path.parent.name / path.name, path)


def saved(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda path: save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "emptied": lambda path: path.write_bytes(b""),
    "a picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500)),
    "one bit": one_bit_flipped,
    "another shape": saved(lambda tensor: tensor.reshape(3, 5, 8)),
    "another type of the same bytes": saved(lambda tensor: tensor.view(torch.int32)),
    "foreign tensors": lambda path: save_file({"features": features_of(1), "weight": torch.ones(3)}, path),
    "a type that torch lacks": a_type_that_torch_lacks,
    "another image": another_image,
    "another tower": another_tower,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_deleted_and_made_again(tmp_path: Path, kind: str) -> None:
    cache = on_disk(tmp_path)
    cache.put(1, features_of(1))
    (path,) = files(tmp_path)
    cache.put(2, features_of(2))
    DAMAGES[kind](path)
    with pytest.warns(UserWarning, match=f"{re.escape(str(path))} is damaged"):
        assert cache.get(1) is None
    assert not path.exists()
    cache.put(1, features_of(1))
    served = cache.get(1)
    assert served is not None
    assert torch.equal(served, features_of(1))
    # Never too low; right again with the next run's first file.
    assert int((tmp_path / "bytes").read_text()) >= bytes_in(tmp_path)
    on_disk(tmp_path).put(3, features_of(3))
    assert int((tmp_path / "bytes").read_text()) == bytes_in(tmp_path)


def test_files_are_spread_over_folders(tmp_path: Path) -> None:
    cache = on_disk(tmp_path)
    for image in range(600):
        cache.put(image, features_of(image, tokens=1))
    counts: dict[Path, int] = {}
    for path in files(tmp_path):
        counts[path.parent] = counts.get(path.parent, 0) + 1
    assert len(counts) == 256
    assert max(counts.values()) == 3


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
    assert not files(tmp_path, ".draft")


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
    assert not files(tmp_path, ".draft")
    assert int((tmp_path / "bytes").read_text()) == bytes_in(tmp_path)


def test_processes_keep_to_the_limit_together(tmp_path: Path) -> None:
    file = 40 * 3 * 8 * 4 + 200  # A little more than each takes.
    fill_from_three_processes(tmp_path, 50 * file / GIB)
    assert 47 * file < bytes_in(tmp_path) <= 50 * file


FILLING = """
import os, pathlib, signal, sys, kept_features as tests
cache, calls, replace = tests.on_disk(pathlib.Path(sys.argv[1])), [], os.replace
def killed(draft, path):
    calls.append(path)
    if sys.argv[2] == "during" and len(calls) == 6:
        pathlib.Path(draft).write_bytes(b"half a")
        os.kill(os.getpid(), signal.SIGKILL)
    replace(draft, path)
    if sys.argv[2] == "after" and len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = killed
for image in range(100_000):
    cache.put(image, tests.features_of(image, tokens=40))
    print(image, flush=True)
"""


@pytest.mark.parametrize(("moment", "drafts", "whole"), [("during", 1, 5), ("after", 0, 6), ("any", None, None)])
def test_a_killed_process_loses_and_damages_nothing(
    tmp_path: Path, moment: str, drafts: int | None, whole: int | None
) -> None:
    """While the sixth file is written, when it is in place but still locked, or whenever it happens."""
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}"}
    words = [sys.executable, "-c", FILLING, str(tmp_path), moment]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    if moment == "any":
        process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    assert process.wait() == -signal.SIGKILL
    images = [int(line) for line in lines if line.endswith("\n")]
    if moment != "any":
        assert (images, len(files(tmp_path, ".draft")), len(files(tmp_path))) == ([0, 1, 2, 3, 4], drafts, whole)
    cache = on_disk(tmp_path)
    for image in images:
        served = cache.get(image)
        assert served is not None
        assert torch.equal(served, features_of(image, tokens=40))
    assert len(images) <= len(files(tmp_path)) <= len(images) + 1
    for image in (len(images), len(images) + 1):
        cache.put(image, features_of(image))
        assert cache.get(image) is not None
    assert not files(tmp_path, ".draft")
    assert int((tmp_path / "bytes").read_text()) == bytes_in(tmp_path)


@pytest.mark.parametrize("state", ["", "  12", "half a numb", None], ids=["empty", "low", "words", "missing"])
def test_the_shared_count_is_made_again_at_the_start_of_a_run(tmp_path: Path, state: str | None) -> None:
    on_disk(tmp_path).put(1, features_of(1))
    (tmp_path / "bytes").unlink() if state is None else (tmp_path / "bytes").write_text(state)
    on_disk(tmp_path).put(2, features_of(2))
    assert int((tmp_path / "bytes").read_text()) == bytes_in(tmp_path)
