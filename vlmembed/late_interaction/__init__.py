"""Late interaction: several vectors an item, their similarity (MaxSim), and fewer of them (token merging)."""

from vlmembed.late_interaction.maxsim import maxsim
from vlmembed.late_interaction.merging import merge, ward_trees
from vlmembed.late_interaction.vectors import MultiVectors, Vectors, at_least_float32, truncate

__all__ = ["MultiVectors", "Vectors", "at_least_float32", "maxsim", "merge", "truncate", "ward_trees"]
