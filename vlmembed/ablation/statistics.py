"""Which differences between settings are more than noise.

A setting's mean moves for two reasons that have nothing to do with the setting: other queries might have been asked,
and training again with another seed would have given another model. Both are drawn here, each in the way that suits it.

Queries are what is resampled. A query's score is averaged over the seeds first, and all settings are resampled with
the same queries, so that what makes a query easy for everyone cancels (the paired bootstrap: Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993, chapter 16; in retrieval: Sakai, "Evaluating Evaluation Metrics based on the
Bootstrap", SIGIR 2006, and "Statistical Reform in Information Retrieval?", SIGIR Forum 2014; Smucker, Allan and
Carterette, "A Comparison of Statistical Significance Tests for Information Retrieval Evaluation", CIKM 2007, found that
it agrees with the randomisation test and the t-test). Scores of one query under several seeds are not further queries:
to resample them as if they were would claim that every seed brings as much evidence as new queries.

Seeds are too few to resample: a bootstrap of three calls far too much a difference. Nor does any resampling of queries
see a seed that shifts all queries of a run alike. So the variance of that shift is estimated from the runs (as two-way
crossed random effects: Searle, Casella and McCulloch, "Variance Components", 1992), over all settings together, as a
few seeds say little alone. What they leave open about it is drawn too: the variance of the runs' means from its
chi-square distribution, less the part that seeds and single queries make together, which the resampling has already
(Weerahandi, "Exact Statistical Methods for Data Analysis", 1995, on generalized p-values). Where every setting has one
seed nothing is known of it: then the answer is about these trained models alone.

The p-value is the share of draws, under the hypothesis of no difference, that lie at least as far out as the difference
seen. It is corrected after Holm ("A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
Statistics, 1979) over *all* pairs of settings: the best is known only after looking, and a family of the comparisons
with it alone would promise too much.

No test finds every difference. One of two standard errors is found in 52 % of trials by any two-sided test at 5 %, one
of four in 98 %; this one finds 46 % and 97 % among ten settings with three seeds each, 30 % and 91 % if there are only
two of them to learn the variance of seeds from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil

import numpy as np
from jaxtyping import Float64, Int64

#: Below this, corrected, a difference is called one.
ALPHA = 0.05
#: The smallest p-value is one in the number of resamples: with fewer than 20 for each pair, none would pass ALPHA.
RESAMPLES_PER_PAIR = 40
#: Bounds the memory of resampling: this many queries are drawn together (some 64 MiB with all copies).
DRAWS_PER_BLOCK = 2**21
#: Sums in another order differ by this much; no metric that is shown does.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Comparisons:
    """All pairs of K settings: entry (i, j) says how setting i stands to setting j.

    Args:
        differences: Mean of i less mean of j.
        margins: The 95 % interval of the difference reaches this far to both sides. It excludes 0 where ``p_values``,
            not yet corrected, is below 0.05.
        p_values: Two-sided, of each pair by itself.
        corrected: The same after Holm, for the family of all pairs.
        seed_deviation: Standard deviation over seeds of the mean of a run, less what the queries explain: 0 where no
            setting has two seeds.
        draws: How many resamples this rests on.
    """

    differences: Float64[np.ndarray, "K K"]
    margins: Float64[np.ndarray, "K K"]
    p_values: Float64[np.ndarray, "K K"]
    corrected: Float64[np.ndarray, "K K"]
    seed_deviation: float
    draws: int


def compare(scores: Sequence[Float64[np.ndarray, "_ Q"]], resamples: int = 10_000, seed: int = 0) -> Comparisons:
    """Compare every setting with every other. The same arguments give the same numbers.

    Args:
        scores: Of each setting, a row per seed and a column per query; the same queries in all of them. Settings may
            have different numbers of seeds.
        resamples: At least this many; more where there are many pairs, see ``RESAMPLES_PER_PAIR``.
        seed: Of the draws.

    Raises:
        ValueError: If settings have different numbers of queries, fewer than two, no seed, or scores that are not
            finite.
    """
    _check(scores)
    pairs = list(combinations(range(len(scores)), 2))
    draws = max(resamples, RESAMPLES_PER_PAIR * len(pairs))
    generator = np.random.default_rng(seed)
    averaged = np.stack([rows.mean(0) for rows in scores], axis=1)
    variance, seeds = seed_variance(scores), np.array([len(rows) for rows in scores])
    noise = _query_noise(averaged, draws, generator)
    noise += _seed_noise(variance, seeds, draws, generator)
    return _of_noise(averaged.mean(0), noise, pairs, float(np.sqrt(variance.shift)))


def holm(p_values: Float64[np.ndarray, " M"]) -> Float64[np.ndarray, " M"]:
    """Correct the p-values of a family: the smallest times M, the next times M - 1, …, none below one before it."""
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    corrected = np.empty_like(stepped)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


@dataclass(frozen=True)
class SeedVariance:
    """What the means of runs with different seeds tell, over all settings.

    Args:
        between: Variance of the means of a setting's runs.
        within: How much of it comes from seeds acting on each query differently.
        freedom: Degrees of freedom of ``between``; 0 where no setting has two seeds.
    """

    between: float
    within: float
    freedom: int

    @property
    def shift(self) -> float:
        """Variance of the shift that a seed gives to all queries of a run alike."""
        return max(0.0, self.between - self.within)


def seed_variance(scores: Sequence[Float64[np.ndarray, "_ Q"]]) -> SeedVariance:
    """Estimate what another seed changes, each setting with the weight of its degrees of freedom."""
    several = [rows for rows in scores if len(rows) > 1]
    weights = [len(rows) - 1 for rows in several]
    if not several:
        return SeedVariance(0.0, 0.0, 0)
    between = np.average([rows.mean(1).var(ddof=1) for rows in several], weights=weights)
    within = np.average([_residual_variance(rows) / rows.shape[1] for rows in several], weights=weights)
    return SeedVariance(float(between), float(within), sum(weights))


def _residual_variance(rows: Float64[np.ndarray, "S Q"]) -> float:
    """Variance of what neither the seed nor the query alone explains."""
    seeds, queries = rows.shape
    residual = rows - rows.mean(1, keepdims=True) - rows.mean(0) + rows.mean()
    return float((residual**2).sum() / ((seeds - 1) * (queries - 1)))


def _check(scores: Sequence[Float64[np.ndarray, "_ Q"]]) -> None:
    shapes = [rows.shape for rows in scores]
    queries = {shape[1] for shape in shapes}
    if len(queries) > 1 or min(queries, default=2) < 2 or any(not shape[0] for shape in shapes):
        raise ValueError(f"settings must share at least 2 queries and have a seed each, got (seeds, queries) {shapes}")
    for index, rows in enumerate(scores):
        if not np.isfinite(rows).all():
            seed, query = np.argwhere(~np.isfinite(rows))[0].tolist()
            raise ValueError(f"setting {index}, seed {seed}, query {query} has the score {rows[seed, query]}")


def _query_noise(
    averaged: Float64[np.ndarray, "Q K"], draws: int, generator: np.random.Generator
) -> Float64[np.ndarray, "N K"]:
    """How far the means of resampled queries lie from the means of all: the null hypothesis, as its mean is 0."""
    queries, settings = averaged.shape
    # Resamples spread less than samples, by this factor (Hesterberg, "What Teachers Should Know about the Bootstrap",
    # The American Statistician 2015): it shows below 50 queries.
    centred = (averaged - averaged.mean(0)) * np.sqrt(queries / (queries - 1))
    noise = np.empty((draws, settings))
    height = max(1, DRAWS_PER_BLOCK // queries)
    for start in range(0, draws, height):
        block = noise[start : start + height]
        block[:] = _draw_counts(len(block), queries, generator) @ centred / queries
    return noise


def _draw_counts(height: int, queries: int, generator: np.random.Generator) -> Int64[np.ndarray, "N Q"]:
    """How often each query is drawn, in each of some resamples."""
    drawn = generator.integers(queries, size=(height, queries))
    drawn += queries * np.arange(height)[:, None]
    return np.bincount(drawn.ravel(), minlength=height * queries).reshape(height, queries)


def _seed_noise(
    variance: SeedVariance, seeds: Int64[np.ndarray, " K"], draws: int, generator: np.random.Generator
) -> Float64[np.ndarray, "N K"]:
    """What other seeds would add to each mean. Its variance is one estimate, so a draw errs alike in all settings."""
    if not variance.freedom:
        return np.zeros((draws, len(seeds)))
    between = variance.between * variance.freedom / generator.chisquare(variance.freedom, (draws, 1))
    shift = np.maximum(0.0, between - variance.within)
    return generator.standard_normal((draws, len(seeds))) * np.sqrt(shift / seeds)


def _of_noise(
    means: Float64[np.ndarray, " K"], noise: Float64[np.ndarray, "N K"], pairs: list[tuple[int, int]], deviation: float
) -> Comparisons:
    differences = means[:, None] - means
    margins, p_values, corrected = np.zeros((3, *differences.shape))
    p_values[:], corrected[:] = 1.0, 1.0
    # So many draws lie as far out as the margin, or farther, that what lies farther has a p-value below ALPHA.
    rank = max(1, ceil(ALPHA * (1 + len(noise))) - 1)
    for i, j in pairs:
        distance = np.abs(noise[:, i] - noise[:, j])
        margins[i, j] = margins[j, i] = np.partition(distance, -rank)[-rank]
        # One more of each, the sample itself: no p-value is 0 (Davison and Hinkley, "Bootstrap Methods", 1997).
        beyond = 1 + (distance >= abs(differences[i, j]) - ROUNDING).sum()
        p_values[i, j] = p_values[j, i] = beyond / (1 + len(noise))
    upper = tuple(np.array(pairs, dtype=int).reshape(-1, 2).T)
    corrected[upper] = corrected[upper[::-1]] = holm(p_values[upper])
    return Comparisons(differences, margins, p_values, corrected, deviation, len(noise))
