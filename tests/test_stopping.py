"""Runs that are told to stop, or killed, and gone on with; `experiments/survival` does it at random moments."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from building import csv_logger, run_config
from forked import CONTEXT, as_not_forked

from vlmembed.__main__ import main
from vlmembed.training.signals import end_with_parent

STEPS = 16
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"

#: What the run began with, and what it went on with.
CONFIGURATIONS = ["config.1.yaml", "config.yaml"]


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> dict[str, Any]:
    numbers = {"class_path": "vlmembed.data.digits.HandwrittenNumbers", "init_args": {"size": 48}}
    lora = {"r": 2, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}
    adapter = {"config": {"class_path": "peft.LoraConfig", "init_args": lora}}
    saver = {"every_n_train_steps": 3, "save_last": True}
    config = run_config(checkpoint, train=numbers, val=numbers, batch_size=6, chunk_size=4, num_workers=1)
    config["model"]["init_args"] |= {
        "adapters": [{"class_path": "vlmembed.adapters.LoRA", "init_args": adapter}],
        "lr_scheduler": {"class_path": "vlmembed.modules.CosineDecay"},
    }
    config["trainer"] |= {
        "max_epochs": 2,
        "val_check_interval": 4,
        "enable_model_summary": False,
        "exporter": None,
        "logger": csv_logger("run"),
        "callbacks": [{"class_path": CHECKPOINT, "init_args": saver}],
    }
    return config | {"seed_everything": 1}


def start(folder: Path, config: dict[str, Any], run: Callable[[Path], None] | None = None) -> Any:
    """Run the command in a process of its own, forked from one that has imported everything."""
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    process = CONTEXT.Process(target=run or fit, args=(folder,))
    process.start()
    return process


def fit_two(folder: Path) -> None:
    """Be the first of two processes, and fork the second, as Lightning would start it."""
    os.environ |= {"WORLD_SIZE": "2", "NODE_RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(20000 + os.getpid() % 40000)
    if not os.fork():
        os.environ["LOCAL_RANK"] = "1"
    fit(folder)


def fit(folder: Path) -> None:
    os.chdir(folder)
    as_not_forked()
    main(["fit", "--config", "run.yaml", "--ckpt_path", "last"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, config)
    process.join()
    assert process.exitcode == 0
    return folder / "runs/run/version_0"


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)


def terminate(process: Any) -> None:
    os.kill(process.pid, signal.SIGTERM)


def interrupt(process: Any) -> None:
    """As a terminal does: loader workers are told as well."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        os.kill(each.pid, signal.SIGINT)


def kill_worker(process: Any) -> None:
    psutil.Process(process.pid).children()[0].kill()


@pytest.mark.parametrize(
    ("stop", "status"),
    [(kill, -signal.SIGKILL), (terminate, 143), (interrupt, 130), (kill_worker, 1)],
    ids=["SIGKILL", "SIGTERM", "Ctrl-C", "a worker's death"],
)
def test_a_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, config: dict[str, Any], undisturbed: Path, stop: Callable[[Any], None], status: int
) -> None:
    process = start(tmp_path, config)
    run = tmp_path / "runs/run/version_0"
    _wait_for(run / "checkpoints/last.ckpt", process)
    stop(process)
    process.join(60)
    assert process.exitcode == status
    step = torch.load(max((run / "checkpoints").glob("*.ckpt"), key=os.path.getmtime), weights_only=True)["global_step"]
    assert 0 < step < STEPS
    again = start(tmp_path, config)
    again.join(120)
    assert again.exitcode == 0
    assert _state(run) == _state(undisturbed)
    assert _rows(run) == _rows(undisturbed)
    assert not (run / "checkpoints/stopped.ckpt").exists()


