"""Embeddings of distinct items by any Sentence Transformers model, in a cache that is keyed by content."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float
from safetensors.torch import save
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.util import load_file_path
from torch import Tensor, nn
from tqdm import tqdm

from vlmembed.features import read_tensor, signed
from vlmembed.files import clear_drafts, content_digest, digest, write_whole
from vlmembed.media import load_image
from vlmembed.search.served import encode_padded, folder_digest, model_input
from vlmembed.types import Item, Role

#: Batches that are encoded, and cached, together: their images are open. Sentence Transformers sorts them by length.
BATCHES = 8


class Entry(NamedTuple):
    """A distinct item, which is read when it is asked for."""

    read: Callable[[], Item]
    images: str  #: Equal for items that show the same images or videos, whatever they say; empty where there are none.
    instruction: str | None = None  #: The item's own, in the place of the model's prompt.


#: Distinct items by what they show and say, whatever their files are called, in the order of their embeddings.
DistinctItems = dict[str, Entry]

#: One embedding (D,) of each of N items, or the vectors (n, D) of each.
Embeddings = Float[Tensor, "N D"] | list[Float[Tensor, "n D"]]


def identify(item: Item) -> tuple[str, str]:
    """Return what identifies an item: its texts, pixels and videos in order, and its images and videos alone."""
    digests = []
    for part in item.parts:
        content: Iterable[str | bytes] = [str(part.value)]
        if part.kind in ("video", "audio") and not part.frames:
            content = [content_digest(part.value)]  # type: ignore[arg-type]
        elif part.kind != "text":
            # `Part.digest` takes a file for its path; here a copy of an image is the same image. One is open at a time.
            images = (load_image(frame, item.origin) for frame in part.frames)
            content = chain.from_iterable((f"{image.size}", image.tobytes()) for image in images)
        digests.append(digest(chain([part.kind], content)))
    shown = [value for part, value in zip(item.parts, digests, strict=True) if part.kind != "text"]
    return digest(digests), " ".join(sorted(shown))


class Embedder:
    """Embeds items with any Sentence Transformers model, with its own prompts for queries and for documents.

    An item's own instruction takes the prompt's place. A multi-vector model (its ``model_type`` is MultiVectorEncoder)
    gives an item several vectors (n, D).

    In the folder ``cache`` embeddings are kept, for the next time that the same content is embedded with the same files
    of a model.
    """

    def __init__(self, model: str, batch_size: int, cache: str | None = None, trust_remote_code: bool = False) -> None:
        config = load_file_path(model, "config_sentence_transformers.json")
        written = json.loads(Path(config).read_text(encoding="utf-8")) if config else {}
        self.is_multi_vector = written.get("model_type") == "MultiVectorEncoder"
        opened_by = MultiVectorEncoder if self.is_multi_vector else SentenceTransformer
        self.model: Any = opened_by(model, trust_remote_code=trust_remote_code)
        self.batch_size = batch_size
        self._cache = None if cache is None else Path(cache)
        if self._cache is not None:
            clear_drafts(self._cache)
            self._version = f"{model_version(model)} by sentence-transformers {version('sentence-transformers')}"

    def embed(self, items: DistinctItems, role: Role) -> Embeddings:
        """Embed items as queries or as documents, in float32, where the model is."""
        distinct, size, pieces = [*items], BATCHES * self.batch_size, []
        for start in tqdm(range(0, len(items), size), desc=f"Embedding {len(items)} distinct items ({role})"):
            contents, piece = distinct[start : start + size], None
            if self._cache is not None:
                prompts = [items[content].instruction for content in contents]
                told = (
                    text if prompt is None else f"{text} {prompt}"
                    for text, prompt in zip(contents, prompts, strict=True)
                )
                key = digest([self._version, role, *told])
                path = self._cache / f"{key}.safetensors"
                piece = read_tensor(path, key)
            if piece is None:
                piece = self._encode([items[content].read() for content in contents], role)
                if self._cache is not None:
                    write_whole(path, save({signed(key, piece): piece}))
            pieces.append(piece)
        if not self.is_multi_vector:
            return torch.cat(pieces).to(self.model.device)
        return [vectors.to(self.model.device) for piece in pieces for vectors in _items_of(piece)]

    def _encode(self, items: Sequence[Item], role: Role) -> Float[Tensor, "rows width"]:
        """Embed items: (N, D), or the vectors of all with the item's number in front, (T, 1 + D)."""
        encoded = encode_padded(self.model, items, [*map(model_input, items)], role, self.batch_size)
        vectors = [of_item.float().cpu() for of_item in encoded]
        if not self.is_multi_vector:
            return torch.stack(vectors)
        return torch.cat([nn.functional.pad(of_item, (1, 0), value=row) for row, of_item in enumerate(vectors)])


def _items_of(piece: Float[Tensor, "T width"]) -> Sequence[Float[Tensor, "n D"]]:
    """Part vectors by the item's number in front of them."""
    _, counts = piece[:, 0].unique_consecutive(return_counts=True)
    return piece[:, 1:].split(counts.tolist())


def model_version(model: str) -> str:
    """Return what identifies the files of a model that has been loaded, of a folder or of the Hub: their content."""
    try:
        return folder_digest(Path(model if Path(model).is_dir() else snapshot_download(model, local_files_only=True)))
    except ValueError as error:
        raise ValueError(f"{model}: its files are not found, so embeddings have no key; leave out cache.") from error
