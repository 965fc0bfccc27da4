"""The gradient cache: exact gradients of a batch-wide loss, in as much memory as there is.

A contrastive loss needs every embedding of the batch at once, but not every activation (GradCache, arXiv:2101.06983):
embed all chunks without keeping their graphs, compute the loss on the embeddings, take its gradient there, then embed
chunk after chunk again and push that gradient through. Here a graph is kept where there is memory for it, and its chunk
is not computed twice; the last chunk's always, because its activations fit anyway. So a batch of one chunk is ordinary
training, at ordinary cost. Each chunk's random state is restored, so that dropout falls the same way twice.

    cache = GradCache(encoder)
    loss = contrastive(cache.embed(batch))
    loss.backward()
    cache.backward()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vlmembed import distributed
from vlmembed.types import Batch, Inputs, RankingBatch

if TYPE_CHECKING:
    from vlmembed.encoder import Encoder
    from vlmembed.features import FeatureCache

Forward = Callable[[Inputs], Sequence[Tensor]]

OUT_OF_MEMORY = (
    "Lower data.chunk_size or the backbone's max_pixels, set backbone.gradient_checkpointing: true, or train a LoRA "
    "instead of all weights."
)


class GradCache:
    """Embeds batches, and sends the gradient of their embeddings back through the encoder.

    The vision tower encodes each distinct image of a batch once. Of a frozen tower only the features are needed. A
    trainable tower is chunked like the texts: it collects what all texts send back, and goes backward once for each
    image. Only where no graph may be kept does it run together with the texts of its images: features of a whole batch
    would take the memory that was to be saved. ``features`` keeps what a frozen tower makes from step to step; of so
    many ``steps`` per epoch it predicts what that will take.
    """

    def __init__(
        self, encoder: Encoder, graph_bytes: float = 0.0, features: FeatureCache | None = None, steps: int = 0
    ) -> None:
        self.encoder = encoder
        self.graph_bytes = graph_bytes
        #: Whether the optimizer steps after this batch, not after another whose gradient is added to its.
        self.before_step = False
        self.budget = GraphBudget()
        self._features, self._steps, self._predicted = features, steps, features is None
        self._short_of_memory = False
        self._texts: CachedForward | None = None
        self._images: CachedForward | None = None
        self._frozen_vision = not encoder.backbone.trains_vision

    def embed(self, batch: Batch | RankingBatch) -> Float[Tensor, "N D"]:
        """Embed a batch's items, or score its pairs, in the order of its chunks, for a loss to go backward from.

        Where memory runs out, chunks are halved and no graphs are kept from then on; there are no gradients yet that
        could be lost. Raises a RuntimeError if memory runs out all the same.
        """
        try:
            return self._embed(self.encoder.halve(batch) if self._short_of_memory else batch)
        except torch.OutOfMemoryError as error:
            largest = max(tuple(chunk["input_ids"].shape) for chunk in batch.chunks)
            message = f"Out of memory in {len(batch.chunks)} chunks, the largest of {largest} items and tokens each."
            if self._short_of_memory or not all("images" in chunk for chunk in batch.chunks):
                raise RuntimeError(f"{message} {OUT_OF_MEMORY}") from error
            print(f"{message} Chunks are halved, and no graphs are kept, from now on.")
        # Outside of the handler, because its traceback holds on to what was computed.
        self._short_of_memory, self.graph_bytes = True, 0.0
        self._texts = self._images = None
        torch.cuda.empty_cache()
        return self.embed(batch)

    def backward(self) -> None:
        """Send the gradient of the embeddings through the encoder. Call once, after the loss's backward."""
        if self._texts is None:
            raise RuntimeError("Call embed before backward.")
        self._texts.backward()
        # All texts have sent their gradients to the features by now; each image goes backward once.
        if self._images is not None:
            self._images.backward()
        self._texts = self._images = None

    def _embed(self, batch: Batch | RankingBatch) -> Tensor:
        self.budget = GraphBudget(self.graph_bytes, self.encoder.parameters())
        self._texts = forward_chunks(self._text_encoder(batch), batch.chunks, self.budget)
        return self._texts.embeddings

    def _text_encoder(self, batch: Batch | RankingBatch) -> Forward:
        """Encode the images that can be encoded apart; return what encodes a chunk of texts with them."""
        self._images = None
        if self._frozen_vision:
            features: Sequence[Tensor] = self._frozen_features(batch)
        elif self.graph_bytes:
            self._images = forward_chunks(self.encoder.backbone.encode_images, batch.images, self.budget)
            features = self._images.outputs
        else:
            return lambda chunk: (self.encoder.forward_with_images(chunk, batch.images),)
        return lambda chunk: (self.encoder(chunk, features),)

    @torch.no_grad()
    def _frozen_features(self, batch: Batch | RankingBatch) -> list[Tensor]:
        """Encode all images, or those whose features are not kept."""
        if self._features is None:
            return self.encoder.encode_images(batch.images)
        features, new = self.encoder.encode_missing_images(batch.images, self._features.get)
        if not self._predicted:
            # In all processes alike: they go by the sum of their first steps.
            size = distributed.total(sum(image.nbytes for image in features))
            rows = distributed.total(len(batch.queries))
            self._features.predict(size / rows, self._steps * rows, announce=distributed.print_once)
            self._predicted = True
        with self._features.together(new):
            for key, image in new.items():
                self._features.put(key, image)
        return features


