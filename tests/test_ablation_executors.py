"""Where runs run: here, several at a time; in a SLURM array; on Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ablating import FIT, write

from vlmembed.ablation.command import ablate
from vlmembed.ablation.executors import Slurm, array_script, shares
from vlmembed.ablation.results import Result, read_results


def run(path: Path, *options: str) -> list[Result]:
    ablate(["--config", str(path), *options], lambda config: None, FIT)
    return read_results(path.parent / "out")


def events(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "tally").read_text().splitlines()]


def test_runs_share_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(write(tmp_path, set={"seconds": 1.0}), "--jobs", "2")
    assert events(tmp_path)[:3] == ["start", "start", "end"]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert shares(1) == [{}]
    assert [each["OMP_NUM_THREADS"] for each in shares(3)] == ["4"] * 3
    assert [each["CUDA_VISIBLE_DEVICES"] for each in shares(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in shares(2)] == ["4", "7"]


def test_slurm_runs_the_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an ``sbatch`` that runs the script it is given once for each task of the array, as SLURM would."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        "#!/bin/bash\n"
        f'echo "$@" > {tmp_path}/submitted; cat > {tmp_path}/script\n'
        f"for SLURM_ARRAY_TASK_ID in 0 1 2 3; do export SLURM_ARRAY_TASK_ID; bash {tmp_path}/script; done\n"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    options = ["--executor", "Slurm", "--executor.options", "[--partition=gpu, --gpus=1]"]
    results = run(write(tmp_path), *options, "--jobs", "3")
    submitted = (tmp_path / "submitted").read_text().split()
    assert submitted == ["--wait", "--job-name=vlmembed-ablate", "--array=0-3%3", "--partition=gpu", "--gpus=1"]
    assert [result.status for result in results] == ["finished"] * 4
    script = array_script([["run", "a b"], ["run", "c"]]).splitlines()
    assert script[3:5] == ["0) exec run 'a b' ;;", "1) exec run c ;;"]


def test_a_cluster_that_runs_nothing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slurm, "run", lambda *_: None)
    with pytest.raises(SystemExit):
        run(write(tmp_path), "--executor", "Slurm")


def test_ray_runs_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        results = run(write(tmp_path, set={"seconds": 1.0}), "--executor", "Ray")
    finally:
        ray.shutdown()
    assert events(tmp_path)[:2] == ["start", "start"]
    assert [result.status for result in results] == ["finished"] * 4
