"""What runs leave on disk: checkpoints, without what is frozen; folders and logs; configurations that have changed."""

from __future__ import annotations

import csv
import io
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
import yaml
from building import module, trainer, write_rows
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import AdamW

from vlmembed.ablation.command import Probe
from vlmembed.adapters import Freeze, LoRA
from vlmembed.backbones import tiny
from vlmembed.data import RetrievalDataModule
from vlmembed.files import HOST
from vlmembed.losses import InfoNCE
from vlmembed.modules import EmbeddingModule
from vlmembed.trainer import Trainer
from vlmembed.training import run_folder
from vlmembed.training.checkpoint_files import CheckpointFiles, newest_checkpoint
from vlmembed.training.checkpointing import FROZEN, Checkpointing, complete_frozen
from vlmembed.training.run_folder import fit_folder, other_folder, refuse_changes
from vlmembed.training.signals import StopSafely, _requeue

# Files

STATE = {"state_dict": {"weight": torch.arange(1000.0)}, "optimizer_states": [], "global_step": 3}


def written(path: Path, step: int, age: float, **more: Any) -> Path:
    CheckpointFiles().save_checkpoint({**STATE, "global_step": step, **more}, path)
    os.utime(path, (time.time() - age, time.time() - age))
    return path


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[:-100],
    "a bit flipped": lambda content: content[: len(content) // 2] + b"\x55" + content[len(content) // 2 + 1 :],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_found(tmp_path: Path, damage: str) -> None:
    written(tmp_path / "a/older.ckpt", 1, age=300)
    whole = written(tmp_path / "b/newer.ckpt", 2, age=200)
    only_weights = io.BytesIO()
    torch.save({"state_dict": {}}, only_weights)
    written(tmp_path / "a/weights.ckpt", 4, age=50).write_bytes(only_weights.getvalue())
    torn = written(tmp_path / "a/{val/ndcg@10}/last.ckpt", 3, age=100)  # A metric's name makes folders.
    torn.write_bytes(DAMAGES[damage](torn.read_bytes()))
    os.utime(torn, (time.time(), time.time()))
    with pytest.warns(UserWarning, match=r"last\.ckpt is not whole: .*\. An earlier one is looked for"):
        newest = newest_checkpoint([tmp_path / "a", tmp_path / "b", tmp_path / "nowhere"])
    assert newest is not None
    assert newest[0] == whole
    assert newest[1]["global_step"] == 2


def test_a_full_disk_leaves_the_checkpoint_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "last.ckpt", 1, age=0)
    before = path.read_bytes()
    open_file = Path.open
    full = lambda path, *mode, **more: open_file(  # noqa: E731
        Path("/dev/full") if path.suffix == ".draft" else path, *mode, **more
    )
    monkeypatch.setattr(Path, "open", full)  # Where it will be written before it is moved.
    with pytest.raises(
        OSError, match=r"last\.ckpt could not be written: No space left .* are as they were.*--ckpt_path last"
    ):
        CheckpointFiles().save_checkpoint({**STATE, "global_step": 2}, path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_its_place_never_holds_a_part_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "last.ckpt", 1, age=0)
    before = path.read_bytes()
    seen = []
    monkeypatch.setattr(os, "replace", lambda draft, place: seen.append((Path(draft), Path(place).read_bytes())))
    CheckpointFiles().save_checkpoint({**STATE, "global_step": 2}, path)
    (draft, there) = seen[0]
    assert there == before
    assert draft.parent == path.parent  # Moving it from another file system would be copying it.


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("run",)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_checkpoint_is_not_run(here: Path, write: Any) -> None:
    write({**STATE, "more": Code()}, here / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt (holds more than tensors|is not whole)"):
        CheckpointFiles().load_checkpoint(here / "last.ckpt")
    assert not (here / "run").exists()


def test_a_checkpoint_from_the_network_is_not_run_either(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: asked.update(options) or STATE)
    monkeypatch.setattr("fsspec.implementations.http.HTTPFileSystem._exists", _exists, raising=False)
    CheckpointFiles().load_checkpoint("https://example.org/last.ckpt")
    assert asked["weights_only"] is True


async def _exists(*arguments: Any, **options: Any) -> bool:
    return True


def test_the_trainer_uses_them_unless_others_are_given() -> None:
    class Own(TorchCheckpointIO):
        pass

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    assert isinstance(Trainer(**options).strategy.checkpoint_io, CheckpointFiles)
    assert isinstance(Trainer(**options, plugins=[Own()]).strategy.checkpoint_io, Own)


# Frozen weights

FAST = partial(AdamW, lr=0.01)


def model(checkpoint: Path, targets: tuple[str, ...] = ("q_proj",)) -> EmbeddingModule:
    adapters = [LoRA(LoraConfig(r=2, target_modules=list(targets)))]
    return module(checkpoint, InfoNCE(0.05, learnable_temperature=True), adapters=adapters, optimizer=FAST)


def trained(built: EmbeddingModule, folder: Path, **options: Any) -> Path:
    """Train a little; return the checkpoint."""
    rows = write_rows(folder / "rows.jsonl")
    data = RetrievalDataModule(str(rows), batch_size=3, num_workers=0)
    saver = ModelCheckpoint(folder)
    trainer(enable_checkpointing=True, callbacks=[saver], **options).fit(built, datamodule=data)
    return Path(saver.best_model_path)


Run = tuple[EmbeddingModule, Path]


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model with a LoRA that was trained a little, and its checkpoint, beside the rows."""
    built = model(checkpoint)
    return built, trained(built, tmp_path_factory.mktemp("run"))


def load(built: EmbeddingModule, file: Path) -> None:
    built.checkpointing.load_weights(built, torch.load(file, weights_only=True))


def test_a_checkpoint_of_a_lora_has_the_lora_alone(checkpoint: Path, run: Run) -> None:
    built, file = run
    trainable = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert torch.load(file, weights_only=True)["state_dict"].keys() == trainable
    assert file.stat().st_size < (checkpoint / "model.safetensors").stat().st_size / 10


def test_frozen_weights_are_rounded_as_they_were_in_training(checkpoint: Path, tmp_path: Path) -> None:
    built = model(checkpoint)
    file = trained(built, tmp_path, precision="bf16-true")
    fresh = model(checkpoint)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    load(fresh, file)
    name = next(name for name in built.checkpointing._sums if "embed_tokens" in name)
    used, loaded = built.state_dict()[name], fresh.state_dict()[name]
    assert used.dtype == torch.bfloat16
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, used.float())
    assert not torch.equal(loaded, before[name])


@pytest.mark.parametrize("command", ["fit", "test"])
def test_the_trainer_takes_it_up(checkpoint: Path, run: Run, command: str) -> None:
    built, file = run
    rows = str(file.parent / "rows.jsonl")
    data = RetrievalDataModule(rows, test=rows, batch_size=3, num_workers=0)
    fresh = model(checkpoint)
    if command == "fit":
        trainer().fit(fresh, datamodule=data, ckpt_path=file)
        weights = fresh.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in built.state_dict().items())
    else:
        measure = partial(trainer().test, datamodule=data, verbose=False)
        assert measure(fresh, ckpt_path=file) == measure(built)


def test_other_frozen_weights_are_refused(run: Run, tmp_path: Path) -> None:
    tiny.create(tmp_path / "other", hidden_size=64, layers=2, heads=2, vision_hidden_size=32, vision_layers=2, seed=1)
    with pytest.raises(ValueError, match=r"was trained with other frozen weights: \d+ of them, such as encoder\."):
        trainer().fit(model(tmp_path / "other"), torch.utils.data.DataLoader([]), ckpt_path=run[1])


def test_other_adapters_and_weights_that_nobody_asks_for_are_refused(checkpoint: Path, run: Run) -> None:
    with pytest.raises(ValueError, match=r"lacks weights: .* another model, or with other adapters"):
        load(model(checkpoint, ("q_proj", "v_proj")), run[1])
    fixed = model(checkpoint)
    fixed.loss = InfoNCE(0.05)
    with pytest.raises(ValueError, match=r"has weights that this model lacks: 1 of them, such as loss\.log_scale"):
        load(fixed, run[1])


def test_weights_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has weights of other sizes: 2 of them, such as weight\. .* of its own run"):
        complete_frozen({"state_dict": nn.Linear(3, 2).state_dict()}, nn.Linear(3, 4), {})


def test_a_probe_reads_the_lora_of_a_run(checkpoint: Path, run: Run) -> None:
    built, file = run
    probe = Probe(model(checkpoint), checkpoint=str(file))
    probe.configure_model()
    expected = built.encoder.backbone.state_dict()
    found = probe.model.encoder.backbone.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


class Parts(nn.Module):
    """Tied weights, running statistics, and a weight in four bits, which keeps its scales beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(2, 2, bias=False)
        self.normed = nn.BatchNorm1d(2).requires_grad_(False)
        self.tied = nn.Linear(2, 2, bias=False).requires_grad_(False)
        self.tied_too = self.tied

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().state_dict(*args, **kwargs), "tied.weight.quant_state.nf4": torch.ones(1)}


