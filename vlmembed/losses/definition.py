"""What losses are by their documentation, one pair after the other: slow, and sharing nothing with how they compute."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor
from torch.nn.functional import normalize

from vlmembed.losses.infonce import InfoNCE
from vlmembed.losses.loss import Loss
from vlmembed.losses.matryoshka import Matryoshka
from vlmembed.losses.pairs import CROSS_DIRECTIONS
from vlmembed.losses.weighted_sum import WeightedSum


def defined_loss(
    loss: Loss,
    queries: Float[Tensor, "Q D"],
    documents: Float[Tensor, "P D"],
    relevance: Int8[Tensor, "Q P"],
    scores: Float[Tensor, "Q P"] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, ""]:
    """Compute a loss as its documentation defines it, one pair after the other.

    Args:
        loss: InfoNCE, or Matryoshka and WeightedSum around it; another loss computes itself.
        queries: See `Loss.forward`, for this and the next three.
        documents: Embeddings.
        relevance: Judgements.
        scores: A teacher's.
        dtype: What to compute in.
    """
    if type(loss) is Matryoshka:
        losses = [
            weight * defined_loss(loss.loss, queries[:, :dimension], documents[:, :dimension], relevance, scores, dtype)
            for dimension, weight in loss.weights.items()
        ]
        return torch.stack(losses).sum()
    if type(loss) is WeightedSum:
        parts = [
            weight * defined_loss(each, queries, documents, relevance, scores, dtype) for each, weight in loss.terms
        ]
        return torch.stack(parts).sum()
    if type(loss) is not InfoNCE:
        return loss(queries, documents, relevance, scores) if loss.wants_scores else loss(queries, documents, relevance)
    with torch.autocast(queries.device.type, enabled=False):
        vectors = {"query": normalize(queries.to(dtype)), "document": normalize(documents.to(dtype))}
        means = []
        for query, answers in enumerate(relevance == 1):
            pairs = [_pair_loss(loss, vectors, relevance, query, int(document)) for document in answers.nonzero()]
            means.append(torch.stack(pairs).mean())
        return torch.stack(means).mean()


def _pair_loss(loss: InfoNCE, vectors: dict[str, Tensor], relevance: Tensor, query: int, document: int) -> Tensor:
    """Compute minus the log of a pair's share in a softmax over itself and its negatives."""
    answers, judged = relevance == 1, relevance != 0
    negatives = {
        "query_to_document": ~answers[query],
        "document_to_query": ~answers[:, document],
        "query_to_query": ~(answers & answers[query]).any(1),
        "document_to_document": ~(judged & judged[:, document, None]).any(0),
    }
    hard = judged[query] & ~answers[query]
    weighed = {"in_batch_negatives": ~judged[query], "hard_negatives": hard, "all_negatives": ~answers[query]}
    scale = loss.fixed_scale if loss.log_scale is None else loss.log_scale.to(vectors["query"].dtype).exp()
    similarity = vectors["query"][query] @ vectors["document"][document]
    own, others = (scale * similarity)[None], []
    for direction in loss.directions:
        source, target = direction.split("_to_")
        similarities = vectors[target] @ vectors[source][query if source == "query" else document]
        logits = scale * similarities
        if direction == "query_to_document":
            logits = logits + loss.hardness * similarities.detach() * weighed[loss.hardness_on]
        kept = negatives[direction]
        if loss.false_negative_margin is not None:
            kept = kept & (similarities <= similarity + loss.false_negative_margin)
        others.append(logits[kept])
    if loss.softmax == "per_direction":
        return -torch.stack([torch.cat([own, each]).log_softmax(0)[0] for each in others]).mean()
    crossed = [direction for direction in loss.directions if direction in CROSS_DIRECTIONS]
    return -torch.cat([own] * max(1, len(crossed)) + others).log_softmax(0)[0]
