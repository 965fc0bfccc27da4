"""What has changed between the configuration that a run began with and the one that it is to go on with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import yaml

from vlmembed import distributed

#: What may change while a run goes on as before: where it runs, what is measured and what is kept of it.
HARMLESS = (
    "config",
    "weights_only",
    "data.init_args.val",
    "data.init_args.test",
    "data.init_args.chunk_size",
    "data.init_args.eval_batch_size",
    "data.init_args.num_workers",
    "data.init_args.on_bad_row",
    "data.init_args.max_bad_rows",
    "model.init_args.graph_memory",
    "model.init_args.features",
    "model.init_args.max_skipped_steps",
    "trainer.accelerator",
    "trainer.barebones",
    "trainer.callbacks",
    "trainer.check_val_every_n_epoch",
    "trainer.default_root_dir",
    "trainer.detect_anomaly",
    "trainer.enable_checkpointing",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.exporter",
    "trainer.inference_mode",
    "trainer.limit_predict_batches",
    "trainer.limit_test_batches",
    "trainer.limit_val_batches",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.max_time",
    "trainer.num_sanity_val_steps",
    "trainer.plugins",
    "trainer.profiler",
    "trainer.val_check_interval",
)

#: What says how a run is gone on with, and nothing about the run.
RESUMING = {"ckpt_path", "trainer.allow_changed"}


def refuse_changes(before: str, after: str, allowed: Collection[str] = ()) -> None:
    """Say what has changed, and refuse what would make one run of two.

    Args:
        before: The configuration that the run began with, in YAML.
        after: The one that it is to go on with.
        allowed: Keys that may have changed all the same, those below them included.

    Raises:
        ValueError: If anything else has changed that decides what is learned.
    """
    found = changes(before, after)
    accepted = {key: values for key, values in found.items() if _is_below(key, (*RESUMING, *HARMLESS, *allowed))}
    refused = {key: values for key, values in found.items() if key not in accepted}
    if refused:
        raise ValueError(
            f"The run began with another configuration, and would not be one run if it went on with this one:\n"
            f"{_listed(refused)}\nGo back to what it began with, begin a new run (without --ckpt_path), or allow it by "
            f"name: --trainer.allow_changed '[{', '.join(refused)}]'."
        )
    told = {key: values for key, values in accepted.items() if key not in RESUMING}
    if told:
        distributed.print_once(f"Changed since the run began:\n{_listed(told)}")


def changes(before: str, after: str) -> dict[str, tuple[Any, Any]]:
    """Return what two configurations in YAML say differently: dotted key → both values, None where there is none."""
    old, new = (dict(_leaves("", yaml.safe_load(text) or {})) for text in (before, after))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def _leaves(place: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        return [(place, value)]
    return [leaf for key, each in value.items() for leaf in _leaves(f"{place}.{key}" if place else str(key), each)]


def _is_below(key: str, places: Collection[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _listed(found: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {before!r:.100} → {after!r:.100}" for key, (before, after) in found.items())
