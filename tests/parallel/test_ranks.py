"""One process, two ranks with DDP, two with FSDP2 and any accumulation train the same: real processes over gloo."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing
from ports import free_ports

from jepa import JEPAAgent, JEPAConfig

pytestmark = pytest.mark.slow

TINY = [
    *("encoder.patch_size=8", "encoder.embed_dim=32", "encoder.depth=2", "encoder.num_heads=2", "image_size=32"),
    *("dataset.num_samples=96", "batch_size=12", "num_workers=0", "logger=none", "evaluator=[]", "log_every=1"),
    *("steps=8", "eval_every=8", "save_every=8", "evaluation.train_samples=8", "evaluation.val_samples=8"),
    *("device=cpu", "precision=fp32", "schedule.warmup_ratio=0.1", "lr=1e-3", "save_minutes=1e-6"),
]
PREDICTED = ["predictor.width=16", "predictor.depth=1", "mask.ratio=0.5"]
VIDEO = ["encoder=temporal", "dataset=moving_digits", "num_frames=4", "predictor.width=16", "predictor.depth=1"]
VIEWS = ["mask=none", "predictor=projector", "predictor.hidden_dim=16", "predictor.output_dim=8", "augment.views=2"]
RUNS = {
    "masks": PREDICTED,
    "regularizers": [*PREDICTED, "regularizer=[vicreg,sigreg,cross_view]", "augment.views=2", "spike_guard=6"],
    "mask-sets": [*VIDEO, "mask=multiblock3d", "regularizer=[temporal_similarity]"],
    "views": [
        *VIEWS,
        "regularizer=[sigreg,cross_view]",
        "regularizer.cross_view.of=predicted",
        "objective.target=none",
    ],
    "idle predictor": [*VIEWS, "regularizer=sigreg", "objective.target=none"],
    "dictionary": [
        *(*VIEWS, "regularizer=vicreg", "regularizer.vicreg.of=predicted", "objective.target=none"),
        *("encoder.stem=dictionary", "encoder.stem_width=16", "encoder.stem_frozen=0.5"),
    ],
    "muon": [*PREDICTED, "optimizer=muon"],
    "mae": ["objective=mae", "mask.ratio=0.5"],
    "labels": ["objective=classify", "objective.momentum=0.9"],
}
"""what is trained, by name"""
PIECES = ["micro_batch_size=4"]
KEPT = ["encoder.checkpoint_activations=true"]
WAYS = {
    "ddp": ["strategy=ddp"],
    "ddp in pieces": ["strategy=ddp", *PIECES, *KEPT],
    "fsdp": ["strategy=fsdp"],
    "fsdp in pieces": ["strategy=fsdp", *PIECES, *KEPT],
}
"""how two ranks train it"""
CASES = [
    *[("masks", way) for way in ("ddp", "fsdp")],
    *[("regularizers", way) for way in ("ddp", "ddp in pieces", "fsdp in pieces")],
    *[("mask-sets", "fsdp in pieces"), ("views", "ddp"), ("idle predictor", "ddp"), ("mae", "ddp in pieces")],
    *[("labels", "fsdp in pieces"), ("dictionary", "ddp"), ("dictionary", "fsdp"), ("muon", "ddp"), ("muon", "fsdp")],
]


def train(folder: Path, name: str, how: list[str]) -> None:
    JEPAAgent(JEPAConfig(*TINY, *RUNS[name], *how), folder=folder).train()


def be_a_rank(rank: int, folder: Path, ports: list[int]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1")
    for port, (name, way) in zip(ports, CASES, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        train(folder / f"{name} {way}", name, WAYS[way])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all runs."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(be_a_rank, args=(folder, free_ports(len(CASES))), nprocs=2, start_method="fork")  # pyright: ignore[reportPrivateImportUsage]
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for name in RUNS:
        train(folder / name, name, [])
    return folder


def rows(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if "train/loss" in row]


def assert_same_numbers(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    expected, found = rows(one), rows(other)
    assert len(expected) == len(found) == 8
    assert expected[-1]["train/loss"] != expected[0]["train/loss"]
    for before, after in zip(expected, found, strict=True):
        assert before.keys() == after.keys()
        for name in (n for n in before if not n.startswith("perf/")):
            assert after[name] == pytest.approx(before[name], rel=tolerance, abs=tolerance), (name, before["step"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "way"), CASES)
def test_two_ranks_train_as_one_process_does(name: str, way: str, one_process: Path, two_ranks: Path) -> None:
    assert len(list((two_ranks / f"{name} {way}" / "checkpoints").glob("step_*"))) > 1, "rank 0's clock saves on both"
    # Muon orthogonalises matrices in bfloat16; small responses have steep square roots
    tolerance = {"muon": 1e-3, "dictionary": 1e-4}.get(name, 1e-5)
    assert_same_numbers(one_process / name, two_ranks / f"{name} {way}", tolerance)


@pytest.mark.parametrize("name", ["masks", "regularizers", "mask-sets"])
def test_pieces_train_as_the_whole_batch_does(name: str, one_process: Path, tmp_path: Path) -> None:
    train(tmp_path, name, ["micro_batch_size=3", *KEPT])
    assert_same_numbers(one_process / name, tmp_path)
