"""What holds for every test: quiet, offline, one thread per process, and GPU tests skipped by name without a GPU."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

import pytest

gc.disable()  # until all test files are imported, which takes a fifth less so

# Set before torch is imported and inherited by every command that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


DEAR = ("test_faults", "test_readme", "test_runs", "test_slurm", "test_ranks", "test_sweeps", "test_compare")
"""Files that start many processes: they come first, lest a worker is left alone with one of them at the end."""


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(DEAR)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _no_handlers_are_left() -> Iterator[None]:
    """A command that ran in this process logs to what was its standard error, which is closed after the test."""
    yield
    for handler in [handler for handler in logging.root.handlers if type(handler) is logging.StreamHandler]:
        logging.root.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Overrides that make any training of images a matter of seconds."""
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
