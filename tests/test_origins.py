"""Where the rows of a batch came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from building import batch, examples, item, lists, module, ranker, ranking_batch, trainer, write_rows
from lightning.pytorch.callbacks import Callback

from vlmembed.data import Mixture, RetrievalDataModule, Rows, Source
from vlmembed.types import Batch, Example


class Nameless(Source):
    """Rows that do not say where they come from, but for one document."""

    name = "nameless"

    def __init__(self, count: int) -> None:
        self.rows = examples(count)
        document = replace(self.rows[-1].positives[0], origin="elsewhere")
        self.rows[-1] = replace(self.rows[-1], positives=(document,))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]


class Seen(Callback):
    """Keeps where rows came from."""

    def __init__(self) -> None:
        self.origins: list[tuple[str, ...]] = []

    def on_train_batch_start(self, trainer: object, pl_module: object, data: Batch, batch_idx: int) -> None:
        self.origins.append(data.origins)


@pytest.mark.parametrize("build", [module, ranker])
def test_every_row_of_a_run_says_where_it_came_from(checkpoint: Path, tmp_path: Path, build: Callable) -> None:
    """Through loader workers."""
    rows, seen = write_rows(tmp_path / "rows.jsonl"), Seen()
    train = [str(rows), Nameless(5)]
    data = RetrievalDataModule(train, batch_size=4, chunk_size=3, num_workers=2)
    trainer(callbacks=[seen]).fit(build(checkpoint), datamodule=data)
    everything = [origin for origins in seen.origins for origin in origins]
    named = [f"{rows}, row {row}, column 'query'" for row in range(1, 10)] + [
        f"nameless, row {row}" for row in range(1, 6)
    ]
    assert set(everything) <= set(named)
    assert len(everything) == 4 * len(seen.origins) == 12


def test_a_mixture_names_what_its_sources_do_not(tmp_path: Path) -> None:
    source = Nameless(4)
    mixture = Mixture([Rows(str(write_rows(tmp_path / "rows.jsonl"))), source])
    found = mixture[10]
    assert found == source[1]
    assert [each.origin for each in (found.query, *found.documents)] == ["nameless, row 2"] * (1 + len(found.documents))
    assert [each.origin for each in mixture[12].positives] == ["elsewhere"]
    assert mixture[12].query.origin == "nameless, row 4"
    assert mixture[0].query.origin == f"{tmp_path / 'rows.jsonl'}, row 1, column 'query'"


def origins(rows: list[Example]) -> list[Example]:
    """The same rows, the first two of which ask the same."""
    asked = item("what", role="query")
    queries = [asked, asked, *(row.query for row in rows[2:])]
    return [
        replace(row, query=replace(query, origin=f"row {number}"))
        for number, (row, query) in enumerate(zip(rows, queries, strict=True))
    ]


def test_rows_are_named_one_by_one_though_equal_items_are_merged(checkpoint: Path) -> None:
    for model, data in (
        (module(checkpoint), batch(module(checkpoint), origins(examples(5)), 3)),
        (ranker(checkpoint), ranking_batch(ranker(checkpoint), origins(lists(5)), 3)),
    ):
        assert data.origins == tuple(f"row {number}" for number in range(5))
        assert model.encoder.halve(data).origins == data.origins
