"""What a machine may lack: shared memory, a compiler."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import forked
import pytest
import torch
from tiny_agent import TINY

from jepa.errors import ConfigError
from jepa.parallel.strategy import check_compiler

SHORT = [*TINY, "steps=2", "evaluator=[]", "device=cpu", "name=x"]
EVAL = ["run=outputs/x", "task=knn", "floors=[]", "dataset=shapes", "device=cpu", "num_workers=2", "name=new"]


def small_shared_memory(kilobytes: int, fill: str = "true") -> list[str]:
    """Starts a program with a /dev/shm of its own of this size; skips where that is not allowed."""
    script = f'mount -t tmpfs -o size={kilobytes}k none /dev/shm && {fill} && exec "$@"'
    before = ["unshare", "-m", "sh", "-c", script]
    if os.geteuid() or subprocess.run([*before, "sh", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no /dev/shm can be mounted here")
    return [*before, "sh"]


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["true", "cat /dev/zero 2>/dev/null > /dev/shm/x; true"], ids=["small", "full"])
def test_shared_memory_that_is_too_small_ends_in_one_line_with_what_to_do(fill: str, tmp_path: Path) -> None:
    before = small_shared_memory(20, f"{{ {fill}; }}")
    assert forked.status(forked.command("train", SHORT), tmp_path, tmp_path / "output") == 0
    given = {"train": [*SHORT, "num_workers=2", "name=y"], "eval": EVAL}
    commands = [
        forked.Command(name, line, tmp_path, tmp_path / "output", tmp_path / name) for name, line in given.items()
    ]
    assert forked.statuses(commands, dict(os.environ), before) == [1, 1]
    for name in given:
        errors = (tmp_path / name).read_text()
        assert "Traceback" not in errors
        message = errors.splitlines()[-1]
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
def test_a_run_without_a_compiler_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    output = tmp_path / "output"
    assert forked.status(forked.command("train", [*SHORT, "compile=true"]), tmp_path, output) == 2
    assert "Traceback" not in output.read_text()
    assert "compile=true: there is no" in output.read_text()
    assert not (tmp_path / "outputs/x/metrics.jsonl").exists()
