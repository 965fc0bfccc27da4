"""Score heads: poolings of a query and a document, read together, to one logit; above 0 it means yes."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmembed.pooling import LastToken, Pooling, Projection
from vlmembed.pooling.base import PoolingWrapper


class ScoreHead(PoolingWrapper):
    """A pooling, and a score of what it pools."""

    #: Words whose weights in the language-model head are wanted: yes and no, or none.
    label_tokens: tuple[str, ...] = ()

    def bind_lm_head(self, rows: Float[Tensor, "answers H"] | None, embed: Callable[[], Tensor]) -> None:
        """Take the label tokens' rows of the head, or None where ``embed`` returns them: their trained embeddings."""

    def dimension(self, hidden_size: int) -> int:
        """Return 1."""
        return 1

    def score(self, pooled: Float[Tensor, "B D"]) -> Float[Tensor, "B 1"]:
        """Score what was pooled; as it is, where that is a number already."""
        return pooled

    def forward(
        self, hidden: Float[Tensor, "*K B L H"], mask: Int[Tensor, "B L"], input_ids: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B 1"]:
        """Pool, and score."""
        return self.score(self.pooling(hidden, mask, input_ids))


class YesNo(ScoreHead):
    """How much rather the language model would say yes than no (Qwen3-Reranker, arXiv:2506.05176; monoT5, 2003.06713).

    The difference of the two words' logits, log p(yes) − log p(no), from the last token's state. It adds no weights
    where the language-model head is the token embeddings; elsewhere its two rows are copied, and trained.

    Args:
        yes: The word for relevant: one token.
        no: The word for not relevant.
    """

    def __init__(self, yes: str = "yes", no: str = "no") -> None:
        super().__init__(LastToken())
        self.yes = yes
        self.no = no
        self.label_tokens = (yes, no)
        self.rows: nn.Parameter | None = None

    def bind_lm_head(self, rows: Float[Tensor, "answers H"] | None, embed: Callable[[], Tensor]) -> None:
        """Keep the rows, or what they are tied to."""
        self.rows = None if rows is None else nn.Parameter(rows)
        self._embed = embed

    @property
    def weights(self) -> Float[Tensor, "2 H"]:
        """What a state is multiplied by to get the two logits."""
        return self._embed() if self.rows is None else self.rows

    @property
    def direction(self) -> Float[Tensor, " H"]:
        """What a state is multiplied by to get their difference."""
        yes, no = self.weights.float()
        return yes - no

    def score(self, pooled: Float[Tensor, "B H"]) -> Float[Tensor, "B 1"]:
        """Take the difference of the logits."""
        return (pooled.float() @ self.direction)[:, None]


class Linear(ScoreHead):
    """A linear score of any pooling, learned from nothing.

    Args:
        pooling: What to score.
    """

    def __init__(self, pooling: Pooling) -> None:
        super().__init__(Projection(pooling, size=1))


class MLP(ScoreHead):
    """A score of any pooling by a layer of neurons, learned from nothing.

    Args:
        pooling: What to score.
        inner_size: How many neurons, at least 1, each with a GELU behind it.
    """

    def __init__(self, pooling: Pooling, inner_size: int) -> None:
        super().__init__(Projection(pooling, 1, inner_size))
