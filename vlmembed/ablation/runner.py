"""Running what has not been run yet, and nothing twice."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vlmembed.ablation.executors import Executor
from vlmembed.ablation.plan import differences
from vlmembed.ablation.planned import PLANNED, Run
from vlmembed.ablation.results import Result, read_result, read_results
from vlmembed.ablation.run import FIT


def to_do(runs: Sequence[Run], retry_failed: bool = False) -> list[Run]:
    """Return the runs that are left, in order.

    Args:
        runs: All runs.
        retry_failed: Whether those that failed are left as well.

    Raises:
        ValueError: If what has ended is not what is planned now.
    """
    ended = {run.folder: result for run in runs if (result := read_result(run.folder)) is not None}
    again = {folder for folder, result in ended.items() if retry_failed and result.status == "failed"}
    for run in runs:
        if run.folder in ended and run.folder not in again:
            _refuse_changed(run, ended[run.folder])
    _refuse_unplanned(runs)
    return [run for run in runs if run.folder not in ended or run.folder in again]


def start(runs: Sequence[Run], executor: Executor, jobs: int, fit: str = FIT) -> None:
    """Do some runs, each in a process of its own, and wait for them.

    Args:
        runs: What is to be done. What earlier attempts have left in their folders is removed.
        executor: Where they run.
        jobs: How many at the same time.
        fit: The command that trains and measures, before the path of its configuration.
    """
    for run in runs:
        run.write()
    commands = [[sys.executable, "-m", "vlmembed.ablation.run", str(run.folder), "--fit", fit] for run in runs]
    if commands:
        executor.run(commands, jobs)


def _refuse_changed(run: Run, result: Result) -> None:
    changed = differences(Run.read(run.folder), run)
    if changed:
        way = ", run with --retry_failed" if result.status == "failed" else ""
        raise ValueError(
            f"{run.folder / PLANNED}: {run} has {result.status} with another configuration: {'; '.join(changed)}. Undo "
            f"the change, delete that folder to run it again{way}, or give another --output_dir."
        )


def _refuse_unplanned(runs: Sequence[Run]) -> None:
    """A report would show runs that the configuration does not have any more."""
    if not runs:
        return
    output = runs[0].folder.parents[2]
    others = {result.folder for result in read_results(output)} - {run.folder for run in runs}
    if others:
        names = ", ".join(str(folder.relative_to(output)) for folder in sorted(others)[:3])
        raise ValueError(
            f"{output} has {len(others)} runs that are not in the configuration (any more), such as {names}. Put them "
            "back into its grid or seeds, delete their folders, or give another --output_dir."
        )
