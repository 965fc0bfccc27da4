"""Hard negatives from an embedder, and scores from a reranker: what is done to training rows between two runs."""

from vlmembed.mining.mining import mine, score, write_rows

__all__ = ["mine", "score", "write_rows"]
