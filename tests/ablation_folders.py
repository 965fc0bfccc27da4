"""Output folders of ablations that never ran, written file by file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from PIL import Image, ImageDraw

from vlmembed.ablation.record import content_path
from vlmembed.ablation.report import write_report
from vlmembed.ablation.run import Trial

#: Would run, or break a table or a tag, if it were let through.
HOSTILE = "<script>alert(1)</script>|`*x*`\"'&"
#: label → (mean of the metric before clipping, seconds per step, dimension).
POOLINGS: dict[str, tuple[float, float, int]] = {
    "last": (0.88, 0.210, 256),
    "mean": (0.80, 0.205, 256),
    "mean without the instruction": (0.81, 0.206, 256),
    "attention, 4 queries": (0.89, 0.260, 256),
    "latent attention": (0.84, 0.330, 256),
    "last and mean, concatenated": (0.87, 0.212, 512),
    HOSTILE: (0.70, 0.190, 256),
    "first": (0.12, 0.207, 256),
}
SEEDS = (0, 1, 2)
QUERIES = 60
DOCUMENTS = 40


def build(
    folder: Path, poolings: Sequence[str] = tuple(POOLINGS), seeds: Sequence[int] = SEEDS, baseline: str | None = "mean"
) -> Path:
    """Write a folder in which every trial has finished."""
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 0.35, QUERIES)
    configure(folder, poolings, seeds, baseline)
    write_documents(folder / "documents" / "numbers")
    for pooling in poolings:
        taste = generator.normal(0, 0.15, QUERIES)
        for seed in seeds:
            noise = generator.normal(0, 0.15, QUERIES) + generator.normal(0, 0.01)
            scores = (POOLINGS[pooling][0] + difficulty + taste + noise).clip(0, 1)
            write_trial(folder, {"pooling": pooling}, seed, scores, generator)
    return folder


def build_unfinished(folder: Path) -> Path:
    """Write a folder with a report, in which one trial has failed and one has not begun."""
    build(folder)
    failed = trial_folder(folder, "latent attention", 2)
    shutil.rmtree(failed)
    trial = Trial(failed, {"pooling": "latent attention"}, 2, "test/ndcg@10", {})
    trial.write()
    replace(trial, status="failed", error=f"exit status 1\nRuntimeError: {HOSTILE}").write()
    shutil.rmtree(trial_folder(folder, "first", 1))
    write_report(folder)
    return folder


def configure(folder: Path, poolings: Sequence[str], seeds: Sequence[int], baseline: str | None = None) -> None:
    values = {label: {"class_path": "vlmembed.pooling.Mean"} for label in poolings}
    content = {
        "base": "base.yaml",
        "output_dir": str(folder),
        "metric": "test/ndcg@10",
        "baseline": {"pooling": baseline} if baseline else {},
        "seeds": list(seeds),
        "grid": {"pooling": {"key": "model.init_args.pooling", "values": values}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ablation.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def trial_folder(folder: Path, pooling: str, seed: int) -> Path:
    slug = "".join(letter if letter.isalnum() else "-" for letter in pooling)
    return folder / "settings" / slug / f"seed-{seed}"


def write_trial(
    folder: Path, setting: Mapping[str, str], seed: int, scores: np.ndarray, generator: np.random.Generator
) -> None:
    """Write a finished trial, with a log as Lightning does it: losses and validations in lines of their own."""
    trial = trial_folder(folder, setting["pooling"], seed)
    _, seconds, dimension = POOLINGS[setting["pooling"]]
    columns = {
        "ndcg@10": scores,
        "recall@1": (scores > 0.9) * 1.0,
        "ndcg@10/128": 0.97 * scores,
        "ndcg@10/32": 0.85 * scores,
    }
    cost = {
        "seconds_per_step": seconds * (1 + 0.01 * seed),
        "peak_memory_bytes": 900 * 2**20 + int(2**20 * 100 * seconds),
        "trained_parameters": 2_000_000 + dimension,
        "pooling_parameters": dimension if "attention" in setting["pooling"] else 0,
        "embedding_dimension": dimension,
        "document_bytes": 4 * dimension,
        "search_seconds": 0.002,
    }
    metrics = {f"test/{name}": float(values.mean()) for name, values in columns.items()}
    planned = Trial(trial, setting, seed, "test/ndcg@10", {})
    planned.write()
    replace(planned, status="finished", seconds=160.0, metrics=metrics, cost=cost).write()
    measured = trial / "measured" / "numbers"
    measured.mkdir(parents=True)
    queries = pd.Index([f"q{index}" for index in range(QUERIES)], name="query")
    pd.DataFrame(columns, queries).to_csv(measured / "per_query.csv")
    steps = range(0, 241, 40)
    losses = [{"step": step, "train/loss": 5 / (1 + step / 40)} for step in steps]
    pd.DataFrame(
        [*losses, *({"step": step, "val/ndcg@10": scores.mean() * step / (step + 40)} for step in steps)]
    ).to_csv(trial / "metrics.csv", index=False)
    found = {}
    for index, score in enumerate(scores):
        # A query's own document is where the score says, if anywhere.
        own = f"doc {index % DOCUMENTS}"
        others = [f"doc {other}" for other in generator.permutation(DOCUMENTS) if other != index % DOCUMENTS][:5]
        rank = 0 if score > 0.9 else 2 if score > 0.5 else 9
        names = [*others[:rank], own, *others[rank:]][:5]
        top = [[name, 0.9 - 0.1 * rank, int(name == own)] for rank, name in enumerate(names)]
        found[f"q{index}"] = {"top": top, "relevant": {own: 1}}
    (measured / "top.json").write_text(json.dumps(found))


def write_documents(folder: Path) -> None:
    """Write three of four documents as images, the others as texts."""
    folder.mkdir(parents=True)
    for index in range(DOCUMENTS):
        if index % 4 == 0:
            text = f"A text of some length about number {index}. {HOSTILE}"
            content_path(folder, f"doc {index}", "txt").write_text(text)
            continue
        image = Image.new("RGB", (160, 64), "white")
        ImageDraw.Draw(image).text((50, 10), str(index), fill="black", font_size=40)
        image.save(content_path(folder, f"doc {index}", "jpg"), "JPEG")
