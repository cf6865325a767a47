"""Each fault of the surroundings in each command that meets it: used, or one message with the path or the key."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from fault_commands import Ended, Place, call, ended_in, full, prepare, read_only, write_pictures

from jepa.data import listing
from jepa.data.folders import FileDataset
from jepa.data.frame_logs import FolderFiles
from jepa.inference import files

ACTING = ("collect", "import", "plan", "rl", "play")
"""Commands on episodes; "import" is jepa-collect with a source."""
PICTURES = ("train", "finetune", "eval", "find-lr", "find-batch")
READ_FILES = ("embed", "predict")
"""What reads all files below a folder, without a data set."""
COMMANDS = ("train", "sweep", "finetune", "eval", "export", *READ_FILES, "compare", "find-lr", "find-batch", *ACTING)
READ_RUNS = ("finetune", "eval", "export", *READ_FILES, "compare", "plan", "play")
READ_CHECKPOINTS = tuple(command for command in READ_RUNS if command != "compare")
ONE_RUN = (*PICTURES, *READ_FILES, "import")
"""What reads data, without the sweep, of which each member is a `train`."""
READ_DATA = (*ONE_RUN, "sweep")
WRITE_RUNS = (*READ_DATA, "collect", "plan", "rl")
"""What writes into outputs/ of the working folder whatever it reads."""
KINDS = {"plan": "world", "play": "policy"}
"""What the run is that a command reads, if not of images."""
QUICK = ("eval", "export", *READ_FILES, "compare", *ACTING)
ODD = "a [b]*? {c,d} é, e"
LONG = "x" * 300
PROGRAMS = {"sweep": "train", "find-lr": "find", "find-batch": "find", "import": "collect"}
Fault = Callable[[Path, ExitStack, pytest.MonkeyPatch], Place | None]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder for a command, with pictures and finished runs that it can read; prepared once for each kind of run."""

    @cache
    def folder(kind: str) -> Path:
        prepare(folder := tmp_path_factory.mktemp(kind), kind)
        return folder

    return lambda command: folder(KINDS.get(command, "images"))


