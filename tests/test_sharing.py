"""Pairs that begin alike: the same scores and gradients as one pair at a time, from fewer tokens."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from building import item, picture

from vlmembed.backbones import DocumentFirst, QueryFirst, Qwen3VL
from vlmembed.backbones.packing import PackedItems, halve, take
from vlmembed.backbones.prefix_sharing import Sharing, order_by_beginning, shared_among, shared_lengths, signatures
from vlmembed.encoder import Scorer
from vlmembed.heads import Linear, ScoreHead, YesNo
from vlmembed.pooling import EarlierLayer, LastToken, LayerMix, LearnedTokens, Mean, MeanOfLast
from vlmembed.types import Pair

QUERIES = [
    item("four zero seven", role="query"),
    item(picture(64, 64, 1), "what is this", role="query"),
    item("four zero nine", role="query"),
]
DOCUMENTS = [
    item(picture(64, 96, 2)),
    item("seven"),
    item(picture(64, 96, 3), "seven"),
    # The first picture again, as a document, and one that another document has.
    item(picture(64, 64, 1), picture(64, 96, 3)),
    item("seven eight"),
]
PAIRS = [Pair(query, document) for query, document in product(QUERIES, DOCUMENTS)]

HEADS = {
    "yes or no": YesNo,
    "mean": lambda: Linear(Mean()),
    "last three": lambda: Linear(MeanOfLast(3)),
    "earlier layer": lambda: Linear(EarlierLayer(LastToken(), -2)),
    "two layers": lambda: Linear(LayerMix(LastToken(), 2)),
    "read-outs": lambda: Linear(LearnedTokens(2, "mean")),
}


def scorer(checkpoint: Path, head: ScoreHead | None = None, template: type = QueryFirst, **options: Any) -> Scorer:
    built = Scorer(Qwen3VL(str(checkpoint), **options), head or YesNo(), template())
    torch.manual_seed(0)
    built.configure()
    return built.eval()


def one_by_one(model: Scorer, pairs: list[Pair]) -> torch.Tensor:
    return torch.cat([model(model.backbone.preprocessor([pair])) for pair in pairs])


def shared(model: Scorer, prepared: PackedItems, rows: list[int]) -> torch.Tensor:
    return model(prepared.chunk(rows), model.encode_images(prepared.images()))


@pytest.mark.parametrize("template", [QueryFirst, DocumentFirst])
@pytest.mark.parametrize("head", HEADS)
def test_scores_and_gradients_are_those_of_one_pair_at_a_time(checkpoint: Path, head: str, template: type) -> None:
    model = scorer(checkpoint, HEADS[head](), template)
    prepared = model.backbone.preprocessor.prepare(PAIRS)
    rows = prepared.order
    computed = sum(prepared.lengths) - sum(prepared.shared(rows))
    assert computed < sum(prepared.lengths) / 3
    found, expected = shared(model, prepared, rows), one_by_one(model, [PAIRS[row] for row in rows])
    assert (found - expected).abs().max() <= 1e-5
    weights = torch.arange(1.0, len(PAIRS) + 1)[:, None]
    trained = dict(model.named_parameters())
    gradients = [
        torch.autograd.grad((scores * weights).sum(), trained.values(), allow_unused=True)
        for scores in (found, expected)
    ]
    for name, one, other in zip(trained, *gradients, strict=True):
        assert (one is None) == (other is None), name
        if other is not None:
            # Relative to the whole, because the gradient of a key's bias is nothing but rounding.
            assert (one - other).norm() <= 1e-5 * (other.norm() + 1e-2), name


def test_a_part_of_a_chunk_shares_what_it_can(checkpoint: Path) -> None:
    model = scorer(checkpoint)
    prepared = model.backbone.preprocessor.prepare(PAIRS)
    rows = prepared.order
    chunk, features = prepared.chunk(rows), model.encode_images(prepared.images())
    whole = model(chunk, features)
    some = [1, 4, 5, 9, 14]
    assert torch.allclose(model(take(chunk, some), features), whole[some], atol=1e-5)
    halves = [model(half, features) for half in halve(chunk)]
    assert torch.allclose(torch.cat(halves), whole, atol=1e-5)


def test_an_image_of_a_shared_beginning_is_read_once(checkpoint: Path) -> None:
    model = scorer(checkpoint)
    pairs = [Pair(QUERIES[1], document) for document in DOCUMENTS[:3]]
    prepared = model.backbone.preprocessor.prepare(pairs)
    seen = []
    model.backbone.model.language_model.embed_tokens.register_forward_hook(lambda *call: seen.append(call[1][0]))
    shared(model, prepared, prepared.order)
    image = model.backbone.model.config.image_token_id
    # A 64 × 64 query in 4 tokens, once; documents of 6 tokens each.
    assert int((seen[0] == image).sum()) == 4 + 6 + 6


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"attn_implementation": "sdpa"}])
def test_where_nothing_can_be_shared_scores_are_the_same_in_any_batch(checkpoint: Path, options: dict) -> None:
    model = scorer(checkpoint, **options)
    prepared = model.backbone.preprocessor.prepare(PAIRS)
    assert not any(prepared.shared(prepared.order))
    assert "shared" not in prepared.chunk([0, 1])
    rows = prepared.order
    found = model(prepared.chunk(rows), model.encode_images(prepared.images(None)))
    assert torch.allclose(found, one_by_one(model, [PAIRS[row] for row in rows]), atol=1e-5)


def test_sharing_is_that_of_transformers_own_padded_forward(checkpoint: Path) -> None:
    packed, padded = scorer(checkpoint), scorer(checkpoint, attn_implementation="sdpa")
    prepared = packed.backbone.preprocessor.prepare(PAIRS)
    found = shared(packed, prepared, prepared.order)
    for side in ("left", "right"):
        padded.backbone.preprocessor.processor.tokenizer.padding_side = side
        expected = padded(padded.backbone.preprocessor([PAIRS[row] for row in prepared.order]))
        assert torch.allclose(found, expected, atol=1e-5), side


def test_a_signature_tells_images_apart() -> None:
    tokens, types = torch.tensor([1, 2, 9, 9, 3, 9]), torch.tensor([0, 0, 1, 1, 0, 1])
    assert signatures([(tokens, types, [70, 80])])[0].tolist() == [1, 2, -71, -71, 3, -81]


def test_what_two_items_have_in_common() -> None:
    first, second = np.array([1, 2, 3, 4]), np.array([1, 2, 5])
    # Something of its own is left to compute, even of an item that is another one's beginning.
    assert shared_lengths([first, second, first, first, first[:2]]) == [0, 2, 2, 3, 1]


def test_neighbours_begin_alike() -> None:
    signatures = [np.array(numbers) for numbers in ([3, 1], [1, 2, 3], [3, 0], [1, 2], [1, 9, 9])]
    order = order_by_beginning(signatures)
    assert sorted(shared_lengths([signatures[row] for row in order])) == [0, 0, 1, 1, 2]


def test_places_follow_what_is_shared_with_the_row_before() -> None:
    sharing = Sharing.of(torch.tensor([4, 5, 3]), torch.tensor([0, 3, 2]))
    #                                 a b c d   a b c e f   a b g
    assert sharing.computed.int().tolist() == [1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1]
    assert sharing.index.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 0, 1, 6]
    assert sharing.counts.tolist() == [4, 2, 1]


def test_rows_that_are_left_share_the_least_of_what_was_between() -> None:
    assert shared_among(torch.tensor([0, 3, 2, 5, 4]), [1, 2, 4]).tolist() == [0, 2, 4]
    assert shared_among(torch.tensor([0, 3, 2, 5, 4]), [0, 4]).tolist() == [0, 2]
