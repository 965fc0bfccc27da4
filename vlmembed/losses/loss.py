"""What every embedding loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float, Int8
from torch import Tensor, nn


class Loss(nn.Module, ABC):
    """A number to minimise, from the embeddings of a batch and who answers whom.

    A loss sees the whole batch, of all processes together, and knows nothing of how the embeddings were made.
    """

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Truncated embedding dimensions that this loss trains, and that are therefore worth measuring as well."""
        return ()

    @property
    def wants_scores(self) -> bool:
        """Whether this loss distils a teacher's scores, which each training row then must have."""
        return False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Loss:
        # Follow to a device, never to another precision: a learnable temperature's steps round to nothing in bfloat16,
        # and a trainer with true half precision would have everything in it.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)

    @abstractmethod
    def forward(
        self,
        queries: Float[Tensor, "Q D"],
        documents: Float[Tensor, "P D"],
        relevance: Int8[Tensor, "Q P"],
        scores: Float[Tensor, "Q P"] | None = None,
    ) -> Float[Tensor, ""]:
        """Compute the loss.

        Args:
            queries: Embeddings as the model made them: any float type, not normalised.
            documents: The same for the documents; each distinct document of the batch is one row.
            relevance: 1 where the document is a right answer for the query, -1 where it is a hard negative of that
                query, 0 where nobody judged the pair (another query's document).
            scores: A teacher's scores, NaN where it has not scored the pair; None unless ``wants_scores``. A loss that
                does not want them may leave this argument out.
        """
