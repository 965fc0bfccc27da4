"""Running an ablation: what is done, what is not done again, how it ends, and where trials run."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ablating import FIT, started, write

from vlmembed.ablation.command import ablate
from vlmembed.ablation.run import Executor, Trial, locked, read_trials, shares_of_machine
from vlmembed.files import HOST

BROKEN: dict[str, Any] = {
    "key": "part",
    "values": {"broken": {"class_path": "Broken"}, "fine": {"init_args": {"score": 0.5}}},
}


#: What the trials of `write` score, in the order in which they run.
SCORES = {"part-plain seed-0": 0.25, "part-other seed-0": 0.75, "part-plain seed-1": 0.26, "part-other seed-1": 0.76}


def run(path: Path, *options: str) -> None:
    ablate(["--config", str(path), *options], lambda config: None, FIT)


def scores(folder: Path) -> dict[str, float]:
    """Of each trial that has finished, by setting and seed."""
    return {
        f"{trial.folder.parent.name} {trial.folder.name}": trial.metrics["test/ndcg@10"]
        for trial in read_trials(folder)
        if trial.status == "finished"
    }


def test_all_trials_are_done_and_none_twice(tmp_path: Path) -> None:
    path = write(tmp_path)
    run(path)
    assert started(tmp_path) == [*SCORES]
    # The last value is the trained model's, and the loss is no result.
    assert scores(tmp_path / "out") == SCORES
    trial = Trial.read(tmp_path / "out" / "settings" / "part-other" / "seed-1").ended()
    assert (trial.setting, trial.seed, trial.error) == ({"part": "other"}, 1, None)
    assert trial.cost["seconds_per_step"] == 0.5
    fields = json.loads((trial.folder / "result.json").read_text())
    assert fields.keys() == {"setting", "seed", "status", "error", "seconds", "metrics", "cost"}
    written = yaml.safe_load((tmp_path / "out" / "ablation.yaml").read_text())
    assert written["base"] == str(tmp_path / "base.yaml")
    run(path)
    run(path, "--retry_failed", "--jobs", "2")
    assert started(tmp_path) == [*SCORES]
    (tmp_path / "out" / "report.html").unlink()
    run(path, "--report_only")
    assert (tmp_path / "out" / "report.html").exists()


def test_a_failed_trial_is_recorded_and_may_be_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, grid={"part": BROKEN}, seeds=[0])
    for options in ((), (), ("--retry_failed",)):
        with pytest.raises(SystemExit) as stopped:
            run(path, *options)
        assert stopped.value.code == 1
        assert "part=broken, seed 0 has failed" in capsys.readouterr().err
    order = ["part-broken seed-0", "part-fine seed-0", "part-broken seed-0"]
    assert started(tmp_path) == order
    failed, fine = read_trials(tmp_path / "out")
    assert (failed.status, fine.status) == ("failed", "finished")
    assert failed.error is not None
    first, *_, last = failed.error.splitlines()
    assert (first, last) == ("exit status 1", "ArithmeticError: the loss is not a number")
    assert "step 2" in failed.error.splitlines()
    mended = BROKEN["values"] | {"broken": {"class_path": "Mended", "init_args": {"score": 0.5}}}
    write(tmp_path, grid={"part": {"key": "part", "values": mended}}, seeds=[0])
    with pytest.raises(ValueError, match=r"has failed with another configuration.*run with --retry_failed"):
        run(path)
    run(path, "--retry_failed")
    assert started(tmp_path) == [*order, "part-broken seed-0"]


def test_a_metric_that_nobody_logged_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(write(tmp_path, metric="test/ndcg@10/64", seeds=[0]))
    assert read_trials(tmp_path / "out")[0].error == (
        "'test/ndcg@10/64' was not logged, only ['test/ndcg@10']; change the metric, or what is measured."
    )


def test_a_change_is_not_passed_off_as_what_ran(tmp_path: Path) -> None:
    path = write(tmp_path)
    run(path)
    base = tmp_path / "base.yaml"
    base.write_text(base.read_text().replace("max_epochs: 1", "max_epochs: 2"))
    with pytest.raises(
        ValueError, match=r"seed 0 has finished with.* trainer\.max_epochs was 1, is 2\. Undo.*--output"
    ):
        run(path)
    write(tmp_path, metric="val/ndcg@10")
    with pytest.raises(ValueError, match='measured on was "test", is "val"'):
        run(path)
    write(tmp_path, seeds=[0, 1, 2])
    run(path)
    assert started(tmp_path)[4:] == ["part-plain seed-2", "part-other seed-2"]


def test_nobody_else_works_in_a_locked_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(TimeoutError, match="out: another process is at work here"):
        run(write(tmp_path))
    assert started(tmp_path) == []


def run_in_a_group(path: Path) -> None:
    os.setsid()
    run(path)


@pytest.mark.parametrize("end", [os.kill, pytest.param(os.killpg, marks=pytest.mark.exhaustive)])
def test_a_killed_ablation_takes_its_trials_along_and_resumes(end: Callable[[int, int], None], tmp_path: Path) -> None:
    """Killed in the middle of its second trial."""
    path = write(tmp_path, set={"seconds": 1.0})
    process: Any = multiprocessing.get_context("fork").Process(target=run_in_a_group, args=(path,))
    process.start()
    while len(started(tmp_path)) < 2:
        assert process.is_alive()
        time.sleep(0.05)
    end(process.pid, signal.SIGKILL)
    process.join()
    # The lock is free as soon as the last of the trial's processes is gone.
    broken_off = tmp_path / "out" / "settings" / "part-other" / "seed-0"
    with locked(broken_off, patience=5):
        pass
    assert len((tmp_path / "tally").read_text().splitlines()) == 3
    names = ("out", "out/documents/things", "out/documents/queries/things", "out/settings/part-other/seed-0")
    drafts = [tmp_path / name / f".file.{'01' * 16}.{HOST}.{process.pid}.draft" for name in names]
    for draft in drafts:
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
    (broken_off / "checkpoints").mkdir()
    (broken_off / "checkpoints" / "last.ckpt").touch()
    run(path)
    assert not any(draft.exists() for draft in drafts)
    assert started(tmp_path) == [*[*SCORES][:2], *[*SCORES][1:]]
    assert scores(tmp_path / "out") == SCORES
    # It starts afresh: of the trial that was broken off nothing is left.
    assert (tmp_path / "tally").read_text().splitlines()[3].endswith("['.lock', 'log.txt', 'planned.json', 'run.yaml']")
    assert not (broken_off / "checkpoints").exists()


def test_a_dry_run_trains_nothing_and_says_how_long_the_rest_takes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    run(path, "--dry_run")
    printed = capfd.readouterr().out
    assert printed.count("to do  part=") == 4
    assert "4 trials, 4 to do" in printed
    # The attempt takes 6 of 106 steps, of half a second each: 50 seconds of each trial are left, 3.3 minutes in all.
    minutes = re.search(
        r"About (3\.\d) min for 4 trials, 1 at the same time: an attempt at part=plain, seed 0 took", printed
    )
    assert minutes
    assert 3.3 <= float(minutes[1]) < 3.8
    assert list((tmp_path / "out").iterdir()) == []
    run(write(tmp_path, seeds=[0]))
    capfd.readouterr()
    run(write(tmp_path), "--dry_run", "--jobs", "2")
    printed = capfd.readouterr().out
    assert "finished  part=other, seed 0" in printed
    assert "2 to do.\n" in printed
    assert "for 2 trials, 2 at the same time: the mean of 2 that have finished is" in printed


def events(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "tally").read_text().splitlines()]


def test_trials_share_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(write(tmp_path, set={"seconds": 1.0}), "--jobs", "2")
    assert events(tmp_path)[:3] == ["start", "start", "end"]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert shares_of_machine(1) == [{}]
    assert [share["OMP_NUM_THREADS"] for share in shares_of_machine(3)] == ["4"] * 3
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares_of_machine(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares_of_machine(2)] == ["4", "7"]


#: Runs the script that it is given once for each task of the array, after it has returned, as SLURM would.
SBATCH = """#!/bin/bash
cp "${@: -1}" submitted
(for task in 0 1 2 3; do
  SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_PROCID=0 \\
    SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NODELIST=here bash submitted
done) > output 2>&1 &
echo "Submitted batch job 7"
"""


def test_slurm_runs_an_array(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    for name, script in (("sbatch", SBATCH), ("srun", "#!/bin/bash"), ("sacct", "#!/bin/bash")):
        (here / "bin").mkdir(exist_ok=True)
        (here / "bin" / name).write_text(script)
        (here / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    options = ["--executor", "Slurm", "--executor.options", "[--partition=gpu, --gpus=1, --exclusive]", "--jobs", "3"]
    run(write(here), *options)
    flags = re.findall(r"#SBATCH --(.*)", (here / "submitted").read_text())
    assert {"array=0-3%3", "partition=gpu", "gpus=1", "exclusive", "job-name=vlmembed-ablate"} <= {*flags}
    assert not any(flag.startswith("time") for flag in flags)
    assert [trial.status for trial in read_trials(here / "out")] == ["finished"] * 4


class Idle(Executor):
    """A cluster that runs nothing."""

    def run(self, commands: Any, jobs: int) -> None:
        pass


def test_a_cluster_that_runs_nothing_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(write(tmp_path), "--executor", f"{__name__}.Idle")


def test_ray_runs_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        run(write(tmp_path, set={"seconds": 1.0}), "--executor", "Ray")
    finally:
        ray.shutdown()
    assert events(tmp_path)[:2] == ["start", "start"]
    assert [trial.status for trial in read_trials(tmp_path / "out")] == ["finished"] * 4
