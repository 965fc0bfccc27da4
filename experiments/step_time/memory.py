"""Peak memory of one step, each in a fresh process.

Peak resident memory while a step runs, above what was resident just before, and the prepared inputs by themselves:
weights and libraries do not count, gradients and activations do. A step of two pairs comes first, so that what is
loaded at first use is there.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data import pairs
from ours import Ours, Setting
from theirs import Theirs
from torch import Tensor
from work import Contender, Work

#: By default glibc keeps most of what is freed, in pieces between what is not, so that a peak depends on the order of
#: sizes more than on what is alive. With these every block of a page or more is mapped by itself and given back to the
#: system when it is freed (the kernel allows some 65,000 at a time), and there is one heap for the rest, which ends
#: where its last block ends. MKL does not keep its work space. Slow, but repeatable to about 1 %.
ENVIRONMENT = {
    **{"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_MMAP_MAX_": "60000"},
    **{"MALLOC_TRIM_THRESHOLD_": "4096", "MALLOC_ARENA_MAX": "1", "MKL_DISABLE_FAST_MM": "1"},
}


@dataclass(frozen=True)
class Measurement:
    """One process.

    Args:
        side: ``ours``, with no graph kept, or ``theirs``.
        checkpoint: See ``Work``.
        hidden_size: See ``Work``.
        trained: See ``Work``.
        batch_size: Pairs.
        chunk: Items per chunk or mini-batch.
    """

    side: str
    checkpoint: str
    hidden_size: int
    trained: str
    batch_size: int
    chunk: int

    def peak(self, with_inputs: bool = True) -> int:
        """Measure, in bytes; the step's embeddings (of texts and pictures, in float32) are not counted."""
        command = [sys.executable, str(Path(__file__)), json.dumps(asdict(self))]
        result = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"Measuring {self} failed:\n{result.stderr}")
        peak, inputs = map(int, result.stdout.split()[-2:])
        return peak + with_inputs * inputs - 2 * self.batch_size * self.hidden_size * 4


def _contender(measurement: Measurement) -> Contender:
    work = Work(Path(measurement.checkpoint), measurement.hidden_size, measurement.trained)  # type: ignore[arg-type]
    if measurement.side == "ours":
        return Ours(work, Setting(measurement.chunk, retain=False))
    return Theirs(work, measurement.chunk)


def _peak(measurement: Measurement) -> tuple[int, int]:
    contender = _contender(measurement)
    contender.step(contender.prepare(pairs(2, seed=1)))
    batch = contender.prepare(pairs(measurement.batch_size))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # "5" lowers the peak to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    contender.step(batch)
    return _resident("VmHWM") - before, _bytes(batch)


def _bytes(prepared: Any) -> int:
    """Return what the tensors of a prepared batch take."""
    if isinstance(prepared, Tensor):
        return prepared.nbytes
    parts = prepared.values() if isinstance(prepared, dict) else getattr(prepared, "__dict__", {}).values()
    return sum(map(_bytes, prepared if isinstance(prepared, list) else parts))


def _resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


if __name__ == "__main__":
    print(*_peak(Measurement(**json.loads(sys.argv[1]))))
