"""A short run, pictures of two classes, and calls of commands on them in this process."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
from fault_commands import TRAINING
from PIL import Image

QUIET = ["device=cpu", "num_workers=0", "precision=fp32"]


class Ended(NamedTuple):
    status: int
    output: str
    errors: str


Call = Callable[..., Ended]


def write_two_classes(root: Path) -> None:
    """Dark noise (ant) and bright noise (bee), of several sizes: root/train and root/val, 12 and 6 of each class."""
    random = np.random.default_rng(0)
    for part, number in (("train", 12), ("val", 6)):
        for place, name in enumerate(("ant", "bee")):
            (root / part / name).mkdir(parents=True)
            for k in range(number):
                pixels = random.integers(120 * place, 120 * place + 100, (30 + k, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{k:02}.png")


def write_clip(path: Path, brightness: int) -> None:
    """A video of nine frames, each brighter than the one before by nine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(9):
            pixels = np.full((32, 48, 3), brightness + 9 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def train_runs(folder: Path, *, tuned: bool) -> None:
    """outputs/first in the folder, pretrained on folder/pictures, and outputs/tuned, fine-tuned from it."""
    data = ["dataset=imagefolder", "dataset.root_path=pictures", "evaluation.val_samples=100"]
    with contextlib.chdir(folder):
        run("train", *TRAINING, *data, "evaluator=[]", "name=first")
        if tuned:
            length = ["steps=12", "batch_size=8", "lr=1e-2", "logger=none", "evaluator=accuracy", *QUIET]
            run("finetune", "run=outputs/first", *data, *length, "log_every=4", "name=tuned")


def run(command: str, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"jepa-{command}"])
        try:
            return importlib.import_module(f"jepa.cli.{command}").main(list(arguments))
        except SystemExit as exit:
            return int(exit.code or 0)


def caller(command: str, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs the command on one CPU with these arguments."""

    def call(*arguments: str) -> Ended:
        capfd.readouterr()
        return Ended(run(command, *QUIET, *arguments), *capfd.readouterr())

    return call
