"""Hard negatives are those of a slow search, scores are a reranker's logits; rows with both can be trained on."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import sentence_transformers
import torch
import yaml
from building import encoder, item, jsonl, multi_vector, picture, ranker, slow_maxsim
from forked import CONTEXT
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim, mine_hard_negatives
from torch import Tensor

from vlmembed.cli import check, main
from vlmembed.data import Rows, Source
from vlmembed.data.digits import HandwrittenNumbers
from vlmembed.export.sentence_transformers import write_folder, write_reranker
from vlmembed.files import HOST, whole_file
from vlmembed.mining import mine, score, write_rows
from vlmembed.mining.candidates import Entry, identify
from vlmembed.mining.mining import Choice, Pool, gather, hard_negatives
from vlmembed.search.encoding import encode
from vlmembed.search.index import Documents
from vlmembed.search.served import model_input
from vlmembed.types import Example, Item, Pair, Part


@pytest.fixture(scope="module")
def embedder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that Sentence Transformers opens."""
    folder = tmp_path_factory.mktemp("embedder")
    torch.manual_seed(0)
    write_folder(encoder(checkpoint), folder)
    return folder


class Listed(list[Example], Source):
    """Examples as they are."""


def asked(number: int) -> Item:
    return item(f"question {number}", role="query")


# What is chosen


@pytest.fixture
def searched() -> tuple[Pool, Tensor, Tensor]:
    """Six queries, one of them in two rows, with one to three positives among thirty documents."""
    texts = [item(f"text {number}") for number in range(30)]
    groups = [texts[0:1], texts[1:3], texts[3:4], texts[4:7], texts[7:8], texts[8:9]]
    rows = [Example(asked(query), tuple(group)) for query, group in enumerate(groups)]
    rows.append(Example(asked(0), (texts[9],), tuple(texts[10:])))
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(6, 8, generator=generator)
    documents = torch.randn(30, 8, generator=generator)
    pool = gather(Listed(rows), None)
    names = [*pool.documents]
    for query, positives in enumerate(pool.positives.values()):
        documents[[names.index(positive) for positive in positives]] += 1.5 * queries[query]
    return pool, queries, documents


def slow(pool: Pool, queries: Tensor, documents: Tensor, choice: Choice) -> Iterator[list[str]]:
    """One query and one document at a time."""
    names = [*pool.documents]
    for query, contents in enumerate([*pool.positives.values()][: len(queries)]):
        positives = {names.index(content) for content in contents}
        scores = [float(torch.cosine_similarity(queries[query], document, dim=0)) for document in documents]
        positive = min(scores[index] for index in positives)
        ranked = sorted({*range(len(documents))} - positives, key=lambda index: -scores[index])[: choice.depth]
        if choice.margin is not None:
            ranked = [index for index in ranked if scores[index] <= positive - choice.margin]
        if choice.relative_margin is not None:
            limit = positive * (1 - choice.relative_margin) if positive > 0 else positive * (1 + choice.relative_margin)
            ranked = [index for index in ranked if scores[index] <= limit]
        if choice.max_score is not None:
            ranked = [index for index in ranked if scores[index] <= choice.max_score]
        yield [names[index] for index in ranked[choice.skip : choice.skip + choice.count]]


PLAIN = Choice(count=3, depth=10, skip=0, margin=None, relative_margin=None, max_score=None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip": 2},
        {"depth": 4, "count": 4},
        {"margin": 0.0},
        {"margin": 0.3},
        {"relative_margin": 0.05},
        {"relative_margin": 0.6, "margin": 0.1, "count": 20, "depth": 30},
        {"max_score": 0.2},
        {"margin": 0.2, "relative_margin": 0.2, "max_score": 0.3, "skip": 1},
    ],
)
def test_hard_negatives_are_those_of_a_slow_search(
    searched: tuple[Pool, Tensor, Tensor], options: dict[str, Any]
) -> None:
    choice = replace(PLAIN, **options)
    expected = [*slow(*searched, choice)]
    # All at once, and two queries at a time.
    for tile_bytes in (2**20, 2 * 4 * 30):
        assert [*hard_negatives(*searched, cos_sim, choice, tile_bytes)[0].values()] == expected
    if options.keys() & {"margin", "relative_margin", "max_score", "skip"}:
        assert expected != [*slow(*searched, PLAIN)]


