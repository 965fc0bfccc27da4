"""Lightning modules: training and measuring."""

from vlmembed.modules.embedding import EmbeddingModule
from vlmembed.modules.parity import ParityCheck
from vlmembed.modules.schedules import Constant, CosineDecay, LinearDecay

__all__ = ["Constant", "CosineDecay", "EmbeddingModule", "LinearDecay", "ParityCheck"]
