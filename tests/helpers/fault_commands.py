"""All commands with arguments that take a second, on a small run and pictures; disks that are full or read-only."""

from __future__ import annotations

import importlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import forked
import pytest
from PIL import Image
from tiny_agent import TINY

LENGTH = ["steps=2", "batch_size=4", "evaluation.train_samples=8", "evaluation.val_samples=8", "device=cpu", "name=new"]
CORRIDOR = ["env=corridor", f"--config-dir={Path(__file__).parents[1] / 'files' / 'corridor'}"]
SIZES = [
    *("encoder.patch_size=4", "encoder.embed_dim=16", "encoder.num_heads=1", "evaluator=[]", "num_workers=0"),
    *("num_frames=4", "batch_size=8", "predictor.width=32", "predictor.state_dim=8", "objective.head_steps=4"),
]
DREAMING = [
    *CORRIDOR, "world=jepa", f"world.settings={SIZES}".replace(" ", ""), "episode_steps=12", "batch_size=8",
    "horizon=3", "eval_episodes=4", "videos=1", "env_steps=60", "world_steps=4", "policy_steps=4", "device=cpu",
]  # fmt: skip
WORLD = [
    *("experiment=two_rooms", "dataset.episodes=30", "dataset.steps=12", "dataset.path=outputs/episodes", "steps=4"),
    *("batch_size=8", "eval_every=4", "save_every=4", "num_workers=0", "logger=none", "evaluator=[]", "device=cpu"),
    *("predictor.width=32", "predictor.state_dim=16", "encoder.embed_dim=16", "objective.head_steps=4"),
    "objective.heads=[probe,value]",
]
PLANNING = [
    *("episodes=2", "budget=4", "videos=1", "baselines=[random]", "planner.samples=8", "planner.elites=4"),
    *("planner.iterations=2", "planner.horizon=4", "planner.execute=2"),
]
REPLACED = {"dataset.num_samples", *(text.partition("=")[0] for text in LENGTH)}
TRAINING = [*(text for text in TINY if text.partition("=")[0] not in REPLACED), *LENGTH]
OF_WEIGHTS = ("encoder.", "predictor.", "mask.", "image_size")
"""Keys that fine-tuning takes from the weights."""


class Place(NamedTuple):
    """Where a command finds what it reads."""

    run: str = "outputs/earlier"
    data: str = "pictures"


class Ended(NamedTuple):
    status: int
    output: str
    errors: str


def arguments(command: str, place: Place) -> tuple[str, list[str]]:
    """Module of `jepa.cli` and arguments of a command on this run and these data."""
    data = ["dataset=imagefolder", f"dataset.root_path='{place.data}'"]
    run = f"run='{place.run}'"
    tuning = [text for text in TRAINING if not text.startswith(OF_WEIGHTS)]
    images = [f"images='{place.data}'", "device=cpu", "num_workers=0"]
    return {
        "train": ("train", [*TRAINING, *data, "evaluator=knn"]),
        "sweep": ("train", [*TRAINING, *data, "evaluator=knn", "--multirun", "seed=0,1"]),
        "finetune": ("finetune", [run, *tuning, *data, "evaluator=accuracy"]),
        "eval": ("eval", [run, "task=knn", "floors=[]", *data, "device=cpu", "num_workers=0", "name=new"]),
        "export": ("export", [run]),
        "embed": ("embed", [run, *images, "out=outputs/new.npz"]),
        "predict": ("predict", [run.replace("earlier", "tuned"), *images, "out=outputs/new.csv"]),
        "compare": ("compare", [place.run]),
        "find-lr": ("find", ["lr", *TRAINING, *data, "--steps", "10"]),
        "find-batch": ("find", ["batch", *TRAINING, *data]),
        "collect": ("collect", ["episodes=2", "steps=2", "name=new"]),
        "import": ("collect", [f"source='frames:{place.data}'", "name=new"]),
        "plan": ("plan", [run, *PLANNING, "name=new"]),
        "rl": ("rl", [*DREAMING, "name=new"]),
        "play": ("play", [run, *CORRIDOR, "steps=3"]),
    }[command]


def call(command: str, place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ended:
    """Run the command in this process."""
    module, given = arguments(command, place)
    monkeypatch.setattr(sys, "argv", [f"jepa-{module}"])
    capfd.readouterr()
    try:
        status = importlib.import_module(f"jepa.cli.{module}").main(given)
    except SystemExit as exit:
        status = exit.code
    return Ended(status, *capfd.readouterr())


def ended_in(folders: Mapping[str, Path], *, closed: bool = False, **environment: str) -> dict[str, Ended]:
    """Run each command in its folder, started in this environment; with `closed`, nobody reads what they print."""
    commands = []
    for command, folder in folders.items():
        module, given = arguments(command, Place())
        output = forked.NOBODY if closed else folder / "output"
        commands.append(forked.Command(module, given, folder, output, folder / "errors"))
    statuses = forked.statuses(commands, environment)
    errors = [command.errors.read_text(errors="replace") for command in commands]
    return {name: Ended(*end) for name, *end in zip(folders, statuses, [""] * len(errors), errors, strict=True)}


def prepare(folder: Path, kind: str) -> None:
    """Write pictures, a log with them as frames, and a run of this kind: of images, a world or a policy.

    One of images is also fine-tuned, as `tuned`.
    """
    write_pictures(folder / "pictures")
    frames = [f"train/{name}/{number}.png,{name},{number}" for name in ("ant", "bee") for number in range(8)]
    (folder / "pictures" / "log.csv").write_text("\n".join(["file,episode,angle", *frames]) + "\n")
    runs = {
        "images": {"earlier": arguments("train", Place()), "tuned": arguments("finetune", Place())},
        "world": {"earlier": ("train", WORLD)},
        "policy": {"earlier": ("rl", DREAMING)},
    }
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        for name, (module, given) in runs[kind].items():
            patch.setattr(sys, "argv", [f"jepa-{module}"])
            assert importlib.import_module(f"jepa.cli.{module}").main([*given, f"name={name}"]) == 0


def write_pictures(root: Path, classes: Sequence[bytes] = (b"ant", b"bee"), number: int = 8) -> None:
    for place, name in enumerate(classes):
        for part in (b"train", b"val"):
            folder = os.path.join(os.fsencode(root), part, name)
            os.makedirs(folder)
            for k in range(number):
                file = io.BytesIO()
                Image.new("RGB", (32, 32), (40 * place, 20 * k, 99)).save(file, "PNG")
                with open(os.path.join(folder, b"%d.png" % k), "wb") as target:
                    target.write(file.getvalue())


@contextmanager
def disk(folder: Path, *options: str) -> Iterator[None]:
    """A small disk in place of the folder, with its content; skips where nothing can be mounted."""
    aside = folder.with_name(f"{folder.name}-aside")
    folder.rename(aside)
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        shutil.copytree(aside, folder, symlinks=True, dirs_exist_ok=True)
        for option in options:
            subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder in which nothing can be written: by its permissions or, for root, by a mount."""
    if not os.geteuid():
        with disk(folder, "ro"):
            yield
        return
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*")) if path.is_dir()}
    try:
        for path in modes:
            path.chmod(0o555)
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    with disk(folder):
        with suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        yield
