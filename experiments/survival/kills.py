"""Kills runs at random moments, goes on with them, and compares what they become with runs that nobody killed.

    python experiments/survival/kills.py --kills 100

Each kind of run is run once undisturbed. Then it is run again and again, and killed at moments drawn uniformly over the
time that the undisturbed run took after it had set up, less what is done already: while it measures, trains, writes
checkpoints. The same command goes on with it, every time, until it has finished. Then its last checkpoint (weights,
averages, optimizer, schedule) must equal the undisturbed one's to the bit, and so must every row of its metrics.csv; it
must have left the same checkpoints, and no draft.

Runs are forked from a process that has imported everything, because that takes longer than they do.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from vlmembed.__main__ import main as command
from vlmembed.backbones import tiny

ROWS, BATCH, EPOCHS = 48, 8, 2


def part(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def numbers(size: int, seed: int = 0) -> dict[str, Any]:
    return part("vlmembed.data.digits.HandwrittenNumbers", size=size, seed=seed)


def run(*callbacks: Any, data: Any = None, trainer: Any = None, **model: Any) -> dict[str, Any]:
    """A run of 12 steps, which measures twice an epoch and writes a checkpoint every second step."""
    saver = part("lightning.pytorch.callbacks.ModelCheckpoint", every_n_train_steps=2, save_last=True)
    kind = "CrossEncoderModule" if "head" in model else "EmbeddingModule"
    defaults = {} if "head" in model else {"pooling": part("vlmembed.pooling.LastToken")}
    return {
        "seed_everything": 0,
        "model": part(
            f"vlmembed.modules.{kind}",
            **{
                "backbone": part("vlmembed.backbones.Qwen3VL", checkpoint="tiny"),
                "loss": part("vlmembed.losses.InfoNCE", temperature=0.05),
                "optimizer": part("torch.optim.AdamW", lr=1.0e-3),
                "lr_scheduler": part("vlmembed.modules.CosineDecay", warmup=0.1),
                **defaults,
                **model,
            },
        ),
        "data": part(
            "vlmembed.data.RetrievalDataModule",
            **{
                "train": numbers(ROWS),
                "val": numbers(8, seed=7),
                "batch_size": BATCH,
                "chunk_size": 5,
                "num_workers": 1,
                **(data or {}),
            },
        ),
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": EPOCHS,
            "val_check_interval": 3,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "exporter": None,
            "logger": part("lightning.pytorch.loggers.CSVLogger", save_dir="runs", name="run"),
            "callbacks": [saver, *callbacks],
            **(trainer or {}),
        },
    }


LORA = part(
    "vlmembed.adapters.LoRA",
    config=part("peft.LoraConfig", r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]),
)
FROZEN = part("vlmembed.adapters.Freeze", modules=["vision", "merger"])
MIXTURE = part("vlmembed.data.Mixture", sources=[numbers(ROWS), numbers(ROWS // 2, seed=1)], weights=[1.0, 2.0])

KINDS = {
    "reranker, listwise": run(
        head=part("vlmembed.heads.YesNo"), loss=part("vlmembed.losses.SoftmaxCrossEntropy"), in_batch_negatives=3
    ),
    "two processes (gloo), two batches to a step": run(
        data={"batch_size": BATCH // 4, "num_workers": 0},
        trainer={"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2, "val_check_interval": 6},
    ),
    "LoRA with dropout": run(adapters=[LORA]),
    "frozen tower, features on disk": run(
        adapters=[FROZEN], features=part("vlmembed.features.OnDisk", folder="features", limit_gib=0.1)
    ),
    "LoRA, moving average of weights": run(
        part("lightning.pytorch.callbacks.EMAWeightAveraging", decay=0.8), adapters=[LORA]
    ),
    "two sources with weights, four batches to a step": run(
        data={"train": MIXTURE, "batch_size": BATCH // 4},
        trainer={"accumulate_grad_batches": 4, "val_check_interval": 8, "limit_train_batches": 24},
    ),
}


def kill(process: Any) -> None:
    process.kill()


def terminate(process: Any) -> None:
    process.terminate()


def interrupt(process: Any) -> None:
    """As a terminal does: everybody is told."""
    os.killpg(process.pid, signal.SIGINT)


def kill_a_child(process: Any) -> None:
    """A process that reads rows, or (of two that train) the other one."""
    children = psutil.Process(process.pid).children(recursive=True)
    (random.choice(children) if children else process).kill()


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # Since the first question.
        return False


WAYS = {"SIGKILL": kill, "SIGTERM": terminate, "Ctrl-C": interrupt, "SIGKILL of a child": kill_a_child}


def fit(folder: Path, processes: int) -> None:
    """Run the command in this process, as a shell would start it."""
    os.setsid()
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    if processes == 2:
        _fork_second()
    command(["fit", "--config", "run.yaml", "--ckpt_path", "last"])


def _fork_second() -> None:
    """Make the second of two processes, as Lightning starts it, and watch it, as Lightning does."""
    os.environ |= {"WORLD_SIZE": "2", "NODE_RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(random.SystemRandom().randrange(20000, 60000))
    second = os.fork()
    if not second:
        os.environ["LOCAL_RANK"] = "1"
        return

    def watch() -> None:
        if os.waitpid(second, 0)[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@dataclass
class Life:
    """What became of a run."""

    folder: Path
    processes: int = 1
    seconds: float = 0.0
    kills: list[str] = field(default_factory=list)
    slowest_end: float = 0.0

    @classmethod
    def of(cls, folder: Path, config: dict[str, Any], checkpoint: Path) -> Life:
        folder.mkdir(parents=True)
        (folder / "tiny").symlink_to(checkpoint)
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        return cls(folder, config["trainer"].get("devices", 1))

    def start(self) -> Any:
        """Start an attempt, and wait until it has got as far as its model: transformers says that it loads weights."""
        log = self.folder / "log.txt"
        before = log.stat().st_size if log.exists() else 0
        process = multiprocessing.get_context("forkserver").Process(target=fit, args=(self.folder, self.processes))
        process.start()
        while process.is_alive() and (not log.exists() or b"Loading weights" not in log.read_bytes()[before:]):
            time.sleep(0.02)
        return process

    def undisturbed(self) -> None:
        process, start = self.start(), time.monotonic()
        process.join()
        if process.exitcode:
            raise RuntimeError((self.folder / "log.txt").read_text())
        self.seconds = time.monotonic() - start

    def survive(self, seconds: float, steps: int, ways: Any, most: int) -> None:
        """Run until it finishes, killing it ``most`` times on the way, or as often as it does not finish before."""
        while True:
            done = max((load(path)["global_step"] for path in self.checkpoints()), default=0)
            process = self.start()
            if len(self.kills) < most:
                process.join(random.uniform(0, seconds * (1 - done / steps)))
                if process.is_alive():
                    self._kill(process, next(ways))
            process.join()
            if process.exitcode == 0:
                return
            if len(self.kills) == most and process.exitcode == 1 and "child" not in self.kills[-1]:
                raise RuntimeError((self.folder / "log.txt").read_text())

    def _kill(self, process: Any, way: str) -> None:
        family = psutil.Process(process.pid)
        family = [family, *family.children(recursive=True)]
        self.kills.append(way)
        WAYS[way](process)
        start = time.monotonic()
        while any(map(is_alive, family)):
            if time.monotonic() - start > 120:
                raise RuntimeError(f"{self.folder}: somebody has outlived {way} by two minutes.")
            process.join(0.02)
        self.slowest_end = max(self.slowest_end, time.monotonic() - start)

    @property
    def version(self) -> Path:
        return self.folder / "runs/run/version_0"

    def checkpoints(self) -> list[Path]:
        return sorted(self.version.glob("checkpoints/**/*.ckpt"))

    def files(self) -> list[str]:
        """Checkpoints and drafts: what is kept, and nothing else."""
        drafts = [path for path in self.folder.rglob("*draft*") if "features" not in path.parts]
        return [str(path.relative_to(self.folder)) for path in (*self.checkpoints(), *drafts)]

    def rows(self) -> list[dict[str, str]]:
        with (self.version / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    return content


def difference(one: Any, other: Any, place: str = "") -> str:
    """Say where two checkpoints differ first; nothing if they do not."""
    if isinstance(one, torch.Tensor):
        return "" if torch.equal(one, other) else place
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f"{place}: {one.keys() ^ other.keys()}"
        return next(filter(None, (difference(one[key], other[key], f"{place}/{key}") for key in one)), "")
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{place}: {len(one)} {len(other)}"
        pairs = enumerate(zip(one, other, strict=True))
        return next(filter(None, (difference(a, b, f"{place}/{k}") for k, (a, b) in pairs)), "")
    return "" if one == other else f"{place}: {one} {other}"


def compare(life: Life, reference: Life) -> str:
    missing = [str(each.folder) for each in (life, reference) if not (each.version / "checkpoints/last.ckpt").exists()]
    if missing:
        return f"no last.ckpt in {missing}"
    ours, theirs = (load(each.version / "checkpoints/last.ckpt") for each in (life, reference))
    compared = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "current_model_state")
    ours, theirs = ({key: content.get(key, {}) for key in compared} for content in (ours, theirs))
    return (
        difference(ours, theirs, "checkpoint")
        or difference(life.rows(), reference.rows(), "metrics.csv")
        or difference(life.files(), reference.files(), "files")
    )


def survive_all(name: str, folder: Path, checkpoint: Path, count: int, most: int, ways: Any) -> tuple[str, int]:
    """Kill a kind of run ``count`` times; return its row of the table, and how many lives were not equal."""
    reference = Life.of(folder / "undisturbed", KINDS[name], checkpoint)
    reference.undisturbed()
    steps = load(reference.version / "checkpoints/last.ckpt")["global_step"]
    lives: list[Life] = []
    differences: list[str] = []
    while (left := count - sum(len(life.kills) for life in lives)) > 0:
        life = Life.of(folder / str(len(lives)), KINDS[name], checkpoint)
        life.survive(reference.seconds, steps, ways, min(most, left))
        lives.append(life)
        if found := compare(life, reference):
            differences.append(found)
            print(f"{life.folder}: {found}", file=sys.stderr, flush=True)
    kills = Counter(way for life in lives for way in life.kills)
    by = ", ".join(f"{way} {number}" for way, number in kills.items())
    slowest = max(life.slowest_end for life in lives)
    equal = f"{len(lives) - len(differences)} of {len(lives)}"
    return f"| {name} | {kills.total()} | {by} | {slowest:.0f} s | {equal} |", len(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="of all kinds together")
    parser.add_argument("--most", type=int, default=6, help="kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[*KINDS], help="parts of their names")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "kills")
    options = parser.parse_args()
    random.seed(options.seed)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(["vlmembed.cli", "vlmembed.data", "kills"])
    shutil.rmtree(options.folder, ignore_errors=True)
    checkpoint = options.folder / "tiny"
    tiny.create(checkpoint, hidden_size=64, layers=2, heads=2, vision_hidden_size=32, vision_layers=2)
    names = [name for name in KINDS if any(kind in name for kind in options.kinds)]
    ways = cycle(WAYS)
    print(
        "| kind of run | kills | by | slowest end | resumed runs equal to the bit |\n|---|--:|---|--:|---|", flush=True
    )
    failed = 0
    for index, name in enumerate(names):
        count = options.kills // len(names) + (index < options.kills % len(names))
        row, different = survive_all(name, options.folder / str(index), checkpoint, count, options.most, ways)
        failed += different
        print(row, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
