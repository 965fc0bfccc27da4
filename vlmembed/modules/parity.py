"""Whether a step's gradient is right: asked once, of the user's own run, before it trains."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Float, Int8
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.functional import normalize

from vlmembed import distributed
from vlmembed.adapters import group_of
from vlmembed.backbones.packing import select
from vlmembed.engine import Engine
from vlmembed.gradcache import Room
from vlmembed.losses import InfoNCE, Loss, Matryoshka
from vlmembed.losses.pairs import CROSS_DIRECTIONS
from vlmembed.modules.embedding import EmbeddingModule
from vlmembed.types import Batch, Inputs

#: How often the gradient without chunks is taken again, rounded otherwise.
ROUNDS = 3
#: What is tolerated: so many times what that changes, and this share of the gradient in any case.
FACTOR, FLOOR = 10.0, 1e-5
#: Where this share is tolerated, a factor of two in the gradient may go unseen.
BLIND = 0.5


class ParityCheck(Callback):
    """Compares a step's gradient with ordinary autograd's before training, and refuses to train if they differ.

    A few items of the first batch go through the step as it will be run: in chunks, some of them embedded twice, over
    all processes, in the run's precision. The same items also go through the encoder with every graph kept, and through
    the loss as its documentation defines it, pair by pair and in float64 (InfoNCE, and Matryoshka around it; any other
    loss is taken as it is, and what is printed says so).

    How far apart the two gradients may be is measured as well. The second one is taken three times more, with all that
    can be rounded otherwise rounded otherwise: the loss in float32, on embeddings of a pass without graphs that are
    changed by as much as a similarity is rounded, and their gradient sent back in two random parts. Ten times what this
    changes (root mean square) is tolerated, and 1e-5 of the gradient in any case, for each group of parameters by
    itself: ``vision``, ``merger``, ``language``, ``pooling`` and ``loss``.

    Everything is left as it was: gradients, random states, buffers, logged values, kept features. The time is that of a
    dozen passes over ``items`` items, the memory that of all their graphs and of three gradients.

    Args:
        items: The most queries and documents to take of each process's batch. Where the backbone reads images together
            with their text, the whole chunks that these are in.
        on_failure: ``raise`` to stop, ``warn`` to train all the same.

    Raises:
        ValueError: If ``items`` has no room for two queries, each with something right and something wrong.
    """

    def __init__(self, items: int = 8, on_failure: Literal["raise", "warn"] = "raise") -> None:
        if items < 6:
            raise ValueError(f"items is 6 or more: two queries, each with something right and wrong; got {items}.")
        self.items = items
        self.on_failure = on_failure

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Check, before the first step.

        Raises:
            RuntimeError: If the step's gradient is another one.
        """
        if trainer.global_step or batch_idx:
            return
        if not isinstance(pl_module, EmbeddingModule):
            raise TypeError(f"ParityCheck knows the step of an EmbeddingModule, not of a {type(pl_module).__name__}.")
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"ParityCheck needs whole weights, and {type(trainer.strategy).__name__} may shard them. Check the run "
                "on one device or with trainer.strategy: ddp, and remove the callback here."
            )
        few = reduced(batch, self.items)
        step = _Step(trainer, pl_module, few)
        expected, noise, graph_bytes = step.unchunked()
        # Less than all graphs take: what is embedded twice is checked, whatever there is room for.
        found = step.chunked(min(pl_module.engine.graph_bytes, graph_bytes / 2))
        difference = step.norms(map(torch.sub, found, expected))
        table, complaint = _compared(step.norms(found), step.norms(expected), difference, noise)
        chunks = f"{len(few.chunks)} chunks" if len(few.chunks) > 1 else "a single chunk (so nothing is chunked)"
        distributed.print_once(
            f"Parity check {'failed' if complaint else 'passed'}, of {len(few.queries)} queries and "
            f"{len(few.documents)} documents in {chunks}{_taken_as_it_is(pl_module.loss)}:\n{table}"
        )
        if complaint and self.on_failure == "raise":
            raise RuntimeError(complaint)
        if complaint:
            warnings.warn(complaint, stacklevel=2)


def _compared(
    found: dict[str, float], expected: dict[str, float], difference: dict[str, float], noise: dict[str, float]
) -> tuple[str, str]:
    """Return a table, and what is wrong: nothing if all is right. All arguments are norms of each group."""
    lines = [f"  {'gradient of':<12}{'difference':>12}{'tolerated':>12}"]
    wrong: dict[float, str] = {}
    for group, norm in expected.items():
        # A gradient may be nothing.
        size = norm or torch.finfo(torch.float32).tiny
        apart, tolerated = difference[group] / size, FLOOR + FACTOR * noise[group] / size
        blind = "" if tolerated < BLIND else "  rounding hides errors"
        lines.append(f"  {group:<12}{apart:>12.1e}{tolerated:>12.1e}{blind}")
        # Also if it is not a number.
        if not apart <= tolerated:
            along = (found[group] ** 2 + size**2 - difference[group] ** 2) / (2 * size**2)
            aside = math.sqrt(max(0.0, (found[group] / size) ** 2 - along**2))
            wrong[size] = (
                f"The step's gradient is not that of its loss. Of {group} parameters it differs by {apart:.2g} of its "
                f"size, and rounding explains {tolerated:.2g}. "
                + _advice(along, straight=aside <= max(1e-3, tolerated) * abs(along))
            )
    return "\n".join(lines), wrong[max(wrong)] if wrong else ""


