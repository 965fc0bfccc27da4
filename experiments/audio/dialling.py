"""Texts and recordings: a number in words finds the recording in which it is dialled.

The recordings are synthesised: the two tones of each key of a telephone (ITU-T Q.23), of random length and loudness,
in noise. A tiny Qwen2.5-Omni thinker with random weights learns on half of the numbers of two digits, and is measured
on the other half, which it never heard.

    python experiments/audio/dialling.py runs/dialling
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import soundfile
import torch

from vlmembed.backbones import VisionLanguageModel, tiny
from vlmembed.data import RetrievalDataModule
from vlmembed.losses import InfoNCE
from vlmembed.modules import EmbeddingModule
from vlmembed.pooling import LastToken
from vlmembed.trainer import Trainer

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from other_models import qwen2_5_omni

RATE = 8000
LOW, HIGH = (697, 770, 852, 941), (1209, 1336, 1477)
#: Row and column of each digit on the keypad.
KEYS = {0: (3, 1), **{digit: divmod(digit - 1, 3) for digit in range(1, 10)}}


def dial(digits: list[int], random: np.random.Generator) -> np.ndarray:
    """Return the samples of some keys, each held for 0.15 to 0.25 seconds, with pauses."""
    pieces = []
    for digit in digits:
        row, column = KEYS[digit]
        time = np.arange(int(RATE * random.uniform(0.15, 0.25))) / RATE
        tone = sum(np.sin(2 * np.pi * (pitch * time + random.uniform())) for pitch in (LOW[row], HIGH[column]))
        pieces += [tone * random.uniform(0.1, 0.4), np.zeros(int(RATE * random.uniform(0.05, 0.1)))]
    samples = np.concatenate(pieces)
    return samples + random.normal(0, 0.01, len(samples))


def write(folder: Path, copies: int) -> None:
    """Write rows for training, several recordings of each number, and for measuring, one of each other number."""
    random = np.random.default_rng(0)
    numbers = random.permutation(100)
    for split, part, count in (("train", numbers[:50], copies), ("val", numbers[50:], 1)):
        rows = []
        for number in [*part.tolist()] * count:
            digits, name = [*divmod(number, 10)], f"{split}{len(rows)}.wav"
            soundfile.write(folder / name, dial(digits, random), RATE)
            words = " ".join(tiny.NUMBER_WORDS[digit] for digit in digits)
            rows.append({"query": words, "positive": {"audio": name}})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, steps: int, copies: int = 16) -> tuple[list[float], dict[str, Any]]:
    """Train and measure; return the loss of every step, and the metrics of the numbers that were never heard."""
    folder.mkdir(parents=True)
    write(folder, copies)
    lightning.seed_everything(0, verbose=False)
    backbone = VisionLanguageModel(qwen2_5_omni(folder / "checkpoint"))
    model = EmbeddingModule(
        backbone,
        LastToken(),
        InfoNCE(0.05),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01),
        graph_memory="none",
    )
    data = RetrievalDataModule(str(folder / "train.jsonl"), str(folder / "val.jsonl"), batch_size=32, num_workers=0)
    losses: list[float] = []
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, exporter=None, enable_checkpointing=False
    )
    model.on_train_batch_end = lambda outputs, *_: losses.append(float(outputs["loss"]))  # type: ignore[method-assign]
    trainer.fit(model, datamodule=data)
    metrics = trainer.validate(model, datamodule=data)[0]
    return losses, dict(metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    losses, metrics = run(options.folder, options.steps)
    print(f"loss {np.mean(losses[:10]):.2f} in the first ten steps, {np.mean(losses[-10:]):.2f} in the last ten")
    print({name: round(value, 3) for name, value in metrics.items()})


if __name__ == "__main__":
    main()
