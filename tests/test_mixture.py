from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import pytest

from vlmembed.data import GroupByQuery, Mixture, Source
from vlmembed.data.sources import Batches
from vlmembed.types import Example, Item, Part


class Questions(Source):
    """Row k asks the k-th of the given texts."""

    def __init__(self, queries: Sequence[str]):
        self.queries = queries

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> Example:
        query = Item("query", (Part("text", self.queries[index]),))
        return Example(query, (Item("document", (Part("text", f"answer {index}"),)),))


def distinct(name: str, size: int) -> Questions:
    return Questions([f"{name}{k}" for k in range(size)])


def epoch(batches: Batches, number: int = 0) -> list[list[int]]:
    batches.set_epoch(number)
    return list(batches)


def origins(mixture: Mixture, rows: Sequence[int]) -> Counter[int]:
    bounds = mixture.offsets
    return Counter(sum(row >= bound for bound in bounds[1:]) for row in rows)


def test_a_mixture_numbers_its_rows_source_by_source() -> None:
    sources = [distinct("a", 3), distinct("b", 1), distinct("c", 2)]
    mixture = Mixture([*sources])
    expected = [example.query.id for source in sources for example in (source[k] for k in range(len(source)))]
    assert len(mixture) == 6
    assert [mixture[k].query.id for k in range(6)] == expected
    assert [row for row in mixture.query_ids(range(6))] == expected
    for index in (6, -1):
        with pytest.raises(IndexError):
            mixture[index]


@pytest.mark.parametrize(
    ("weights", "alpha", "expected"),
    [
        (None, 1.0, [80, 20]),
        (None, 0.0, [50, 50]),
        (None, 0.5, [67, 33]),  # √80 : √20 = 2 : 1 of 100 rows, rounded by largest remainder
        ([1.0, 3.0], 1.0, [25, 75]),
    ],
)
def test_shares(weights: list[float] | None, alpha: float, expected: list[int]) -> None:
    mixture = Mixture([distinct("a", 80), distinct("b", 20)], weights, alpha)
    assert mixture.apportion(100) == expected
    # One row per batch, so that no row has to wait for another batch.
    rows = [row for batch in epoch(Batches(mixture, 1)) for row in batch]
    assert origins(mixture, rows) == Counter(dict(enumerate(expected)))


def test_up_sampled_rows_come_up_equally_often() -> None:
    # 6 rows of 4 : 2, half of them each: b's two rows come once, and one of them again.
    mixture = Mixture([distinct("a", 4), distinct("b", 2)], weights=[1.0, 1.0])
    counts = Counter(row for number in range(40) for batch in epoch(Batches(mixture, 1), number) for row in batch)
    assert sum(counts.values()) == 40 * 6
    assert sum(counts[row] for row in range(4)) == 40 * 3
    assert all(40 <= counts[row] <= 80 for row in (4, 5))
    assert all(counts[row] > 0 for row in range(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1.0, 2.0], "alpha": 0.5}, "weights or alpha, not both"),
        ({"weights": [1.0]}, "one number above 0 for each of the 2 sources"),
        ({"weights": [1.0, 0.0]}, "above 0"),
        ({"weights": [1.0, float("nan")]}, "above 0"),
        ({"alpha": -1.0}, "alpha is 0 or more, got -1.0"),
    ],
)
def test_bad_shares_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture([distinct("a", 3), distinct("b", 3)], **arguments)


def test_no_source_and_nested_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one source"):
        Mixture([])
    with pytest.raises(ValueError, match="mixture inside a mixture"):
        Mixture([Mixture([distinct("a", 3)]), distinct("b", 3)])


def test_a_source_that_would_never_be_seen_is_refused() -> None:
    mixture = Mixture([distinct("a", 99), distinct("b", 1)], one_source_batches=True)
    with pytest.raises(ValueError, match="'questions' gets none of the 10"):
        list(Batches(mixture, 10))


def test_an_epoch_shows_every_row_once_in_an_order_of_its_own() -> None:
    batches = Batches(Mixture([distinct("a", 23)]), 5, seed=3)
    first, second = epoch(batches, 0), epoch(batches, 1)
    assert len(batches) == len(first) == 4
    rows = [row for batch in first for row in batch]
    assert len(set(rows)) == 20
    assert first != second
    assert first == epoch(Batches(Mixture([distinct("a", 23)]), 5, seed=3), 0)
    assert first != epoch(Batches(Mixture([distinct("a", 23)]), 5, seed=4), 0)


MIXTURES = {
    "plain": Mixture([distinct("a", 50)]),
    "mixed": Mixture([distinct("a", 31), distinct("b", 17)], alpha=0.5),
    "duplicates": Mixture([Questions([f"q{k % 13}" for k in range(60)])]),
    "one source": Mixture([distinct("a", 31), Questions([f"q{k % 14}" for k in range(29)])], one_source_batches=True),
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 3), (3, 4), (1, 12), (6, 2)])
def test_processes_cut_the_batches_of_one_process(name: str, batch_size: int, world_size: int) -> None:
    for number in (0, 5):
        whole = epoch(Batches(MIXTURES[name], 12, seed=1), number)
        ranks = [Batches(MIXTURES[name], batch_size, 1, rank, world_size) for rank in range(world_size)]
        slices = [epoch(rank, number) for rank in ranks]
        assert [[*chain(*pieces)] for pieces in zip(*slices, strict=True)] == whole


