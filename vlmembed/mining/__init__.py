"""Hard negatives from an embedder, and scores from a reranker: what is done to training rows between two runs."""

from vlmembed.mining.mine import mine
from vlmembed.mining.score import score

__all__ = ["mine", "score"]
