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
from vlmembed.engine import Engine
from vlmembed.losses import InfoNCE, Loss, Matryoshka, WeightedSum
from vlmembed.modules.embedding import EmbeddingModule
from vlmembed.training.guards import NonFiniteGuard
from vlmembed.types import Batch, Inputs

#: Tolerated in each group of parameters: so many times what rounding changes, and this share of the gradient anyway.
FACTOR, FLOOR = 10.0, 1e-4


class ParityCheck(Callback):
    """Compares the first step's gradient with ordinary autograd's, and refuses to train if they differ.

    The step runs as it will: in chunks, embedded twice, over all processes, in the run's precision. Beside it stands a
    slow one: the loss as its documentation defines it, pair by pair in float64 (InfoNCE, also in Matryoshka and
    WeightedSum; another loss is taken as it is, and the report says so), and plain autograd through one chunk after the
    other, drawing the same random numbers. It goes back once more with what rounding may change, which gives the
    tolerance. Everything is left as it was. Takes the time of about four steps, and memory for two more gradients.

    Args:
        items: How many queries and documents of each process's batch the loss is taken of, at most.
        on_failure: ``raise`` to stop, ``warn`` to train all the same.
    """

    def __init__(self, items: int = 32, on_failure: Literal["raise", "warn"] = "raise") -> None:
        if items < 6:
            raise ValueError(f"items is 6 or more: two queries, each with a positive and a negative; got {items}.")
        self.items, self.on_failure = items, on_failure

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Check, before the first step; raises a RuntimeError if the step's gradient is another one."""
        if trainer.global_step or batch_idx:
            return
        if not isinstance(pl_module, EmbeddingModule):
            raise TypeError(f"ParityCheck knows the step of an EmbeddingModule, not of a {type(pl_module).__name__}.")
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"ParityCheck needs whole weights, and {type(trainer.strategy).__name__} may shard them. Check the run "
                "on one device or with trainer.strategy: ddp, and remove the callback here."
            )
        batch = first_queries(batch, self.items)
        step = StepGradients(trainer, pl_module, batch)
        expected, noise = step.unchunked()
        gradient = step.chunked()
        difference = [one - other for one, other in zip(gradient, expected, strict=True)]
        table, complaint = compare(*map(step.norms, (gradient, expected, difference, noise)))
        others = {type(part).__name__ for part in pl_module.loss.modules() if isinstance(part, Loss)}
        others = ", ".join(sorted(others - {"InfoNCE", "Matryoshka", "WeightedSum"}))
        chunks = f"{len(batch.chunks)} chunks" if len(batch.chunks) > 1 else "a single chunk (so nothing is chunked)"
        distributed.print_once(
            f"Parity check {'failed' if complaint else 'passed'}, of {len(batch.queries)} queries and "
            f"{len(batch.documents)} documents in {chunks}{others and f' ({others} is taken as it is)'}:\n{table}"
        )
        if complaint and self.on_failure == "raise":
            raise RuntimeError(complaint)
        if complaint:
            warnings.warn(complaint, stacklevel=2)


