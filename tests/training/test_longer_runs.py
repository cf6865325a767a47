"""A finished run is trained longer: the schedules are those of the new length, and a killed extension ends the same."""

import os
import shutil
import signal

import forked
import pytest
import torch
from tiny_agent import agent

from jepa.config import ConfigError
from jepa.runs.checkpoint import find, load_model
from jepa.runs.metrics import read_ending, read_rows
from jepa.training.run import Run

pytestmark = pytest.mark.slow
EVERY = ("save_every=4", "eval_every=6", "log_every=1", "evaluator=knn")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    agent(folder, "steps=6", *EVERY).train()
    return folder


def copy_of(finished, folder):
    shutil.copytree(finished, folder, symlinks=True)
    return folder


def killed(folder, after, *overrides):
    """The agent, in a process that is killed in the step after these."""

    def train() -> int:
        def on_batch(run, raw):
            if run.steps_begun == after:
                os.kill(os.getpid(), signal.SIGKILL)
            run.steps_begun += 1

        Run.on_batch = on_batch
        agent(folder, *overrides).train()
        return 0

    assert forked.status(train, folder.parent, folder.parent / "output") == -signal.SIGKILL


def assert_same(one, other):
    first, second = load_model(find(one)), load_model(find(other))
    assert all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.mark.parametrize("length", [["steps=12"], ["steps=null", "epochs=2"], ["steps=12", "resume=previous"]])
def test_a_larger_length_continues_with_its_own_schedule_and_says_so(finished, tmp_path, caplog, length):
    caplog.set_level("INFO")
    agent(tmp_path / "long", *length, *EVERY).train()
    assert not [record for record in caplog.messages if "from now on" in record]
    agent(copy_of(finished, tmp_path / "run"), *length, *EVERY).train()
    (message,) = (record for record in caplog.messages if "from now on" in record)
    rows, long = read_rows(tmp_path / "run"), read_rows(tmp_path / "long")
    before, now, end = (row["train/lr"] for row in rows if row["step"] in (6, 7, 12))
    assert f"lr {before:.2g} -> {now:.2g} at step 6 -> {end:.2g} at the end" in message
    assert "the numbers differ from those of a run that had this length from the start" in message
    assert read_ending(tmp_path / "run")["status"] == "finished"
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["step"] for row in rows if "probe/knn_top1" in row] == [0, 6, 12]
    assert [row["train/lr"] for row in rows[7:]] == [row["train/lr"] for row in long[7:]]
    assert rows[5]["train/lr"] != long[5]["train/lr"]


@pytest.mark.parametrize("after", [7, 11], ids=["before it has saved", "after it has saved"])
def test_an_extension_that_is_killed_ends_with_the_weights_of_one_that_is_not(finished, tmp_path, after):
    whole, parted = (copy_of(finished, tmp_path / name) for name in ("whole", "parted"))
    agent(whole, "steps=14", *EVERY).train()
    killed(parted, after, "steps=14", *EVERY)
    agent(parted, "steps=14", *EVERY).train()
    assert_same(whole, parted)
    assert [row["step"] for row in read_rows(parted)] == [row["step"] for row in read_rows(whole)]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["steps=12", "lr=1e-3"], r"another configuration \(lr: 0.0001 -> 0.001\)"),
        (["steps=12", "schedule=constant", "schedule.final_ratio=1.0"], r"another configuration \(schedule\._target_"),
        (["steps=12", "resume=false"], "resume=false"),
        (["steps=4"], "has trained 6 steps already, and the run is to end after 4"),
    ],
)
def test_anything_else_that_differs_is_named_and_nothing_is_written(finished, tmp_path, overrides, reason):
    folder = copy_of(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ConfigError, match=reason):
        agent(folder, *EVERY, *overrides).train()
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after
