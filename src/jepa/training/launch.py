"""Several processes on this machine, one for each GPU: what `jepa-train` starts where nobody else has."""

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
from jepa.parallel.signals import SIGNALS, handlers

GRACE_SECONDS = 20
"""that the other processes have to notice that one has failed, before they are ended"""
POLL_SECONDS = 0.2
REFUSED = 2
"""the exit status of a configuration that all of them refuse"""


def num_processes(config: TrainConfig, environ: Mapping[str, str]) -> int:
    """How many are to be started: `processes`, else one for each GPU; 1 where this is one of several already."""
    if config.strategy == "single" or process_info(environ) is not None:
        return 1
    if config.processes is not None or config.device not in ("auto", "cuda"):
        return config.processes or 1
    import torch

    return max(1, torch.cuda.device_count())


def start_processes(config: TrainConfig, folder: Path, count: int) -> int:
    """Train in `count` processes and return when all have ended: 0, or the exit status of the first that failed.

    They get the signals that this process gets, and end where it is killed.
    """
    with tempfile.TemporaryDirectory(prefix="jepa-") as place:
        written = Path(place) / "config.yaml"
        written.write_text(to_yaml(config))
        command = [sys.executable, "-m", "jepa.cli.worker", str(written), str(folder)]
        children = [
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
            for environment in _environments(count)
        ]
        try:
            with handlers(SIGNALS, lambda signum, _: _end(children, signum)):
                return _wait(children)
        finally:
            _end(children, signal.SIGKILL)


def _environments(count: int) -> Iterator[dict[str, str]]:
    """As torchrun would set them."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores() // count))} | os.environ
    for rank in range(count):
        yield threads | {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}


def _end(children: Sequence[subprocess.Popen], signum: int) -> None:
    for child in children:
        child.send_signal(signum)  # nothing where it has ended


def _wait(children: Sequence[subprocess.Popen]) -> int:
    """Once one has failed the others cannot go on: they stop by themselves, or are ended."""
    first, since = 0, 0.0
    while None in [child.poll() for child in children]:  # all of them: any() would not ask beyond the first alive
        failed = [(rank, child.returncode) for rank, child in enumerate(children) if child.returncode]
        if failed and not first:
            first, since = _status(*failed[0]), time.monotonic()
        if first and time.monotonic() > since + (GRACE_SECONDS if first != REFUSED else 0):
            _end(children, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return first or next((_status(rank, c.returncode) for rank, c in enumerate(children) if c.returncode), 0)


def _status(rank: int, code: int) -> int:
    if code > 0:
        return code
    hint = ": often for want of memory" if code == -signal.SIGKILL else ""
    told = f"rank {rank} was ended by {signal.Signals(-code).name}{hint}. Run the same command again to go on"
    print(f"jepa-train: {told}", file=sys.stderr, flush=True)
    return 128 - code
