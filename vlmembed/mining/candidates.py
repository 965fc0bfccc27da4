"""Candidates for hard negatives: what they are, their embeddings or an index of them, and which are chosen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float
from safetensors.torch import save
from sentence_transformers.util import load_file_path
from torch import Tensor, nn
from tqdm import tqdm

from vlmembed.features import read_tensor, signed
from vlmembed.files import clear_drafts, content_digest, digest, write_whole
from vlmembed.late_interaction import MultiVectors, Vectors
from vlmembed.media import load_image
from vlmembed.search.corpus import CorpusSource
from vlmembed.search.index import Documents, Index
from vlmembed.search.ranking import View, search_exact
from vlmembed.search.served import encode_padded, find_folder, folder_digest, model_input, open_served, read_settings
from vlmembed.types import Item, Role


class Entry(NamedTuple):
    """A distinct item, which is read when it is asked for."""

    read: Callable[[], Item]
    images: str  #: Equal for items that show the same images or videos, whatever they say; empty where there are none.
    instruction: str | None = None  #: The item's own, in the place of the model's prompt.

    @property
    def told(self) -> str:
        """What stands behind its content where items of other instructions are others."""
        return "" if self.instruction is None else f" {self.instruction}"


#: Distinct items by what they show and say, whatever their files are called, in the order of their embeddings.
DistinctItems = dict[str, Entry]


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


@dataclass
class Pool:
    """What is mined: distinct queries and documents, each by what identifies its content."""

    queries: DistinctItems = field(default_factory=dict)  #: Their instructions, where they have some, are behind it.
    documents: DistinctItems = field(default_factory=dict)  #: The candidates, and then positives that are none.
    candidates: int = 0
    positives: dict[str, set[str]] = field(default_factory=dict)  #: Of each query, those of all rows that ask it.
    rows: list[tuple[str, set[str]]] = field(default_factory=list)  #: The query of each row, and its own negatives.


@dataclass(frozen=True)
class Choice:
    """How hard negatives are chosen among a query's candidates; see the arguments of `mine`."""

    count: int
    depth: int
    skip: int
    margin: float | None
    relative_margin: float | None
    max_score: float | None

    def __post_init__(self) -> None:
        if self.count < 1 or self.skip < 0 or self.depth < self.skip + self.count:
            raise ValueError(
                f"negatives is 1 or more, skip 0 or more, and depth at least both together; got {self.count}, "
                f"{self.skip} and {self.depth}."
            )
        for name in ("margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is 0 or more, or null; got {value}.")

    def ceiling(self, positive: float) -> float:
        """Return the largest similarity of a negative, given that of the positive."""
        limits = [math.inf if self.max_score is None else self.max_score]
        if self.margin is not None:
            limits.append(positive - self.margin)
        if self.relative_margin is not None:
            # A share of the size, so that a similarity below zero gets a lower ceiling too.
            limits.append(positive - abs(positive) * self.relative_margin)
        return min(limits)


def choose(
    pool: Pool, query: str, ceiling: float, candidates: Iterable[tuple[float, str, str]], choice: Choice
) -> tuple[list[str], Counter[str]]:
    """Choose hard negatives of a query among candidates, and count those that are left out, by reason.

    A candidate is its similarity, its content and its images; the most similar is first, and no positive among them.
    """
    taken, reasons = list[str](), Counter[str]()
    shown = {pool.documents[content].images for content in pool.positives[query]}
    for score, content, images in candidates:
        if query.partition(" ")[0] == content:
            reasons["the query itself"] += 1
        elif images and images in shown:
            reasons["the same images as a positive, or as a negative that was taken"] += 1
        elif score > ceiling:
            reasons["so similar that they may be positives"] += 1
        else:
            taken.append(content)
            shown.add(images)
        if len(taken) == choice.skip + choice.count:
            break
    return taken[choice.skip :], reasons


#: One embedding (D,) of each of N items, or the vectors (n, D) of each.
Embeddings = Float[Tensor, "N D"] | list[Float[Tensor, "n D"]]

#: Batches that are encoded, and cached, together: their images are open. Sentence Transformers sorts them by length.
BATCHES = 8


