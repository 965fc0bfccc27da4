"""``python -m vlmembed show``: the first rows as the model will read them, printed, and on a page with the images."""

from __future__ import annotations

import base64
import copy
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from vlmembed import cli
from vlmembed.backbones.preprocessing import ChatPreprocessor
from vlmembed.data import Mixture, PairCollator, RetrievalDataModule, checks
from vlmembed.data.datamodule import as_mixture
from vlmembed.files import write_whole
from vlmembed.media import audio_seconds, load_image, load_video
from vlmembed.modules import RetrievalModule
from vlmembed.types import EvaluationSet, Example, Frame, Item, Pair, Part, RerankingSet

#: Of what is shown: documents of a row, frames of a video, pixels of an image's longer side, characters of a text.
DOCUMENTS, FRAMES, PIXELS, CHARACTERS = 8, 4, 640, 2000
#: What would command a terminal, or turn around the text behind it.
CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

#: An input of the model, and what it is in its row.
Labelled = tuple[str, Item | Pair]


@dataclass
class Shown:
    """A text, an image or a video of an item."""

    kind: str
    text: str  # What it says, or the sizes that it has and is read at.
    images: list[str] = field(default_factory=list)  # Data URLs.


@dataclass
class Reading:
    """An input of the model: an item, or a pair."""

    label: str
    roles: str
    instruction: str
    parts: list[Shown]
    tokens: str
    chat: str


@dataclass
class Row:
    """A training row, or a query of an evaluation set; or why it cannot be used."""

    name: str
    readings: list[Reading] = field(default_factory=list)
    hidden: int = 0  # Further documents.
    error: str = ""


@dataclass
class Section:
    """The first rows of a source, or the first queries of an evaluation set; or why there are none."""

    title: str
    rows: Iterable[Row] = ()
    error: str = ""


def main(words: Sequence[str]) -> None:
    """Run the command: its name, and the command line after that, which is that of ``fit`` with two more options."""
    config = cli.build(
        words,
        rows=(3, "How many rows of each source, and queries of each evaluation set, are shown."),
        output=("show.html", "The page to write: one file, with the images in it."),
    )
    show(config.model, config.data, config.rows, Path(config.output))


