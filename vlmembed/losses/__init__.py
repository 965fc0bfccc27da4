"""Contrastive losses: functions of embeddings and judgements, and of nothing else."""

from vlmembed.losses.infonce import InfoNCE
from vlmembed.losses.loss import Loss
from vlmembed.losses.matryoshka import Matryoshka
from vlmembed.losses.ranking import RankingLoss, Targets
from vlmembed.losses.similarity import SimilarityLoss

__all__ = ["InfoNCE", "Loss", "Matryoshka", "RankingLoss", "SimilarityLoss", "Targets"]
