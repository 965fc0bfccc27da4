"""Which differences between settings are more than noise: a paired t-test over queries, with the variance of seeds.

A setting's mean moves for two reasons that have nothing to do with the setting: other queries might have been asked,
and training again with another seed would have given another model.

*Queries.* A query's score is averaged over the seeds first, and two settings are compared query by query, so that what
makes a query easy for both cancels. Smucker, Allan and Carterette ("A Comparison of Statistical Significance Tests for
Information Retrieval Evaluation", CIKM 2007) found that the paired t-test agrees with randomisation and the bootstrap.
Scores of one query under several seeds are no further queries.

*Seeds.* A seed shifts all queries of a trial alike, which the variance over queries does not show. The variance of that
shift is estimated from all settings together, because a few seeds say little alone, and is added: the variance of the
trials' means, less what seeds and single queries make together, which the variance over queries has already (two-way
random effects: Searle, Casella and McCulloch, "Variance Components", 1992). Where every setting has one seed nothing is
known of it: then the answer is about these trained models alone.

The degrees of freedom of the sum are those of Satterthwaite ("An Approximate Distribution of Estimates of Variance
Components", Biometrics Bulletin 1946), with the variance of the means whole: what is taken off makes it no surer. With
the difference there, 9 % of ablations without any difference would find one. The p-value is corrected after Holm ("A
Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 1979) over *all* pairs of
settings: the best is known only after looking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float64
from scipy import stats

#: Below this, corrected, a difference is called one.
ALPHA = 0.05
#: Sums in another order differ by this much; no metric that is shown does.
ROUNDING = 1e-12


@dataclass(frozen=True)
class PairwiseComparison:
    """How a setting compares to another."""

    difference: float  # the setting's mean less the other's
    margin: float  # its 95 % interval reaches this far to both sides; it excludes 0 where p_value is below 0.05
    p_value: float  # two-sided, of this pair by itself
    corrected: float  # the same after Holm, for the family of all pairs

    @property
    def verdict(self) -> str:
        """The difference in words."""
        return "within noise" if self.corrected >= ALPHA else "better" if self.difference > 0 else "worse"


def compare(scores: Sequence[Float64[np.ndarray, "_ Q"]]) -> dict[tuple[int, int], PairwiseComparison]:
    """Compare every setting with every other: pair → how its first compares to its second, in both orders.

    ``scores`` has, of each setting, a row per seed and a column per query: the same queries in all of them, at least
    two, all scores finite; settings may have different numbers of seeds.
    """
    _check(scores)
    means = np.stack([rows.mean(0) for rows in scores])  # (K, Q)
    queries, pairs = means.shape[1], list(combinations(range(len(means)), 2))
    # All below has one entry per pair.
    gaps = [means[first] - means[second] for first, second in pairs]  # (Q,) each
    difference = np.array([gap.mean() for gap in gaps])
    # Where nothing varies, a difference is certain, and not a division by 0.
    by_query = np.maximum([gap.var(ddof=1) / queries for gap in gaps], ROUNDING**2)
    between, within, freedom = seed_variance(scores)
    counts = np.array([1 / len(scores[first]) + 1 / len(scores[second]) for first, second in pairs])
    error = np.sqrt(by_query + counts * max(0.0, between - within))
    degrees = error**4 / (by_query**2 / (queries - 1) + (counts * between) ** 2 / max(freedom, 1))
    margin = stats.t.ppf(1 - ALPHA / 2, degrees) * error
    p_value = np.where(abs(difference) <= ROUNDING, 1.0, 2 * stats.t.sf(abs(difference) / error, degrees))
    corrected = holm(p_value)
    comparisons = {}
    for (first, second), *values in zip(
        pairs, *np.stack([difference, margin, p_value, corrected]).tolist(), strict=True
    ):
        comparisons[first, second] = PairwiseComparison(*values)
        comparisons[second, first] = PairwiseComparison(-values[0], *values[1:])
    return comparisons


def seed_variance(scores: Sequence[Float64[np.ndarray, "_ Q"]]) -> tuple[float, float, int]:
    """Estimate what another seed changes, from the settings with several; each counts by its degrees of freedom.

    That is the variance of the means of a setting's trials; how much of it comes from seeds acting on each query
    differently; and the degrees of freedom of the former, 0 where no setting has two seeds.
    """
    several = [rows for rows in scores if len(rows) > 1]
    weights = [len(rows) - 1 for rows in several]
    if not several:
        return 0.0, 0.0, 0
    between = np.average([rows.mean(1).var(ddof=1) for rows in several], weights=weights)
    residuals = [rows - rows.mean(1, keepdims=True) - rows.mean(0) + rows.mean() for rows in several]  # (S, Q) each
    # Of one seed and query, and of the mean over queries.
    single = [(rest**2).sum() / (len(rest) - 1) / (rest.shape[1] - 1) for rest in residuals]
    return float(between), float(np.average(single, weights=weights) / several[0].shape[1]), sum(weights)


def holm(p_values: Float64[np.ndarray, " M"]) -> Float64[np.ndarray, " M"]:
    """Correct the p-values of a family: the smallest times M, the next times M - 1, …, none below one before it."""
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    corrected = np.empty_like(stepped)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def _check(scores: Sequence[Float64[np.ndarray, "_ Q"]]) -> None:
    shapes = [rows.shape for rows in scores]
    queries = {shape[1] for shape in shapes}
    if len(queries) > 1 or min(queries, default=2) < 2 or any(not shape[0] for shape in shapes):
        raise ValueError(f"settings must share at least 2 queries and have a seed each, got (seeds, queries) {shapes}")
    for index, rows in enumerate(scores):
        if not np.isfinite(rows).all():
            seed, query = np.argwhere(~np.isfinite(rows))[0].tolist()
            raise ValueError(f"setting {index}, seed {seed}, query {query} has the score {rows[seed, query]}")
