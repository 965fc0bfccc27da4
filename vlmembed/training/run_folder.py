"""The folder of a run: one process has it at a time, and a resumed run continues in it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas
import yaml
from filelock import FileLock, Timeout
from jsonargparse import dict_to_namespace
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from vlmembed import distributed
from vlmembed.files import clear_drafts, whole_file
from vlmembed.training.checkpoint_files import is_resumable, newest_checkpoint
from vlmembed.training.checkpointing import RUN, STATE, has_version, model_checkpoints, set_version

#: For ``ckpt_path``: the newest whole checkpoint of the newest fit.
LAST = "last"
CONFIG, METRICS = "config.yaml", "metrics.csv"
#: In the folder of a fit, and locked while it runs.
LOCK = "run.lock"
#: Seconds to wait for a folder: the loader workers of a process that was killed take some to end.
PATIENCE = 30.0

#: What may change when a run is resumed: where it runs, what is measured and what is logged.
HARMLESS = (
    *("config", "weights_only", "model.init_args.graph_memory", "model.init_args.features"),
    "model.init_args.max_skipped_steps",
    *(f"data.init_args.{key}" for key in ("val", "test", "chunk_size", "eval_batch_size", "num_workers")),
    *("data.init_args.on_bad_row", "data.init_args.max_bad_rows"),
    *(f"trainer.{key}" for key in ("accelerator", "barebones", "check_val_every_n_epoch")),
    *(f"trainer.{key}" for key in ("default_root_dir", "detect_anomaly", "exporter", "inference_mode", "logger")),
    *(f"trainer.enable_{key}" for key in ("checkpointing", "model_summary", "progress_bar")),
    *(f"trainer.limit_{stage}_batches" for stage in ("predict", "test", "val")),
    *(f"trainer.{key}" for key in ("log_every_n_steps", "max_time", "num_sanity_val_steps", "plugins", "profiler")),
    "trainer.val_check_interval",
)
CALLBACKS = "trainer.callbacks"
#: Those that decide what is learned, or what is measured and exported of it.
LEARNING = re.compile("WeightAveraging|GradientAccumulationScheduler")
#: What says how a run is resumed, and nothing about the run.
RESUMING = ("ckpt_path", "trainer.allow_changed")


@contextmanager
def fit_folder(trainer: Trainer, ckpt_path: str | None) -> Iterator[str | None]:
    """Have a folder to fit in, where the first logger says: a new one, or that of the run that is resumed.

    ``ckpt_path`` is a checkpoint to begin with, or ``last`` to resume the last run, if there is one. Yields the
    checkpoint to load, if any. A ValueError says that the folder was asked for by its version, and has a run already, a
    TimeoutError that another process is at work in it.
    """
    logger: Any = trainer.loggers[0]
    folder = _last_fit(trainer, logger) if ckpt_path == LAST else None
    if not _is_first_process():
        # The folder is the first process's affair. Nobody writes checkpoints before all processes are here.
        newest = folder and _newest(trainer, folder)
        yield str(newest[0]) if newest else None if ckpt_path == LAST else ckpt_path
        return
    if ckpt_path == LAST and folder is None:
        print(f"There is no run in {logger.root_dir} to resume: a new one begins.")
        ckpt_path = None
    with _locked(folder or _claim(logger)):
        rows = 0
        if folder is not None:
            if not has_version(logger):
                set_version(logger, _number(folder))
            ckpt_path, rows = _take_over(trainer, folder)
        _open_log(logger, rows)
        yield ckpt_path


@contextmanager
def other_folder(trainer: Trainer, ckpt_path: str | None, writes: bool) -> Iterator[str | None]:
    """Have a folder for what measures or predicts, and ``writes`` a log or not; see `fit_folder`."""
    logger: Any = trainer.loggers[0]
    if ckpt_path == LAST:
        folder = _last_fit(trainer, logger)
        newest = folder and _newest(trainer, folder, weights_only=True)
        if not newest:
            raise ValueError(f"--ckpt_path last: no run in {logger.root_dir} has a whole checkpoint.")
        ckpt_path = str(newest[0])
    if writes and _is_first_process():
        _claim(logger)
    yield ckpt_path


def _is_first_process() -> bool:
    """Whether this is the first process, or will be: they do not know each other yet."""
    return not getattr(rank_zero_only, "rank", 0)


def _last_fit(trainer: Trainer, logger: CSVLogger) -> Path | None:
    """Return the folder of the newest fit that has a checkpoint, or of the newest; or of the version asked for."""
    every = sorted(Path(logger.root_dir).glob("version_*"), key=_number)
    folders = [Path(logger.log_dir)] if has_version(logger) else every
    fits = [folder for folder in folders if (folder / LOCK).exists()]
    elsewhere = len(_checkpoint_folders(trainer, Path())) > 1  # Where several runs may have theirs.
    with_checkpoint = (
        folder
        for folder in reversed(fits)
        if any((folder / "checkpoints").rglob("*.ckpt")) or (elsewhere and _newest(trainer, folder, weights_only=True))
    )
    return next(with_checkpoint, fits[-1] if fits else None)


def _number(folder: Path) -> int:
    digits = folder.name.removeprefix("version_")
    return int(digits) if digits.isdecimal() else -1


def _claim(logger: CSVLogger) -> Path:
    """Make a folder that nobody else has: of two processes that begin at the same time, one gets the next version."""
    asked_for, folder = has_version(logger), Path(logger.log_dir)
    if asked_for:
        folder.mkdir(parents=True, exist_ok=True)
        if any((folder / name).exists() for name in (CONFIG, METRICS, LOCK)):
            raise ValueError(
                f"{folder} has a run already, which would be written over. Resume it (fit --ckpt_path last), or "
                "choose another name or version for the logger."
            )
        return folder
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            set_version(logger, _number(folder) + 1)
            folder = Path(logger.log_dir)


def _take_over(trainer: Trainer, folder: Path) -> tuple[str | None, int]:
    """Return a locked folder's newest whole checkpoint, if any, and how many rows of the log were before it."""
    for place in (folder, *_checkpoint_folders(trainer, folder)):
        for parent in {path.parent for path in place.rglob("*.draft")}:
            clear_drafts(parent)  # Half-written; whoever wrote it was killed.
    newest = _newest(trainer, folder)
    if newest is None:
        print(f"Resuming {folder} from its beginning: it has no checkpoint that a run can be resumed from.")
        return None, 0
    path, content = newest
    print(f"Resuming {folder} after step {content['global_step']}: {path.name}.")
    return str(path), content.get(STATE, {}).get("rows", 0)


