"""One step of ours is one step of Sentence Transformers: same loss, same gradient, same new weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from building import batch, difference, encoder, fit, item, module, picture, relative_difference, weights
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from torch import Tensor

from vlmembed.export.sentence_transformers import write_folder
from vlmembed.losses import InfoNCE, Matryoshka
from vlmembed.pooling import LastToken, Mean, Pooling
from vlmembed.types import Example

DIMENSIONS = [64, 32, 16]
LEARNING_RATE = 0.01
INSTRUCTIONS = {"query_instruction": "Find the picture.", "document_instruction": "Represent the picture."}

QUERIES = [f"query number {index} " * (index % 3 + 1) for index in range(7)]
POSITIVES = [picture(32 + 32 * (index % 3), 64, index) for index in range(7)]
NEGATIVES = [picture(64, 32 + 32 * (index % 2), 100 + index) for index in range(7)]


def their_step(folder: Path, mini_batch_size: int) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step by Sentence Transformers, and what it changed, by our names."""
    model = SentenceTransformer(str(folder), device="cpu").train()
    inner = CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=mini_batch_size)
    loss_of = MatryoshkaLoss(model, inner, DIMENSIONS)
    columns: list[tuple[list[Any], str]] = [(QUERIES, "query"), (POSITIVES, "document"), (NEGATIVES, "document")]
    features = [model.preprocess(column, prompt=model.prompts[role]) for column, role in columns]
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    before = weights(model[0].model)
    loss = loss_of(features, torch.zeros(len(QUERIES)))
    loss.backward()
    optimizer.step()
    after = weights(model[0].model)
    update = difference(after, before)
    return loss.item(), {f"encoder.backbone.model.{name}": tensor for name, tensor in update.items()}


def our_examples() -> list[Example]:
    """The same three columns, rows in another order."""
    rows = [
        Example(item(query, role="query"), (item(positive),), (item(negative),))
        for query, positive, negative in zip(QUERIES, POSITIVES, NEGATIVES, strict=True)
    ]
    return [rows[index] for index in (4, 0, 6, 2, 5, 1, 3)]


@pytest.mark.parametrize(("pooling", "mini_batch_size", "chunk_size"), [(LastToken(), 3, 5), (Mean(), 2, None)])
def test_one_step(
    checkpoint: Path, tmp_path: Path, pooling: Pooling, mini_batch_size: int, chunk_size: int | None
) -> None:
    write_folder(encoder(checkpoint, pooling, **INSTRUCTIONS), tmp_path)
    their_loss, their_update = their_step(tmp_path, mini_batch_size)

    loss = Matryoshka(InfoNCE(temperature=0.05), DIMENSIONS)
    model = module(
        checkpoint,
        loss,
        pooling=pooling,
        backbone=INSTRUCTIONS,
        optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE),
    )
    run = fit(model, [batch(model, our_examples(), chunk_size)])
    assert run.losses == pytest.approx([their_loss], rel=1e-5)
    # Other chunks, other padding, other order of float32 sums; weights round the update once more.
    assert relative_difference(run.update(1), their_update) < 1e-4