def test_time_follows_the_number_of_positives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of many queries has very many, nothing is done for the others but for theirs."""
    documents, queries = torch.randn(3_000, 4), torch.randn(50, 4)
    entries = [{f"{kind}{row}": Entry(Mock(), "") for row in range(size)} for kind, size in (("q", 50), ("d", 3_000))]
    pool = Pool(*entries, candidates=3_000, positives={f"q{row}": {f"d{row}"} for row in range(50)})
    pool.positives["q7"] = {f"d{row}" for row in range(2_995)}
    looked_at, topk = list[int](), Tensor.topk
    monkeypatch.setattr(Tensor, "topk", lambda tensor, k: looked_at.append(k) or topk(tensor, k))
    chosen, _ = hard_negatives(pool, queries, documents, cos_sim, PLAIN, 20 * 4 * 3_000)
    assert looked_at == [PLAIN.depth] * 3
    assert [*chosen.values()] == [*slow(pool, queries[:8], documents, PLAIN), *[*chosen.values()][8:]]
    assert {*chosen["q7"]} <= {f"d{row}" for row in range(2_995, 3_000)}


def test_text_is_mined_as_by_sentence_transformers(embedder: Path, tmp_path: Path) -> None:
    words = np.random.default_rng(0).choice(["red", "blue", "house", "tree", "cat", "seven"], (24, 4))
    texts = [" ".join(row) for row in words]
    pairs = [{"query": query, "positive": positive} for query, positive in zip(texts[:12], texts[12:], strict=True)]
    rows = jsonl(tmp_path / "rows.jsonl", pairs)
    mine(str(embedder), rows, str(tmp_path / "mined.jsonl"), negatives=3, margin=None, relative_margin=0.02)
    ours = {row["query"]: row["negatives"] for row in map(json.loads, (tmp_path / "mined.jsonl").open())}
    model = SentenceTransformer(str(embedder))
    theirs = mine_hard_negatives(
        datasets.Dataset.from_list(pairs),
        model,
        num_negatives=3,
        range_max=12,
        relative_margin=0.02,
        output_format="n-tuple",
        query_prompt_name="query",
        corpus_prompt_name="document",
        verbose=False,
    )
    full = {query: negatives for query, negatives in ours.items() if len(negatives) == 3}
    assert full == {row["query"]: [row[f"negative_{number}"] for number in (1, 2, 3)] for row in theirs}
    assert 2 < len(full) < 12


@pytest.mark.parametrize("similarity", ["maxsim", pytest.param("meanmaxsim", marks=pytest.mark.exhaustive)])
def test_a_multi_vector_model_mines_by_maxsim(
    similarity: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its most similar documents that are no positive, from the cache too, whatever instructions say."""
    write_folder(multi_vector(checkpoint, similarity=similarity).encoder, tmp_path / "model")
    words = [" ".join(["seven", "blue", "tree"][: 1 + number % 3]) + f" {number}" for number in range(11)]
    rows = [
        Example(replace(asked(number), instruction=f"Find {number % 2}."), (item(text),))
        for number, text in enumerate(words)
    ]
    options: dict[str, Any] = {"margin": None, "relative_margin": None, "cache": str(tmp_path / "cache")}
    for _ in range(2):
        mine(str(tmp_path / "model"), Listed(rows), str(tmp_path / "mined.jsonl"), negatives=3, batch_size=1, **options)
        monkeypatch.setattr(sentence_transformers.MultiVectorEncoder, "encode_query", None)  # All is in the cache.
    model = sentence_transformers.MultiVectorEncoder(str(tmp_path / "model"))
    documents = model.encode_document([{"text": text} for text in words])
    mined = Rows(str(tmp_path / "mined.jsonl"))
    for number, row in enumerate(rows):
        query = model.encode([{"text": row.query.parts[0].value}], prompt=row.query.instruction, task="query")
        scores = slow_maxsim(query, documents)[0].tolist()
        best = sorted((place for place in range(11) if place != number), key=scores.__getitem__, reverse=True)[:3]
        assert [negative.parts[0].value for negative in mined[number].negatives] == [words[place] for place in best]
    # From an index of the same documents, the same.
    jsonl(tmp_path / "corpus.jsonl", [{"id": str(number), "text": text} for number, text in enumerate(words)])
    encode(str(tmp_path / "model"), str(tmp_path / "corpus.jsonl"), str(tmp_path / "index"))
    monkeypatch.undo()
    indexed = str(tmp_path / "indexed.jsonl")
    options = {"margin": None, "relative_margin": None, "index": str(tmp_path / "index")}
    mine(str(tmp_path / "model"), Listed(rows), indexed, negatives=3, **options)
    assert [row.negatives for row in map(Rows(indexed).__getitem__, range(11))] == [
        row.negatives for row in map(mined.__getitem__, range(11))
    ]


