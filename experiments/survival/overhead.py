"""What do the guards of numbers cost, on the quick start?

One run of `configs/quickstart.yaml`, without measuring and exporting, in blocks of 10 steps: every second block is
trained without guards, as Lightning would by itself. A guarded block has all that guards do: each step's norm and the
one question to the device, the rows of its batch, and a look at embeddings and at chance. The steps are the same
either way, to the bit (`tests/test_numbers.py`), so blocks can alternate within one run. Waiting for the loader's
workers is not counted; that batches say where their rows came from is on their side.

    python -m vlmembed.backbones.tiny checkpoints/tiny
    python experiments/survival/overhead.py             # some five minutes; nothing else should run
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from vlmembed.cli import main as vlmembed

BLOCK = 10
CLOCKS = {"clock": time.perf_counter, "processor": time.thread_time}
RESAMPLES = 2000
ROOT = Path(__file__).parents[2]


class Unguarded:
    """Does nothing where a guard would stand."""

    in_a_row = skipped = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_: {}


class Alternate(Callback):
    """Takes the guards away in every second block, and says at the end what that saves."""

    def __init__(self) -> None:
        self.blocks: dict[bool, list[dict[str, float]]] = {True: [], False: []}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.guards = {"steps": pl_module.steps, "_watch": pl_module._watch}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % BLOCK == 0:
            # The first of a pair as often as the second.
            block = batch_idx // BLOCK
            self.guarded, self.taken = (block + block // 2) % 2 == 0, dict.fromkeys(CLOCKS, 0.0)
            vars(pl_module).update(self.guards if self.guarded else dict.fromkeys(self.guards, Unguarded()))
            vars(pl_module).pop("configure_gradient_clipping", None)
            if not self.guarded:
                by_itself = partial(LightningModule.configure_gradient_clipping, pl_module)
                vars(pl_module)["configure_gradient_clipping"] = by_itself
        self.start = {name: clock() for name, clock in CLOCKS.items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name, clock in CLOCKS.items():
            self.taken[name] += (clock() - self.start[name]) / BLOCK
        # The first two blocks warm up.
        if (batch_idx + 1) % BLOCK == 0 and batch_idx >= 2 * BLOCK:
            self.blocks[self.guarded].append(self.taken)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        vars(pl_module).update(self.guards)
        print("| time | with guards | without | ratio |\n|---|---|---|---|")
        for clock in CLOCKS:
            pairs = [(one[clock], other[clock]) for one, other in zip(*self.blocks.values(), strict=False)]
            with_guards, without = (1000 * median(times) for times in zip(*pairs, strict=True))
            low, high = interval(pairs)
            print(f"| {clock} | {with_guards:.1f} ms | {without:.1f} ms | {ratio(pairs):.4f} ({low:.4f}–{high:.4f}) |")
        print(f"\nMedians of {len(pairs)} pairs of blocks, and a 95 % interval of the ratio, by bootstrap over pairs.")


def interval(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    draw = random.Random(0)
    samples = sorted(ratio(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return samples[int(0.025 * RESAMPLES)], samples[int(0.975 * RESAMPLES)]


def ratio(pairs: list[tuple[float, float]]) -> float:
    """Of neighbours, because the machine is faster at one time than at another."""
    return median(guarded / without for guarded, without in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=640, help="a multiple of 20, at least 60")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "data.init_args.val": "null",
            "data.init_args.test": "null",
            "data.init_args.train.init_args.size": str(128 * steps),
            "trainer.exporter": "null",
            "trainer.logger.init_args.save_dir": folder,
            "trainer.callbacks+": "overhead.Alternate",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        vlmembed(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *words])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
