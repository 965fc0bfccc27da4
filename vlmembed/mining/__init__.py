"""Hard negatives from an embedder, and scores from a reranker: what is done to training rows between two runs."""

from collections.abc import Callable

from vlmembed.mining.mining import mine
from vlmembed.mining.scoring import score, write_rows

__all__ = ["COMMANDS", "mine", "score", "write_rows"]

#: Subcommands of ``python -m vlmembed``.
COMMANDS: dict[str, Callable[..., None]] = {"mine": mine, "score": score}
