"""Kept features come back bit by bit or not at all, and never take more room than they were given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kept_features import PAYLOAD, PLENTY, TOWER, bytes_in, features_of, files, on_disk, opened
from torch import Tensor, nn

from vlmembed.features import GIB, FeatureCache, InMemory, OnDisk, fingerprint, refuse_trainable

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
    served = cache.get(1)
    assert served is not None
    assert torch.equal(served, features_of(1))
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


def test_the_prediction_says_how_much_how_many_and_where(make: Make, tmp_path: Path) -> None:
    cache = make(8)
    cache.open(TOWER)
    sentences: list[str] = []
    cache.predict(2**20 * 5 / 8, 5120, sentences.append)
    (sentence,) = sentences
    # 5120 × 0.625 MiB = 3200 MiB = 3.125 GiB, which rounds to even.
    words = "about 3.12 GiB predicted (5,120 training rows × 0.62 MiB), limit 8.00 GiB, in "
    assert words + ("memory" if isinstance(cache, InMemory) else f"{tmp_path}/features") in sentence
    assert not list(tmp_path.iterdir())


def test_too_large_a_prediction_is_refused_and_nothing_is_written(make: Make, tmp_path: Path) -> None:
    cache = make(2)
    cache.open(TOWER)
    with pytest.raises(ValueError, match=r"3.12 GiB predicted .* room for 2.00 GiB.* Raise limit_gib.* or remove"):
        cache.predict(2**20 * 5 / 8, 5120)
    assert cache.get(1) is None
    with pytest.raises(RuntimeError, match="Call predict before the first put"):
        cache.put(1, features_of(1))
    assert not list(tmp_path.iterdir())


def test_other_weights_get_other_features(make: Make, tmp_path: Path) -> None:
    """Also where one cache is opened for one tower and then for another."""
    cache = opened(make(PLENTY))
    cache.put(1, features_of(1))
    opened(cache, "other")
    assert cache.get(1) is None
    cache.put(1, features_of(2))
    for made_by, image in ((TOWER, 1), ("other", 2)) if isinstance(cache, OnDisk) else (("other", 2),):
        served = opened(cache, made_by).get(1)
        assert served is not None
        assert torch.equal(served, features_of(image))
    folders = {path.parts[-3] for path in files(tmp_path)}
    assert folders == ({TOWER, "other"} if isinstance(cache, OnDisk) else set())


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


def test_images_that_never_come_again_are_refused(make: Make) -> None:
    cache = opened(make(PLENTY))
    epoch(cache, range(0, 10))
    with pytest.raises(RuntimeError, match="none of 11 images of this epoch came a second time, though 10 were kept"):
        epoch(cache, range(10, 21))


def test_a_second_run_over_random_images_is_refused_too(tmp_path: Path) -> None:
    epoch(on_disk(tmp_path), range(10))
    cache = on_disk(tmp_path)
    epoch(cache, range(10, 20))
    with pytest.raises(RuntimeError, match="augmented at random"):
        epoch(cache, range(20, 30))


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
