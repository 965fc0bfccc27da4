"""The gradient cache: exact gradients of a batch-wide loss, with one chunk's activations in memory at a time.

A contrastive loss needs every embedding of the batch at once, but not every activation (GradCache, arXiv:2101.06983):
embed all chunks without keeping their graphs, compute the loss on the embeddings, take its gradient there, then embed
chunk after chunk again and push that gradient through. Two things go beyond the paper. The last chunk keeps its graph
from the first pass, because its activations fit anyway: a batch of one chunk is ordinary training, at ordinary cost.
And each chunk's random state is restored, so that dropout falls the same way twice.

    step = embed(encoder, chunks)
    loss = contrastive(step.embeddings)
    loss.backward()
    step.replay()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vlmembed.types import Inputs

Encode = Callable[[Inputs], Tensor]


def embed(encode: Encode, chunks: Sequence[Inputs]) -> CachedStep:
    """Embed chunks, keeping the last one's graph only.

    Args:
        encode: From a chunk to its embeddings (B, D); called once more per chunk but the last by `CachedStep.replay`.
        chunks: At least one.

    Returns:
        The step: its ``embeddings`` are a leaf to compute a loss on.
    """
    pending = []
    for chunk in chunks:
        state = _RandomState()
        with torch.set_grad_enabled(torch.is_grad_enabled() and chunk is chunks[-1]):
            pending.append(_Pending(chunk, state, encode(chunk)))
    embeddings = torch.cat([part.output.detach() for part in pending])
    return CachedStep(
        embeddings.requires_grad_(torch.is_grad_enabled()), pending, encode, _current_autocast(embeddings)
    )


@dataclass
class CachedStep:
    """One step's embeddings, and what it takes to send their gradient through the encoder.

    Args:
        embeddings: (N, D) in the order of the chunks; a leaf, where the loss's backward ends.
        pending: The chunks whose gradient is still to be sent.
        encode: The encoder.
        autocast: The precision of the first pass, entered again for each chunk.
    """

    embeddings: Float[Tensor, "N D"]
    pending: list[_Pending]
    encode: Encode
    autocast: AbstractContextManager

    def replay(self) -> None:
        """Send the gradient of ``embeddings`` through the encoder chunk by chunk. Call once, after the backward."""
        gradient = self.embeddings.grad
        if gradient is None:
            raise RuntimeError("The loss's gradient did not reach the embeddings: call backward on it before replay.")
        gradients = list(gradient.split([len(part.output) for part in self.pending]))
        # Last chunk first: its graph is in memory, and must be gone before the next one is built.
        while self.pending:
            part, output_gradient = self.pending.pop(), gradients.pop()
            output = part.output if part.output.requires_grad else self._encode_again(part)
            if output.requires_grad:
                output.backward(output_gradient)
            del part, output

    def _encode_again(self, part: _Pending) -> Tensor:
        with part.state.restored(), self.autocast:
            return self.encode(part.chunk)


@dataclass
class _Pending:
    chunk: Inputs
    state: _RandomState
    output: Tensor


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


def _current_autocast(tensor: Tensor) -> AbstractContextManager:
    device = tensor.device.type
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
