"""Token merging: fewer vectors of a document, each the mean of a cluster of similar ones (arXiv:2409.14683)."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.nn.functional import normalize

from vlmembed.late_interaction.vectors import MultiVectors, promoted


def merge(items: MultiVectors, factor: int) -> MultiVectors:
    """Merge the vectors of each item into 1 / factor of their number, and at least one; unit vectors come out.

    Which vectors are merged has no gradient, their means have. The clusters are Ward's, on cosine distance, as in
    Sentence Transformers' ``HierarchicalTokenPooling``.
    """
    if factor == 1:
        return items
    unit = items.map(lambda vectors: normalize(promoted(vectors), dim=-1))
    clusters = [_clusters(vectors, max(1, len(vectors) // factor)) for vectors in unit.detach().map(Tensor.cpu).split()]
    lengths = torch.tensor([int(labels.max()) + 1 for labels in clusters])
    # From numbers within an item to numbers over all: (T,).
    offsets = (lengths.cumsum(0) - lengths).repeat_interleave(items.lengths)
    labels = (torch.cat(clusters) + offsets).to(items.device, non_blocking=True)
    total = int(lengths.sum())
    sums = unit.vectors.new_zeros(total, unit.vectors.shape[1]).index_add(0, labels, unit.vectors)
    # A mean's direction is that of the sum.
    return replace(items, vectors=normalize(sums, dim=-1), lengths=lengths)


def _clusters(vectors: Float[Tensor, "n D"], count: int) -> Int[Tensor, " n"]:
    """Return the number of each unit vector's cluster, from 0, of at most so many."""
    if count >= len(vectors):
        return torch.arange(len(vectors))
    with torch.autocast("cpu", enabled=False):
        distances = (1 - vectors @ vectors.T).clamp_(0, 2).numpy()
    tree = linkage(squareform(distances, checks=False), method="ward")
    labels = torch.from_numpy(fcluster(tree, t=count, criterion="maxclust")).long()
    # Dense from 0: where distances tie there may be fewer clusters than were asked for.
    return labels.unique(return_inverse=True)[1]
