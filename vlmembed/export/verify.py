"""The round trip: what stock Sentence Transformers computes from an exported folder is what was trained.

This file is both ends of it. Imported, it says what a folder should compute, and compares. Run by its file name, in a
process of its own in which vlmembed cannot be imported, it opens folders as a user would; so nothing of ours is
imported at its top.

    python -P verify.py PLAN.json RESULTS.npz
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import wave
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import normalize, pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

if TYPE_CHECKING:
    from vlmembed.encoder import Encoder
    from vlmembed.types import Item, Role

#: The largest difference by the type of the weights; below it is rounding. Unit vectors of half precision that are as
#: far apart have the least cosine that is tolerated.
TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-5, 0.045
MINIMAL_COSINE = 0.999


class ExportError(RuntimeError):
    """An export that could not be written, or does not serve what was trained."""


@dataclass(frozen=True)
class Verification:
    """How far a folder's results are from the trained model's."""

    check: Check
    comparisons: int
    worst: str  # The worst of the comparisons: its input, and how it was batched and padded.
    difference: float  # Its largest absolute difference: of a component of unit vectors, or of logits.
    tolerance: float  # The largest one that rounding makes.
    cosine: float = 1.0  # The least one of embeddings.

    @property
    def passed(self) -> bool:
        """Whether the difference is tolerable; NaN never is."""
        return self.difference <= self.tolerance and self.cosine >= MINIMAL_COSINE

    def __str__(self) -> str:
        check, what, dimensions, cosine = self.check, "logits", "", ""
        if check.dimensions:
            what = "inputs' vectors and similarities" if "similarity" in check.expected else "embeddings"
            cosine = f", least cosine {self.cosine:.6f}"
            dimensions = f"; dimensions {', '.join(map(str, check.dimensions))}"
        left_out = f"; left out, because the model refuses them: {', '.join(check.left_out)}" if check.left_out else ""
        return (
            f"{self.comparisons} {what} compared ({', '.join(check.names)}{dimensions}) in {check.dtype}: largest "
            f"difference {self.difference:.1e}{cosine}, worst {self.worst}; tolerated: {self.tolerance:.1e}{left_out}"
        )


@dataclass(frozen=True)
class Check:
    """What a folder should compute of some inputs."""

    names: tuple[str, ...]  # Of the inputs, after their kinds.
    inputs: Sequence[Any]  # Items, or pairs of items, as JSON; see `make_probes`.
    left_out: tuple[str, ...]  # Those that the model refuses: too long for it, or of a kind that it does not read.
    #: (inputs, D): embeddings by role or prompt, not normalised; or the logits of pairs. Of several vectors (inputs, n,
    #: D), zeros behind them, also the ``similarity`` of all inputs, (inputs, 1, inputs), and the lengths of those that
    #: are ``merged``, (inputs, n, 1).
    expected: Mapping[str, Tensor]
    dimensions: tuple[int, ...]  # Compare unit vectors of so many leading dimensions, full first; none for logits.
    sides: tuple[str, ...]  # On which the folder's tokenizer can pad.
    device: str
    dtype: str

    @property
    def prompts(self) -> list[str]:
        """The prompts by name, besides what each role has."""
        return [way for way in self.expected if way not in ("query", "document", "pair", "similarity", "merged")]

    def compare(self, results: Mapping[str, Tensor]) -> Verification:
        """Compare results, named ``role/dimension/batching``, or by a prompt in the role's place."""
        differences: dict[str, float] = {}
        cosines = [torch.tensor(1.0)]
        for way, served in results.items():
            role, dimension, batching = way.rsplit("/", 2)
            reference = self.expected[role]
            reference = reference.reshape(len(reference), -1, reference.shape[-1])
            served = served.reshape(len(reference), -1, served.shape[-1] if served.ndim > 1 else 1)
            unit = bool(self.dimensions) and role not in ("similarity", "merged")
            if unit:
                reference = normalize(reference[..., : int(dimension)], dim=-1)
            # Where an input has more vectors than it should, or fewer, zeros stand against unit vectors.
            missing = reference.shape[1] - served.shape[1]
            served, reference = pad(served, (0, 0, 0, max(0, missing))), pad(reference, (0, 0, 0, max(0, -missing)))
            if unit:
                cosines.append(torch.linalg.vecdot(served, reference)[reference.any(-1)].min())
                batching = f"{dimension} dimensions, {batching}"
            largest = (served - reference).abs().amax(dim=(1, 2))
            for name, difference in zip(self.names, largest.tolist(), strict=True):
                differences[f"{name!r} as {role}, {batching}"] = difference
        # NaN compares as nothing: it must count as the worst.
        worst = max(differences, key=lambda name: math.inf if math.isnan(differences[name]) else differences[name])
        tolerance = TOLERANCE if self.dtype == "float32" else HALF_PRECISION_TOLERANCE
        if not self.dimensions:
            # Rounding grows with what is rounded: above 1, the tolerance is a share of the largest logit.
            tolerance *= max(1.0, self.expected["pair"].abs().max().item())
        least = torch.stack(cosines).min().item()  # NaN, if one is.
        return Verification(self, len(differences), worst, differences[worst], tolerance, least)


