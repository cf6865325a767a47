"""Commands in terminals and locales that know ASCII only."""

import os
import subprocess
import sys

import forked
import pytest
import torch
from PIL import Image
from tiny_agent import TINY

pytestmark = pytest.mark.slow
ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}


def test_commands_print_names_of_classes_runs_and_folders_in_ascii(tmp_path):
    for label, value in (("chat", 0), ("été", 120), ("犬", 250)):
        (tmp_path / "tür" / "train" / label).mkdir(parents=True)
        for number in range(12):
            picture = torch.full((8, 8), value + number % 5, dtype=torch.uint8)
            Image.fromarray(picture.numpy()).save(tmp_path / "tür" / "train" / label / f"{number}.png")
    keys = [key for key in TINY if "num_samples" not in key]
    keys += ["dataset=imagefolder", 'dataset.root_path="tür"', "steps=2", "name=lauf", "evaluation.val_samples=8"]
    lines = [
        ("train", keys), ("train", keys), ("compare", ["outputs/lauf"]), ("train", ["--help"]),
        ("train", [*keys[:-3], 'dataset.image_folder="gibt es nicht, ä"']),
    ]  # fmt: skip
    printed = [tmp_path / f"printed-{number}" for number in range(len(lines))]
    commands = [forked.Command(*line, tmp_path, path, path) for line, path in zip(lines, printed, strict=True)]
    *worked, refused = forked.statuses(commands, os.environ | ASCII)
    assert worked == [0] * 4, [path.read_text() for path in printed]
    assert refused == 2
    for path in printed:
        assert b"Traceback" not in path.read_bytes()
        assert b"Logging error" not in path.read_bytes()
    for path in printed[:4]:
        assert path.read_bytes().isascii()


def test_plus_minus_and_squares_have_an_ascii_form():
    script = "from jepa.reports.text import *; print(printable('±é')); print_any_text(); print('R², é')"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | ASCII, capture_output=True, check=True)
    assert done.stdout == b"+-\\xe9\nR2, \\xe9\n"
