"""Kept features come back bit by bit or not at all, within their limit, whoever shares their folder and is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_features import PAYLOAD, PLENTY, TOWER, bytes_in, features_of, files, on_disk, opened, serves
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmembed.features import GIB, FeatureCache, InMemory, OnDisk, fingerprint, refuse_trainable

FORK = multiprocessing.get_context("fork")
Make = Callable[[float], FeatureCache]
SETTINGS = {"max_pixels": 1024, "precision": "bf16"}


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """From a limit in GiB to a cache; all share one folder."""
    return InMemory if request.param == "memory" else lambda limit: OnDisk(str(tmp_path / "features"), limit)


def bits(tensor: Tensor) -> list[int]:
    """So that NaN equals itself and 0 is not -0."""
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def epoch(cache: FeatureCache, images: range) -> None:
    for image in images:
        if cache.get(image) is None:
            cache.put(image, features_of(image))
    cache.end_epoch()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", [2**63 - 1, 0])
def test_what_was_kept_comes_back_bit_by_bit(make: Make, dtype: torch.dtype, key: int) -> None:
    kept = features_of(1, dtype=dtype)
    kept[0, 0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-7])
    cache = opened(make(PLENTY))
    assert cache.get(key) is None
    cache.put(key, kept)
    served = cache.get(key)
    assert served is not None
    assert (served.dtype, served.shape, bits(served)) == (dtype, kept.shape, bits(kept))
    assert (cache.hits, cache.misses) == (1, 1)


def test_later_changes_and_larger_storages_are_not_kept(make: Make) -> None:
    chunk = torch.cat([features_of(0), features_of(1)]).transpose(0, 1).contiguous().transpose(0, 1)
    part = chunk[5:].requires_grad_()
    cache = opened(make(PLENTY))
    cache.put(1, part)
    chunk.zero_()
    assert serves(cache, 1)
    served = cache.get(1)
    assert served is not None
    assert served.is_contiguous()
    assert not served.requires_grad
    assert served.untyped_storage().nbytes() == PAYLOAD


def test_features_computed_while_measuring_can_be_trained_on(make: Make) -> None:
    cache = opened(make(PLENTY))
    with torch.inference_mode():
        cache.put(1, features_of(1) * 1)
    served = cache.get(1)
    assert served is not None
    scale = torch.ones(8, requires_grad=True)
    (served * scale).sum().backward()
    torch.testing.assert_close(scale.grad, features_of(1).sum((0, 1)))


def test_no_more_than_the_limit_is_kept(make: Make, tmp_path: Path) -> None:
    """The third does not fit, and neither does a smaller one behind it, which nobody should count on."""
    cache = opened(make((3 * PAYLOAD - 1) / GIB if make is InMemory else 3 * PAYLOAD / GIB))
    cache.put(1, features_of(1))
    cache.put(1, features_of(1))
    cache.put(2, features_of(2))
    with pytest.warns(
        UserWarning, match=r"full: 3 images were kept in this run, and the next one does not fit \(limit"
    ):
        cache.put(3, features_of(3))
    cache.put(4, features_of(4, tokens=1))
    assert [cache.get(image) is not None for image in (1, 2, 3, 4)] == [True, True, False, False]
    assert bytes_in(tmp_path) <= cache.limit


def test_a_limit_is_above_zero(make: Make) -> None:
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"limit_gib .* above 0, got {limit}"):
            make(limit)


def test_a_prediction_is_announced_or_refused_before_anything_is_written(make: Make, tmp_path: Path) -> None:
    cache, sentences = make(8), list[str]()
    cache.open(TOWER)
    cache.predict(2**20 * 5 / 8, 5120, sentences.append)
    # 5120 × 0.625 MiB = 3200 MiB = 3.125 GiB, which rounds to even.
    words = "about 3.12 GiB predicted (5,120 training rows × 0.62 MiB), limit 8.00 GiB, in "
    assert words + ("memory" if isinstance(cache, InMemory) else f"{tmp_path}/features") in sentences[0]
    cache = make(2)
    cache.open(TOWER)
    with pytest.raises(ValueError, match=r"3.12 GiB predicted .* room for 2.00 GiB.* Raise limit_gib.* or remove"):
        cache.predict(2**20 * 5 / 8, 5120)
    assert cache.get(1) is None
    with pytest.raises(RuntimeError, match="Call predict before the first put"):
        cache.put(1, features_of(1))
    assert not list(tmp_path.iterdir())


def test_other_weights_get_other_features(make: Make) -> None:
    """Also where one cache is opened for one tower and then for another."""
    cache = opened(make(PLENTY))
    cache.put(1, features_of(1))
    opened(cache, "other")
    assert cache.get(1) is None
    cache.put(2, features_of(2))
    assert serves(opened(cache, "other"), 2)
    opened(cache)
    assert serves(cache, 1) == isinstance(cache, OnDisk)
    assert cache.get(2) is None


def tower() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).bfloat16()


def identity(module: nn.Module, **settings: object) -> str:
    return fingerprint(module.state_dict().items(), SETTINGS | settings)


def test_equal_towers_have_equal_fingerprints() -> None:
    turned = tower()
    turned[0].weight = nn.Parameter(turned[0].weight.detach().t().contiguous().t())
    assert identity(tower()) == identity(turned)
    weights = tower().state_dict().items()
    assert fingerprint(weights, {"a": 1, "b": [2]}) == fingerprint(weights, {"b": [2], "a": 1})


def test_a_fingerprint_sees_every_change() -> None:
    one_weight, running_mean, wider, renamed = tower(), tower(), tower().float(), nn.Sequential(nn.ReLU(), *tower())
    with torch.no_grad():
        one_weight[2].weight.view(torch.int16)[1, 5] += 1  # The smallest change there is.
        running_mean[1].running_mean[3] = 1e-20
    weights = tower().state_dict()
    reshaped = {name: weight.reshape(weight.shape[::-1]) for name, weight in weights.items()}
    reread = {name: weight.view(torch.int16) if weight.ndim else weight for name, weight in weights.items()}
    others = [identity(module) for module in (one_weight, running_mean, wider, renamed)]
    others += [fingerprint(changed.items(), SETTINGS) for changed in (reshaped, reread)]
    others += [identity(tower(), max_pixels=1025), identity(tower(), mean=[0.5])]
    assert len({identity(tower()), *others}) == 9


def test_a_setting_without_a_fixed_spelling_is_refused() -> None:
    with pytest.raises(TypeError, match="dtype is not JSON"):
        identity(tower(), dtype=torch.float32)


def test_a_tower_that_is_trained_is_refused() -> None:
    module = tower().requires_grad_(False)
    refuse_trainable(module.named_parameters())
    module[2].bias.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"'2.bias' is trained.*vlmembed.adapters.Freeze\(modules: \[vision, merger\]\)"
    ):
        refuse_trainable(module.named_parameters())


def test_images_that_come_again_are_found(make: Make) -> None:
    cache = opened(make(PLENTY))
    epoch(cache, range(0, 10))
    epoch(cache, range(9, 19))  # One of ten.
    epoch(cache, range(18, -1, -1))
    assert (cache.hits, cache.misses) == (0, 0)


@pytest.mark.parametrize("second_run", [False, True])
def test_images_that_never_come_again_are_refused(make: Make, second_run: bool) -> None:
    cache = opened(make(PLENTY))
    if second_run:
        epoch(cache, range(50, 60))
        cache = opened(make(PLENTY))
    epoch(cache, range(0, 10))
    with pytest.raises(RuntimeError, match="none of 11 images of this epoch came a second time, though 10 were kept"):
        epoch(cache, range(10, 21))


def test_what_says_nothing_about_augmentation_is_no_reason_to_refuse(make: Make) -> None:
    """An epoch of texts, one that was cut short or resumed, and a cache that had no room."""
    cache = opened(make(PLENTY))
    epoch(cache, range(0, 10))
    epoch(cache, range(0))
    epoch(cache, range(10, 20))
    epoch(cache, range(20, 24))
    tiny = opened(make(1 / GIB))
    with pytest.warns(UserWarning, match="is full"):
        epoch(tiny, range(30, 40))
    epoch(tiny, range(30, 40))


def test_processes_refuse_together(make: Make) -> None:
    """This one found nothing, but another one did."""
    cache = opened(make(PLENTY))
    epoch(cache, range(0, 10))
    cache.misses = 10
    cache.end_epoch(total=lambda number: number + 1)
    cache.misses = 10
    with pytest.raises(RuntimeError, match="none of 20 images of this epoch came a second time, though 20 were"):
        cache.end_epoch(total=lambda number: 2 * number)


# On disk


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


def another_image(path: Path) -> None:
    shutil.copy(next(file for file in files(path.parents[2]) if file != path and TOWER in file.parts), path)


def another_tower(path: Path) -> None:
    on_disk(path.parents[2], made_by="other").put(1, features_of(3))
    shutil.copy(path.parents[2] / "other" / path.parent.name / path.name, path)


def a_type_that_torch_lacks(path: Path) -> None:
    header = json.dumps({"features": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "one bit": one_bit_flipped,
    "another shape": lambda path: save_file({n: t.reshape(3, 5, 8) for n, t in load_file(path).items()}, path),
    "another type": lambda path: save_file({n: t.view(torch.int32) for n, t in load_file(path).items()}, path),
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
    assert serves(cache, 1)
    # Never too low; right again with the next run's first file.
    assert int((tmp_path / "bytes").read_text()) >= bytes_in(tmp_path)
    on_disk(tmp_path).put(3, features_of(3))
    assert int((tmp_path / "bytes").read_text()) == bytes_in(tmp_path)


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


@pytest.mark.parametrize("room", [10_000, 50])
def test_processes_fill_one_folder_together(tmp_path: Path, room: int) -> None:
    """Ranks with overlapping shards, in opposite orders; with room for all 180 images, and for 50 of them."""
    file = 40 * 3 * 8 * 4 + 200  # A little more than each takes.
    shards = [range(0, 120), range(179, 60, -1), range(40, 160)]
    processes = [FORK.Process(target=fill, args=(tmp_path, shard, room * file / GIB)) for shard in shards]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 47 * file < bytes_in(tmp_path) <= room * file
    assert int((tmp_path / "bytes").read_text()) == bytes_in(tmp_path)
    assert not files(tmp_path, ".draft")
    assert len(files(tmp_path)) == 180 or room == 50


def fill_until_killed(folder: Path, moment: str, done: Any) -> None:
    cache, calls, replace = on_disk(folder), list[Path](), os.replace

    def killed(draft: Path, path: Path) -> None:
        calls.append(path)
        if moment == "during" and len(calls) == 6:
            draft.write_bytes(b"half a")
            os.kill(os.getpid(), signal.SIGKILL)
        replace(draft, path)
        if moment == "after" and len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = killed  # type: ignore[assignment]
    for image in range(100_000):
        cache.put(image, features_of(image, tokens=40))
        done.send(image)


@pytest.mark.parametrize(("moment", "drafts", "whole"), [("during", 1, 5), ("after", 0, 6), ("any", None, None)])
def test_a_killed_process_loses_and_damages_nothing(
    tmp_path: Path, moment: str, drafts: int | None, whole: int | None
) -> None:
    """While the sixth file is written, when it is in place but still locked, or whenever it happens."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=fill_until_killed, args=(tmp_path, moment, theirs))
    process.start()
    theirs.close()
    images = [ours.recv()]
    if moment == "any":
        process.kill()
    with suppress(EOFError, OSError):  # It was killed while it sent something, or between.
        while True:
            images.append(ours.recv())
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if moment != "any":
        assert (images, len(files(tmp_path, ".draft")), len(files(tmp_path))) == ([0, 1, 2, 3, 4], drafts, whole)
    cache = on_disk(tmp_path)
    for image in images:
        assert serves(cache, image, tokens=40)
    assert len(images) <= len(files(tmp_path)) <= len(images) + 1
    for image in (len(images), len(images) + 1):
        cache.put(image, features_of(image))
        assert cache.get(image) is not None
    assert not files(tmp_path, ".draft")
    assert int((tmp_path / "bytes").read_text()) == bytes_in(tmp_path)


