"""A check of the user's own run before it trains: the step's gradient against ordinary autograd's."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.functional import normalize

from vlmembed import distributed
from vlmembed.gradcache import GradCache
from vlmembed.losses import InfoNCE, Loss, Matryoshka, WeightedSum
from vlmembed.training.guards import NonFiniteGuard
from vlmembed.types import Batch, Inputs

#: What right steps differ by is rounding: in tests 1e-6 of a group's gradient, and 7e-3 where numbers have 16 bits, as
#: sums come in another order. The smallest error planted there makes 0.2.
TOLERANCE, TOLERANCE_16_BIT = 5e-4, 0.05


class ParityCheck(Callback):
    """Compares the first step's gradient with ordinary autograd's, and refuses to train if they differ.

    The step runs as it will: in chunks, embedded twice, over all processes, in the run's precision. Beside it stands a
    slow one: the loss as its documentation defines it, pair by pair in float64 (InfoNCE, also in Matryoshka and
    WeightedSum; another loss is taken as it is, and the report says so), and plain autograd through one chunk after the
    other, drawing the same random numbers. Both leave everything as it was. That takes the time of about three steps,
    and memory for one more gradient.

    Args:
        items: How many queries of each process's batch the loss is taken of, at most; documents stay all.
        on_failure: ``raise`` to stop, ``warn`` to train all the same.
    """

    def __init__(self, items: int = 8, on_failure: Literal["raise", "warn"] = "raise") -> None:
        if items < 2:
            raise ValueError(f"items is 2 or more: queries with negatives from each other; got {items}.")
        self.items, self.on_failure = items, on_failure

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Check, before the first step; raises a RuntimeError if the step's gradient is another one."""
        if trainer.global_step or batch_idx:
            return
        if not isinstance(getattr(pl_module, "loss", None), Loss):
            raise TypeError(f"ParityCheck knows the step of an EmbeddingModule, not of a {type(pl_module).__name__}.")
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"ParityCheck needs whole weights, and {type(trainer.strategy).__name__} may shard them. Check the run "
                "on one device or with trainer.strategy: ddp, and remove the callback here."
            )
        # Fewer queries, because the definition takes its time; with all documents, so that no chunk goes unnoticed.
        batch = replace(batch, queries=batch.queries[: self.items], query_ids=batch.query_ids[: self.items])
        kept = torch.isin(batch.pairs[:, 0], batch.query_ids)
        scores = None if batch.scores is None else batch.scores[kept]
        batch = replace(batch, pairs=batch.pairs[kept], labels=batch.labels[kept], scores=scores)
        module: Any = pl_module
        step = StepGradients(trainer, module, batch)
        expected, gradient = step.unchunked(), step.chunked()
        table, complaint = step.compare(gradient, expected)
        losses = {type(part).__name__ for part in module.loss.modules() if isinstance(part, Loss)}
        others = ", ".join(sorted(losses - {"InfoNCE", "Matryoshka", "WeightedSum"}))
        chunks = f"{len(batch.chunks)} chunks" if len(batch.chunks) > 1 else "a single chunk (so nothing is chunked)"
        distributed.print_once(
            f"Parity check {'failed' if complaint else 'passed'}, of {len(batch.queries)} queries and "
            f"{len(batch.documents)} documents in {chunks}{others and f' ({others} is taken as it is)'}:\n{table}"
        )
        if complaint and self.on_failure == "raise":
            raise RuntimeError(complaint)
        if complaint:
            warnings.warn(complaint, stacklevel=2)