def _newest(trainer: Trainer, folder: Path, weights_only: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """Find a run's newest whole checkpoint; ``weights_only`` if one from which no run can be resumed will do."""

    def accept(path: Path, content: dict[str, Any]) -> bool:
        run = Path(content.get(RUN) or folder)
        ours = folder in path.parents or run.resolve() == folder.resolve() or not run.exists()  # It was moved.
        return ours and (weights_only or is_resumable(path, content))

    return newest_checkpoint(_checkpoint_folders(trainer, folder), accept)


def _checkpoint_folders(trainer: Trainer, folder: Path) -> list[Path]:
    named = [Path(callback.dirpath) for callback in model_checkpoints(trainer) if callback.dirpath]
    return [folder / "checkpoints", *named]


def _open_log(logger: CSVLogger, count: int) -> None:
    """Let a logger continue the log that is in its folder, behind ``count`` rows: later ones will be logged again."""
    log, writer, rows = Path(logger.log_dir, METRICS), _writer(logger), 0
    if not log.exists() or not log.stat().st_size:
        log.unlink(missing_ok=True)
    elif not count:  # The run begins anew.
        log.rename(log.with_name(f"metrics.{len(list(log.parent.glob('metrics.*.csv'))) + 1}.csv"))
    else:
        table = pandas.read_csv(log, dtype=str, keep_default_na=False, nrows=count)
        with whole_file(log) as draft:
            table.to_csv(draft, index=False)
        writer.metrics_keys, rows = list(table.columns), len(table)
    if rows < count:
        warnings.warn(f"{log} has {rows} of {count} rows: the others are lost.", stacklevel=2)


def _writer(logger: CSVLogger) -> Any:
    """Return what writes a logger's log. It is made in an empty folder, as it would delete the log that is there."""
    folder, version = logger.log_dir, logger.version
    with TemporaryDirectory() as empty:
        set_version(logger, empty)
        writer: Any = logger.experiment
        set_version(logger, version)
    writer.log_dir, writer.metrics_file_path = folder, str(Path(folder, METRICS))
    writer.save = partial(_save, writer)
    return writer


def _save(writer: Any) -> None:
    """Save what was logged; a new column is added beside the log, which Lightning's writer would empty first."""
    path = Path(writer.metrics_file_path)
    columns = sorted({*writer.metrics_keys, *(name for row in writer.metrics for name in row)})
    if columns != writer.metrics_keys and path.exists():
        with whole_file(path) as draft:
            table = pandas.read_csv(path, dtype=str, keep_default_na=False)
            table.reindex(columns=columns, fill_value="").to_csv(draft, index=False)
        writer.metrics_keys = columns
    type(writer).save(writer)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=PATIENCE)
    except Timeout as error:
        raise TimeoutError(f"{folder}: another process is at work here. Let it finish, or end it.") from error
    with lock:
        yield


