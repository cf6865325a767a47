"""Submits the Slurm script to a real cluster of one node that is started for the test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "train.sbatch"
CLUSTER = ROOT / "tests" / "slurm_cluster.sh"
SBIN = os.pathsep.join(["/usr/sbin", "/sbin"])

slurm_is_here = bool(shutil.which("sbatch") and shutil.which("munged", path=f"{os.environ['PATH']}{os.pathsep}{SBIN}"))
# On a continuous integration machine a missing Slurm is a fault of the machine, not a reason to skip.
pytestmark = [
    pytest.mark.skipif(not slurm_is_here and os.environ.get("CI") != "true", reason="Slurm is not installed"),
    pytest.mark.timeout(900),
]

Slurm = Callable[..., str]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Runs a Slurm command against the cluster and returns what it prints."""
    folder = tmp_path_factory.mktemp("slurm")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], SBIN])
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}

    def call(*command: str, cwd: Path = ROOT) -> str:
        # Output goes to a file: the daemons inherit it, and a pipe would stay open with them.
        with (folder / "printed").open("w+") as printed:
            done = subprocess.run(
                command, cwd=cwd, env=env, stdout=printed, stderr=subprocess.STDOUT, timeout=400, check=False
            )
            printed.seek(0)
            text = printed.read()
        assert done.returncode == 0, text + printed_by_jobs(cwd)
        return text

    call("bash", str(CLUSTER), "start", str(folder))
    yield call
    call("bash", str(CLUSTER), "stop", str(folder))


def finished_steps(run_folder: Path) -> list[int]:
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row["step"] for row in map(json.loads, lines) if "train/loss" in row]


def printed_by_jobs(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("slurm-*.out"))


def wait_for(condition: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, printed_by_jobs(folder)
        time.sleep(0.2)


def test_submitted_training_runs_to_its_end(slurm: Slurm, tiny: list[str], tmp_path: Path) -> None:
    slurm("sbatch", "--wait", str(SCRIPT), "experiment=quickstart", *tiny, "logger=none", "name=sub", cwd=tmp_path)
    assert finished_steps(tmp_path / "outputs" / "sub")[-1] == 2
    assert (tmp_path / "outputs" / "sub" / "report.html").exists()


def test_job_that_is_told_to_stop_goes_back_to_the_queue_and_resumes(
    slurm: Slurm, tiny: list[str], tmp_path: Path
) -> None:
    run_folder = tmp_path / "outputs" / "again"
    options = [
        *tiny,
        "logger=none",
        "name=again",
        "steps=2000",
        "save_every=1000000",
        "eval_every=1000000",
        "log_every=1",
    ]
    job = slurm("sbatch", "--parsable", str(SCRIPT), "experiment=quickstart", *options, cwd=tmp_path).strip()
    wait_for(lambda: len(finished_steps(run_folder)) >= 3, tmp_path)
    slurm("scancel", "--signal=TERM", job)
    wait_for(lambda: "PENDING" in slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T"), tmp_path)
    steps = len(finished_steps(run_folder))
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now+2")
    wait_for(lambda: len(finished_steps(run_folder)) > steps, tmp_path)
    slurm("scancel", job)
    assert finished_steps(run_folder)[: steps + 1] == list(range(1, steps + 2))