def test_nothing_with_the_image_of_a_positive_is_a_negative(embedder: Path, tmp_path: Path) -> None:
    """Whatever file it is in, and whatever is written under it."""
    for name in ("one.png", "two.png", "other.bmp"):
        picture(64, 32, 5 if name == "other.bmp" else 1).save(tmp_path / name)
    copy = Item("document", (Part("image", tmp_path / "two.png"),))
    rows = [
        Example(asked(0), (Item("document", (Part("image", tmp_path / "one.png"),)),)),
        Example(asked(1), (copy,)),
        Example(asked(2), (item(picture(64, 32, 1), "with a caption"),)),
        Example(asked(3), (item("question 4"), Item("document", (Part("image", tmp_path / "other.bmp"),)))),
        Example(item("question 4", role="query"), (item(picture(64, 32, 5), "another caption"),)),
        Example(asked(0), (item("an answer in words"),)),
    ]
    # The second file is no document of its own.
    assert len(gather(Listed(rows), None).documents) == 6
    output = tmp_path / "mined" / "rows.jsonl"
    mine(str(embedder), Listed(rows), str(output), negatives=9, margin=None, relative_margin=None)
    mined = Rows(str(output), allow_outside=[str(tmp_path)])
    negatives = [[identify(negative) for negative in mined[row].negatives] for row in range(len(mined))]
    # Of six documents in four kinds: two images, with and without caption; an answer in words; a question.
    assert [len(row) for row in negatives] == [2, 3, 3, 2, 2, 2]
    for example, row in zip(rows, negatives, strict=True):
        shown = [images for _, images in row if images]
        assert len({*shown}) == len(shown)
        assert not {identify(positive)[1] for positive in example.positives} & {*shown}
        assert identify(example.query) not in row
    # The same question in two rows: neither's answer is a negative of the other.
    words = identify(item("an answer in words"))
    assert [words in row for row in negatives] == [False, True, True, True, True, False]


def test_negatives_come_from_a_corpus_and_after_those_that_are_there(embedder: Path, tmp_path: Path) -> None:
    rows = [
        Example(asked(0), (item("right"),), (item("corpus 3"), item("given"))),
        Example(asked(1), (item("corpus 1"),)),
    ]
    corpus = tmp_path / "corpus"
    jsonl(corpus / "corpus.jsonl", [{"id": str(number), "text": f"corpus {number}"} for number in range(5)])
    jsonl(corpus / "queries.jsonl", [{"id": "q", "text": "anything"}])
    (corpus / "qrels.tsv").write_text("q\t0\t1\n")
    output = tmp_path / "mined.jsonl"
    mine(str(embedder), Listed(rows), str(output), str(corpus), 9, margin=None, relative_margin=None)
    first, second = map(json.loads, output.open())
    assert first["negatives"][:2] == ["corpus 3", "given"]
    assert sorted(first["negatives"][2:]) == [f"corpus {number}" for number in (0, 1, 2, 4)]
    assert sorted(second["negatives"]) == [f"corpus {number}" for number in (0, 2, 3, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "got 0, 0 and 10"),
        ({"skip": -1}, "got 3, -1 and 10"),
        ({"skip": 8}, "depth at least both together; got 3, 8 and 10"),
        ({"margin": -0.1}, "margin is 0 or more.*-0.1"),
        ({"relative_margin": math.nan}, "relative_margin is 0 or more.*nan"),
    ],
)
def test_bad_choices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **options)


