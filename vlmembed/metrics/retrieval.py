"""Measuring, while a model runs and over processes, how well it retrieves and how well it reranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from vlmembed import distributed
from vlmembed.late_interaction import MultiVectors, merge, ward_trees
from vlmembed.metrics.functions import METRICS, BestDocuments, Relevance, mean_over, name_order, order_keys, ranks
from vlmembed.types import EvaluationSet, RerankingSet

NAMED = 5  # How many items a message names.
ROWS_PER_GATHER = 2**15  # Rows of each process sent together: a whole corpus may not fit on the device.
SCORES_PER_BLOCK = 2**24  # Query-document scores looked at together: 64 MiB.
VECTORS_PER_BLOCK = 2**12  # Of queries, and of documents, whose products are looked at together: 64 MiB.


class EvaluationMetrics(Metric):
    """Collects what a model makes of an evaluation set, and measures it once all of it is there.

    Processes may each update with a share; all must call what joins them: ``compute``, ``per_query`` and ``top_k``.
    What comes twice counts once.
    """

    full_state_update = False
    numbers: list[Tensor]  # (n, 1) which of the things came.
    values: list[Tensor]  # (n, width) what the model made of them.

    def __init__(self, evaluation: EvaluationSet, count: int, thing: str) -> None:
        super().__init__(dist_sync_fn=self._gather)
        self.evaluation = evaluation
        self.relevance = Relevance.of(evaluation)
        self.name_order = name_order(evaluation)
        self._count, self._thing = count, thing
        self.add_state("numbers", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Mean of every metric over queries; raises as `per_query` does.

        Of a set with subsets, the mean of theirs, and under ``subset/name`` that of each.
        """
        values, subsets = self._per_query(), self.evaluation.subsets
        if subsets is None:
            return {name: value.mean().float() for name, value in values.items()}
        rows: dict[str, list[int]] = {}
        for row, subset in enumerate(subsets):
            rows.setdefault(subset, []).append(row)
        means = {
            subset: {name: value[numbers].mean().float() for name, value in values.items()}
            for subset, numbers in rows.items()
        }
        parts = {f"{subset}/{name}": value for subset, own in means.items() for name, value in own.items()}
        return mean_over(means) | parts

    def per_query(self) -> dict[str, Float64[Tensor, " Q"]]:
        """Every metric of every query, in the set's order; a ``RuntimeError`` says that something is missing."""
        with self.sync_context(dist_sync_fn=self._gather):
            return self._per_query()

    def _per_query(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def _take(self, numbers: Tensor, values: Tensor, rows: Tensor) -> None:
        """Collect values that are finite: others would rank first. ``rows`` names them, as `_name` takes them."""
        broken = rows[~values.isfinite().all(1)].tolist()
        if broken:
            names = ", ".join(map(self._name, broken[:NAMED]))
            more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
            raise ValueError(
                f"{self._thing}s of {names}{more} of evaluation set {self.evaluation.name!r} are not finite: look at "
                "these, or, if all are broken, resume from an earlier checkpoint"
            )
        self.numbers.append(numbers if numbers.ndim == 2 else numbers[:, None])
        self.values.append(values)

    def _name(self, row: Any) -> str:
        """Name an item of the evaluation set for a message: its queries come first, then its corpus."""
        evaluation, column = self.evaluation, row - len(self.evaluation.queries)
        if column < 0:
            role, name, item = "query", evaluation.query_names[row], evaluation.queries[row]
        else:
            role, name, item = "document", evaluation.document_names[column], evaluation.corpus[column]
        return f"{role} {name!r}" + (f" ({item.origin})" if item.origin else "")

    def _matrix(self) -> Float[Tensor, "N width"]:
        """The value of each thing in order: the first that came."""
        came = dim_zero_cat(self.numbers)[:, 0] if len(self.numbers) else torch.empty(0, dtype=torch.long)
        first = self._first(came)
        return dim_zero_cat(self.values)[first]

    def _first(self, came: Int[Tensor, " n"]) -> Int[Tensor, " N"]:
        """Where each thing came first; refuse that one is missing."""
        first = distributed.first_indices(came, self._count)
        if missing := int((first == len(came)).sum()):
            raise RuntimeError(
                f"{missing} of the {self._count} {self._thing}s of evaluation set {self.evaluation.name!r} are "
                "missing: metrics need all of its batches, limit none of them"
            )
        return first

    def _gather(self, state: Tensor, group: Any = None) -> list[Tensor]:
        """Collect the rows of all processes, through the device, as NCCL takes no CPU tensors, and in pieces."""
        shape = torch.tensor([len(state), state.shape[-1], state.dtype == torch.long], device=self.device)
        height, width, whole = torch.stack(gather_all_tensors(shape, group)).amax(0).tolist()
        if not len(state):  # A process without items does not know what the others hold.
            state = torch.empty(0, width, dtype=torch.long if whole else torch.float32)
        pieces = (state[start : start + ROWS_PER_GATHER] for start in range(0, max(1, height), ROWS_PER_GATHER))
        gathered = [[part.cpu() for part in gather_all_tensors(piece.to(self.device), group)] for piece in pieces]
        # One process's rows after the other's: an item may have rows in several pieces.
        return [part for parts in zip(*gathered, strict=True) for part in parts]


class RetrievalMetrics(EvaluationMetrics):
    """Measures how well the queries of an evaluation set find their documents, by the cosine in float32, on the CPU.

    Args:
        evaluation: The queries, the corpus and the judgements.
        dimensions: Measure embeddings cut to these dimensions as well, under ``name/dimension``.
    """

    def __init__(self, evaluation: EvaluationSet, dimensions: Sequence[int] = ()) -> None:
        if any(dimension < 1 for dimension in dimensions) or len(set(dimensions)) < len(dimensions):
            raise ValueError(f"dimensions must be distinct numbers of at least 1, got {dimensions!r}")
        super().__init__(evaluation, len(evaluation.queries) + len(evaluation.corpus), "embedding")
        self.dimensions = tuple(dimensions)
        self._by_name = self.name_order.argsort()
        # (C,) of each query; many may share those of one, such as a corpus.
        distinct = {id(columns): columns for columns in evaluation.candidates or ()}
        tensors = {key: torch.tensor(columns) for key, columns in distinct.items()}
        self._candidates = [tensors[id(columns)] for columns in evaluation.candidates or ()]

    def update(self, rows: Int[Tensor, " B"], embeddings: Float[Tensor, "B D"]) -> None:
        """Take embeddings, not normalised, of items by number: the set's queries first, then its corpus.

        A ``ValueError`` says that a row is not in the set, or that an embedding is not finite.
        """
        rows, embeddings = rows.detach().cpu().long(), embeddings.detach().float().cpu()
        self._refuse_outside(rows)
        self._take(rows, embeddings, rows)

    def _refuse_outside(self, rows: Int[Tensor, " B"]) -> None:
        outside = rows[(rows < 0) | (rows >= self._count)].tolist()
        if outside:
            raise ValueError(f"evaluation set {self.evaluation.name!r} has {self._count} items, no rows {outside}")

    def gather_embeddings(self) -> Float[Tensor, "N D"]:
        """The embeddings of all items, queries first, not normalised; raises as `per_query` does."""
        with self.sync_context(dist_sync_fn=self._gather):
            return self._matrix()

    def top_k(self, k: int) -> tuple[Float[Tensor, "Q K"], Int64[Tensor, "Q K"]]:
        """Scores and corpus columns of each query's first K = min(k, P) documents; raises as `per_query` does.

        Where a query has fewer candidates, -inf and -1 fill up.
        """
        width = min(k, len(self.evaluation.corpus))
        found = [(torch.empty(0).long(), torch.empty(0, width), torch.empty(0, width).long())]
        with self.sync_context(dist_sync_fn=self._gather):
            for start, scores in self._score_blocks(self._scores(self._matrix())):
                found.append((torch.arange(len(scores)) + start, *self._best(scores, width)))
            rows, highest, columns = zip(*found, strict=True)
            return self._joined(rows, highest), self._joined(rows, columns)

    def _best(self, scores: Float[Tensor, "q P"], k: int) -> tuple[Float[Tensor, "q K"], Int64[Tensor, "q K"]]:
        """Scores and columns of the first documents, equal scores by name."""
        best = BestDocuments(len(scores), min(k, scores.shape[1]))
        best.add(0, scores, self.name_order)
        highest, names = best.ranked()
        return highest, self._by_name[names].where(names >= 0, -1)

    def _per_query(self) -> dict[str, Tensor]:
        relevance, values = self.relevance, dict[str, Tensor]()
        for suffix, blocks in self._variants(self._matrix()):
            numbers, found = [torch.empty(0).long()], [torch.empty(0).double()]
            for start, scores in blocks:
                first, last = torch.searchsorted(relevance.queries, torch.tensor([start, start + len(scores)])).tolist()
                rows = relevance.queries[first:last] - start
                documents = relevance.documents[first:last]
                rank = ranks(scores, rows, documents, self.name_order)
                numbers.append(torch.arange(first, last))
                found.append(rank.where(scores[rows, documents] > -torch.inf, torch.inf))
            joined = self._joined(numbers, found)
            values |= {name + suffix: metric(joined, relevance) for name, metric in METRICS.items()}
        return values

    def _joined(self, numbers: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """Join what all processes have computed, by its numbers."""
        order = distributed.gather_on_host(torch.cat([*numbers]), self.device).argsort()
        return distributed.gather_on_host(torch.cat([*values]), self.device)[order]

    def _starts(self, height: int) -> range:
        """The first queries of this process's blocks, which are the same blocks for any number of processes."""
        starts = range(0, len(self.evaluation.queries), height)
        return starts[distributed.rank() :: distributed.world_size()]

    def _variants(self, embeddings: Any) -> Iterator[tuple[str, Iterator[tuple[int, Tensor]]]]:
        """Yield what metrics' names end in, and blocks of scores: of whole embeddings, and cut to each dimension."""
        largest, available = max(self.dimensions, default=0), embeddings[0].shape[-1]
        if largest > available:
            raise ValueError(f"dimension {largest} is above the embedding's, which is {available}")
        yield "", self._score_blocks(self._scores(embeddings))
        for dimension in self.dimensions:
            yield f"/{dimension}", self._score_blocks(self._scores(self._cut(embeddings, dimension)))

    def _cut(self, embeddings: Any, dimension: int) -> Any:
        return embeddings[:, :dimension]

    def _scores(self, embeddings: Float[Tensor, "N D"]) -> Iterator[tuple[int, Float[Tensor, "q P"]]]:
        """Cosine of this process's queries with the whole corpus: block after block, with its first query."""
        queries, corpus = normalize(embeddings, dim=1).split(
            [len(self.evaluation.queries), len(self.evaluation.corpus)]
        )
        height = max(1, SCORES_PER_BLOCK // len(corpus))
        for start in self._starts(height):
            # NumPy's product stays float32, whatever autocast and torch.set_float32_matmul_precision say.
            yield start, torch.from_numpy(queries[start : start + height].numpy() @ corpus.numpy().T)

    def _score_blocks(self, blocks: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Float[Tensor, "q P"]]]:
        """Blocks of scores, with -inf where a document is none of the query's candidates."""
        for start, scores in blocks:
            if self._candidates:
                others = torch.ones(scores.shape, dtype=torch.bool)
                for row, columns in zip(others, self._candidates[start : start + len(scores)], strict=True):
                    row[columns] = False
                scores.masked_fill_(others, -torch.inf)
            yield start, scores


class MultiVectorMetrics(RetrievalMetrics):
    """Measures how well the queries of an evaluation set find their documents by MaxSim, in float32, on the CPU.

    Vectors are held once, as they came, and compared in tiles. How many a document has is ``vectors_per_document``.

    Args:
        evaluation: The queries, the corpus and the judgements.
        dimensions: Measure vectors cut to these dimensions as well, under ``name/dimension``.
        merging_factors: Measure documents with so many times fewer vectors as well, under ``name/xfactor``.
        two_stage: Measure a search in two stages as well, under ``name/two_stage``: the cosine of the means of unit
            vectors finds so many documents of each query, which MaxSim ranks.
        length_normalized: Whether a score is the mean over a query's vectors, and not their sum.
    """

    def __init__(
        self,
        evaluation: EvaluationSet,
        dimensions: Sequence[int] = (),
        merging_factors: Sequence[int] = (),
        two_stage: int | None = None,
        length_normalized: bool = False,
    ) -> None:
        super().__init__(evaluation, dimensions)
        self.merging_factors = tuple(merging_factors)
        self.two_stage = two_stage
        self.length_normalized = length_normalized
        self._vectors_per_document: dict[str, float] = {}

    def update(self, rows: Int[Tensor, " B"], embeddings: MultiVectors) -> None:  # type: ignore[override]
        """Take the vectors, not normalised, of items by number; see `RetrievalMetrics.update`."""
        rows = rows.detach().cpu().long()
        self._refuse_outside(rows)
        # (T, 2): of each vector its item, and its index among the item's.
        index = torch.cat([torch.arange(length) for length in embeddings.lengths.tolist()])
        numbers = torch.stack([rows.repeat_interleave(embeddings.lengths), index], dim=1)
        self._take(numbers, embeddings.vectors.detach().float().cpu(), numbers[:, 0])

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """As `EvaluationMetrics.compute`, and the mean number of a document's vectors, merged and not."""
        values = super().compute()
        return values | {name: torch.tensor(count) for name, count in self._vectors_per_document.items()}

    def gather_embeddings(self) -> Any:
        """The vectors of all items, queries first, not normalised; raises as `per_query` does."""
        with self.sync_context(dist_sync_fn=self._gather):
            items = self._matrix()
        return MultiVectors.of(items, self.length_normalized)

    def _matrix(self) -> Any:
        """The vectors (n, D) of each item in order, the first that came: views of what is held."""
        # Lists of what came, or tensors of what came to all processes.
        numbers, values = ([state] if isinstance(state, Tensor) else state for state in (self.numbers, self.values))
        came, items = [torch.empty(0, dtype=torch.long)], list[Tensor]()
        for pairs, vectors in zip(numbers, values, strict=True):
            starts = (pairs[:, 1] == 0).nonzero()[:, 0]
            came.append(pairs[starts, 0])
            items += vectors.tensor_split(starts[1:])
        return [items[position] for position in self._first(torch.cat(came)).tolist()]

    def _variants(self, embeddings: Any) -> Iterator[tuple[str, Iterator[tuple[int, Tensor]]]]:
        """As `RetrievalMetrics._variants`; and with merged documents, and in two stages."""
        queries, corpus = self._split(embeddings)
        self._vectors_per_document = {"vectors_per_document": _mean_length(corpus)}
        yield from super()._variants(embeddings)
        for factor, merged in self._merged(corpus) if self.merging_factors else ():
            self._vectors_per_document[f"vectors_per_document/x{factor}"] = _mean_length(merged)
            yield f"/x{factor}", self._score_blocks(self._scores(queries + merged))
        if self.two_stage is not None:
            yield "/two_stage", self._two_stages(embeddings, self.two_stage)

    def _merged(self, corpus: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield the documents' vectors merged by each factor."""
        items = [MultiVectors.of([vectors]) for vectors in corpus]
        trees = [*map(ward_trees, items)]
        for factor in self.merging_factors:
            merged = (merge(item, factor, tree) for item, tree in zip(items, trees, strict=True))
            yield factor, [item.vectors for item in merged]

    def _cut(self, embeddings: Any, dimension: int) -> Any:
        return [vectors[:, :dimension] for vectors in embeddings]

    def _split(self, items: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        count = len(self.evaluation.queries)
        return items[:count], items[count:]

    def _scores(self, embeddings: list[Tensor]) -> Iterator[tuple[int, Tensor]]:  # type: ignore[override]
        """MaxSim of this process's queries with the whole corpus; see `RetrievalMetrics._scores`."""
        queries, corpus = self._split(embeddings)
        height = max(1, min(SCORES_PER_BLOCK // len(corpus), VECTORS_PER_BLOCK // max(map(len, queries))))
        for start in self._starts(height):
            yield start, self._maxsim(queries[start : start + height], corpus)

    def _maxsim(self, queries: list[Tensor], documents: list[Tensor]) -> Float[Tensor, "Q P"]:
        """MaxSim as in `vlmembed.late_interaction`, of which nothing is kept for a gradient."""
        (rows, starts), width = _end_to_end(queries), max(1, VECTORS_PER_BLOCK // max(map(len, documents)))
        blocks = []
        for first in range(0, len(documents), width):
            columns, edges = _end_to_end(documents[first : first + width])
            # NumPy's product stays float32, as in `RetrievalMetrics`.
            largest = np.maximum.reduceat(rows @ columns.T, edges, axis=1)  # (S, T) → (S, p)
            blocks.append(np.add.reduceat(largest, starts, axis=0))  # (S, p) → (Q, p)
        scores = torch.from_numpy(np.concatenate(blocks, axis=1))
        return scores / torch.tensor([[len(query)] for query in queries]) if self.length_normalized else scores

    def _two_stages(self, embeddings: list[Tensor], count: int) -> Iterator[tuple[int, Float[Tensor, "Q P"]]]:
        """Blocks of MaxSim of queries with what their mean vectors find; -inf for what they do not find."""
        means = torch.stack([normalize(vectors, dim=1).mean(0) for vectors in embeddings])  # (N, D)
        queries, corpus = self._split(embeddings)
        for start, cosines in self._score_blocks(super()._scores(means)):
            scores = torch.full_like(cosines, -torch.inf)
            for row, columns in enumerate(self._best(cosines, count)[1]):
                candidates = columns[columns >= 0]
                documents = [corpus[column] for column in candidates.tolist()]
                if documents:
                    scores[row, candidates] = self._maxsim([queries[start + row]], documents)[0]
            yield start, scores


def _end_to_end(items: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of some items, one item's after the other's, and the row of each item's first."""
    lengths = [*map(len, items)]
    return normalize(torch.cat(items), dim=1).numpy(), np.cumsum([0, *lengths[:-1]])


def _mean_length(items: list[Tensor]) -> float:
    return sum(map(len, items)) / len(items)


class RerankingMetrics(EvaluationMetrics):
    """Measures the order that scores give to each query's candidates, and, as ``name/before``, the first stage's.

    A relevant document that is no candidate counts as one that is never found; a query without candidates counts 0.
    Candidates are ordered by logits in float32, equal ones by document name, as ``pytrec_eval`` does.
    """

    def __init__(self, reranking: RerankingSet) -> None:
        evaluation = reranking.evaluation
        # Query and column of every candidate, by query, in the first stage's order.
        pairs = [(query, column) for query, row in enumerate(reranking.candidates) for column in row]
        if not pairs:
            raise ValueError(f"reranking set {reranking.name!r} has no query with a candidate")
        super().__init__(evaluation, len(pairs), "score")
        self.pairs = torch.tensor(pairs)  # (N, 2)
        self._numbers = {pair: number for number, pair in enumerate(pairs)}
        if len(self._numbers) < len(pairs):
            query = next(query for number, (query, column) in enumerate(pairs) if self._numbers[query, column] > number)
            name = evaluation.query_names[query]
            raise ValueError(f"reranking set {reranking.name!r}: query {name!r} has a candidate twice")
        #: The position of each candidate among those of its query, from 1.
        self._positions = torch.tensor([position + 1 for row in reranking.candidates for position in range(len(row))])
        #: (M,) the number of each relevant document among the candidates, -1 where it is none.
        relevant = zip(self.relevance.queries.tolist(), self.relevance.documents.tolist(), strict=True)
        self._relevant = torch.tensor([self._numbers.get(pair, -1) for pair in relevant])

    @property
    def depth(self) -> int:
        """The most candidates that a query has."""
        return int(self._positions.max())

    def update(self, rows: Int[Tensor, "B 2"], scores: Float[Tensor, " B"]) -> None:
        """Take the logits of some pairs: the number of a query and the corpus column of a document.

        A ``ValueError`` says that a pair is no candidate, or that a score is not finite.
        """
        rows, scores = rows.detach().cpu(), scores.detach().float().cpu()
        pairs: list[Any] = rows.tolist()
        if foreign := [pair for pair in pairs if tuple(pair) not in self._numbers]:
            raise ValueError(
                f"reranking set {self.evaluation.name!r} has no candidates {foreign} (query number, corpus column)"
            )
        self._take(torch.tensor([self._numbers[query, column] for query, column in pairs]), scores[:, None], rows)

    def top_k(self, k: int) -> tuple[Float[Tensor, "Q K"], Int64[Tensor, "Q K"]]:
        """Scores and corpus columns of each query's first K = min(k, depth) candidates; raises as `per_query` does.

        Where a query has fewer, -inf and -1 fill up.
        """
        with self.sync_context(dist_sync_fn=self._gather):
            scores = self._matrix()[:, 0]
        order = self._ranked(scores)[self._positions <= k]
        rows, positions = self.pairs[order, 0], self._positions[self._positions <= k] - 1
        shape = len(self.evaluation.queries), min(k, self.depth)
        best, columns = torch.full(shape, -torch.inf), torch.full(shape, -1)
        best[rows, positions], columns[rows, positions] = scores[order], self.pairs[order, 1]
        return best, columns

    def _per_query(self) -> dict[str, Tensor]:
        before = self._positions.double()
        after = torch.empty_like(before)
        after[self._ranked(self._matrix()[:, 0])] = before
        values: dict[str, Tensor] = {}
        for suffix, rank in {"": after, "/before": before}.items():
            relevant = torch.where(self._relevant >= 0, rank[self._relevant], torch.inf)
            values |= {name + suffix: metric(relevant, self.relevance) for name, metric in METRICS.items()}
        return values

    def _ranked(self, scores: Float[Tensor, " N"]) -> Int64[Tensor, " N"]:
        """The pairs by query, and those of a query the best first."""
        best_first = order_keys(scores, self.name_order[self.pairs[:, 1]]).argsort(descending=True)
        return best_first[self.pairs[best_first, 0].argsort(stable=True)]

    def _name(self, row: Any) -> str:
        return f"{super()._name(row[0])} with {super()._name(len(self.evaluation.queries) + row[1])}"
