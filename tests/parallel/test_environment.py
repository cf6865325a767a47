"""Rank and world size from the variables of torchrun and Slurm, and the number of processes that are started."""

from __future__ import annotations

import subprocess

import pytest

from jepa.config import compose
from jepa.errors import RunError
from jepa.parallel import environment as module
from jepa.parallel.environment import ProcessInfo, process_info, rendezvous, requeue
from jepa.training.launch import num_processes

SRUN = {
    "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]",
}  # fmt: skip
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_srun_and_torchrun_give_rank_and_world_size() -> None:
    assert process_info(SRUN) == ProcessInfo(rank=5, world_size=8, local_rank=1, local_size=4)
    assert process_info(TORCHRUN) == ProcessInfo(rank=3, world_size=4, local_rank=1, local_size=2)
    assert process_info(SRUN | TORCHRUN) == process_info(TORCHRUN), "torchrun inside of srun"


@pytest.mark.parametrize("environ", [{}, {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_one_process_is_not_one_of_several(environ: dict[str, str]) -> None:
    assert process_info(environ) is None


@pytest.mark.parametrize(
    "environ", [{"RANK": "0"}, {"WORLD_SIZE": "2"}, TORCHRUN | {"RANK": "4"}, TORCHRUN | {"RANK": "one"}]
)
def test_incomplete_variables_are_refused_with_the_variables(environ: dict[str, str]) -> None:
    with pytest.raises(RunError, match=r"RANK=|WORLD_SIZE="):
        process_info(environ)


def test_the_port_follows_from_the_job_and_its_step() -> None:
    one_node = SRUN | {"SLURM_STEP_NUM_NODES": "1"}
    assert rendezvous(one_node) == ("127.0.0.1", 20073)
    assert rendezvous(one_node | {"SLURM_JOB_ID": "12000"}) == ("127.0.0.1", 20002)
    assert rendezvous(SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "9"}) == ("a", 9)


@pytest.mark.parametrize(("resolves", "address"), [(True, "localhost"), (False, "10.0.0.7")])
def test_an_unknown_node_name_is_replaced_by_slurms_address(monkeypatch, resolves: bool, address: str) -> None:
    name = "localhost" if resolves else "no-such-node.invalid"
    printed = {"hostnames": f"{name}\nn2\n", "node": "NodeName=n1 NodeAddr=10.0.0.7 NodeHostName=x\n"}
    monkeypatch.setattr(module.shutil, "which", lambda _: "/bin/scontrol")
    monkeypatch.setattr(
        module.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, printed[command[2]], "")
    )
    assert rendezvous(SRUN)[0] == address


@pytest.mark.parametrize(("state", "is_requeued"), [("RUNNING", True), ("CANCELLED", False), ("COMPLETING", False)])
def test_a_job_that_was_cancelled_is_not_requeued(monkeypatch, state: str, is_requeued: bool) -> None:
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, 0, f"JobId=71 JobState={state} Reason=None", "")

    monkeypatch.setattr(module.shutil, "which", lambda _: "/bin/scontrol")
    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    requeue(SRUN)
    assert (["requeue", "71"] in commands) == is_requeued


def test_outside_of_slurm_nothing_is_requeued(monkeypatch) -> None:
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: pytest.fail("no job, no command"))
    requeue({})


@pytest.mark.parametrize(
    ("overrides", "environ", "count"),
    [
        (["processes=4", "device=cpu"], {}, 4),
        (["processes=4", "device=cpu"], TORCHRUN, 1),
        (["device=cpu"], {}, 1),
        (["strategy=single"], {}, 1),
    ],
)
def test_processes_are_started_unless_torchrun_has(overrides: list[str], environ: dict, count: int) -> None:
    assert num_processes(compose(overrides), environ) == count


def test_a_process_is_started_for_each_gpu(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert num_processes(compose([]), {}) == 8
    assert num_processes(compose(["processes=2"]), {}) == 2
