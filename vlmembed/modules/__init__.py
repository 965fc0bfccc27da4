"""Lightning modules: training and measuring."""

from vlmembed.modules.base import RetrievalModule
from vlmembed.modules.cross_encoder import CrossEncoderModule
from vlmembed.modules.embedding import EmbeddingModule
from vlmembed.modules.multi_vector import MultiVectorModule
from vlmembed.modules.optimization import Constant, CosineDecay, LinearDecay
from vlmembed.training.parity import ParityCheck

__all__ = [
    "Constant",
    "CosineDecay",
    "CrossEncoderModule",
    "EmbeddingModule",
    "LinearDecay",
    "MultiVectorModule",
    "ParityCheck",
    "RetrievalModule",
]
