"""Each distinct image of a batch is read, preprocessed and seen once, and nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from building import encoder, item, picture, ranker

from vlmembed.backbones import Qwen3VL
from vlmembed.encoder import Encoder
from vlmembed.features import GIB, RecentFeatures
from vlmembed.media import load_image
from vlmembed.types import EvaluationSet, Inputs, Item, Pair, Part, RerankingSet


def files(folder: Path) -> list[Item]:
    """Texts, several images, and three distinct images in eight places: some from files, some open, one in both."""
    picture(96, 64, 1).save(folder / "one.png")
    picture(64, 64, 2).save(folder / "two.png")

    def document(*parts: str | Path | Any) -> Item:
        kinds = ["text" if isinstance(part, str) else "image" for part in parts]
        return Item("document", tuple(Part(kind, part) for kind, part in zip(kinds, parts, strict=True)))  # type: ignore[arg-type]

    one, two = folder / "one.png", folder / "two.png"
    return [
        item("a query without an image", role="query"),
        document(two, "between", one, "behind"),
        document("a long text " * 20),
        document(picture(32, 96, 3)),
        document(one, one, "twice"),
        item(picture(32, 96, 3), "which is this", role="query"),
        document("first", one),
        document(two),
    ]


def test_inputs_are_those_of_transformers(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess: Any = Qwen3VL(str(checkpoint)).make_preprocessor()
    items = files(tmp_path)
    chats: list[Any] = []
    with monkeypatch.context() as patched:
        apply = preprocess._apply_once
        patched.setattr(preprocess, "_apply_once", lambda given: chats.extend(given) or apply(given))
        preprocess.prepare(items)
    expected = preprocess.processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={
            "padding": True,
            "return_tensors": "pt",
            "images_kwargs": {"do_rescale": False, "do_normalize": False},
        },
    )
    counts = counted_images(preprocess, monkeypatch)
    found = preprocess._apply_once(chats)
    assert counts == [3]
    order = found.pop("image_order").tolist()
    assert len(order) == 8
    grids = found.pop("image_grid_thw")
    pixels = found.pop("pixel_values").split(grids.prod(dim=1).tolist())
    assert torch.equal(grids[order], expected.pop("image_grid_thw"))
    assert torch.equal(torch.cat([pixels[place] for place in order]), expected.pop("pixel_values"))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def counted_images(preprocess: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of transformers' image processor gets."""
    counts: list[int] = []
    kind = type(preprocess.processor.image_processor)
    theirs = kind.preprocess

    def count(self: Any, images: Sequence[Any], *options: Any, **named: Any) -> Any:
        counts.append(len(images))
        return theirs(self, images, *options, **named)

    monkeypatch.setattr(kind, "preprocess", count)
    return counts


