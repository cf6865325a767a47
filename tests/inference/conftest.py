"""A short run for the commands and the Python interface that use runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from used_run import train_runs, write_two_classes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_two_classes(folder / "pictures")
    train_runs(folder, tuned=False)
    return folder
