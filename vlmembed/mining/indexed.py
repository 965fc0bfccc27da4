"""The documents of an index as candidates: searched where they lie, and read only where one may be taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice

import torch
from torch import Tensor

from vlmembed.late_interaction import MultiVectors, Vectors
from vlmembed.mining.choice import Choice, Pool, choose
from vlmembed.mining.embedding import Embeddings, Entry, identify
from vlmembed.search.corpus import CorpusSource
from vlmembed.search.documents import Documents
from vlmembed.search.index import Index
from vlmembed.search.ranking import View, search_exact
from vlmembed.search.served import find_folder, folder_digest

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
        if (role := self.index.manifest.get("role", "document")) != "document":
            raise ValueError(f"{folder}: it has a corpus encoded as {role!r}; negatives are encoded as 'document'.")
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
            ranking = search_exact(view, _part(asked, pending), k)  # (Q, K) of those that are pending.
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


def _part(vectors: Vectors, rows: Sequence[int]) -> Vectors:
    return vectors[torch.tensor(rows)]


def _least_similarities(pool: Pool, view: View, queries: Vectors, documents: Vectors) -> Iterator[float]:
    """Yield of each query the similarity of its least similar positive, as the index compares."""
    queries, documents = view.queries(queries), view.queries(documents)
    numbers = {content: number for number, content in enumerate(pool.documents)}
    for query, positives in enumerate(pool.positives[name] for name in pool.queries):
        scores = view.scores(_part(queries, [query]), _part(documents, [numbers[content] for content in positives]))
        yield float(scores.min())
