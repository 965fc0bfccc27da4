"""Output folders of ablations that never ran, written file by file."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from vlmembed.ablation.report import write_report
from vlmembed.ablation.results import Result, document_path, per_query_path, top_path

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
    """Write a folder in which every run has finished."""
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 0.35, QUERIES)
    configure(folder, poolings, seeds, baseline)
    write_documents(folder)
    for pooling in poolings:
        taste = generator.normal(0, 0.15, QUERIES)
        for seed in seeds:
            noise = generator.normal(0, 0.15, QUERIES) + generator.normal(0, 0.01)
            scores = (POOLINGS[pooling][0] + difficulty + taste + noise).clip(0, 1)
            write_run(folder, {"pooling": pooling}, seed, scores, generator)
    return folder


def build_unfinished(folder: Path) -> Path:
    """Write a folder with a report, in which one run has failed and one has not begun."""
    build(folder)
    fail(folder, "latent attention", 2)
    shutil.rmtree(run_folder(folder, "first", 1))
    write_report(folder)
    return folder


def fail(folder: Path, pooling: str, seed: int) -> None:
    """Let a run have failed."""
    run = run_folder(folder, pooling, seed)
    shutil.rmtree(run)
    Result({"pooling": pooling}, seed, "failed", f"exit status 1\nRuntimeError: {HOSTILE}", 3.0, {}, {}, run).write()


def configure(folder: Path, poolings: Sequence[str], seeds: Sequence[int], baseline: str | None = None) -> None:
    """Write ``ablation.yaml``."""
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


def run_folder(folder: Path, pooling: str, seed: int) -> Path:
    """Return where a run of these folders is."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in pooling)
    return folder / "settings" / slug / f"seed-{seed}"


def write_run(
    folder: Path, setting: Mapping[str, str], seed: int, scores: np.ndarray, generator: np.random.Generator
) -> None:
    """Write a finished run."""
    pooling = setting["pooling"]
    run = run_folder(folder, pooling, seed)
    _, seconds, dimension = POOLINGS[pooling]
    columns = {
        "ndcg@10": scores,
        "recall@1": (scores > 0.9).astype(float),
        "ndcg@10/128": 0.97 * scores,
        "ndcg@10/32": 0.85 * scores,
    }
    metrics = {f"test/{name}": float(values.mean()) for name, values in columns.items()}
    cost = {
        "seconds_per_step": seconds * (1 + 0.01 * seed),
        "peak_memory_bytes": 900 * 2**20 + int(2**20 * 100 * seconds),
        "trained_parameters": 2_000_000 + dimension,
        "pooling_parameters": dimension if "attention" in pooling else 0,
        "embedding_dimension": dimension,
        "embedding_bytes": 4 * dimension,
    }
    Result(setting, seed, "finished", None, 160.0, metrics, cost, run).write()
    write_table(per_query_path(run, "numbers"), {"query": [f"q{index}" for index in range(QUERIES)], **columns})
    write_learning(run / "metrics.csv", scores.mean())
    write_answers(top_path(run, "numbers"), scores, generator)


def write_table(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Write a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write_learning(path: Path, end: float) -> None:
    """Write a log as Lightning does: losses and validations in lines of their own, the other cells empty."""
    lines: list[tuple[object, ...]] = []
    for step in range(0, 241, 40):
        lines += [(step, 5 / (1 + step / 40), ""), (step, "", end * step / (step + 40))]
    names = ("step", "train/loss", "val/ndcg@10")
    write_table(path, {name: [line[column] for line in lines] for column, name in enumerate(names)})


def write_answers(path: Path, scores: np.ndarray, generator: np.random.Generator) -> None:
    """Write which documents each query found: its own stands where the score says, if anywhere."""
    found = {}
    for index, score in enumerate(scores):
        own = f"doc {index % DOCUMENTS}"
        others = [f"doc {other}" for other in generator.permutation(DOCUMENTS) if other != index % DOCUMENTS][:5]
        place = 0 if score > 0.9 else 2 if score > 0.5 else 9
        names = [*others[:place], own, *others[place:]][:5]
        top = [[name, 0.9 - 0.1 * rank, int(name == own)] for rank, name in enumerate(names)]
        text = f"number {index} {HOSTILE}" if index % 4 else None
        found[f"q{index}"] = {"query": text, "top": top, "relevant": {own: 1}}
    path.write_text(json.dumps(found))


def write_documents(folder: Path) -> None:
    """Write three of four documents as pictures, the others as texts."""
    for index in range(DOCUMENTS):
        kind = "jpg" if index % 4 else "txt"
        path = document_path(folder / "documents", "numbers", f"doc {index}", kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "txt":
            path.write_text(f"A text of some length about number {index}. {HOSTILE}")
            continue
        picture = Image.new("RGB", (160, 64), "white")
        ImageDraw.Draw(picture).text((50, 10), str(index), fill="black", font_size=40)
        picture.save(path, "JPEG")