def _advice(along: float, straight: bool) -> str:
    if straight:
        return (
            f"It is {along:.3g} times what it should be: look for a factor that is missing or there twice, such as the "
            "number of processes."
        )
    return (
        "It points elsewhere: look at what the step does with the temperature and with the negatives, and whether "
        "dropout falls the same way when a chunk is embedded again."
    )


def _taken_as_it_is(loss: Loss) -> str:
    inner = loss.loss if type(loss) is Matryoshka else loss
    return "" if type(inner) is InfoNCE else f" ({type(inner).__name__} is taken as it is)"


class _Step:
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
            group_of(module.encoder.backbone, name) if owner == "backbone" else owner
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
        trained = any(parameter.requires_grad for _, parameter in encoder.backbone.vision_parameters())
        with self._trainer.precision_plugin.train_step_context():
            if trained and not engine.graph_bytes:
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
        queries, documents = rows
        relevance = torch.zeros(len(queries), len(documents), dtype=torch.int8)
        # Right answers last: where examples disagree about a pair, it is one.
        for label, (query, document) in sorted(zip(everywhere(batch.labels), everywhere(batch.pairs), strict=True)):
            relevance[list(queries).index(query), list(documents).index(document)] = label
        asked, answering = (joined[list(row_of.values())] for row_of in rows)
        with self._trainer.precision_plugin.train_step_context():
            return defined_loss(self._module.loss, asked, answering, relevance.to(embeddings.device), dtype)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Leave nothing behind."""
        module, engine = self._module, self._module.engine
        kept = [(tensor, tensor.detach().clone()) for tensor in (*module.buffers(), *module.loss.parameters())]
        vars(module)["log"] = lambda *_, **__: None
        try:
            with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
                yield
        finally:
            del vars(module)["log"]
            module.engine = engine
            module.zero_grad()
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)


def _total(gradient: Tensor) -> Tensor:
    """Add up over processes, a few million numbers at a time."""
    parts = gradient.flatten().split(2**22)
    return torch.cat([distributed.gather(part[None]).sum(0) for part in parts]).view_as(gradient)


def defined_loss(
    loss: Loss,
    queries: Float[Tensor, "Q D"],
    documents: Float[Tensor, "P D"],
    relevance: Int8[Tensor, "Q P"],
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, ""]:
    """Compute a loss as its documentation defines it, one pair after the other.

    Args:
        loss: InfoNCE, or Matryoshka around it; another loss computes itself.
        queries: See `Loss.forward`, for this and the next two.
        documents: Embeddings.
        relevance: Judgements.
        dtype: What to compute in.
    """
    if type(loss) is Matryoshka:
        losses = [
            weight * defined_loss(loss.loss, queries[:, :dimension], documents[:, :dimension], relevance, dtype)
            for dimension, weight in loss.weights.items()
        ]
        return torch.stack(losses).sum()
    if type(loss) is not InfoNCE:
        return loss(queries, documents, relevance)
    with torch.autocast(queries.device.type, enabled=False):
        vectors = {"query": normalize(queries.to(dtype)), "document": normalize(documents.to(dtype))}
        means = []
        for query, answers in enumerate(relevance == 1):
            pairs = [_pair_loss(loss, vectors, relevance, query, int(document)) for document in answers.nonzero()]
            means.append(torch.stack(pairs).mean())
        return torch.stack(means).mean()


def _pair_loss(loss: InfoNCE, vectors: dict[str, Tensor], relevance: Tensor, query: int, document: int) -> Tensor:
    """Compute minus the log of a pair's share in a softmax over itself and its negatives."""
    answers, judged = relevance == 1, relevance != 0
    negatives = {
        "query_to_document": ~answers[query],
        "document_to_query": ~answers[:, document],
        "query_to_query": ~(answers & answers[query]).any(1),
        "document_to_document": ~(judged & judged[:, document, None]).any(0),
    }
    hard = judged[query] & ~answers[query]
    weighed = {"in_batch_negatives": ~judged[query], "hard_negatives": hard, "all_negatives": ~answers[query]}
    scale = loss.fixed_scale if loss.log_scale is None else loss.log_scale.to(vectors["query"].dtype).exp()
    similarity = vectors["query"][query] @ vectors["document"][document]
    own, others = (scale * similarity)[None], []
    for direction in loss.directions:
        source, target = direction.split("_to_")
        similarities = vectors[target] @ vectors[source][query if source == "query" else document]
        logits = scale * similarities
        if direction == "query_to_document":
            logits = logits + loss.hardness * similarities.detach() * weighed[loss.hardness_on]
        kept = negatives[direction]
        if loss.false_negative_margin is not None:
            kept = kept & (similarities <= similarity + loss.false_negative_margin)
        others.append(logits[kept])
    if loss.softmax == "per_direction":
        return -torch.stack([torch.cat([own, each]).log_softmax(0)[0] for each in others]).mean()
    crossed = [direction for direction in loss.directions if direction in CROSS_DIRECTIONS]
    return -torch.cat([own] * max(1, len(crossed)) + others).log_softmax(0)[0]


