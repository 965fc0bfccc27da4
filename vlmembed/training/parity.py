"""A check of the user's own run before it trains: the first step's gradient against ordinary autograd's."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from vlmembed import distributed
from vlmembed.late_interaction import MultiVectors, Vectors
from vlmembed.losses import InfoNCE, Loss, Matryoshka, MergedTokens, WeightedSum
from vlmembed.losses.matryoshka import LossAtSizes
from vlmembed.types import Batch

#: What right steps differ by is rounding: in tests 1e-6 of a group's gradient, and 7e-3 where numbers have 16 bits, as
#: sums come in another order. The smallest error planted there makes 0.2.
TOLERANCE, TOLERANCE_16_BIT = 5e-4, 0.05


class ParityCheck(Callback):
    """Compares the first step's gradient with ordinary autograd's, and refuses to train if they differ.

    The step runs as it will, in its precision and over all processes, and in it all chunks but the last are embedded
    twice. Before each of its batches comes a slow one, which leaves everything as it was: torch's own activation
    checkpointing, and the loss as its documentation defines it, pair by pair in float64 (InfoNCE, also in Matryoshka,
    MergedTokens and WeightedSum; another loss is taken as it is, and the report says so).
    """

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse what cannot be checked. A resumed run was checked when it began."""
        self._expected: dict[str, Tensor] | None = None if trainer.global_step else {}
        self._batches = 0
        if not isinstance(getattr(pl_module, "loss", None), Loss):
            raise TypeError(
                "ParityCheck knows the step of an EmbeddingModule or a MultiVectorModule, not of a "
                f"{type(pl_module).__name__}."
            )
        if distributed.is_sharded(pl_module.encoder):
            raise ValueError("ParityCheck needs whole weights, not shards: check the run with trainer.strategy: ddp.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Add to what the first step's gradient should be."""
        if self._expected is not None:
            for name, gradient in defined_gradients(pl_module, batch).items():
                self._expected[name] = gradient + self._expected.get(name, 0.0)
            self._batches, self._batch = self._batches + 1, batch
            self._graph_bytes = pl_module.grad_cache.graph_bytes
            pl_module.grad_cache.graph_bytes = min(self._graph_bytes, 1.0)

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        """Give graphs their memory back, unless memory ran out meanwhile."""
        if self._expected is not None and pl_module.grad_cache.graph_bytes:
            pl_module.grad_cache.graph_bytes = self._graph_bytes

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Compare; raises a RuntimeError if the step's gradient is another one."""
        if self._expected is None:
            return
        weights = {name: weight for name, weight in pl_module.named_parameters() if weight.requires_grad}
        actual = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}
        if trainer.scaler is not None and not all(gradient.isfinite().all() for gradient in actual.values()):
            self._expected, self._batches = {}, 0  # The scaler skips this step for its scale; the next is checked.
            return
        # A loss's parameters have the whole gradient in every process, the others that of its own embeddings.
        whole = "loss.", "losses."
        parts = {name: part if name.startswith(whole) else _total(part) for name, part in self._expected.items()}
        table, complaint = compare(pl_module, actual, {name: part / self._batches for name, part in parts.items()})
        batch, self._expected = self._batch, None
        loss = pl_module.loss_of(batch.loss)
        losses = {type(part).__name__ for part in loss.modules() if isinstance(part, Loss)}
        others = ", ".join(sorted(losses - {"InfoNCE", "Matryoshka", "MergedTokens", "WeightedSum"}))
        distributed.print_once(
            f"Parity check {'failed' if complaint else 'passed'}, of {len(batch.queries)} queries and "
            f"{len(batch.documents)} documents, chunks: {len(batch.chunks)}"
            f"{others and f' ({others} is taken as it is)'}:\n{table}"
        )
        if complaint:
            raise RuntimeError(complaint)


def defined_gradients(module: Any, batch: Batch) -> dict[str, Tensor]:
    """Return the gradient that a batch should have, by parameter, as far as it goes through this process's items."""
    loss_module = module.loss_of(batch.loss)
    tensors = [(tensor, tensor.detach().clone()) for tensor in (*module.buffers(), *loss_module.parameters())]
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
        with module.trainer.precision_plugin.train_step_context():
            vectors = module.encoder.by_item(_encode(module, batch), batch.chunks)
            loss = defined_loss(loss_module, *joined(vectors, batch))
        gradients = torch.autograd.grad(loss, [*weights.values()], materialize_grads=True)
    with torch.no_grad():
        for tensor, value in tensors:
            tensor.copy_(value)
    return dict(zip(weights, gradients, strict=True))


