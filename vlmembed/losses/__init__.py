"""Losses: functions of embeddings and relevance, or of scores and labels; of nothing else."""

# ruff: noqa: F401

from vlmembed.losses.base import LabelSpec, Loss, RankingLoss
from vlmembed.losses.distillation import CoSENT, KLDivergence, MarginMSE, ScoreDistillation
from vlmembed.losses.infonce import InfoNCE
from vlmembed.losses.matryoshka import Matryoshka, MergedTokens, WeightedSum
from vlmembed.losses.ranking import BinaryCrossEntropy, LambdaRank, ListNet, RankNet, SoftmaxCrossEntropy
