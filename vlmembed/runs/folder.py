"""The folder of a run: one process has it at a time, and the next one goes on where that one ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning import Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from vlmembed.modules.resuming import rows_written
from vlmembed.runs.checkpoints import DRAFT, newest_checkpoint
from vlmembed.runs.configuration import FILE
from vlmembed.runs.metrics import METRICS, open_log

#: For ``ckpt_path``: the newest whole checkpoint of the newest fit.
LAST = "last"
#: In the folder of a fit, and locked while it runs.
LOCK = "run.lock"
#: Seconds to wait for a folder: the loader workers of a process that was killed take some to go.
PATIENCE = 30.0


@contextmanager
def fit_folder(trainer: Trainer, ckpt_path: str | None) -> Iterator[str | None]:
    """Have a folder to fit in: a new one, or the one of the run that is gone on with.

    Args:
        trainer: Its first logger says where.
        ckpt_path: A checkpoint to begin with; ``last`` to go on with the last run, if there is one.

    Yields:
        The checkpoint to load, if any.

    Raises:
        ValueError: If the folder was asked for by its version, and has a run already.
        TimeoutError: If another process is at work in it.
    """
    logger = _logger(trainer)
    folder = _last_fit(logger) if ckpt_path == LAST else None
    if not _is_first():
        # The folder is the first process's affair. Nobody writes checkpoints before all processes have got this far.
        found = _newest(trainer, folder)
        yield str(found[0]) if found else None if ckpt_path == LAST else ckpt_path
        return
    if ckpt_path == LAST and folder is None:
        print(f"There is no run in {logger.root_dir} to go on with: a new one begins.")
        ckpt_path = None
    with _locked(folder or _claimed(logger)):
        rows = 0
        if folder is not None:
            ckpt_path, rows = _taken_over(trainer, logger, folder)
        open_log(logger, rows)
        yield ckpt_path


@contextmanager
def other_folder(trainer: Trainer, ckpt_path: str | None, writes: bool) -> Iterator[str | None]:
    """Have a folder for what measures or predicts.

    Args:
        trainer: Its first logger says where.
        ckpt_path: A checkpoint; ``last`` for the last run's.
        writes: Whether anything is logged.

    Yields:
        The checkpoint to load, if any.

    Raises:
        ValueError: If there is no such checkpoint, or the folder was asked for by its version, and has a run already.
    """
    logger = _logger(trainer)
    if ckpt_path == LAST:
        found = _newest(trainer, _last_fit(logger))
        if found is None:
            raise ValueError(f"--ckpt_path last: no run in {logger.root_dir} has a whole checkpoint.")
        ckpt_path = str(found[0])
    if writes and _is_first():
        _claimed(logger)
    yield ckpt_path


def _is_first() -> bool:
    """Whether this is the first process, or will be: they do not know each other yet."""
    return not getattr(rank_zero_only, "rank", 0)


def _logger(trainer: Trainer) -> CSVLogger:
    """Return the one whose folder is the run's."""
    logger: Any = trainer.loggers[0]
    return logger


def _last_fit(logger: CSVLogger) -> Path | None:
    """Return the folder of the newest fit, or of the one whose version was asked for."""
    if logger._version is not None:
        folders = [Path(logger.log_dir)]
    else:
        folders = sorted(Path(logger.root_dir).glob("version_*"), key=_number)
    fits = [folder for folder in folders if (folder / LOCK).exists()]
    return fits[-1] if fits else None


def _number(folder: Path) -> int:
    digits = folder.name.removeprefix("version_")
    return int(digits) if digits.isdecimal() else -1


def _claimed(logger: CSVLogger) -> Path:
    """Make a folder that nobody else has: of two processes that begin at the same time, one gets the next version."""
    if logger._version is not None:
        folder = Path(logger.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if any((folder / name).exists() for name in (FILE, METRICS, LOCK)):
            raise ValueError(
                f"{folder} has a run already, which would be written over. Go on with it (fit --ckpt_path last), or "
                "choose another name or version for the logger."
            )
        return folder
    Path(logger.root_dir).mkdir(parents=True, exist_ok=True)
    logger._version = logger._get_next_version()
    while not _is_made(Path(logger.log_dir)):
        logger._version += 1
    return Path(logger.log_dir)


def _is_made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _taken_over(trainer: Trainer, logger: CSVLogger, folder: Path) -> tuple[str | None, int]:
    """Return a locked folder's newest whole checkpoint, if it has one, and how many rows of the log were before it.

    What was half-written is removed.
    """
    logger._version = _number(folder) if logger._version is None else logger._version
    for draft in (path for place in _checkpoint_folders(trainer, folder) for path in place.glob(f"*{DRAFT}")):
        draft.unlink()  # Whoever wrote it was killed.
    found = _newest(trainer, folder)
    if found is None:
        print(f"Going on with {folder}, from its beginning: it has no checkpoint.")
        return None, 0
    path, content = found
    print(f"Going on with {folder}, after step {content['global_step']}: {path.name}.")
    return str(path), rows_written(content) or 0


def _newest(trainer: Trainer, folder: Path | None) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint of a run, if there is a run, and it has one."""
    return None if folder is None else newest_checkpoint(_checkpoint_folders(trainer, folder))


def _checkpoint_folders(trainer: Trainer, folder: Path) -> list[Path]:
    own = [
        Path(each.dirpath)
        for each in trainer.checkpoint_callbacks
        if isinstance(each, ModelCheckpoint) and each.dirpath
    ]
    return [folder / "checkpoints", *own]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise TimeoutError(f"{folder}: another process is at work here. Let it finish, or end it.") from error
    try:
        yield
    finally:
        lock.release()
