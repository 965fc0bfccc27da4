"""Losses: functions of embeddings, or of scores, and of judgements; and of nothing else."""

from vlmembed.losses.distillation import KLDivergence, MarginMSE, ScoreDistillation
from vlmembed.losses.infonce import InfoNCE
from vlmembed.losses.listwise import ListNet, SoftmaxCrossEntropy
from vlmembed.losses.loss import Loss
from vlmembed.losses.matryoshka import Matryoshka
from vlmembed.losses.pairwise import LambdaRank, RankNet
from vlmembed.losses.pointwise import BinaryCrossEntropy
from vlmembed.losses.ranking import RankingLoss, Targets
from vlmembed.losses.similarity import SimilarityLoss
from vlmembed.losses.weighted_sum import WeightedSum

__all__ = [
    "BinaryCrossEntropy",
    "InfoNCE",
    "KLDivergence",
    "LambdaRank",
    "ListNet",
    "Loss",
    "MarginMSE",
    "Matryoshka",
    "RankNet",
    "RankingLoss",
    "ScoreDistillation",
    "SimilarityLoss",
    "SoftmaxCrossEntropy",
    "Targets",
    "WeightedSum",
]
