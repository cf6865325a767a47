"""Components of a user's own state their rules themselves; no file of the package knows them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jepa.config import Composer

MASK = """
from jepa.masks.random import RandomMasker


def at_most_four_rows(grid, ratio=0.5):
    return [f"ratio={ratio}: a grid of {grid.h} rows is too high for this mask"] if grid.h > 4 else []


class LowMasker(RandomMasker):
    faults = "own_mask.at_most_four_rows"

    def __init__(self, *, grid, ratio: float = 0.5):
        super().__init__(grid=grid, ratio=ratio)
"""
DATASET = '''
import torch
from jepa.types import Sample


class Noise:
    """Keys that other data sets have rules for: `path` is no file here, and `fps` may stand beside `stride`."""

    classes, channels, mean, std, num_frames = (), 3, (0.5,) * 3, (0.5,) * 3, 1

    def __init__(self, *, path: str = "nowhere/at/all", fps: float = 5.0, stride: int = 2, image_folder: str = "none"):
        self.path = path

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return Sample(torch.full((3, 1, 16, 16), index, dtype=torch.uint8))

    def describe(self, index):
        return str(index)

    def validation(self):
        return None
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {
        "own_mask.py": MASK,
        "own_data.py": DATASET,
        "conf/mask/low.yaml": "# for low grids\n_target_: own_mask.LowMasker\nratio: 0.5\n",
        "conf/dataset/noise.yaml": "# grey\n_target_: own_data.Noise\npath: nowhere/at/all\nfps: 5.0\nstride: 2\n"
        "image_folder: none\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def errors(own: Path, *overrides: str) -> list[str]:
    small = ("image_size=32", "encoder.patch_size=8", "batch_size=4")
    return Composer(own / "conf").check([*small, *overrides]).errors


def test_a_mask_is_refused_by_its_own_rule(own: Path) -> None:
    assert errors(own, "mask=low") == []
    (error,) = errors(own, "mask=low", "image_size=64")
    assert "a grid of 8 rows is too high for this mask" in error


def test_a_data_set_is_checked_by_its_own_rules_alone(own: Path) -> None:
    assert errors(own, "dataset=noise") == []


def test_the_rule_of_a_mask_of_the_package_is_read_without_torch() -> None:
    code = (
        "import sys; from jepa.config import Composer;"
        "errors = Composer().check(['mask=block', 'mask.ratio=0.999']).errors;"
        "assert any('ratio=0.999' in error for error in errors), errors;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
