"""Writing what a model predicts: rankings for other tools to read, and the embeddings behind them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vlmembed.metrics import RerankingMetrics, RetrievalMetrics
from vlmembed.types import EvaluationSet

#: Documents per query in a ranking, as TREC runs have them.
DEPTH = 1000


def write_predictions(metrics: RetrievalMetrics, folder: Path, is_writer: bool = True) -> None:
    """Write an evaluation set's rankings as a TREC run, and its embeddings.

    ``NAME.trec`` has lines ``query Q0 document rank score vlmembed``; ``NAME.safetensors`` has the tensors ``queries``
    (Q, D) and ``documents`` (P, D), not normalised, in the order of the set's files.

    Args:
        metrics: Has seen every item of the set.
        folder: Where to write; made if it is not there.
        is_writer: Whether this process writes. All must call, because each holds a share of the embeddings.
    """
    scores, columns = metrics.top_k(DEPTH)
    embeddings = metrics.gather_embeddings()
    if not is_writer:
        return
    evaluation = metrics.evaluation
    _write_run(evaluation, scores, columns, folder)
    queries, documents = embeddings.split([len(evaluation.queries), len(evaluation.corpus)])
    tensors = {"queries": queries.contiguous(), "documents": documents.contiguous()}
    save_file(tensors, folder / f"{evaluation.name}.safetensors")
    print(f"Predictions are in {folder}")


def write_reranking(metrics: RerankingMetrics, folder: Path, is_writer: bool = True) -> None:
    """Write each query's candidates in their new order as a TREC run, ``NAME.trec``, with logits as scores.

    Args:
        metrics: Has seen every candidate of the set.
        folder: Where to write; made if it is not there.
        is_writer: Whether this process writes. All must call, because each holds a share of the scores.
    """
    scores, columns = metrics.top_k(metrics.depth)
    if is_writer:
        _write_run(metrics.evaluation, scores, columns, folder)
        print(f"Predictions are in {folder}")


def _write_run(evaluation: EvaluationSet, scores: Tensor, columns: Tensor, folder: Path) -> None:
    """Write the rows of each query up to the first column -1."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{evaluation.name}.trec").open("w", encoding="utf-8") as file:
        for query, row, found in zip(evaluation.query_names, scores.tolist(), columns.tolist(), strict=True):
            for rank, (score, column) in enumerate(zip(row, found, strict=True), start=1):
                if column < 0:
                    break
                # Nine digits bring every float32 back: whoever reads the run finds this order in it.
                file.write(f"{query} Q0 {evaluation.document_names[column]} {rank} {score:.9g} vlmembed\n")
