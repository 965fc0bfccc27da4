"""What every embedding loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod

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

    @abstractmethod
    def forward(
        self,
        queries: Float[Tensor, "Q D"],
        documents: Float[Tensor, "P D"],
        relevance: Int8[Tensor, "Q P"],
    ) -> Float[Tensor, ""]:
        """Compute the loss.

        Args:
            queries: Embeddings as the model made them: any float type, not normalised.
            documents: The same for the documents; each distinct document of the batch is one row.
            relevance: 1 where the document is a right answer for the query, -1 where it is a hard negative of that
                query, 0 where nobody judged the pair (another query's document).
        """
