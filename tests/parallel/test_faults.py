"""Jobs of two ranks that are killed, run out of disk space or read bad data, and resume exactly."""

from __future__ import annotations

import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import forked
import pytest
import torch

from jepa import JEPAAgent, JEPAConfig, load_encoder
from jepa.errors import RunError
from jepa.runs.checkpoint import find, latest, load_model
from jepa.runs.metrics import read_json, read_rows
from jepa.training.run import EVALUATION_TIME

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a job in /proc"),
]

TINY = [
    *("encoder.patch_size=8", "encoder.embed_dim=32", "encoder.depth=2", "encoder.num_heads=2", "image_size=32"),
    *("predictor.width=16", "predictor.depth=1", "mask.ratio=0.5", "dataset.num_samples=96", "batch_size=16"),
    *("num_workers=0", "logger=none", "log_every=1", "evaluator=knn", "evaluation.train_samples=16"),
    *("evaluation.val_samples=16", "device=cpu", "precision=fp32", "lr=1e-3"),
]
LONG = [*TINY, "steps=100", "eval_every=80", "save_every=5", "evaluation.val_samples=300", "evaluation.batch_size=1"]
"""evaluates for about a second"""
LIMIT = 150
"""seconds that any job may take"""
SOON = 60
"""seconds in which a job ends that has lost one of its processes"""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


class Job:
    """jepa-train with two ranks: a fork of this process, which starts them; they have a mark in their environment."""

    def __init__(self, folder: Path, *overrides: str, first: Callable[[], object] = list) -> None:
        self.mark = secrets.token_hex(8)
        self.printed = folder.parent / f"{folder.name}-{self.mark}.txt"
        paths = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), os.environ.get("PYTHONPATH", "")])

        def run() -> int:
            first()
            os.environ.update(JEPA_TEST_JOB=self.mark, PYTHONPATH=paths)
            return forked.command("train", [*overrides, "processes=2", f"hydra.run.dir={folder}"])()

        self.process = forked.start(run, folder.parent, self.printed)

    @property
    def output(self) -> str:
        return self.printed.read_text()

    @property
    def complaints(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("jepa-train: ")]

    def pids(self, rank: int | None = None) -> list[int]:
        """Process ids of the job, or of one rank, that are alive."""
        variables = {f"JEPA_TEST_JOB={self.mark}"} | ({f"RANK={rank}"} if rank is not None else set())
        pids = [self.process.pid or 0] if rank is None and self.process.is_alive() else []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                is_of_job = variables <= set((folder / "environ").read_text(errors="replace").split("\0"))
                if is_of_job and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    pids.append(int(folder.name))
        return pids

    def signal_all(self, signum: int) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    def wait_until(self, condition: Callable[[], bool], seconds: float = LIMIT, pause: float = 0.02) -> float:
        """Wait and return the seconds; fails if the job ends before."""
        begun = time.monotonic()
        while not condition():
            assert self.process.exitcode is None, self.output
            assert time.monotonic() < begun + seconds, self.output
            time.sleep(pause)
        return time.monotonic() - begun

    def wait_for_end_of_all(self, seconds: float) -> float:
        """Wait until no process of the job is left; returns the seconds."""
        begun = time.monotonic()
        self.process.join(seconds)
        while self.pids():
            assert time.monotonic() < begun + seconds, self.output
            time.sleep(0.1)
        return time.monotonic() - begun

    def finish(self) -> int | None:
        self.process.join(LIMIT)
        return self.process.exitcode


@contextmanager
def started(folder: Path, *overrides: str, first: Callable[[], object] = list) -> Iterator[Job]:
    job = Job(folder, *overrides, first=first)
    try:
        yield job
    finally:
        while job.pids():
            job.signal_all(signal.SIGKILL)
            time.sleep(0.05)
        job.process.join()


def last_step(folder: Path) -> int:
    """The last step in metrics.jsonl, 0 without one."""
    rows = steps_with("train/loss", folder)
    return rows[-1] if rows else 0


