"""Exporters: from a trained encoder to a verified folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from vlmembed.encoder import Encoder
from vlmembed.export.card import CardFacts, write_card
from vlmembed.export.probes import make_probes
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.export.verify import ExportError, Verification, encode_probes, verify

LIBRARIES = ("vlmembed", "sentence-transformers", "transformers", "torch")


class Exporter(ABC):
    """Writes a trained encoder as a folder that others open."""

    @abstractmethod
    def export(
        self,
        encoder: Encoder,
        folder: Path,
        dimensions: Sequence[int] = (),
        metrics: Mapping[str, float] | None = None,
        config: str = "",
    ) -> Verification:
        """Write and verify the folder.

        Args:
            encoder: A configured encoder. Its adapters are merged, for good.
            folder: Where; empty, or not there yet.
            dimensions: The dimensions it was trained to be truncated to.
            metrics: What was measured, for the model card.
            config: The run's configuration in YAML, for the model card.

        Raises:
            FileExistsError: If the folder is not empty.
            ExportError: If the folder does not serve what was trained. It is left under another name, to be looked at.
        """


class SentenceTransformers(Exporter):
    """Writes a folder that stock Sentence Transformers opens.

    It is written beside its final place, opened in a process that cannot import vlmembed, compared with the trained
    model, and moved there if they agree.

    Args:
        truncate_dim: Export this many leading dimensions only, normalised anew; null for all.
        license: The model's license for its card, as the Hub names it, such as apache-2.0.
    """

    def __init__(self, truncate_dim: int | None = None, license: str | None = None) -> None:
        self.truncate_dim = truncate_dim
        self.license = license

    def export(
        self,
        encoder: Encoder,
        folder: Path,
        dimensions: Sequence[int] = (),
        metrics: Mapping[str, float] | None = None,
        config: str = "",
    ) -> Verification:
        """Write and verify the folder; see `Exporter.export`."""
        refuse_used(folder)
        draft = folder.with_name(folder.name + ".unverified")
        refuse_used(draft)
        draft.mkdir(parents=True, exist_ok=True)
        full = self.truncate_dim or encoder.dimension
        cuts = [full, *(dimension for dimension in dimensions if dimension < full)]
        with TemporaryDirectory() as scratch:
            probes = make_probes(Path(scratch))
            # Before merging: the adapters as they were trained are what the folder is held against.
            expected = encode_probes(encoder, probes)
            print(f"Writing {folder}", flush=True)
            write_folder(encoder, draft, self.truncate_dim)
            verification = verify(draft, probes, expected, cuts, str(encoder.device), encoder.dtype, Path(scratch))
        if not verification.passed:
            raise ExportError(f"The export does not serve what was trained. {verification}. It is left in {draft}.")
        write_card(draft, self._facts(encoder, folder, verification, metrics or {}, config))
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
        print(f"Verified: {verification}\n\n{snippet(folder)}")
        return verification

    def _facts(
        self, encoder: Encoder, folder: Path, verification: Verification, metrics: Mapping[str, float], config: str
    ) -> CardFacts:
        run = yaml.safe_load(config) or {}
        return CardFacts(
            title=folder.absolute().parent.name if folder.name == "export" else folder.name,
            source=str(folder),
            base_model=encoder.backbone.checkpoint,
            training={"Pooling": type(encoder.pooling).__name__, "Bidirectional": str(encoder.backbone.bidirectional)},
            datasets=[],
            metrics=metrics,
            config=run,
            verification=str(verification),
            versions={library: version(library) for library in LIBRARIES},
            license=self.license,
        )


def refuse_used(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        FileExistsError: If the folder is not empty, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty. Export into another folder, or move this one away.")


def snippet(folder: Path) -> str:
    """Return three lines that try a folder."""
    return (
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({str(folder)!r})\n"
        'print(model.similarity(model.encode_query("a question"), model.encode_document(["a text", "another"])))'
    )