class StepGradients:
    """The gradient that a step makes of a batch, and the one that it should make; both leave everything as it was."""

    def __init__(self, trainer: Trainer, module: Any, batch: Batch) -> None:
        self.trainer, self.module, self.batch = trainer, module, batch
        self.context = trainer.precision_plugin.train_step_context
        self.parameters = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.devices = [module.device] if module.device.type == "cuda" else []

    def chunked(self) -> list[Tensor]:
        """Return the step's own gradient; all chunks but the last are embedded twice, whatever there is room for."""
        module = self.module
        with self._undone():
            module.grad_cache = GradCache(module.encoder, min(module.grad_cache.graph_bytes, 1.0))
            module.guard, module.monitor = NonFiniteGuard(), copy.copy(module.monitor)
            vars(module)["log"] = lambda *_, **__: None
            loss: Any = self.trainer.strategy.training_step(self.batch, 0)
            module._accumulated = self.trainer.accumulate_grad_batches  # By which nothing has divided this loss.
            module.backward(loss)
            if not module.grad_cache.before_step and distributed.defer_gradient_reduction(self.trainer.strategy.model):
                distributed.mean_gradients(module.parameters())
            return self._gradients()

    def unchunked(self) -> list[Tensor]:
        """Return the gradient that the step should make."""
        module, batch = self.module, self.batch
        with self._undone():
            with torch.random.fork_rng(self.devices), torch.no_grad():
                encode, _ = self._text_encoder()
                embeddings = torch.cat([encode(chunk) for chunk in batch.chunks])  # (N, D)
            with self.context():
                loss = defined_loss(module.loss, *joined(embeddings.requires_grad_(), batch))
            loss.backward()
            assert embeddings.grad is not None
            parts = embeddings.grad.split([len(chunk["attention_mask"]) for chunk in batch.chunks])
            with torch.random.fork_rng(self.devices):  # The same random numbers again, for the same dropout.
                encode, features = self._text_encoder()
                for chunk, gradient in zip(batch.chunks, parts, strict=True):
                    _backward([encode(chunk)], [gradient])
            # All texts have sent their gradients to the features by now, and the images draw the same numbers again.
            arrived = iter([feature.grad for feature in features])
            for images in batch.images if features and features[0].requires_grad else []:
                with self.context():
                    outputs = module.encoder.backbone.encode_images(images)
                _backward(outputs, [next(arrived) for _ in outputs])
            for parameter in module.loss.parameters():
                if parameter.grad is not None:
                    parameter.grad /= distributed.world_size()  # Every process has all of it, and they are added up.
            return [_total(gradient) for gradient in self._gradients()]

    def _text_encoder(self) -> tuple[Callable[[Inputs], Tensor], list[Tensor]]:
        """Return what encodes a chunk, and its images' features, which collect gradients, as the step does."""
        encoder, images = self.module.encoder, self.batch.images
        trains_vision = encoder.backbone.trains_vision
        # Where no graphs may be kept, a trained tower runs with each chunk, and its dropout falls by chunk.
        with_texts = trains_vision and not self.module.grad_cache.graph_bytes
        with torch.no_grad(), self.context():
            features = [] if with_texts else encoder.encode_images(images)
        features = [feature.detach().requires_grad_(trains_vision) for feature in features]

        def encode(chunk: Inputs) -> Tensor:
            with self.context():
                return encoder.forward_with_images(chunk, images) if with_texts else encoder(chunk, features)

        return encode, features

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(each) if each.grad is None else each.grad for each in self.parameters.values()]

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Leave nothing behind: neither gradients, random states, buffers and the loss's parameters, nor attributes."""
        module, attributes = self.module, dict(vars(self.module))
        tensors = [(tensor, tensor.detach().clone()) for tensor in (*module.buffers(), *module.loss.parameters())]
        try:
            with torch.random.fork_rng(self.devices):
                yield
        finally:
            vars(module).clear()
            vars(module).update(attributes)
            module.zero_grad()
            with torch.no_grad():
                for tensor, value in tensors:
                    tensor.copy_(value)

    def compare(self, gradients: list[Tensor], expected: list[Tensor]) -> tuple[str, str]:
        """Return a table of the groups of parameters, and what is wrong with the largest that is wrong."""
        squares: dict[str, Tensor] = {}  # Of each group: of the gradient, of the expected one, of their difference.
        for name, one, other in zip(self.parameters, gradients, expected, strict=True):
            owner = name.removeprefix("encoder.").split(".")[0]
            group = self.module.encoder.backbone.group_of(name) if owner == "backbone" else owner
            numbers = [torch.linalg.vector_norm(tensor.double()) ** 2 for tensor in (one, other, one - other)]
            squares[group] = squares.get(group, torch.zeros(())) + torch.stack(numbers).cpu()
        is_16_bit = "16" in f"{self.trainer.precision} {self.module.encoder.dtype}"
        tolerance = TOLERANCE_16_BIT if is_16_bit else TOLERANCE
        lines, complaint = [f"  {'gradient of':<12}{'difference':>12}{'tolerated':>12}"], ""
        for group, sums in sorted(squares.items(), key=lambda entry: float(entry[1][1])):
            size, whole, off = (sums.sqrt() / max(float(sums[1]) ** 0.5, 1e-38)).tolist()
            lines.append(f"  {group:<12}{off:>12.1e}{tolerance:>12.1e}")
            if off <= tolerance:  # Never where it is NaN.
                continue
            # The part of the gradient that points along the expected one, and the one beside it.
            along = (size**2 + whole**2 - off**2) / 2
            beside = math.sqrt(max(0.0, size**2 - along**2))
            complaint = (
                f"The step's gradient is not that of its loss. Of {group} parameters it differs by {off:.2g} of its "
                f"size, and rounding explains {tolerance:.2g}. "
            ) + (
                f"It is {along:.3g} times what it should be: look for a factor, such as the number of processes."
                if beside <= max(1e-3, tolerance) * abs(along)
                else "It points elsewhere: look at what the step does with the temperature and with the negatives, and "
                "whether dropout falls the same way when a chunk is embedded again."
            )
        return "\n".join(lines), complaint


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for_outputs = zip(outputs, gradients, strict=True)
    reached = [(out, gradient) for out, gradient in for_outputs if out.requires_grad and gradient is not None]
    if reached:
        torch.autograd.backward([out for out, _ in reached], [gradient for _, gradient in reached])


