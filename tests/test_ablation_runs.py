"""A whole ablation with a model, which is trained, measured and recorded, and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from ablating import base_with_model
from building import call, run_config, write_rows
from PIL import Image
from transformers import AutoModel

from vlmembed.ablation.record import Record, content_path, show
from vlmembed.ablation.run import Trial, csv_logger, read_trials
from vlmembed.data.evaluation import as_evaluation
from vlmembed.types import Item, Part

OWN_POOLING = """
from vlmembed.pooling import Mean


class Doubled(Mean):
    def forward(self, hidden, mask, input_ids=None):
        return 2 * super().forward(hidden, mask, input_ids)
"""


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """Where a user would be: data, a configuration, an ablation of it, and a pooling of their own."""
    write_rows(tmp_path / "data" / "rows.jsonl")
    (tmp_path / "my_parts.py").write_text(OWN_POOLING)
    inner = {"class_path": "vlmembed.losses.InfoNCE", "init_args": {"temperature": 0.05}}
    loss = {"class_path": "vlmembed.losses.Matryoshka", "init_args": {"loss": inner, "dimensions": [64, 16]}}
    trainer = {"max_epochs": 2, "log_every_n_steps": 1, "enable_progress_bar": False, "exporter": None}
    base = base_with_model(checkpoint, trainer, loss, train="data/rows.jsonl", test="data/rows.jsonl", batch_size=3)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "ablation.yaml").write_text(
        "base: base.yaml\n"
        "output_dir: out\n"
        "metric: test/ndcg@10\n"
        "grid:\n"
        "  pooling:\n"
        "    key: model.init_args.pooling\n"
        "    values:\n"
        "      mean: {class_path: vlmembed.pooling.Mean}\n"
        "      mine: {class_path: my_parts.Doubled}\n"
    )
    return tmp_path


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vlmembed", "ablate", "--config", "ablation.yaml", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed


def check_record(trial: Trial, rows: str) -> None:
    """What is written of each query agrees with the metrics, and with itself; what can be shown is there."""
    evaluation = as_evaluation(rows)
    measured, documents = trial.folder / "measured" / evaluation.name, trial.folder.parents[2] / "documents"
    queries = pd.read_csv(measured / "per_query.csv", index_col="query", dtype={"query": str})
    assert list(queries.index) == evaluation.query_names
    for name in ("ndcg@10", "map", "ndcg@10/16"):
        # Logged values are float32.
        assert queries[name].mean() == pytest.approx(trial.metrics[f"test/{name}"], rel=1e-6)
    found = json.loads((measured / "top.json").read_text())
    assert [*found] == sorted(evaluation.query_names)
    for name, entry in found.items():
        top, relevant = entry["top"], entry["relevant"]
        asked = evaluation.queries[evaluation.query_names.index(name)].parts[0].value
        assert content_path(documents / "queries" / evaluation.name, name, "txt").read_text() == asked
        assert relevant == {key: grade for key, grade in evaluation.qrels[name].items() if grade > 0}
        assert [score for _, score, _ in top] == sorted((score for _, score, _ in top), reverse=True)
        assert [grade for _, _, grade in top] == [relevant.get(key, 0) for key, *_ in top]
        assert len(top) == 5
        assert queries.loc[name, "recall@1"] == pytest.approx(top[0][2] / len(relevant))
        for key, *_ in top:
            content = evaluation.corpus[evaluation.document_names.index(key)].parts[0]
            path = content_path(documents / evaluation.name, key, "txt" if content.kind == "text" else "jpg")
            assert content.kind != "text" or path.read_text() == content.value
            assert content.kind == "text" or Image.open(path).size == Image.open(content.value).size


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_ablation_that_is_killed_ends_as_one_that_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    process = start(folder, "--output_dir", "killed")
    while not (folder / "killed" / "settings" / "pooling-mine" / "seed-0" / "config.yaml").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [trial.setting["pooling"] for trial in read_trials(folder / "killed")] == ["mean"]
    printed = finish(start(folder, "--output_dir", "killed"))
    assert "pooling=mine, seed 0: started" in printed
    assert "pooling=mean, seed 0: started" not in printed
    finish(start(folder))
    killed, whole = read_trials(folder / "killed"), read_trials(folder / "out")
    assert [trial.metrics for trial in killed] == [trial.metrics for trial in whole]
    mean, mine = whole
    # Twice the mean is the mean, under a cosine; a power of two rounds nothing.
    assert mean.metrics == mine.metrics
    fresh, trained = pd.read_csv(mean.folder / "metrics.csv", float_precision="round_trip")["test/ndcg@10"].dropna()
    assert trained == mean.metrics["test/ndcg@10"] != fresh
    check_record(mean, "data/rows.jsonl")
    check_cost(mean.cost, folder)


def check_cost(cost: Any, folder: Path) -> None:
    config = yaml.safe_load((folder / "base.yaml").read_text())
    model = AutoModel.from_pretrained(config["model"]["init_args"]["backbone"]["init_args"]["checkpoint"])
    assert cost["trained_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert cost["pooling_parameters"] == 0
    assert (cost["embedding_dimension"], cost["document_bytes"]) == (64, 256)
    assert 0 < cost["search_seconds"] < 1
    # Nine rows, three a step.
    assert cost["steps_per_epoch"] == 3
    assert 0 < cost["seconds_per_step"] < 10
    # No Python with torch takes less than 100 MB, and the model is tiny.
    assert 1e8 < cost["peak_memory_bytes"] < 4e9


@pytest.mark.parametrize("kind", ["EmbeddingModule", "MultiVectorModule", "CrossEncoderModule"])
def test_what_a_document_and_a_search_cost(kind: str, checkpoint: Path, here: Path) -> None:
    """Bytes of all vectors of a document in float32: none of a reranker, which reads it with each query."""
    rows = str(write_rows(here / "rows.jsonl"))
    config = run_config(checkpoint, kind, train=rows, test=rows, batch_size=3)
    record = {"class_path": "vlmembed.ablation.record.Record", "init_args": {"documents": "documents"}}
    config["trainer"] |= {"max_steps": 1, "exporter": None, "callbacks": [record], "logger": csv_logger(Path("a/b"))}
    if kind == "MultiVectorModule":
        projection = {"class_path": "vlmembed.pooling.TokenProjection", "init_args": {"size": 24}}
        config["model"]["init_args"] |= {"projection": projection, "merging_factors": [2], "two_stage": 3}
    call("fit", config)
    cost = json.loads((here / "a/b/cost.json").read_text())
    logged = pd.read_csv(here / "a/b/metrics.csv").ffill().iloc[-1]
    vectors = logged.get("test/vectors_per_document", 0)
    expected = {"EmbeddingModule": 4 * 64, "MultiVectorModule": 4 * 24 * vectors, "CrossEncoderModule": 0}
    assert cost["document_bytes"] == pytest.approx(expected[kind])
    assert 0 < cost["search_seconds"] < 10
    if kind == "MultiVectorModule":
        names = ("ndcg@10", "ndcg@10/x2", "ndcg@10/two_stage", "vectors_per_document/x2")
        assert {f"test/{name}" for name in names} <= {*logged.index}
        assert logged["test/vectors_per_document"] > logged["test/vectors_per_document/x2"] >= 1


class Clocked(Record):
    """Reads its times from a list."""

    times: list[int]

    def now(self, device: torch.device) -> float:
        return self.times.pop(0)


def test_a_step_is_what_its_batches_take_together() -> None:
    """Batches of 1, 2, 3 … seconds, two to a step: 3, 7, 11, 15 and 19 seconds, of which the first two do not count."""
    recorded = Clocked("documents")
    recorded.times = [value for batch in range(1, 11) for value in (100 * batch, 101 * batch)]
    trainer, model = SimpleNamespace(global_step=4), SimpleNamespace(device=torch.device("cpu"))
    recorded.on_train_start(trainer, model)
    for batch in range(10):
        recorded.on_train_batch_start(trainer, model, None, batch)
        trainer.global_step += batch % 2
        recorded.on_train_batch_end(trainer, model, None, None, batch)
    assert recorded.seconds_per_step == 15


def test_an_item_is_shown_by_its_image_made_small_and_its_text(tmp_path: Path) -> None:
    parts = (Part("image", Image.new("RGB", (640, 320))), Part("text", "but in red"), Part("video", Path("crane.mp4")))
    show(Item("query", parts, "row 3"), tmp_path, "a/b")
    assert Image.open(content_path(tmp_path, "a/b", "jpg")).size == (160, 80)
    assert content_path(tmp_path, "a/b", "txt").read_text() == "but in red\ncrane.mp4"
