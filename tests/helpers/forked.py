"""Functions and commands in forks of a process that has imported torch: a start takes milliseconds, not seconds."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

NOBODY = Path("|")
"""As `output`: a pipe whose reader has gone."""


class Command(NamedTuple):
    name: str
    """train for jepa-train"""
    arguments: Sequence[str]
    folder: Path
    output: Path
    """file of what it prints"""
    errors: Path
    """file of its errors; may be the same one"""


def start(function: Callable[[], int | None], folder: Path, output: Path, errors: Path | None = None) -> BaseProcess:
    """A process in the working folder whose output and errors go to files; its status is what the function returns."""
    arguments = (function, folder, output, errors or output)
    process = multiprocessing.get_context("fork").Process(target=_run, args=arguments)
    process.start()
    return process


def status(function: Callable[[], int | None], folder: Path, output: Path, errors: Path | None = None) -> int:
    """Of a process that ends by itself; minus the signal if one has killed it."""
    process = start(function, folder, output, errors)
    process.join(200)
    assert process.exitcode is not None
    return process.exitcode


def command(name: str, arguments: Sequence[str]) -> Callable[[], int]:
    """jepa-NAME with these arguments."""

    def call() -> int:
        sys.argv = [f"jepa-{name}", *arguments]
        return importlib.import_module(f"jepa.cli.{name}").main(list(arguments))

    return call


def statuses(commands: Sequence[Command], environment: dict[str, str], before: Sequence[str] = ()) -> list[int]:
    """Of commands that run one after the other in an environment in which Python was started, by the line `before`."""
    line = [*before, sys.executable, __file__, json.dumps(commands, default=str)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _run(function: Callable[[], int | None], folder: Path, output: Path, errors: Path) -> None:
    os.setsid()  # as a shell does: the processes that it starts can be sent a signal together
    os.chdir(folder)
    for path, number in ((output, 1), (errors, 2)):
        os.dup2(_nobody() if path == NOBODY else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.exit(function())


def _nobody() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _main(commands: str) -> None:
    importlib.import_module("jepa.agent")
    given = [Command(name, arguments, *map(Path, paths)) for name, arguments, *paths in json.loads(commands)]
    print(json.dumps([status(command(c.name, c.arguments), c.folder, c.output, c.errors) for c in given]))


if __name__ == "__main__":
    _main(sys.argv[1])
