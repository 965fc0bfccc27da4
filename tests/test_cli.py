"""The commands, run in this process on a checkpoint and data that are as small as they can be."""

from __future__ import annotations

import csv
import inspect
import random
from pathlib import Path
from typing import Any

import pytest
import pytrec_eval
import torch
import yaml
from building import call, csv_logger, evaluation_folder, jsonl, picture, run_config
from hub_server import serve
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from test_hub import TOKEN, connect

from vlmembed.cli import Parser, main
from vlmembed.data import Pages, Rows, Table
from vlmembed.export import PushError
from vlmembed.search.encoding import encode

ROWS = 12
DEPTH = 5
COMMANDS = (
    "fit",
    "validate",
    "test",
    "predict",
    "export",
    "ablate",
    "mine",
    "score",
    "show",
    "encode",
    "search",
    "benchmark",
)


@pytest.fixture
def run(checkpoint: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration as a user would write it, with its data, in an empty folder that is the current one."""
    monkeypatch.setattr("sys.argv", ["vlmembed"])
    _write_data(here / "data")
    loss = a_class("vlmembed.losses.InfoNCE", temperature=0.05)
    matryoshka = a_class("vlmembed.losses.Matryoshka", loss=loss, dimensions=[64, 16])
    val = a_class("vlmembed.data.EvaluationFolder", path="data/evaluation", allow_outside=["data"])
    config = run_config(checkpoint, train="data/train.jsonl", val=val, test="data/train.jsonl", batch_size=4)
    config["model"]["init_args"]["backbone"]["init_args"]["max_length"] = 256
    config["model"]["init_args"] |= {"loss": matryoshka, "optimizer": a_class("torch.optim.AdamW", lr=1e-3)}
    config["trainer"] |= {"max_steps": 3, "enable_model_summary": False, "logger": csv_logger("small", version="")}
    return config | {"seed_everything": 0}


def a_class(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}


@pytest.fixture
def reranker(run: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The same of a reranker, whose candidates a first stage has found."""
    train = a_class("vlmembed.data.GroupByQuery", rows=a_class("vlmembed.data.Rows", path="data/labelled.jsonl"))
    found = {"evaluation": run["data"]["init_args"]["val"], "run": "data/found.trec", "depth": DEPTH}
    found = a_class("vlmembed.data.RerankingRun", **found)
    options = {"batch_size": 4, "chunk_size": "auto", "eval_batch_size": 3}
    config = run_config(checkpoint, "CrossEncoderModule", train=train, val=found, test=found, **options)
    config["model"]["init_args"]["backbone"]["init_args"]["max_length"] = 512
    optimizer = run["model"]["init_args"]["optimizer"]
    config["model"]["init_args"] |= {"loss": a_class("vlmembed.losses.SoftmaxCrossEntropy"), "optimizer": optimizer}
    return config | {"trainer": run["trainer"] | {"max_steps": 2}, "seed_everything": 0}


def _write_data(folder: Path) -> None:
    """Rows of one query do not stand together; a run finds some of the right answers, not first."""
    corpus = [{"id": f"d{index}", "image": f"../{index}.png"} for index in range(ROWS)]
    corpus.append({"id": "d0 again", "image": "../0.png"})  # Ties with d0, and is no right answer.
    queries = [{"id": f"q{index}", "text": f"number {index}"} for index in range(ROWS)]
    evaluation_folder(folder / "evaluation", corpus, queries, [(f"q{index}", f"d{index}", 1) for index in range(ROWS)])
    images = [{"image": f"{index}.png"} for index in range(ROWS)]
    for index, image in enumerate(images):
        picture(64, 32, index).save(folder / image["image"])
    jsonl(folder / "train.jsonl", [{"query": f"number {index}", "positive": images[index]} for index in range(ROWS)])
    labelled = [
        {"query": f"number {index}", "document": images[(index + step) % ROWS], "label": int(step == 0)}
        for step in (2, 0, 1)
        for index in range(ROWS)
    ]
    jsonl(folder / "labelled.jsonl", labelled)
    lines = [
        f"q{query} Q0 d{document} {rank} {-rank} first\n"
        for query in range(ROWS)
        for rank, document in enumerate(random.Random(query).sample(range(ROWS), DEPTH + 1), start=1)
    ]
    (folder / "found.trec").write_text("".join(lines))


def test_fit_then_everything_else(run: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    call("fit", run)
    folder = Path("runs/small")
    printed = capfd.readouterr().out
    assert "test/ndcg@10: " in printed
    assert "before training" in printed
    assert "Verified: " in printed
    for name in ("train/loss", "val/recall@1", "val/recall@10", "val/mrr@10", "val/ndcg@10/16"):
        assert logged(folder, name) >= 0
    assert logged(folder, "val/ndcg@10") == pytest.approx(ndcg(scores_of_embedder(folder / "export")), abs=1e-5)
    checkpoint = next((folder / "checkpoints").glob("*.ckpt"))

    saved = yaml.safe_load((folder / "config.yaml").read_text())
    saved["trainer"]["logger"]["init_args"]["name"] = "again"
    call("validate", saved, "--ckpt_path", str(checkpoint))
    call("test", saved, "--ckpt_path", str(checkpoint), "--trainer.logger.init_args.name=tested")
    call("predict", saved, "--ckpt_path", str(checkpoint), "--trainer.logger.init_args.name=predicted")
    call("export", saved, "--ckpt_path", str(checkpoint), "--output_dir", "elsewhere")
    _check_predictions(Path("runs/predicted/predictions"))
    assert_exported_alike(folder / "export", Path("elsewhere"))
    for place in (folder / "export", Path("elsewhere")):
        card = (place / "README.md").read_text()
        assert all(part in card for part in ("### Training Logs", "| Steps |", "- dataset_size:", "- type: ndcg@10"))


def assert_exported_alike(*folders: Path) -> None:
    """What `export` reads from the checkpoint is what `fit` exported from memory."""
    exported, again = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(exported[name], again[name]) for name in exported)


def logged(folder: Path, name: str) -> float:
    """The last value in metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)][-1]


Run = dict[str, dict[str, float]]


def ndcg(run: Run) -> float:
    qrels = {f"q{index}": {f"d{index}": 1} for index in range(ROWS)}
    measured = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(run)
    return sum(each["ndcg_cut_10"] for each in measured.values()) / ROWS


def scores_of_embedder(folder: Path) -> Run:
    """By stock Sentence Transformers, of all documents."""
    model = SentenceTransformer(str(folder), device="cpu")
    names = [*(f"d{index}" for index in range(ROWS)), "d0 again"]
    queries = model.encode_query([f"number {index}" for index in range(ROWS)])
    documents = model.encode_document([{"image": image_of(name)} for name in names])
    scores = model.similarity(queries, documents).tolist()
    return {f"q{index}": dict(zip(names, row, strict=True)) for index, row in enumerate(scores)}


def image_of(name: str) -> Image.Image:
    return Image.open(f"data/{name.removesuffix(' again')[1:]}.png")


def scores_of_reranker(folder: Path) -> Run:
    """The logits of stock Sentence Transformers, of each query's candidates."""
    model = CrossEncoder(str(folder), device="cpu")
    run = read_run(Path("data/found.trec"))
    inputs = [(f"number {query[1:]}", image_of(name)) for query, found in run.items() for name in found]
    scores = iter(model.predict(inputs, activation_fn=torch.nn.Identity()).tolist())
    return {query: {name: next(scores) for name in found} for query, found in run.items()}


def read_run(path: Path) -> Run:
    """The first candidates of each query in a run."""
    found: Run = {}
    for line in path.read_text().splitlines():
        query, _, document, rank, score, _ = line.split()
        if int(rank) <= DEPTH:
            found.setdefault(query, {})[document] = float(score)
    return found


def _check_predictions(folder: Path) -> None:
    embeddings = load_file(folder / "train.safetensors")
    lines = [line.split() for line in (folder / "train.trec").read_text().splitlines()]
    assert len(lines) == ROWS * ROWS
    scores = torch.nn.functional.cosine_similarity(embeddings["queries"][:1], embeddings["documents"])
    assert float(lines[0][4]) == pytest.approx(scores.max().item(), abs=1e-6)
    assert [int(line[3]) for line in lines[:ROWS]] == list(range(1, ROWS + 1))


@pytest.mark.exhaustive
def test_fit_a_reranker_then_everything_else(reranker: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    call("fit", reranker)
    folder = Path("runs/small")
    printed = capfd.readouterr().out
    assert printed.count("chunk_size: auto. A chunk may have") == 1
    assert all(text in printed for text in ("before reranking", "before training", "Verified: "))
    first_stage, scores = ndcg(read_run(Path("data/found.trec"))), scores_of_reranker(folder / "export")
    assert 0 < first_stage < 1
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
    # Candidates in the order of their logits, which are those of the exported folder.
    predicted = read_run(Path("runs/predict/predictions/evaluation.trec"))
    assert predicted.keys() == scores.keys()
    for query, found in predicted.items():
        assert [*found.values()] == sorted(found.values(), reverse=True)
        assert found == pytest.approx(scores[query], abs=1e-5)
        assert len(found) == DEPTH
    call("export", saved, "--ckpt_path", checkpoint, "--output_dir", "elsewhere")
    assert_exported_alike(folder / "export", Path("elsewhere"))


@pytest.mark.exhaustive
def test_export_uploads(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve(TOKEN) as hub:
        connect(monkeypatch, hub.url)
        options = ["--push_to_hub", "org/found-pages", "--private=true", "--revision", "first"]
        call("export", run, "--output_dir", "elsewhere", *options)
        assert "Uploaded: " in capfd.readouterr().out
        connect(monkeypatch, hub.url, "hf_wrong")
        with pytest.raises(PushError, match="again is whole and untouched"):
            call("export", run, "--output_dir", "again", "--push_to_hub", "org/found-pages")
    assert 'SentenceTransformer("org/found-pages")' in Path("elsewhere/README.md").read_text().replace("'", '"')
    assert Path("again/modules.json").exists()


def test_every_argument_can_be_overridden(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.init_args.loss.init_args.loss.init_args.temperature=0.07", "--data.init_args.batch_size=2"]
    with pytest.raises(SystemExit) as stopped:
        call("fit", run, *options, "--print_config")
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["loss"]["init_args"]["loss"]["init_args"]["temperature"] == 0.07
    assert printed["data"]["init_args"]["batch_size"] == 2


OPTIMIZER = "--model.init_args.optimizer"
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5, "weight_decay": 0.05}}


@pytest.mark.parametrize(
    ("overlay", "options", "arguments"),
    [
        ({"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}}, [], {"lr": 1.0}),
        ({"optimizer": "torch.optim.SGD"}, [], {}),
        (None, [f"{OPTIMIZER}=torch.optim.SGD"], {}),
        (None, [f"{OPTIMIZER}=SGD", f"{OPTIMIZER}.lr=2"], {"lr": 2.0}),
        (None, [f"{OPTIMIZER}.class_path=torch.optim.SGD", f"{OPTIMIZER}.init_args.lr=2"], {"lr": 2.0}),
        (None, [f"{OPTIMIZER}.init_args.lr=2", f"{OPTIMIZER}=torch.optim.SGD"], {}),
        (None, [OPTIMIZER + '={"class_path": "torch.optim.SGD", "init_args": {"lr": 3}}'], {"lr": 3.0}),
    ],
)
def test_no_argument_of_an_earlier_class_survives(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str], overlay: Any, options: list[str], arguments: dict[str, Any]
) -> None:
    run["model"]["init_args"]["optimizer"] = ADAMW
    if overlay is not None:
        Path("overlay.yaml").write_text(yaml.safe_dump({"model": {"init_args": overlay}}))
        options = ["--config", "overlay.yaml", *options]
    printed = expanded(run, options, capsys)["optimizer"]
    assert printed["class_path"] == "torch.optim.SGD"
    defaults = inspect.signature(torch.optim.SGD).parameters
    expected = {name: defaults[name].default for name in printed["init_args"]} | arguments
    assert printed["init_args"] == expected


def test_a_class_deep_inside_and_one_of_another_key_keep_nothing_either(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run["model"]["init_args"]["lr_scheduler"] = {
        "class_path": "torch.optim.lr_scheduler.PolynomialLR",
        "init_args": {"total_iters": 7},
    }
    loss = "--model.init_args.loss.init_args.loss=vlmembed.losses.ScoreDistillation"
    schedule = "--model.init_args.lr_scheduler=torch.optim.lr_scheduler.LinearLR"
    printed = expanded(run, [loss, schedule], capsys)
    assert printed["loss"]["init_args"]["dimensions"] == [64, 16]  # Of a class that stays.
    assert printed["loss"]["init_args"]["loss"]["init_args"]["temperature"] != 0.05
    assert printed["lr_scheduler"]["init_args"]["total_iters"] is None


def test_what_names_no_other_class_is_merged(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run["model"]["init_args"]["optimizer"] = ADAMW
    optimizer = expanded(run, [OPTIMIZER + '={"init_args": {"lr": 3}}', f"{OPTIMIZER}.eps=1e-3"], capsys)["optimizer"]
    assert [optimizer["init_args"][name] for name in ("lr", "weight_decay", "eps")] == [3.0, 0.05, 1e-3]


def expanded(run: dict[str, Any], options: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The model's arguments, as the parser has them at the end."""
    with pytest.raises(SystemExit):
        call("fit", run, *options, "--print_config")
    arguments: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    return arguments


@pytest.mark.parametrize("place", ["model", "data", "trainer"])
def test_an_unknown_key_is_refused(run: dict[str, Any], place: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = run[place].get("init_args", run[place])
    target["temprature"] = 1
    with pytest.raises(SystemExit) as stopped:
        call("fit", run)
    assert stopped.value.code != 0
    assert "temprature" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["in the file", "on the command line"])
def test_a_token_is_refused_and_not_repeated(
    run: dict[str, Any], written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    token, options = "hf_" + "a1B2" * 9, []
    if written == "in the file":
        run["data"]["init_args"]["test"] = token
    else:
        options = [f"--data.init_args.test={token}"]
    with pytest.raises(ValueError, match=r"data\.init_args\.test.*HF_TOKEN") as error:
        call("fit", run, *options)
    assert token not in str(error.value) + "".join(capsys.readouterr())
    assert not Path("runs").exists()


def test_a_used_output_folder_is_refused_before_anything_is_done(run: dict[str, Any]) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="thesis is not empty"):
        call("export", run, "--output_dir", "thesis")
    assert [path.name for path in Path("thesis").iterdir()] == ["chapter.txt"]


def test_the_csv_log_is_written_beside_others(run: dict[str, Any]) -> None:
    run["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "boards"},
    }
    run["trainer"]["exporter"] = None
    run["trainer"]["max_steps"] = 1
    call("fit", run)
    assert list(Path("runs").rglob("metrics.csv"))
    assert list(Path("boards").rglob("events.out.tfevents*"))
    assert not list(Path().rglob("modules.json"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fit --model.help vlmembed.modules.EmbeddingModule", "From its hidden states to an embedding"),
        ("fit --model.help vlmembed.modules.EmbeddingModule", "Learning rates other than the optimizer's"),
        ("ablate --help", "--retry_failed run failed trials again"),
        ("mine --help", "--relative_margin"),
        ("score --help", "--batch_size"),
        ("show --help", "--rows"),
        *(("--help", f" {command} ") for command in COMMANDS),
    ],
)
def test_help(words: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["vlmembed"])
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 0
    assert expected.lower() in " ".join(capsys.readouterr().out.split()).lower()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["vlmembed.data.Pages", "--corpus.path", "x", "--corpus.text", "true"], Pages("x", text=True)),
        (["vlmembed.data.Table", "--corpus.path", "x", "--corpus.split", "test"], Table("x", split="test")),
        (["vlmembed.data.Rows", "--corpus.path", "x"], Rows("x")),
        (['{"path": "x", "split": "test"}'], Table("x", split="test")),
        (["x"], "x"),
    ],
)
def test_a_corpus_is_of_the_class_that_is_named(words: list[str], expected: Any) -> None:
    """Also on the command line, where several classes take what is given."""
    parser = Parser()
    parser.add_function_arguments(encode, sub_configs=False)
    arguments = ["--model", "m", "--output", "o", "--corpus", *words]
    corpus = parser.instantiate_classes(parser.parse_args(arguments)).corpus
    assert type(corpus) is type(expected)
    assert corpus == expected if isinstance(corpus, str) else vars(corpus) == vars(expected)
