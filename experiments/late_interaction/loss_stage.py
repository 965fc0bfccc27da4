"""What does the loss stage of late interaction cost: from the vectors of a batch to their gradients?

The vectors of B queries, 16 to 24 each, and of as many documents go through our InfoNCE on MaxSim, and through Sentence
Transformers' ``MultiVectorMultipleNegativesRankingLoss`` as it comes, which gets them padded. They take turns in one
process, must agree in value and gradient, and are timed there; the peak of memory above the vectors is that of a
process for each. Their vectors are normalised by the model, ours by the loss: it is counted on our side alone.

    OMP_NUM_THREADS=1 python experiments/late_interaction/loss_stage.py [--batch_sizes 32 256] [--tokens 700]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from vlmembed.late_interaction import MultiVectors
from vlmembed.losses import InfoNCE

DIMENSION = 128
STAGES = ["vlmembed", "Sentence Transformers"]


class Given(nn.Module):
    """A model whose vectors are there already."""

    def forward(self, features: dict[str, Tensor], task: str) -> dict[str, Tensor]:
        return features


def vectors(batch_size: int, tokens: int) -> list[MultiVectors]:
    """Queries and documents; unit vectors."""
    torch.manual_seed(0)
    lengths = torch.randint(16, 25, (batch_size,)), torch.full((batch_size,), tokens)
    return [MultiVectors(normalize(torch.randn(int(part.sum()), DIMENSION)), part) for part in lengths]


def ours(sides: list[MultiVectors]) -> tuple[Tensor, list[Tensor]]:
    leaves = [side.vectors.requires_grad_() for side in sides]
    value = InfoNCE(1.0)(*sides, torch.eye(len(sides[0]), dtype=torch.int8))
    return value.detach(), [*torch.autograd.grad(value, leaves)]


def padded(side: MultiVectors) -> dict[str, Tensor]:
    mask = pad_sequence([torch.ones(int(length)) for length in side.lengths], batch_first=True)
    return {"token_embeddings": pad_sequence(side.split(), batch_first=True), "attention_mask": mask}


def theirs(features: list[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    model: Any = Given()
    leaves = [part["token_embeddings"].requires_grad_() for part in features]
    value = MultiVectorMultipleNegativesRankingLoss(model)(features)
    gradients = torch.autograd.grad(value, leaves)
    pairs = zip(gradients, features, strict=True)
    return value.detach(), [gradient[part["attention_mask"].bool()] for gradient, part in pairs]


def memory(stage: str, batch_size: int, tokens: int) -> float:
    """MiB above the vectors, in this process."""
    sides: Any = vectors(batch_size, tokens)
    if stage != STAGES[0]:
        sides = [padded(side) for side in sides]
    # What is loaded at a first call.
    small = vectors(2, 4)
    ours(small)
    theirs([padded(side.detach()) for side in small])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak of what came before, which is imports.
    ours(sides) if stage == STAGES[0] else theirs(sides)
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """MiB of this process: VmRSS, now; VmHWM, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measured(stage: str, batch_size: int, tokens: int) -> float:
    """MiB above the vectors, in a process of its own."""
    command = [sys.executable, __file__, "--stage", stage, "--batch_sizes", str(batch_size), "--tokens", str(tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def times(batch_size: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each stage in each round; the first round also compares what comes out."""
    sides = vectors(batch_size, tokens)
    features = [padded(side) for side in sides]
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for turn in range(rounds):
        start = time.perf_counter()
        value, gradients = ours(sides)
        seconds[STAGES[0]].append(time.perf_counter() - start)
        start = time.perf_counter()
        other, others = theirs(features)
        seconds[STAGES[1]].append(time.perf_counter() - start)
        if not turn:
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
            for side, one, two in zip(sides, gradients, others, strict=True):
                # They have the gradient of what is normalised: leave its part along the vector.
                across = two - (two * side.vectors).sum(1, keepdim=True) * side.vectors
                assert (one - across).norm() < 1e-4 * across.norm()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stage", choices=STAGES, help="Only print the memory of one.")
    options = parser.parse_args()
    if options.stage:
        print(memory(options.stage, options.batch_sizes[0], options.tokens))
        return
    print(
        f"{torch.get_num_threads()} threads, {options.tokens} vectors a document, medians of {options.rounds} rounds\n"
    )
    print("| queries | loss stage | MiB above the vectors | times ours | s | times ours |\n|---|---|---|---|---|---|")
    for batch_size in options.batch_sizes:
        seconds = times(batch_size, options.tokens, options.rounds)
        sizes = {stage: measured(stage, batch_size, options.tokens) for stage in STAGES}
        for stage, size in sizes.items():
            ratios = size / sizes[STAGES[0]], median(seconds[stage]) / median(seconds[STAGES[0]])
            row = f"{size:.0f} | {ratios[0]:.1f} | {median(seconds[stage]):.2f} | {ratios[1]:.2f}"
            print(f"| {batch_size} | {stage} | {row} |", flush=True)


if __name__ == "__main__":
    main()
