"""InfoNCE as its documentation defines it, one pair after the other: slow, and sharing no code with the loss itself."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor
from torch.nn.functional import normalize

from vlmembed.losses import InfoNCE, Loss, Matryoshka, WeightedSum


def defined_loss(
    loss: Loss,
    queries: Float[Tensor, "Q D"],
    documents: Float[Tensor, "P D"],
    relevance: Int8[Tensor, "Q P"],
    scores: Float[Tensor, "Q P"] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, ""]:
    """Compute InfoNCE, and Matryoshka and WeightedSum around it, by definition in ``dtype``; call any other loss."""
    if type(loss) is Matryoshka:
        cut = {width: (queries[:, :width], documents[:, :width], relevance, scores, dtype) for width in loss.weights}
        return torch.stack(
            [weight * defined_loss(loss.loss, *cut[width]) for width, weight in loss.weights.items()]
        ).sum()
    if type(loss) is WeightedSum:
        batch = queries, documents, relevance, scores, dtype
        return torch.stack([weight * defined_loss(part, *batch) for part, weight in loss.terms]).sum()
    if type(loss) is not InfoNCE:
        return loss(queries, documents, relevance, scores) if loss.wants_scores else loss(queries, documents, relevance)
    with torch.autocast(queries.device.type, enabled=False):
        vectors = {"query": normalize(queries.to(dtype)), "document": normalize(documents.to(dtype))}
        means = []
        for query, row in enumerate(relevance == 1):
            pairs = [_pair_loss(loss, vectors, relevance, query, int(document)) for document in row.nonzero()]
            means.append(torch.stack(pairs).mean())
        return torch.stack(means).mean()


def _pair_loss(loss: InfoNCE, vectors: dict[str, Tensor], relevance: Tensor, query: int, document: int) -> Tensor:
    """Compute minus the log of a pair's share in a softmax over itself and its negatives."""
    positive, judged = relevance == 1, relevance != 0
    negatives = {
        "query_to_document": ~positive[query],
        "document_to_query": ~positive[:, document],
        "query_to_query": ~(positive & positive[query]).any(1),
        "document_to_document": ~(judged & judged[:, document, None]).any(0),
    }
    hard = {"in_batch_negatives": relevance[query] == 0, "hard_negatives": relevance[query] == -1}
    weighed = hard.get(loss.hardness_on, ~positive[query])
    scale = loss.fixed_scale if loss.log_scale is None else loss.log_scale.to(vectors["query"].dtype).exp()
    similarity = vectors["query"][query] @ vectors["document"][document]
    share, others = (scale * similarity)[None], []
    for direction in loss.directions:
        source, target = direction.split("_to_")
        similarities = vectors[target] @ vectors[source][query if source == "query" else document]
        logits = scale * similarities
        if direction == "query_to_document":
            logits = logits + loss.hardness * similarities.detach() * weighed
        is_negative = negatives[direction]
        if loss.false_negative_margin is not None:
            is_negative = is_negative & (similarities <= similarity + loss.false_negative_margin)
        others.append(logits[is_negative])
    if loss.softmax == "per_direction":
        return -torch.stack([torch.cat([share, logits]).log_softmax(0)[0] for logits in others]).mean()
    crossed = {"query_to_document", "document_to_query"}.intersection(loss.directions)
    return -torch.cat([share] * max(1, len(crossed)) + others).log_softmax(0)[0]
