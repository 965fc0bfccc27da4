"""The round trip: what stock Sentence Transformers computes from an exported folder is what was trained."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmembed.export import serve

#: In float32, the largest difference; below it is rounding.
TOLERANCE = 1e-5


class ExportError(RuntimeError):
    """An export that does not serve what was trained."""


@dataclass(frozen=True)
class Verification(ABC):
    """How far what the folder computes is from what the module computes.

    Args:
        comparisons: How many results were compared.
        probes: The kinds of input.
        worst: The worst of the comparisons: its input, and how it was batched and padded.
        difference: Its largest absolute difference.
        dtype: The type of the weights, which decides what is tolerated.
    """

    comparisons: int
    probes: tuple[str, ...]
    worst: str
    difference: float
    dtype: str

    @property
    @abstractmethod
    def passed(self) -> bool:
        """Whether the difference is tolerable."""


def worst_of(differences: Mapping[str, float]) -> str:
    """Return the name of the largest difference. NaN compares as nothing: it must count as the worst."""
    return max(differences, key=lambda name: math.inf if math.isnan(differences[name]) else differences[name])


def brings_code(folder: Path) -> bool:
    """Whether a folder has Python of its own, and is opened with trust."""
    return any(folder.glob("*.py"))


def run_served(folder: Path, plan: Mapping[str, Any], scratch: Path) -> dict[str, torch.Tensor]:
    """Open a folder in a process without vlmembed, and carry out a plan; see `serve`.

    Args:
        folder: The exported folder.
        plan: What to compute, as JSON.
        scratch: A folder for what the two processes tell each other.

    Returns:
        The results, by the way in which they were computed.

    Raises:
        ExportError: If Sentence Transformers cannot open the folder or use an input.
    """
    (scratch / "plan.json").write_text(json.dumps({**plan, "trust_remote_code": brings_code(folder)}), encoding="utf-8")
    output = scratch / "results.npz"
    # -P keeps the script's folder, and with it our modules, off the path.
    command = [sys.executable, "-P", serve.__file__, folder, scratch / "plan.json", output]
    result = subprocess.run(list(map(str, command)), stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise ExportError(f"Sentence Transformers cannot use the exported folder {folder}:\n{result.stderr[-3000:]}")
    with np.load(output) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
