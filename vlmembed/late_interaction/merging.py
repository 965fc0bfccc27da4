"""Token merging: fewer vectors of a document, each the mean of a cluster of similar ones (arXiv:2409.14683)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.nn.functional import normalize

from vlmembed.late_interaction.vectors import MultiVectors, promoted


def merge(items: MultiVectors, factor: int, trees: Sequence[np.ndarray] | None = None) -> MultiVectors:
    """Merge the vectors of each item into 1 / factor of their number, and at least one.

    Unit vectors come out, and of a factor of 1 the items as they are. Which vectors are merged has no gradient, their
    means have. The clusters are Ward's, on cosine distance, as in Sentence Transformers' ``HierarchicalTokenPooling``.
    Who merges by several factors makes the `ward_trees` once.
    """
    if factor == 1:
        return items
    trees = ward_trees(items) if trees is None else trees
    counts = (items.lengths // factor).clamp_min(1).tolist()
    clusters = [_clusters(tree, count) for tree, count in zip(trees, counts, strict=True)]
    unit = items.map(_unit)
    lengths = torch.tensor([int(labels.max()) + 1 for labels in clusters])
    # From numbers within an item to numbers over all: (T,).
    offsets = (lengths.cumsum(0) - lengths).repeat_interleave(items.lengths)
    labels = (torch.cat(clusters) + offsets).to(items.device, non_blocking=True)
    total = int(lengths.sum())
    sums = unit.vectors.new_zeros(total, unit.vectors.shape[1]).index_add(0, labels, unit.vectors)
    # A mean's direction is that of the sum.
    return replace(items, vectors=normalize(sums, dim=-1), lengths=lengths)


def ward_trees(items: MultiVectors) -> list[np.ndarray]:
    """Return SciPy's tree (n - 1, 4) of each item's n vectors: which two clusters are merged at each step."""
    return [_ward_tree(vectors) for vectors in items.detach().map(_unit).map(Tensor.cpu).split()]


def _ward_tree(vectors: Float[Tensor, "n D"]) -> np.ndarray:
    if len(vectors) == 1:
        return np.empty((0, 4))
    with torch.autocast("cpu", enabled=False):
        # What is not finite makes a loss that is not, of which the step is skipped; SciPy would stop the run.
        distances = (1 - vectors @ vectors.T).clamp_(0, 2).nan_to_num_()
    return linkage(squareform(distances.numpy(), checks=False), method="ward")


def _clusters(tree: np.ndarray, count: int) -> Int[Tensor, " n"]:
    """Return the number of each vector's cluster, from 0, of at most so many."""
    if count > len(tree):
        return torch.arange(len(tree) + 1)
    labels = torch.from_numpy(fcluster(tree, t=count, criterion="maxclust")).long()
    # Dense from 0: where distances tie there may be fewer clusters than were asked for.
    return labels.unique(return_inverse=True)[1]


def _unit(vectors: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
    return normalize(promoted(vectors), dim=-1)
