"""Computing side by side: all that talks to other processes, as the only user of ``torch.distributed``; and threads.

The scheme: every process embeds its own items, gathers everybody's embeddings, and computes the same loss of the joined
batch. The gradients that reach a process's own embeddings, times the number of processes, then make the *mean* that
data-parallel training takes over processes the gradient of the joined batch, for the encoder and for the loss's own
parameters alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

BUCKET_BYTES = 64 * 2**20


def world_size() -> int:
    """Return the number of processes, 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which process this is, 0 where there is no process group."""
    return dist.get_rank() if world_size() > 1 else 0


def print_once(text: str) -> None:
    """Print in the first process only."""
    if rank() == 0:
        print(text)


# Small values


def gather_objects(value: Any) -> list[Any]:
    """Return every process's value, in the order of ranks: plain values, which are pickled on their way."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def total(number: int) -> int:
    """Add a number up over processes."""
    return sum(gather_objects(number))


def largest(number: int, device: torch.device) -> int:
    """Return the largest of all processes' numbers; ``device`` is where the processes talk."""
    if world_size() == 1:
        return number
    reduced = torch.tensor(number, device=device)
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    return int(reduced)


# Rows of a batch


def gather(tensor: Tensor) -> Tensor:
    """Concatenate every process's rows (n, …), in the order of ranks; rows may differ in number.

    The result is the same on every process. Its gradient flows back to this process's own rows only, multiplied by the
    number of processes (see the head of this file).
    """
    if world_size() == 1:
        return tensor
    counts = torch.zeros(world_size(), dtype=torch.long, device=tensor.device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(tensor)], device=tensor.device))
    sizes = counts.tolist()
    # Collectives want equal shapes, so short ranks pad.
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    rows = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    own = rows[rank()] = tensor.view_as(tensor)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * world_size())
    return torch.cat(rows)


def gather_on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """Gather what the host holds, without gradient; ``device`` is where the processes talk."""
    return tensor if world_size() == 1 else gather(tensor.to(device)).cpu()


def first_indices(numbers: Tensor, count: int) -> Tensor:
    """Return where each of 0 … count - 1 comes first in (n,) on the host: whose row counts where several have one."""
    return torch.full((count,), len(numbers)).scatter_reduce(0, numbers, torch.arange(len(numbers)), "amin")


# Gradients


def defer_gradient_reduction(model: nn.Module | None) -> bool:
    """Stop a ``DistributedDataParallel`` wrapper from reducing gradients during backward.

    A step runs one backward per chunk, and the wrapper would reduce (and, meeting a parameter twice, fail) in each.
    The caller reduces once instead, with `mean_gradients`, if this returns true: under DDP, and for what a sharded
    model has not in shards.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = False
        return True
    return model is not None and is_sharded(model)


def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes, in a few large messages; that of shards is a mean already.

    A parameter without gradient counts as zero where another process has one (its batch had images, ours had none),
    and is left alone where none has, as in a single process. Parameters come in the same order on every process.
    """
    trained = [entry for entry in parameters if entry.requires_grad and not isinstance(entry, DTensor)]
    if not trained:
        return
    used = torch.tensor([parameter.grad is not None for parameter in trained], device=trained[0].device).int()
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    gradients = []
    for parameter, is_used in zip(trained, used.tolist(), strict=True):
        if is_used:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    gradients.sort(key=lambda gradient: str(gradient.dtype))
    # Tensors of one dtype go together: those that end in the same so many bytes of all.
    ends = zip(gradients, accumulate(gradient.nbytes for gradient in gradients), strict=True)
    for _, bucket in groupby(ends, lambda end: (end[0].dtype, (end[1] - 1) // BUCKET_BYTES)):
        members = [gradient for gradient, _ in bucket]
        flat = torch.cat([gradient.flatten() for gradient in members])
        dist.all_reduce(flat)
        flat /= world_size()
        for gradient, mean in zip(members, flat.split([gradient.numel() for gradient in members]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm () of all gradients together; some parameters may be in shards, others not."""
    groups = [[weight.grad for weight in group if weight.grad is not None] for group in _by_sharding(parameters)]
    norms = [nn.utils.get_total_norm(group) for group in groups if group]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.stack(whole).norm() if len(whole) > 1 else whole[0] if whole else torch.zeros(())


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients so that their norm, which is ``norm`` now, is no larger than a limit."""
    for group in _by_sharding(parameters):
        nn.utils.clip_grads_with_norm_(group, limit, norm)


def _by_sharding(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters that have a gradient: those in shards, and the others."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    return [[entry for entry in trained if isinstance(entry, DTensor) == sharded] for sharded in (True, False)]


def is_sharded(module: nn.Module) -> bool:
    """Whether a module, or part of it, is in shards (FSDP2)."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: a shard, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


T = TypeVar("T")
R = TypeVar("R")

#: The most threads that share a processor's cores.
LARGEST = 4


def thread_count(device: torch.device) -> int:
    """Return how many computations a device does best at the same time."""
    return min(torch.get_num_threads(), LARGEST) if device.type == "cpu" else 1


@contextmanager
def computing_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Run so many threads, among which PyTorch's cores are divided."""
    cores = torch.get_num_threads()
    try:
        # PyTorch keeps the number for each thread, and its library of products for all: it is given back at the end.
        with ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(max(1, cores // count))) as pool:
            yield pool
    finally:
        torch.set_num_threads(cores)


def in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield what a function makes of items, in their order, while threads are at work on so many behind."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()