def first_queries(batch: Batch, items: int) -> Batch:
    """Leave the loss the first queries of a batch, each with a positive and other judged documents; chunks stay whole."""
    documents: dict[int, list[int]] = {query: [] for query in batch.query_ids.tolist()}
    positives_first = batch.labels.argsort(descending=True, stable=True)
    for query, document in batch.pairs[positives_first].tolist():
        documents[query].append(document)
    chosen: set[int] = set()
    for query, judged in documents.items():
        room = min(items - len(chosen), items // 2)
        chosen |= {query, *judged[: room - 1]} if room > 1 else set()
    masks = [torch.tensor([item in chosen for item in ids.tolist()]) for ids in (batch.query_ids, batch.document_ids)]
    pairs = torch.tensor([chosen.issuperset(pair) for pair in batch.pairs.tolist()])
    return replace(
        batch,
        queries=batch.queries[masks[0]],
        query_ids=batch.query_ids[masks[0]],
        documents=batch.documents[masks[1]],
        document_ids=batch.document_ids[masks[1]],
        pairs=batch.pairs[pairs],
        labels=batch.labels[pairs],
        scores=None if batch.scores is None else batch.scores[pairs],
    )


class StepGradients:
    """The gradient that a step makes of a batch, and the one that it should make; both leave everything as it was."""

    def __init__(self, trainer: Trainer, module: EmbeddingModule, batch: Batch) -> None:
        self.trainer, self.module, self.batch = trainer, module, batch
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.parameters = list(trained.values())
        self.loss_parameters = [parameter for parameter in module.loss.parameters() if parameter.requires_grad]
        self.devices = [module.device] if module.device.type == "cuda" else []
        self.groups = []
        for name in trained:
            owner = name.removeprefix("encoder.").split(".")[0]
            self.groups.append(module.encoder.backbone.group_of(name) if owner == "backbone" else owner)

    def norms(self, gradients: list[Tensor]) -> dict[str, float]:
        """Return the norm of each group's gradient: ``vision``, ``merger``, ``language``, ``pooling``, ``loss``."""
        norms: dict[str, float] = {}
        for group, gradient in zip(self.groups, gradients, strict=True):
            norms[group] = math.hypot(norms.get(group, 0.0), float(torch.linalg.vector_norm(gradient.float())))
        return norms

    def chunked(self) -> list[Tensor]:
        """Return the step's own gradient; all chunks but the last are embedded twice, whatever there is room for."""
        module = self.module
        with self._undone():
            module.engine = Engine(module.encoder, min(module.engine.graph_bytes, 1.0))
            module.steps, module._monitor = NonFiniteGuard(), copy.copy(module._monitor)
            vars(module)["log"] = lambda *_, **__: None
            loss: Any = self.trainer.strategy.training_step(self.batch, 0)
            module.backward(loss)
            if distributed.defer_gradient_reduction(self.trainer.strategy.model):
                distributed.mean_gradients(module.parameters())
            return self._gradients()

    def unchunked(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradient that the step should make, and what rounding may change in it."""
        with self._undone(), torch.no_grad():
            encode, _ = self._text_encoder()
            embeddings = torch.cat([encode(chunk) for chunk in self.batch.chunks])
        with self._undone():
            exact = self._loss_gradients(embeddings)
            random = 2 * torch.rand_like(embeddings) - 1
            shaken = self._loss_gradients(embeddings * (1 + 1e-6 * random))  # As a similarity is rounded in float32.
            changes = [one - other for one, other in zip(shaken, exact, strict=True)]
            changes[0] += self._eps() * random * exact[0]
        return self._through_encoder(exact), self._through_encoder(changes)

    def _eps(self) -> float:
        """Return how coarse the coarsest numbers are that a gradient passes on its way: weights, or autocast's."""
        dtypes = {parameter.dtype for parameter in self.module.parameters() if parameter.is_floating_point()}
        with self.trainer.precision_plugin.train_step_context():
            device = self.module.device.type
            dtypes |= {torch.get_autocast_dtype(device)} if torch.is_autocast_enabled(device) else set()
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def _loss_gradients(self, embeddings: Tensor) -> list[Tensor]:
        """Return the gradients of the loss as it is defined: of the embeddings, and of its own parameters."""
        inputs = [embeddings.requires_grad_(), *self.loss_parameters]
        with self.trainer.precision_plugin.train_step_context():
            loss = defined_loss(self.module.loss, *joined(embeddings, self.batch))
        return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))

    def _through_encoder(self, arriving: list[Tensor]) -> list[Tensor]:
        """Send a gradient of the embeddings through the encoder, chunk by chunk, and add up over processes."""
        sizes = [len(chunk["attention_mask"]) for chunk in self.batch.chunks]
        with self._undone():
            with torch.random.fork_rng(self.devices):
                encode, features = self._text_encoder()
                for chunk, part in zip(self.batch.chunks, arriving[0].split(sizes), strict=True):
                    _backward([encode(chunk)], [part])
            # All texts have sent their gradients to the features by now. The images draw the same numbers again.
            start = 0
            for group in self.batch.images if any(feature.requires_grad for feature in features) else []:
                with self.trainer.precision_plugin.train_step_context():
                    outputs = self.module.encoder.backbone.encode_images(group)
                _backward(outputs, [feature.grad for feature in features[start : start + len(outputs)]])
                start += len(outputs)
            for parameter, gradient in zip(self.loss_parameters, arriving[1:], strict=True):
                parameter.grad = gradient / distributed.world_size()  # Every process has all of it.
            return [_total(gradient) for gradient in self._gradients()]

    def _text_encoder(self) -> tuple[Callable[[Inputs], Tensor], list[Tensor]]:
        """Return what encodes a chunk, and the images' features, which collect gradients; as the gradient cache does."""
        module, images = self.module, self.batch.images
        context = self.trainer.precision_plugin.train_step_context
        trains_vision = module.encoder.backbone.trains_vision
        apart = not trains_vision or module.engine.graph_bytes > 0
        with torch.no_grad(), context():
            features = module.encoder.encode_images(images) if apart else []
        features = [image.detach().requires_grad_(trains_vision) for image in features]

        def encode(chunk: Inputs) -> Tensor:
            with context():
                # Without features of their own, images are encoded with each chunk, and dropout falls by chunk.
                return module.encoder(chunk, features) if apart else module.engine._encode_with_images(chunk, images)

        return encode, features

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(each) if each.grad is None else each.grad for each in self.parameters]

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


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    reached = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad and pair[1] is not None]
    if reached:
        torch.autograd.backward([output for output, _ in reached], [gradient for _, gradient in reached])


