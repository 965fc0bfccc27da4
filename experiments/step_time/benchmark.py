"""How long is a training step and how much memory does it take, beside the same step by Sentence Transformers?

Both sides take the same rows, preprocessed already, through the same fresh checkpoint in float32: forward, loss over
seven Matryoshka dimensions, backward, update by SGD. Theirs is MatryoshkaLoss(CachedMultipleNegativesRankingLoss), at
mini-batch 1, at the fastest of several mini-batches, and at the fastest of several token budgets; which those are is
found first. Steps of all contenders alternate in one process; memory is measured in a fresh process each.

    python experiments/step_time/benchmark.py --scenarios abcd          # half an hour; nothing else should run
    python experiments/step_time/benchmark.py --scenarios ef --name memory

    a  vision tower and merger frozen
    b  the same, the tower's features kept: the second epoch and later ones
    c  everything trained, every chunk's graph kept
    d  everything trained, no graph kept, chunks of 4, which take no more memory than theirs of 1
    e  peak memory, no graph kept, at equal chunks
    f  how peak memory grows with the batch, no graph kept
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import checkpoint
import flops
import scenarios
from data import MAX_TOKENS, MIN_TOKENS, pairs
from report import Report, machine
from transformers.utils import logging
from work import Work


def main() -> None:
    options = _options()
    logging.disable_progress_bar()
    config = checkpoint.configuration(options.config)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        checkpoint.write(folder, config, MIN_TOKENS, MAX_TOKENS)
        batch = flops.features(folder, pairs(max(options.batch_sizes)))
        report = Report([flops.summary(config, batch), machine(), f"`benchmark.py {' '.join(sys.argv[1:])}`"])
        frozen, trained = (
            Work(folder, config.get_text_config().hidden_size, what) for what in ("language", "everything")
        )
        for run in _runs(frozen, trained, options):
            run(report)
            report.write(options.output, options.name)  # What there is by now.
    print(report.markdown())


def _runs(frozen: Work, trained: Work, options: argparse.Namespace) -> Iterator[Callable[[Report], None]]:
    for size in options.batch_sizes:
        for work in (frozen, trained):
            letters, rounds = options.scenarios, options.rounds
            yield partial(scenarios.times, work, pairs(size), letters, rounds)
    if "e" in options.scenarios:
        yield from (partial(scenarios.peaks, work, options.repeats) for work in (frozen, trained))
    if "f" in options.scenarios:
        yield partial(scenarios.growth, trained, options.repeats)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", default="abcdef", help="letters of what to run (default: all)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 64], help="pairs per batch (default: 32 64)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each contender (default: 9)")
    parser.add_argument("--repeats", type=int, default=2, help="processes for each figure of memory (default: 2)")
    parser.add_argument(
        "--config", default="wide_tower", help=f"{', '.join(checkpoint.SIZES)}, or a folder with a config.json"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="folder for the results (default: this one)"
    )
    parser.add_argument("--name", default="results", help="of the files NAME.md and NAME.svg (default: results)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
