"""InfoNCE over in-batch negatives, in the variants that embedding papers use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vlmembed.losses.pairs import CROSS_DIRECTIONS, Direction, Negatives, Pairs
from vlmembed.losses.similarity import SimilarityLoss

#: CLIP's bound on 1 / temperature: beyond it training is unstable.
MAXIMUM_SCALE = 100.0

LOWEST = torch.finfo(torch.float32).min


class InfoNCE(SimilarityLoss):
    """Softmax cross-entropy of each right answer against everything else in the batch.

    For each pair of a query and one of its positives: minus the log of the pair's share in a softmax over the pair and
    its negatives, on cosine similarities over a temperature, in float32 whatever the precision. The query's other
    positives are left out of that softmax. Pairs are averaged per query, then queries are averaged. See
    arXiv:1807.03748.

    A direction says which similarities serve as negatives of the pair (q, p):

    - ``query_to_document``: q with every document that does not answer it;
    - ``document_to_query``: p with every query that it does not answer;
    - ``query_to_query``: q with every query that shares no positive with it;
    - ``document_to_document``: p with every document that no query has been judged on together with p.

    Common choices: the default; symmetric InfoNCE (both cross directions, ``softmax="per_direction"``, as in CLIP);
    all four directions in one joint softmax (GTE, arXiv:2308.03281). The pair itself is a candidate once per cross
    direction, so a joint softmax over both counts it twice, as in GTE and Sentence Transformers.

    Args:
        temperature: Similarities are divided by it.
        learnable_temperature: Train the logarithm of 1 / temperature, kept at or below log 100 as in CLIP
            (arXiv:2103.00020).
        directions: Where negatives come from; at least one of the four above.
        softmax: ``joint`` takes one softmax over all directions' candidates; ``per_direction`` one softmax per
            direction, and averages. The second needs directions that contain the positive pair.
        false_negative_margin: Drop a negative that is more similar than the positive pair by more than this, as it
            is probably an unlabelled right answer (0.1 in Qwen3-Embedding, arXiv:2506.05176). Applies to hard
            negatives too. None keeps all.
        hardness: Add this times the (detached) cosine similarity to the ``query_to_document`` logits of negatives,
            so that similar ones weigh more (9 in LLaVE, arXiv:2503.04812; 5 in EmbeddingGemma, arXiv:2509.20354).
        hardness_on: Which negatives ``hardness`` weighs: those of other queries, the query's own hard negatives, or
            both.

    Raises:
        ValueError: If an argument is outside its range, or could have no effect.
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
    ) -> None:
        super().__init__()
        _check_temperature(temperature, learnable_temperature)
        _check_directions(directions, softmax)
        _check_hardness(hardness, hardness_on, directions)
        if false_negative_margin is not None and not math.isfinite(false_negative_margin):
            raise ValueError(f"false_negative_margin must be finite, or null to keep all, got {false_negative_margin}")
        self.directions = tuple(directions)
        self.softmax = softmax
        self.false_negative_margin = false_negative_margin
        self.hardness = hardness
        self.hardness_on = hardness_on
        self.fixed_scale = 1 / temperature
        # A fixed temperature is no parameter: a checkpoint must not override what the configuration says.
        log_scale = torch.tensor(math.log(self.fixed_scale), dtype=torch.float32)
        self.log_scale = nn.Parameter(log_scale) if learnable_temperature else None

    @property
    def temperature(self) -> float:
        """The temperature in use now."""
        with torch.no_grad():
            return 1 / float(self._scale())

    def pair_losses(self, pairs: Pairs) -> Float[Tensor, "T M"]:
        """See ``SimilarityLoss.pair_losses``."""
        scale = self._scale()
        similarities = pairs.similarities(self.directions).items()
        losses = [self._direction_losses(pairs, *each, scale) for each in similarities]
        if self.softmax == "per_direction":
            return torch.stack(losses).mean(0)
        if not CROSS_DIRECTIONS.intersection(self.directions):
            losses.append(torch.zeros_like(losses[0]))
        return torch.stack(losses).logsumexp(0)

    def _scale(self) -> Tensor | float:
        if self.log_scale is None:
            return self.fixed_scale
        # As in CLIP the parameter itself is held back: clamping only its use would stop its gradient for good.
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(MAXIMUM_SCALE))
        return self.log_scale.exp()

    def _direction_losses(
        self, pairs: Pairs, direction: Direction, similarity: Float[Tensor, "T M C"], scale: Tensor | float
    ) -> Float[Tensor, "T M"]:
        """Log of a direction's sum in the softmax, over the pair's own term, which cross directions include."""
        is_negative = pairs.negatives(direction)
        if self.false_negative_margin is not None:
            is_negative = is_negative & (similarity <= pairs.similarity[:, :, None] + self.false_negative_margin)
        logits = scale * similarity
        if self.hardness > 0 and direction == "query_to_document":
            logits = logits + self.hardness * similarity.detach() * pairs.query_negatives(self.hardness_on)
        # Added, because autograd would pass over a filled matrix twice more; finite, because a row may have none.
        mask = torch.zeros_like(is_negative, dtype=logits.dtype).masked_fill_(~is_negative, LOWEST)
        if direction not in CROSS_DIRECTIONS:
            return logits.add_(mask).logsumexp(2) - scale * pairs.similarity
        own = pairs.document if direction == "query_to_document" else pairs.query
        logits.add_(mask.scatter_(-1, own.expand(mask.shape[:-1])[..., None], 0.0))
        own = own.expand(logits.shape[:-1])
        return cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="none").view_as(own)


def _check_temperature(temperature: float, learnable: bool) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if learnable and temperature < 1 / MAXIMUM_SCALE:
        raise ValueError(f"a learnable temperature cannot start below {1 / MAXIMUM_SCALE}, got {temperature}")


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


def _check_hardness(hardness: float, hardness_on: str, directions: Sequence[str]) -> None:
    if not 0 <= hardness < math.inf:
        raise ValueError(f"hardness must be 0 or above and finite, got {hardness}")
    if hardness_on not in get_args(Negatives):
        raise ValueError(f"hardness_on must be one of {get_args(Negatives)}, got {hardness_on!r}")
    if hardness > 0 and "query_to_document" not in directions:
        raise ValueError(f"hardness={hardness} weighs 'query_to_document' only, which directions={directions!r} lacks")