# What a folder should compute

WORDS = ("retrieval", "of", "pages", "und", "Bilder", "числа", "数字", "42", "naïve", "—", "\n")
#: Every kind as a query or as a document, and a query with several documents to rank.
PAIRS = (
    ("text", "long text"),
    ("text", "image"),
    ("text", "two images and text"),
    ("text", "transparent image"),
    ("text", "video"),
    ("image", "text"),
    ("image", "tiny image"),
    ("image and text", "text"),
    ("rotated image", "16-bit image"),
    ("two images and text", "image and text"),
    ("video", "image"),
    ("text", "audio"),
    ("audio and text", "text"),
)


def make_probes(folder: Path, rate: int | None = None) -> dict[str, Any]:
    """Draw images into a folder, and return one input of each kind that users will encode, by name.

    An input is a text, or by kind a value or a list of several, in the order in which the model reads them; an image or
    audio is the path of a file, a video the paths of its frames. Audio has as many samples a second as the model reads:
    where none, there is none.
    """
    random = np.random.default_rng(0)

    def draw(name: str, width: int, height: int, mode: str = "RGB", turned: bool = False) -> str:
        # Smooth coloured noise, so that resizing matters as it does for photographs.
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, len(mode)), dtype=np.uint8).squeeze())
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
        if mode == "L":  # From 0 to 65,535.
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        exif = Image.Exif()
        exif[0x0112] = 6 if turned else 1  # Whether it is to be turned before it is shown.
        image.save(folder / f"{name}.png", exif=exif)
        return str(folder / f"{name}.png")

    def record(name: str, seconds: float) -> str:
        samples = random.normal(0, 3000, int(seconds * (rate or 0))).astype("<i2")
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, rate or 0, len(samples), "NONE", ""))
            file.writeframes(samples.tobytes())
        return str(folder / f"{name}.wav")

    wide, tall = draw("wide", 160, 96), draw("tall", 64, 192)
    question = "What does the image show?"
    probes: dict[str, Any] = {
        "text": "four zero seven",
        "image": {"image": wide},
        "image and text": {"image": tall, "text": question},
        "two images and text": {"image": [wide, tall], "text": question},
        "long text": " ".join(random.choice(WORDS) for _ in range(400)),
        "tiny image": {"image": draw("tiny", 3, 2)},
        "rotated image": {"image": draw("rotated", 128, 64, turned=True)},
        "transparent image": {"image": draw("transparent", 128, 64, "RGBA", turned=True)},
        "16-bit image": {"image": draw("grey", 96, 96, "L")},
        "video": {"video": [draw(f"frame{index}", 96, 64) for index in range(4)]},
    }
    if rate is not None:
        probes["audio"] = {"audio": record("short", 1.2)}
        probes["audio and text"] = {"audio": record("long", 2), "text": question}
    return probes


