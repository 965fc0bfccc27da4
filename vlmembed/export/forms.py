"""What a folder is to those who open it: an embedder, or a reranker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, cast

from vlmembed.encoder import Encoder, Scorer
from vlmembed.export.embeddings import encode_probes, verify
from vlmembed.export.heads import check_head, of_two_logits
from vlmembed.export.poolings import check_servable
from vlmembed.export.probes import make_pairs, make_probes
from vlmembed.export.reranker import Scoring, write_reranker
from vlmembed.export.scores import readable, score_probes, verify_scores
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.export.verify import Verification
from vlmembed.heads import ScoreHead
from vlmembed.pooling import Pooling


class Form(ABC):
    """One kind of model of Sentence Transformers.

    Attributes:
        opens_with: The class that reads the folder.
        task: What the Hub lists it under.
        usage: A line that tries it, as ``model``.
    """

    opens_with: ClassVar[Literal["SentenceTransformer", "CrossEncoder"]]
    task: ClassVar[str]
    usage: ClassVar[str]

    @abstractmethod
    def check(self, pooling: Pooling) -> None:
        """Refuse, before training, a pooling or a head that could not be written.

        Raises:
            ValueError: If it could not.
        """

    @abstractmethod
    def write(self, encoder: Encoder, folder: Path, scratch: Path) -> Verification:
        """Write the folder, open it elsewhere, and compare what it computes with what was trained.

        Args:
            encoder: A configured encoder. Its adapters are merged, for good.
            folder: An existing, empty folder.
            scratch: Another one, for the comparison.
        """


class EmbedderForm(Form):
    """A ``SentenceTransformer``.

    Args:
        truncate_dim: Keep this many leading dimensions only; None for all.
        dimensions: The dimensions that embeddings were trained to be truncated to.
    """

    opens_with = "SentenceTransformer"
    task = "feature-extraction"
    usage = 'print(model.similarity(model.encode_query("a question"), model.encode_document(["a text", "another"])))'

    def __init__(self, truncate_dim: int | None, dimensions: Sequence[int] = ()) -> None:
        self.truncate_dim = truncate_dim
        self.dimensions = dimensions

    def check(self, pooling: Pooling) -> None:
        """See `Form.check`."""
        check_servable(pooling)

    def write(self, encoder: Encoder, folder: Path, scratch: Path) -> Verification:
        """See `Form.write`."""
        full = self.truncate_dim or encoder.dimension
        cuts = [full, *(dimension for dimension in self.dimensions if dimension < full)]
        probes = make_probes(scratch, _reads_video(encoder))
        # Before adapters are merged: what they did in training is what the folder is held against.
        expected = encode_probes(encoder, probes)
        write_folder(encoder, folder, self.truncate_dim)
        return verify(folder, probes, expected, cuts, str(encoder.device), encoder.dtype, scratch)


class RerankerForm(Form):
    """A ``CrossEncoder``.

    Args:
        scoring: How it scores.
    """

    opens_with = "CrossEncoder"
    task = "text-ranking"
    usage = 'print(model.rank("a question", ["a text", "another"]))'

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring

    def check(self, pooling: Pooling) -> None:
        """See `Form.check`."""
        (check_head if self.scoring == "dense" else of_two_logits)(cast(ScoreHead, pooling))

    def write(self, encoder: Encoder, folder: Path, scratch: Path) -> Verification:
        """See `Form.write`."""
        scorer = cast(Scorer, encoder)
        pairs = readable(scorer, make_pairs(make_probes(scratch, _reads_video(encoder))))
        expected = score_probes(scorer, pairs)
        write_reranker(scorer, folder, self.scoring)
        # Logits are taken at the last place, where a token has to be.
        sides = ("left", "right") if self.scoring == "dense" else ("left",)
        return verify_scores(folder, pairs, expected, sides, str(scorer.device), scorer.dtype, scratch)


def _reads_video(encoder: Encoder) -> bool:
    return getattr(encoder.preprocessor.processor, "video_processor", None) is not None
