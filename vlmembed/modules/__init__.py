"""Lightning modules: training and measuring."""

from vlmembed.modules.cross_encoder import CrossEncoderModule
from vlmembed.modules.embedding import EmbeddingModule
from vlmembed.modules.module import RetrievalModule
from vlmembed.modules.schedules import Constant, CosineDecay, LinearDecay
from vlmembed.training.parity import ParityCheck

__all__ = [
    "Constant",
    "CosineDecay",
    "CrossEncoderModule",
    "EmbeddingModule",
    "LinearDecay",
    "ParityCheck",
    "RetrievalModule",
]
