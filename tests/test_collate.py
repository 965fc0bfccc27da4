from __future__ import annotations

import math
import pickle
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from building import collated

from vlmembed.data import ItemCollator
from vlmembed.data.collate import cut
from vlmembed.types import Batch, Chunking, Example, Inputs, Item, Part, Prepared, Preprocessor, Role


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


def item(role: Role, value: str) -> Item:
    return Item(role, (Part("text", value),), origin="t.jsonl, row 1")


def example(query: str, positives: Sequence[str], negatives: Sequence[str] = ()) -> Example:
    documents = [tuple(item("document", value) for value in values) for values in (positives, negatives)]
    return Example(item("query", query), *documents)


def strings(batch: Batch) -> list[str]:
    """The texts of the items, in the order of the concatenated chunks."""
    return ["".join(map(chr, row[row > 0])) for chunk in batch.chunks for row in chunk["input_ids"]]


def embed(batch: Batch) -> torch.Tensor:
    """A made-up embedding that depends on the content alone: (count, sum, sum of squares) of the character codes."""
    rows = [chunk["input_ids"].double() for chunk in batch.chunks]
    return torch.cat([torch.stack([(ids > 0).sum(1), ids.sum(1), ids.square().sum(1)], dim=1) for ids in rows])


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


def test_short_items_share_a_chunk_that_has_room_for_one_long_item() -> None:
    batch = collated(ItemCollator(Letters()), EXAMPLES, 1)
    assert strings(batch)[0] == "long question here"
    assert [len(chunk["input_ids"]) for chunk in batch.chunks] == [1, 1, 3, 4, 2]


def test_chunks_of_so_many_tokens() -> None:
    batch = collated(ItemCollator(Letters()), EXAMPLES, 1, tokens=12)
    assert areas(batch) == [18, 10, 12, 10, 12, 1]  # A long item has a chunk for itself, whatever it takes.


def test_what_images_cost_counts_as_tokens_do() -> None:
    items = [item("query", "x" * length) for length in (30, 5, 20, 5, 5)]
    sizes = {None: [5], 150: [1, 2, 2], 200: [1, 4], 240: [2, 3], 1: [1] * 5}
    for tokens, expected in sizes.items():
        prepared = Shown(Letters(), items, [80, 0, 100, 0, 0])
        order, chunks, _ = cut(prepared, Chunking(tokens=tokens, patch_cost=1.0))
        assert order == [0, 2, 1, 3, 4]
        assert [len(chunk["input_ids"]) for chunk in chunks] == expected


class Pictures(Letters):
    """Every item shows pictures, of ten patches for each of its letters."""

    def prepare(self, items: Sequence[Item], draft: bool = False) -> Prepared:
        return Shown(self, items)


class Shown(Prepared):
    def __init__(self, preprocessor: Preprocessor, items: Sequence[Item], patches: list[int] | None = None) -> None:
        super().__init__(preprocessor, items)
        self.shown = patches

    @property
    def patches(self) -> list[int]:
        return self.shown or [10 * length for length in self.lengths]


@pytest.mark.parametrize(("patch_cost", "rows"), [(0.0, [1, 1, 3, 4, 2]), (0.5, [*[1] * 9, 2])])
def test_patches_cost_what_they_are_said_to(patch_cost: float, rows: list[int]) -> None:
    batch = collated(ItemCollator(Pictures()), EXAMPLES, tokens=18, patch_cost=patch_cost)
    assert [len(chunk["input_ids"]) for chunk in batch.chunks] == rows


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7])
def test_chunks_give_the_embeddings_of_the_whole_in_any_order_of_examples(chunk_size: int) -> None:
    shuffled = random.Random(0).sample(EXAMPLES, len(EXAMPLES))
    whole, chunked = ItemCollator(Letters())(EXAMPLES), collated(ItemCollator(Letters()), shuffled, chunk_size)
    found = {}
    for name, batch in {"whole": whole, "chunked": chunked}.items():
        rows = torch.cat([batch.queries, batch.documents])
        ids = torch.cat([batch.query_ids, batch.document_ids])
        found[name] = dict(zip(ids.tolist(), embed(batch)[rows].tolist(), strict=True))
    assert found["whole"] == found["chunked"]  # Exact: sums of integers.
    assert judgements(whole) == judgements(chunked)


def test_equal_content_in_two_roles_is_two_items() -> None:
    batch = ItemCollator(Letters())([example("same", ["same"])])
    assert strings(batch) == ["same", "same"]
    assert batch.queries.tolist() != batch.documents.tolist()
    assert batch.query_ids.tolist() != batch.document_ids.tolist()


def test_an_example_may_have_only_negatives() -> None:
    batch = ItemCollator(Letters())([example("q", [], ["n"])])
    assert judgements(batch) == {("q", "n"): -1}


def test_types_and_pickling() -> None:
    collator = pickle.loads(pickle.dumps(ItemCollator(Letters())))
    batch = collator(EXAMPLES)
    assert batch.labels.dtype == torch.int8
    for tensor in (batch.queries, batch.documents, batch.query_ids, batch.document_ids, batch.pairs):
        assert tensor.dtype == torch.int64
    assert batch.pairs.shape == (9, 2)


def test_scores_that_nothing_reads_are_refused() -> None:
    scored = Example(item("query", "q"), (item("document", "d"),), scores=(0.5,))
    with pytest.raises(ValueError, match="row 1: scores given but unused"):
        ItemCollator(Letters())([scored])


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_bad_chunk_sizes_are_refused(chunk_size: int) -> None:
    with pytest.raises(ValueError, match=f"chunk_size is 1 or more.*got {chunk_size}"):
        Chunking(chunk_size)


def test_items_keep_their_rows() -> None:
    batch = pickle.loads(pickle.dumps(ItemCollator(Letters()))).collate_items(
        [(7, item("query", "abc")), (2, item("document", "de"))]
    )
    assert batch.rows.tolist() == [7, 2]
    assert batch.inputs["input_ids"].tolist() == [[97, 98, 99], [100, 101, 0]]
