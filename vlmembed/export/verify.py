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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

if TYPE_CHECKING:
    from vlmembed.encoder import Encoder
    from vlmembed.types import Item, Role

#: The largest difference by the type of the weights; below it is rounding. Unit vectors of half precision that are as
#: far apart have the least cosine that is tolerated.
TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-5, 0.045
MINIMAL_COSINE = 0.999


class ExportError(RuntimeError):
    """An export that does not serve what was trained."""


@dataclass(frozen=True)
class Verification:
    """How far a folder's results are from the trained model's.

    Args:
        comparisons: How many results were compared.
        probes: The kinds of input.
        left_out: How many kinds of input the model refuses, because they are too long for it.
        worst: The worst of the comparisons: its input, and how it was batched and padded.
        difference: Its largest absolute difference: of a component of unit vectors, or of logits.
        tolerance: The largest one that rounding makes.
        dtype: The type of the weights.
        dimensions: The dimensions that embeddings were truncated to, full first; none of logits.
        cosine: The least cosine of embeddings.
    """

    comparisons: int
    probes: tuple[str, ...]
    left_out: int
    worst: str
    difference: float
    tolerance: float
    dtype: str
    dimensions: tuple[int, ...] = ()
    cosine: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether the difference is tolerable; NaN never is."""
        return self.difference <= self.tolerance and self.cosine >= MINIMAL_COSINE

    def __str__(self) -> str:
        what, dimensions, cosine = "logits", "", ""
        if self.dimensions:
            what, cosine = "embeddings", f", least cosine {self.cosine:.6f}"
            dimensions = f"; dimensions {', '.join(map(str, self.dimensions))}"
        left_out = f"; {self.left_out} kinds of input are too long for the model and were left out"
        return (
            f"{self.comparisons} {what} compared ({', '.join(self.probes)}{dimensions}) in {self.dtype}: largest "
            f"difference {self.difference:.1e}{cosine}, worst {self.worst}; tolerated: {self.tolerance:.1e}"
            + (left_out if self.left_out else "")
        )


@dataclass(frozen=True)
class Check:
    """What a folder should compute of some inputs.

    Args:
        names: Of the inputs, after their kinds.
        inputs: Items, or pairs of items, in the terms of Sentence Transformers, as JSON; see `as_input`.
        left_out: How many inputs the model refuses.
        expected: The trained model's results (inputs, D): embeddings by role, not normalised; or logits of pairs.
        dimensions: Compare unit vectors of so many leading dimensions, the exported number first; none for logits.
        sides: On which sides the folder's tokenizer can pad.
        device: Where to run.
        dtype: The type of the weights.
    """

    names: tuple[str, ...]
    inputs: Sequence[Any]
    left_out: int
    expected: Mapping[str, Tensor]
    dimensions: tuple[int, ...]
    sides: tuple[str, ...]
    device: str
    dtype: str

    def compare(self, results: Mapping[str, Tensor]) -> Verification:
        """Compare results, named ``role/dimension/batching``, with what is expected."""
        differences: dict[str, float] = {}
        cosines = [torch.tensor(1.0)]
        for way, served in results.items():
            role, dimension, batching = way.split("/")
            reference = self.expected[role]
            if self.dimensions:
                reference = normalize(reference[:, : int(dimension)], dim=-1)
                cosines.append(torch.linalg.vecdot(served, reference).min())
                batching = f"{dimension} dimensions, {batching}"
            largest = (served.reshape(reference.shape) - reference).abs().amax(dim=1)
            for name, difference in zip(self.names, largest.tolist(), strict=True):
                differences[f"{name!r} as {role}, {batching}"] = difference
        # NaN compares as nothing: it must count as the worst.
        worst = max(differences, key=lambda name: math.inf if math.isnan(differences[name]) else differences[name])
        tolerance = TOLERANCE if self.dtype == "float32" else HALF_PRECISION_TOLERANCE
        if not self.dimensions:
            # Rounding grows with what is rounded: above 1, the tolerance is a share of the largest logit.
            tolerance *= max(1.0, self.expected["pair"].abs().max().item())
        return Verification(
            comparisons=len(differences),
            probes=self.names,
            left_out=self.left_out,
            worst=worst,
            difference=differences[worst],
            tolerance=tolerance,
            dtype=self.dtype,
            dimensions=self.dimensions,
            cosine=torch.stack(cosines).min().item(),  # NaN, if one is.
        )


# What a folder should compute


@dataclass(frozen=True)
class Probe:
    """One input: kinds and values in order. A value is a text, the path of an image, or those of a video's frames."""

    content: tuple[tuple[Any, Any], ...]

    def item(self, role: Role, name: str) -> Item:
        """Return the input in our terms."""
        from vlmembed.types import Item, Part

        return Item(role, tuple(Part(kind, value) for kind, value in self.content), origin=f"export probe {name!r}")

    def description(self) -> str | dict[str, str | list[str]]:
        """Return the input as JSON: a text, or by kind a value or a list of several."""
        if len(self.content) == 1 and self.content[0][0] == "text":
            return str(self.content[0][1])
        values: dict[str, list[str]] = {}
        for kind, value in self.content:
            values.setdefault(kind, []).extend(map(str, value if isinstance(value, tuple) else [value]))
        return {kind: several if len(several) > 1 else several[0] for kind, several in values.items()}


