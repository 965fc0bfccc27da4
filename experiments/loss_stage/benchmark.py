"""How long is the loss stage alone: from embeddings to their gradients, over seven Matryoshka dimensions?

Fixed embeddings of B queries and as many documents go through our loss; through the naive wrapper, a plain InfoNCE
once per dimension; and through what Sentence Transformers runs once its embeddings exist: ``calculate_loss`` of its
cached loss inside its Matryoshka loss, by mini-batches. They take turns in one process, so that all see the same
machine, and must agree in value and gradient. A round with 1024 queries takes minutes, nearly all of it in
mini-batches of 1.

    OMP_NUM_THREADS=2 python experiments/loss_stage/benchmark.py [--batch_sizes 64 256] [--dimension 1024] [--rounds 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from vlmembed.losses import InfoNCE, Matryoshka

TEMPERATURE = 0.02
#: From embeddings and how many dimensions to train, to the seconds it took, the loss, and the gradients.
Stage = Callable[[list[Tensor], list[int]], tuple[float, Tensor, list[Tensor]]]


class Naive(nn.Module):
    """The shortest InfoNCE for one document per query, in their order; once per dimension."""

    def __init__(self, dimensions: list[int]) -> None:
        super().__init__()
        self.dimensions = dimensions

    def forward(self, queries: Tensor, documents: Tensor, relevance: Tensor) -> Tensor:
        answers = torch.arange(len(queries))
        cosines = (normalize(queries[:, :d]) @ normalize(documents[:, :d]).T for d in self.dimensions)
        return torch.stack([cross_entropy(each / TEMPERATURE, answers) for each in cosines]).sum()


def module(build: Callable[[list[int]], nn.Module]) -> Stage:
    def stage(embeddings: list[Tensor], dimensions: list[int]) -> tuple[float, Tensor, list[Tensor]]:
        loss = build(dimensions)
        leaves = [each.clone().requires_grad_() for each in embeddings]
        relevance = torch.eye(len(leaves[0]), dtype=torch.int8)
        start = time.perf_counter()
        value = loss(*leaves, relevance)
        value.backward()
        return time.perf_counter() - start, value.detach(), [leaf.grad for leaf in leaves]

    return stage


class Model(nn.Sequential):
    """What their losses ask of a model before there are embeddings."""

    def get_embedding_dimension(self) -> None:
        return None


def cached(mini_batch_size: int) -> Stage:
    def stage(embeddings: list[Tensor], dimensions: list[int]) -> tuple[float, Tensor, list[Tensor]]:
        model = Model(nn.Identity())
        loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=mini_batch_size)
        MatryoshkaLoss(model, loss, dimensions)  # Changes what calculate_loss does.
        columns = [[part.clone().requires_grad_() for part in each.split(mini_batch_size)] for each in embeddings]
        start = time.perf_counter()
        value = loss.calculate_loss(columns, None, with_backward=True)
        seconds = time.perf_counter() - start
        return seconds, value, [torch.cat([part.grad for part in parts]) for parts in columns]

    return stage


STAGES: dict[str, Stage] = {
    "vlmembed": module(lambda dimensions: Matryoshka(InfoNCE(TEMPERATURE), dimensions)),
    "plain InfoNCE, once per dimension": module(Naive),
    "Sentence Transformers, mini-batch 1": cached(1),
    "Sentence Transformers, mini-batch 32": cached(32),
}


def measure(batch_size: int, dimension: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each stage in each round."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(batch_size, dimension, generator=generator)
    embeddings = [queries, queries + 2 * torch.randn(batch_size, dimension, generator=generator)]
    dimensions = [dimension >> shift for shift in range(7)]
    seconds: dict[str, list[float]] = {name: [] for name in STAGES}
    for turn in range(rounds + 1):
        results = {}
        for name, stage in STAGES.items():
            duration, *results[name] = stage(embeddings, dimensions)
            if turn:  # The first is a warm-up.
                seconds[name].append(duration)
    value, gradients = results.popitem()[1]
    for other, others in results.values():
        # float32, logits up to 50.
        torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-5)
        for one, two in zip(others, gradients, strict=True):
            assert (one - two).norm() < 1e-5 * two.norm()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--dimension", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, dimension {options.dimension}, medians of {options.rounds} rounds\n")
    print("| queries | loss stage | ms | from – to | times ours |\n|---|---|---|---|---|")
    for batch_size in options.batch_sizes:
        seconds = measure(batch_size, options.dimension, options.rounds)
        own = seconds["vlmembed"]
        for name, found in seconds.items():
            ratio = median(other / mine for other, mine in zip(found, own, strict=True))
            low, middle, high = (1000 * each for each in (min(found), median(found), max(found)))
            print(f"| {batch_size} | {name} | {middle:.1f} | {low:.1f} – {high:.1f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
