"""Exporters: from a trained encoder to a verified folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlmembed.encoder import Encoder
from vlmembed.export.card import CardFacts, write_card
from vlmembed.export.poolings import check_servable, is_stock
from vlmembed.export.probes import make_probes
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.export.verify import ExportError, Verification, brings_code, encode_probes, verify
from vlmembed.pooling import Pooling

LIBRARIES = ("vlmembed", "sentence-transformers", "transformers", "torch")


@dataclass(frozen=True)
class Run:
    """What a run tells about the model that it made.

    Args:
        name: The model's name, for its card.
        address: What users will open: a Hub repository, or None for the folder.
        dimensions: The dimensions that embeddings were trained to be truncated to.
        metrics: What was measured, under its logged names.
        config: The run's whole configuration.
    """

    name: str = "model"
    address: str | None = None
    dimensions: Sequence[int] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


class Exporter(ABC):
    """Writes a trained encoder as a folder that others open."""

    def check(self, pooling: Pooling) -> None:  # noqa: B027
        """Refuse, before training, what could not be exported after it.

        Raises:
            ValueError: If it could not.
        """

    @abstractmethod
    def export(self, encoder: Encoder, folder: Path, run: Run) -> Verification:
        """Write and verify the folder.

        Args:
            encoder: A configured encoder. Its adapters are merged, for good.
            folder: Where; empty, or not there yet.
            run: Where the encoder comes from.

        Raises:
            FileExistsError: If the folder is not empty.
            ExportError: If the folder does not serve what was trained. It is left under another name, to be looked at.
        """


class SentenceTransformers(Exporter):
    """Writes a folder that stock Sentence Transformers opens.

    It is written beside its final place, opened in a process that cannot import vlmembed, compared with the trained
    model, and moved there if the two agree.

    Args:
        truncate_dim: Export this many leading dimensions only, normalised anew; null for all.
        license: The model's license for its card, as the Hub names it, such as apache-2.0.
        pipeline_tag: The task under which the Hub lists the model; visual-document-retrieval for pictures of pages.
    """

    def __init__(
        self, truncate_dim: int | None = None, license: str | None = None, pipeline_tag: str = "feature-extraction"
    ) -> None:
        self.truncate_dim = truncate_dim
        self.license = license
        self.pipeline_tag = pipeline_tag

    def check(self, pooling: Pooling) -> None:
        """Refuse poolings whose code no folder can bring along; see `Exporter.check`."""
        check_servable(pooling)

    def export(self, encoder: Encoder, folder: Path, run: Run) -> Verification:
        """Write and verify the folder; see `Exporter.export`."""
        draft = folder.with_name(folder.name + ".unverified")
        for place in (folder, draft):
            refuse_used(place)
        draft.mkdir(parents=True, exist_ok=True)
        print(f"Writing {folder}", flush=True)
        verification = self._write(encoder, draft, run.dimensions)
        if not verification.passed:
            raise ExportError(f"The export does not serve what was trained. {verification}. It is left in {draft}.")
        write_card(draft, self._facts(encoder, run, run.address or str(folder), verification))
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
        print(f"Verified: {verification}\n\n{_how_to_open(folder)}\n\n{snippet(folder)}")
        return verification

    def _write(self, encoder: Encoder, folder: Path, dimensions: Sequence[int]) -> Verification:
        full = self.truncate_dim or encoder.dimension
        cuts = [full, *(dimension for dimension in dimensions if dimension < full)]
        with TemporaryDirectory() as scratch:
            reads_video = getattr(encoder.backbone.preprocessor.processor, "video_processor", None) is not None
            probes = make_probes(Path(scratch), reads_video)
            # Before adapters are merged: what they did in training is what the folder is held against.
            expected = encode_probes(encoder, probes)
            write_folder(encoder, folder, self.truncate_dim)
            return verify(folder, probes, expected, cuts, str(encoder.device), encoder.dtype, Path(scratch))

    def _facts(self, encoder: Encoder, run: Run, address: str, verification: Verification) -> CardFacts:
        model = run.config.get("model", {}).get("init_args", {})
        data = run.config.get("data", {}).get("init_args", {})
        told = {"Pooling": model.get("pooling"), "Loss": model.get("loss"), "Adapters": model.get("adapters")}
        return CardFacts(
            title=run.name,
            source=address,
            base_model=encoder.backbone.checkpoint,
            training={label: describe(value) for label, value in told.items() if value},
            datasets=[name for name in _as_list(data.get("train")) if isinstance(name, str)],
            metrics=run.metrics,
            config=run.config,
            verification=str(verification),
            trust_remote_code=not is_stock(encoder.pooling),
            versions={library: version(library) for library in LIBRARIES},
            license=self.license,
            pipeline_tag=self.pipeline_tag,
        )


def describe(value: Any) -> str:
    """Say in one line what a part of a configuration builds: ``InfoNCE(temperature=0.05)``."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = (f"{name}={describe(each)}" for name, each in value.get("init_args", {}).items())
        return f"{value['class_path'].rsplit('.', 1)[-1]}({', '.join(arguments)})"
    return f"[{', '.join(map(describe, value))}]" if isinstance(value, list) else str(value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def refuse_used(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        FileExistsError: If the folder is not empty, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty. Export into another folder, or move this one away.")


def _how_to_open(folder: Path) -> str:
    if brings_code(folder):
        return "It brings the pooling's code along, and is opened with trust_remote_code=True."
    return "Modules of Sentence Transformers do all of it; it brings no code along."


def snippet(folder: Path) -> str:
    """Return three lines that try a folder."""
    trust = ", trust_remote_code=True" if brings_code(folder) else ""
    return (
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({str(folder)!r}{trust})\n"
        'print(model.similarity(model.encode_query("a question"), model.encode_document(["a text", "another"])))'
    )
