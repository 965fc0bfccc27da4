"""A module whose checkpoints are small, and enough to go on from."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule

from vlmembed import distributed
from vlmembed.modules import frozen
from vlmembed.modules.resuming import Resumption


class Resumable(LightningModule):
    """Leaves frozen weights out of its checkpoints, and all that a run needs in them; see `Resumption`.

    A model in shards leaves nothing out.
    """

    def __init__(self) -> None:
        super().__init__()
        #: What was frozen when the weights had been read; see `frozen.sums`.
        self.frozen_sums: dict[str, int] = {}
        # Not a callback: this would have Lightning put all callbacks in another order.
        self._resumption = Resumption()

    def recognise_frozen(self) -> None:
        """Take note of what is frozen, and of what it is. Call it when the weights are there."""
        self.frozen_sums = frozen.sums(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen, and add what Lightning leaves out."""
        if not distributed.is_sharded(self):
            frozen.leave_out(checkpoint, self, self.frozen_sums)
        # Else nobody goes on from it.
        if "optimizer_states" in checkpoint:
            self._resumption.write(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let frozen weights that a checkpoint left out be this module's own, if they are the same.

        Raises:
            ValueError: If they are not, or weights are missing, or it cannot be gone on with.
        """
        self._complete(checkpoint)
        self._resumption.read(self, checkpoint)

    def on_train_start(self) -> None:
        """Go on as if nothing had been."""
        self._resumption.take_up(self)

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the weights of a checkpoint.

        Args:
            checkpoint: What its file holds.

        Raises:
            ValueError: If they are not this model's.
        """
        self._complete(checkpoint)
        self.load_state_dict(checkpoint["state_dict"], strict=self.strict_loading)

    def _complete(self, checkpoint: dict[str, Any]) -> None:
        # Where something was left out, it is looked through here, in words.
        self.strict_loading = frozen.KEY not in checkpoint
        if not self.strict_loading:
            checkpoint["state_dict"] = frozen.completed(checkpoint, self, self.frozen_sums)