def test_a_batch_reads_each_image_once(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder(checkpoint)
    preprocess = model.backbone.preprocessor
    items = files(tmp_path)
    alone = torch.cat([model(preprocess([each])) for each in items])
    counts, opened = counted_images(preprocess, monkeypatch), []

    def opening(frame: Any, *options: Any) -> Any:
        opened.append(frame)
        return load_image(frame, *options)

    monkeypatch.setattr("vlmembed.backbones.preprocessing.load_image", opening)
    prepared = preprocess.prepare(items)
    assert counts == [3]
    assert len(opened) == 3
    images = prepared.images(None)
    assert len(torch.cat([chunk["keys"] for chunk in images])) == 3
    assert torch.allclose(model(prepared.chunk(range(len(items))), model.encode_images(images)), alone, atol=1e-5)


def test_a_text_is_cut_beside_images(checkpoint: Path, tmp_path: Path) -> None:
    preprocess = Qwen3VL(str(checkpoint), max_length=70).make_preprocessor()
    items = files(tmp_path)
    chunk = preprocess.prepare(items).chunk([2, 1])
    alone = preprocess([items[2]])["input_ids"][0]
    assert torch.equal(chunk["input_ids"][0][chunk["attention_mask"][0].bool()], alone)
    assert len(alone) == 70


@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|video_pad|>"])
@pytest.mark.parametrize("beside", [[], [picture(64, 64, 1)]])
def test_a_text_does_not_stand_for_an_image(checkpoint: Path, mark: str, beside: list[Any]) -> None:
    preprocess = Qwen3VL(str(checkpoint)).make_preprocessor()
    written = replace(item(f"say {mark}", *beside), origin="train.jsonl, row 7, column 'query'")
    for read in (preprocess, preprocess.prepare):
        with pytest.raises(ValueError, match=re.escape(f"row 7, column 'query' has {mark} in its text 'say {mark}'")):
            read([item(picture(64, 64, 2)), written])


# Kept features


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Encoder:
    return encoder(checkpoint).eval()


def chunks_of(model: Encoder, *seeds: int) -> tuple[list[Inputs], list[int]]:
    """Chunks of about two images, and the keys in order."""
    items = [item(picture(64, 64, seed)) for seed in seeds]
    chunks = model.backbone.preprocessor.prepare(items).images(32)
    assert len(chunks) == -(-len(seeds) // 2)
    return chunks, [key for chunk in chunks for key in chunk["keys"].tolist()]


def seen(model: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The keys of the images that the vision tower runs on."""
    keys: list[int] = []
    see = model.backbone.encode_images

    def record(images: Inputs) -> Any:
        keys.extend(images["keys"].tolist())
        return see(images)

    monkeypatch.setattr(model.backbone, "encode_images", record)
    return keys


@torch.no_grad()
def test_the_tower_runs_on_what_is_missing(model: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, keys = chunks_of(model, 1, 2, 3, 4, 5)
    expected = dict(zip(keys, model.encode_images(chunks), strict=True))
    kept = {key: torch.full_like(expected[key], key % 7) for key in (keys[0], keys[3], keys[2])}
    ran = seen(model, monkeypatch)
    found, new = model.encode_missing_images(chunks, kept.get)
    assert ran == [keys[1], keys[4]] == [*new]
    for key, features in zip(keys, found, strict=True):
        assert features is (kept | new)[key]
        # The tower runs on other images beside it.
        assert key in kept or torch.allclose(features, expected[key], atol=1e-6)


@torch.no_grad()
def test_the_least_recently_used_goes_first(model: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, keys = chunks_of(model, *range(10))
    features = dict(zip(keys, model.encode_images(chunks), strict=True))
    seeds = {chunks_of(model, seed)[1][0]: seed for seed in range(10)}
    size = features[keys[0]].nbytes
    recent = RecentFeatures(model, 3.5 * size / GIB)
    ran = seen(model, monkeypatch)

    def ask(*wanted: int) -> list[int]:
        """Which images the tower ran on, to see these."""
        chunks, keys = chunks_of(model, *wanted)
        ran.clear()
        for key, found in zip(keys, recent.encode_images(chunks), strict=True):
            assert torch.allclose(found, features[key], atol=1e-6)
        return sorted(seeds[key] for key in ran)

    assert ask(1, 2, 3) == [1, 2, 3]
    assert ask(1) == []
    # Room for three: 2 was used before 3, and both before 1.
    assert ask(4) == [4]
    assert ask(1, 3, 4) == []
    assert ask(2) == [2]
    # More than there is room for, at once.
    assert ask(5, 6, 7, 8, 9) == [5, 6, 7, 8, 9]
    assert len(ask(5, 6, 7, 8, 9)) == 2
    # What is kept takes no more memory than it says: none is a view of a whole chunk.
    assert sum(tensor.untyped_storage().nbytes() for tensor in recent._features.values()) <= 3.5 * size


@pytest.mark.parametrize("limit", [0.0, 1e-6, 1.0])
@torch.no_grad()
def test_scores_do_not_depend_on_what_is_kept(checkpoint: Path, limit: float) -> None:
    module = ranker(checkpoint)
    module.eval()
    queries = [item(f"query {number}", *[picture(64, 32, number)] * (number % 2), role="query") for number in range(4)]
    corpus = [item(picture(64, 64, 10 + number), "caption") for number in range(5)]
    names = [[str(number) for number in range(len(items))] for items in (queries, corpus)]
    evaluation = EvaluationSet(
        "set", queries, corpus, *names, {"0": {"1": 1}, "1": {"2": 1}, "2": {"3": 1}, "3": {"4": 1}}
    )
    reranking = RerankingSet(evaluation, [[0, 1, 4], [2, 0], [4, 3, 2, 1], [0, 4]])
    metrics = module.metric(reranking)
    module._recent = RecentFeatures(module.encoder, limit)
    for batch in module.collator().loader(reranking, 1, 0, 1):
        module.measure(batch, metrics)
    found = {}
    for query, row, columns in zip(range(4), *(each.tolist() for each in metrics.top_k(9)), strict=True):
        found |= {(query, column): score for score, column in zip(row, columns, strict=True) if column >= 0}
    assert found.keys() == {(query, column) for query, columns in enumerate(reranking.candidates) for column in columns}
    for (query, column), score in found.items():
        alone = module.encoder(module.preprocessor([Pair(queries[query], corpus[column])]))
        assert score == pytest.approx(float(alone), abs=1e-5)
