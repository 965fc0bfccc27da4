"""``python -m vlmembed ablate``: plan, estimate, run, report."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from vlmembed import cli
from vlmembed.ablation.plan import Ablation, check_trials, parse, plan, remaining
from vlmembed.ablation.probe import run_probe
from vlmembed.ablation.report import write_report
from vlmembed.ablation.run import FIT, Executor, Trial, locked, start
from vlmembed.files import clear_drafts, write_whole

#: Steps of the trial that the time is estimated from, and Lightning's epochs where nothing is said.
STEPS, EPOCHS = 6, 1000


def main(words: Sequence[str]) -> None:
    """Run the command: its name, and the command line after that."""
    ablate(words[1:], cli.check)


def ablate(args: Sequence[str], check: Callable[[dict[str, Any]], None], fit: str = FIT) -> None:
    """Run the command line after ``ablate``; the exit status is 1 if a trial has failed or was not done.

    ``check`` parses a trial's configuration without building anything, and raises a ValueError if it is none. ``fit``
    is the command that trains and measures, before the path of its configuration.
    """
    ablation, options = parse(args)
    output_dir = ablation.output_dir
    if options.probe is not None:
        run_probe(ablation.base, ablation.set, options.probe, output_dir)
        return
    if options.report_only:
        print(f"Report: {write_report(output_dir)}")
        return
    trials = plan(ablation)
    check_trials(trials, check, ablation.path)
    left = remaining(trials, options.retry_failed)
    if options.dry_run:
        _dry_run(trials, left, ablation, options.executor, fit)
        return
    with locked(output_dir, patience=0):
        for folder in (output_dir, *output_dir.glob("documents/**/")):
            clear_drafts(folder)
        write_whole(output_dir / "ablation.yaml", ablation.to_yaml().encode())
        start(left, options.executor, ablation.jobs, fit)
        ended = [trial.ended() for trial in trials]
        if any(trial.status == "finished" for trial in ended):
            print(f"Report: {write_report(output_dir)}")
    for trial in ended:
        if trial.status == "planned":
            print(f"{trial} was not done.", file=sys.stderr)
        elif trial.status == "failed":
            print(f"{trial} has failed, see {trial.folder / 'log.txt'}; --retry_failed runs it again.", file=sys.stderr)
    if any(trial.status != "finished" for trial in ended):
        sys.exit(1)


def _dry_run(trials: Sequence[Trial], left: Sequence[Trial], ablation: Ablation, executor: Executor, fit: str) -> None:
    """List the trials, and estimate how long those take that are left."""
    ended = [trial.ended() for trial in trials]
    for trial, end in zip(trials, ended, strict=True):
        print(f"{'to do' if trial in left else end.status:>8}  {trial}")
    print(f"{len(trials)} trials, {len(left)} to do.")
    if not left:
        return
    finished = [trial.seconds for trial in ended if trial.status == "finished"]
    if finished:
        seconds, source = mean(finished), f"the mean of {len(finished)} that have finished is {mean(finished):.0f} s"
    else:
        print("None has finished, so the first is tried for its time.")
        seconds, source = time_trial(left[0], ablation.output_dir, executor, fit)
    total = seconds * -(-len(left) // ablation.jobs)
    units = (("h", 3600), ("min", 60))
    duration = next((f"{total / size:.1f} {unit}" for unit, size in units if total >= 2 * size), f"{total:.0f} s")
    print(f"About {duration} for {len(left)} trials, {ablation.jobs} at the same time: {source}.")


def time_trial(trial: Trial, output_dir: Path, executor: Executor, fit: str) -> tuple[float, str]:
    """Estimate the seconds of a trial, and say how: a few steps, with all measuring, and the others at their pace."""
    attempt = output_dir.resolve() / ".trial"
    folder = attempt.joinpath(*trial.folder.parts[-3:])
    trainer = trial.config.get("trainer") or {}
    wanted = trainer.get("max_steps") or -1
    short = {**trial.config, "trainer": {**trainer, "max_steps": STEPS if wanted < 0 else min(STEPS, wanted)}}
    try:
        attempted = replace(trial, folder=folder, config=short)
        start([attempted], executor, 1, fit)
        attempted = attempted.ended()
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
    if attempted.status != "finished":
        raise RuntimeError(f"An attempt at {trial} failed: {attempted.error or 'it left no result'}")
    left = max(0.0, planned_steps(trainer, attempted.cost["steps_per_epoch"]) - STEPS)
    step = attempted.cost["seconds_per_step"]
    source = f"an attempt at {trial} took {attempted.seconds:.0f} s with {STEPS} steps, and {left:.0f} more take "
    return attempted.seconds + step * left, f"{source}{step:.3f} s each; measuring while it trains is not counted"


def planned_steps(trainer: Mapping[str, Any], steps_per_epoch: float) -> float:
    """Return how many steps a trainer's configuration is for; infinite if it names no end."""
    steps, epochs = trainer.get("max_steps") or -1, trainer.get("max_epochs")
    if epochs is None:
        epochs = EPOCHS if steps < 0 else -1
    return min(math.inf if steps < 0 else steps, math.inf if epochs < 0 else epochs * steps_per_epoch)
