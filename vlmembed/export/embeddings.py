"""Comparing the embeddings of an exported folder with those that were trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import normalize

from vlmembed.encoder import Encoder
from vlmembed.export.probes import Probe
from vlmembed.export.verify import TOLERANCE, Verification, run_served, worst_of
from vlmembed.types import Role

#: In half precision, the least cosine.
MINIMAL_COSINE = 0.999
ROLES: tuple[Role, Role] = ("query", "document")

Embeddings = dict[str, torch.Tensor]


@dataclass(frozen=True)
class EmbeddingVerification(Verification):
    """How far the folder's embeddings are from the module's; the difference is of a component of unit vectors.

    Args:
        dimensions: The dimensions they were truncated to, full first.
        cosine: The least cosine of any comparison.
    """

    dimensions: tuple[int, ...]
    cosine: float

    @property
    def passed(self) -> bool:
        """Whether the difference, in half precision the cosine, is tolerable."""
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
    preprocess = encoder.preprocessor
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
) -> EmbeddingVerification:
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
    inputs = [probe.description() for probe in probes]
    plan = {"items": inputs, "dimensions": list(dimensions), "device": device}
    for way, served in run_served(folder, plan, scratch).items():
        role, dimension, batching = way.split("/")
        reference = normalize(expected[role][:, : int(dimension)], dim=-1)
        cosines.append(torch.linalg.vecdot(served, reference).min().item())
        for probe, difference in zip(probes, (served - reference).abs().amax(dim=1).tolist(), strict=True):
            differences[f"{probe.name!r} as {role}, {dimension} dimensions, {batching}"] = difference
    worst = worst_of(differences)
    names = tuple(probe.name for probe in probes)
    cosine = math.nan if any(map(math.isnan, cosines)) else min(cosines)
    return EmbeddingVerification(
        len(differences), names, worst, differences[worst], dtype, dimensions=tuple(dimensions), cosine=cosine
    )
