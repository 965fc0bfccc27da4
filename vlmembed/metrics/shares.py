"""What several processes measured, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from vlmembed.types import EvaluationSet, Item

#: How many items a message names.
NAMED = 5

#: Bounds the device memory of gathering, where a whole corpus may not fit: rows of each process sent together.
ROWS_PER_GATHER = 2**15


def gather_rows(state: Tensor, device: torch.device, group: Any = None) -> list[Tensor]:
    """Collect the rows of all processes, through the device, as NCCL takes no CPU tensors, and in pieces.

    Args:
        state: (n, width) this process's rows, integers or float32; a process may have none.
        device: Where processes exchange tensors.
        group: Which processes.
    """
    own = torch.tensor([len(state), state.shape[-1], state.dtype == torch.long], device=device)
    height, width, whole = torch.stack(gather_all_tensors(own, group)).amax(0).tolist()
    if not len(state):  # A process without items does not know what the others hold.
        state = torch.empty(0, width, dtype=torch.long if whole else torch.float32)
    pieces = (state[start : start + ROWS_PER_GATHER] for start in range(0, max(1, height), ROWS_PER_GATHER))
    return [part.cpu() for piece in pieces for part in gather_all_tensors(piece.to(device), group)]


def first_rows(rows: Tensor | list[Tensor], count: int) -> tuple[Int64[Tensor, " N"], int]:
    """Find where each of N = count numbers came first.

    Args:
        rows: (n, 1) the numbers that came, in one tensor or several; each below ``count``.
        count: How many should have come.

    Returns:
        The place of each (n where it did not come), and how many did not.
    """
    came = dim_zero_cat(rows)[:, 0] if len(rows) else torch.empty(0, dtype=torch.long)
    first = torch.full((count,), len(came)).scatter_reduce_(0, came, torch.arange(len(came)), "amin")
    return first, int((first == len(came)).sum())


def named(evaluation: EvaluationSet, rows: Sequence[int]) -> str:
    """Name some items of an evaluation set, for a message; the first of them, where there are many.

    Args:
        evaluation: The set.
        rows: Their numbers: its queries first, then its corpus.
    """
    queries = len(evaluation.queries)
    names = [
        _name("query", evaluation.query_names[row], evaluation.queries[row])
        if row < queries
        else _name("document", evaluation.document_names[row - queries], evaluation.corpus[row - queries])
        for row in rows[:NAMED]
    ]
    return ", ".join(names) + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")


def _name(role: str, name: str, item: Item) -> str:
    return f"{role} {name!r}" + (f" ({item.origin})" if item.origin else "")
