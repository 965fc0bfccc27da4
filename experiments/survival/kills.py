"""Kills runs at random moments, goes on with them, and compares what they become with runs that nobody killed.

    python experiments/survival/kills.py --kills 6

Each scenario is run once undisturbed. Then it is run again and again, and killed at moments drawn uniformly over the
time that the undisturbed run took after it had set up: while it measures, trains, writes checkpoints. The same command
goes on with it, every time, until it has finished. Then its last checkpoint (weights, optimizer, schedule) must equal
the undisturbed one's to the bit, and so must every row of its metrics.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from vlmembed.backbones import tiny

NUMBERS = "vlmembed.data.digits.HandwrittenNumbers"
ROWS, BATCH, EPOCHS = 96, 8, 2


def numbers(size: int, seed: int = 0) -> dict[str, Any]:
    return {"class_path": NUMBERS, "init_args": {"size": size, "seed": seed}}


def part(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def base() -> dict[str, Any]:
    """A run of 24 steps, which measures every half epoch and writes a checkpoint every third step."""
    return {
        "seed_everything": 0,
        "model": part(
            "vlmembed.modules.EmbeddingModule",
            backbone=part("vlmembed.backbones.Qwen3VL", checkpoint="tiny"),
            pooling=part("vlmembed.pooling.LastToken"),
            loss=part("vlmembed.losses.InfoNCE", temperature=0.05),
            optimizer=part("torch.optim.AdamW", lr=1.0e-3),
            lr_scheduler=part("vlmembed.modules.CosineDecay", warmup=0.1),
        ),
        "data": part(
            "vlmembed.data.RetrievalDataModule",
            train=numbers(ROWS),
            val=numbers(16, seed=7),
            batch_size=BATCH,
            chunk_size=5,
            num_workers=2,
        ),
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": EPOCHS,
            "val_check_interval": 0.5,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "exporter": None,
            "logger": part("lightning.pytorch.loggers.CSVLogger", save_dir="runs", name="run"),
            "callbacks": [
                part("lightning.pytorch.callbacks.ModelCheckpoint", every_n_train_steps=3, save_last=True),
            ],
        },
    }


def one_process() -> dict[str, Any]:
    return base()


def two_processes() -> dict[str, Any]:
    config = base()
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    config["data"]["init_args"]["batch_size"] = BATCH // 2
    return config


def lora() -> dict[str, Any]:
    config = base()
    peft = part("peft.LoraConfig", r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    config["model"]["init_args"]["adapters"] = [part("vlmembed.adapters.LoRA", config=peft)]
    return config


def mixed_data() -> dict[str, Any]:
    """Two sources, four batches to a step, measured in the middle of some; ten steps, and the last one is saved."""
    config = base()
    config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 2
    config["data"]["init_args"]["train"] = part(
        "vlmembed.data.Mixture", sources=[numbers(ROWS), numbers(ROWS // 2, seed=1)], weights=[1.0, 2.0]
    )
    config["trainer"] |= {"accumulate_grad_batches": 4, "max_epochs": EPOCHS, "val_check_interval": 8}
    return config


SCENARIOS = {each.__name__.replace("_", " "): each for each in (one_process, two_processes, lora, mixed_data)}


def kill(process: subprocess.Popen) -> None:
    process.kill()


def terminate(process: subprocess.Popen) -> None:
    process.terminate()


def interrupt(process: subprocess.Popen) -> None:
    """As a terminal does: everybody is told."""
    os.killpg(process.pid, signal.SIGINT)


def kill_a_worker(process: subprocess.Popen) -> None:
    """A process that reads rows, or (of two that train) the other one."""
    children = psutil.Process(process.pid).children(recursive=True)
    if children:
        random.choice(children).kill()
    else:
        process.kill()


WAYS = {"SIGKILL": kill, "SIGTERM": terminate, "Ctrl-C": interrupt, "SIGKILL of a child": kill_a_worker}


@dataclass
class Life:
    """What became of a scenario."""

    folder: Path
    seconds: float = 0.0
    kills: list[str] = field(default_factory=list)

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "vlmembed", "fit", "--config", "run.yaml", "--ckpt_path", "last"]
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)

    def set_up(self, process: subprocess.Popen) -> None:
        """Wait until an attempt has got as far as its model: transformers says that it loads weights."""
        before = (self.folder / "log.txt").stat().st_size
        while process.poll() is None and b"Loading weights" not in (self.folder / "log.txt").read_bytes()[before:]:
            time.sleep(0.05)

    @property
    def version(self) -> Path:
        return self.folder / "runs/run/version_0"

    def state(self) -> dict[str, Any]:
        return torch.load(self.version / "checkpoints/last.ckpt", weights_only=True)

    def rows(self) -> list[dict[str, str]]:
        with (self.version / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))


def make(folder: Path, config: dict[str, Any], checkpoint: Path) -> Life:
    folder.mkdir(parents=True)
    (folder / "tiny").symlink_to(checkpoint)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return Life(folder)


def undisturbed(folder: Path, config: dict[str, Any], checkpoint: Path) -> Life:
    life = make(folder, config, checkpoint)
    process = life.start()
    life.set_up(process)
    start = time.monotonic()
    if process.wait():
        raise RuntimeError((folder / "log.txt").read_text())
    life.seconds = time.monotonic() - start
    return life


def killed(folder: Path, config: dict[str, Any], checkpoint: Path, seconds: float, ways: Any, most: int) -> Life:
    """Run until it finishes, killing it ``most`` times on the way, or as often as it does not finish before."""
    life = make(folder, config, checkpoint)
    while True:
        process = life.start()
        life.set_up(process)
        if len(life.kills) < most:
            way = next(ways)
            try:
                process.wait(random.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                life.kills.append(way)
                WAYS[way](process)
        if process.wait() == 0:
            return life
        if len(life.kills) == most and process.returncode > 0 and not life.kills:
            raise RuntimeError((folder / "log.txt").read_text())


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
            return place
        return next(
            filter(None, (difference(a, b, f"{place}/{k}") for k, (a, b) in enumerate(zip(one, other, strict=True)))),
            "",
        )
    return "" if one == other else f"{place}: {one} {other}"


def compare(life: Life, reference: Life) -> str:
    ours, theirs = life.state(), reference.state()
    compared = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    found = difference({key: ours[key] for key in compared}, {key: theirs[key] for key in compared})
    if found:
        return f"checkpoint: {found}"
    return difference(life.rows(), reference.rows(), "metrics.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=6, help="of each scenario")
    parser.add_argument("--most", type=int, default=3, help="kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", nargs="*", default=[*SCENARIOS])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "kills")
    given = parser.parse_args()
    random.seed(given.seed)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    shutil.rmtree(given.folder, ignore_errors=True)
    checkpoint = given.folder / "tiny"
    tiny.create(checkpoint, hidden_size=64, layers=2, heads=2, vision_hidden_size=32, vision_layers=2)
    ways = cycle(WAYS)
    print("| scenario | kills | by | resumed run |\n|---|---|---|---|", flush=True)
    failed = 0
    for name in given.scenarios:
        config = SCENARIOS[name]()
        reference = undisturbed(given.folder / name / "undisturbed", config, checkpoint)
        kills = attempt = 0
        while kills < given.kills:
            place = given.folder / name / str(attempt)
            life = killed(place, config, checkpoint, reference.seconds, ways, min(given.most, given.kills - kills))
            kills, attempt = kills + len(life.kills), attempt + 1
            found = compare(life, reference)
            failed += bool(found)
            verdict = found or f"equal to the bit ({len(life.rows())} rows, {life.state()['global_step']} steps)"
            print(f"| {name} | {len(life.kills)} | {', '.join(life.kills)} | {verdict} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