def show(model: RetrievalModule, data: RetrievalDataModule, rows: int, output: Path) -> None:
    """Print what a model will read of its data, and write the page; no weights are loaded.

    A row or a set that cannot be used is shown with the reason. The first such error is raised at the end, but for
    training rows that the data module skips.
    """
    if not isinstance(model, RetrievalModule) or not isinstance(data, RetrievalDataModule):
        raise ValueError(f"show knows the modules of vlmembed, not {type(model).__name__} and {type(data).__name__}.")
    if rows < 1 or output.suffix != ".html":
        raise ValueError(f"rows is 1 or more, and output ends in .html; got {rows} and {str(output)!r}.")
    reader, sections = Reader(model, data, rows), list[Section]()
    for section in reader.sections():
        print(f"\n== {section.title}")
        if section.error:
            print(f"CANNOT BE USED: {section.error}")
        section.rows = [*map(_printed, section.rows)]
        sections.append(section)
    problems = [*map(plain, dict.fromkeys(reader.problems()))]
    for problem in problems:
        print(f"\nWarning: {problem}")
    # Whatever comes from data is escaped.
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(autoescape=True, loader=loader, undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template("show.html.jinja").render(sections=sections, problems=problems)
    write_whole(output, page.encode(errors="backslashreplace"))
    print(f"\nPage: {output}")
    if reader.errors:
        raise reader.errors[0]


class Reader:
    """Reads the beginning of data as a model does."""

    def __init__(self, model: RetrievalModule, data: RetrievalDataModule, rows: int) -> None:
        self.data, self.rows = data, rows
        self.collator = data.collator = model.collator()
        self.preprocessor: Any = self.collator.preprocessor
        self.mixture: Mixture | None = None
        self.evaluations: list[EvaluationSet] = []
        self.errors: list[Exception] = []

    def sections(self) -> Iterator[Section]:
        """Open the training rows and the evaluation sets; the rows of one are read before the next is opened."""
        stages = {"train": self._training, "val": self._evaluations, "test": self._evaluations}
        for stage, read in stages.items():
            if getattr(self.data, stage) not in (None, []):
                try:
                    yield from read(stage)
                except (ValueError, OSError) as error:
                    self.errors.append(error)
                    yield Section(f"data.{stage}", error=plain(str(error)))

    def problems(self) -> Iterator[str]:
        """Say what looks wrong with what has been opened."""
        if self.mixture is not None:
            yield from checks.in_rows(self.mixture)
        for evaluation in self.evaluations:
            yield from checks.in_evaluation(evaluation)
            if self.mixture is not None:
                yield from checks.in_both(self.mixture, evaluation)

    def _training(self, stage: str) -> Iterator[Section]:
        mixture = self.mixture = as_mixture(self.data.train)
        shares = mixture.apportion(len(mixture))
        for source, share, (start, stop) in zip(mixture.sources, shares, pairwise(mixture.offsets), strict=True):
            title = f"data.{stage}: {source.name}, {stop - start:,} rows"
            title += f", {share:,} in an epoch" if len(shares) > 1 else ""
            first = range(start, min(stop, start + self.rows))
            raises = self.data.on_bad_row == "raise"
            rows = (self._row(f"Row {row - start + 1}", self._example(mixture, row), raises) for row in first)
            yield Section(plain(title), rows)

    def _evaluations(self, stage: str) -> Iterator[Section]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", checks.DataWarning)  # They are said at the end.
            self.data.setup({"val": "validate"}.get(stage, stage))
        for value in self.data.evaluations[stage]:
            evaluation = value.evaluation if isinstance(value, RerankingSet) else value
            self.evaluations.append(evaluation)
            counts = f"{len(evaluation.queries):,} queries, {len(evaluation.corpus):,} documents"
            first = enumerate(evaluation.query_names[: self.rows])
            rows = (self._row(f"Query {name}", self._query(value, evaluation, number), True) for number, name in first)
            yield Section(plain(f"data.{stage}: {evaluation.name}, {counts}"), rows)

    def _row(self, name: str, inputs: Iterator[Labelled], raises: bool) -> Row:
        row = Row(plain(name))
        try:
            for label, item in inputs:
                if len(row.readings) <= DOCUMENTS:
                    row.readings.append(self._reading(label, item))
                else:
                    row.hidden += 1
        except (ValueError, OSError) as error:
            self.errors += [error] if raises else []
            row.error = plain(str(error))
        return row

    def _example(self, mixture: Mixture, row: int) -> Iterator[Labelled]:
        """Read a training row; what training would refuse is refused."""
        example = mixture[row]
        self.collator.check(example)
        yield from self._inputs(example.query, _labelled(example))

    def _query(self, value: Any, evaluation: EvaluationSet, number: int) -> Iterator[Labelled]:
        """Read a query of an evaluation set, and its candidates; where it has none, what is judged, the best first."""
        columns = {name: column for column, name in enumerate(evaluation.document_names)}
        grades = evaluation.qrels.get(evaluation.query_names[number], {})
        names = sorted(grades.keys() & columns.keys(), key=lambda name: (-grades[name], name))
        if candidates := getattr(value, "candidates", None):
            names = [evaluation.document_names[column] for column in candidates[number]]
        documents = ((f"document {name}, grade {grades.get(name, 'none')}", columns[name]) for name in names)
        labelled = ((label, evaluation.corpus[column]) for label, column in documents)
        yield from self._inputs(evaluation.queries[number], labelled)

    def _inputs(self, query: Item, documents: Iterable[tuple[str, Item]]) -> Iterator[Labelled]:
        if isinstance(self.collator, PairCollator):
            yield from ((f"query with {label}", Pair(query, document)) for label, document in documents)
        else:
            yield "query", query
            yield from documents

    def _reading(self, label: str, item: Item | Pair) -> Reading:
        preprocessor = self.preprocessor
        inputs = preprocessor([item])
        ids = inputs["input_ids"][0].tolist()
        tokens = f"{len(ids):,} tokens"
        if len(ids) == preprocessor.max_length:
            unlimited = copy.copy(preprocessor)
            unlimited.max_length = None
            tokens += f" of {unlimited([item])['input_ids'].shape[1]:,}, at max_length"
        if "kept" in inputs:
            tokens += f", {int(inputs['kept'].sum()):,} with a vector"
        items = (item.query, item.document) if isinstance(item, Pair) else (item,)
        instruction = item.instruction
        if instruction is None:
            template = preprocessor.pair_template
            instruction = getattr(template, "instruction", "") if template else preprocessor.instructions[items[0].role]
        parts = [self._part(part, one) for one in items for part in one.parts]
        roles, chat = " and ".join(one.role for one in items), rendered(preprocessor, ids).strip()
        return Reading(plain(label), roles, plain(instruction or "none"), parts, tokens, plain(chat))

    def _part(self, part: Part, item: Item) -> Shown:
        processor = self.preprocessor.processor
        if part.kind == "image":
            image = load_image(cast(Frame, part.value), item.origin)
            size, note = size_read(processor.image_processor(images=[image], return_tensors="pt"), processor)
            return Shown("image", f"{_size(image.size)} → {_size(size)}{note}", [data_url(image, size)])
        if part.kind == "video":
            frames, metadata = load_video(cast(Any, part.value), processor.video_processor, item.origin)
            options = {"do_sample_frames": False, "video_metadata": [metadata], "return_tensors": "pt"}
            size, note = size_read(processor.video_processor(videos=[frames], **options), processor)
            text = f"{len(frames)} of {metadata.total_num_frames} frames, {_size(frames.shape[2:0:-1])} → {_size(size)}"
            images = [Image.fromarray(frame) for frame in frames[:: -(-len(frames) // FRAMES)]]
            return Shown("video", text + note, [data_url(image, size) for image in images])
        text = "given as bytes" if isinstance(part.value, bytes) else str(part.value)
        if part.kind == "audio":
            text += f", {audio_seconds(cast(Any, part.value), item.origin):.1f} seconds"
        return Shown(part.kind, plain(text))


def rendered(preprocessor: ChatPreprocessor, ids: Sequence[int]) -> str:
    """Return the text of token ids, in which a token of an image or the like that repeats is written once."""
    tokenizer: Any = preprocessor.processor.tokenizer
    marks = {tokenizer.decode([token]) for token in {*preprocessor.template.visual, *tokenizer.all_special_ids}} - {""}
    repeated = f"({'|'.join(map(re.escape, sorted(marks, key=len, reverse=True)))})\\1+"
    return re.sub(repeated, lambda run: f"{run[1]} × {len(run[0]) // len(run[1])} ", tokenizer.decode(ids))


def size_read(outputs: Any, processor: Any) -> tuple[tuple[int, int], str]:
    """Return width and height that a processor has resized an image or a video to, and in how many tiles it is cut."""
    for kind in ("image", "video"):
        if f"{kind}_grid_thw" in outputs:
            patch_size = getattr(processor, f"{kind}_processor").patch_size
            _, height, width = (outputs[f"{kind}_grid_thw"][0] * patch_size).tolist()
            return (width, height), ""
    pixels = next(value for key, value in outputs.items() if key.startswith("pixel_values"))
    channels, height, width = pixels.shape[-3:]
    tiles = pixels.numel() // (channels * height * width)
    return (width, height), f" in {tiles} tiles" if tiles > 1 else ""


def data_url(image: Image.Image, size: tuple[int, int]) -> str:
    """Return an image, no larger than the model reads it, nor than `PIXELS`, as a data URL."""
    shown = image.convert("RGB")
    shown.thumbnail((min(max(size), PIXELS),) * 2)
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def plain(text: str) -> str:
    """Return a text that is harmless on a terminal, and not too long."""
    text = text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}… ({len(text):,} characters)"
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _size(size: Sequence[int]) -> str:
    return " × ".join(map(str, size))


def _labelled(example: Example) -> Iterator[tuple[str, Item]]:
    """Yield an example's documents, each with what it is to the query."""
    for number, document in enumerate(example.documents):
        label = "positive" if number < len(example.positives) else "negative"
        label += f", label {example.labels[number]:g}" if example.labels else ""
        yield label + (f", score {example.scores[number]:g}" if example.scores else ""), document


def _printed(row: Row) -> Row:
    """Print a row, and return it."""
    print(f"\n{row.name}")
    for reading in row.readings:
        print(f"{reading.label} (role {reading.roles}), {reading.tokens}, instruction: {reading.instruction}")
        for part in reading.parts:
            print(f"  {part.kind}: {part.text}")
        print("  read as: " + reading.chat.replace("\n", "\n    "))
    if row.hidden:
        print(f"  and {row.hidden:,} more documents")
    if row.error:
        print(f"  CANNOT BE USED: {row.error}")
    return row
