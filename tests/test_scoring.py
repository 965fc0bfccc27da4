"""A reranker's scores in training rows are its logits, in the order of the documents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from building import item, picture
from test_mining import Given, asked

from vlmembed.backbones import QueryFirst, Qwen3VL
from vlmembed.cli import main
from vlmembed.data import Collator, Rows
from vlmembed.encoder import Scorer
from vlmembed.export.sentence_transformers import write_reranker
from vlmembed.heads import YesNo
from vlmembed.mining import score
from vlmembed.types import Example, Item, Pair, Part


@pytest.fixture(scope="module")
def scorer(checkpoint: Path) -> Scorer:
    torch.manual_seed(0)
    built = Scorer(Qwen3VL(str(checkpoint)), YesNo(), QueryFirst())
    built.configure()
    return built.eval()


@pytest.fixture(scope="module")
def reranker(scorer: Scorer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that Sentence Transformers opens."""
    folder = tmp_path_factory.mktemp("reranker")
    write_reranker(scorer, folder)
    return folder


EXAMPLES = [
    Example(
        asked(0), (item(picture(64, 32, 1)), item("another right answer")), (item("wrong"), item("wrong, and long"))
    ),
    Example(item(picture(32, 32, 2), "and this?", role="query"), (item(picture(32, 64, 3), "caption"),)),
    Example(asked(2), (item("right"),), (item(picture(64, 32, 1)), item(picture(32, 32, 4), picture(32, 32, 5)))),
]


def test_scores_are_the_logits_of_the_reranker(
    checkpoint: Path, scorer: Scorer, reranker: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scored.jsonl"
    main(["score", "--model", str(reranker), "--rows", write(tmp_path), "--output", str(output), "--batch_size", "3"])
    scored = Rows(str(output))
    preprocessor = scorer.backbone.preprocessor
    for row, example in enumerate(EXAMPLES):
        documents = (*example.positives, *example.negatives)
        with torch.no_grad():
            expected = [float(scorer(preprocessor([Pair(example.query, document)]))) for document in documents]
        assert len({*expected}) == len(expected)
        # What exports are held to.
        assert scored[row].scores == pytest.approx(expected, abs=1e-5)
        found = scored[row].query, *scored[row].positives, *scored[row].negatives
        assert [len(each.parts) for each in found] == [len(each.parts) for each in (example.query, *documents)]
    assert len([*(tmp_path / "images").iterdir()]) == 5
    batch = Collator(Qwen3VL(str(checkpoint)).preprocessor, wants_scores=True)([scored[0], scored[2]])
    assert batch.scores is not None
    assert len(batch.scores) == 7


def write(folder: Path) -> str:
    """The examples as a file, with the pictures in files."""
    (folder / "images").mkdir()

    def cell(each: Item) -> list[dict[str, Any]]:
        parts = []
        for part in each.parts:
            value = part.value
            if part.kind == "image":
                name = f"images/{part.digest.hex()}.png"
                part.frames[0].save(folder / name)
                value = name
            parts.append({"type": part.kind, part.kind: value})
        return parts

    rows = [
        {
            "query": cell(example.query),
            "positive": [*map(cell, example.positives)],
            "negatives": [*map(cell, example.negatives)],
        }
        for example in EXAMPLES
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


class Stub:
    """A reranker in name only."""

    num_labels = 1

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def predict(self, pairs: list[Any], **options: Any) -> torch.Tensor:
        assert isinstance(options["activation_fn"], torch.nn.Identity)
        return torch.tensor([float("nan") if "bad" in str(pair) else float(len(str(pair[1]))) for pair in pairs])


def test_two_texts_are_given_as_such_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reranker of text takes nothing else."""
    seen: list[Any] = []

    class Recording(Stub):
        def predict(self, pairs: list[Any], **options: Any) -> torch.Tensor:
            seen.extend(pairs)
            return super().predict(pairs, **options)

    monkeypatch.setattr("vlmembed.mining.scoring.CrossEncoder", Recording)
    rows = [Example(asked(number), (item("1" * number),), (item("22" * number),)) for number in range(1, 30)]
    score("stub", Given(rows), str(tmp_path / "scored.jsonl"), batch_size=2)
    found = [json.loads(line)["scores"] for line in (tmp_path / "scored.jsonl").open()]
    assert found == [[number, 2 * number] for number in range(1, 30)]
    assert seen[:2] == [("question 1", "1"), ("question 1", "22")]


def test_what_cannot_be_scored_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path / "scored.jsonl")
    monkeypatch.setattr("vlmembed.mining.scoring.CrossEncoder", Stub)
    bad = replace(item("bad"), origin="rows.jsonl, row 2, column 'positive'")
    with pytest.raises(ValueError, match=r"row 2, column 'positive': the reranker's score is nan"):
        score("stub", Given([Example(asked(0), (item("good"),)), Example(asked(1), (bad,))]), output)
    labelled = Example(asked(0), (item("a"),), (), labels=(3.0,))
    with pytest.raises(ValueError, match="has scores, labels, or no right answer"):
        score("stub", Given([labelled]), output)
    by_turns = item("a", picture(8, 8), "b")
    with pytest.raises(ValueError, match="by turns"):
        score("stub", Given([Example(asked(0), (by_turns,))]), output)
    monkeypatch.setattr(Stub, "num_labels", 3)
    with pytest.raises(ValueError, match="stub gives 3 scores for a pair"):
        score("stub", Given([Example(asked(0), (item("a"),))]), output)
    assert not [*tmp_path.iterdir()]


def test_videos_are_named_by_their_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmembed.mining.scoring.CrossEncoder", Stub)
    frames = tuple(picture(16, 16, seed) for seed in range(3))
    document = Item("document", (Part("video", frames), Part("text", "of three frames")))
    score("stub", Given([Example(asked(0), (document,))]), str(tmp_path / "scored.jsonl"))
    (positive,) = Rows(str(tmp_path / "scored.jsonl"))[0].positives
    assert [part.kind for part in positive.parts] == ["video", "text"]
    assert len(positive.parts[0].frames) == 3