def _total(gradient: Tensor) -> Tensor:
    """Add up over processes, a few million numbers at a time."""
    parts = gradient.flatten().split(2**22)
    return torch.cat([distributed.gather(part[None]).sum(0) for part in parts]).view_as(gradient)


def joined(embeddings: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """Join all processes' batches item by item, as `gather_batch` should; others' have no gradient."""
    sides: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}
    judged: dict[tuple[int, int], list[float]] = {}
    own = replace(batch, chunks=[], images=[])
    for rank, (vectors, part) in enumerate(distributed.gather_objects((embeddings.detach().cpu(), own))):
        vectors = embeddings if rank == distributed.rank() else vectors.to(embeddings.device)
        for side, ids, rows in zip(
            sides, (part.query_ids, part.document_ids), (part.queries, part.documents), strict=True
        ):
            for item, row in zip(ids.tolist(), rows.tolist(), strict=True):
                side.setdefault(item, vectors[row])  # The first where several processes have it.
        scores = [math.nan] * len(part.pairs) if part.scores is None else part.scores.tolist()
        for (query, document), *labels in zip(part.pairs.tolist(), part.labels.tolist(), scores, strict=True):
            judged[query, document] = max(labels, judged.get((query, document), labels))
    queries, documents = sides
    matrix = [[judged.get((query, document), [0, math.nan]) for document in documents] for query in queries]
    relevance, teacher = torch.tensor(matrix, device=embeddings.device).unbind(-1)
    vectors = [torch.stack([*side.values()]) for side in sides]
    return (*vectors, relevance.to(torch.int8), *([] if batch.scores is None else [teacher]))


def defined_loss(
    loss: Loss, queries: Tensor, documents: Tensor, relevance: Tensor, scores: Tensor | None = None
) -> Tensor:
    """Compute a loss as its documentation defines it, one pair after the other, in float64; see `Loss.forward`.

    That is InfoNCE, also inside of Matryoshka and WeightedSum; another loss computes itself.
    """
    if type(loss) is Matryoshka:
        terms = [
            weight * defined_loss(loss.loss, queries[:, :size], documents[:, :size], relevance, scores)
            for size, weight in loss.weights.items()
        ]
        return torch.stack(terms).sum()
    if type(loss) is WeightedSum:
        terms = [weight * defined_loss(term, queries, documents, relevance, scores) for term, weight in loss.terms]
        return torch.stack(terms).sum()
    if type(loss) is not InfoNCE:
        return loss(queries, documents, relevance, scores) if loss.wants_scores else loss(queries, documents, relevance)
    with torch.autocast(queries.device.type, enabled=False):
        vectors = normalize(queries.double()), normalize(documents.double())
        means = [
            torch.stack([_pair_loss(loss, *vectors, relevance, query, document) for document in positives]).mean()
            for query, positives in enumerate(row.nonzero()[:, 0].tolist() for row in relevance == 1)
        ]
        return torch.stack(means).mean()


def _pair_loss(
    loss: InfoNCE, queries: Tensor, documents: Tensor, relevance: Tensor, query: int, document: int
) -> Tensor:
    """Compute minus the log of a pair's share in a softmax over itself and its negatives."""
    positive, judged = relevance == 1, relevance != 0
    q, p = queries[query], documents[document]
    directions = {  # Of each, the similarities with all candidates, and which candidates are negatives.
        "query_to_document": (documents @ q, ~positive[query]),
        "document_to_query": (queries @ p, ~positive[:, document]),
        "query_to_query": (queries @ q, ~(positive & positive[query]).any(1)),
        "document_to_document": (documents @ p, ~(judged & judged[:, document, None]).any(0)),
    }
    unweighed = {"in_batch_negatives": -1, "hard_negatives": 0, "all_negatives": 1}[loss.hardness_on]
    scale = loss.fixed_scale if loss.log_scale is None else loss.log_scale.double().exp()
    own, others = (scale * (q @ p))[None], []
    for direction in loss.directions:
        similarities, is_negative = directions[direction]
        logits = scale * similarities
        if direction == "query_to_document":
            logits = logits + loss.hardness * similarities.detach() * (relevance[query] != unweighed)
        if loss.false_negative_margin is not None:
            is_negative = is_negative & (similarities <= q @ p + loss.false_negative_margin)
        others.append(logits[is_negative])
    if loss.softmax == "per_direction":
        return -torch.stack([torch.cat([own, logits]).log_softmax(0)[0] for logits in others]).mean()
    crossed = len({"query_to_document", "document_to_query"}.intersection(loss.directions))
    return -torch.cat([own] * max(1, crossed) + others).log_softmax(0)[0]
