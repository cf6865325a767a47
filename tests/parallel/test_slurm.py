"""Submits the Slurm scripts to a real cluster of two nodes that is started for the tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
SCRIPT = SCRIPTS / "train.sbatch"
CLUSTER = Path(__file__).with_name("slurm_cluster.sh")
SBIN = os.pathsep.join(["/usr/sbin", "/sbin"])

slurm_is_here = bool(shutil.which("sbatch") and shutil.which("munged", path=f"{os.environ['PATH']}{os.pathsep}{SBIN}"))
# On a continuous integration machine a missing Slurm is a fault of the machine, not a reason to skip.
pytestmark = [
    pytest.mark.slow,
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


def losses(run_folder: Path) -> list[float]:
    rows = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def state(slurm: Slurm, job: str) -> str:
    match = re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", job))
    assert match is not None
    return match[1]


def in_queue(slurm: Slurm, job: str, folder: Path) -> None:
    """Wait until the job is in the queue again, and take it out of the two minutes that Slurm holds it there."""
    wait_for(lambda: state(slurm, job) == "PENDING", folder)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now+2")


@pytest.fixture
def options(tiny: list[str]) -> list[str]:
    """Of a training that is a matter of seconds once it has begun."""
    return ["experiment=quickstart", *tiny, "logger=none", "evaluator=knn", "device=cpu", "precision=fp32"]


ENDLESS = ["steps=20000", "save_every=1000000", "eval_every=1000000"]


def test_submitted_training_over_two_nodes_is_that_of_one_process(
    slurm: Slurm, options: list[str], tmp_path: Path
) -> None:
    options = [*options, "steps=4", "batch_size=8", "save_every=1000", "eval_every=1000"]
    alone = slurm("sbatch", "--parsable", str(SCRIPT), *options, "name=alone", cwd=tmp_path).strip()
    spread = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
    slurm("sbatch", "--wait", *spread, str(SCRIPTS / "train_multinode.sbatch"), *options, "name=ranks", cwd=tmp_path)
    wait_for(lambda: state(slurm, alone) == "COMPLETED", tmp_path)
    assert losses(tmp_path / "outputs/ranks") == pytest.approx(losses(tmp_path / "outputs/alone"), abs=1e-5)
    assert len(losses(tmp_path / "outputs/ranks")) == 4
    assert (tmp_path / "outputs/ranks/report.html").exists()
    assert printed_by_jobs(tmp_path).count("evaluating the untrained encoder") == 2, "only rank 0 prints"


def test_time_limit_sends_a_job_back_to_the_queue_and_scancel_ends_it(
    slurm: Slurm, options: list[str], tmp_path: Path
) -> None:
    run_folder = tmp_path / "outputs/again"
    limits = ["--time=2", "--signal=USR1@60"]  # minutes; seconds before their end
    line = [str(SCRIPT), *options, *ENDLESS, "name=again"]
    job = slurm("sbatch", "--parsable", *limits, *line, cwd=tmp_path).strip()
    wait_for(lambda: len(finished_steps(run_folder)) >= 3, tmp_path)
    in_queue(slurm, job, tmp_path)
    steps = len(finished_steps(run_folder))
    wait_for(lambda: len(finished_steps(run_folder)) > steps, tmp_path)
    slurm("scancel", job)
    wait_for(lambda: state(slurm, job) == "CANCELLED", tmp_path)
    wait_for(lambda: json.loads((run_folder / "run.json").read_text())["status"] == "stopped", tmp_path)
    steps_done = finished_steps(run_folder)
    assert steps_done == list(range(1, len(steps_done) + 1)), "no step is lost and none is made twice"
    assert state(slurm, job) == "CANCELLED"


def test_preempted_job_saves_and_goes_on_when_its_node_is_free(
    slurm: Slurm, options: list[str], tmp_path: Path
) -> None:
    run_folder = tmp_path / "outputs/low"
    line = [str(SCRIPT), *options, *ENDLESS, "name=low"]
    job = slurm("sbatch", "--parsable", "--partition=low", *line, cwd=tmp_path).strip()
    wait_for(lambda: len(finished_steps(run_folder)) >= 3, tmp_path)
    slurm("srun", "--partition=main", "--nodes=2", "--exclusive", "true")
    in_queue(slurm, job, tmp_path)
    steps = len(finished_steps(run_folder))
    wait_for(lambda: len(finished_steps(run_folder)) > steps, tmp_path)
    slurm("scancel", job)
    steps_done = finished_steps(run_folder)
    assert steps_done == list(range(1, len(steps_done) + 1))


def test_sweep_makes_a_job_of_each_member_and_ends_with_their_table(
    slurm: Slurm, options: list[str], tmp_path: Path
) -> None:
    keys = ["name=swept", "lr=1e-4,1e-3,1e30", "hydra.launcher.cpus_per_task=1", "hydra.launcher.partition=low"]
    job = slurm("sbatch", "--parsable", str(SCRIPTS / "sweep.sh"), *options, *keys, cwd=tmp_path).strip()
    wait_for(lambda: state(slurm, job) in ("COMPLETED", "FAILED"), tmp_path)
    output = (tmp_path / f"sweep-{job}.out").read_text()
    assert state(slurm, job) == "FAILED", output
    rows = re.findall(r"^lr=\S+(?= .* 1$)", output, re.MULTILINE)
    assert sorted(rows) == ["lr=0.0001", "lr=0.001"], output
    (failed,) = re.findall(r"^jepa-train: (.*) failed: .*not finite", output, re.MULTILINE)
    assert failed == "outputs/swept/lr=1e+30"
    assert len(list((tmp_path / "outputs/swept/.submitit").glob("*/*_log.out"))) == 3
