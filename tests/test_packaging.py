"""The wheel carries code and configuration, and works from any folder; the pins name no host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path, pythonpath: Path | None = None) -> str:
    env = os.environ | ({"PYTHONPATH": str(pythonpath)} if pythonpath else {})
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(target)]
    run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


def test_wheel_carries_the_whole_configuration_the_templates_and_the_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configuration = {f"jepa/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert configuration <= names
    templates = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/jepa/reports/templates").iterdir()}
    assert "jepa/reports/templates/page.css" in templates
    assert templates <= names
    assert "jepa/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_wheel_finds_its_configuration_from_any_folder(installed: Path, tmp_path: Path) -> None:
    where = run(sys.executable, "-c", "import jepa; print(jepa.__file__)", cwd=tmp_path, pythonpath=installed)
    assert Path(where.strip()).is_relative_to(installed)
    shown = run(sys.executable, "-m", "jepa.cli.train", "--help", cwd=tmp_path, pythonpath=installed)
    groups = [folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir() and folder.name != "hydra"]
    assert not [group for group in groups if group not in shown]
    job = run(sys.executable, "-m", "jepa.cli.train", "--cfg", "job", cwd=tmp_path, pythonpath=installed)
    assert "batch_size: 64" in job
    assert list(tmp_path.iterdir()) == []


def test_console_command_is_installed(installed: Path) -> None:
    assert (installed / "bin" / "jepa-train").exists()


def test_pins_name_no_host_and_keep_torch_and_torchvision_together() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|@|--|\.whl|\.com|\.org", text)
    pins = dict(line.split(" ;")[0].split("==") for line in text.splitlines())
    assert (pins["torch"], pins["torchvision"]) in {("2.15.0", "0.29.2")}


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[\[<>=]", name)[0] for name in wanted} - {"jepa-train"}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert names <= pinned


def setup(folder: Path, *extra: str, uv: str) -> subprocess.CompletedProcess[str]:
    """scripts/setup.sh in a folder whose environment has a Python and a uv that only say what they are asked."""
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name, line in (("python", "echo noise"), ("uv", uv)):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> calls\n{line}\n')
        (programs / name).chmod(0o755)
    command = ["sh", str(ROOT / "scripts" / "setup.sh"), "venv", *extra]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(("extra", "installed"), [([], "-e ."), (["dev"], "-e .[dev]")])
def test_set_up_prints_one_line_a_stage_and_installs_what_is_asked_for(
    extra: list[str], installed: str, tmp_path: Path
) -> None:
    done = setup(tmp_path, *extra, uv="echo Downloading torch")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["setup", "setup"]
    assert "noise" not in done.stdout
    assert "Downloading" not in done.stdout
    assert (tmp_path / "calls").read_text().splitlines()[1].endswith(installed)


def test_a_set_up_that_fails_shows_what_the_installer_said(tmp_path: Path) -> None:
    done = setup(tmp_path, "dev", uv="echo no route to host; exit 3")
    assert done.returncode == 3
    assert done.stderr.splitlines()[0] == "no route to host"
    assert "failed with status 3; its output is above" in done.stderr
    assert "compileall" not in (tmp_path / "calls").read_text()


def test_training_needs_less_than_tests(tmp_path: Path) -> None:
    """`make train` after `make test` sets nothing up, and the other way round installs the rest."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    plan = [run("make", "-n", target, cwd=tmp_path) for target in ("train", "test")]
    assert "setup.sh .venv\n" in plan[0]
    assert "setup.sh .venv dev\n" in plan[1]
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".jepa-train").touch()
    assert "setup.sh" not in run("make", "-n", "train", cwd=tmp_path)
    assert "setup.sh .venv dev\n" in run("make", "-n", "test", cwd=tmp_path)