def steps_with(name: str, folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [int(row["step"]) for row in rows if name in row]


def saved_step(folder: Path) -> int:
    last = latest(folder)
    return 0 if last is None else read_json(last / "state.json")["step"]


def losses(folder: Path) -> dict[int, float]:
    return {int(row["step"]): row["train/loss"] for row in read_rows(folder) if "train/loss" in row}


def assert_same_weights(folder: Path, other: Path) -> None:
    one, two = load_model(find(folder)), load_model(find(other))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


class Refused(NamedTuple):
    status: int | None
    output: str


class Undisturbed(NamedTuple):
    folder: Path
    refused: Refused


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A run to its end, and how a second job ended that was started on its folder meanwhile."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with started(folder, *LONG) as job:
        job.wait_until(lambda: last_step(folder) >= 3)
        job.signal_all(signal.SIGSTOP)
        with started(folder, *LONG) as second:
            refused = Refused(second.finish(), second.output)
        job.signal_all(signal.SIGCONT)
        assert job.finish() == 0, job.output
    return Undisturbed(folder, refused)


@dataclass
class Ending:
    """How a job ended."""

    saved_before: int
    """the newest whole checkpoint when the fault happened"""
    saved_after: int
    reached: int
    status: int | None
    seconds: float
    complaints: list[str]


@dataclass
class Survivor:
    folder: Path
    endings: dict[str, Ending]
    """by what happened, one after the other on the same folder"""


Fault = Callable[[Job, Path], None]


def run_until(folder: Path, fault: Fault) -> Ending:
    with started(folder, *LONG) as job:
        fault(job, folder)
        before, reached = saved_step(folder), last_step(folder)
        seconds = job.wait_for_end_of_all(LIMIT)
        return Ending(before, saved_step(folder), reached, job.process.exitcode, seconds, job.complaints)


def kill_rank(job: Job, folder: Path) -> None:
    job.wait_until(lambda: last_step(folder) >= 8)
    for pid in job.pids(rank=1):
        os.kill(pid, signal.SIGKILL)


def kill_parent(job: Job, folder: Path) -> None:
    begun = saved_step(folder)
    job.wait_until(lambda: last_step(folder) >= begun + 8)
    job.process.kill()


def kill_all_in_a_save(job: Job, folder: Path) -> None:
    """At a random moment of one of the next two saves, or soon after."""
    begun, draw = saved_step(folder), random.Random(folder.name + str(saved_step(folder)))
    target = folder / "checkpoints" / f".writing-step_{begun - begun % 5 + 5 * draw.randint(1, 2):08d}"
    start = time.time()
    job.wait_until(lambda: target.exists() and target.stat().st_ctime > start, pause=0.002)  # not what is left of one
    time.sleep(draw.uniform(0, 0.15))
    job.signal_all(signal.SIGKILL)


def terminate_in_evaluation(job: Job, folder: Path) -> None:
    job.wait_until(lambda: last_step(folder) >= 80)
    time.sleep(0.2)
    job.process.terminate()


FAULTS: dict[str, Fault] = {
    "rank": kill_rank,
    "parent": kill_parent,
    "save": kill_all_in_a_save,
    "evaluation": terminate_in_evaluation,
}


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory) -> Survivor:
    """A run that suffers all faults, and ends on a host of another name whose clock went wrong."""
    folder = tmp_path_factory.mktemp("survivor") / "run"
    endings = {name: run_until(folder, fault) for name, fault in FAULTS.items()}
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (4e9, 4e9), follow_symlinks=False)
    with started(folder, *LONG, first=on_another_host if can_rename() else list) as job:
        assert job.finish() == 0, job.output
    return Survivor(folder, endings)


def can_rename() -> bool:
    return subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode == 0


def on_another_host() -> None:
    new_names_of_host = 0x04000000  # CLONE_NEWUTS
    assert ctypes.CDLL(None).unshare(new_names_of_host) == 0
    socket.sethostname("no.such-host")


def test_a_run_that_was_killed_at_every_turn_ends_with_the_weights_of_an_undisturbed_one(
    survivor: Survivor, undisturbed: Undisturbed
) -> None:
    assert_same_weights(survivor.folder, undisturbed.folder)
    assert losses(survivor.folder) == losses(undisturbed.folder)
    assert read_json(survivor.folder / "run.json")["status"] == "finished"


def test_a_rank_that_is_killed_ends_the_job_soon_and_is_named_first(survivor: Survivor) -> None:
    end = survivor.endings["rank"]
    assert end.status == 128 + signal.SIGKILL
    assert end.seconds < SOON
    assert end.complaints[0].startswith("jepa-train: rank 1 was ended by SIGKILL")


def test_the_ranks_end_where_their_parent_is_killed(survivor: Survivor) -> None:
    end = survivor.endings["parent"]
    assert end.status == -signal.SIGKILL
    assert end.seconds < SOON
    assert end.saved_after >= end.reached


def test_a_job_killed_in_a_save_loses_at_most_the_steps_since_the_last_one(survivor: Survivor) -> None:
    end = survivor.endings["save"]
    assert end.reached - end.saved_after <= 5
    assert end.saved_after >= end.saved_before