# The run's configuration


class SaveConfiguration(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder; one that is there, and differs, is kept beside it."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it. Only the first process is here, so nothing is asked that all would have to answer."""
        folder = Path((trainer.loggers and trainer.loggers[0].log_dir) or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path, text = folder / CONFIG, self.parser.dump(self.config, skip_none=False)
        if path.exists():
            if changes(path.read_text(), text).keys() <= set(RESUMING):
                return
            earlier = len(list(folder.glob("config.*.yaml"))) + 1
            path.rename(path.with_name(f"config.{earlier}.yaml"))
        path.write_text(text)


def refuse_changes(before: str, after: str, allowed: Collection[str] = ()) -> None:
    """Say what has changed between a run's configuration, in YAML, and the one that it is to be resumed with.

    A ValueError says what decides what is learned, and would make two runs of one; ``allowed`` keys, and those below
    them, may have changed all the same.
    """
    changed = changes(before, after)
    accepted = (*RESUMING, *HARMLESS, *allowed)
    old, new = map(_learning, changed.get(CALLBACKS, (None, None)))
    if old == new:
        accepted += (CALLBACKS,)
    else:
        changed[CALLBACKS] = old, new
    refused = {key: values for key, values in changed.items() if not _is_below(key, accepted)}
    if refused:
        raise ValueError(
            f"The run began with another configuration, and would not be one run if it were resumed with this one:\n"
            f"{_listed(refused)}\nGo back to what it began with, begin a new run (without --ckpt_path), or allow it by "
            f"name: --trainer.allow_changed '[{', '.join(refused)}]'."
        )
    if accepted_changes := {key: values for key, values in changed.items() if not _is_below(key, RESUMING)}:
        distributed.print_once(f"Changed since the run began:\n{_listed(accepted_changes)}")


def _learning(callbacks: Sequence[Any] | None) -> list[str]:
    """Describe those callbacks that decide what is learned."""
    deciding = [one for one in callbacks or () if LEARNING.search(str(one))]
    return [f"{one.class_path.split('.')[-1]} {one.get('init_args')}" for one in deciding]


def name_changes(before: str, after: str) -> None:
    """Say what of the model has changed since the run whose checkpoint is exported."""
    if changed := {key: values for key, values in changes(before, after).items() if _is_below(key, ("model",))}:
        print(f"The model is not configured as when the checkpoint was trained:\n{_listed(changed)}", flush=True)


def changes(before: str, after: str) -> dict[str, tuple[Any, Any]]:
    """Return what two configurations in YAML say differently: dotted key → both values, None where there is none."""
    old, new = (dict(dict_to_namespace(yaml.safe_load(text) or {}).items()) for text in (before, after))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def _is_below(key: str, parents: Collection[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _listed(changed: dict[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {before!r:.100} → {after!r:.100}" for key, (before, after) in changed.items())
