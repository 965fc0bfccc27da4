"""``python -m vlmembed ablate``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from jsonargparse import ArgumentParser, Namespace, lazy_instance

from vlmembed.ablation.configuration import Ablation, read_ablation, read_mapping
from vlmembed.ablation.estimate import seconds_of_trial
from vlmembed.ablation.executors import Executor, Local
from vlmembed.ablation.plan import check_runs, plan
from vlmembed.ablation.planned import Run
from vlmembed.ablation.probing import probe
from vlmembed.ablation.report import write_report
from vlmembed.ablation.results import CONFIGURATION, Result, read_result
from vlmembed.ablation.run import FIT, locked
from vlmembed.ablation.runner import start, to_do
from vlmembed.files import write_whole
from vlmembed.secrets import refuse_secrets_in

#: Says with a ValueError what is wrong with a run's configuration.
Check = Callable[[dict[str, Any]], None]


def ablate(args: Sequence[str], check: Check, fit: str = FIT) -> None:
    """Run the command.

    Args:
        args: The command line after ``ablate``.
        check: Tries a run's configuration without building anything.
        fit: The command that trains and measures, before the path of its configuration.

    Raises:
        ValueError: If something holds what looks like a token or a password, or cannot be read.
        SystemExit: With status 1, if a run has failed or could not be done.
    """
    refuse_secrets_in(args)
    made = parser()
    options = made.parse_args(list(args))
    if "probe" in read_mapping(Path(options.config)):
        probe(Path(options.config), options.output_dir)
        return
    ablation = _ablation(options)
    if options.report_only:
        _report(ablation.output_dir)
        return
    executor = made.instantiate_classes(options).executor
    runs = plan(ablation)
    check_runs(runs, check, ablation.path)
    left = to_do(runs, options.retry_failed)
    if options.dry_run:
        _list(runs, left)
        print(_estimate(runs, left, ablation, executor, fit))
        return
    with locked(ablation.output_dir, patience=0):
        write_whole(ablation.output_dir / CONFIGURATION, ablation.to_yaml().encode())
        start(left, executor, ablation.jobs, fit)
        _conclude(runs, ablation.output_dir)


def parser() -> ArgumentParser:
    """Return the parser of the command's options."""
    made = ArgumentParser(
        prog="python -m vlmembed ablate",
        description="Run every setting of a grid with every seed, and report which differences are real. A run is an "
        "ordinary one of `fit`, in a folder of its own. After an interruption, the same command goes on where it was. "
        "With a `probe` in place of a `grid`, score every pooling without weights of one model, in one pass.",
    )
    made.add_argument(
        "--config",
        type=str,
        required=True,
        help="the ablation: base, grid, seeds, metric, output_dir; or base, probe, output_dir",
    )
    made.add_argument("--output_dir", type=str | None, help="where to write, instead of what the file says")
    made.add_argument("--jobs", type=int | None, help="runs at the same time, instead of what the file says")
    made.add_argument("--dry_run", action="store_true", help="list the runs and estimate their time; train none")
    made.add_argument("--retry_failed", action="store_true", help="run those again that have failed")
    made.add_argument("--report_only", action="store_true", help="write the report of what there is; train nothing")
    made.add_subclass_arguments(
        Executor,
        "executor",
        default=lazy_instance(Local),
        help="where runs run: Local, Ray, Slurm, or your own; `--executor Slurm --executor.options '[--gpus=1]'`",
    )
    return made


def _ablation(options: Namespace) -> Ablation:
    ablation = read_ablation(Path(options.config))
    output_dir = ablation.output_dir if options.output_dir is None else Path(options.output_dir)
    jobs = ablation.jobs if options.jobs is None else options.jobs
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}; give 1 or more.")
    return replace(ablation, output_dir=output_dir, jobs=jobs)


def _list(runs: Sequence[Run], left: Sequence[Run]) -> None:
    for run in runs:
        result = read_result(run.folder)
        state = "to do" if run in left or result is None else result.status
        print(f"{state:>8}  {run}")
    print(f"{len(runs)} runs, {len(left)} to do.")


def _estimate(runs: Sequence[Run], left: Sequence[Run], ablation: Ablation, executor: Executor, fit: str) -> str:
    if not left:
        return "Nothing is left to do."
    seconds = [each.seconds for each in _results(runs) if each.status == "finished"]
    if seconds:
        each, how = mean(seconds), f"the mean of {len(seconds)} that have finished is {mean(seconds):.0f} s"
    else:
        print("None has finished, so the first is tried for its time.")
        each, how = seconds_of_trial(left[0], ablation.output_dir, executor, fit)
    rounds = -(-len(left) // ablation.jobs)
    return f"About {_duration(each * rounds)} for {len(left)} runs, {ablation.jobs} at the same time: {how}."


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _results(runs: Sequence[Run]) -> list[Result]:
    return [result for run in runs if (result := read_result(run.folder)) is not None]


def _conclude(runs: Sequence[Run], output_dir: Path) -> None:
    """Report, and fail if a run has."""
    results = _results(runs)
    failed = [result for result in results if result.status == "failed"]
    if len(failed) < len(results):
        _report(output_dir)
    for run in runs:
        result = read_result(run.folder)
        if result is None:
            print(f"{run} was not done.", file=sys.stderr)
        elif result.error is not None:
            print(f"{run} has failed, see {run.folder / 'log.txt'}; --retry_failed runs it again.", file=sys.stderr)
    if failed or len(results) < len(runs):
        sys.exit(1)


def _report(output_dir: Path) -> None:
    print(f"Report: {write_report(output_dir)}")