IMAGES = {"wide": (160, 96), "tall": (64, 192), "tiny": (3, 2), "rotated": (128, 64)}
IMAGES |= {f"frame{index}": (96, 64) for index in range(4)}
WORDS = ("retrieval", "of", "pages", "und", "Bilder", "числа", "数字", "42", "naïve", "—", "\n")
#: Every kind as a query and as a document, and a query with several documents to rank.
PAIRS = (
    ("text", "long text"),
    ("text", "image"),
    ("text", "two images and text"),
    ("text", "video"),
    ("image", "text"),
    ("image", "tiny image"),
    ("image and text", "text"),
    ("two images and text", "image and text"),
    ("video", "image"),
)


def make_probes(folder: Path, with_video: bool = False) -> dict[str, Probe]:
    """Draw images into a folder, and return one input of each kind that users will encode, by name."""
    random = np.random.default_rng(0)
    paths = {name: folder / f"{name}.png" for name in IMAGES}
    for name, size in IMAGES.items():
        # Smooth coloured noise, so that resizing matters as it does for photographs.
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "rotated" else 1  # Whether it is to be turned before it is shown.
        coarse.resize(size, Image.Resampling.BICUBIC).save(paths[name], exif=exif)
    wide, tall, tiny, rotated, *frames = paths.values()
    question = ("text", "What does the image show?")
    probes = {
        "text": Probe((("text", "four zero seven"),)),
        "image": Probe((("image", wide),)),
        "image and text": Probe((("image", tall), question)),
        "two images and text": Probe((("image", wide), ("image", tall), question)),
        "long text": Probe((("text", " ".join(random.choice(WORDS) for _ in range(400))),)),
        "tiny image": Probe((("image", tiny),)),
        "rotated image": Probe((("image", rotated),)),
    }
    return probes | ({"video": Probe((("video", tuple(frames)),))} if with_video else {})


@torch.no_grad()
def expect(
    encoder: Encoder, scratch: Path, dimensions: Sequence[int] = (), sides: Sequence[str] = ("left", "right")
) -> Check:
    """Encode probes by themselves and in each role, or score pairs of them.

    Kinds of input that the model refuses, as with ``max_length`` it may, are left out.

    Args:
        encoder: A configured encoder, with its adapters as they were trained.
        scratch: A folder for the probes' images.
        dimensions: The dimensions to compare embeddings at, the exported one first; none for a scorer, to score pairs.
        sides: On which sides the folder's tokenizer can pad.

    Raises:
        ExportError: If the model refuses everything.
    """
    from vlmembed.types import Pair

    encoder.eval()
    preprocessor = encoder.preprocessor
    with_video = getattr(preprocessor.processor, "video_processor", None) is not None
    probes = make_probes(scratch, with_video)
    inputs: dict[str, tuple[Any, dict[str, Any]]] = {}  # By name, the description, and what we read by role.
    if dimensions:
        for name, probe in probes.items():
            inputs[name] = (
                probe.description(),
                {"query": probe.item("query", name), "document": probe.item("document", name)},
            )
    for query, document in () if dimensions else PAIRS:
        if {query, document} <= probes.keys():
            pair = Pair(probes[query].item("query", query), probes[document].item("document", document))
            both = [probes[query].description(), probes[document].description()]
            inputs[f"{query} – {document}"] = both, {"pair": pair}
    results: dict[str, dict[str, Tensor]] = {}
    refusals = []
    for name, (_, items) in inputs.items():
        try:
            chunks = {role: preprocessor([item]) for role, item in items.items()}
        except ValueError as error:
            if encoder.backbone.max_length is None:
                raise
            refusals.append(str(error))
            continue
        results[name] = {role: encoder(chunk)[0].float().cpu() for role, chunk in chunks.items()}
    if not results:
        raise ExportError(f"The model reads none of the inputs that an export is verified with: {refusals[0]}")
    roles = ("query", "document") if dimensions else ("pair",)
    return Check(
        names=tuple(results),
        inputs=[inputs[name][0] for name in results],
        left_out=len(refusals),
        expected={role: torch.stack([by_role[role] for by_role in results.values()]) for role in roles},
        dimensions=tuple(dimensions),
        sides=tuple(sides),
        device=str(encoder.device),
        dtype=encoder.dtype,
    )


