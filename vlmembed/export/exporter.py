"""Exporters: from a trained encoder to a verified folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlmembed.encoder import Encoder
from vlmembed.export.card import CardFacts, write_card
from vlmembed.export.forms import EmbedderForm, Form, RerankerForm
from vlmembed.export.reranker import Scoring
from vlmembed.export.verify import ExportError, Verification, brings_code
from vlmembed.heads import ScoreHead
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
    """Writes a folder that stock Sentence Transformers opens: an embedder's, or a cross-encoder's.

    It is written beside its final place, opened in a process that cannot import vlmembed, compared with the trained
    model, and moved there if the two agree.

    Args:
        truncate_dim: Export this many leading dimensions of an embedder only, normalised anew; null for all.
        reranker_scoring: How a reranker's folder scores. ``dense`` serves every head, and is cheaper: one layer on what
            is pooled. ``logits`` keeps the whole language-model head and takes the difference of the two words' logits,
            for whoever wants the language model too; of ``vlmembed.heads.YesNo`` only, to the same scores.
        license: The model's license for its card, as the Hub names it, such as apache-2.0.
        pipeline_tag: The task under which the Hub lists the model, such as visual-document-retrieval for pictures of
            pages; null for feature-extraction of an embedder, and text-ranking of a reranker.
    """

    def __init__(
        self,
        truncate_dim: int | None = None,
        reranker_scoring: Scoring = "dense",
        license: str | None = None,
        pipeline_tag: str | None = None,
    ) -> None:
        self.truncate_dim = truncate_dim
        self.reranker_scoring = reranker_scoring
        self.license = license
        self.pipeline_tag = pipeline_tag

    def check(self, pooling: Pooling) -> None:
        """Refuse poolings whose code no folder can bring along, and what a reranker lacks; see `Exporter.check`."""
        self._form(pooling).check(pooling)

    def export(self, encoder: Encoder, folder: Path, run: Run) -> Verification:
        """Write and verify the folder; see `Exporter.export`."""
        form = self._form(encoder.pooling, run.dimensions)
        refuse_used(folder)
        draft = _unused(folder.with_name(folder.name + ".unverified"))
        draft.mkdir(parents=True)
        print(f"Writing {folder}", flush=True)
        with TemporaryDirectory() as scratch:
            verification = form.write(encoder, draft, Path(scratch))
        if not verification.passed:
            raise ExportError(f"The export does not serve what was trained. {verification}. It is left in {draft}.")
        write_card(draft, self._facts(encoder, run, form, brings_code(draft), run.address or str(folder), verification))
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
        print(f"Verified: {verification}\n\n{_how_to_open(folder)}\n\n{_snippet(folder, form)}")
        return verification

    def _form(self, pooling: Pooling, dimensions: Sequence[int] = ()) -> Form:
        """Return what the folder will be, once it is known that the settings are meant for it."""
        ranks = isinstance(pooling, ScoreHead)
        if ranks and self.truncate_dim is not None:
            raise ValueError(f"truncate_dim={self.truncate_dim} is for embeddings, and a reranker has none. Remove it.")
        if not ranks and self.reranker_scoring != "dense":
            raise ValueError(f"reranker_scoring={self.reranker_scoring} is for rerankers, not embedders. Remove it.")
        return RerankerForm(self.reranker_scoring) if ranks else EmbedderForm(self.truncate_dim, dimensions)

    def _facts(
        self, encoder: Encoder, run: Run, form: Form, brings_code: bool, address: str, verification: Verification
    ) -> CardFacts:
        model = run.config.get("model", {}).get("init_args", {})
        data = run.config.get("data", {}).get("init_args", {})
        told = {part.capitalize(): model.get(part) for part in ("pooling", "head", "template", "loss", "adapters")}
        return CardFacts(
            title=run.name,
            source=address,
            base_model=encoder.backbone.checkpoint,
            training={label: describe(value) for label, value in told.items() if value},
            datasets=[name for name in _as_list(data.get("train")) if isinstance(name, str)],
            metrics=run.metrics,
            config=run.config,
            verification=str(verification),
            opens_with=form.opens_with,
            trust_remote_code=brings_code,
            versions={library: version(library) for library in LIBRARIES},
            license=self.license,
            pipeline_tag=self.pipeline_tag or form.task,
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


def _unused(place: Path) -> Path:
    """Return a place beside what an earlier export has left, which failed or was killed."""
    numbered = (place.with_name(f"{place.name}.{number}") for number in count(2))
    return next(each for each in chain([place], numbered) if not each.exists())


def _how_to_open(folder: Path) -> str:
    if brings_code(folder):
        return "It brings the pooling's code along, and is opened with trust_remote_code=True."
    return "Modules of Sentence Transformers do all of it; it brings no code along."


def _snippet(folder: Path, form: Form) -> str:
    """Return three lines that try a folder."""
    trust = ", trust_remote_code=True" if brings_code(folder) else ""
    return (
        f"from sentence_transformers import {form.opens_with}\n"
        f"model = {form.opens_with}({str(folder)!r}{trust})\n"
        f"{form.usage}"
    )
