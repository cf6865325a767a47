"""Start one process per GPU on this machine, unless torchrun or srun has started them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jepa.config.schema import TrainConfig, to_yaml
from jepa.parallel.environment import num_cores, process_info
from jepa.parallel.signals import SIGNALS, TERMINAL, handlers, no_interrupts

GRACE_SECONDS = 20
"""Time for the other processes to stop by themselves after one has failed; then they are killed."""
POLL_SECONDS = 0.2
REFUSED = 2
"""Exit status for an error in the configuration, which all processes find."""


def num_processes(config: TrainConfig, environ: Mapping[str, str]) -> int:
    """Number of processes to start: `processes`, else the number of GPUs; 1 if this is one of several already."""
    if config.strategy == "single" or process_info(environ) is not None:
        return 1
    if config.processes is not None or config.device not in ("auto", "cuda"):
        return config.processes or 1
    import torch

    return max(1, torch.cuda.device_count())


def start_processes(config: TrainConfig, folder: Path, count: int) -> int:
    """Train in `count` processes; returns 0, or the exit status of the first that failed, when all have ended.

    Signals are forwarded to them, and they end when this process is killed.
    """
    with tempfile.TemporaryDirectory(prefix="jepa-") as temporary:
        config_file = Path(temporary) / "config.yaml"
        config_file.write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "jepa.cli.worker", str(config_file), str(folder)]
        terminal = [int(os.environ[TERMINAL])] if TERMINAL in os.environ else []
        with no_interrupts():
            children = [
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, start_new_session=True, pass_fds=terminal
                )
                for environment in _environments(count)
            ]
        try:
            with handlers(SIGNALS, lambda signum, _: _send(children, signum)):
                return _wait(children)
        finally:
            _send(children, signal.SIGKILL)


def _environments(count: int) -> Iterator[dict[str, str]]:
    """Environment variables of each process, with those that torchrun sets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores() // count))} | os.environ
    for rank in range(count):
        yield threads | {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}


def _send(children: Sequence[subprocess.Popen], signum: int) -> None:
    for child in children:
        child.send_signal(signum)  # ignored if it has ended


def _wait(children: Sequence[subprocess.Popen]) -> int:
    """Exit status of the first process that failed, after which the others stop by themselves or are killed."""
    status, failed_at = 0, 0.0
    while None in [child.poll() for child in children]:  # not any(): it would poll only as far as the first one alive
        failed = [(rank, child.returncode) for rank, child in enumerate(children) if child.returncode]
        if failed and not status:
            status, failed_at = _status(*failed[0]), time.monotonic()
        if status and time.monotonic() > failed_at + (GRACE_SECONDS if status != REFUSED else 0):
            _send(children, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return status or next((_status(rank, c.returncode) for rank, c in enumerate(children) if c.returncode), 0)


def _status(rank: int, code: int) -> int:
    if code > 0:
        return code
    hint = ", often for lack of memory" if code == -signal.SIGKILL else ""
    message = f"rank {rank} was ended by {signal.Signals(-code).name}{hint}. Run the same command again to resume"
    print(f"jepa-train: {message}", file=sys.stderr, flush=True)
    return 128 - code
