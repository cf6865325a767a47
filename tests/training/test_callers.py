"""Training from places other than the command line: threads, notebooks, several runs in one process."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_agent import TINY, agent

from jepa import load_encoder
from jepa.parallel.signals import SIGNALS
from jepa.runs.checkpoint import find, load_model
from jepa.runs.metrics import read_rows

pytestmark = pytest.mark.slow
SHORT = ("steps=4", "eval_every=4", "evaluator=knn")


def weights(folder):
    return load_model(find(folder))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Weights of a run in the main thread."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    agent(folder, *SHORT).train()
    return weights(folder)


def assert_same(folder, reference):
    state = weights(folder)
    assert all(torch.equal(state[name], value) for name, value in reference.items())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_thread_trains_as_the_main_thread_does(tmp_path, reference, workers):
    with ThreadPoolExecutor(1) as pool:
        metrics = pool.submit(agent(tmp_path / "run", *SHORT, f"num_workers={workers}").train).result()
    assert "probe/knn_top1" in metrics
    assert_same(tmp_path / "run", reference)


def test_a_running_event_loop_as_in_a_notebook_does_no_harm(tmp_path, reference):
    async def cell():
        return agent(tmp_path / "run", *SHORT).train()

    assert "probe/knn_top1" in asyncio.run(cell())
    assert_same(tmp_path / "run", reference)


def test_a_cell_without_a_file_trains_with_workers(tmp_path):
    keys = [*TINY, *SHORT, "num_workers=1"]
    cell = f"from jepa import JEPAAgent, JEPAConfig\nJEPAAgent(JEPAConfig(*{keys!r}), folder='run').train()"
    script = f"import asyncio\nasync def main():\n    exec({cell!r}, {{'__name__': '__main__'}})\nasyncio.run(main())"
    process = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert load_encoder(tmp_path / "run").embed_dim == 32


def test_two_runs_in_one_process_do_not_influence_each_other(tmp_path, reference):
    agent(tmp_path / "first", "steps=2", "seed=7", "encoder.embed_dim=24").train()
    agent(tmp_path / "second", *SHORT).train()
    assert_same(tmp_path / "second", reference)


def test_a_run_that_was_interrupted_goes_on_in_the_same_process(tmp_path, reference):
    before = [signal.getsignal(signum) for signum in SIGNALS]
    keys = (*SHORT, "num_workers=0")

    def send_when_trained():
        while not any((tmp_path / "run").glob("metrics.jsonl")) or not read_rows(tmp_path / "run"):
            stop.wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    stop = threading.Event()
    sender = threading.Thread(target=send_when_trained)
    sender.start()
    agent(tmp_path / "run", *keys).train()
    sender.join()
    assert [signal.getsignal(signum) for signum in SIGNALS] == before
    agent(tmp_path / "run", *keys).train()
    assert_same(tmp_path / "run", reference)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, torch.OutOfMemoryError])
def test_a_run_that_failed_on_the_way_goes_on_in_the_same_process(tmp_path, reference, monkeypatch, error):
    def fail(*_):
        raise error("on the way")

    before = [signal.getsignal(signum) for signum in SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr("jepa.training.run.Run.on_batch", fail)
        with pytest.raises((error, RuntimeError)):
            agent(tmp_path / "run", *SHORT, "num_workers=1").train()
    assert [signal.getsignal(signum) for signum in SIGNALS] == before
    agent(tmp_path / "run", *SHORT, "num_workers=1").train()
    assert_same(tmp_path / "run", reference)