def _encode(module: Any, batch: Batch) -> Tensor:
    encoder, recomputed = module.encoder, partial(checkpoint, use_reentrant=False)
    if encoder.backbone.trains_vision and not module.grad_cache.graph_bytes:
        # Where no graphs may be kept, a trained tower runs with each chunk, and its dropout falls by chunk.
        return torch.cat([recomputed(encoder.forward_with_images, chunk, batch.images) for chunk in batch.chunks])
    with torch.set_grad_enabled(encoder.backbone.trains_vision):
        images = [recomputed(encoder.backbone.encode_images, images) for images in batch.images]
    features = [feature for chunk in images for feature in chunk]
    return torch.cat([recomputed(encoder, chunk, features) for chunk in batch.chunks])


def _total(gradient: Tensor) -> Tensor:
    """Add up over processes, a few million numbers at a time."""
    parts = gradient.flatten().split(2**22)
    return torch.cat([distributed.gather(part[None]).sum(0) for part in parts]).view_as(gradient)


def joined(embeddings: Vectors, batch: Batch) -> tuple[Any, ...]:
    """Join all processes' batches item by item, as `gather_batch` should; others' have no gradient."""
    queries: dict[int, Tensor] = {}
    documents: dict[int, Tensor] = {}
    judged: dict[tuple[int, int], list[float]] = {}
    # (D,) of each item, or (n, D); copies, as a view would bring all others with it.
    items = embeddings.split() if isinstance(embeddings, MultiVectors) else list(embeddings)
    copies = [item.detach().cpu().clone() for item in items]
    shares = distributed.gather_objects((copies, replace(batch, chunks=[], images=[])))
    for rank, (vectors, part) in enumerate(shares):
        vectors = items if rank == distributed.rank() else [item.to(embeddings.device) for item in vectors]
        # The first counts where several processes have an item, and the highest where they judge a pair.
        for side, ids, rows in (
            (queries, part.query_ids, part.queries),
            (documents, part.document_ids, part.documents),
        ):
            for number, row in zip(ids.tolist(), rows.tolist(), strict=True):
                side.setdefault(number, vectors[row])
        scores = [math.nan] * len(part.pairs) if part.scores is None else part.scores.tolist()
        for (query, document), *labels in zip(part.pairs.tolist(), part.labels.tolist(), scores, strict=True):
            judged[query, document] = max(labels, judged.get((query, document), labels))
    matrix = [[judged.get((query, document), [0, math.nan]) for document in documents] for query in queries]
    relevance, teacher = torch.tensor(matrix, device=embeddings.device).unbind(-1)  # (Q, P)
    sides = [_together([*side.values()], embeddings) for side in (queries, documents)]
    batch_of_all = *sides, relevance.to(torch.int8)
    return batch_of_all if batch.scores is None else (*batch_of_all, teacher)


def _together(items: list[Tensor], like: Vectors) -> Vectors:
    if isinstance(like, MultiVectors):
        return replace(like, vectors=torch.cat(items), lengths=torch.tensor([len(item) for item in items]))
    return torch.stack(items)


def defined_loss(loss: Loss, queries: Vectors, documents: Vectors, relevance: Tensor, *scores: Tensor) -> Tensor:
    """Compute a loss as its documentation defines it, if it is InfoNCE, also inside of losses made of others."""
    terms: list[tuple[Loss, Vectors, Vectors, float]]
    if isinstance(loss, LossAtSizes) and type(loss) in (Matryoshka, MergedTokens):
        sizes = zip(loss.resized(queries, documents), loss.weights.values(), strict=True)
        terms = [(loss.loss, *sides, weight) for sides, weight in sizes]
    elif type(loss) is WeightedSum:
        terms = [(term, queries, documents, weight) for term, weight in loss.terms]
    elif type(loss) is InfoNCE:
        return _defined_infonce(loss, queries, documents, relevance)
    else:
        return loss(queries, documents, relevance, *(scores if loss.label_spec.scores else ()))
    return torch.stack([weight * defined_loss(term, q, d, relevance, *scores) for term, q, d, weight in terms]).sum()


