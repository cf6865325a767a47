"""Commands in terminals and locales that know ASCII only."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny_agent import TINY

pytestmark = pytest.mark.slow
ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}


def run(cwd, module, *arguments):
    command = [sys.executable, "-m", f"jepa.cli.{module}", *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | ASCII, capture_output=True, check=False)


def test_commands_print_names_of_classes_runs_and_folders_in_ascii(tmp_path):
    for label, value in (("chat", 0), ("été", 120), ("犬", 250)):
        (tmp_path / "tür" / "train" / label).mkdir(parents=True)
        for number in range(12):
            picture = torch.full((8, 8), value + number % 5, dtype=torch.uint8)
            Image.fromarray(picture.numpy()).save(tmp_path / "tür" / "train" / label / f"{number}.png")
    keys = [key for key in TINY if "num_samples" not in key]
    keys += ["dataset=imagefolder", 'dataset.root_path="tür"', "steps=2", "name=lauf", "evaluation.val_samples=8"]
    trained = run(tmp_path, "train", *keys)
    assert trained.returncode == 0, trained.stderr
    for done in (
        trained,
        run(tmp_path, "train", *keys),
        run(tmp_path, "compare", "outputs/lauf"),
        run(tmp_path, "train", "--help"),
    ):
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr + done.stdout
        assert b"Logging error" not in done.stderr
        assert (done.stdout + done.stderr).isascii()
    refused = run(tmp_path, "train", *keys[:-3], 'dataset.image_folder="gibt es nicht, ä"')
    assert refused.returncode == 2
    assert b"Traceback" not in refused.stderr


def test_plus_minus_and_squares_have_an_ascii_form():
    script = "from jepa.reports.text import *; print(printable('±é')); print_any_text(); print('R², é')"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | ASCII, capture_output=True, check=True)
    assert done.stdout == b"+-\\xe9\nR2, \\xe9\n"
