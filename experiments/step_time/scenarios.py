"""What is compared, and how it should come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

from data import Pair
from memory import Measurement
from ours import Ours, Setting
from race import Race, race
from report import Report, Row
from theirs import Theirs
from work import Contender, Work

MINI_BATCHES = (1, 2, 4, 8, 16, 32)
TOKEN_BUDGETS = (256, 512, 1024)
TITLES = {"language": "frozen tower", "everything": "all trained", "lora": "LoRA"}
#: Rounds of the search for their best setting.
TRIALS = 3


@dataclass(frozen=True)
class Timed:
    """A step of ours, which of theirs it is held against, and how many times as fast it should be."""

    letter: str
    title: str
    trained: Literal["everything", "language"]
    setting: Setting
    against: Literal["mini-batch 1", "best mini-batch"]
    at_least: float


TIMED = [
    Timed("a", "frozen tower", "language", Setting(), "best mini-batch", 1.8),
    Timed("b", "frozen tower, later epochs", "language", Setting(keep_features=True), "best mini-batch", 3.0),
    Timed("c", "all trained, graphs kept", "everything", Setting(), "best mini-batch", 1.25),
    # No more memory than theirs at mini-batch 1, the inputs included: row e says so.
    Timed("d", "all trained, chunks of 4", "everything", Setting(4, retain=False), "mini-batch 1", 1.8),
]


def times(work: Work, pairs: Sequence[Pair], letters: str, rounds: int, report: Report) -> None:
    """Race our steps against theirs, over one batch: from the second step on it is another epoch."""
    timed = [scenario for scenario in TIMED if scenario.letter in letters and scenario.trained == work.trained]
    if not timed:
        return
    size = int(_fastest({str(size): Theirs(work, size) for size in MINI_BATCHES}, pairs))
    tokens = int(_fastest({str(tokens): Theirs(work, 32, tokens) for tokens in TOKEN_BUDGETS}, pairs))
    theirs = {
        "mini-batch 1": Theirs(work, 1),
        "best mini-batch": Theirs(work, size),
        "token budget": Theirs(work, 32, tokens),
    }
    our_sides = {f"({scenario.letter})": Ours(work, scenario.setting) for scenario in timed}
    result = race(_steps({**our_sides, **theirs}, pairs), rounds)
    for scenario in timed:
        ratio = result.ratio(f"({scenario.letter})", scenario.against)
        title = f"{scenario.letter}) {scenario.title}, batch {len(pairs)}, against {scenario.against}"
        report.rows.append(Row(title, ratio, "≥", scenario.at_least))
    notes = {"best mini-batch": f" ({size})", "token budget": f" ({tokens})"}
    _add_seconds(report, result, f"{TITLES[work.trained]}, batch {len(pairs)}", list(our_sides), notes)


def peaks(work: Work, repeats: int, report: Report) -> None:
    """Compare peak memory at equal chunks, of 1 item and of 8, and as in scenario d, of 4 and of 1."""
    sides = [("ours", 1), ("theirs", 1), ("ours", 8), ("theirs", 8), ("ours", 4)]
    found = {
        (side, chunk): _peaks(_measurement(side, work, batch_size=64, chunk=chunk), repeats, report)
        for side, chunk in sides
    }
    for our, their in ((1, 1), (8, 8), (4, 1)):
        title = f"e) peak memory, {TITLES[work.trained]}, our chunks of {our}, their mini-batches of {their}"
        report.rows.append(_space_row(title, found["ours", our], found["theirs", their], 1.0))


def growth(work: Work, repeats: int, report: Report) -> None:
    """See how peak memory grows with the batch; theirs for comparison."""
    for side, limit in (("ours", 1.1), ("theirs", None)):
        found = {
            size: _peaks(_measurement(side, work, batch_size=size, chunk=8), repeats, report, with_inputs=False)
            for size in (32, 256)
        }
        title = f"f) peak memory, {TITLES[work.trained]}, batch 256 to batch 32, {side}"
        report.rows.append(_space_row(title, found[256], found[32], limit))


def _measurement(side: str, work: Work, batch_size: int, chunk: int) -> Measurement:
    return Measurement(side, str(work.checkpoint), work.hidden_size, work.trained, batch_size, chunk)


def _steps(contenders: Mapping[str, Contender], pairs: Sequence[Pair]) -> dict[str, Callable[[], float]]:
    return {name: partial(contender.step, contender.prepare(pairs)) for name, contender in contenders.items()}


def _fastest(contenders: Mapping[str, Contender], pairs: Sequence[Pair]) -> str:
    return race(_steps(contenders, pairs), TRIALS).fastest()


def _peaks(measurement: Measurement, repeats: int, report: Report, with_inputs: bool = True) -> list[int]:
    found = [measurement.peak(with_inputs) for _ in range(repeats)]
    cells = [measurement.side, TITLES[measurement.trained], str(measurement.batch_size), str(measurement.chunk)]
    mebibytes = [bytes / 2**20 for bytes in found]
    spread = f"{min(mebibytes):.1f}–{max(mebibytes):.1f}"
    columns = ("side", "work", "batch", "chunk", "MiB, median", "range")
    report.add("Peak memory of a step", columns, (*cells, f"{median(mebibytes):.1f}", spread))
    return found


def _space_row(title: str, found: list[int], reference: list[int], limit: float | None) -> Row:
    value = median(found) / median(reference)
    return Row(title, (value, min(found) / max(reference), max(found) / min(reference)), "≤", limit)


def _add_seconds(report: Report, result: Race, work: str, ours: Sequence[str], notes: Mapping[str, str]) -> None:
    columns = ("work", "step", "seconds, median", "quartiles", "times ours", "loss, first and last")
    for name in result.seconds:
        low, middle, high = result.spread(name)
        ratios = ", ".join(f"{one} {result.ratio(one, name)[0]:.2f}" for one in ours if one != name)
        losses = f"{result.losses[name][0]:.4f}, {result.losses[name][-1]:.4f}"
        line = (work, name + notes.get(name, ""), f"{middle:.4f}", f"{low:.4f}–{high:.4f}", ratios, losses)
        report.add("Seconds of a step", columns, line)
