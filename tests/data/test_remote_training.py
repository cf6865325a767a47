"""Runs on shards by URL: the losses are those of the same files, with two ranks, and after a kill."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing
from forked import start
from ports import free_ports
from shard_server import ShardServer, serving
from tar_shards import write_shards

from jepa import JEPAAgent, JEPAConfig
from jepa.cli.train import main
from jepa.data import remote
from jepa.runs.metrics import read_rows

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.slow
STEPS = 8


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.02)
    write_shards(write_shards(tmp_path / "web", (30, 30, 30, 30)), (16,), "val")
    with serving(tmp_path / "web") as running:
        yield running


def arguments(tiny: list[str], place: str) -> list[str]:
    shards = [f'dataset.shards="{place}/train-{{000..003}}.tar"', f"dataset.val_shards={place}/val-000.tar"]
    how = ["precision=fp32", "device=cpu", "logger=none", "log_every=1", "save_every=2", "eval_every=8"]
    return [*tiny, f"steps={STEPS}", "dataset=webdataset", "dataset.shuffle_shards=2", *shards, *how]


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_rows(folder) if "train/loss" in row]


def be_a_rank(rank: int, port: int, settings: list[str], folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    JEPAAgent(JEPAConfig(*settings, "strategy=ddp", "num_workers=1"), folder=folder).train()


def test_local_and_remote_shards_and_a_run_that_was_killed_train_the_same(server, tmp_path, tiny):
    local = [*arguments(tiny, str(tmp_path / "web")), "num_workers=0"]
    JEPAAgent(JEPAConfig(*local), folder=tmp_path / "local").train()
    expected = losses(tmp_path / "local")
    assert len(expected) == STEPS

    by_url = [*arguments(tiny, server.url), "num_workers=2"]
    server.delay = 0.05
    folder = tmp_path / "outputs" / "killed"
    process = start(lambda: main([*by_url, "name=killed"]), tmp_path, tmp_path / "log")
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last").exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    server.delay = 0
    JEPAAgent(JEPAConfig(*by_url), folder=folder).train()
    assert losses(folder) == expected

    ranks = (free_ports(1)[0], by_url[:-1], tmp_path / "ranks")
    multiprocessing.start_processes(be_a_rank, args=ranks, nprocs=2, start_method="fork")  # pyright: ignore[reportPrivateImportUsage]
    assert losses(tmp_path / "ranks") == pytest.approx(expected, rel=1e-4)


def test_a_server_that_dies_ends_a_run_with_one_line(server, tmp_path, tiny):
    by_url = [*arguments(tiny, server.url), "num_workers=1", "dataset.cache_size=0.000001", "evaluator=[]"]
    process = start(lambda: main([*by_url, "steps=4000", "name=dies"]), tmp_path, tmp_path / "log")
    metrics = tmp_path / "outputs" / "dies" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    server.stop()
    process.join(120)
    assert process.exitcode == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert server.url in last or server.url in (tmp_path / "log").read_text().splitlines()[-2]
    assert "also at attempt 6; see that the server runs" in (tmp_path / "log").read_text()
