"""A world model trains on two ranks, and in micro-batches, as in one process: real processes over gloo."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing
from ports import free_ports
from tiny_world import TINY

from jepa import JEPAAgent, JEPAConfig

pytestmark = pytest.mark.slow

STEPS = ["steps=12", "eval_every=12", "save_every=12", "log_every=1", "batch_size=12"]
WORLD = [*TINY, "objective.heads=[]"]
VARIANTS = {
    "average": [*WORLD, "objective.target=ema", "predictor.normalize=true", "regularizer=sigreg"],
    "tokens": [*WORLD, "predictor.state=tokens", "predictor.model=transformer", "predictor.history=2"],
    "iris": [
        *(override for override in TINY if not override.startswith(("predictor.", "objective."))),
        *("objective=iris", "dataset.pad=true", "regularizer=none", "objective.num_codes=16", "objective.merge=2"),
        *("objective.dynamics_width=16", "objective.dynamics_depth=1", "objective.decoder_depth=1"),
    ],
}


def train(folder: Path, episodes: Path, name: str, how: list[str]) -> None:
    config = JEPAConfig(*VARIANTS[name], *STEPS, f"dataset.path={episodes}", "device=cpu", *how)
    JEPAAgent(config, folder=folder).train()


def be_a_rank(rank: int, folder: Path, ports: list[int]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1")
    for port, name in zip(ports, VARIANTS, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        train(folder / f"two {name}", folder / "episodes", name, ["strategy=ddp"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dynamics")
    for name in VARIANTS:
        train(folder / name, folder / "episodes", name, [])
    multiprocessing.start_processes(be_a_rank, args=(folder, free_ports(len(VARIANTS))), nprocs=2, start_method="fork")  # pyright: ignore[reportPrivateImportUsage]
    return folder


def rows(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if "train/loss" in row]


def assert_same_numbers(one: Path, other: Path) -> None:
    expected, found = rows(one), rows(other)
    assert len(expected) == len(found) == 12
    assert expected[-1]["train/loss"] != expected[0]["train/loss"]
    for before, after in zip(expected, found, strict=True):
        assert before.keys() == after.keys()
        for name in (n for n in before if not n.startswith("perf/")):
            assert after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-4), (name, before["step"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_train_as_one_process_does(name: str, runs: Path) -> None:
    assert_same_numbers(runs / name, runs / f"two {name}")


@pytest.mark.parametrize("name", VARIANTS)
def test_micro_batches_train_as_the_whole_batch_does(name: str, runs: Path, tmp_path: Path) -> None:
    train(tmp_path, runs / "episodes", name, ["micro_batch_size=4"])
    assert_same_numbers(runs / name, tmp_path)