def test_rows_that_cannot_be_mined_are_refused(embedder: Path, tmp_path: Path) -> None:
    query = replace(asked(0), origin="rows.jsonl, row 4")
    scored = Example(query, (item("a"),), (item("b"),), scores=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"rows.jsonl, row 4: rows to mine.*Drop 'scores'"):
        gather(Listed([scored]), None)
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = Item("document", (Part("image", tmp_path / "broken.png"),), "rows.jsonl, row 5, column 'positive'")
    with pytest.raises(ValueError, match=r"row 5, column 'positive': cannot read the image .*broken.png"):
        gather(Listed([Example(query, (broken,))]), None)
    output = tmp_path / "mined.jsonl"
    with pytest.raises(ValueError, match="No row of listed has a negative among 1 documents"):
        mine(str(embedder), Listed([Example(query, (item("a"),))]), str(output))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]


# From an index


@pytest.fixture(scope="module")
def indexed(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of forty texts and six images, some of them twice, one unreadable; and its index."""
    folder = tmp_path_factory.mktemp("indexed")
    for number in range(6):
        picture(32, 32, number % 4).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    documents = [{"id": f"t{number}", "text": f"text {number % 33}"} for number in range(40)]
    documents.insert(7, {"id": "bad", "image": "broken.png"})
    documents += [{"id": f"i{number}", "image": f"{number}.png"} for number in range(6)]
    jsonl(folder / "corpus.jsonl", documents)
    with pytest.raises((ValueError, SystemExit)):  # The rest is encoded.
        encode(str(embedder), str(folder / "corpus.jsonl"), str(folder / "index"), shard_size=10)
    return folder


def mined_rows(embedder: Path, output: Path, rows: list[Example], corpus: Any, **options: Any) -> list[set[str]]:
    mine(str(embedder), Listed(rows), str(output), corpus, **{"margin": None, "relative_margin": None} | options)
    mined = Rows(str(output), allow_outside=[str(output.parent.parent)])
    return [{identify(negative)[0] for negative in mined[row].negatives} for row in range(len(mined))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negatives": 50, "depth": 60},
        {"negatives": 3, "depth": 4, "skip": 1, "relative_margin": 0.01},
        {"margin": 0.0, "negatives": 20},
    ],
)
def test_an_index_gives_the_negatives_of_its_corpus(
    embedder: Path, indexed: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the same documents give without one, whatever is in the corpus twice, or could not be read."""
    # So that positives and repeated ones need another search.
    monkeypatch.setattr("vlmembed.mining.candidates.SPARE", 0)
    rows = [Example(asked(number), (item(f"text {number}"), item(f"text {number + 9}"))) for number in range(5)]
    rows.append(Example(asked(9), (Item("document", (Part("image", indexed / "1.png"),)),)))
    rows.append(Example(item("text 4", role="query"), (item("nowhere else"),), (item("text 8"),)))
    readable = [Example(asked(0), (item(f"text {number % 33}"),)) for number in range(40)]
    readable += [Example(asked(0), (item(picture(32, 32, number % 4)),)) for number in range(6)]
    expected = mined_rows(embedder, tmp_path / "without.jsonl", rows, Listed(readable), **options)
    actual = mined_rows(embedder, tmp_path / "mined.jsonl", rows, None, index=str(indexed / "index"), **options)
    assert actual == expected
    assert any(expected)


def test_only_documents_that_may_be_taken_are_read(
    embedder: Path, indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, original = list[int](), Documents.__getitem__
    monkeypatch.setattr(Documents, "__getitem__", lambda self, row: read.append(row) or original(self, row))
    rows = [Example(asked(0), (item("text 1"),))]
    mined_rows(embedder, tmp_path / "mined.jsonl", rows, None, index=str(indexed / "index"), negatives=2)
    assert 2 <= len({*read}) < 10


def test_indices_that_cannot_be_mined_are_refused(embedder: Path, indexed: Path, tmp_path: Path) -> None:
    rows, written = (
        Listed([Example(asked(0), (item("text 1"),))]),
        json.loads((indexed / "index" / "manifest.json").read_text()),
    )
    jsonl(tmp_path / "renamed.jsonl", [{"id": f"x{number}", "text": "x"} for number in range(47)])
    jsonl(tmp_path / "short.jsonl", [{"id": "t0", "text": "text 0"}])
    cases: dict[str, tuple[dict[str, Any], str | None]] = {
        "is another model": ({"model_digest": "0" * 32}, None),
        "encoded as 'query'": ({"role": "query"}, None),
        "its vectors are signs": ({"precision": "binary"}, None),
        "missing.jsonl' cannot be opened.*give 'corpus'": ({"corpus": str(tmp_path / "missing.jsonl")}, None),
        "has changed.*'x[0-9]+' where the index has 't": ({}, str(tmp_path / "renamed.jsonl")),
        "has changed.*it has 1 items, and the index 47": ({}, str(tmp_path / "short.jsonl")),
    }
    for number, (message, (changed, corpus)) in enumerate(cases.items()):
        folder = Path(shutil.copytree(indexed / "index", tmp_path / f"index {number}"))
        (folder / "manifest.json").write_text(json.dumps(written | changed))
        with pytest.raises(ValueError, match=f"(?s){message}"):
            mine(str(embedder), rows, str(tmp_path / "mined.jsonl"), corpus, margin=None, index=str(folder))
    assert not (tmp_path / "mined.jsonl").exists()


# What an item is


def test_contents_are_what_is_shown(tmp_path: Path) -> None:
    image = picture(40, 30, 3)
    image.save(tmp_path / "a.png")
    on_its_side = Image.Exif()
    on_its_side[274] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=on_its_side)
    items = [Item("document", (Part("image", value),)) for value in (image, tmp_path / "a.png", tmp_path / "b.png")]
    assert len({*map(identify, items)}) == 1
    assert identify(items[0]) != identify(item(picture(40, 30, 4)))
    assert identify(item("a", "bc")) != identify(item("ab", "c"))
    assert identify(item("same")) == identify(item("same", role="query"))
    assert identify(item("only text"))[1] == ""
    assert identify(item(image, "x"))[1] == identify(item(image))[1] != ""


def test_sentence_transformers_gets_the_kinds_in_order() -> None:
    first, second = picture(8, 8, 1), picture(8, 8, 2)
    assert model_input(item("words.png")) == {"text": "words.png"}
    assert model_input(item(first, second, "caption")) == {"image": [first, second], "text": "caption"}
    assert [*model_input(item("caption", first))] == ["text", "image"]
    video = Item("document", (Part("video", (first, second)), Part("text", "t")))
    assert model_input(video) == {"video": [first, second], "text": "t"}
    with pytest.raises(ValueError, match=r"by turns \(text, image, text\)"):
        model_input(item("a", first, "b"))


# What is kept


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items each call embeds."""
    calls: list[int] = []
    for name in ("encode_query", "encode_document"):
        original = getattr(SentenceTransformer, name)

        def count(self: Any, inputs: Any, *args: Any, original: Any = original, **options: Any) -> Any:
            calls.append(len(inputs))
            return original(self, inputs, *args, **options)

        monkeypatch.setattr(SentenceTransformer, name, count)
    return calls


def cached(folder: Path, model: Path, rows: list[Example]) -> str:
    options: dict[str, Any] = {"margin": None, "relative_margin": None, "cache": str(folder / "cache")}
    mine(str(model), Listed(rows), str(folder / "mined.jsonl"), batch_size=1, **options)
    return (folder / "mined.jsonl").read_text()


def test_embeddings_are_kept_by_content_and_by_model(embedder: Path, tmp_path: Path, calls: list[int]) -> None:
    rows = [Example(asked(number), (item(picture(32, 32, number)),)) for number in range(10)]
    first = cached(tmp_path, embedder, rows)
    assert calls == [8, 2, 8, 2]
    assert cached(tmp_path, embedder, rows) == first
    assert calls == [8, 2, 8, 2]
    # The second pieces have grown; the first are as they were.
    cached(tmp_path, embedder, [*rows, Example(asked(10), (item("new"),))])
    assert calls[4:] == [3, 3]
    other = Path(shutil.copytree(embedder, tmp_path / "other"))
    assert cached(tmp_path, other, rows) == first  # The same files in another folder.
    assert calls[6:] == []
    config = json.loads((other / "config_sentence_transformers.json").read_text())
    config["prompts"]["query"] = "Another prompt."
    (other / "config_sentence_transformers.json").write_text(json.dumps(config))
    cached(tmp_path, other, rows)
    assert calls[6:] == [8, 2, 8, 2]


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_broken_files_of_the_cache_are_noticed(embedder: Path, tmp_path: Path, calls: list[int], damage: str) -> None:
    rows = [Example(asked(number), (item(f"answer {number}"),)) for number in range(3)]
    first = cached(tmp_path, embedder, rows)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-5] if damage == "cut" else files[1].read_bytes())
    with pytest.warns(UserWarning, match=rf"{files[0].name} is damaged, or another's.*computed again"):
        assert cached(tmp_path, embedder, rows) == first
    assert cached(tmp_path, embedder, rows) == first
    assert calls == [3, 3, 3]


# Scores


EXAMPLES = [
    Example(asked(0), (item(picture(64, 32, 1)), item("another")), (item("wrong"), item("wrong, and long"))),
    Example(item(picture(32, 32, 2), "and this?", role="query"), (item(picture(32, 64, 3), "caption"),)),
    Example(asked(2), (item("right"),), (item(picture(64, 32, 1)), item(picture(32, 32, 4), picture(32, 32, 5)))),
]


def test_scores_are_the_logits_of_the_reranker(checkpoint: Path, tmp_path: Path) -> None:
    scorer, reranker = ranker(checkpoint).encoder.eval(), tmp_path / "reranker"
    write_reranker(scorer, reranker)
    write_rows(tmp_path / "rows.jsonl", EXAMPLES)
    rows, output = (str(tmp_path / name) for name in ("rows.jsonl", "scored.jsonl"))
    main(["score", "--model", str(reranker), "--rows", rows, "--output", output, "--batch_size", "3"])
    scored = Rows(output)
    preprocessor = scorer.backbone.preprocessor
    for row, example in enumerate(EXAMPLES):
        with torch.no_grad():
            expected = [float(scorer(preprocessor([Pair(example.query, document)]))) for document in example.documents]
        assert len({*expected}) == len(expected)
        # What exports are held to.
        assert scored[row].scores == pytest.approx(expected, abs=1e-5)
        for one, other in zip(scored[row].documents, example.documents, strict=True):
            assert identify(one) == identify(other)
    assert len([*tmp_path.rglob("*.png")]) == 5


class Stub:
    """A reranker in name only."""

    num_labels = 1
    pairs: ClassVar[list[Any]] = []

    def __init__(self, *_: Any, **__: Any) -> None:
        self.pairs.clear()

    def predict(self, pairs: list[Any], **options: Any) -> torch.Tensor:
        assert isinstance(options["activation_fn"], torch.nn.Identity)
        self.pairs.extend(pairs)
        return torch.tensor([float("nan") if "bad" in str(pair) else float(len(str(pair[1]))) for pair in pairs])


def test_two_texts_are_given_as_such_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reranker of text takes nothing else."""
    monkeypatch.setattr("sentence_transformers.CrossEncoder", Stub)
    rows = [Example(asked(number), (item("1" * number),), (item("22" * number),)) for number in range(1, 30)]
    score("stub", Listed(rows), str(tmp_path / "scored.jsonl"), batch_size=2)
    scores = [json.loads(line)["scores"] for line in (tmp_path / "scored.jsonl").open()]
    assert scores == [[number, 2 * number] for number in range(1, 30)]
    assert Stub.pairs[:2] == [("question 1", "1"), ("question 1", "22")]


def test_what_cannot_be_scored_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sentence_transformers.CrossEncoder", Stub)
    bad = replace(item("bad"), origin="rows.jsonl, row 2, column 'positive'")
    cases = {
        r"row 2, column 'positive': the reranker's score is nan": Example(asked(1), (bad,)),
        "has scores, labels, or no positive": Example(asked(0), (item("a"),), (), labels=(3.0,)),
        "by turns": Example(asked(0), (item("a", picture(8, 8), "b"),)),
        "stub gives 3 scores for a pair": Example(asked(0), (item("a"),)),
    }
    for message, example in cases.items():
        monkeypatch.setattr(Stub, "num_labels", 3 if "stub gives 3" in message else 1)
        with pytest.raises(ValueError, match=message):
            score("stub", Listed([Example(asked(0), (item("good"),)), example]), str(tmp_path / "scored.jsonl"))
    assert not [*tmp_path.iterdir()]


def test_videos_are_named_by_their_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sentence_transformers.CrossEncoder", Stub)
    frames = tuple(picture(16, 16, seed) for seed in range(3))
    document = Item("document", (Part("video", frames), Part("text", "of three frames")))
    score("stub", Listed([Example(asked(0), (document,))]), str(tmp_path / "scored.jsonl"))
    (positive,) = Rows(str(tmp_path / "scored.jsonl"))[0].positives
    assert [part.kind for part in positive.parts] == ["video", "text"]
    assert len(positive.parts[0].frames) == 3


# The commands


def test_the_command_writes_rows_that_can_be_trained_on(embedder: Path, tmp_path: Path) -> None:
    """From a source without files: its images are written, each once."""
    config = tmp_path / "mine.yaml"
    config.write_text(
        "rows:\n  class_path: vlmembed.data.digits.HandwrittenNumbers\n  init_args: {size: 12, seed: 3}\n"
        f"output: {tmp_path}/rows/mined.jsonl\nnegatives: 2\nmargin: null\nrelative_margin: null\n"
    )
    main(["mine", "--config", str(config), "--model", str(embedder), "--negatives", "4"])
    mined = Rows(str(tmp_path / "rows" / "mined.jsonl"))
    assert len(mined) == 12
    assert len([*(tmp_path / "rows" / "mined_images").iterdir()]) == 12
    source = HandwrittenNumbers(12, 3)
    for row in range(12):
        assert mined[row].query == source[row].query
        assert identify(mined[row].positives[0]) == identify(source[row].positives[0])
        assert len(mined[row].negatives) == 4


def killed(paths: list[Path]) -> None:
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(whole_file(path)).write_text("half a")
        os.kill(os.getpid(), signal.SIGKILL)


def test_drafts_of_a_killed_run_are_cleared_by_the_next(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rows, their images and the embeddings; not those of a process that lives."""
    monkeypatch.setattr("sentence_transformers.CrossEncoder", Stub)
    names = ("mined.jsonl", "mined_images/a.png", "cache/b.safetensors", "scored.jsonl", "scored_images/c.png")
    process = CONTEXT.Process(target=killed, args=([tmp_path / name for name in names],))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len([*tmp_path.rglob("*.draft")]) == 5
    # Of a process of this machine, and of one of another.
    living = {tmp_path / f".mined.jsonl.{'01' * 16}.{writer}.draft" for writer in (f"{HOST}.{os.getppid()}", "node7.1")}
    for draft in living:
        draft.touch()
    cached(tmp_path, embedder, [Example(asked(number), (item(f"answer {number}"),)) for number in range(3)])
    score("stub", str(tmp_path / "mined.jsonl"), str(tmp_path / "scored.jsonl"))
    assert {*tmp_path.rglob("*.draft")} == living


def test_the_commands_read_the_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).parent.parent / "experiments" / "distillation"
    check(yaml.safe_load((folder / "distil.yaml").read_text()))
    with pytest.raises(SystemExit) as stopped:
        main(["mine", "--config", str(folder / "mine.yaml"), "--print_config"])
    assert stopped.value.code == 0
    assert "HandwrittenNumbers" in capsys.readouterr().out
