"""Rank and world size of this process, from the variables of torchrun or Slurm. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

from jepa.errors import RunError

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
REQUEUE_SECONDS = 60
"""Seconds that Slurm may take to end a job which it has put back into the queue."""


@dataclass(frozen=True)
class ProcessInfo:
    """Rank and number of processes, on all machines and on this one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1


def process_info(environ: Mapping[str, str]) -> ProcessInfo | None:
    """None if neither torchrun nor srun started several processes; RunError if the variables are incomplete."""
    names = TORCHRUN_VARIABLES[:4]
    if "RANK" in environ or "WORLD_SIZE" in environ:
        environ = {"LOCAL_RANK": environ.get("RANK", ""), "LOCAL_WORLD_SIZE": environ.get("WORLD_SIZE", ""), **environ}
    elif environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"
        per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # as 4(x2),3
        environ = {**environ, "SLURM_STEP_TASKS_PER_NODE": re.split(r"[(,]", per_node)[0]}
    else:
        return None
    try:
        process = ProcessInfo(*(int(environ.get(name, "")) for name in names))
    except ValueError:
        raise RunError(
            f"cannot tell which of how many processes this is from {environment_summary(environ)}: set RANK and "
            "WORLD_SIZE both, or unset them to train in one process"
        ) from None
    if not 0 <= process.rank < process.world_size:
        raise RunError(f"there is no rank {process.rank} of {process.world_size}: {environment_summary(environ)}")
    return process


def num_cores() -> int:
    """CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rendezvous(environ: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of rank 0: MASTER_ADDR and MASTER_PORT, else those that follow from the Slurm job."""
    job = int(environ.get("SLURM_JOB_ID", 0)) + int(environ.get("SLURM_STEP_ID", 0))
    return environ.get("MASTER_ADDR") or _first_node(environ), int(environ.get("MASTER_PORT", 20000 + job % 12000))


def _first_node(environ: Mapping[str, str]) -> str:
    """Name of the job's first node, or its address in Slurm if the name does not resolve."""
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    if environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    if not shutil.which("scontrol"):
        return nodes
    first = _scontrol("show", "hostnames", nodes).split()[0]
    try:
        socket.getaddrinfo(first, None)
    except OSError:
        address = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", first))
        return address[1] if address else first
    return first


def _scontrol(*arguments: str) -> str:
    done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RunError(f"scontrol {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def environment_summary(environ: Mapping[str, str]) -> str:
    """The variables of torchrun and Slurm that are set, as NAME=VALUE."""
    texts = [f"{name}={environ[name]}" for name in (*TORCHRUN_VARIABLES, *SLURM_VARIABLES) if name in environ]
    return " ".join(texts) or "no variable of torchrun or Slurm"


def requeue(environ: Mapping[str, str]) -> None:
    """Put the Slurm job of this process back into the queue, unless it was cancelled; Slurm then ends it."""
    job = environ.get("SLURM_JOB_ID")
    if job is None or not shutil.which("scontrol") or "JobState=RUNNING" not in _scontrol("show", "job", job):
        return
    try:
        _scontrol("requeue", job)
    except RunError as error:
        print(f"{error}; submit the job again to resume the run", flush=True)
        return
    time.sleep(REQUEUE_SECONDS)
