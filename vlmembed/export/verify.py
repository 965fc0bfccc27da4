"""The round trip: what stock Sentence Transformers computes from an exported folder is what was trained."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from vlmembed.encoder import Encoder
from vlmembed.export import serve
from vlmembed.export.probes import Probe
from vlmembed.types import Role

#: In float32, the largest difference of any component of two unit vectors; below it is rounding.
TOLERANCE = 1e-5
#: In half precision, the least cosine.
MINIMAL_COSINE = 0.999
ROLES: tuple[Role, Role] = ("query", "document")

Embeddings = dict[str, torch.Tensor]


class ExportError(RuntimeError):
    """An export that does not serve what was trained."""


@dataclass(frozen=True)
class Verification:
    """How far the folder's embeddings are from the module's.

    Args:
        comparisons: How many embeddings were compared.
        probes: The kinds of input.
        dimensions: The dimensions they were truncated to, full first.
        worst: The worst of the comparisons: role, dimension, batching, padding, and probe.
        difference: Its largest absolute difference of a component.
        cosine: The least cosine of any comparison.
        dtype: The type of the weights, which decides what is tolerated.
    """

    comparisons: int
    probes: tuple[str, ...]
    dimensions: tuple[int, ...]
    worst: str
    difference: float
    cosine: float
    dtype: str

    @property
    def passed(self) -> bool:
        """Whether the difference is tolerable."""
        return self.difference <= TOLERANCE if self.dtype == "float32" else self.cosine >= MINIMAL_COSINE

    def __str__(self) -> str:
        return (
            f"{self.comparisons} embeddings compared ({', '.join(self.probes)}; dimensions "
            f"{', '.join(map(str, self.dimensions))}) in {self.dtype}: largest difference {self.difference:.1e}, "
            f"least cosine {self.cosine:.6f}, worst {self.worst}; tolerated: "
            + (f"difference {TOLERANCE:.0e}" if self.dtype == "float32" else f"cosine {MINIMAL_COSINE}")
        )


@torch.no_grad()
def encode_probes(encoder: Encoder, probes: Sequence[Probe]) -> Embeddings:
    """Encode each probe by itself, in each role.

    Returns:
        role → (number of probes, D), not normalised.
    """
    encoder.eval()
    preprocess = encoder.backbone.preprocessor
    return {
        role: torch.cat([encoder(preprocess([probe.item(role)])).float().cpu() for probe in probes]) for role in ROLES
    }


def verify(
    folder: Path,
    probes: Sequence[Probe],
    expected: Embeddings,
    dimensions: Sequence[int],
    device: str,
    dtype: str,
    scratch: Path,
) -> Verification:
    """Open a folder in a process without vlmembed, encode the probes, and compare.

    Args:
        folder: The exported folder.
        probes: What to encode.
        expected: What the module makes of them, from `encode_probes`.
        dimensions: The dimensions to compare at, the exported one first.
        device: Where to run.
        dtype: The type of the exported weights.
        scratch: A folder for what the two processes tell each other.

    Raises:
        ExportError: If Sentence Transformers cannot open the folder or encode a probe.
    """
    differences: dict[str, float] = {}
    cosines = []
    for way, served in _serve(folder, probes, dimensions, device, scratch).items():
        role, dimension, batching = way.split("/")
        reference = normalize(expected[role][:, : int(dimension)], dim=-1)
        cosines.append(torch.linalg.vecdot(served, reference).min().item())
        for probe, difference in zip(probes, (served - reference).abs().amax(dim=1).tolist(), strict=True):
            differences[f"{probe.name!r} as {role}, {dimension} dimensions, {batching}"] = difference
    # NaN compares as nothing: it must count as the worst.
    worst = max(differences, key=lambda name: math.inf if math.isnan(differences[name]) else differences[name])
    names = tuple(probe.name for probe in probes)
    cosine = math.nan if any(map(math.isnan, cosines)) else min(cosines)
    return Verification(len(differences), names, tuple(dimensions), worst, differences[worst], cosine, dtype)


def brings_code(folder: Path) -> bool:
    """Whether a folder has Python of its own, and is opened with trust."""
    return any(folder.glob("*.py"))


def _serve(folder: Path, probes: Sequence[Probe], dimensions: Sequence[int], device: str, scratch: Path) -> Embeddings:
    plan = {
        "inputs": [probe.description() for probe in probes],
        "dimensions": list(dimensions),
        "device": device,
        "trust_remote_code": brings_code(folder),
    }
    (scratch / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    output = scratch / "embeddings.npz"
    # -P keeps the script's folder, and with it our modules, off the path.
    command = [sys.executable, "-P", serve.__file__, folder, scratch / "plan.json", output]
    result = subprocess.run(list(map(str, command)), stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise ExportError(f"Sentence Transformers cannot use the exported folder {folder}:\n{result.stderr[-3000:]}")
    with np.load(output) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
