"""Shared fixtures. Tensor functions are called with their annotated shapes checked."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook(
    [
        "vlmembed.backbones.packing",
        "vlmembed.encoder",
        "vlmembed.features",
        "vlmembed.gradcache",
        "vlmembed.losses",
        "vlmembed.metrics",
        "vlmembed.pooling",
    ],
    "shapes.check",
)

import pytest
import torch

from vlmembed.backbones import tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two busy processes on two cores, with two threads each, spend their time waiting for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh Qwen3-VL of 0.2 million parameters."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny.create(folder, hidden_size=64, layers=2, heads=2, vision_hidden_size=32, vision_layers=2)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
