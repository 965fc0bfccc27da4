"""The vocabulary that every other file speaks.

Shape letters, used in every annotation of the package:

    B  items in a chunk          Q  queries                 H  hidden size of the backbone
    N  items in a batch          P  documents               D  embedding dimension
    L  tokens of an item         C  candidates of a query   K  layers a pooling reads

An *item* is one thing to encode (a query or a document). An *example* is one training row. A *batch* holds each
distinct item of its examples once, cut into *chunks*; a chunk is what goes through the model in one forward pass.
"""

from vlmembed.types.batches import BadRow, Batch, ItemBatch, PairBatch, RankingBatch
from vlmembed.types.evaluation import EvaluationSet, RerankingSet
from vlmembed.types.items import Example, Frame, Inputs, Item, Pair, Part, Role
from vlmembed.types.preprocessor import Prepared, Preprocessor

__all__ = [
    "BadRow",
    "Batch",
    "EvaluationSet",
    "Example",
    "Frame",
    "Inputs",
    "Item",
    "ItemBatch",
    "Pair",
    "PairBatch",
    "Part",
    "Prepared",
    "Preprocessor",
    "RankingBatch",
    "RerankingSet",
    "Role",
]