@torch.no_grad()
def expect(
    encoder: Encoder,
    scratch: Path,
    dimensions: Sequence[int] = (),
    sides: Sequence[str] = ("left", "right"),
    prompts: Mapping[str, str] | None = None,
    merging_factor: int = 1,
) -> Check:
    """Encode probes by themselves and in each role; or, where there are no dimensions to compare, score pairs of them.

    And with each of the ``prompts``, which are called ``NAME-query`` or ``NAME-document``. What the model refuses, as
    with ``max_length`` or a processor for single images it may, is left out. The encoder is configured, with its
    adapters as they were trained; ``scratch`` is a folder for the probes' images. Documents of a multi-vector model are
    merged by the ``merging_factor``, behind what is compared.
    """
    from vlmembed.data.cells import Folder, to_items
    from vlmembed.encoder import MultiVectorEncoder
    from vlmembed.types import Pair

    def item(name: str, way: str) -> Item:
        cell = probes[name], role_of(way), f"export probe {name!r}"
        return replace(to_items([cell], Folder(scratch))[0], instruction=instructions.get(way))

    encoder.eval()
    probes, instructions = make_probes(scratch, encoder.preprocessor.audio_rate), prompts or {}
    ways = (*(("query", "document") if dimensions else ("pair",)), *instructions)
    inputs: dict[str, tuple[Any, list[Any]]]  # By name, the description, and what we read in each role and prompt.
    if dimensions:
        inputs = {name: (probe, [item(name, way) for way in ways]) for name, probe in probes.items()}
    else:
        inputs = {
            f"{query} – {document}": (
                [probes[query], probes[document]],
                [Pair(item(query, way), item(document, "document")) for way in ways],
            )
            for query, document in PAIRS
            if {query, document} <= probes.keys()
        }
    by_way: dict[str, list[Tensor]] = {way: [] for way in ways}  # Of each input (n, D), or (1, 1).
    refusals: dict[str, Exception] = {}
    for name, (_, items) in inputs.items():
        try:
            chunks = [encoder.preprocessor([item]) for item in items]
        except (ValueError, TemplateError) as error:
            refusals[name] = error
            continue
        for way, chunk in zip(ways, chunks, strict=True):
            by_way[way].append(encoder(chunk).float().cpu())
    names = tuple(name for name in inputs if name not in refusals)
    if not names:
        reason = next(iter(refusals.values()))
        raise ExportError(f"The model reads none of the inputs that an export is verified with: {reason}")
    several = isinstance(encoder, MultiVectorEncoder)
    join = partial(pad_sequence, batch_first=True) if several else torch.cat
    expected = {way: join(vectors) for way, vectors in by_way.items()}
    if several:
        expected |= _expect_similarities(by_way, dimensions[0], merging_factor)
    return Check(
        names=names,
        inputs=[inputs[name][0] for name in names],
        left_out=tuple(refusals),
        expected=expected,
        dimensions=tuple(dimensions),
        sides=tuple(sides),
        device=str(encoder.device),
        dtype=encoder.dtype,
    )


def _expect_similarities(
    by_way: Mapping[str, Sequence[Tensor]], dimension: int, merging_factor: int
) -> dict[str, Tensor]:
    """Compare the vectors of all inputs with each other, and say how long documents' are when they are merged."""
    from vlmembed.late_interaction import MultiVectors, maxsim, merge

    queries, documents = (
        # As means, whatever the model's similarity: the tolerance is one of numbers up to 1.
        MultiVectors.of(by_way[role], True).map(lambda vectors: normalize(vectors[:, :dimension]))
        for role in ("query", "document")
    )
    expected = {"similarity": maxsim(queries, documents)[:, None]}
    if merging_factor > 1:
        # Which vectors are merged is decided by the last bit where they are about as similar; neither their number nor
        # their length is.
        merged = merge(documents, merging_factor).map(lambda rows: rows.norm(dim=-1, keepdim=True))
        expected["merged"] = pad_sequence(merged.split(), batch_first=True)
    return expected


def verify(checks: Mapping[Path, Check], python: str = sys.executable) -> list[Verification]:
    """Open folders in one process without vlmembed, and compare what each computes with what it should.

    ``python`` is the interpreter of an environment with Sentence Transformers. An ``ExportError`` says that it cannot
    open a folder or use an input.
    """
    plan = [
        {"folder": str(folder)}
        | {name: getattr(check, name) for name in ("inputs", "dimensions", "sides", "device", "prompts")}
        for folder, check in checks.items()
    ]
    with TemporaryDirectory() as scratch:
        job, output = Path(scratch, "plan.json"), Path(scratch, "results.npz")
        job.write_text(json.dumps(plan), encoding="utf-8")
        # -P keeps this file's folder, and with it our modules, off the path.
        command = [python, "-P", __file__, str(job), str(output)]
        process = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if process.returncode:
            folders = ", ".join(map(str, checks))
            raise ExportError(
                f"Sentence Transformers cannot use the exported {folders} (exit status {process.returncode}):\n"
                f"{process.stderr[-3000:]}"
            )
        with np.load(output) as arrays:
            results: list[dict[str, Tensor]] = [{} for _ in checks]
            for name in arrays.files:
                index, way = name.split(":", 1)
                results[int(index)][way] = torch.from_numpy(arrays[name])
    return [check.compare(computed) for check, computed in zip(checks.values(), results, strict=True)]


def role_of(prompt: str) -> Role:
    """Return whose a prompt is, by its name: ``document`` and ``NAME-document`` are documents'."""
    return "document" if prompt.rsplit("-", 1)[-1] == "document" else "query"


def brings_code(folder: Path) -> bool:
    """Whether a folder has Python of its own, and is opened with trust."""
    return any(folder.glob("*.py"))


# The other process