def _similarities(queries: Any, documents: Any) -> Tensor:
    """Compute cosines (Q, P), or MaxSim query by query, of which no products are kept; in float64."""
    if not isinstance(queries, MultiVectors):
        return normalize(queries.double()) @ normalize(documents.double()).T
    rows, counts = normalize(documents.vectors.double()), documents.lengths.tolist()

    def row(query: Tensor) -> Tensor:
        best = [products.max(dim=1).values for products in (query @ rows.T).split(counts, dim=1)]
        return torch.stack([part.mean() if queries.length_normalized else part.sum() for part in best])

    unit = queries.map(lambda vectors: normalize(vectors.double()))
    return torch.stack([checkpoint(row, query, use_reentrant=False) for query in unit.split()])


def _defined_infonce(loss: InfoNCE, queries: Vectors, documents: Vectors, relevance: Tensor) -> Tensor:
    """Average, over queries and their positives, minus the log of a pair's share in a softmax with its negatives."""
    positive, judged, hard = relevance == 1, relevance != 0, relevance == -1
    matrix = _similarities(queries, documents)
    matrices = {"query_to_document": matrix, "document_to_query": matrix.T}
    sides = {"query_to_query": queries, "document_to_document": documents}
    matrices |= {name: _similarities(side, side) for name, side in sides.items() if name in loss.directions}
    # Rows of similarities, taken apart at once: indexing makes a matrix of zeros for each row's gradient.
    similar = {direction: similarities.unbind() for direction, similarities in matrices.items()}
    unweighed = {"in_batch_negatives": -1, "hard_negatives": 0, "all_negatives": 1}[loss.hardness_on]
    scale = loss.fixed_scale if loss.log_scale is None else loss.log_scale.double().exp()
    crossed = len({"query_to_document", "document_to_query"}.intersection(loss.directions))
    losses: list[list[Tensor]] = [[] for _ in range(len(queries))]
    for query, document in positive.nonzero().tolist():
        similarity, logits = similar["query_to_document"][query][document], []
        negatives = {  # Of each direction, which of all candidates are.
            "query_to_document": ~positive[query] if loss.in_batch_negatives else hard[query],
            "document_to_query": ~positive[:, document],
            "query_to_query": ~(positive & positive[query]).any(1),
            "document_to_document": ~(judged & judged[:, document, None]).any(0),
        }
        for direction in loss.directions:
            similarities = similar[direction][query if direction.startswith("query") else document]
            is_negative = negatives[direction]
            if loss.false_negative_margin is not None:
                is_negative = is_negative & (similarities <= similarity + loss.false_negative_margin)
            weight = loss.hardness * (relevance[query] != unweighed) if direction == "query_to_document" else 0.0
            logits.append((scale * similarities + weight * similarities.detach())[is_negative])
        groups = [logits] if loss.softmax == "joint" else [[part] for part in logits]
        pair = [(scale * similarity)[None]] * (max(1, crossed) if loss.softmax == "joint" else 1)
        shares = [torch.cat(pair + group).log_softmax(0)[0] for group in groups]
        losses[query].append(-torch.stack(shares).mean())
    return torch.stack([torch.stack(parts).mean() for parts in losses]).mean()


def compare(module: Any, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, str]:
    """Return a table of the groups of parameters, and what is wrong with the largest that is wrong."""
    squares: dict[str, Tensor] = {}  # Of each group: of the gradient, of the expected one, of their difference.
    for name, gradient in actual.items():
        owner = name.removeprefix("encoder.").split(".")[0]
        group = module.encoder.backbone.group_of(name) if owner == "backbone" else owner
        tensors = gradient, expected[name], gradient - expected[name]
        numbers = torch.stack([torch.linalg.vector_norm(tensor.double()) ** 2 for tensor in tensors]).cpu()
        squares[group] = squares.get(group, torch.zeros(())) + numbers
    is_16_bit = "16" in f"{module.trainer.precision} {module.encoder.dtype}"
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
            f"The step's gradient is not that of its loss. Of {group} parameters it differs by {off:.2g} of its size, "
            f"and rounding explains {tolerance:.2g}. It "
        ) + (
            f"is {along:.3g} times what it should be: look for a factor, such as the number of processes."
            if beside <= max(1e-3, tolerance) * abs(along)
            else "points elsewhere: look at what the step does with the temperature and the negatives, and whether "
            "dropout falls the same way when a chunk is embedded again."
        )
    return "\n".join(lines), complaint