@pytest.mark.parametrize("name", MIXTURES)
def test_no_query_comes_twice_in_a_batch_and_the_length_is_exact(name: str) -> None:
    mixture = MIXTURES[name]
    for size in (5, 12):
        batches = Batches(mixture, size)
        drawn = epoch(batches)
        assert len(drawn) == len(batches) == len(mixture) // size
        for batch in drawn:
            assert len({row for row in mixture.query_ids(batch)}) == len(batch) == size


@pytest.mark.parametrize("copies", [1, 2, 10, 30])
def test_the_length_is_exact_under_heavy_duplication(copies: int) -> None:
    # One query fills nearly everything; a batch of 4 needs all 4 queries there are.
    source = Questions(["same"] * copies * 9 + ["x", "y", "z"])
    batches = Batches(Mixture([source]), 4)
    drawn = epoch(batches)
    assert len(drawn) == len(batches) == (copies * 9 + 3) // 4
    assert all(len({source.queries[row] for row in batch}) == 4 for batch in drawn)


SKEWED = {
    "one": ["often"] * 2500 + [f"q{k}" for k in range(50)],
    "half": ["often"] * 500 + [f"q{k}" for k in range(500)],
    "several": ["a"] * 300 + ["b"] * 300 + [f"q{k}" for k in range(400)],
    "power law": [f"q{int(300 / (1 + k % 300))}" for k in range(1200)] + [f"r{k}" for k in range(40)],
}


@pytest.mark.parametrize("name", SKEWED)
@pytest.mark.parametrize("one_source_batches", [False, True])
def test_what_an_epoch_misses_of_frequent_queries_is_said(name: str, one_source_batches: bool) -> None:
    """A query's rows are seen once a batch: no more of them than there are batches."""
    mixture = Mixture([Questions(SKEWED[name])], one_source_batches=one_source_batches)
    batches = Batches(mixture, 16)
    with pytest.warns(UserWarning, match=r"GroupByQuery .* an epoch then sees all") as said:
        epochs = [{*chain(*epoch(batches, number))} for number in (0, 1)]
    frequencies = Counter(SKEWED[name]).values()
    expected = sum(min(frequency, len(batches)) for frequency in frequencies)
    assert len(epochs[0]) == pytest.approx(expected, abs=16)  # Rows may wait when the epoch ends.
    (warning,) = said
    assert f"An epoch sees {expected:,} of the {len(mixture):,} rows of questions" in str(warning.message)
    assert f" {max(frequencies):,} rows ask the same" in str(warning.message)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SKEWED)
def test_grouped_rows_are_all_seen(name: str) -> None:
    grouped = GroupByQuery(Questions(SKEWED[name]))
    batches = Batches(Mixture([grouped]), 1)
    documents = [document.id for row in chain(*epoch(batches)) for document in grouped[row].positives]
    assert len({*documents}) == len(documents) == len(SKEWED[name])


@pytest.mark.filterwarnings("error")
def test_even_queries_are_no_skew() -> None:
    for queries in ([f"q{k % 50}" for k in range(1000)], [f"q{k}" for k in range(1000)]):
        assert len({*chain(*epoch(Batches(Mixture([Questions(queries)]), 16)))}) > 960


def test_one_source_batches() -> None:
    mixture = Mixture([distinct("a", 40), distinct("b", 20), distinct("c", 20)], one_source_batches=True)
    drawn = epoch(Batches(mixture, 4))
    sources = [origins(mixture, batch) for batch in drawn]
    assert all(len(source) == 1 for source in sources)
    order = [next(iter(source)) for source in sources]
    assert Counter(order) == {0: 10, 1: 5, 2: 5}
    assert order != sorted(order)
    assert len({row for batch in drawn for row in batch}) == 80


class Unread(Questions):
    """Says of no row which query it asks."""

    def read_queries(self, indices: Sequence[int]) -> list[Item]:
        raise AssertionError(indices)


@pytest.mark.parametrize("one_source_batches", [False, True])
def test_rows_of_one_query_may_come_together_where_told_so(one_source_batches: bool) -> None:
    sources: list[Source] = [Unread(["same"] * 12), Unread(["other"] * 6)]
    batches = Batches(Mixture(sources, one_source_batches=one_source_batches), 3, world_size=2, distinct=False)
    second = Batches(batches.mixture, 3, rank=1, world_size=2, distinct=False)
    drawn = [one + other for one, other in zip(epoch(batches), epoch(second), strict=True)]
    assert [len(batch) for batch in drawn] == [6, 6, 6]
    assert sorted(chain(*drawn)) == [*range(18)]
    if one_source_batches:
        assert all(len(origins(batches.mixture, batch)) == 1 for batch in drawn)


def test_too_few_rows_or_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="The 3 training rows are fewer than one batch of 8"):
        Batches(Mixture([distinct("a", 3)]), 4, world_size=2)
    with pytest.raises(ValueError, match="ask 3 distinct queries, fewer than the 8 rows"):
        list(Batches(Mixture([Questions([f"q{k % 3}" for k in range(30)])]), 4, world_size=2))
    with pytest.raises(ValueError, match="batch_size is 1 or more, got 0"):
        Batches(Mixture([distinct("a", 3)]), 0)
