"""The gradient that a step makes, and the one that it should make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from vlmembed import distributed
from vlmembed.engine import Engine
from vlmembed.gradcache import Room
from vlmembed.modules.definition import defined_loss
from vlmembed.modules.embedding import EmbeddingModule
from vlmembed.modules.finite import FiniteSteps
from vlmembed.types import Batch

#: How often the gradient without chunks is taken again, rounded otherwise.
ROUNDS = 3


class StepGradients:
    """A step, the gradient that it makes, and the one that it should make.

    Args:
        trainer: About to run it.
        module: What is trained.
        batch: What it is trained on.
    """

    def __init__(self, trainer: Trainer, module: EmbeddingModule, batch: Batch) -> None:
        self._trainer, self._module, self._batch = trainer, module, batch
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._parameters = list(trained.values())
        owners = [name.removeprefix("encoder.").split(".")[0] for name in trained]
        self._groups = [
            module.encoder.backbone.group_of(name) if owner == "backbone" else owner
            for name, owner in zip(trained, owners, strict=True)
        ]

    def norms(self, gradients: Iterable[Tensor]) -> dict[str, float]:
        """Return the norm of each group's gradient."""
        norms: dict[str, float] = {}
        for group, gradient in zip(self._groups, gradients, strict=True):
            norms[group] = math.hypot(norms.get(group, 0.0), float(torch.linalg.vector_norm(gradient.float())))
        return norms

    def chunked(self, graph_bytes: float) -> list[Tensor]:
        """Return the gradient that the run will make, with so much memory for graphs."""
        with self._undone():
            self._module.engine = Engine(self._module.encoder, graph_bytes)
            loss: Any = self._trainer.strategy.training_step(self._batch, 0)
            self._module.backward(loss)
            if distributed.defer_gradient_reduction(self._trainer.strategy.model):
                distributed.mean_gradients(self._module.parameters())
            return [torch.zeros_like(each) if each.grad is None else each.grad for each in self._parameters]

    def unchunked(self) -> tuple[list[Tensor], dict[str, float], int]:
        """Return ordinary autograd's gradient, how much rounding changes each group's, and the bytes of the graphs."""
        with self._undone(), torch.no_grad():
            graphless = self._embed().float()
        with self._undone():
            room = Room(math.inf, self._module.parameters())
            with room.measured():
                embeddings = self._embed()
            gradient = self._gradient([self._loss(embeddings, torch.float64)])
            changes = [self.norms(self._rounded_otherwise(graphless, embeddings, gradient)) for _ in range(ROUNDS)]
        rows = torch.tensor([list(change.values()) for change in changes], device=self._module.device)
        noise = torch.linalg.vector_norm(distributed.gather(rows), dim=0) / ROUNDS**0.5
        return self._over_processes(gradient), dict(zip(changes[0], noise.tolist(), strict=True)), room.taken

    def _rounded_otherwise(self, graphless: Tensor, embeddings: Tensor, gradient: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield what changes in each parameter's gradient."""
        # As much as a sum of so many products is rounded by: that is what a similarity is.
        rounding = torch.finfo(torch.float32).eps * graphless.shape[1] ** 0.5 * (2 * torch.rand_like(graphless) - 1)
        leaf = (graphless * (1 + rounding)).requires_grad_()
        loss = self._loss(leaf, torch.float32)
        (arriving,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        part = torch.rand_like(arriving) * arriving
        one = self._gradient([embeddings, loss], [part.to(embeddings.dtype), torch.ones_like(loss)])
        other = self._gradient([embeddings], [(arriving - part).to(embeddings.dtype)])
        return (first + second - whole for first, second, whole in zip(one, other, gradient, strict=True))

    def _gradient(self, outputs: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> list[Tensor]:
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        return list(torch.autograd.grad(outputs, self._parameters, weights, **options))

    def _over_processes(self, gradient: list[Tensor]) -> list[Tensor]:
        """Add up everybody's items' shares of the encoder's gradient; all of the loss's is known to everybody."""
        if distributed.world_size() == 1:
            return gradient
        shares = [distributed.world_size() if group == "loss" else 1 for group in self._groups]
        return [_total(own) / share for own, share in zip(gradient, shares, strict=True)]

    def _embed(self) -> Tensor:
        """Embed everything, drawing random numbers in the order in which the engine does."""
        encoder, engine, batch = self._module.encoder, self._module.engine, self._batch
        with self._trainer.precision_plugin.train_step_context():
            if encoder.backbone.trains_vision and not engine.graph_bytes:
                # Dropout depends on which images share a pass.
                return torch.cat([engine._encode_with_images(chunk, batch.images) for chunk in batch.chunks])
            features = encoder.see(batch.images)
            return torch.cat([encoder(chunk, features) for chunk in batch.chunks])

    def _loss(self, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute the loss of all processes' examples, where the others' embeddings are given numbers."""

        def everywhere(tensor: Tensor) -> list[Any]:
            return distributed.gather(tensor.to(embeddings.device)).tolist()

        batch = self._batch
        start = sum(everywhere(torch.tensor([len(embeddings)]))[: self._trainer.global_rank])
        joined = distributed.gather(embeddings.detach())
        joined = torch.cat([joined[:start], embeddings, joined[start + len(embeddings) :]])
        rows: list[dict[int, int]] = [{}, {}]
        sides = ((batch.query_ids, batch.queries), (batch.document_ids, batch.documents))
        for row_of, (ids, places) in zip(rows, sides, strict=True):
            for item, row in zip(everywhere(ids), everywhere(places + start), strict=True):
                row_of.setdefault(item, row)
        queries, documents = (list(row_of) for row_of in rows)
        asked, answering = (joined[list(row_of.values())] for row_of in rows)
        pairs = everywhere(batch.pairs)

        def judged(values: Tensor, empty: float) -> Tensor:
            matrix = torch.full((len(queries), len(documents)), empty, dtype=values.dtype)
            # The largest last: where examples disagree about a pair, it is a right answer.
            for value, (query, document) in sorted(zip(everywhere(values), pairs, strict=True)):
                matrix[queries.index(query), documents.index(document)] = value
            return matrix.to(embeddings.device)

        relevance = judged(batch.labels, empty=0)
        scores = None if batch.scores is None else judged(batch.scores, empty=math.nan)
        with self._trainer.precision_plugin.train_step_context():
            return defined_loss(self._module.loss, asked, answering, relevance, scores, dtype)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Leave nothing behind."""
        module, engine, steps = self._module, self._module.engine, self._module.steps
        kept = [(tensor, tensor.detach().clone()) for tensor in (*module.buffers(), *module.loss.parameters())]
        module.steps = FiniteSteps()
        vars(module)["log"] = lambda *_, **__: None
        try:
            with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
                yield
        finally:
            del vars(module)["log"]
            module.engine, module.steps = engine, steps
            module.zero_grad()
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)


def _total(gradient: Tensor) -> Tensor:
    """Add up over processes, a few million numbers at a time."""
    parts = gradient.flatten().split(2**22)
    return torch.cat([distributed.gather(part[None]).sum(0) for part in parts]).view_as(gradient)
