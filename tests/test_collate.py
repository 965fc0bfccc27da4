from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import torch
from building import collated, item, lists, picture
from lightning.fabric.utilities.apply_func import move_data_to_device
from test_metrics import reranking_set

from vlmembed.backbones import DocumentFirst, QueryFirst, Qwen3VL
from vlmembed.data import ItemCollator, PairCollator
from vlmembed.data.collate import cut, read_pairs
from vlmembed.losses import LabelSpec
from vlmembed.types import (
    Batch,
    Chunking,
    Example,
    Inputs,
    Item,
    Pair,
    PairBatch,
    Part,
    Prepared,
    Preprocessor,
    RankingBatch,
    Role,
)


class Letters(Preprocessor):
    """One token per character; padded on the right."""

    def __call__(self, items: Sequence[Item]) -> Inputs:
        rows = [torch.tensor([ord(letter) for letter in text(item)]) for item in items]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": padded, "attention_mask": (padded > 0).long()}

    def cost(self, item: Item) -> int:
        return len(text(item))


def text(item: Item) -> str:
    return " ".join(str(part.value) for part in item.parts)


def text_item(role: Role, value: str) -> Item:
    return Item(role, (Part("text", value),), origin="t.jsonl, row 1")


def example(query: str, positives: Sequence[str], negatives: Sequence[str] = ()) -> Example:
    documents = [tuple(text_item("document", value) for value in values) for values in (positives, negatives)]
    return Example(text_item("query", query), *documents)


def strings(batch: Batch) -> list[str]:
    """The texts of the items, in the order of the concatenated chunks."""
    return ["".join(map(chr, row[row > 0])) for chunk in batch.chunks for row in chunk["input_ids"]]


EXAMPLES = [
    example("long question here", ["a"], ["bb", "ccc"]),
    example("q", ["dddd"], ["a"]),
    example("other", ["eeeee", "bb"]),
    example("q", ["ffffff"], ["a", "dddd"]),
    example("bb", ["zzzzzzzzzz"]),
]


def judgements(batch: Batch) -> dict[tuple[str, str], int]:
    names = strings(batch)
    queries = {int(key): names[row] for key, row in zip(batch.query_ids, batch.queries, strict=True)}
    documents = {int(key): names[row] for key, row in zip(batch.document_ids, batch.documents, strict=True)}
    pairs = [(queries[q], documents[d]) for q, d in batch.pairs.tolist()]
    return dict(zip(pairs, batch.labels.tolist(), strict=True))


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_a_batch_holds_each_item_once_and_every_judgement(chunk_size: int | None) -> None:
    batch = collated(ItemCollator(Letters()), EXAMPLES, chunk_size)
    names = strings(batch)
    assert sorted(names) == sorted(
        ["long question here", "q", "other", "bb", "a", "bb", "ccc", "dddd", "eeeee", "ffffff", "zzzzzzzzzz"]
    )
    assert sorted([*batch.queries.tolist(), *batch.documents.tolist()]) == list(range(len(names)))
    assert judgements(batch) == {
        ("long question here", "a"): 1,
        ("long question here", "bb"): -1,
        ("long question here", "ccc"): -1,
        ("q", "dddd"): 1,  # A hard negative of the fourth example, but the answer of the second.
        ("q", "a"): -1,
        ("q", "ffffff"): 1,
        ("other", "eeeee"): 1,
        ("other", "bb"): 1,
        ("bb", "zzzzzzzzzz"): 1,
    }


def areas(batch: Batch) -> list[int]:
    return [chunk["input_ids"].numel() for chunk in batch.chunks]


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 100])
def test_a_chunk_takes_no_more_than_so_many_average_items(chunk_size: int) -> None:
    batch = collated(ItemCollator(Letters()), EXAMPLES, chunk_size)
    lengths = [len(name) for name in strings(batch)]
    assert lengths == sorted(lengths, reverse=True)
    room = max(len("long question here"), math.ceil(chunk_size * sum(lengths) / len(lengths)))
    assert max(areas(batch)) <= room
    assert sum(len(chunk["input_ids"]) for chunk in batch.chunks) == 11
    for chunk, following in pairwise(batch.chunks):
        longest = chunk["attention_mask"].sum(1).max()
        assert longest == chunk["attention_mask"].shape[1]
        # The next item had no room.
        assert (len(chunk["input_ids"]) + 1) * longest > room
        assert following["attention_mask"].shape[1] <= longest


def test_what_images_cost_counts_as_tokens_do() -> None:
    items = [text_item("query", "x" * length) for length in (30, 5, 20, 5, 5)]
    sizes = {(None, 1.0): [5], (150, 1.0): [1, 2, 2], (200, 1.0): [1, 4], (240, 1.0): [2, 3], (1, 1.0): [1] * 5}
    sizes |= {(60, 0.0): [2, 3], (150, 0.5): [2, 3], (149, 0.5): [1, 4]}
    for (tokens, patch_cost), expected in sizes.items():
        prepared = Shown(Letters(), items, [80, 0, 100, 0, 0])
        order, chunks, _ = cut(prepared, Chunking(tokens=tokens, patch_cost=patch_cost))
        assert order == [0, 2, 1, 3, 4]
        assert [len(chunk["input_ids"]) for chunk in chunks] == expected


