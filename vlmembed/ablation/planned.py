"""One run as it was planned: a setting, a seed, and the configuration that they make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmembed.ablation.results import read_json
from vlmembed.files import write_whole

#: In a run's folder: what was planned.
PLANNED = "planned.json"


@dataclass(frozen=True)
class Run:
    """A setting and a seed.

    Args:
        folder: Where the run is written: ``settings/<slug>/seed-<n>``.
        setting: Of each axis, the label.
        seed: The seed.
        metric: The name that the run must have logged.
        config: The run's configuration, without what depends on the folder.
    """

    folder: Path
    setting: Mapping[str, str]
    seed: int
    metric: str
    config: dict[str, Any]

    def __str__(self) -> str:
        return ", ".join([*(f"{axis}={label}" for axis, label in self.setting.items()), f"seed {self.seed}"])

    def write(self) -> None:
        """Write ``planned.json``."""
        fields = {name: value for name, value in vars(self).items() if name != "folder"}
        write_whole(self.folder / PLANNED, json.dumps(fields, indent=1).encode())

    @staticmethod
    def read(folder: Path) -> Run:
        """Read what was planned for a folder."""
        return Run(folder, **read_json(folder / PLANNED))

    def located(self) -> dict[str, Any]:
        """The configuration with what makes its folder this one: its log, and the record of what it finds."""
        output = self.folder.parents[2]
        record = {
            "class_path": "vlmembed.ablation.record.Record",
            "init_args": {"documents": str(output / "documents"), "stage": self.metric.split("/")[0]},
        }
        trainer = self.config.get("trainer") or {}
        loggers = [one for one in _listed(trainer.get("logger")) if not _is_csv(one)]
        return self.config | {
            "trainer": trainer
            | {"logger": [csv_logger(self.folder), *loggers], "callbacks": [*_listed(trainer.get("callbacks")), record]}
        }


def csv_logger(folder: Path) -> dict[str, Any]:
    """Return the configuration of the logger that makes a run's folder this one."""
    place = {"save_dir": str(folder.parents[1]), "name": folder.parent.name, "version": folder.name}
    return {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": place}


def _listed(given: Any) -> list[Any]:
    """What Lightning takes as one or as several; true and false say nothing here."""
    return given if isinstance(given, list) else [] if given is None or isinstance(given, bool) else [given]


def _is_csv(logger: Any) -> bool:
    name = logger.get("class_path", "") if isinstance(logger, dict) else logger
    return str(name).endswith("CSVLogger")
