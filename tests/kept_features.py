"""Caches of features, folders of them, and what to put into both."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vlmembed.features import FeatureCache, OnDisk

TOWER = "70" * 16
PLENTY = 0.01
#: Of (5, 3, 8) float32, which `features_of` makes.
PAYLOAD = 5 * 3 * 8 * 4


def opened(cache: FeatureCache, made_by: str = TOWER) -> FeatureCache:
    cache.open(made_by)
    cache.predict(0, 0, announce=lambda sentence: None)
    return cache


def on_disk(folder: Path, limit: float = PLENTY, made_by: str = TOWER) -> FeatureCache:
    return opened(OnDisk(str(folder), limit), made_by)


def features_of(image: int, tokens: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, 3, 8, generator=torch.Generator().manual_seed(image)).to(dtype)


def serves(cache: FeatureCache, image: int, tokens: int = 5) -> bool:
    features = cache.get(image)
    return features is not None and torch.equal(features, features_of(image, tokens))


def files(folder: Path, suffix: str = ".safetensors") -> list[Path]:
    return sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in [*files(folder), *files(folder, ".draft")])
