"""The gradient cache: exact gradients of a batch-wide loss, in as much memory as there is.

A contrastive loss needs every embedding of the batch at once, but not every activation (GradCache, arXiv:2101.06983):
embed all chunks without keeping their graphs, compute the loss on the embeddings, take its gradient there, then embed
chunk after chunk again and push that gradient through. Here a graph is kept where there is room for it, and its chunk
is not computed twice; the last chunk's always, because its activations fit anyway. So a batch of one chunk is ordinary
training, at ordinary cost. Each chunk's random state is restored, so that dropout falls the same way twice.

    step = embed(encoder, chunks)
    loss = contrastive(step.embeddings)
    loss.backward()
    step.replay()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vlmembed.types import Inputs

Forward = Callable[[Inputs], Sequence[Tensor]]


class GraphBudget:
    """How much memory the graphs of a step may take.

    Args:
        limit: Bytes.
        weights: What graphs refer to but do not own.
    """

    def __init__(self, limit: float = 0.0, weights: Iterable[Tensor] = ()) -> None:
        self.limit = limit
        self.taken = 0
        self._counted = {weight.untyped_storage().data_ptr() for weight in weights}

    @property
    def left(self) -> bool:
        """Whether there may be room for another graph."""
        return self.taken < self.limit

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


def embed(encode: Callable[[Inputs], Tensor], chunks: Sequence[Inputs], room: GraphBudget | None = None) -> CachedStep:
    """Embed chunks.

    Args:
        encode: From a chunk to its embeddings (B, D).
        chunks: At least one.
        room: For graphs; none by default.

    Returns:
        The step: its ``embeddings`` are what to compute a loss on.
    """
    return run(lambda chunk: (encode(chunk),), chunks, room)


def run(forward: Forward, chunks: Sequence[Inputs], room: GraphBudget | None = None) -> CachedStep:
    """Compute something of chunks, and cut the graph behind it.

    Args:
        forward: From a chunk to any number of tensors; called once more by `CachedStep.replay` for a chunk whose graph
            was not kept.
        chunks: What to compute it of.
        room: For graphs; none by default.
    """
    room = room or GraphBudget()
    pending = []
    for chunk in chunks:
        state = _RandomState()
        last, left = chunk is chunks[-1], room.left
        counted = room.measured() if left else nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled() and (last or left)), counted:
            outputs = forward(chunk)
        if room.taken > room.limit and not last:
            outputs = [output.detach() for output in outputs]
        leaves = [output.detach().requires_grad_(torch.is_grad_enabled()) for output in outputs]
        pending.append(_Pending(chunk, state, outputs, leaves))
    return CachedStep([leaf for part in pending for leaf in part.leaves], pending, forward, _current_autocast())


@dataclass
class CachedStep:
    """What was computed of some chunks, and what it takes to send its gradient back.

    Args:
        outputs: Leaves, in the order of the chunks: where the loss's backward ends.
        pending: The chunks whose gradient is still to be sent.
        forward: What computes the outputs.
        autocast: The precision of the first pass, entered again for each chunk.
    """

    outputs: list[Tensor]
    pending: list[_Pending]
    forward: Forward
    autocast: AbstractContextManager

    @cached_property
    def embeddings(self) -> Float[Tensor, "N D"]:
        """All outputs, one after the other."""
        return torch.cat(self.outputs)

    def replay(self) -> None:
        """Send the gradient of the outputs back chunk by chunk. Call once, after the loss's backward."""
        if self.outputs and all(leaf.grad is None for leaf in self.outputs):
            raise RuntimeError("The loss's gradient did not reach the embeddings: call backward on it before replay.")
        # Always the last first, whether graphs were kept or not: sums come out the same, to the bit. It is also the
        # one whose graph is sure to be in memory, and should be gone before another is built.
        while self.pending:
            part = self.pending.pop()
            kept = any(output.requires_grad for output in part.outputs)
            outputs = part.outputs if kept else self._again(part)
            reached = [
                (output, leaf)
                for output, leaf in zip(outputs, part.leaves, strict=True)
                if output.requires_grad and leaf.grad is not None
            ]
            if reached:
                torch.autograd.backward([output for output, _ in reached], [leaf.grad for _, leaf in reached])
            del part, outputs, reached

    def _again(self, part: _Pending) -> Sequence[Tensor]:
        with part.state.restored(), self.autocast:
            return self.forward(part.chunk)


@dataclass
class _Pending:
    chunk: Inputs
    state: _RandomState
    outputs: Sequence[Tensor]
    leaves: list[Tensor]


class _RandomState:
    """The state of the generators that dropout draws from: the CPU's, and the current GPU's where one is used."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Start from this state; leave the generators as they were found."""
        with torch.random.fork_rng([] if self._gpu is None else [torch.cuda.current_device()]):
            torch.set_rng_state(self._cpu)
            if self._gpu is not None:
                torch.cuda.set_rng_state(self._gpu)
            yield


def _current_autocast() -> AbstractContextManager:
    device = "cuda" if torch.is_autocast_enabled("cuda") else "cpu"
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