class Shown(Prepared):
    def __init__(self, preprocessor: Preprocessor, items: Sequence[Item], patches: list[int]) -> None:
        super().__init__(preprocessor, items)
        self.shown = patches

    @property
    def patches(self) -> list[int]:
        return self.shown


def test_equal_content_in_two_roles_is_two_items() -> None:
    batch = ItemCollator(Letters())([example("same", ["same"])])
    assert strings(batch) == ["same", "same"]
    assert batch.queries.tolist() != batch.documents.tolist()
    assert batch.query_ids.tolist() != batch.document_ids.tolist()


def test_an_example_may_have_only_negatives_and_many_the_same() -> None:
    """However often a document comes, it is one column of the scores: a positive of some, a negative of others."""
    batch = ItemCollator(Letters())([example(f"q{number}", [], ["n"]) for number in range(9)])
    assert judgements(batch) == {(f"q{number}", "n"): -1 for number in range(9)}
    batch = ItemCollator(Letters())([example(f"q{k}", ["same"] if k else ["other"], ["same"][k:]) for k in range(9)])
    assert len(batch.documents) == 2
    expected = {("q0", "other"): 1, ("q0", "same"): -1} | {(f"q{k}", "same"): 1 for k in range(1, 9)}
    assert judgements(batch) == expected


def test_types_and_pickling() -> None:
    collator = pickle.loads(pickle.dumps(ItemCollator(Letters())))
    batch = collator(EXAMPLES)
    assert batch.labels.dtype == torch.int8
    for tensor in (batch.queries, batch.documents, batch.query_ids, batch.document_ids, batch.pairs):
        assert tensor.dtype == torch.int64
    assert batch.pairs.shape == (9, 2)
    assert move_data_to_device(batch, torch.device("meta")) is batch  # The encoder takes over chunk after chunk.


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_bad_chunk_sizes_are_refused(chunk_size: int) -> None:
    with pytest.raises(ValueError, match=f"chunk_size is 1 or more.*got {chunk_size}"):
        Chunking(chunk_size)


def test_items_keep_their_rows() -> None:
    batch = pickle.loads(pickle.dumps(ItemCollator(Letters()))).collate_items(
        [(7, text_item("query", "abc")), (2, text_item("document", "de"))]
    )
    assert batch.rows.tolist() == [7, 2]
    assert batch.inputs["input_ids"].tolist() == [[97, 98, 99], [100, 101, 0]]


LABELS = LabelSpec()
LISTWISE = LabelSpec(needs_positive=True, needs_several=True)
SCORES = LabelSpec(teacher_scores=True)


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
        batch = collated(PairCollator(Named(), LABELS), rows, chunk_size)
        assert sorted(targets_of(batch)) == named(expected)
        assert (len(batch.chunks) == 1) == (chunk_size is None)


def test_a_teachers_scores_are_targets() -> None:
    rows = [row("one", "a", "bb ccc", scores=(-2.5, 0.0, 7.0)), row("two", "bb", scores=(1.5,), labels=(2.0,))]
    expected = {("one", "a"): -2.5, ("one", "bb"): 0.0, ("one", "ccc"): 7.0, ("two", "bb"): 1.5}
    assert sorted(targets_of(collated(PairCollator(Named(), SCORES), rows, 2))) == named(expected)


@pytest.mark.parametrize("count", [1, 3, 99])
def test_in_batch_negatives(count: int) -> None:
    rows = [
        row("one", "a bb", "ccc"),
        row("two", "ccc", "dddd"),
        row("one", "e", "f"),
        row("three", "a g", labels=(2.0, 0.5)),
        row("four", "h", "a i"),
    ]
    batch = collated(PairCollator(Named(), LABELS, count), rows, 4)
    found = targets_of(batch)
    assert targets_of(collated(PairCollator(Named(), LABELS, count), rows, 4)) == found
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
        PairCollator(Named(), SCORES, in_batch_negatives=2)


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
            expected[tokens_of(read([Pair(one.query, document)]))[0], one.query.id, label] += 1
    for chunk_size in (1, 3, None):
        batch = collated(PairCollator(read, LABELS), rows, chunk_size)
        texts = [each for chunk in batch.chunks for each in tokens_of(chunk)]
        assert Counter(zip(texts, batch.queries.tolist(), batch.targets.tolist(), strict=True)) == expected
        keys = torch.cat([images["keys"] for images in batch.images]).tolist()
        assert len(keys) == len(set(keys)) == 4


