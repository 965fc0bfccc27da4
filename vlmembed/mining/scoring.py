"""The command ``score``, a reranker's scores in training rows; and the writing of training rows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
from tqdm import tqdm

from vlmembed.data import Rows, Source
from vlmembed.data.rows import INSTRUCTIONS
from vlmembed.data.streaming import refuse_streams
from vlmembed.files import clear_drafts, whole_file, write_whole
from vlmembed.media import is_audio, is_video, load_image
from vlmembed.mining.embedding import BATCHES
from vlmembed.search.served import by_instruction, model_input
from vlmembed.types import Example, Frame, Item, Part


def score(model: str, rows: str | Source, output: str, batch_size: int = 32, trust_remote_code: bool = False) -> None:
    """Score the documents of training rows with a reranker, and write the rows with its scores.

    Scores are logits, whatever the model applies to them when it ranks: a sigmoid would make equal what is far apart.
    Train an embedder on the rows with ``vlmembed.losses.ScoreDistillation``, or a reranker with ``KLDivergence`` or
    ``MarginMSE``. An instruction of a row's query takes the place of the reranker's.

    Args:
        model: The reranker: a folder written by ``export``, or anything that Sentence Transformers' ``CrossEncoder``
            opens and that gives one score.
        rows: Training rows, such as ``mine`` writes: a path or Hub id, or a ``vlmembed.data.Source``.
        output: The JSONL file to write. Images that are in no file are written beside it.
        batch_size: Pairs that go through the model at once.
        trust_remote_code: Whether to run code that the model brings.
    """
    source = Rows(rows) if isinstance(rows, str) else rows
    refuse_streams(source, "scoring")
    reranker = sentence_transformers.CrossEncoder(model, trust_remote_code=trust_remote_code)
    if reranker.num_labels != 1:
        raise ValueError(f"{model} gives {reranker.num_labels} scores for a pair; a teacher gives one.")
    count = write_rows(Path(output), _scored(reranker, source, batch_size))
    print(f"{output}: {count} rows with the scores of {model}.")


def _scored(reranker: sentence_transformers.CrossEncoder, source: Source, batch_size: int) -> Iterator[Example]:
    examples: list[Example] = []
    for row in tqdm(range(len(source)), desc="Scoring rows"):
        examples.append(unscored(source[row]))
        # Several batches at a time, which Sentence Transformers sorts by length.
        full = sum(len(example.documents) for example in examples) >= BATCHES * batch_size
        if full or row == len(source) - 1:
            logits = iter(_logits(reranker, examples, batch_size))
            for example in examples:
                yield replace(example, scores=tuple(islice(logits, len(example.documents))))
            examples = []


def _logits(reranker: sentence_transformers.CrossEncoder, examples: Sequence[Example], batch_size: int) -> list[float]:
    """Return the logit of each example's documents, one example after the other."""
    pairs = [(example.query, document) for example in examples for document in example.documents]
    # Each distinct item is opened once.
    opened = {key: model_input(item) for key, item in {item.id: item for pair in pairs for item in pair}.items()}
    inputs: list[Any] = [(opened[query.id], opened[document.id]) for query, document in pairs]
    for index, (query, document) in enumerate(inputs):
        if query.keys() == document.keys() == {"text"}:
            inputs[index] = query["text"], document["text"]  # Rerankers of text take nothing else.
    options: Any = {"activation_fn": torch.nn.Identity(), "convert_to_tensor": True, "show_progress_bar": False}
    logits = [math.nan] * len(pairs)
    for prompt, places in by_instruction(query for query, _ in pairs).items():
        scores = reranker.predict([inputs[place] for place in places], prompt=prompt, batch_size=batch_size, **options)
        for place, logit in zip(places, scores.tolist(), strict=True):
            logits[place] = logit
    for (_, document), logit in zip(pairs, logits, strict=True):
        if not math.isfinite(logit):
            raise ValueError(f"{document.origin}: the reranker's score is {logit}, not a finite number.")
    return logits


def unscored(example: Example) -> Example:
    """Return an example, and refuse it with a ValueError if it has scores or labels, or no positive."""
    if example.scores is not None or example.labels is not None or not example.positives:
        raise ValueError(
            f"{example.query.origin}: rows to mine or to score have a query, positives and perhaps negatives; this one "
            "has scores, labels, or no positive. Drop 'scores': Rows(path, columns={scores: null})."
        )
    return example


def write_rows(path: Path, examples: Iterable[Example]) -> int:
    """Write training rows that ``vlmembed.data.Rows`` reads, and return how many; the file is there once all are.

    Images and videos in files are named by their path relative to the written file; where one is outside of its
    folder, it is said how to allow that. Open images, and audio in tables, are written into a folder beside it, once.
    """
    images, outside, count = path.parent / f"{path.stem}_images", set[Path](), 0
    instructs: dict[str, bool] = {}  # By column, whether the first row has an instruction there.

    def cell(item: Item) -> Any:
        if [part.kind for part in item.parts] == ["text"]:
            return item.parts[0].value
        return [{"type": part.kind, part.kind: _value(part.value, path, images, outside)} for part in item.parts]

    clear_drafts(path.parent, path.name)
    clear_drafts(images)
    with whole_file(path) as draft, draft.open("w", encoding="utf-8") as lines:
        for example in examples:
            row = {"query": cell(example.query), "positive": [*map(cell, example.positives)]}
            row |= {"negatives": [*map(cell, example.negatives)]}
            row |= {} if example.scores is None else {"scores": example.scores}
            for column, item in zip(INSTRUCTIONS, (example.query, *example.positives), strict=False):
                if instructs.setdefault(column, item.instruction is not None):
                    row[column] = item.instruction
                elif item.instruction is not None:
                    raise ValueError(
                        f"{item.origin}: has an instruction, and the first row has none in {column!r}: rows of a file "
                        "have the same columns. Write one file for each."
                    )
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    if outside:
        common = os.path.commonpath(outside)
        print(f"{path} names files of {common}: read it with Rows(path, allow_outside: [{common}]).")
    return count


def _value(content: str | Frame | tuple[Frame, ...], path: Path, images: Path, outside: set[Path]) -> Any:
    """Return a text, or the path of a file relative to the written one's; note the folder of one outside of it."""
    if isinstance(content, str):
        return content
    if isinstance(content, tuple):
        return [_value(frame, path, images, outside) for frame in content]
    if isinstance(content, bytes) and (is_audio(content) or is_video(content)):
        ending = "wav" if is_audio(content) else "mp4"  # Files are known by what is in them.
        encoded, content = content, images / f"{Part('audio', content).digest.hex()}.{ending}"
        write_whole(content, encoded)
    elif not isinstance(content, Path):
        image, content = content, images / f"{Part('image', content).digest.hex()}.png"
        if not content.exists():
            with whole_file(content) as draft:
                load_image(image).save(draft, "PNG")  # Upright: PNG would lose which side is up.
    file, folder = content.resolve(), path.parent.resolve()
    if not file.is_relative_to(folder):
        outside.add(file.parent)
    return Path(os.path.relpath(file, folder)).as_posix()