def _total(gradient: Tensor) -> Tensor:
    """Add up over processes, a few million numbers at a time."""
    parts = gradient.flatten().split(2**22)
    return torch.cat([distributed.gather(part[None]).sum(0) for part in parts]).view_as(gradient)


def joined(embeddings: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """Join all processes' batches item by item, as `gather_batch` should: what a loss takes; others' have no gradient."""
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
        cuts = [(weight, queries[:, :size], documents[:, :size]) for size, weight in loss.weights.items()]
        terms = [weight * defined_loss(loss.loss, *vectors, relevance, scores) for weight, *vectors in cuts]
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


def compare(
    gradient: dict[str, float], expected: dict[str, float], difference: dict[str, float], noise: dict[str, float]
) -> tuple[str, str]:
    """Return a table, and what is wrong with the largest group that is wrong. All arguments are norms of each group."""
    lines, complaint = [f"  {'gradient of':<12}{'difference':>12}{'tolerated':>12}"], ""
    for group, norm in sorted(expected.items(), key=lambda entry: entry[1]):
        size = norm or torch.finfo(torch.float32).tiny  # A gradient may be zero.
        apart, tolerated = difference[group] / size, FLOOR + FACTOR * noise[group] / size
        lines.append(f"  {group:<12}{apart:>12.1e}{tolerated:>12.1e}{'  rounding hides errors' * (tolerated > 0.5)}")
        if apart <= tolerated:
            continue
        # How long the gradient is along the expected one, and beside it; a difference may be NaN.
        along = ((gradient[group] / size) ** 2 + 1 - apart**2) / 2
        beside = math.sqrt(max(0.0, (gradient[group] / size) ** 2 - along**2))
        complaint = (
            f"The step's gradient is not that of its loss. Of {group} parameters it differs by {apart:.2g} of its size, "
            f"and rounding explains {tolerated:.2g}. "
        )
        if beside <= max(1e-3, tolerated) * abs(along):
            complaint += (
                f"It is {along:.3g} times what it should be: look for a factor, such as the number of processes."
            )
        else:
            complaint += (
                "It points elsewhere: look at what the step does with the temperature and with the negatives, and "
                "whether dropout falls the same way when a chunk is embedded again."
            )
    return "\n".join(lines), complaint
