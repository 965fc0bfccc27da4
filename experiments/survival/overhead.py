"""What do the guards of numbers cost, on the quick start?

One run of `configs/quickstart.yaml`, without measuring and exporting. What the guards do in a step is timed by itself:
the rows and the loss of each batch, the one question to the device whether to step, and at every tenth step a look at
embeddings and at chance. The norm of all gradients is not counted: it is the one that clipping needs. Waiting for the
loader's workers is not part of a step.

    python -m vlmembed.backbones.tiny checkpoints/tiny
    python experiments/survival/overhead.py             # a minute; nothing else should run
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from vlmembed.cli import main as vlmembed

#: Steps that are not counted: the first ones allocate memory.
WARM_UP = 10
ROOT = Path(__file__).parents[2]


class TimeGuards(Callback):
    """Times each step, and within it the guards."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.guards: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        for collaborator, methods in ((pl_module.guard, ("add", "check")), (pl_module.monitor, ("note", "check"))):
            for name in methods:
                setattr(collaborator, name, self.timed(getattr(collaborator, name)))

    def timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = method(*args)
            self.taken += time.perf_counter() - start
            return result

        return call

    def on_train_batch_start(self, *_: Any) -> None:
        self.taken, self.start = 0.0, time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(time.perf_counter() - self.start)
        self.guards.append(self.taken)

    def on_train_end(self, *_: Any) -> None:
        steps, guards = self.steps[WARM_UP:], self.guards[WARM_UP:]
        low, _, high = quantiles(steps, n=4)
        print(f"{len(steps)} steps: {1000 * median(steps):.0f} ms, median ({1000 * low:.0f}–{1000 * high:.0f}).")
        # The mean, as every tenth step has the look.
        print(f"Guards: {1000 * mean(guards):.2f} ms a step on average, {100 * sum(guards) / sum(steps):.2f} % of all.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=110, help=f"the first {WARM_UP} are not counted (default: 110)")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "data.init_args.val": "null",
            "data.init_args.test": "null",
            "data.init_args.train.init_args.size": str(128 * steps),
            "trainer.exporter": "null",
            "trainer.logger.init_args.save_dir": folder,
            "trainer.callbacks+": "overhead.TimeGuards",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        vlmembed(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *words])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
