"""What ends a run from outside: signals, a closed terminal, a killed worker."""

from __future__ import annotations

import json
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import pytest
from tiny_agent import TINY

from jepa.agent import _out_of_memory_advice
from jepa.cli.sweep_signals import forward_to_slurm
from jepa.data.loader import DataError, batches
from jepa.data.moving_digits import MovingDigits
from jepa.parallel.signals import STOPS, Interrupt, handlers, listen

ARGUMENTS = [*TINY, "steps=4000", "save_every=4000", "eval_every=null", "device=cpu", "name=x", "log_every=1"]
COMMANDS = {
    "run": ("train", ARGUMENTS),
    "ranks": ("train", [*ARGUMENTS, "processes=2"]),
    "sweep": ("train", [*ARGUMENTS, "--multirun", "seed=0,1"]),
    "comparison": ("compare", [*ARGUMENTS, "objective=jepa,mae"]),
}


def line(name: str) -> list[str]:
    command, arguments = COMMANDS[name]
    return [sys.executable, "-m", f"jepa.cli.{command}", *arguments]


def wait_for_steps(folder: Path, has_ended: Callable[[], object]) -> None:
    """Until the first run has trained a few steps."""
    limit = time.monotonic() + 120
    while not any(file.read_text().count("train/loss") >= 3 for file in folder.glob("outputs/x/**/metrics.jsonl")):
        assert not has_ended()
        assert time.monotonic() < limit
        time.sleep(0.05)


def start(folder: Path, name: str = "run", **streams: int) -> subprocess.Popen:
    """Runs of which the first has trained a few steps."""
    process = subprocess.Popen(line(name), cwd=folder, start_new_session=True, text=True, **streams)
    wait_for_steps(folder, lambda: process.poll() is not None)
    return process


def start_fork(folder: Path, name: str) -> BaseProcess:
    process = forked.start(forked.command(*COMMANDS[name]), folder, folder / "output")
    wait_for_steps(folder, lambda: process.exitcode is not None)
    return process


def ending(folder: Path) -> dict:
    return json.loads((folder / "outputs/x/run.json").read_text())


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listen() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.is_requested()
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.signum == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("signum", STOPS)
def test_each_signal_that_stops_a_run_is_recorded(signum: int) -> None:
    with listen() as interrupt:
        signal.raise_signal(signum)
    assert interrupt.signum == signum


def test_handlers_are_what_they_were_afterwards() -> None:
    before = [signal.getsignal(signum) for signum in STOPS]
    with handlers(STOPS, Interrupt().receive):
        pass
    assert [signal.getsignal(signum) for signum in STOPS] == before


def test_ctrl_c_while_an_object_is_removed_ends_the_process() -> None:
    code = """
import signal
from jepa.parallel.signals import interrupt_once
class Interrupted:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
interrupt_once()
Interrupted()
print("goes on")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    answer = "stopping; press Ctrl-C again to stop now\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", answer)


def test_a_sweep_is_cancelled_once() -> None:
    before = [signal.getsignal(signum) for signum in STOPS]
    with forward_to_slurm([]):
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGINT)
        assert {signal.getsignal(signum) for signum in STOPS} <= {signal.SIG_DFL, signal.SIG_IGN}  # nohup's stays
    assert [signal.getsignal(signum) for signum in STOPS] == before


@pytest.mark.slow
def test_a_closed_terminal_saves_and_stops(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = start(tmp_path, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.close(ours)  # from now on the run cannot print
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    assert ending(tmp_path)["message"] == "stopped by SIGHUP"
    assert (tmp_path / "outputs/x/checkpoints/last/state.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "signum"), [("run", signal.SIGQUIT), ("ranks", signal.SIGQUIT), ("sweep", signal.SIGHUP)]
)
def test_a_signal_saves_and_stops_and_no_other_run_begins(name: str, signum: int, tmp_path: Path) -> None:
    process = start_fork(tmp_path, name)
    os.kill(process.pid or 0, signum)
    process.join(120)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 128 + signum, output
    assert "Traceback" not in output
    endings = [json.loads(file.read_text()) for file in tmp_path.glob("outputs/x/**/run.json")]
    assert [ending["message"] for ending in endings] == [f"stopped by {signal.Signals(signum).name}"]
    assert len([*tmp_path.glob("outputs/x/**/checkpoints/last/state.json")]) == 1


def storm(process: subprocess.Popen) -> str:
    """What a command prints while its whole group is sent a Ctrl-C every millisecond."""
    while process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.001)
    return process.communicate(timeout=60)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_storm_of_ctrl_c_ends_without_a_traceback(name: str, tmp_path: Path) -> None:
    process = start(tmp_path, name, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = storm(process)
    assert process.returncode in (130, -signal.SIGINT), output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1.5])
def test_a_storm_of_ctrl_c_during_the_imports_ends_without_a_traceback(seconds: float, tmp_path: Path) -> None:
    process = subprocess.Popen(
        line("run"), cwd=tmp_path, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    time.sleep(seconds)
    assert "Traceback" not in storm(process)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_without_a_traceback(tmp_path: Path) -> None:
    process = start_fork(tmp_path, "run")
    for _ in range(2):
        os.kill(process.pid or 0, signal.SIGINT)
        time.sleep(0.01)
    process.join(60)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 130, output
    assert "stopped at once; the same command goes on from the last checkpoint, if there is one" in output
    assert "Traceback" not in output


def test_a_killed_worker_is_named_wherever_torch_reports_it() -> None:
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nsecond line")
    advice = _out_of_memory_advice(*(None, None))  # around the step, where torch's handler of SIGCHLD may raise
    with pytest.raises(DataError, match=r"is killed by signal: Killed.*num_workers=0") as raised, advice:
        raise error
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_batches_with_one_line() -> None:
    dataset = MovingDigits(num_frames=2, num_samples=64)
    stream = batches(dataset, batch_size=4, seed=0, num_workers=1)
    next(stream)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match="num_workers=0") as raised:
        list(islice(stream, 1000))
    assert "\n" not in str(raised.value)