def test_an_evaluation_of_two_ranks_that_a_signal_interrupts_is_repeated_later(
    survivor: Survivor,
) -> None:
    end = survivor.endings["evaluation"]
    assert end.status == 128 + signal.SIGTERM
    assert end.seconds < SOON
    assert (end.reached, end.saved_after) == (80, 80)
    assert steps_with(EVALUATION_TIME, survivor.folder) == [0, 80, 100]


def test_a_second_job_of_two_ranks_is_refused_with_one_message(undisturbed: Undisturbed) -> None:
    status, output = undisturbed.refused
    assert status == 2
    assert output.count("is in use by another training process") == 1
    assert len(output.partition("jepa-train: ")[2].splitlines()) == 2, output
    assert steps_with("train/loss", undisturbed.folder) == list(range(1, 101))


@contextmanager
def mounted(folder: Path, megabytes: float) -> Iterator[Path]:
    """A small disk."""
    folder.mkdir()
    size = f"size={int(megabytes * 1024)}k"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


SHORT = [*TINY, "steps=20", "eval_every=20", "save_every=5"]


@as_root
def test_a_full_disk_is_reported_and_the_run_resumes_when_there_is_space(
    tmp_path: Path,
) -> None:
    with mounted(tmp_path / "disk", 1.0) as disk:
        folder = disk / "run"
        with started(folder, *SHORT, "keep=10") as job:
            assert job.finish() == 1, job.output
        saved = saved_step(folder)
        assert 0 < saved < 20
        assert len(job.complaints) == 1, job.output
        assert "could not be saved" in job.complaints[0]
        assert "No space left" in job.complaints[0]
        assert f"step_{saved:08d}" in job.complaints[0]
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        JEPAAgent(JEPAConfig(*SHORT, "keep=10"), folder=folder).train()
        assert saved_step(folder) == 20


@as_root
def test_a_read_only_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 1.0) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(RunError, match=r"run cannot be written \(Read-only file system\): give another name="):
            JEPAAgent(JEPAConfig(*SHORT), folder=disk / "run").train()


def rewind(folder: Path, step: int) -> None:
    """As if the run had been killed after it saved this step."""
    root = folder / "checkpoints"
    for path in root.glob("step_*"):
        if path.name > f"step_{step:08d}":
            shutil.rmtree(path)
    for name in ("last", "best"):
        (root / name).unlink(missing_ok=True)
    (root / "last").symlink_to(f"step_{step:08d}")
    facts = read_json(folder / "run.json") | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(facts))


def test_what_one_process_saved_two_ranks_with_shards_load_and_the_reverse(tmp_path: Path) -> None:
    options = [*SHORT, "keep=10"]
    one, shards, back = tmp_path / "one", tmp_path / "shards", tmp_path / "back"
    JEPAAgent(JEPAConfig(*options), folder=one).train()
    shutil.copytree(one, shards, symlinks=True)
    rewind(shards, 10)
    with started(shards, *options, "strategy=fsdp") as job:
        assert job.finish() == 0, job.output
    shutil.copytree(shards, back, symlinks=True)
    rewind(back, 15)
    JEPAAgent(JEPAConfig(*options), folder=back).train()
    for folder in (shards, back):
        assert losses(folder) == pytest.approx(losses(one), abs=1e-5)
    assert len(list((shards / "checkpoints" / "step_00000015").glob("*.safetensors"))) == 2


def test_data_that_fail_on_one_rank_are_reported_once_by_that_rank(tmp_path: Path) -> None:
    with started(tmp_path / "run", *SHORT, "dataset._target_=faulty_data.UnreadableOnOneRank") as job:
        assert job.finish() == 1, job.output
    assert job.output.count("the cable is out") == 1, job.output
    assert "the cable is out" in read_json(tmp_path / "run" / "run.json")["message"]
    assert "Traceback" not in job.output
    assert "rank 1" in job.complaints[0]


def test_python_raises_where_the_processes_that_it_started_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for status in (1, 128 + signal.SIGKILL):
        monkeypatch.setattr("jepa.agent.start_processes", lambda *_, status=status: status)
        with pytest.raises(RunError, match=f"status {status}"):
            JEPAAgent(JEPAConfig(*SHORT, "processes=2"), folder=tmp_path / "run").train()


def test_a_loss_that_is_never_finite_stops_both_ranks_with_one_message_and_leaves_the_state(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    wild = ["steps=60", "eval_every=60", "lr=1e30", "schedule.start_ratio=1", "clip_grad=null"]
    with started(folder, *TINY, *wild) as job:
        assert job.finish() == 1, job.output
    assert len(job.complaints) == 1, job.output
    assert "not finite" in job.complaints[0]
    assert "Traceback" not in job.output
    assert load_encoder(folder / "checkpoints" / "failed").embed_dim == 32
