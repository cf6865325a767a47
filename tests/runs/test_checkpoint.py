"""Checkpoints are complete or absent, verified when read, and cannot run code."""

import errno
import json
import pickle
import shutil

import pytest
import torch
from torch import nn

from jepa.parallel.session import open_session
from jepa.runs import checkpoint
from jepa.runs.checkpoint import CheckpointError, SaveError, Writer
from jepa.runs.metrics import read_config

SHARD = "shard-00001-model-00001-of-00001.safetensors"


class Model(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 2), value))
        self.bias = nn.Parameter(torch.full((2,), value))
        self.register_buffer("count", torch.tensor(int(value)))


class Guard(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.register_buffer("losses", torch.full((4,), value))


def learn(model, optimizer):
    optimizer.zero_grad()
    (model.weight.square().sum() + model.bias.sum()).backward()
    optimizer.step()


def parts(value, *, steps=0, fused=False):
    model = Model(value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    for _ in range(steps):
        learn(model, optimizer)
    return model, optimizer, Guard(value)


def writer(folder, *, keep=100, asynchronous=False):
    return Writer(folder, open_session(device="cpu", precision="fp32"), keep=keep, asynchronous=asynchronous)


def write(folder, step, value=1.0, *, keep=100, asynchronous=False, links=("last",), steps=1):
    checkpoints = writer(folder, keep=keep, asynchronous=asynchronous)
    checkpoints.save(
        step=step,
        tensors=checkpoint.training_tensors(*parts(value, steps=steps)),
        config="seed: 3\n",
        state={"best": {"value": -1.5, "step": 0}},
        links=links,
    )
    checkpoints.finish()
    return checkpoint.checkpoint_folder(folder, step)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_run_has_the_saved_state(tmp_path, asynchronous, fused):
    write(tmp_path, 7, 2.5, asynchronous=asynchronous, steps=3)
    last = checkpoint.latest(tmp_path)
    assert checkpoint.read_state(last)["step"] == 7
    assert checkpoint.read_state(last)["best"] == {"value": -1.5, "step": 0}
    assert read_config(last) == {"seed": 3}
    saved, fresh = parts(2.5, steps=3, fused=fused), parts(9.0, fused=fused)
    checkpoint.restore(last, *fresh)
    for one, other in zip(saved, fresh, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-6)
    for model, optimizer, _ in (saved, fresh):
        learn(model, optimizer)
    assert torch.equal(saved[0].weight, fresh[0].weight)


def test_a_model_is_read_without_a_run(tmp_path):
    write(tmp_path, 7, 2.5, steps=0)
    assert checkpoint.load_model(checkpoint.find(tmp_path)).keys() == {"weight", "bias", "count"}
    assert torch.equal(checkpoint.load_model(checkpoint.find(tmp_path), "wei")["ght"], torch.full((3, 2), 2.5))


def test_another_model_is_refused_by_name(tmp_path):
    write(tmp_path, 7)
    other = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match="count"):
        checkpoint.restore(checkpoint.latest(tmp_path), other, torch.optim.SGD(other.parameters()), None)


def test_an_asynchronous_save_holds_what_was_there_at_the_call(tmp_path):
    model, optimizer, guard = parts(1.0, steps=1)
    checkpoints = writer(tmp_path, asynchronous=True)
    tensors = checkpoint.training_tensors(model, optimizer, guard)
    before = model.weight.detach().clone()
    checkpoints.save(step=1, tensors=tensors, config="", state={})
    with torch.no_grad():
        model.weight.fill_(77)
    checkpoints.finish()
    assert torch.equal(checkpoint.load_model(checkpoint.find(tmp_path))["weight"], before)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("stage", ["tensors", "seal"])
def test_a_save_that_fails_says_so_and_keeps_what_was_there(tmp_path, monkeypatch, stage, asynchronous):
    write(tmp_path, 1)

    def full(*_args, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    if stage == "seal":
        monkeypatch.setattr(checkpoint, "_digests", full)
    else:
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_files_from_queue", full)
    with pytest.raises(SaveError, match=r"step 2 .*No space left on device.*step_00000001"):
        write(tmp_path, 2, asynchronous=asynchronous)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").glob("*step_*")] == ["step_00000001"]
    assert checkpoint.read_state(checkpoint.latest(tmp_path))["step"] == 1


def test_a_folder_without_checkpoints_has_nothing_to_resume(tmp_path):
    assert checkpoint.latest(tmp_path) is None


def test_last_points_to_the_newest_and_pruning_keeps_what_is_linked(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step, keep=1, links=("last", "best") if step == 2 else ("last",))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "best",
        "last",
        "step_00000002",
        "step_00000005",
    ]
    assert checkpoint.find(tmp_path).name == "step_00000005"


def test_a_write_cut_off_in_the_middle_is_not_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    unfinished = tmp_path / "checkpoints" / ".writing-step_00000002"
    unfinished.mkdir()
    (unfinished / SHARD).write_bytes(b"half")
    assert checkpoint.latest(tmp_path).name == "step_00000001"
    write(tmp_path, 2)
    assert checkpoint.latest(tmp_path).name == "step_00000002"


@pytest.mark.parametrize("name", [SHARD, "config.yaml", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, name, damage):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    damaged = {"cut": data[: len(data) // 2], "flip": data}
    file.unlink() if damage == "gone" else file.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match="step_00000002"):
        checkpoint.read_state(checkpoint.latest(tmp_path))


def test_a_foreign_folder_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of jepa-train"):
        checkpoint.find(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.find(tmp_path / "nowhere")
    (tmp_path / "state.json").write_text(json.dumps({"epoch": 3}))
    with pytest.raises(CheckpointError, match="not written by"):
        checkpoint.read_state(checkpoint.find(tmp_path))


class Attack:
    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


def test_a_pickle_with_code_in_it_is_refused_unread(tmp_path, capsys):
    target = write(tmp_path, 1)
    (target / ".metadata").write_bytes(pickle.dumps(Attack()))
    assert checkpoint.load_model(target).keys() == {"weight", "bias", "count"}
    (target / SHARD).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_model(target)
    assert "ran" not in capsys.readouterr().out


def test_saving_twice_at_one_step_keeps_the_first(tmp_path):
    write(tmp_path, 3, 1.0, steps=0)
    write(tmp_path, 3, 2.0, steps=0)
    assert torch.equal(checkpoint.load_model(checkpoint.find(tmp_path))["weight"], torch.ones(3, 2))


def test_a_checkpoint_folder_can_be_moved_away_and_loaded(tmp_path):
    target = write(tmp_path, 3)
    moved = tmp_path / "elsewhere"
    shutil.move(target, moved)
    assert checkpoint.read_state(checkpoint.find(moved))["step"] == 3
