"""One step of ours is one step of Sentence Transformers: same loss, same gradient, same new weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from building import batch, difference, fit, item, module, multi_vector, picture, relative_difference, weights
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss
from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_scores
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from torch import Tensor
from torch.optim import SGD

from vlmembed.export.sentence_transformers import write_folder
from vlmembed.losses import InfoNCE, Matryoshka
from vlmembed.modules import EmbeddingModule, MultiVectorModule
from vlmembed.pooling import LastToken, Mean, Pooling
from vlmembed.types import Example

DIMENSIONS = [64, 32, 16]
OPTIMIZER = partial(SGD, lr=0.01)
INSTRUCTIONS = {"query_instruction": "Find the picture.", "document_instruction": "Represent the picture."}

QUERIES = [f"query number {index} " * (index % 3 + 1) for index in range(7)]
POSITIVES = [picture(32 + 32 * (index % 3), 64, index) for index in range(7)]
NEGATIVES = [picture(64, 32 + 32 * (index % 2), 100 + index) for index in range(7)]
NAMES = {"0.model.": "encoder.backbone.model.", "1.linear.": "encoder.pooling.outer."}


def their_step(model: Any, loss_of: Callable[..., Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step by Sentence Transformers, and what it changed, by our names."""
    columns: list[tuple[list[Any], str]] = [(QUERIES, "query"), (POSITIVES, "document"), (NEGATIVES, "document")]
    features = [model.preprocess(column, prompt=model.prompts[role], task=role) for column, role in columns]
    before = weights(model)
    loss = loss_of(features, torch.zeros(len(QUERIES)))
    loss.backward()
    OPTIMIZER(model.parameters()).step()
    update = {}
    for name, tensor in difference(weights(model), before).items():
        (prefix,) = (prefix for prefix in NAMES if name.startswith(prefix))
        update[NAMES[prefix] + name.removeprefix(prefix)] = tensor
    return loss.item(), update


def assert_same_step(
    model: EmbeddingModule | MultiVectorModule, theirs: tuple[float, dict[str, Tensor]], chunk_size: int | None
) -> None:
    """The same three columns, rows in another order."""
    rows = [
        Example(item(query, role="query"), (item(positive),), (item(negative),))
        for query, positive, negative in zip(QUERIES, POSITIVES, NEGATIVES, strict=True)
    ]
    run = fit(model, [batch(model, [rows[index] for index in (4, 0, 6, 2, 5, 1, 3)], chunk_size)])
    assert run.losses == pytest.approx([theirs[0]], rel=1e-5)
    # Other chunks, other padding, other order of float32 sums; weights round the update once more.
    assert relative_difference(run.update(1), theirs[1]) < 1e-4


@pytest.mark.parametrize(("pooling", "mini_batch_size", "chunk_size"), [(LastToken(), 3, 5), (Mean(), 2, None)])
def test_one_step(
    checkpoint: Path, tmp_path: Path, pooling: Pooling, mini_batch_size: int, chunk_size: int | None
) -> None:
    loss = Matryoshka(InfoNCE(temperature=0.05), DIMENSIONS)
    ours = module(checkpoint, loss, pooling=pooling, backbone=INSTRUCTIONS, optimizer=OPTIMIZER)
    write_folder(ours.encoder, tmp_path)
    model = SentenceTransformer(str(tmp_path), device="cpu").train()
    inner = CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=mini_batch_size)
    assert_same_step(ours, their_step(model, MatryoshkaLoss(model, inner, DIMENSIONS)), chunk_size)


@pytest.mark.parametrize(
    ("similarity", "temperature", "scoring"), [("maxsim", 1.0, None), ("meanmaxsim", 0.05, mean_colbert_scores)]
)
def test_one_step_of_several_vectors(
    checkpoint: Path, tmp_path: Path, similarity: Any, temperature: float, scoring: Any
) -> None:
    options: Any = {"backbone": INSTRUCTIONS, "similarity": similarity, "optimizer": OPTIMIZER}
    ours = multi_vector(checkpoint, InfoNCE(temperature), **options)
    write_folder(ours.encoder, tmp_path)
    model = MultiVectorEncoder(str(tmp_path), device="cpu").train()
    loss = CachedMultiVectorMultipleNegativesRankingLoss(
        model, scale=1 / temperature, similarity_fct=scoring, mini_batch_size=3
    )
    assert_same_step(ours, their_step(model, loss), 5)
