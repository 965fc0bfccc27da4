"""What several processes measured, put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from vlmembed.metrics.functions import METRICS, judgements, order_keys, ranks
from vlmembed.types import EvaluationSet, Item

#: How many items a message names.
NAMED = 5

#: Bounds the device memory of gathering, where a whole corpus may not fit: rows of each process sent together.
ROWS_PER_GATHER = 2**15


def gather_rows(state: Tensor, device: torch.device, group: Any = None) -> list[Tensor]:
    """Collect the rows of all processes, through the device, as NCCL takes no CPU tensors, and in pieces.

    Args:
        state: (n, width) this process's rows, integers or float32; a process may have none.
        device: Where processes exchange tensors.
        group: Which processes.
    """
    own = torch.tensor([len(state), state.shape[-1], state.dtype == torch.long], device=device)
    height, width, whole = torch.stack(gather_all_tensors(own, group)).amax(0).tolist()
    if not len(state):  # A process without items does not know what the others hold.
        state = torch.empty(0, width, dtype=torch.long if whole else torch.float32)
    pieces = (state[start : start + ROWS_PER_GATHER] for start in range(0, max(1, height), ROWS_PER_GATHER))
    return [part.cpu() for piece in pieces for part in gather_all_tensors(piece.to(device), group)]


def first_rows(rows: Tensor | list[Tensor], count: int) -> tuple[Int64[Tensor, " N"], int]:
    """Find where each of N = count numbers came first.

    Args:
        rows: (n, 1) the numbers that came, in one tensor or several; each below ``count``.
        count: How many should have come.

    Returns:
        The place of each (n where it did not come), and how many did not.
    """
    came = dim_zero_cat(rows)[:, 0] if len(rows) else torch.empty(0, dtype=torch.long)
    first = torch.full((count,), len(came)).scatter_reduce_(0, came, torch.arange(len(came)), "amin")
    return first, int((first == len(came)).sum())


def named(evaluation: EvaluationSet, rows: Sequence[int]) -> str:
    """Name some items of an evaluation set, for a message; the first of them, where there are many.

    Args:
        evaluation: The set.
        rows: Their numbers: its queries first, then its corpus.
    """
    queries = len(evaluation.queries)
    names = [
        _name("query", evaluation.query_names[row], evaluation.queries[row])
        if row < queries
        else _name("document", evaluation.document_names[row - queries], evaluation.corpus[row - queries])
        for row in rows[:NAMED]
    ]
    return ", ".join(names) + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")


def _name(role: str, name: str, item: Item) -> str:
    return f"{role} {name!r}" + (f" ({item.origin})" if item.origin else "")


#: Bounds the memory of scoring: this many query-document scores are looked at together (some 500 MiB with all copies).
SCORES_PER_BLOCK = 2**24


class RetrievalMetrics(Metric):
    """Collects the embeddings of an evaluation set and measures how well its queries find their documents.

    Similarity is the cosine, in float32. Embeddings wait on the CPU and are compared there. Several processes may
    each update with their share; ``compute``, ``per_query`` and ``top_k`` join the shares, so all processes must call
    them. An item seen twice (samplers repeat items to even out processes) counts once.

    Args:
        evaluation: The queries, the corpus and the judgements.
        dimensions: Measure embeddings cut to these dimensions as well, under ``name/dimension``.

    Raises:
        ValueError: If nothing can be measured, document names repeat, or a dimension is below 1 or repeated.
    """

    full_state_update = False
    rows: list[Tensor]
    embeddings: list[Tensor]

    def __init__(self, evaluation: EvaluationSet, dimensions: Sequence[int] = ()) -> None:
        super().__init__(dist_sync_fn=self._gather)
        if any(dimension < 1 for dimension in dimensions) or len(set(dimensions)) < len(dimensions):
            raise ValueError(f"dimensions must be distinct numbers of at least 1, got {dimensions!r}")
        self.evaluation = evaluation
        self.dimensions = tuple(dimensions)
        self.relevant, self.grades, self.name_order = judgements(evaluation)
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("embeddings", default=[], dist_reduce_fx="cat")

    def update(self, rows: Int[Tensor, " B"], embeddings: Float[Tensor, "B D"]) -> None:
        """Take the embeddings of some items: any float type, not normalised.

        Args:
            rows: Their numbers in the evaluation set: its queries first, then its corpus.
            embeddings: One for each row.

        Raises:
            ValueError: If a row is not in the set, or an embedding is not finite (it would rank first).
        """
        rows, embeddings = rows.detach().cpu().long(), embeddings.detach().float().cpu()
        outside = rows[(rows < 0) | (rows >= self._items)].tolist()
        if outside:
            raise ValueError(f"evaluation set {self.evaluation.name!r} has {self._items} items, no rows {outside}")
        broken = rows[~embeddings.isfinite().all(1)].tolist()
        if broken:
            raise ValueError(
                f"embeddings of {named(self.evaluation, broken)} of evaluation set {self.evaluation.name!r} are not "
                "finite: look at these, or, if all are broken, go on from an earlier checkpoint"
            )
        self.rows.append(rows[:, None])
        self.embeddings.append(embeddings)

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Mean of every metric over queries; raises as ``per_query`` does."""
        return {name: values.mean().float() for name, values in self._per_query().items()}

    def per_query(self) -> dict[str, Float64[Tensor, " Q"]]:
        """Every metric of every query, in the order of the evaluation set.

        Raises:
            RuntimeError: If items of the evaluation set are missing.
            ValueError: If a dimension is above the embedding's.
        """
        with self.sync_context(dist_sync_fn=self._gather):
            return self._per_query()

    def gather_embeddings(self) -> Float[Tensor, "N D"]:
        """The embeddings of all items, queries first, not normalised; raises as ``per_query`` does."""
        with self.sync_context(dist_sync_fn=self._gather):
            return self._matrix()

    def top_k(self, k: int) -> tuple[Float[Tensor, "Q K"], Int64[Tensor, "Q K"]]:
        """Scores and corpus columns of each query's first K = min(k, P) documents; raises as ``per_query`` does."""
        with self.sync_context(dist_sync_fn=self._gather):
            found = []
            for _, scores in self._score_blocks(self._matrix()):
                columns = order_keys(scores, self.name_order).topk(min(k, scores.shape[1])).indices
                found.append((scores.gather(1, columns), columns))
        scores, columns = (torch.cat(blocks) for blocks in zip(*found, strict=True))
        return scores, columns

    @property
    def _items(self) -> int:
        return len(self.evaluation.queries) + len(self.evaluation.corpus)

    def _per_query(self) -> dict[str, Float64[Tensor, " Q"]]:
        matrix = self._matrix()
        largest, available = max(self.dimensions, default=0), matrix.shape[1]
        if largest > available:
            raise ValueError(f"dimension {largest} is above the embedding's, which is {available}")
        values: dict[str, Tensor] = {}
        for suffix, dimension in [("", available), *((f"/{d}", d) for d in self.dimensions)]:
            blocks = self._score_blocks(matrix[:, :dimension])
            found = torch.cat([ranks(scores, self.relevant[rows], self.name_order) for rows, scores in blocks])
            values |= {name + suffix: metric(found, self.grades) for name, metric in METRICS.items()}
        return values

    def _matrix(self) -> Float[Tensor, "N D"]:
        """One embedding per item, in order: the first that came."""
        first, missing = first_rows(self.rows, self._items)
        if missing:
            raise RuntimeError(
                f"{missing} of the {self._items} items of evaluation set {self.evaluation.name!r} have no embedding: "
                "metrics need all of its batches, limit none of them"
            )
        return dim_zero_cat(self.embeddings)[first]

    def _score_blocks(self, embeddings: Float[Tensor, "N D"]) -> Iterator[tuple[slice, Float[Tensor, "Q P"]]]:
        """Cosine of some queries with the whole corpus, block after block."""
        queries, corpus = normalize(embeddings, dim=1).split(
            [len(self.evaluation.queries), len(self.evaluation.corpus)]
        )
        height = max(1, SCORES_PER_BLOCK // len(corpus))
        for start in range(0, len(queries), height):
            rows = slice(start, start + height)
            # NumPy's product stays float32, whatever autocast and torch.set_float32_matmul_precision say.
            yield rows, torch.from_numpy(queries[rows].numpy() @ corpus.numpy().T)

    def _gather(self, state: Tensor, group: Any = None) -> list[Tensor]:
        return gather_rows(state, self.device, group)