def tokens_of(chunk: Inputs) -> list[tuple[int, ...]]:
    """The tokens_of of each item, without padding."""
    rows = zip(chunk["input_ids"], chunk["attention_mask"].bool(), strict=True)
    return [tuple(ids[mask].tolist()) for ids, mask in rows]


@pytest.mark.parametrize("chunk_cost", [1, 400, 700, 10**6])
def test_a_chunk_has_room_for_new_tokens(checkpoint: Path, chunk_cost: int) -> None:
    """What a pair shares with the one before costs nothing again; a pair too large for any chunk has one of its own."""
    batch = collated(PairCollator(preprocessor(checkpoint), LABELS), lists(), tokens=chunk_cost, patch_cost=0)
    costs = [int(chunk["attention_mask"].sum() - chunk["shared"].sum()) for chunk in batch.chunks]
    sizes = [len(chunk["shared"]) for chunk in batch.chunks]
    assert all(cost <= chunk_cost or size == 1 for cost, size in zip(costs, sizes, strict=True))
    if chunk_cost == 1:
        assert set(sizes) == {1}
    # No chunk could have taken the first of the next one.
    following = [int(chunk["attention_mask"][0].sum()) for chunk in batch.chunks[1:]]
    assert all(cost + more > chunk_cost for cost, more in zip(costs, following, strict=False))


@pytest.mark.parametrize(
    ("example", "wanted", "message"),
    [
        (row("7", "a", "bb"), SCORES, r"train.jsonl, row 7: the loss distils a teacher's scores, and there are none"),
        (row("7", "a", "bb", scores=(1.0, 2.0)), LABELS, r"train.jsonl, row 7: scores given but unused"),
        (row("7", "a"), LISTWISE, r"train.jsonl, row 7: the query has one candidate, .* Add negatives, or group"),
        (row("7", "", "a bb", labels=(0.0, 0.0)), LISTWISE, r"row 7: none of the query's 2 candidates has a label"),
        (row("7", "a", "bb", labels=(2.0, 0.0)), LabelSpec(largest=1.0), r"row 7: label 2 is outside of .* 0 to 1\."),
        (row("7", "a", "bb", labels=(1.0, -0.5)), LABELS, r"row 7: label -0.5 is outside of .* 0 to inf"),
        (row("7", "a", "bb", labels=(float("nan"), 0.0)), LABELS, r"row 7: label nan is outside"),
    ],
)
def test_what_a_loss_cannot_use_is_refused(example: Example, wanted: LabelSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairCollator(Named(), wanted)([row("fine", "a", "bb") if not wanted.teacher_scores else example, example])


def test_what_a_pointwise_loss_can_use_is_not() -> None:
    batch = PairCollator(Named(), LabelSpec(largest=1.0))([row("one", "", "a", labels=(0.0,)), row("two", "a")])
    assert sorted(batch.targets.tolist()) == [0.0, 1.0]


# Measuring


@pytest.mark.parametrize("by_document", [False, True])
def test_pairs_of_one_query_or_of_one_document_stand_together(by_document: bool) -> None:
    loader = PairCollator(Named(), LABELS, 0, by_document).loader(reranking_set(), 1, 0, 1)
    together = [numbers[by_document] for batch in loader.sampler for numbers in batch]
    assert len([*groupby(together)]) == len(set(together))


def test_an_item_is_read_once_for_a_list() -> None:
    reranking = reranking_set()
    read: list[int] = []

    class Corpus(list):
        def __getitem__(self, column: int) -> Item:  # type: ignore[override]
            read.append(column)
            return super().__getitem__(column)

    corpus = Corpus(reranking.evaluation.corpus)
    numbers = [(query, column) for query, row in enumerate(reranking.candidates) for column in row][:100]
    read_pairs(replace(reranking.evaluation, corpus=corpus), numbers)
    assert sorted(read) == sorted({column for _, column in numbers})
    assert len(read) < len(numbers)


@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize(("size", "world_size"), [(1, 1), (4, 1), (4, 3), (7, 2), (500, 3)])
def test_every_pair_is_measured_once_over_processes(size: int, world_size: int, by_document: bool) -> None:
    reranking, found = reranking_set(), []
    counts = []
    for rank in range(world_size):
        loader = PairCollator(Named(), LABELS, 0, by_document).loader(reranking, size, rank, world_size)
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
    loaders = [PairCollator(Named(), LABELS).loader(few, 8, rank, 3) for rank in range(3)]
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
    batch = PairCollator(preprocessor(checkpoint), LABELS).collate_pairs(pairs, Chunking(1))
    assert len(torch.cat([images["keys"] for images in batch.images])) == 2
    assert sorted(map(tuple, batch.rows.tolist())) == [(0, 2), (0, 3), (4, 1)]
    read = {numbers[:2]: tokens_of(preprocessor(checkpoint)([numbers[2]]))[0] for numbers in pairs}
    texts = [each for chunk in batch.chunks for each in tokens_of(chunk)]
    assert texts == [read[query, column] for query, column in batch.rows.tolist()]
