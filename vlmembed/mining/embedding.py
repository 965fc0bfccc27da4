"""Embeddings of many items by any Sentence Transformers model, kept on disk."""

from __future__ import annotations

import hashlib
import os
import uuid
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm import tqdm

from vlmembed.mining.contents import BATCHES, DistinctItems, opened
from vlmembed.types import Role

#: Items of one file of the cache: what an interruption costs at most.
PIECE = 2048


class Embedder:
    """Embeds items with a Sentence Transformers model, with its own prompts for queries and for documents.

    Args:
        model: A folder, or a Hub id.
        batch_size: Items that go through the model at once.
        cache: A folder where embeddings are kept, for the next time that the same items are embedded with the same
            files of a model; None to keep none.
        trust_remote_code: Whether to run the model's own code.

    Raises:
        ValueError: If there is a cache, and no telling which version of the model is used.
    """

    def __init__(self, model: str, batch_size: int, cache: str | None = None, trust_remote_code: bool = False) -> None:
        self.model = SentenceTransformer(model, trust_remote_code=trust_remote_code)
        self.batch_size = batch_size
        self._cache = None if cache is None else EmbeddingCache(Path(cache), fingerprint(model))

    def embed(self, items: DistinctItems, role: Role) -> Float[Tensor, "N D"]:
        """Embed items as queries or as documents, in float32, where the model is."""
        pieces = []
        for start in tqdm(range(0, len(items), PIECE), desc=f"Embedding {len(items)} distinct items ({role})"):
            numbers = range(start, min(start + PIECE, len(items)))
            key = [role, *(items.contents[number].whole for number in numbers)]
            piece = None if self._cache is None else self._cache.load(key)
            if piece is None:
                piece = self._encode(items, role, numbers)
                if self._cache is not None:
                    self._cache.save(key, piece)
            pieces.append(piece)
        return torch.cat(pieces).to(self.model.device)

    def _encode(self, items: DistinctItems, role: Role, numbers: range) -> Float[Tensor, "N D"]:
        encode = self.model.encode_query if role == "query" else self.model.encode_document
        parts = []
        for start in range(0, len(numbers), BATCHES * self.batch_size):
            inputs = [opened(items[number]) for number in numbers[start : start + BATCHES * self.batch_size]]
            parts.append(
                encode(inputs, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False).float()
            )
        return torch.cat(parts).cpu()


class EmbeddingCache:
    """Embeddings in files, each named by the model, the role and the content of what was embedded.

    Args:
        folder: Where; made when the first file is written.
        model: What identifies the model's files: weights, prompts, template and all.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder
        self.model = f"{model} by sentence-transformers {version('sentence-transformers')}"

    def load(self, contents: Sequence[str]) -> Tensor | None:
        """Return what was kept, or None; also, with a warning, where a file is broken or was put there by another."""
        key = self._key(contents)
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata, embeddings = file.metadata() or {}, file.get_tensor("embeddings")
            if metadata.get("key") != key:
                raise ValueError("it holds something else")
            if metadata.get("checksum") != _checksum(embeddings):
                raise ValueError("its numbers have changed")
        except (SafetensorError, OSError, ValueError) as error:
            warnings.warn(f"{path} is not used ({error}): what it should hold is embedded again.", stacklevel=3)
            return None
        return embeddings

    def save(self, contents: Sequence[str], embeddings: Tensor) -> None:
        """Keep embeddings, whole or not at all."""
        key = self._key(contents)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(key)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        save_file({"embeddings": embeddings}, beside, {"key": key, "checksum": _checksum(embeddings)})
        os.replace(beside, path)

    def _key(self, contents: Sequence[str]) -> str:
        return hashlib.blake2b("\n".join([self.model, *contents]).encode(), digest_size=32).hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:32]}.safetensors"


def fingerprint(model: str) -> str:
    """Return what identifies the files of a model: their content, or the Hub's commit.

    Args:
        model: A folder, or a Hub id that has been loaded.

    Raises:
        ValueError: If it is neither.
    """
    folder = Path(model)
    if folder.is_dir():
        hashed = hashlib.blake2b(digest_size=32)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b").hexdigest()
            hashed.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
        return hashed.hexdigest()
    found = (try_to_load_from_cache(model, name) for name in ("modules.json", "config.json"))
    for place in found:
        if isinstance(place, str):
            return f"{model} at {Path(place).parent.name}"
    raise ValueError(f"{model}: cannot tell which version it is, so its embeddings cannot be kept. Leave out --cache.")


def _checksum(embeddings: Tensor) -> str:
    return hashlib.blake2b(embeddings.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
