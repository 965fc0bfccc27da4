"""How long an ablation will take."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmembed.ablation.executors import Executor
from vlmembed.ablation.planned import Run
from vlmembed.ablation.results import read_result, run_folder
from vlmembed.ablation.run import FIT
from vlmembed.ablation.runner import start

#: Steps that a trial trains for.
STEPS = 6

#: What Lightning trains for where nothing is said.
EPOCHS = 1000


def seconds_of_trial(run: Run, output_dir: Path, executor: Executor, fit: str = FIT) -> tuple[float, str]:
    """Time a few steps of a run, with all the measuring before and after, and count what its other steps would take.

    Args:
        run: The run.
        output_dir: Where the trial's folder is made, for as long as it takes.
        executor: Where it runs.
        fit: The command that trains and measures.

    Returns:
        Seconds of the run, and how they were found.

    Raises:
        RuntimeError: If the trial fails, as the run would.
    """
    trial = output_dir.resolve() / ".trial"
    place = run_folder(trial, run.folder.parent.name, run.seed)
    trainer = run.config.get("trainer") or {}
    wanted = trainer.get("max_steps") or -1
    short = {**run.config, "trainer": {**trainer, "max_steps": STEPS if wanted < 0 else min(STEPS, wanted)}}
    try:
        start([replace(run, folder=place, config=short)], executor, 1, fit)
        result = read_result(place)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    if result is None or result.error is not None:
        raise RuntimeError(f"A trial of {run} failed: {result.error if result else 'it left no result'}")
    left = max(0.0, planned_steps(trainer, result.cost["steps_per_epoch"]) - STEPS)
    step = result.cost["seconds_per_step"]
    return result.seconds + step * left, (
        f"a trial of {run} took {result.seconds:.0f} s with {STEPS} steps, and {left:.0f} more take {step:.3f} s each; "
        "measuring while it trains is not counted"
    )


def planned_steps(trainer: Mapping[str, Any], steps_per_epoch: float) -> float:
    """Return how many steps a trainer's configuration is for; infinite if it names no end."""
    steps, epochs = trainer.get("max_steps") or -1, trainer.get("max_epochs")
    if epochs is None:
        epochs = EPOCHS if steps < 0 else -1
    return min(math.inf if steps < 0 else steps, math.inf if epochs < 0 else epochs * steps_per_epoch)
