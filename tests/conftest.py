"""Settings of all tests: quiet, offline, one thread per process; GPU tests are skipped where there is no GPU.

`make test` runs everything. `make quick` runs what is not marked `slow`: less than two minutes, for every day. Mark
`slow` whatever starts a process or trains for more than a step or two; keep one quick test for each folder of src/jepa.
A command that needs a process of its own runs in a fork (helpers/forked.py), unless its start is what is tested.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Iterator

import pytest

gc.disable()  # until all test files are imported, which takes a fifth less so

# Set before torch is imported and inherited by every command that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background with it ignored


LONGEST_FILES = (
    *("test_slurm", "test_faults", "test_readme", "test_matrix", "test_compare", "test_signals", "test_sweeps"),
    *("test_plan", "test_runs", "test_ranks", "test_dynamics_on_ranks", "test_heads", "test_callers", "test_phases"),
    *("test_export", "test_machine", "test_damaged_files", "test_point_maze", "test_plan_encoders", "test_find"),
)
"""The longest files, longest first: they start first, so that no worker is left alone with one of them at the end."""


def pytest_collection_finish() -> None:
    gc.freeze()  # collections need not look at what all these imports made
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    position = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: position.get(item.path.stem, len(position)))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _no_handlers_are_left() -> Iterator[None]:
    """Remove the handlers of signals and logs of commands that ran in this process: pytest closes their stream."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for handler in [handler for handler in logging.root.handlers if type(handler) is logging.StreamHandler]:
        logging.root.removeHandler(handler)
    logging.root.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Overrides with which any training on images takes seconds."""
    return [
        "steps=2",
        "batch_size=4",
        "image_size=32",
        "encoder.patch_size=8",
        "encoder.embed_dim=32",
        "encoder.depth=1",
        "encoder.num_heads=2",
        "predictor.width=16",
        "predictor.depth=1",
        "evaluation.train_samples=32",
        "evaluation.val_samples=16",
        "num_workers=0",
        "log_every=1",
    ]
