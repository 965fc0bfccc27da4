"""Does the memory of a training step grow with the batch, where the chunks stay the same?

One step of a fresh multi-vector model that keeps no graph: its peak of allocated bytes, without weights and inputs. By
design it holds the vectors four times (by chunk, of the batch, as the loss takes them, and as gradients) and, of each
vector of a query, which of a document's is nearest; and the features of images, where their tower is frozen. What is
left should grow by no more than 10 %.

    OMP_NUM_THREADS=1 python experiments/late_interaction/memory.py [--batch_sizes 32 256] [--config tiny]
"""

from __future__ import annotations

import argparse
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from step_time import SIZE, OursLate  # First, as it finds the modules of ../step_time.

# isort: split
import checkpoint
import torch
from data import MAX_TOKENS, MIN_TOKENS, pairs
from ours import Setting
from torch.profiler import ProfilerActivity, profile
from work import Work

MIB = 2**20


def peak(model: OursLate, batch: Any) -> int:
    """The most bytes that a step has allocated at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model.step(batch)
    events: Any = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 64, 128, 256], help="pairs per batch")
    parser.add_argument("--chunk", type=int, default=8, help="items per chunk")
    parser.add_argument("--config", default="wide_tower", help="of the checkpoint, as in ../step_time")
    options = parser.parse_args()
    print(
        "| trained | pairs | vectors | MiB at most | of vectors | of nearest | of features | left | times the first |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    with TemporaryDirectory() as scratch:
        folder, config = Path(scratch) / "checkpoint", checkpoint.configuration(options.config)
        checkpoint.write(folder, config, MIN_TOKENS, MAX_TOKENS)
        for trained in ("language", "everything"):
            work = Work(folder, config.get_text_config().hidden_size, trained)  # type: ignore[arg-type]
            model, first = OursLate(work, Setting(options.chunk, retain=False)), 0.0
            model.step(model.prepare(pairs(2, seed=1)))  # What is made in a first step.
            for size in options.batch_sizes:
                batch = model.prepare(pairs(size))
                lengths = torch.cat([chunk["kept"].sum(1) for chunk in batch.chunks])
                vectors = 4 * 4 * SIZE * int(lengths.sum())  # Four times, in float32.
                nearest = 4 * size * int(lengths[batch.queries].sum())
                whole = peak(model, batch)
                frozen = [] if trained == "everything" else model.model.encoder.encode_images(batch.images)
                features = sum(image.nbytes for image in frozen)
                left = whole - vectors - nearest - features
                first = first or left
                sizes = " | ".join(f"{part / MIB:.1f}" for part in (whole, vectors, nearest, features, left))
                print(f"| {trained} | {size} | {lengths.sum()} | {sizes} | {left / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