def reduced(batch: Batch, items: int) -> Batch:
    """Keep some queries and documents of a batch, in the chunks that they are in, and the images that they show.

    Args:
        batch: Of this process.
        items: How many queries and documents to keep, at most. There are two chunks of them if the batch has two.
    """
    sizes = [len(chunk["attention_mask"]) for chunk in batch.chunks]
    places = dict(zip(batch.query_ids.tolist(), batch.queries.tolist(), strict=True))
    places |= zip(batch.document_ids.tolist(), batch.documents.tolist(), strict=True)
    chunk_of_row = [number for number, size in enumerate(sizes) for _ in range(size)]
    chosen = _chosen(batch, items, {item: chunk_of_row[row] for item, row in places.items()})
    kept: list[tuple[Inputs, list[int]]] = []
    rows: list[int] = []
    for chunk, here in zip(batch.chunks, torch.arange(sum(sizes)).split(sizes), strict=True):
        own = [index for index, row in enumerate(here.tolist()) if any(places[item] == row for item in chosen)]
        if own:
            # Where texts hold their images, nothing says which pixels are whose.
            own = own if "images" in chunk else list(range(len(here)))
            kept.append((chunk, own))
            rows += here[own].tolist()
    shown = sorted(set().union(*(_shown(chunk, own) for chunk, own in kept)))
    starts = accumulate((len(group["keys"]) for group in batch.images), initial=0)
    images = [
        (group, [place - start for place in shown if 0 <= place - start < len(group["keys"])])
        for group, start in zip(batch.images, starts, strict=False)
    ]
    queries, documents = (
        {item: rows.index(places[item]) for item in ids.tolist() if item in chosen}
        for ids in (batch.query_ids, batch.document_ids)
    )
    inside = [index for index, pair in enumerate(batch.pairs.tolist()) if chosen.issuperset(pair)]
    return Batch(
        chunks=[_cut(chunk, own, shown) for chunk, own in kept],
        images=[select(group, own) for group, own in images if own],
        queries=torch.tensor([*queries.values()]),
        documents=torch.tensor([*documents.values()]),
        query_ids=torch.tensor([*queries]),
        document_ids=torch.tensor([*documents]),
        pairs=batch.pairs[inside],
        labels=batch.labels[inside],
    )


def _chosen(batch: Batch, items: int, chunk_of: dict[int, int]) -> set[int]:
    """Choose queries, each with a right answer and other judged documents, so that they are in several chunks."""
    families = {query: [query] for query in batch.query_ids.tolist()}
    for _, (query, document) in sorted(zip(batch.labels.tolist(), batch.pairs.tolist(), strict=True), reverse=True):
        families[query].append(document)
    widest = max(families.values(), key=lambda family: len({chunk_of[item] for item in family}))
    home = chunk_of[widest[0]]
    chosen: set[int] = set()
    for family in sorted(
        families.values(), key=lambda family: (family is not widest, all(chunk_of[item] == home for item in family))
    ):
        family[2:] = sorted(family[2:], key=lambda item: chunk_of[item] == home)
        room = min(items - len(chosen), items // 2)
        chosen.update(family[:room] if room >= 2 else [])
    return chosen


def _shown(chunk: Inputs, rows: list[int]) -> set[int]:
    images = chunk["images"].tolist() if "images" in chunk else []
    return {place for row, place in images if row in rows}


def _cut(chunk: Inputs, rows: list[int], shown: list[int]) -> Inputs:
    """Keep some items of a chunk, and number the images anew."""
    if "images" not in chunk:
        return chunk
    positions = chunk["position_ids"].split(chunk["attention_mask"].sum(1).tolist(), dim=1)
    images = [(rows.index(row), shown.index(place)) for row, place in chunk["images"].tolist() if row in rows]
    return {
        "input_ids": chunk["input_ids"][rows],
        "attention_mask": chunk["attention_mask"][rows],
        "position_ids": torch.cat([positions[row] for row in rows], dim=1),
        "images": torch.tensor(images, dtype=torch.long).reshape(-1, 2),
    }