class Embedder:
    """Embeds items with any Sentence Transformers model, with its own prompts for queries and for documents.

    An item's own instruction takes the prompt's place. A multi-vector model (its ``model_type`` is MultiVectorEncoder)
    gives an item several vectors (n, D).

    In the folder ``cache`` embeddings are kept, for the next time that the same content is embedded with the same files
    of a model.
    """

    def __init__(self, model: str, batch_size: int, cache: str | None = None, trust_remote_code: bool = False) -> None:
        config = load_file_path(model, "config_sentence_transformers.json")
        self.model = open_served(
            model, read_settings(Path(config)) if config else {}, trust_remote_code=trust_remote_code
        )
        self.is_multi_vector = type(self.model).__name__ == "MultiVectorEncoder"
        self.batch_size = batch_size
        self._cache = None if cache is None else Path(cache)
        if self._cache is not None:
            clear_drafts(self._cache)
            self._version = f"{model_version(model)} by sentence-transformers {version('sentence-transformers')}"

    def embed(self, items: DistinctItems, role: Role) -> Embeddings:
        """Embed items as queries or as documents, in float32, where the model is."""
        entries, size = [*items.items()], BATCHES * self.batch_size
        starts = tqdm(range(0, len(items), size), desc=f"Embedding {len(items)} distinct items ({role})")
        pieces = [self._piece(dict(entries[start : start + size]), role) for start in starts]
        if not self.is_multi_vector:
            return torch.cat(pieces).to(self.model.device)
        return [vectors.to(self.model.device) for piece in pieces for vectors in _items_of(piece)]

    def _piece(self, items: DistinctItems, role: Role) -> Float[Tensor, "rows width"]:
        """Return the embeddings of some items as `_encode` does, from the cache if it has them."""
        if self._cache is None:
            return self._encode(items, role)
        key = digest([self._version, role, *(content + entry.told for content, entry in items.items())])
        path = self._cache / f"{key}.safetensors"
        piece = read_tensor(path, key)
        if piece is None:
            piece = self._encode(items, role)
            write_whole(path, save({signed(key, piece): piece}))
        return piece

    def _encode(self, items: DistinctItems, role: Role) -> Float[Tensor, "rows width"]:
        """Embed items: (N, D), or the vectors of all with the item's number in front, (T, 1 + D)."""
        read = [entry.read() for entry in items.values()]
        encoded = encode_padded(self.model, read, [*map(model_input, read)], role, self.batch_size)
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


