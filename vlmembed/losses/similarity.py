"""Losses of cosine similarities, at one dimension or several, in bounded memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmembed.losses.loss import Loss
from vlmembed.losses.pairs import Judgements, Pairs
from vlmembed.losses.truncations import Truncations

#: What the similarities of one tile may take in one direction: all candidates, at all dimensions, of as many pairs as
#: fit. With its logits and gradients a tile takes about five times as much, and twice as much more for each further
#: direction. Enough to keep a GPU busy, little beside a model's activations.
TILE_BYTES = 64 * 2**20


class SimilarityLoss(Loss):
    """A loss of cosine similarities: what a pair costs, averaged over a query's positives, then over queries.

    Similarities come in float32 whatever the precision, of one tile of pairs after the other, so that memory does not
    grow with the square of the batch.
    """

    @abstractmethod
    def pair_losses(self, pairs: Pairs) -> Float[Tensor, "T M"]:
        """Compute what each pair costs at each dimension.

        Args:
            pairs: Some of the batch's pairs of a query and a positive.
        """

    def forward(
        self,
        queries: Float[Tensor, "Q D"],
        documents: Float[Tensor, "P D"],
        relevance: Int8[Tensor, "Q P"],
        scores: Float[Tensor, "Q P"] | None = None,
    ) -> Float[Tensor, ""]:
        """See ``Loss.forward``; of no scores.

        Raises:
            ValueError: If a query has no positive.
        """
        return self.weighted_sum(queries, documents, relevance, {queries.shape[1]: 1.0})

    def weighted_sum(
        self,
        queries: Float[Tensor, "Q D"],
        documents: Float[Tensor, "P D"],
        relevance: Int8[Tensor, "Q P"],
        weights: Mapping[int, float],
    ) -> Float[Tensor, ""]:
        """Add up the loss at several dimensions, in one pass.

        Args:
            queries: See ``Loss.forward``.
            documents: See ``Loss.forward``.
            relevance: See ``Loss.forward``.
            weights: What each dimension's loss counts.

        Raises:
            ValueError: If a query has no positive.
        """
        # Around the gradient too, which is taken here and now.
        with torch.autocast(queries.device.type, enabled=False):
            judgements = Judgements.of(relevance, queries.device)
            row_bytes = 4 * len(weights) * max(relevance.shape)
            tiles = judgements.answers.split(max(1, TILE_BYTES // row_bytes), dim=1)
            embeddings = queries.float(), documents.float()
            dimensions = sorted(weights)
            # Copied without waiting for the device, unlike a tensor made there from numbers.
            weight = torch.tensor([weights[each] for each in dimensions], dtype=torch.float32)
            tile_loss = partial(
                self._tile_loss, *embeddings, judgements, dimensions, weight.to(queries.device, non_blocking=True)
            )
            if not torch.is_grad_enabled():
                return torch.stack([tile_loss(tile) for tile in tiles]).sum()
            loss: Tensor = _TileByTile.apply(tile_loss, tiles, *embeddings, *self.parameters())
            return loss

    def _tile_loss(
        self,
        queries: Tensor,
        documents: Tensor,
        judgements: Judgements,
        dimensions: Sequence[int],
        weight: Tensor,
        tile: Tensor,
    ) -> Tensor:
        pairs = Pairs(Truncations.of(queries, dimensions), Truncations.of(documents, dimensions), judgements, tile)
        return weight @ self.pair_losses(pairs) @ pairs.weight


class _TileByTile(torch.autograd.Function):
    """The sum of a function over tiles, with its gradient taken tile by tile, so that one tile's graph is alive."""

    @staticmethod
    def forward(ctx: Any, tile_loss: Callable[[Tensor], Tensor], tiles: Iterable[Tensor], *inputs: Tensor) -> Tensor:
        trained = [tensor for tensor in inputs if tensor.requires_grad]
        total = inputs[0].new_zeros(())
        gradients: tuple[Tensor, ...] = ()
        for tile in tiles:
            with torch.enable_grad():
                loss = tile_loss(tile)
            total += loss.detach()
            parts = torch.autograd.grad(loss, trained, materialize_grads=True) if trained else ()
            gradients = tuple(map(torch.add, gradients, parts)) if gradients else parts
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        return None, None, *(gradient * next(saved) if needed else None for needed in ctx.needs_input_grad[2:])
