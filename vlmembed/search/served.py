"""An exported folder as an engine (stand-in)."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.util import load_file_path

from vlmembed.files import content_digest, digest


class ServedModel:
    """A model of Sentence Transformers."""

    def __init__(self, model: Any, digest: str, is_multi_vector: bool) -> None:
        self.model, self.digest, self.is_multi_vector = model, digest, is_multi_vector

    @classmethod
    def open(cls, folder: str, device: str | None = None, dtype: Any = None, trust_remote_code: bool = False) -> Any:
        """Open a folder."""
        config = load_file_path(folder, "config_sentence_transformers.json")
        multi = "MultiVectorEncoder" in (Path(config).read_text() if config else "")
        model = (MultiVectorEncoder if multi else SentenceTransformer)(folder, device=device)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        pieces = chain.from_iterable((path.relative_to(folder).as_posix(), content_digest(path)) for path in files)
        return cls(model, digest(pieces), multi)

    def encode(self, items: Any, role: str) -> Any:
        """Encode texts."""
        encode = self.model.encode_query if role == "query" else self.model.encode_document
        inputs = [item.parts[0].value for item in items]
        options: dict[str, Any] = {} if self.is_multi_vector else {"convert_to_tensor": True}
        return encode(inputs, show_progress_bar=False, **options)