@pytest.mark.parametrize("state", ["  12", "half a numb", None], ids=["low", "words", "missing"])
def test_the_shared_count_is_made_again_at_the_start_of_a_run(tmp_path: Path, state: str | None) -> None:
    on_disk(tmp_path).put(1, features_of(1))
    (tmp_path / "bytes").unlink() if state is None else (tmp_path / "bytes").write_text(state)
    on_disk(tmp_path).put(2, features_of(2))
    assert int((tmp_path / "bytes").read_text()) == bytes_in(tmp_path)


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_what_is_computed_together_is_kept_together(tmp_path: Path, written: int) -> None:
    """A run that is killed between two images of a batch, and resumed, computes both anew: they round each other."""
    cache = on_disk(tmp_path)
    with cache.together([1, 2]):
        cache.put(1, features_of(1))
        cache.put(2, features_of(2))
    with suppress(KeyboardInterrupt), cache.together([2, 3, 4, 5]):  # 2 is there, and stays.
        for image in (3, 4, 5)[:written]:
            cache.put(image, features_of(image))
        raise KeyboardInterrupt
    again = on_disk(tmp_path)
    assert [serves(again, image) for image in range(1, 6)] == [True, True, False, False, False]
    assert not list(tmp_path.rglob("*.draft"))


def test_what_a_living_process_keeps_is_not_deleted(tmp_path: Path) -> None:
    cache = on_disk(tmp_path)
    with cache.together([1]):
        cache.put(1, features_of(1))
        [draft] = tmp_path.rglob("*.draft")
        draft.rename(draft.with_name(draft.name.replace(f".{os.getpid()}.", f".{os.getppid()}.")))
        assert serves(on_disk(tmp_path), 1)
