"""Queries with their candidates become pairs: each once, all of them, with the target that belongs to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from building import item, lists, picture
from test_reranking_metrics import reranking_set

from vlmembed.backbones import DocumentFirst, QueryFirst, Qwen3VL
from vlmembed.data import Reranking
from vlmembed.data.collate import EvaluationPairCollator, PairCollator, PairLists
from vlmembed.losses import Targets
from vlmembed.types import Example, Inputs, Item, Pair, PairBatch, Preprocessor, RankingBatch

LABELS = Targets()
LISTWISE = Targets(positive=True, several=True)
SCORES = Targets(scores=True)


class Named(Preprocessor):
    """Nothing but the ids of both; costs what is written in the document."""

    def __call__(self, items: Sequence[Item | Pair]) -> Inputs:
        pairs = [one for one in items if isinstance(one, Pair)]
        return {"ids": torch.tensor([(pair.query.id, pair.document.id) for pair in pairs])}

    def cost(self, item: Item | Pair) -> int:
        return len(item.parts[-1].value)  # type: ignore[arg-type]


def row(query: str, positives: str = "", negatives: str = "", **options: object) -> Example:
    """An example of texts, each a word."""
    asked = replace(item(query, role="query"), origin=f"train.jsonl, row {query}")
    right, wrong = (tuple(item(word) for word in words.split()) for words in (positives, negatives))
    return Example(asked, right, wrong, **options)  # type: ignore[arg-type]


def targets_of(batch: RankingBatch) -> list[tuple[tuple[int, int], float]]:
    """Each pair of the chunks with its target."""
    ids = [tuple(pair) for chunk in batch.chunks for pair in chunk["ids"].tolist()]
    assert [query for query, _ in ids] == batch.queries.tolist()
    return [*zip(ids, batch.targets.tolist(), strict=True)]


def named(pairs: dict[tuple[str, str], float]) -> list[tuple[tuple[int, int], float]]:
    return sorted(((item(query, role="query").id, item(word).id), target) for (query, word), target in pairs.items())


# Training


def test_each_pair_comes_once_with_its_own_target() -> None:
    rows = [
        row("one", "a bb", "ccc dddd"),
        row("two", "ccc", "a"),
        # Again, with a document that was wrong above, one that was right, and a new one.
        row("one", "ccc", "a e"),
        row("three", "a bb", "dddd", labels=(3.0, 0.5, 0.0)),
        row("three", negatives="a f", labels=(0.0, 0.0)),
    ]
    expected = {
        **{("one", word): 1.0 for word in ("a", "bb", "ccc")},
        **{("one", word): 0.0 for word in ("dddd", "e")},
        **{("two", "ccc"): 1.0, ("two", "a"): 0.0},
        **{("three", "a"): 3.0, ("three", "bb"): 0.5, ("three", "dddd"): 0.0, ("three", "f"): 0.0},
    }
    for chunk_size in (1, 2, 5, None):
        batch = PairCollator(Named(), LABELS, chunk_size)(rows)
        assert sorted(targets_of(batch)) == named(expected)
        assert (len(batch.chunks) == 1) == (chunk_size is None)


def test_a_teachers_scores_are_targets() -> None:
    rows = [row("one", "a", "bb ccc", scores=(-2.5, 0.0, 7.0)), row("two", "bb", scores=(1.5,), labels=(2.0,))]
    expected = {("one", "a"): -2.5, ("one", "bb"): 0.0, ("one", "ccc"): 7.0, ("two", "bb"): 1.5}
    assert sorted(targets_of(PairCollator(Named(), SCORES, 2)(rows))) == named(expected)


@pytest.mark.parametrize("count", [1, 3, 99])
def test_in_batch_negatives(count: int) -> None:
    rows = [
        row("one", "a bb", "ccc"),
        row("two", "ccc", "dddd"),
        row("one", "e", "f"),
        row("three", "a g", labels=(2.0, 0.5)),
        row("four", "h", "a i"),
    ]
    batch = PairCollator(Named(), LABELS, 4, in_batch_negatives=count)(rows)
    found = targets_of(batch)
    assert targets_of(PairCollator(Named(), LABELS, 4, in_batch_negatives=count)(rows)) == found
    words = {item(word).id for word in ["a", "bb", "ccc", "dddd", "e", "f", "g", "h", "i"]}
    own = {"one": "a bb ccc e f", "two": "ccc dddd", "three": "a g", "four": "h a i"}
    right = {"one": "a bb e", "two": "ccc", "three": "a g", "four": "h"}
    assert len({pair for pair, _ in found}) == len(found)
    for query in own:
        asked = item(query, role="query").id
        candidates = {document: target for (who, document), target in found if who == asked}
        mine, answers = ({item(word).id for word in of[query].split()} for of in (own, right))
        # All of its own, and as many of the others as there are.
        assert mine <= candidates.keys() <= words
        assert len(candidates) == min(len(words), len(mine) + count)
        assert {document for document, target in candidates.items() if target > 0} == answers


def test_in_batch_negatives_differ_between_queries() -> None:
    rows = [row(f"query {number}", f"answer{number}") for number in range(20)]
    found = targets_of(PairCollator(Named(), LISTWISE, in_batch_negatives=5)(rows))
    assert len(found) == 20 * 6
    drawn = Counter(document for (_, document), target in found if target == 0)
    assert len(drawn) > 15


def test_in_batch_negatives_have_no_teacher() -> None:
    with pytest.raises(ValueError, match=r"in_batch_negatives=2: .* Set in_batch_negatives: 0"):
        Reranking(SCORES, in_batch_negatives=2)


def preprocessor(checkpoint: Path, template: type[QueryFirst] = QueryFirst) -> Preprocessor:
    backbone = Qwen3VL(str(checkpoint), query_instruction=None, document_instruction=None)
    return backbone.make_preprocessor(template())


@pytest.mark.parametrize("template", [QueryFirst, DocumentFirst])
def test_real_chunks_hold_the_pairs_that_their_targets_are_of(checkpoint: Path, template: type[QueryFirst]) -> None:
    read = preprocessor(checkpoint, template)
    rows = lists(6, largest=4.0)
    expected = Counter()
    for one in rows:
        for document, label in zip(one.positives + one.negatives, one.labels or (), strict=True):
            expected[tokens(read([Pair(one.query, document)]))[0], one.query.id, label] += 1
    for chunk_size in (1, 3, None):
        batch = PairCollator(read, LABELS, chunk_size)(rows)
        texts = [each for chunk in batch.chunks for each in tokens(chunk)]
        assert Counter(zip(texts, batch.queries.tolist(), batch.targets.tolist(), strict=True)) == expected
        keys = torch.cat([images["keys"] for images in batch.images]).tolist()
        assert len(keys) == len(set(keys)) == 4


def tokens(chunk: Inputs) -> list[tuple[int, ...]]:
    """The tokens of each item, without padding."""
    rows = zip(chunk["input_ids"], chunk["attention_mask"].bool(), strict=True)
    return [tuple(ids[mask].tolist()) for ids, mask in rows]


@pytest.mark.parametrize("chunk_cost", [1, 400, 700, 10**6])
def test_a_chunk_has_room_for_new_tokens(checkpoint: Path, chunk_cost: int) -> None:
    """What a pair shares with the one before costs nothing again; a pair too large for any chunk has one of its own."""
    batch = PairCollator(preprocessor(checkpoint), LABELS, chunk_cost=chunk_cost, patch_cost=0)(lists())
    costs = [int(chunk["attention_mask"].sum() - chunk["shared"].sum()) for chunk in batch.chunks]
    sizes = [len(chunk["shared"]) for chunk in batch.chunks]
    assert all(cost <= chunk_cost or size == 1 for cost, size in zip(costs, sizes, strict=True))
    if chunk_cost == 1:
        assert set(sizes) == {1}
    # No chunk could have taken the first of the next one.
    following = [int(chunk["attention_mask"][0].sum()) for chunk in batch.chunks[1:]]
    assert all(cost + more > chunk_cost for cost, more in zip(costs, following, strict=False))


def test_a_patch_costs_as_much_as_is_said(checkpoint: Path) -> None:
    sizes = [
        len(PairCollator(preprocessor(checkpoint), LABELS, chunk_cost=500, patch_cost=cost)(lists()).chunks)
        for cost in (0.0, 5.0)
    ]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("example", "wanted", "message"),
    [
        (row("7", "a", "bb"), SCORES, r"train.jsonl, row 7: the loss distils a teacher's scores, and there are none"),
        (row("7", "a", "bb", scores=(1.0, 2.0)), LABELS, r"train.jsonl, row 7: scores given but unused"),
        (row("7", "a"), LISTWISE, r"train.jsonl, row 7: the query has one candidate, .* Add negatives, or group"),
        (
            row("7", "", "a bb", labels=(0.0, 0.0)),
            LISTWISE,
            r"row 7: none of the query's 2 candidates has a label above",
        ),
        (row("7", "a", "bb", labels=(2.0, 0.0)), Targets(largest=1.0), r"row 7: label 2 is outside of .* 0 to 1\."),
        (row("7", "a", "bb", labels=(1.0, -0.5)), LABELS, r"row 7: label -0.5 is outside of .* 0 to inf"),
        (row("7", "a", "bb", labels=(float("nan"), 0.0)), LABELS, r"row 7: label nan is outside"),
    ],
)
def test_what_a_loss_cannot_use_is_refused(example: Example, wanted: Targets, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairCollator(Named(), wanted)([row("fine", "a", "bb") if not wanted.scores else example, example])


def test_what_a_pointwise_loss_can_use_is_not() -> None:
    batch = PairCollator(Named(), Targets(largest=1.0))([row("one", "", "a", labels=(0.0,)), row("two", "a")])
    assert sorted(batch.targets.tolist()) == [0.0, 1.0]


def test_a_chunk_size_is_a_number() -> None:
    with pytest.raises(ValueError, match=r"chunk_size is 1 or more, or null .* got 0"):
        PairCollator(Named(), LABELS, 0)


# Measuring


@pytest.mark.parametrize("by_document", [False, True])
def test_pairs_of_one_query_or_of_one_document_stand_together(by_document: bool) -> None:
    reranking = reranking_set()
    pairs = PairLists(reranking, by_document)
    found = pairs[range(len(pairs))]
    expected = {(query, column) for query, row in enumerate(reranking.candidates) for column in row}
    assert {(query, column) for query, column, _ in found} == expected
    assert len(found) == len(expected)
    together = [numbers[by_document] for numbers in found]
    assert len([*groupby(together)]) == len(set(together))
    for query, column, pair in found:
        assert pair == Pair(reranking.evaluation.queries[query], reranking.evaluation.corpus[column])


def test_an_item_is_read_once_for_a_list() -> None:
    reranking = reranking_set()
    read: list[int] = []

    class Corpus(list):
        def __getitem__(self, column: int) -> Item:  # type: ignore[override]
            read.append(column)
            return super().__getitem__(column)

    corpus = Corpus(reranking.evaluation.corpus)
    pairs = PairLists(replace(reranking, evaluation=replace(reranking.evaluation, corpus=corpus)))
    assert read == []
    columns = [column for _, column, _ in pairs[range(100)]]
    assert len(columns) > len(set(columns))
    assert sorted(read) == sorted(set(columns))


@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize(("size", "world_size"), [(1, 1), (4, 1), (4, 3), (7, 2), (500, 3)])
def test_every_pair_is_measured_once_over_processes(size: int, world_size: int, by_document: bool) -> None:
    reranking, found = reranking_set(), []
    counts = []
    for rank in range(world_size):
        loader = Reranking(LABELS, by_document).loader(reranking, Named(), size, rank, world_size, batch_size=None)
        batches: list[PairBatch] = [*loader]
        counts.append(len(batches))
        for batch in batches:
            ids = [tuple(pair) for chunk in batch.chunks for pair in chunk["ids"].tolist()]
            numbers = [(query, column) for query, column in batch.rows.tolist()]
            evaluation = reranking.evaluation
            assert ids == [(evaluation.queries[query].id, evaluation.corpus[column].id) for query, column in numbers]
            found += numbers
    assert sorted(found) == sorted((query, column) for query, row in enumerate(reranking.candidates) for column in row)
    # None waits for another that has no more.
    assert len(set(counts)) == 1


def test_more_processes_than_pairs() -> None:
    reranking = reranking_set()
    few = replace(reranking, candidates=[[5], [], [6], *[[]] * (len(reranking.candidates) - 3)])
    loaders = [Reranking(LABELS).loader(few, Named(), 8, rank, 3, batch_size=None) for rank in range(3)]
    found = [[batch.rows.tolist() for batch in loader] for loader in loaders]
    assert [len(batches) for batches in found] == [1, 1, 1]
    assert {tuple(pair) for batches in found for rows in batches for pair in rows} == {(0, 5), (2, 6)}


def test_an_evaluation_batch_has_each_image_once(checkpoint: Path) -> None:
    image = picture(64, 64, 1)
    pairs = [
        (0, 3, Pair(item("one", image, role="query"), item(image, "seven"))),
        (4, 1, Pair(item("two", role="query"), item(picture(64, 32, 2)))),
        (0, 2, Pair(item("one", image, role="query"), item(picture(64, 32, 2), image))),
    ]
    batch = EvaluationPairCollator(preprocessor(checkpoint), 1)(pairs)
    assert len(torch.cat([images["keys"] for images in batch.images])) == 2
    assert sorted(map(tuple, batch.rows.tolist())) == [(0, 2), (0, 3), (4, 1)]
    read = {numbers[:2]: tokens(preprocessor(checkpoint)([numbers[2]]))[0] for numbers in pairs}
    texts = [each for chunk in batch.chunks for each in tokens(chunk)]
    assert texts == [read[query, column] for query, column in batch.rows.tolist()]
