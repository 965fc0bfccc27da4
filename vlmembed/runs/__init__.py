"""What a run leaves on disk, and how it is gone on with."""

from vlmembed.runs.changes import refuse_changes
from vlmembed.runs.checkpoints import CheckpointFiles, read_checkpoint
from vlmembed.runs.configuration import RememberConfiguration, SaveConfiguration
from vlmembed.runs.folder import LAST, fit_folder, other_folder
from vlmembed.runs.stopping import StopSafely

__all__ = [
    "LAST",
    "CheckpointFiles",
    "RememberConfiguration",
    "SaveConfiguration",
    "StopSafely",
    "fit_folder",
    "other_folder",
    "read_checkpoint",
    "refuse_changes",
]
