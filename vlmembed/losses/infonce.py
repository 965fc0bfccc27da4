"""InfoNCE over in-batch negatives, in the variants that embedding papers use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmembed.late_interaction import Vectors
from vlmembed.losses.base import LabelSpec, Loss, Similarity, check_positive, compare

Direction = Literal["query_to_document", "document_to_query", "query_to_query", "document_to_document"]
Negatives = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]

#: The directions whose candidates include the positive pair itself.
CROSS_DIRECTIONS = frozenset(("query_to_document", "document_to_query"))

#: The relevance of the candidates that each choice of ``hardness_on`` leaves alone.
UNWEIGHED = {"in_batch_negatives": -1, "hard_negatives": 0, "all_negatives": 1}

#: CLIP's bound on 1 / temperature: beyond it training is unstable.
MAXIMUM_SCALE = 100.0

#: Bytes of the similarities that a direction computes at once; with logits and gradients a block takes about six times
#: as much per direction. Larger batches are computed in several blocks, once more in the backward pass.
BLOCK_BYTES = 8 * 2**20


class InfoNCE(Loss):
    """Softmax cross-entropy of each positive against everything else in the batch.

    For each pair of a query and one of its positives: minus the log of the pair's share in a softmax over the pair and
    its negatives, on cosine similarities over a temperature, in float32 whatever the precision. The query's other
    positives are left out. Pairs are averaged per query, then queries are averaged. See arXiv:1807.03748.

    A direction says which similarities serve as negatives of the pair (q, p):

    - ``query_to_document``: q with every document that is not a positive of q;
    - ``document_to_query``: p with every query that p is not a positive of;
    - ``query_to_query``: q with every query that shares no positive with it;
    - ``document_to_document``: p with every document that no query has been judged on together with p.

    Common choices: the default; both cross directions ``per_direction`` (CLIP); all four in one joint softmax (GTE,
    arXiv:2308.03281). The pair itself is a candidate once per cross direction, so a joint softmax over both counts it
    twice, as in GTE and Sentence Transformers.

    Args:
        temperature: Similarities are divided by it.
        learnable_temperature: Train the logarithm of 1 / temperature, held at or below log 100 as in CLIP
            (arXiv:2103.00020).
        directions: Where negatives come from; at least one of the four above.
        softmax: ``joint`` takes one softmax over all directions' candidates; ``per_direction`` one softmax per
            direction, and averages. The second needs directions that contain the positive pair.
        false_negative_margin: Drop a negative, in-batch or hard, that is more similar than the pair by more than this:
            it is probably an unlabelled positive (0.1 in Qwen3-Embedding, arXiv:2506.05176). None keeps all.
        hardness: Add this times the (detached) cosine similarity to the ``query_to_document`` logits of negatives,
            so that similar ones weigh more (9 in LLaVE, arXiv:2503.04812; 5 in EmbeddingGemma, arXiv:2509.20354).
        hardness_on: Which negatives ``hardness`` weighs: other queries' documents, the query's hard negatives, or both.
        in_batch_negatives: Whether other queries' documents are negatives. False takes the hard negatives alone, of
            which each row then needs some: for rows whose documents answer many queries, such as names of classes.
    """

    def __init__(
        self,
        temperature: float = 0.02,
        learnable_temperature: bool = False,
        directions: Sequence[Direction] = ("query_to_document",),
        softmax: Literal["joint", "per_direction"] = "joint",
        false_negative_margin: float | None = None,
        hardness: float = 0.0,
        hardness_on: Negatives = "all_negatives",
        in_batch_negatives: bool = True,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        if learnable_temperature and temperature < 1 / MAXIMUM_SCALE:
            raise ValueError(f"a learnable temperature cannot start below {1 / MAXIMUM_SCALE}, got {temperature}")
        _check_directions(directions, softmax)
        if not 0 <= hardness < math.inf:
            raise ValueError(f"hardness must be 0 or above and finite, got {hardness}")
        if hardness_on not in get_args(Negatives):
            raise ValueError(f"hardness_on must be one of {get_args(Negatives)}, got {hardness_on!r}")
        if hardness > 0 and "query_to_document" not in directions:
            raise ValueError(f"hardness={hardness} weighs 'query_to_document', which directions={directions!r} lacks")
        if false_negative_margin is not None and not math.isfinite(false_negative_margin):
            raise ValueError(f"false_negative_margin must be finite, or null to keep all, got {false_negative_margin}")
        if not in_batch_negatives and tuple(directions) != ("query_to_document",):
            raise ValueError(f"in_batch_negatives=False is for directions ('query_to_document',), got {directions!r}")
        self.in_batch_negatives, self.label_spec = in_batch_negatives, LabelSpec(needs_negative=not in_batch_negatives)
        self.directions, self.softmax = tuple(directions), softmax
        self.false_negative_margin, self.hardness, self.hardness_on = false_negative_margin, hardness, hardness_on
        self.fixed_scale = 1 / temperature
        # A fixed temperature is no parameter: a checkpoint must not override what the configuration says.
        log_scale = torch.tensor(math.log(self.fixed_scale), dtype=torch.float32)
        self.log_scale = nn.Parameter(log_scale) if learnable_temperature else None

    @property
    def temperature(self) -> float:
        """The temperature in use now."""
        with torch.no_grad():
            return 1 / float(self._scale())

    def _scale(self) -> Tensor | float:
        if self.log_scale is None:
            return self.fixed_scale
        # As in CLIP the parameter itself is held back: clamping only its use would stop its gradient for good.
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(MAXIMUM_SCALE))
        return self.log_scale.exp()

    def forward(
        self,
        queries: Vectors,
        documents: Vectors,
        relevance: Int8[Tensor, "Q P"],
        scores: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        device = queries.device
        # Counted on the host, where relevance is in training: then nothing waits for a GPU. Otherwise this does, once.
        is_positive = relevance.cpu() == 1
        positives = is_positive.sum(1)
        if not positives.all():
            missing = (positives == 0).nonzero()[:, 0].tolist()
            raise ValueError(f"every query needs a positive; relevance has no 1 in rows {missing}")
        pairs = is_positive.nonzero()  # (M, 2): row and column of each positive
        weights = 1 / (positives[pairs[:, 0]] * len(queries)).float()  # (M,): the mean over queries of means over pairs
        pairs, weights, relevance = (tensor.to(device, non_blocking=True) for tensor in (pairs, weights, relevance))
        with torch.autocast(device.type, enabled=False):
            batch = compare(queries, documents, self.directions), relevance, self._scale()
            blocks = pairs.split(max(1, BLOCK_BYTES // (4 * max(relevance.shape))))
            compute: Any = self._pair_losses
            if len(blocks) > 1:
                # The (R, C) matrices of a block are not stored but computed again, when its gradient is.
                compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
            losses = torch.cat([compute(*batch, block) for block in blocks])
            return losses @ weights.to(losses.dtype)

    def _pair_losses(
        self, similar: Similarity, relevance: Tensor, scale: Tensor | float, pairs: Int[Tensor, "R 2"]
    ) -> Float[Tensor, " R"]:
        """Compute minus the log of each pair's share in a softmax over itself and its negatives."""
        query, document = pairs.T
        similarity = similar.pairs(query, document)[:, None]  # (R, 1)
        positive, negatives = scale * similarity, []
        for direction in self.directions:
            # (R, C) similarities of each pair's query or document with all C queries or documents.
            similarities = similar.rows(direction, query, document)
            if direction == "query_to_document":
                is_negative = relevance[query] != 1 if self.in_batch_negatives else relevance[query] == -1
            elif direction == "document_to_query":
                is_negative = relevance.T[document] != 1
            elif direction == "query_to_query":
                is_negative = (relevance[query] == 1).float() @ (relevance == 1).float().T == 0  # No shared positive.
            else:
                is_negative = (relevance.T[document] != 0).float() @ (relevance != 0).float() == 0  # No query for both.
            if self.false_negative_margin is not None:
                is_negative = is_negative & (similarities <= similarity + self.false_negative_margin)
            logits = scale * similarities
            if self.hardness > 0 and direction == "query_to_document":
                weighed = relevance[query] != UNWEIGHED[self.hardness_on]
                logits = logits + self.hardness * similarities.detach() * weighed
            negatives.append(logits.masked_fill(~is_negative, -math.inf))  # Masks the query's positives as well.
        if self.softmax == "per_direction":
            shares = [torch.cat([positive, logits], 1).log_softmax(1)[:, 0] for logits in negatives]
            return -torch.stack(shares).mean(0)
        count = max(1, len(CROSS_DIRECTIONS.intersection(self.directions)))
        return -torch.cat([positive] * count + negatives, 1).log_softmax(1)[:, 0]


def _check_directions(directions: Sequence[str], softmax: str) -> None:
    if isinstance(directions, str) or not directions or set(directions) - set(get_args(Direction)):
        raise ValueError(f"directions must be a list of one or more of {get_args(Direction)}, got {directions!r}")
    if len(set(directions)) < len(directions):
        raise ValueError(f"directions must name each direction once, got {directions!r}")
    if softmax not in ("joint", "per_direction"):
        raise ValueError(f"softmax must be 'joint' or 'per_direction', got {softmax!r}")
    if softmax == "per_direction" and not CROSS_DIRECTIONS.issuperset(directions):
        same_type = sorted(set(directions) - CROSS_DIRECTIONS)
        raise ValueError(f"{same_type} do not contain the positive pair: use softmax='joint', not 'per_direction'")
