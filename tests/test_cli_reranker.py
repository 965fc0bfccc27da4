"""The commands on a reranker, run in this process on a checkpoint and data that are as small as they can be."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import pytrec_eval
import torch
import yaml
from building import csv_logger, picture, run_config
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder

from vlmembed.cli import main

ROWS = 8
DEPTH = 5


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration as a user would write it, with its data, in an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vlmembed"])
    _write_data(tmp_path / "data")
    rows = {"class_path": "vlmembed.data.Rows", "init_args": {"path": "data/train.jsonl"}}
    options = {"path": "data/evaluation", "allow_outside": ["data"]}
    evaluation = {"class_path": "vlmembed.data.EvaluationFolder", "init_args": options}
    found = {"evaluation": evaluation, "run": "data/found.trec", "depth": DEPTH}
    run = {"class_path": "vlmembed.data.RerankingRun", "init_args": found}
    rows = {"class_path": "vlmembed.data.GroupByQuery", "init_args": {"rows": rows}}
    options = {"batch_size": 4, "chunk_size": "auto", "eval_batch_size": 3}
    config = run_config(checkpoint, train=rows, val=run, test=run, **options)
    backbone = config["model"]["init_args"]["backbone"]
    backbone["init_args"]["max_length"] = 512
    config["model"] = {
        "class_path": "vlmembed.modules.CrossEncoderModule",
        "init_args": {
            "backbone": backbone,
            "loss": {"class_path": "vlmembed.losses.SoftmaxCrossEntropy"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
    }
    config["trainer"] |= {"max_steps": 2, "enable_model_summary": False, "logger": csv_logger("small", version="")}
    return config | {"seed_everything": 0}


def _write_data(folder: Path) -> None:
    """Rows of one query do not stand together; a run finds some of the right answers, not first."""
    evaluation = folder / "evaluation"
    evaluation.mkdir(parents=True)
    for index in range(ROWS):
        picture(64, 32, index).save(folder / f"{index}.png")
    rows = [
        {"query": f"number {index}", "document": {"image": f"{(index + step) % ROWS}.png"}, "label": int(step == 0)}
        for step in (2, 0, 1)
        for index in range(ROWS)
    ]
    corpus = [{"id": f"d{index}", "image": f"../{index}.png"} for index in range(ROWS)]
    queries = [{"id": f"q{index}", "text": f"number {index}"} for index in range(ROWS)]
    for name, entries in (("train", rows), ("evaluation/corpus", corpus), ("evaluation/queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (evaluation / "qrels.tsv").write_text("".join(f"q{index}\td{index}\t1\n" for index in range(ROWS)))
    lines = [
        f"q{query} Q0 d{document} {rank} {-rank} first\n"
        for query in range(ROWS)
        for rank, document in enumerate(random.Random(query).sample(range(ROWS), 6), start=1)
    ]
    (folder / "found.trec").write_text("".join(lines))


def call(command: str, config: dict[str, Any], *options: str) -> None:
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main([command, "--config", "run.yaml", *options])


@pytest.mark.exhaustive
def test_fit_then_everything_else(config: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    call("fit", config)
    folder = Path("runs/small")
    printed = capfd.readouterr().out
    assert printed.count("chunk_size: auto. A chunk may have") == 1
    assert "before reranking" in printed
    assert "before training" in printed
    assert "Verified: " in printed
    first_stage = ndcg(read_run(Path("data/found.trec")))
    assert 0 < first_stage < 1
    scores = scores_of_export(folder / "export")
    assert logged(folder, "val/ndcg@10/before") == pytest.approx(first_stage, abs=1e-6)
    assert logged(folder, "val/ndcg@10") == pytest.approx(ndcg(scores), abs=1e-6)
    assert logged(folder, "train/loss") > 0

    saved = yaml.safe_load((folder / "config.yaml").read_text())
    checkpoint = str(next((folder / "checkpoints").glob("*.ckpt")))
    for command in ("validate", "test", "predict"):
        call(command, saved, "--ckpt_path", checkpoint, f"--trainer.logger.init_args.name={command}")
    for command, stage in (("validate", "val"), ("test", "test")):
        assert logged(Path("runs") / command, f"{stage}/ndcg@10") == logged(folder, "val/ndcg@10")
        assert logged(Path("runs") / command, f"{stage}/mrr@10/before") > 0
    check_predictions(Path("runs/predict/predictions/evaluation.trec"), scores)
    call("export", saved, "--ckpt_path", checkpoint, "--output_dir", "elsewhere")
    # What `export` reads from the checkpoint is what `fit` exported from memory.
    exported, again = (load_file(place / "model.safetensors") for place in (folder / "export", Path("elsewhere")))
    assert all(torch.equal(exported[name], again[name]) for name in exported)


Run = dict[str, dict[str, float]]


def read_run(path: Path) -> Run:
    """The first candidates of each query in a run."""
    found: Run = {}
    for line in path.read_text().splitlines():
        query, _, document, rank, score, _ = line.split()
        if int(rank) <= DEPTH:
            found.setdefault(query, {})[document] = float(score)
    return found


def ndcg(run: Run) -> float:
    qrels = {f"q{index}": {f"d{index}": 1} for index in range(ROWS)}
    measured = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(run)
    return sum(each["ndcg_cut_10"] for each in measured.values()) / ROWS


def scores_of_export(folder: Path) -> Run:
    """The logits of stock Sentence Transformers, of each query's candidates."""
    model = CrossEncoder(str(folder), device="cpu")
    pairs = [(query, document) for query, found in read_run(Path("data/found.trec")).items() for document in found]
    inputs = [(f"number {query[1:]}", Image.open(f"data/{document[1:]}.png")) for query, document in pairs]
    scores = model.predict(inputs, activation_fn=torch.nn.Identity())
    run: Run = {}
    for (query, document), score in zip(pairs, scores.tolist(), strict=True):
        run.setdefault(query, {})[document] = score
    return run


def logged(folder: Path, name: str) -> float:
    """The last value in metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)][-1]


def check_predictions(path: Path, expected: Run) -> None:
    """Candidates in the order of their logits, which are those of the exported folder."""
    found = read_run(path)
    assert found.keys() == expected.keys()
    for query, scores in found.items():
        assert [*scores.values()] == sorted(scores.values(), reverse=True)
        assert scores == pytest.approx(expected[query], abs=1e-5)
        assert len(scores) == DEPTH