class GraphBudget:
    """How much memory the graphs of a step may take: ``limit`` bytes, without the ``weights`` that graphs refer to."""

    def __init__(self, limit: float = 0.0, weights: Iterable[Tensor] = ()) -> None:
        self.limit = limit
        self.taken = 0
        self._counted = {weight.untyped_storage().data_ptr() for weight in weights}

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count what autograd saves meanwhile."""

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._counted:
                self._counted.add(storage.data_ptr())
                self.taken += storage.nbytes()
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            yield


def forward_chunks(forward: Forward, chunks: Sequence[Inputs], budget: GraphBudget | None = None) -> CachedForward:
    """Compute something of chunks, any number of tensors of each, and cut the graph behind it.

    A chunk whose graph was not kept, because the ``budget`` has no room, is computed again in the backward pass.
    """
    budget = budget or GraphBudget()
    pending = []
    for chunk in chunks:
        state = random_state()
        last, has_room = chunk is chunks[-1], budget.taken < budget.limit
        measured = budget.measured() if has_room else nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled() and (last or has_room)), measured:
            outputs = forward(chunk)
        if budget.taken > budget.limit and not last:
            outputs = [output.detach() for output in outputs]
        # The leaves are where the loss's backward ends; the outputs are where `backward` goes on from.
        leaves = [output.detach().requires_grad_(torch.is_grad_enabled()) for output in outputs]
        pending.append(_Pending(chunk, state, outputs, leaves))
    device = "cuda" if torch.is_autocast_enabled("cuda") else "cpu"
    autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    return CachedForward([leaf for part in pending for leaf in part.leaves], pending, forward, autocast)


@dataclass
class _Pending:
    chunk: Inputs
    state: list[Tensor]
    outputs: Sequence[Tensor]
    leaves: list[Tensor]


@dataclass
class CachedForward:
    """What was computed of some chunks, and what it takes to send its gradient back."""

    outputs: list[Tensor]  # Leaves, in the order of the chunks: where the loss's backward ends.
    pending: list[_Pending]  # The chunks whose gradient is still to be sent.
    forward: Forward
    autocast: AbstractContextManager  # The precision of the first pass, entered again for each chunk.

    @cached_property
    def embeddings(self) -> Float[Tensor, "N D"]:
        """All outputs, one after the other."""
        return torch.cat(self.outputs)

    def backward(self) -> None:
        """Send the gradient of the outputs back chunk by chunk. Call once, after the loss's backward."""
        if self.outputs and all(leaf.grad is None for leaf in self.outputs):
            raise RuntimeError("The loss's gradient did not reach the embeddings: call its backward before this one.")
        # Always the last first, whether graphs were kept or not: sums come out the same, to the bit. It is also the
        # one whose graph is sure to be in memory, and should be gone before another is built.
        while self.pending:
            part = self.pending.pop()
            outputs = part.outputs
            if not any(output.requires_grad for output in outputs):
                with restored(part.state), self.autocast:
                    outputs = self.forward(part.chunk)
            gradients = {output: leaf.grad for output, leaf in zip(outputs, part.leaves, strict=True)}
            reached = [output for output, grad in gradients.items() if output.requires_grad and grad is not None]
            if reached:
                torch.autograd.backward(reached, [gradients[output] for output in reached])
            del part, outputs, gradients, reached


def random_state() -> list[Tensor]:
    """Return the states of what dropout draws from: the CPU's generator, and the current GPU's where one is used."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


@contextmanager
def restored(state: list[Tensor]) -> Iterator[None]:
    """Draw from a state; leave the generators as they were before."""
    cpu, *gpu = state
    with torch.random.fork_rng([torch.cuda.current_device()] if gpu else []):
        torch.set_rng_state(cpu)
        for gpu_state in gpu:
            torch.cuda.set_rng_state(gpu_state)
        yield