@pytest.fixture
def work(
    earlier: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Path:
    command = request.node.callspec.params["command"]
    folder = shutil.copytree(earlier(command), tmp_path / "work", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def nothing(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    """No fault."""


def read_only_outputs(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    stack.enter_context(read_only(work / "outputs"))


def full_outputs(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    stack.enter_context(full(work / "outputs"))


def outputs_is_a_file(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    (work / "outputs").rename(work / "runs")
    (work / "outputs").touch()
    return Place(run="runs/earlier")


def read_only_working_folder(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    (work / "here").mkdir()
    stack.enter_context(read_only(work / "here"))
    patch.chdir(work / "here")
    return Place(str(work / "outputs/earlier"), str(work / "pictures"))


def removed_working_folder(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    (work / "gone").mkdir()
    patch.chdir(work / "gone")
    (work / "gone").rmdir()
    return Place(str(work / "outputs/earlier"), str(work / "pictures"))


def no_run(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    return Place(run="outputs/none")


def run_is_a_file(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    (work / "outputs/file").write_text("hello")
    return Place(run="outputs/file")


def run_is_empty(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    (work / "outputs/empty").mkdir()
    return Place(run="outputs/empty")


def run_without_checkpoint(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    for path in (work / "outputs").glob("*/checkpoints"):
        shutil.rmtree(path)


def run_with_an_empty_checkpoint(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    for path in (work / "outputs").glob("*/checkpoints/*/*"):
        path.unlink(missing_ok=True)


def stale_link(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    (work / "outputs/link").symlink_to("nowhere")
    return Place(run="outputs/link")


def circular_link(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    (work / "outputs/link").symlink_to("link")
    return Place(run="outputs/link")


def long_run(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    return Place(run=LONG)


def odd_run(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    runs = [path.parent for path in (work / "outputs").glob("*/checkpoints")]
    (work / "outputs" / ODD).mkdir()
    for run in runs:
        run.rename(work / "outputs" / ODD / run.name)
    return Place(run=f"outputs/{ODD}/earlier")


def hub(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    return Place(run="hf:nobody/nothing-of-this-name")


def timm(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    patch.setenv("HF_HOME", str(work / "cache"))
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(work / "cache"))
    return Place(run="timm:vit_tiny_patch16_224")


def no_data(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    return Place(data="elsewhere")


def data_is_a_file(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    (work / "elsewhere").write_text("hello")
    return Place(data="elsewhere")


def data_are_empty(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    (work / "elsewhere/train").mkdir(parents=True)
    return Place(data="elsewhere")


def unreadable_data(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str | Path = ".") -> object:
        if "pictures" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    patch.setattr(os, "scandir", refuse)


def long_data(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    return Place(data=LONG)


def odd_data(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    (work / "pictures").rename(work / ODD)
    return Place(data=ODD)


def class_of_other_bytes(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> Place:
    write_pictures(work / "others", (b"caf\xe9", b"bee"))
    return Place(data="others")


def vanish(number: int, patch: pytest.MonkeyPatch) -> None:
    """Delete pictures after the training part, or all files, were listed."""

    def then_delete(list_them: Callable[..., object]) -> Callable[..., object]:
        def listed(folder: Path, *arguments: object, **settings: object) -> object:
            listing = list_them(folder, *arguments, **settings)
            for path in sorted(folder.rglob("*.png"))[:number]:
                path.unlink()
            return listing

        return listed

    patch.setattr(listing, "list_files", then_delete(listing.list_files))
    patch.setattr(files, "list_all", then_delete(files.list_all))


def one_picture_vanishes(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    vanish(1, patch)


def pictures_vanish(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    vanish(16, patch)


def disk_of_the_data_fails(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    def fail(self: FileDataset, index: int) -> bytes:
        raise OSError(5, "Input/output error", self.file(index))

    def fail_for_names(self: FolderFiles, name: str) -> bytes:
        raise OSError(5, "Input/output error", str(self.folder / name))

    patch.setattr(FileDataset, "read", fail)
    patch.setattr(FolderFiles, "read", fail_for_names)


def world_of_the_policy_is_gone(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(work / "outputs/earlier/world")


def world_of_the_policy_is_damaged(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    (work / "outputs/earlier/world/checkpoints/step_00000004/config.yaml").write_text("steps: 5")


def heads_are_gone(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    for path in (work / "outputs/earlier").rglob("heads.json"):
        path.unlink()


def heads_are_damaged(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    for path in (work / "outputs/earlier").rglob("heads.json"):
        path.write_text("{")


def episodes_are_gone(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(work / "outputs/episodes")


def frames_of_episodes_are_cut_off(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    os.truncate(work / "outputs/episodes/group-000000/frames.npy", 1000)


def state_is_damaged(work: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
    for path in (work / "outputs").glob("*/checkpoints/step_*/state.json"):
        path.write_text("{")


USED: dict[Fault, tuple[str, ...]] = {
    nothing: COMMANDS,
    odd_run: READ_RUNS,
    odd_data: ONE_RUN,
    class_of_other_bytes: (*PICTURES, *READ_FILES),
    one_picture_vanishes: (*PICTURES, *READ_FILES),
    outputs_is_a_file: ("export", "compare", "play"),
    run_without_checkpoint: ("compare",),
    run_with_an_empty_checkpoint: ("compare",),
    state_is_damaged: ("compare",),
    read_only_working_folder: ("export", "compare", "play"),
    episodes_are_gone: ("plan",),
    frames_of_episodes_are_cut_off: ("plan",),
}
REFUSED: dict[Fault, tuple[tuple[str, ...], str]] = {
    read_only_outputs: (COMMANDS, "outputs/"),
    full_outputs: (COMMANDS, "outputs/"),
    outputs_is_a_file: (WRITE_RUNS, "outputs"),
    read_only_working_folder: (WRITE_RUNS, "outputs"),
    removed_working_folder: (COMMANDS, "the working folder"),
    no_run: (READ_RUNS, "outputs/none"),
    run_is_a_file: (READ_RUNS, "outputs/file"),
    run_is_empty: (READ_RUNS, "outputs/empty"),
    run_without_checkpoint: (READ_CHECKPOINTS, "outputs/"),
    run_with_an_empty_checkpoint: (READ_CHECKPOINTS, "outputs/"),
    stale_link: (READ_RUNS, "outputs/link"),
    circular_link: (READ_RUNS, "outputs/link"),
    long_run: (READ_RUNS, LONG),
    hub: (READ_RUNS, "nobody/nothing-of-this-name"),
    timm: (READ_RUNS, "vit_tiny_patch16_224"),
    no_data: (READ_DATA, "elsewhere"),
    data_is_a_file: (ONE_RUN, "elsewhere"),
    data_are_empty: (ONE_RUN, "elsewhere"),
    unreadable_data: (ONE_RUN, "pictures"),
    long_data: (ONE_RUN, LONG),
    pictures_vanish: ((*PICTURES, "sweep"), "pictures/train"),
    disk_of_the_data_fails: (ONE_RUN, "pictures/"),
    world_of_the_policy_is_gone: (("play",), "outputs/earlier/world"),
    world_of_the_policy_is_damaged: (("play",), "outputs/earlier/world"),
    heads_are_gone: (("plan", "play"), "the world has no head"),
    heads_are_damaged: (("plan", "play"), "heads.json"),
    state_is_damaged: (READ_CHECKPOINTS, "outputs/"),
}


def cells(commands_of: dict) -> list:
    """(fault, command), and what the message names."""
    return [
        pytest.param(
            fault, command, *named, id=f"{fault.__name__}-{command}",
            marks=() if command in QUICK else pytest.mark.slow,
        )
        for fault, (commands, *named) in commands_of.items()
        for command in commands
    ]  # fmt: skip


@pytest.mark.parametrize(("fault", "command"), cells({fault: (commands,) for fault, commands in USED.items()}))
def test_a_command_works_all_the_same(fault: Fault, command: str, work: Path, capfd, monkeypatch) -> None:
    with ExitStack() as stack:
        ended = call(command, fault(work, stack, monkeypatch) or Place(), capfd, monkeypatch)
    assert ended.status == 0, ended.errors
    assert "Traceback" not in ended.errors


@pytest.mark.parametrize(("fault", "command", "named"), cells(REFUSED))
def test_a_command_ends_with_one_message(
    fault: Fault, command: str, named: str, work: Path, capfd, monkeypatch
) -> None:
    with ExitStack() as stack:
        ended = call(command, fault(work, stack, monkeypatch) or Place(), capfd, monkeypatch)
    assert ended.status in (1, 2), ended
    assert "Traceback" not in ended.errors
    assert "Error executing" not in ended.errors
    message = ended.errors[ended.errors.rindex(f"jepa-{PROGRAMS.get(command, command)}: ") :]
    if command != "sweep":
        assert named in message, ended.errors
        assert len(message.splitlines()) <= 2
    assert named in ended.errors


ENVIRONMENTS = {
    "no home, in ascii": {"HOME": "/nonexistent", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "read-only home, output closed": {"HOME": "/proc"},
}
CACHES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_HOME", "HF_HOME", "MPLCONFIGDIR", "WANDB_DIR")


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def in_environment(
    request: pytest.FixtureRequest, earlier: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Ended]:
    """How each command ends, of those that a Python started in this environment forks."""
    top = tmp_path_factory.mktemp("environment")
    folders = {command: shutil.copytree(earlier(command), top / command, symlinks=True) for command in COMMANDS}
    kept = {name: value for name, value in os.environ.items() if name not in CACHES}
    return ended_in(folders, closed="closed" in request.param, **(kept | ENVIRONMENTS[request.param]))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works_in_any_home_and_terminal(command: str, in_environment: dict[str, Ended]) -> None:
    ended = in_environment[command]
    assert ended.status == 0, ended.errors
    assert "Traceback" not in ended.errors
    assert "BrokenPipe" not in ended.errors


def test_an_output_that_cannot_be_written_is_named_once(earlier: Callable[[str], Path]) -> None:
    with open("/dev/full", "w") as full_device:
        command = [sys.executable, "-m", "jepa.cli.compare", "outputs/earlier"]
        done = subprocess.run(
            command, cwd=earlier("compare"), stdout=full_device, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.stderr == (
        "jepa-compare: standard output: No space left on device; make room there, then run the same command again\n"
    )
    assert done.returncode == 2