def hard_negatives(
    pool: Pool,
    queries: Embeddings,
    documents: Embeddings,
    similarity: Callable[[Any, Any], Float[Tensor, "Q P"]],
    choice: Choice,
    tile_bytes: int = 2**28,
) -> tuple[dict[str, list[str]], Counter[str]]:
    """Choose hard negatives of each query, by content; and count the candidates that were left out, by reason."""
    names, contents = [*pool.queries], [*pool.documents]
    indices = {content: index for index, content in enumerate(contents)}
    chosen, reasons = dict[str, list[str]](), Counter[str]()
    height = max(1, tile_bytes // (4 * len(contents)))
    for start in range(0, len(names), height):
        asked, ceilings = names[start : start + height], list[float]()
        similarities = similarity(queries[start : start + height], documents)
        for query, row in zip(asked, similarities, strict=True):
            positives = [indices[content] for content in pool.positives[query]]
            # Below the least similar positive: a candidate above it would be ranked above a positive.
            ceilings.append(choice.ceiling(float(row[positives].min())))
            row[positives] = -math.inf
        top = similarities[:, : pool.candidates].topk(min(pool.candidates, choice.depth))  # (tile, depth)
        for query, ceiling, *ranked in zip(asked, ceilings, top.values.tolist(), top.indices.tolist(), strict=True):
            candidates = (
                (score, contents[index], pool.documents[contents[index]].images)
                for score, index in zip(*ranked, strict=True)
                if score > -math.inf  # Only positives are left.
            )
            chosen[query], left_out = choose(pool, query, ceiling, candidates, choice)
            reasons += left_out
    return chosen, reasons


#: How many documents more than `Choice.depth` are looked for at first: positives, and what is in the corpus twice.
SPARE = 16
#: Documents whose content is remembered: about 100 MB.
REMEMBERED = 2**18


class IndexedCandidates:
    """The documents of an index, of which each query's most similar are found in passes over its shards.

    What is chosen is what `hard_negatives` chooses among the same documents. In memory are the best of each query, and
    what identifies the documents that were read, of any number that the index has.

    Args:
        folder: The folder that ``encode`` wrote.
        model: The embedder, which must be the one that it was written with.
        corpus: Where its corpus is now; null for where it was.
    """

    def __init__(self, folder: str, model: str, corpus: CorpusSource | None = None) -> None:
        self.index = Index.open(folder)
        self.index.refuse_other(folder_digest(find_folder(model)), model)
        if self.index.role != "document":
            raise ValueError(
                f"{folder}: it has a corpus encoded as {self.index.role!r}; negatives are encoded as 'document'."
            )
        if self.index.precision == "binary":
            raise ValueError(
                f"{folder}: its vectors are signs, whose similarities cannot be compared with a positive's, as margins "
                "do. Encode the corpus with precision float32, float16 or int8."
            )
        self.documents = Documents(self.index, corpus)
        self._identify = lru_cache(REMEMBERED)(lambda row: identify(self.documents[row]))

    def hard_negatives(
        self, pool: Pool, queries: Embeddings, positives: Embeddings, choice: Choice
    ) -> tuple[dict[str, list[str]], Counter[str]]:
        """Choose hard negatives of each query, and put them into the pool; see `mining.hard_negatives`."""
        names, pool.candidates = [*pool.queries], self.index.count
        view, asked = View(self.index, device=queries[0].device), _as_vectors(queries)
        ceilings = [*map(choice.ceiling, _least_similarities(pool, view, asked, _as_vectors(positives)))]
        chosen, reasons = dict[str, list[str]](), Counter[str]()
        pending, k = [*range(len(names))], choice.depth + SPARE
        while pending:
            ranking = search_exact(view, asked[torch.tensor(pending)], k)  # (Q, K) of those that are pending.
            with ThreadPoolExecutor() as threads:  # Decoding images leaves Python's lock to others.
                results = threads.map(
                    lambda query, scores, rows: self._choose(pool, names[query], ceilings[query], scores, rows, choice),
                    pending,
                    ranking.scores.tolist(),
                    ranking.rows.tolist(),
                )
                settled = {query: result for query, result in zip(pending, results, strict=True) if result is not None}
            for query, (taken, left_out) in settled.items():
                chosen[names[query]], reasons = taken, reasons + left_out
            pending, k = [query for query in pending if query not in settled], 2 * k
        return chosen, reasons

    def _choose(
        self, pool: Pool, query: str, ceiling: float, scores: list[float], rows: list[int], choice: Choice
    ) -> tuple[list[str], Counter[str]] | None:
        """Choose among what a search found, the best first; None says that more must be found."""
        positives, met = pool.positives[query], dict[str, tuple[int, str]]()

        def candidates() -> Iterator[tuple[float, str, str]]:
            for score, row in zip(scores, rows, strict=True):
                content, images = self._identify(row)
                if content not in positives and content not in met:
                    met[content] = row, images
                    yield score, content, images

        taken, left_out = choose(pool, query, ceiling, islice(candidates(), choice.depth), choice)
        if len(taken) < choice.count and len(met) < choice.depth and len(rows) < self.index.count:
            return None
        for content in taken:
            row, images = met[content]
            pool.documents.setdefault(content, Entry(partial(self.documents.__getitem__, row), images))
        return taken, left_out


def _as_vectors(embeddings: Embeddings) -> Vectors:
    return embeddings if isinstance(embeddings, Tensor) else MultiVectors.of(embeddings)


def _least_similarities(pool: Pool, view: View, queries: Vectors, documents: Vectors) -> Iterator[float]:
    """Yield of each query the similarity of its least similar positive, as the index compares."""
    queries, documents = view.queries(queries), view.queries(documents)
    numbers = {content: number for number, content in enumerate(pool.documents)}
    for query, positives in enumerate(pool.positives[name] for name in pool.queries):
        columns = torch.tensor([numbers[content] for content in positives])
        yield float(view.scores(queries[torch.tensor([query])], documents[columns]).min())
