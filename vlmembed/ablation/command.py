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

from jsonargparse import ArgumentParser, lazy_instance
from jsonargparse.typing import PositiveInt

from vlmembed import cli
from vlmembed.ablation.plan import Ablation, check_trials, plan, read_ablation, read_mapping, remaining
from vlmembed.ablation.probe import run_probe
from vlmembed.ablation.report import write_report
from vlmembed.ablation.run import FIT, Executor, Local, Trial, locked, start
from vlmembed.files import write_whole
from vlmembed.secrets import refuse_secrets_in

#: Steps of the trial that the time is estimated from, and Lightning's epochs where nothing is said.
STEPS, EPOCHS = 6, 1000


def main(words: Sequence[str]) -> None:
    """Run the command: its name, and the command line after that."""
    ablate(words[1:], cli.check)


def ablate(args: Sequence[str], check: Callable[[dict[str, Any]], None], fit: str = FIT) -> None:
    """Run the command.

    Args:
        args: The command line after ``ablate``.
        check: Parses a trial's configuration without building anything; raises a ValueError if it is none.
        fit: The command that trains and measures, before the path of its configuration.

    Raises:
        ValueError: If something holds what looks like a token or a password, or cannot be read.
        SystemExit: With status 1, if a trial has failed or was not done.
    """
    refuse_secrets_in(args)
    command_line = parser()
    options = command_line.parse_args(list(args))
    if "probe" in read_mapping(Path(options.config)):
        run_probe(Path(options.config), options.output_dir)
        return
    ablation = read_ablation(Path(options.config))
    output_dir, jobs = Path(options.output_dir or ablation.output_dir), int(options.jobs or ablation.jobs)
    ablation = replace(ablation, output_dir=output_dir, jobs=jobs)
    if options.report_only:
        print(f"Report: {write_report(ablation.output_dir)}")
        return
    executor = command_line.instantiate_classes(options).executor
    trials = plan(ablation)
    check_trials(trials, check, ablation.path)
    left = remaining(trials, options.retry_failed)
    if options.dry_run:
        _dry_run(trials, left, ablation, executor, fit)
        return
    with locked(ablation.output_dir, patience=0):
        write_whole(ablation.output_dir / "ablation.yaml", ablation.to_yaml().encode())
        start(left, executor, ablation.jobs, fit)
        _conclude(trials, ablation.output_dir)


def parser() -> ArgumentParser:
    """Return the parser of the command's options."""
    command_line = ArgumentParser(
        prog="python -m vlmembed ablate",
        description="Run every setting of a grid with every seed, and report which differences are real. A trial is an "
        "ordinary run of `fit`, in a folder of its own. After an interruption, the same command resumes. With a "
        "`probe` in place of a `grid`, score every pooling without weights of one model, in one pass.",
    )
    files = "the ablation: base, grid, seeds, metric, output_dir; or base, probe, output_dir"
    where = "where trials run: Local, Ray, Slurm, or your own; `--executor Slurm --executor.options '[--gpus=1]'`"
    command_line.add_argument("--config", type=str, required=True, help=files)
    command_line.add_argument("--output_dir", type=str | None, help="where to write, instead of what the file says")
    command_line.add_argument("--jobs", type=PositiveInt | None, help="trials at the same time, instead of the file's")
    command_line.add_argument("--dry_run", action="store_true", help="list the trials and estimate their time")
    command_line.add_argument("--retry_failed", action="store_true", help="run failed trials again")
    command_line.add_argument("--report_only", action="store_true", help="report what has ended; train nothing")
    command_line.add_subclass_arguments(Executor, "executor", default=lazy_instance(Local), help=where)
    return command_line


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
    """Estimate the seconds of a trial, and say how: a few steps, with all measuring, and the others at their pace.

    Raises:
        RuntimeError: If the attempt fails, as the trial would.
    """
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


def _conclude(trials: Sequence[Trial], output_dir: Path) -> None:
    """Report, and fail if a trial has failed."""
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
