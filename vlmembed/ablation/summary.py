"""What the runs of an ablation say: one row per setting, held against the best and the baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev

from vlmembed.ablation.configuration import Ablation, read_ablation
from vlmembed.ablation.results import CONFIGURATION, Result, read_results
from vlmembed.ablation.scores import Scores, read_scores
from vlmembed.ablation.statistics import ALPHA, Comparisons, compare

#: Of each axis, the label.
Labels = Mapping[str, str]


@dataclass(frozen=True)
class Stand:
    """How a setting stands to another.

    Args:
        other: The other one's name.
        difference: The setting's mean less the other's.
        margin: Half the 95 % interval of the difference.
        p_value: After Holm, for all pairs of settings.
    """

    other: str
    difference: float
    margin: float
    p_value: float

    @property
    def found(self) -> bool:
        """Whether it is called a difference."""
        return self.p_value < ALPHA

    @property
    def verdict(self) -> str:
        """The difference in words."""
        return "within noise" if not self.found else "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Row:
    """A setting.

    Args:
        rank: From 1, the best.
        labels: Of each axis, the label.
        runs: The finished ones, by seed; at least one.
        values: The metric that settings are compared by, of each run.
        best: How it stands to the best; None if it is the best.
        baseline: How it stands to its baseline; None if it is that, or that has no finished run.
        is_baseline: Whether others are held against it.
    """

    rank: int
    labels: Labels
    runs: Sequence[Result]
    values: Sequence[float]
    best: Stand | None
    baseline: Stand | None
    is_baseline: bool

    @property
    def name(self) -> str:
        """What the setting is called."""
        return name_of(self.labels)

    @property
    def mean(self) -> float:
        """Over seeds."""
        return mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Over seeds; None where there is one."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def cost(self) -> dict[str, float]:
        """The median over seeds, as a run that was disturbed should not count."""
        return _over_runs([run.cost for run in self.runs], median)

    @property
    def metrics(self) -> dict[str, float]:
        """Everything that was measured, as means over seeds."""
        return _over_runs([run.metrics for run in self.runs], mean)


@dataclass(frozen=True)
class Summary:
    """An ablation, as far as it has come.

    Args:
        folder: Its output folder.
        ablation: What was asked for.
        rows: The settings with a finished run, best first.
        scores: Their queries, in the same order; None where no run has finished.
        failed: The runs that failed.
        missing: Setting and seed of the runs that have not ended.
        surplus: How many other runs the folder holds, which are not asked for and not looked at.
        comparisons: Of all pairs of rows; None where no run has finished.
    """

    folder: Path
    ablation: Ablation
    rows: Sequence[Row]
    scores: Scores | None
    failed: Sequence[Result]
    missing: Sequence[tuple[str, int]]
    surplus: int
    comparisons: Comparisons | None

    @property
    def close(self) -> list[Row]:
        """The settings within noise of the best."""
        return [row for row in self.rows if row.best and not row.best.found]

    @property
    def fewest_seeds(self) -> int:
        """Of any setting with a finished run."""
        return min((len(row.runs) for row in self.rows), default=0)


def summarize(folder: Path) -> Summary:
    """Read an output folder; see ``read_ablation`` and ``read_scores`` for what it raises."""
    ablation = read_ablation(folder / CONFIGURATION)
    ended = {(frozenset(result.setting.items()), result.seed): result for result in read_results(folder)}
    wanted = {
        (frozenset(labels.items()), seed): (name_of(labels), seed)
        for labels in ablation.settings
        for seed in ablation.seeds
    }
    results = [ended[key] for key in wanted if key in ended]
    failed = [result for result in results if result.status == "failed"]
    missing = [run for key, run in wanted.items() if key not in ended]
    rows, scores, comparisons = _compared([result for result in results if result.status == "finished"], ablation)
    return Summary(folder, ablation, rows, scores, failed, missing, len(ended) - len(results), comparisons)


def name_of(labels: Labels) -> str:
    """Return what a setting is called: its labels, in the order of the axes."""
    return " · ".join(labels.values())


def _over_runs(each: Sequence[Mapping[str, float]], average: Callable[[list[float]], float]) -> dict[str, float]:
    names = dict.fromkeys(name for values in each for name in values)
    return {name: average([values[name] for values in each if name in values]) for name in names}


def _compared(results: Sequence[Result], ablation: Ablation) -> tuple[list[Row], Scores | None, Comparisons | None]:
    """Return the rows and their scores, best first, and how they compare."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(name_of(result.setting), []).append(result)
    if not groups:
        return [], None, None
    settings = list(groups.values())
    scores = read_scores(ablation.metric, [[run.folder for run in runs] for runs in settings])
    order = sorted(range(len(settings)), key=lambda index: -scores.settings[index].mean())
    scores = replace(scores, settings=[scores.settings[index] for index in order])
    comparisons = compare(scores.settings)
    rows = _rows([settings[index] for index in order], scores, comparisons, ablation.baseline)
    return rows, scores, comparisons


def _rows(
    settings: Sequence[Sequence[Result]], scores: Scores, comparisons: Comparisons, baseline: Labels
) -> list[Row]:
    """Make the rows; a baseline that leaves an axis open is each setting's own, with the same label there."""
    places = {name_of(runs[0].setting): index for index, runs in enumerate(settings)}
    names = list(places)

    def stand(own: int, other: int | None) -> Stand | None:
        if other is None or own == other:
            return None
        found = (comparisons.differences, comparisons.margins, comparisons.corrected)
        return Stand(names[other], *(float(values[own, other]) for values in found))

    rows = []
    for index, runs in enumerate(settings):
        labels = runs[0].setting
        held = places.get(name_of({**labels, **baseline})) if baseline else None
        values = scores.settings[index].mean(1).tolist()
        rows.append(Row(index + 1, labels, runs, values, stand(index, 0), stand(index, held), held == index))
    return rows
