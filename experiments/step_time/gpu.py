"""The step at full size on a GPU: samples per second, peak memory, and how much of the device it uses.

A checkpoint of the released sizes with random weights, pairs of a text and a picture of 600 × 600 pixels, bfloat16,
SGD. Contenders run one after the other, as two copies of an 8B do not fit on a device. Utilisation is the operations
that a step cannot do without (``flops.py`` says which) per second, over those of a large bfloat16 matrix product
measured in the same run.

    python experiments/step_time/gpu.py --config 2B
    python experiments/step_time/gpu.py --config tiny --device cpu --batch_size 4 --pixels 96  # does it still run?
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

import checkpoint
import flops
import torch
from data import Pair, pairs
from ours import Ours, Setting
from report import Report, Row, machine
from theirs import Theirs
from transformers.utils import logging
from work import Contender, Work

MINI_BATCHES = (1, 2, 4, 8, 16, 32)
TOKEN_BUDGETS = (4096, 16384)
MIN_TOKENS, MAX_TOKENS = 4, 1280
#: Width of the square matrices whose product is the ceiling.
CEILING = {"cuda": 8192, "cpu": 1024}
#: How much first losses may differ, of their size: bfloat16 has three significant digits.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Found:
    """What was measured of a contender: seconds of its steps, peak bytes on the device, its first loss."""

    seconds: list[float]
    memory: int
    loss: float


def main() -> None:
    options = _options()
    logging.disable_progress_bar()
    config = checkpoint.configuration(options.config)
    data = pairs(options.batch_size, [(options.pixels, options.pixels)])
    ceiling = _ceiling(options.device)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        checkpoint.write(folder, config, MIN_TOKENS, MAX_TOKENS, "bfloat16", options.device)
        batch = flops.features(folder, data)
        report = Report(
            [
                flops.summary(config, batch),
                f"{_device(options.device)}. {machine()}",
                f"`gpu.py {' '.join(sys.argv[1:])}`",
            ]
        )
        report.setup.append(f"Ceiling, the product of two bfloat16 matrices: {ceiling / 1e12:.3g} TFLOP/s.")
        for trained in options.trained:
            work = Work(folder, config.get_text_config().hidden_size, trained, options.device, "bfloat16")
            found = _measure_all(work, data, options.steps)
            _tell(
                found, f"{options.config}, {trained}", len(data), flops.step(config, batch, trained) / ceiling, report
            )
    report.write(options.output, f"results_gpu_{Path(options.config).name}")
    print(report.markdown())


def _measure_all(work: Work, data: Sequence[Pair], steps: int) -> dict[str, Found]:
    """Measure ours and theirs, as far as they fit in memory."""
    contenders: dict[str, Callable[[], Contender]] = {"vlmembed": partial(Ours, work, Setting())}
    contenders |= {f"mini-batch {size}": partial(Theirs, work, size) for size in MINI_BATCHES}
    contenders |= {f"token budget {tokens}": partial(Theirs, work, 32, tokens) for tokens in TOKEN_BUDGETS}
    found: dict[str, Found] = {}
    for name, build in contenders.items():
        try:
            found[name] = _measure(build, data, work.device, steps)
        except torch.OutOfMemoryError:
            print(f"{work.trained}: {name} does not fit in memory.")
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    losses = {name: each.loss for name, each in found.items()}
    if max(losses.values()) - min(losses.values()) > TOLERANCE * max(losses.values()):
        raise RuntimeError(f"First losses differ by more than {TOLERANCE} of their size: {losses}.")
    return found


def _measure(build: Callable[[], Contender], data: Sequence[Pair], device: str, steps: int) -> Found:
    contender = build()
    batch = contender.prepare(data)
    loss = contender.step(batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [_seconds(partial(contender.step, batch), device) for _ in range(steps + 1)]
    return Found(seconds[1:], torch.cuda.max_memory_allocated() if device == "cuda" else 0, loss)


def _seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _tell(found: dict[str, Found], work: str, samples: int, ideal: float, report: Report) -> None:
    """Add ratios and figures; ``ideal`` is how many seconds the step would take at the ceiling."""
    columns = ("work", "step", "seconds, median", "quartiles", "samples/s", "of ceiling", "peak memory, GiB")
    for name, each in found.items():
        low, middle, high = quantiles(each.seconds, n=4, method="inclusive")
        cells = (f"{middle:.3f}", f"{low:.3f}–{high:.3f}", f"{samples / middle:.2f}", f"{ideal / middle:.0%}")
        report.add("Steps", columns, (work, name, *cells, f"{each.memory / 2**30:.2f}"))
    seconds = {name: median(each.seconds) for name, each in found.items()}
    our = seconds.pop("vlmembed")
    report.rows.append(Row(f"{work}: speed against their best", _exactly(min(seconds.values()) / our), "≥", 1.5))
    report.rows.append(Row(f"{work}: share of the ceiling", _exactly(ideal / our), "≥", 0.4))


def _exactly(value: float) -> tuple[float, float, float]:
    return value, value, value


def _ceiling(device: str) -> float:
    """Measure operations per second of a bfloat16 matrix product."""
    width = CEILING[device]
    one, other = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [_seconds(lambda: one @ other, device) for _ in range(20)]
    return 2 * width**3 / median(seconds[5:])


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "No GPU"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="2B", help=f"{', '.join(checkpoint.SIZES)}, or a folder with a config.json")
    parser.add_argument("--trained", nargs="+", choices=list(flops.PASSES), default=["lora", "everything"])
    parser.add_argument("--batch_size", type=int, default=64, help="pairs per batch (default: 64)")
    parser.add_argument("--pixels", type=int, default=600, help="width and height of a picture (default: 600)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each contender (default: 5)")
    parser.add_argument("--device", choices=list(CEILING), default="cuda")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
