"""Handwritten numbers to find among few candidates, so that a reranker is measured on what the others are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vlmembed.data import EvaluationSource
from vlmembed.data.digits import HandwrittenNumbersEvaluation
from vlmembed.types import EvaluationSet


@dataclass(eq=False)
class HandwrittenCandidates(EvaluationSource):
    """Numbers in words, to find among all images of the number and some others, drawn at random.

    Args:
        split: As of ``HandwrittenNumbersEvaluation``.
        others: How many images of other numbers a query has among its candidates.
        seed: Draws the images and the candidates.
    """

    split: Literal["val", "test"] = "test"
    others: int = 45
    seed: int = 0

    def load(self) -> EvaluationSet:
        """Draw the candidates of each query."""
        evaluation = HandwrittenNumbersEvaluation(self.split, self.seed).load()
        generator, candidates = np.random.default_rng(self.seed), []
        names = np.array(evaluation.document_names)
        for query in evaluation.query_names:
            is_relevant = np.isin(names, [*evaluation.qrels[query]])
            others = generator.choice(np.flatnonzero(~is_relevant), self.others, replace=False)
            candidates.append(generator.permutation([*np.flatnonzero(is_relevant), *others]).tolist())
        return replace(evaluation, candidates=candidates)
