"""Training and measuring a multi-vector model: late interaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from vlmembed.backbones import VisionLanguageModel
from vlmembed.encoder import MultiVectorEncoder
from vlmembed.losses import Loss
from vlmembed.metrics import MultiVectorMetrics
from vlmembed.modules.base import RetrievalModule
from vlmembed.modules.embedding import gather_batch
from vlmembed.pooling import TokenProjection, TokenSelection
from vlmembed.training.guards import CollapseMonitor, embedding_likeness
from vlmembed.types import Batch, EvaluationSet

#: Why vectors may collapse, besides the usual.
SAME_TOKENS = (
    "Or tokens of the chat template, whose vectors are the same in every document, are nearest to all others: then all "
    "similarities are equal, and document_tokens.skip should name these tokens."
)


class MultiVectorModule(RetrievalModule):
    """Turns a vision-language model into a multi-vector retriever: a vector for each token, compared by MaxSim.

    See ColBERT (arXiv:2004.12832) and ColPali (arXiv:2407.01449).

    Args:
        backbone: The vision-language model.
        loss: What to train with, such as InfoNCE, or Matryoshka or MergedTokens around it.
        projection: From the hidden state of a token to its vector; null for a linear one to 128 dimensions.
        query_tokens: Which tokens of a query have a vector; null for all.
        document_tokens: The same for a document.
        expansion_tokens: Special tokens of the checkpoint at the very end of every query, or how many of its padding
            token, each with a vector whatever ``query_tokens`` are (ColBERT's query augmentation); null for none.
        similarity: ``maxsim`` adds up over a query's vectors, ``meanmaxsim`` averages, so that a temperature means the
            same for queries of any length.
        merging_factors: Measure documents with so many times fewer vectors as well, besides those that the loss trains.
        two_stage: Measure a search in two stages as well, as a vector index makes it: so many documents are found by
            the cosine of mean vectors, and ranked by MaxSim. PLAID (arXiv:2205.09707) finds them by centroids, MUVERA
            (arXiv:2405.19504) by one vector that stands for MaxSim.
        losses: Further losses by name, for training sources that name one; see ``vlmembed.data.Mixture``.
        **options: As for `RetrievalModule`.
    """

    loss: Loss
    encoder: MultiVectorEncoder

    def __init__(
        self,
        backbone: VisionLanguageModel,
        loss: Loss,
        projection: TokenProjection | None = None,
        query_tokens: TokenSelection | None = None,
        document_tokens: TokenSelection | None = None,
        expansion_tokens: int | Sequence[str] | None = None,
        similarity: Literal["maxsim", "meanmaxsim"] = "maxsim",
        merging_factors: Sequence[int] = (),
        two_stage: int | None = None,
        losses: Mapping[str, Loss] | None = None,
        **options: Any,
    ) -> None:
        if similarity not in ("maxsim", "meanmaxsim"):
            raise ValueError(f"similarity is maxsim or meanmaxsim, got {similarity!r}.")
        if any(factor < 2 for factor in merging_factors):
            raise ValueError(f"merging_factors are 2 or more, as all vectors are measured anyway: {merging_factors}.")
        if isinstance(expansion_tokens, int) and expansion_tokens < 0:
            raise ValueError(f"expansion_tokens is 0 or more, or a list of tokens, got {expansion_tokens}.")
        if two_stage is not None and two_stage < 1:
            raise ValueError(f"two_stage is the number of documents that MaxSim ranks, or null; got {two_stage}.")
        selections: Any = {
            "query": query_tokens or TokenSelection(),
            "document": document_tokens or TokenSelection(),
        }
        parts = backbone, projection or TokenProjection(), selections, similarity, expansion_tokens
        monitor = CollapseMonitor("Vectors", embedding_likeness, SAME_TOKENS)
        super().__init__(MultiVectorEncoder(*parts), loss, monitor, losses=losses, **options)
        self.measured_factors = merging_factors
        self.two_stage = two_stage

    @property
    def merging_factors(self) -> tuple[int, ...]:
        """How many times fewer vectors are measured, the fewest times first."""
        losses: Any = (self.loss, *self.losses.values())
        trained = {factor for loss in losses for factor in loss.merging_factors}
        return tuple(sorted({*self.measured_factors, *trained} - {1}))

    def gather_batch(self, outputs: Tensor, batch: Batch) -> tuple[Any, ...]:
        """Join the vectors of all processes; outputs (T, D) are of the tokens that are kept, item by item."""
        return gather_batch(self.encoder.by_item(outputs, batch.chunks), batch)

    def metric(self, evaluation: EvaluationSet) -> MultiVectorMetrics:
        """Measure how well queries find their documents in the whole corpus."""
        return MultiVectorMetrics(
            evaluation, self.dimensions, self.merging_factors, self.two_stage, self.encoder.similarity == "meanmaxsim"
        )

    def predictions(self, metric: MultiVectorMetrics) -> dict[str, Tensor]:
        """``queries`` and ``documents``, the vectors (T, D) of all items end to end; ``…_lengths``, how many each has.

        They are not normalised, in the order of the set's files; ``query_lengths`` is (Q,), ``document_lengths`` (P,).
        """
        vectors = metric.gather_embeddings()
        lengths = vectors.lengths.split([len(metric.evaluation.queries), len(metric.evaluation.corpus)])
        queries, documents = vectors.vectors.split([int(counts.sum()) for counts in lengths])
        sides = {"queries": queries, "documents": documents}
        return {**sides, "query_lengths": lengths[0], "document_lengths": lengths[1]}
