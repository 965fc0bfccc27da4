"""The log of a run, gone on with."""

from __future__ import annotations

import csv
import io
import os
import warnings
from itertools import islice
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from vlmembed.files import write_whole

METRICS = "metrics.csv"

#: The log while it is being taken over.
KEPT = "metrics.csv.kept"


def open_log(logger: CSVLogger, count: int) -> None:
    """Have a logger begin, or go on with the log that is in its folder, where Lightning's would delete it.

    Args:
        logger: Which nothing was logged with.
        count: How many rows of it to keep; later ones are about to be logged again.
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
        rows = [*islice(reader, count)]
    if rows:
        text = io.StringIO()
        table = csv.DictWriter(text, names)
        table.writeheader()
        table.writerows(rows)
        write_whole(log, text.getvalue().encode())
        writer.metrics_keys = names
    kept.unlink()