def verify(checks: Mapping[Path, Check], python: str = sys.executable) -> list[Verification]:
    """Open folders in one process without vlmembed, and compare what each computes with what it should.

    Args:
        checks: By folder.
        python: The interpreter of an environment with Sentence Transformers.

    Raises:
        ExportError: If Sentence Transformers cannot open a folder or use an input.
    """
    with TemporaryDirectory() as scratch:
        plan, output = Path(scratch, "plan.json"), Path(scratch, "results.npz")
        plan.write_text(json.dumps([_job(folder, check) for folder, check in checks.items()]), encoding="utf-8")
        # -P keeps this file's folder, and with it our modules, off the path.
        command = [python, "-P", __file__, str(plan), str(output)]
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
                index, way = name.split(":")
                results[int(index)][way] = torch.from_numpy(arrays[name])
    return [check.compare(found) for check, found in zip(checks.values(), results, strict=True)]


def brings_code(folder: Path) -> bool:
    """Whether a folder has Python of its own, and is opened with trust."""
    return any(folder.glob("*.py"))


def _job(folder: Path, check: Check) -> dict[str, Any]:
    """Return what the other process has to do with a folder, as JSON."""
    job = {name: getattr(check, name) for name in ("inputs", "dimensions", "sides", "device")}
    return {**job, "folder": str(folder), "trust_remote_code": brings_code(folder)}


# The other process


class _RefuseVlmembed:
    """Makes importing vlmembed fail even where it is installed."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] == "vlmembed":
            raise ImportError("An exported folder must open without vlmembed.")


@torch.inference_mode()
def main(plan: str, output: str) -> None:
    """Embed or score in every way, and save the results by folder and way."""
    sys.meta_path.insert(0, _RefuseVlmembed())
    results = {}
    for index, job in enumerate(json.loads(Path(plan).read_text(encoding="utf-8"))):
        computed = _embeddings(job) if job["dimensions"] else _scores(job)
        for way, values in tqdm(computed, "Verifying", file=sys.stdout):
            results[f"{index}:{way}"] = values.float().cpu().numpy()
    np.savez(output, **results)


def _embeddings(job: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield unit vectors: in each role, at each dimension, padded on each side, alone and in one batch."""
    from sentence_transformers import SentenceTransformer

    inputs = [as_input(item) for item in job["inputs"]]
    model: Any = SentenceTransformer(job["folder"], device=job["device"], trust_remote_code=job["trust_remote_code"])
    options: dict[str, Any] = {"show_progress_bar": False, "convert_to_tensor": True}
    ways = product({"query": model.encode_query, "document": model.encode_document}.items(), job["dimensions"])
    for (role, encode), dimension in ways:
        for side, size in product(job["sides"], (1, len(inputs))):
            model.tokenizer.padding_side = side
            embeddings = encode(inputs, batch_size=size, truncate_dim=dimension, **options)
            yield f"{role}/{dimension}/batch of {size}, padded {side}", normalize(embeddings.float(), dim=-1)


def _scores(job: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield logits: padded on each side, alone and in one batch; and ranked, query by query."""
    from sentence_transformers import CrossEncoder

    pairs = [(as_input(query), as_input(document)) for query, document in job["inputs"]]
    model: Any = CrossEncoder(job["folder"], device=job["device"], trust_remote_code=job["trust_remote_code"])
    logits: dict[str, Any] = {"show_progress_bar": False, "activation_fn": torch.nn.Identity()}
    for side, size in product(job["sides"], (1, len(pairs))):
        model.tokenizer.padding_side = side
        yield (
            f"pair//batch of {size}, padded {side}",
            model.predict(pairs, batch_size=size, convert_to_tensor=True, **logits),
        )
    ranked = torch.full((len(pairs),), torch.nan)
    queries = [json.dumps(query) for query, _ in job["inputs"]]
    for query in dict.fromkeys(queries):
        rows = [row for row, other in enumerate(queries) if other == query]
        documents = [pairs[row][1] for row in rows]
        for hit in model.rank(pairs[rows[0]][0], documents, **logits):
            ranked[rows[hit["corpus_id"]]] = float(hit["score"])
    yield "pair//ranked", ranked


def as_input(description: Any) -> Any:
    """Return what Sentence Transformers takes: images as paths, as on the model card; a video as its opened frames."""
    if isinstance(description, str) or "video" not in description:
        return description
    return {**description, "video": [Image.open(frame) for frame in description["video"]]}


if __name__ == "__main__":
    main(*sys.argv[1:])
