"""Comparing the scores of an exported folder with those that were trained: logits, which do not saturate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vlmembed.encoder import Scorer
from vlmembed.export.probes import PairProbe
from vlmembed.export.verify import TOLERANCE, ExportError, Verification, run_served, worst_of

#: In half precision, the largest difference: as far as embeddings of cosine 0.999, the least there, are apart.
HALF_PRECISION_TOLERANCE = 0.045


@dataclass(frozen=True)
class ScoreVerification(Verification):
    """How far the folder's logits are from the module's.

    Rounding grows with what is rounded: where the largest logit is above 1, the tolerance is a share of it.

    Args:
        largest: The largest logit's size.
    """

    largest: float

    @property
    def tolerance(self) -> float:
        """The largest difference that rounding makes."""
        return max(1.0, self.largest) * (TOLERANCE if self.dtype == "float32" else HALF_PRECISION_TOLERANCE)

    @property
    def passed(self) -> bool:
        """Whether the difference is tolerable."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.comparisons} logits compared ({', '.join(self.probes)}) in {self.dtype}, the largest "
            f"{self.largest:.2f}: largest difference {self.difference:.1e}, worst {self.worst}; tolerated: "
            f"{self.tolerance:.1e}"
        )


def readable(scorer: Scorer, pairs: Sequence[PairProbe]) -> list[PairProbe]:
    """Leave out the pairs that the scorer refuses to read, as with ``max_length`` it may.

    Raises:
        ExportError: If it refuses all of them.
    """
    refusals, kept = [], []
    for probe in pairs:
        try:
            scorer.preprocessor([probe.pair()])
            kept.append(probe)
        except ValueError as error:
            refusals.append(str(error))
    if not kept:
        raise ExportError(f"The model reads none of the pairs that an export is verified with: {refusals[0]}")
    return kept


@torch.no_grad()
def score_probes(scorer: Scorer, pairs: Sequence[PairProbe]) -> Float[Tensor, " pairs"]:
    """Score each pair by itself."""
    scorer.eval()
    preprocess = scorer.preprocessor
    return torch.cat([scorer(preprocess([probe.pair()]))[:, 0].float().cpu() for probe in pairs])


def verify_scores(
    folder: Path,
    pairs: Sequence[PairProbe],
    expected: Float[Tensor, " pairs"],
    sides: Sequence[str],
    device: str,
    dtype: str,
    scratch: Path,
) -> ScoreVerification:
    """Open a folder in a process without vlmembed, score the pairs, rank the documents, and compare.

    Args:
        folder: The exported folder.
        pairs: What to score.
        expected: What the module makes of them, from `score_probes`.
        sides: On which sides the folder's tokenizer can pad.
        device: Where to run.
        dtype: The type of the exported weights.
        scratch: A folder for what the two processes tell each other.

    Raises:
        ExportError: If Sentence Transformers cannot open the folder or score a pair.
    """
    plan = {"pairs": [probe.description() for probe in pairs], "sides": list(sides), "device": device}
    differences = {
        f"{probe.name!r}, {way}": difference
        for way, served in run_served(folder, plan, scratch).items()
        for probe, difference in zip(pairs, (served - expected).abs().tolist(), strict=True)
    }
    worst = worst_of(differences)
    names = tuple(probe.name for probe in pairs)
    return ScoreVerification(
        len(differences), names, worst, differences[worst], dtype, largest=expected.abs().max().item()
    )
