"""What a machine may lack: shared memory, a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_agent import TINY

from jepa.errors import ConfigError
from jepa.parallel.strategy import check_compiler

SHORT = [*TINY, "steps=2", "evaluator=[]", "device=cpu", "name=x"]
EVAL = ["run=outputs/x", "task=knn", "floors=[]", "dataset=shapes", "device=cpu", "num_workers=2", "name=new"]


def train(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    return command(folder, "train", *SHORT, *overrides, **environment)


def command(
    folder: Path, name: str, *arguments: str, before: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess:
    line = [*before, sys.executable, "-m", f"jepa.cli.{name}", *arguments]
    return subprocess.run(line, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False)


def small_shared_memory(kilobytes: int, fill: str = "true") -> list[str]:
    """Starts a program with a /dev/shm of its own of this size; skips where that is not allowed."""
    script = f'mount -t tmpfs -o size={kilobytes}k none /dev/shm && {fill} && exec "$@"'
    before = ["unshare", "-m", "sh", "-c", script]
    if os.geteuid() or subprocess.run([*before, "sh", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no /dev/shm can be mounted here")
    return [*before, "sh"]


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["true", "cat /dev/zero 2>/dev/null > /dev/shm/x; true"], ids=["small", "full"])
@pytest.mark.parametrize("name", ["train", "eval"])
def test_shared_memory_that_is_too_small_ends_in_one_line_with_what_to_do(name: str, fill: str, tmp_path) -> None:
    before = small_shared_memory(20, f"{{ {fill}; }}")
    if name == "eval":
        assert train(tmp_path).returncode == 0
    given = EVAL if name == "eval" else [*SHORT, "num_workers=2"]
    done = command(tmp_path, name, *given, before=before)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"jepa-{name}: the shared memory (/dev/shm)")
    assert "num_workers=0" in message
    assert "--shm-size" in message


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_missing_compiler_is_named_with_its_variable(device: str, variable: str, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(variable, "/nonexistent -O2")
    with pytest.raises(ConfigError, match=f"{variable}=/nonexistent is no program.*compile=false"):
        check_compiler(torch.device(device))
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"there is no (g\+\+|clang\+\+|gcc or clang); .*{variable}.*compile=false"):
        check_compiler(torch.device(device))


@pytest.mark.slow
def test_a_run_without_a_compiler_is_refused_before_it_starts(tmp_path: Path) -> None:
    done = train(tmp_path, "compile=true", PATH=str(tmp_path))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "compile=true: there is no" in done.stderr
    assert not (tmp_path / "outputs/x/metrics.jsonl").exists()