def test_a_second_ctrl_c_ends_at_once_and_so_does_one_while_measuring(tmp_path: Path, config: dict[str, Any]) -> None:
    many = {"class_path": "vlmembed.data.digits.HandwrittenNumbers", "init_args": {"size": 4000}}
    data = {**config["data"], "init_args": {**config["data"]["init_args"], "val": many}}
    process = start(tmp_path / "measuring", {**config, "data": data})
    _wait_for(tmp_path / "measuring/runs/run/version_0/config.yaml", process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    process = start(tmp_path / "training", config)
    _wait_for(tmp_path / "training/runs/run/version_0/checkpoints/last.ckpt", process)
    # In a step, or a validation, which nobody waits for: the first is put where it is under way.
    os.kill(process.pid, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130


def test_of_two_processes_none_waits_for_one_that_is_told_to_end_while_measuring(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    many = {"class_path": "vlmembed.data.digits.HandwrittenNumbers", "init_args": {"size": 4000}}
    data = {**config["data"], "init_args": {**config["data"]["init_args"], "val": many}}
    trainer = {**config["trainer"], "devices": 2, "strategy": "ddp"}
    process = start(tmp_path, {**config, "data": data, "trainer": trainer}, fit_two)
    first = psutil.Process(process.pid)
    # The second process, and a loader worker of each.
    while process.is_alive() and len(first.children(recursive=True)) < 3:
        time.sleep(0.01)
    everybody = [first, *first.children(recursive=True)]
    time.sleep(0.5)
    terminate(process)
    process.join(30)
    assert process.exitcode == -signal.SIGTERM
    _, alive = psutil.wait_procs(everybody, timeout=30)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def _orphan(folder: Path, rank: str) -> None:
    """As Lightning starts a second process, or torchrun all of them."""
    os.environ["LOCAL_RANK"] = rank
    if rank == "0":
        os.environ["TORCHELASTIC_RUN_ID"] = "run"
    if not os.fork():
        end_with_parent()
        (folder / "child").write_text(str(os.getpid()))
    time.sleep(600)


@pytest.mark.parametrize("rank", ["0", "1"], ids=["torchrun", "Lightning"])
def test_a_process_ends_when_the_one_that_started_it_is_dead(tmp_path: Path, rank: str) -> None:
    process = CONTEXT.Process(target=_orphan, args=(tmp_path, rank))
    process.start()
    _wait_for(tmp_path / "child", process)
    time.sleep(0.1)
    child = psutil.Process(int((tmp_path / "child").read_text()))
    time.sleep(1.5)
    assert child.is_running()
    assert child.status() != psutil.STATUS_ZOMBIE
    kill(process)
    process.join()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive or child.status() == psutil.STATUS_ZOMBIE


BEST = {"monitor": "val/ndcg@10", "mode": "max"}
RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
#: Ways to keep checkpoints, and other settings of the trainer.
KEEPING: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "a name with folders": ([{"filename": "{step}-{val/ndcg@10:.3f}", "save_top_k": 2, "save_last": True, **BEST}], {}),
    "another folder": ([{"dirpath": "kept/here", "every_n_train_steps": 2}], {}),
    "several, one of weights alone": (
        [
            {"filename": "{step}-weights", "every_n_train_steps": 3, "save_weights_only": True},
            {"filename": "{step}-full", "every_n_train_steps": 2},
            {"filename": "{step}-all", "every_n_train_steps": 4, "save_top_k": -1, "save_last": True},
        ],
        {},
    ),
    "a link": ([{"every_n_train_steps": 2, "save_last": "link"}], {}),
    "a link, within windows": (
        [{"every_n_train_steps": 1, "save_last": "link"}],
        {"accumulate_grad_batches": 2, "val_check_interval": 4},
    ),
    "by time, within windows": (
        [{"train_time_interval": "00:00:00", "filename": "newest"}],
        {"accumulate_grad_batches": 4, "val_check_interval": 4},
    ),
    "a recipe": (yaml.safe_load(RECIPES[-1].read_text())["trainer"]["callbacks"], {}),
}


def test_the_recipes_keep_checkpoints_as_the_one_that_is_killed_below() -> None:
    kept = [yaml.safe_load(recipe.read_text())["trainer"]["callbacks"] for recipe in RECIPES]
    for callbacks in kept:
        assert all(saver["class_path"].endswith(".ModelCheckpoint") for saver in callbacks)
        assert any(saver["init_args"]["save_last"] is True for saver in callbacks)
    assert [callbacks for callbacks in kept if callbacks[0]["init_args"].keys() != {"save_last"}] == [kept[-1]] * 8


#: Whose mechanisms the others have as well.
COVERED = (
    "another folder",
    "a link",
    "several, one of weights alone",
    "by time, within windows",
    "a recipe",
    "a link, within windows",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name in COVERED else []) for name in KEEPING]
)
def test_three_kills_leave_the_checkpoints_of_none(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    """Whatever they are called, and wherever they are."""
    savers, options = KEEPING[name]
    savers = [saver if "class_path" in saver else {"class_path": CHECKPOINT, "init_args": saver} for saver in savers]
    trainer = {**config["trainer"], "max_epochs": 1, "callbacks": savers, **options}
    whole = start(tmp_path / "whole", {**config, "trainer": trainer})
    whole.join()
    assert whole.exitcode == 0
    folder = tmp_path / "killed"
    for _ in range(3):
        process = start(folder, {**config, "trainer": trainer})
        present = _checkpoints(folder)
        while process.is_alive() and _checkpoints(folder).items() <= present.items():
            time.sleep(0.01)
        process.kill()  # Or it has finished.
        process.join()
    process = start(folder, {**config, "trainer": trainer})
    process.join()
    assert process.exitcode == 0
    assert _checkpoints(folder).keys() == _checkpoints(tmp_path / "whole").keys()
    for place in _checkpoints(folder):
        assert _weights(folder / place) == _weights(tmp_path / "whole" / place), place
    run = "runs/run/version_0"
    assert _rows(folder / run) == _rows(tmp_path / "whole" / run)
    assert not [*(folder / "runs/run").glob("version_1*"), *folder.rglob("*.draft")]


def test_a_run_does_not_go_on_as_another(
    tmp_path: Path, config: dict[str, Any], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(undisturbed.parents[2], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", "run.yaml", "--ckpt_path", "last"]
    with pytest.raises(ValueError, match=r"data\.init_args\.batch_size: 6 → 4\n.*--trainer\.allow_changed"):
        main([*command, "--data.init_args.batch_size=4"])
    assert _state(tmp_path / "runs/run/version_0") == _state(undisturbed)
    longer = ["--trainer.max_epochs=3", "--trainer.allow_changed=[trainer.max_epochs]"]
    main([*command, *longer, "--data.init_args.num_workers=0"])
    run = tmp_path / "runs/run/version_0"
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] > STEPS
    assert [yaml.safe_load((run / name).read_text())["trainer"]["max_epochs"] for name in CONFIGURATIONS] == [2, 3]
    assert _rows(run)[: len(_rows(undisturbed)) - 1] == _rows(undisturbed)[:-1]


def _checkpoints(folder: Path) -> dict[str, int]:
    """What there is, and when it was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.ckpt") if path.exists()}


def _weights(path: Path) -> Any:
    content = torch.load(path, weights_only=True)
    return _bits(content["state_dict"]), content["global_step"]


def _wait_for(path: Path, process: Any) -> None:
    while not path.exists() and process.is_alive():
        time.sleep(0.01)


def _state(run: Path) -> dict[str, Any]:
    """The end of a run: every bit of its weights, its optimizer and its schedule, in a form that compares."""
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return {name: _bits(content[name]) for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def _bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _bits(each) for key, each in value.items()}
    return [*map(_bits, value)] if isinstance(value, list | tuple) else value


def _rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