@torch.inference_mode()
def main(plan: str, output: str) -> None:
    """Embed or score in every way, and save the results by folder and way."""
    sys.modules["vlmembed"] = None  # type: ignore[assignment]  # Importing it fails, even where it is installed.
    import sentence_transformers

    results = {}
    for index, job in enumerate(json.loads(Path(plan).read_text(encoding="utf-8"))):
        folder = Path(job["folder"])
        config = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
        opener = getattr(sentence_transformers, config["model_type"])
        model = opener(str(folder), device=job["device"], trust_remote_code=brings_code(folder))
        computed = _vectors(job, model) if job["dimensions"] else _scores(job, model)
        for way, values in tqdm(computed, "Verifying", file=sys.stdout):
            results[f"{index}:{way}"] = values.float().cpu().numpy()
    np.savez(output, **results)


def _vectors(job: Mapping[str, Any], model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield unit vectors: in each role, at each dimension, alone, and in one batch that is padded on each side.

    Of each input one, (inputs, D); or those of its tokens, (inputs, n, D), and how similar inputs are to each other.
    """
    inputs = [as_input(description) for description in job["inputs"]]
    several, (whole, *_) = type(model).__name__ == "MultiVectorEncoder", job["dimensions"]
    roles = {"query": model.encode_query, "document": model.encode_document}

    def encode(role: str, batch_size: int = 1, dimension: int = whole, **prompt: str) -> list[Tensor]:
        options = {} if several else {"convert_to_tensor": True, "truncate_dim": dimension}
        return [*roles[role](inputs, batch_size=batch_size, show_progress_bar=False, **options, **prompt)]

    def unit(vectors: list[Tensor]) -> Tensor:
        return normalize(pad_sequence(vectors, batch_first=True).float(), dim=-1)

    merging = next((module for module in model if type(module).__name__ == "HierarchicalTokenPooling"), None)
    if merging is not None:
        lengths = [rows.float().norm(dim=-1, keepdim=True) for rows in encode("document")]
        yield f"merged/{whole}/alone", pad_sequence(lengths, batch_first=True)
        merging.tasks = []  # What follows is compared before it is merged.
    for dimension, (batching, side) in product(job["dimensions"], _batchings(job)):
        model.tokenizer.padding_side = side
        size = 1 if batching == "alone" else len(inputs)
        vectors = {role: encode(role, size, dimension) for role in roles}
        for role, rows in vectors.items():
            yield f"{role}/{dimension}/{batching}", unit(rows)
        if several:
            similarity = model.similarity(vectors["query"], vectors["document"]).cpu()
            counts = torch.tensor([len(rows) for rows in vectors["query"]])[:, None]
            yield f"similarity/{whole}/{batching}", similarity / (counts if model.similarity_fn_name == "maxsim" else 1)
    for name in job["prompts"]:
        yield f"{name}/{whole}/alone", unit(encode(role_of(name), prompt_name=name))


def _scores(job: Mapping[str, Any], model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield logits: alone, in one batch that is padded on each side, and ranked, query by query."""
    pairs = [(as_input(query), as_input(document)) for query, document in job["inputs"]]
    logits: dict[str, Any] = {"show_progress_bar": False, "activation_fn": torch.nn.Identity()}
    for batching, side in _batchings(job):
        model.tokenizer.padding_side = side
        size = 1 if batching == "alone" else len(pairs)
        yield f"pair//{batching}", model.predict(pairs, batch_size=size, convert_to_tensor=True, **logits)
    for name in job["prompts"]:
        yield f"{name}//alone", model.predict(pairs, batch_size=1, prompt_name=name, convert_to_tensor=True, **logits)
    ranked = torch.full((len(pairs),), torch.nan)
    queries = [json.dumps(query) for query, _ in job["inputs"]]
    for query in dict.fromkeys(queries):
        rows = [row for row, other in enumerate(queries) if other == query]
        for hit in model.rank(pairs[rows[0]][0], [pairs[row][1] for row in rows], **logits):
            ranked[rows[hit["corpus_id"]]] = float(hit["score"])
    yield "pair//ranked", ranked


def _batchings(job: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name the ways to batch, with the side of padding; of what is alone nothing is padded."""
    return [("alone", "right"), *((f"in a batch padded {side}", side) for side in job["sides"])]


def as_input(description: Any) -> Any:
    """Return what Sentence Transformers takes: images and audio as paths, as on the model card; a video as open frames.

    From a path it drops transparency and clips greys of 16 bits: such images are opened, upright, and in 8 bits.
    """
    if isinstance(description, str):
        return description
    return {kind: value if kind in ("text", "audio") else _image(value, kind) for kind, value in description.items()}


def _image(value: Any, kind: str) -> Any:
    if isinstance(value, list):
        return [_image(path, kind) for path in value]
    image = ImageOps.exif_transpose(Image.open(value))
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return value if kind == "image" and image.mode == "RGB" else image


if __name__ == "__main__":
    main(*sys.argv[1:])
