"""The log of a run, gone on with."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

METRICS = "metrics.csv"

#: The log while it is being taken over.
KEPT = "metrics.csv.kept"


def open_log(logger: CSVLogger, step: int) -> None:
    """Have a logger begin, or go on with the log that is in its folder, where Lightning's would delete it.

    Args:
        logger: Which nothing was logged with.
        step: Rows of this step and later ones are dropped: they are about to be logged again.
    """
    log, kept = Path(logger.log_dir, METRICS), Path(logger.log_dir, KEPT)
    if log.exists():
        os.replace(log, kept)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")
        writer = logger.experiment
    if not kept.exists():
        return
    with kept.open(newline="") as file:
        reader = csv.DictReader(file)
        names = [*(reader.fieldnames or ())]
        rows = [row for row in reader if row["step"] and int(row["step"]) < step]
    if rows:
        draft = log.with_suffix(".draft")
        with draft.open("w", newline="") as file:
            table = csv.DictWriter(file, names)
            table.writeheader()
            table.writerows(rows)
        os.replace(draft, log)
        writer.metrics_keys = names
    kept.unlink()
