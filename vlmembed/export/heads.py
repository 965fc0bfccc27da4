"""A score head as modules of Sentence Transformers."""

from __future__ import annotations

from dataclasses import replace

import torch

from vlmembed.export.poolings import ServedModule, Sizes, check_servable, dense, pooling_modules, projection_modules
from vlmembed.heads import ScoreHead, YesNo
from vlmembed.pooling import LastToken, Pooling, Projection


def head_modules(head: ScoreHead, sizes: Sizes) -> list[ServedModule]:
    """Return what scores as a head does, from the states of its backbone, in the order of serving."""
    pooled = pooling_modules(pooling_of(head), sizes)
    if isinstance(head, YesNo):
        layers = [dense(head.direction[None])]
    elif type(head.pooling) is Projection:
        layers = projection_modules(head.pooling)
    else:
        layers = [dense(torch.ones(1, 1))]  # The pooling's number is the score, and lacks the name of one.
    layers[-1] = replace(layers[-1], config={**layers[-1].config, "module_output_name": "scores"})
    return [*pooled, *layers]


def pooling_of(head: ScoreHead) -> Pooling:
    """Return what a head pools with, without the layers that make a score of it."""
    inside: Pooling = head.pooling.pooling if type(head.pooling) is Projection else head.pooling
    return inside


def check_head(head: ScoreHead) -> None:
    """Refuse a head that no folder could serve.

    Raises:
        ValueError: If it computes its score in a way of its own, or the code of its pooling cannot be brought along.
    """
    ours = YesNo if isinstance(head, YesNo) else ScoreHead
    for method in ("forward", "score"):
        if getattr(type(head), method) is not getattr(ours, method):
            raise ValueError(
                f"{type(head).__name__} cannot be exported: it has a {method} of its own, and a folder brings along "
                "the code of poolings only. Let a pooling compute the number, and give it to vlmembed.heads.ScoreHead; "
                "or set trainer.exporter to null."
            )
    check_servable(pooling_of(head))


def of_two_logits(head: ScoreHead) -> YesNo:
    """Return a head whose score is the difference of two logits of the last token.

    Raises:
        ValueError: If that is not what it scores by.
    """
    check_head(head)
    if not isinstance(head, YesNo) or type(head.pooling) is not LastToken:
        raise ValueError(
            f"reranker_scoring: logits is the difference of two words' logits at the last token, which "
            f"{type(head).__name__} does not score by. Use vlmembed.heads.YesNo, or reranker_scoring: dense."
        )
    return head