def test_what_goes_with_frozen_weights_is_left_out_and_what_changes_is_not() -> None:
    parts = Parts()
    parts.trainer = SimpleNamespace(callbacks=[], log_dir=None)
    checkpoint = {"state_dict": parts.state_dict()}
    checkpointing = Checkpointing()
    checkpointing.recognise_frozen(parts)
    checkpointing.save(parts, checkpoint)
    left = {"trained.weight", "normed.running_mean", "normed.running_var", "normed.num_batches_tracked"}
    assert checkpoint["state_dict"].keys() == left
    assert checkpoint["frozen"].keys() == {"normed.weight", "normed.bias", "tied.weight", "tied_too.weight"}
    assert complete_frozen(checkpoint, parts, checkpointing._sums) == checkpoint["state_dict"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_sum_changes_with_any_bit(dtype: torch.dtype, size: int) -> None:
    def sum_of(tensor: Tensor) -> int:
        part = nn.Module()
        part.register_parameter("weight", nn.Parameter(tensor, requires_grad=False))
        checkpointing = Checkpointing()
        checkpointing.recognise_frozen(part)
        return checkpointing._sums["weight"]

    tensor = (torch.rand(size) * 100).to(dtype)
    changed = tensor.clone()
    changed.view(torch.uint8)[-1] ^= 1
    assert sum_of(tensor) == sum_of(tensor.clone())
    assert sum_of(tensor) != sum_of(changed)


def test_what_is_trained_is_kept_and_a_frozen_tower_left_out(checkpoint: Path, tmp_path: Path) -> None:
    built = module(checkpoint)
    saved = torch.load(trained(built, tmp_path), weights_only=True)
    assert saved["state_dict"].keys() == built.state_dict().keys()
    assert FROZEN not in saved
    built = module(checkpoint, adapters=[Freeze(["vision", "merger"])])
    saved = torch.load(trained(built, tmp_path), weights_only=True)
    assert saved["state_dict"].keys() | saved[FROZEN].keys() == built.state_dict().keys()
    assert all("visual" in name for name in saved[FROZEN])


# Folders


def run_in(folder: Path, version: str | int | None = None, dirpath: Path | None = None) -> Trainer:
    logger = CSVLogger(folder, "name", version)
    return Trainer(accelerator="cpu", logger=logger, callbacks=[ModelCheckpoint(dirpath)])


def test_runs_that_begin_together_have_folders_of_their_own(tmp_path: Path) -> None:
    def begin(_: int) -> str:
        logger = CSVLogger(tmp_path, "name")
        return run_folder._claim(logger).name

    with ThreadPoolExecutor(16) as pool:
        claimed = [*pool.map(begin, range(64))]
    assert sorted(claimed) == sorted(f"version_{number}" for number in range(64))


@pytest.mark.parametrize("version", ["mine", 3, ""])
def test_a_folder_with_a_run_is_not_written_over(tmp_path: Path, version: str | int) -> None:
    first = run_in(tmp_path, version)
    with fit_folder(first, None):
        first.loggers[0].log_metrics({"train/loss": 1.0}, 0)
        first.loggers[0].save()
    file = Path(first.loggers[0].log_dir, "metrics.csv")
    before = file.read_text()
    for again in (fit_folder(run_in(tmp_path, version), None), other_folder(run_in(tmp_path, version), None, True)):
        with pytest.raises(ValueError, match=r"has a run already, .*--ckpt_path last"), again:
            pass
    assert file.read_text() == before


def test_one_process_at_a_time_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE", 0.2)
    with (
        fit_folder(run_in(tmp_path), None),
        pytest.raises(TimeoutError, match=r"version_0: another process is at work here"),
        fit_folder(run_in(tmp_path), "last"),
    ):
        pass
    with fit_folder(run_in(tmp_path), "last") as path:
        assert path is None


def test_last_is_the_newest_fit_and_its_newest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fit_folder(run_in(tmp_path), "last") as path:
        assert path is None
    assert "There is no run in" in capsys.readouterr().out
    written(tmp_path / "name/version_0/checkpoints/last.ckpt", 7, age=10)
    for _ in range(9):  # version_10 is after version_9.
        with fit_folder(run_in(tmp_path), None):
            pass
    newest = written(tmp_path / "elsewhere/step.ckpt", 5, age=5)
    with other_folder(run_in(tmp_path), None, writes=True):
        pass  # Of a test, which nobody goes on with.
    with fit_folder(run_in(tmp_path), "last") as path:  # The later ones have nothing.
        assert path == str(tmp_path / "name/version_0/checkpoints/last.ckpt")
    assert "version_0 after step 7: last.ckpt" in capsys.readouterr().out
    with fit_folder(run_in(tmp_path, dirpath=tmp_path / "elsewhere"), "last") as path:
        assert path == str(newest)
    assert "version_9 after step 5: step.ckpt" in capsys.readouterr().out
    with other_folder(run_in(tmp_path, 0), "last", writes=False) as path:
        assert path == str(tmp_path / "name/version_0/checkpoints/last.ckpt")


def test_a_folder_that_runs_share_is_not_mistaken(tmp_path: Path) -> None:
    """Each run is resumed from its own checkpoints in it; one that failed at once has none there."""
    shared = tmp_path / "shared"
    for step in (0, 1, 2):
        with fit_folder(run_in(tmp_path, dirpath=shared), None):
            folder = tmp_path / f"name/version_{step}"
        if step < 2:
            written(shared / f"{step}.ckpt", step, age=step, run=str(folder))
    (shared / "dangling.ckpt").symlink_to("removed.ckpt")
    with fit_folder(run_in(tmp_path, dirpath=shared), "last") as path:
        assert path == str(shared / "1.ckpt")
    with fit_folder(run_in(tmp_path, 0, dirpath=shared), "last") as path:
        assert path == str(shared / "0.ckpt")
    (tmp_path / "name").rename(tmp_path / "moved")
    moved = Trainer(accelerator="cpu", logger=CSVLogger(tmp_path, "moved"), callbacks=[ModelCheckpoint(shared)])
    with fit_folder(moved, "last") as path:
        assert path == str(shared / "0.ckpt")  # The newest that nobody else can claim.


def test_measuring_the_last_of_nothing_is_refused(tmp_path: Path) -> None:
    folder = other_folder(run_in(tmp_path), "last", True)
    with pytest.raises(ValueError, match=r"no run in .* has a whole checkpoint"), folder:
        pass


def test_what_was_half_written_is_removed(tmp_path: Path) -> None:
    with fit_folder(run_in(tmp_path), None):
        pass
    kept = written(tmp_path / "name/version_0/checkpoints/last.ckpt", 7, age=10)
    kept.with_name(f".epoch=1.ckpt.{'0' * 32}.{HOST}.4194305.draft").write_bytes(b"half")  # No process has this number.
    with fit_folder(run_in(tmp_path), "last"):
        assert [path.name for path in kept.parent.iterdir()] == ["last.ckpt"]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def log(folder: Path, rows: int, *entries: tuple[dict[str, float], int]) -> CSVLogger:
    """Open the log after some rows, and log metrics of steps."""
    logger = CSVLogger(folder, "name", "")
    run_folder._open_log(logger, rows)
    for metrics, step in entries:
        logger.log_metrics(metrics, step)
    logger.save()
    return logger


LOSSES = [({"train/loss": step / 10}, step) for step in range(5)]


def die(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


KILLED: dict[str, tuple[Any, str]] = {"before it is written again": (os, "replace"), "after": (Path, "unlink")}


@pytest.mark.parametrize("killed", [None, *KILLED])
def test_a_log_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str | None) -> None:
    log(tmp_path, 0, *LOSSES[:3], ({"val/ndcg@10": 0.5}, 2), *LOSSES[3:])
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr(*KILLED[killed], die)
            with pytest.raises(KeyboardInterrupt):
                log(tmp_path, 4)
    log(tmp_path, 4, ({"train/loss": 0.9, "lr": 1.0}, 3))
    found = rows_of(tmp_path / "name")
    assert [(row["step"], row["train/loss"], row["val/ndcg@10"], row["lr"]) for row in found] == [
        ("0", "0.0", "", ""),
        ("1", "0.1", "", ""),
        ("2", "0.2", "", ""),
        ("2", "", "0.5", ""),
        ("3", "0.9", "", "1.0"),
    ]


KILLS = [(os, "replace"), (csv.DictWriter, "writerows"), (pandas.DataFrame, "to_csv")]


@pytest.mark.parametrize("place", KILLS, ids=lambda place: place[1])
def test_a_log_that_gains_a_column_loses_nothing_to_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    first = log(tmp_path, 0, *LOSSES[:3])
    before = rows_of(tmp_path / "name")
    first.log_metrics({"val/ndcg@10": 0.5, "a, b": 1.0}, 2)
    with monkeypatch.context() as patch:
        patch.setattr(*place, die)
        with pytest.raises(KeyboardInterrupt):
            first.save()
    after = rows_of(tmp_path / "name")
    assert [{name: row[name] for name in ("step", "train/loss")} for row in after] == before
    log(tmp_path, 3, ({"val/ndcg@10": 0.5, "a, b": 1.0}, 2))
    assert [row["train/loss"] for row in rows_of(tmp_path / "name")] == ["0.0", "0.1", "0.2", ""]
    assert rows_of(tmp_path / "name")[-1] == {"step": "2", "train/loss": "", "val/ndcg@10": "0.5", "a, b": "1.0"}


@pytest.mark.parametrize("torn", ["0.4", '"', "\0\0\0", "1,2,3,4,5,6\r\n7", "4,0.4\r\n5"])
def test_a_torn_last_line_of_a_log_is_logged_again(tmp_path: Path, torn: str) -> None:
    log(tmp_path, 0, *LOSSES[:3])
    with (tmp_path / "name/metrics.csv").open("a") as file:
        file.write(torn)
    log(tmp_path, 3, LOSSES[3])
    assert [row["train/loss"] for row in rows_of(tmp_path / "name")] == ["0.0", "0.1", "0.2", "0.3"]


def test_a_run_that_begins_anew_keeps_the_log_of_before(tmp_path: Path) -> None:
    for _ in range(2):
        log(tmp_path, 0, LOSSES[0])
    names = sorted(path.name for path in (tmp_path / "name").iterdir())
    assert names == ["metrics.1.csv", "metrics.csv"]


# Configurations

BEFORE = "data: {init_args: {batch_size: 8, val: a}}\ntrainer: {max_epochs: 1}\nckpt_path: null\n"


def test_only_what_changes_a_result_is_refused_unless_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    refuse_changes(BEFORE, BEFORE.replace("ckpt_path: null", "ckpt_path: last"))
    assert not capsys.readouterr().out
    refuse_changes(BEFORE, BEFORE.replace("val: a", "val: b"))
    assert "data.init_args.val: 'a' → 'b'" in capsys.readouterr().out
    after = BEFORE.replace("batch_size: 8", "batch_size: 16").replace("max_epochs: 1", "max_epochs: 2")
    message = r"batch_size: 8 → 16\n  trainer\.max_epochs: 1 → 2\nGo back .* --trainer\.allow_changed '\[.*\]'"
    with pytest.raises(ValueError, match=message):
        refuse_changes(BEFORE, after)
    with pytest.raises(ValueError, match=r"this one:\n  data\.init_args\.batch_size: 8 → 16\nGo back"):
        refuse_changes(BEFORE, after, ["trainer"])
    refuse_changes(BEFORE, after, ["data.init_args.batch_size", "trainer.max_epochs"])
    assert "max_epochs: 1 → 2" in capsys.readouterr().out


@pytest.mark.parametrize("allowed", [[], ["trainer.callbacks"]])
def test_a_run_is_not_resumed_with_another_average(allowed: list[str]) -> None:
    average = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
    timer = {"class_path": "lightning.pytorch.callbacks.Timer"}
    before = yaml.safe_dump({"trainer": {"callbacks": [timer, average]}})
    refuse_changes(before, yaml.safe_dump({"trainer": {"callbacks": [average]}}))
    for callbacks in ([timer], [timer, {**average, "init_args": {"decay": 0.8}}], None):
        after = yaml.safe_dump({"trainer": {"callbacks": callbacks}})
        with nullcontext() if allowed else pytest.raises(ValueError, match=r"trainer\.callbacks: .*0\.9"):
            refuse_changes(before, after, allowed)


@pytest.mark.parametrize(("other", "stays"), [(6, True), (7, False), (8, False), (None, True)])
def test_a_stop_leaves_no_checkpoint_once_another_has_its_steps(tmp_path: Path, other: int | None, stays: bool) -> None:
    """Also where the last step is the one it was stopped after, and nothing is written later."""
    if other is not None:
        written(tmp_path / "last.ckpt", other, age=10)
    stopped = written(tmp_path / "stopped.ckpt", 7, age=5)
    run = run_in(tmp_path, dirpath=tmp_path)
    StopSafely().on_train_end(run, nn.Module())
    assert stopped.exists() == stays


def test_a_job_is_put_back_into_its_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _requeue(run_in(tmp_path))  # Not under SLURM: nobody is asked.
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    _requeue(run_in(tmp_path))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    _requeue(run_in(tmp_path))
    assert (tmp_path / "asked").read_text() == "requeue 17\nrequeue 16_3\n"
