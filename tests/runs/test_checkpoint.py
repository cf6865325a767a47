"""Checkpoints are complete or absent, verified when read, and cannot run code."""

import errno
import json
import os
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


BEST = {"value": -1.5, "step": 0}


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


def write(folder, step, value=1.0, *, keep=100, asynchronous=False, links=("last",), steps=1, best=BEST):
    checkpoints = writer(folder, keep=keep, asynchronous=asynchronous)
    checkpoints.save(
        step=step,
        tensors=checkpoint.training_tensors(*parts(value, steps=steps)),
        config="seed: 3\n",
        state={"best": best, "failed": False},
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
        monkeypatch.setattr(checkpoint, "digests_of", full)
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


def copied(folder, how):
    """A copy of a run folder as some programs make it."""
    copy = folder.with_name(f"copy-{how}")
    if how == "links become folders":
        shutil.copytree(folder, copy)
        return copy
    shutil.copytree(folder, copy, symlinks=True)
    for link in [path for path in (copy / "checkpoints").iterdir() if path.is_symlink()]:
        name = link.readlink()
        link.unlink()
        if how == "links become files":  # as zip and git on Windows do
            link.write_text(str(name))
    return copy


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    write(folder, 2, 2.0, links=("last", "best"))
    write(folder, 10, 3.0)
    write(folder, 30, 4.0, links=("failed",))
    return folder


@pytest.mark.parametrize("name", ["last", "best", "failed", "mine"])
def test_links_that_lead_round_in_a_circle_are_passed_over_and_replaced(run, name):
    link = run / "checkpoints" / name
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    assert checkpoint.find(run).name in ("step_00000010", "step_00000030")
    write(run, 40, keep=1, links=("last", "best"))
    assert checkpoint.find(run).name == "step_00000040"


def test_a_run_folder_that_is_a_circular_link_is_no_run(tmp_path):
    (tmp_path / "run").symlink_to("run")
    with pytest.raises(CheckpointError, match="run "):
        checkpoint.find(tmp_path / "run")


COPIES = ["links become folders", "links become files", "links are lost"]


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_resumes_from_the_newest_checkpoint_and_keeps_all_others(run, how):
    state = checkpoint.quiet_state(checkpoint.checkpoint_folder(run, 30))
    path = checkpoint.checkpoint_folder(run, 30) / "state.json"
    path.write_text(json.dumps(checkpoint.with_checksum(state | {"failed": True})))
    copy = copied(run, how)
    assert checkpoint.read_state(checkpoint.latest(copy))["step"] == 10
    assert checkpoint.find(copy).name == "step_00000010"
    assert checkpoint.find(copy / "checkpoints" / "last").name == "step_00000010"
    write(copy, 12, keep=1)
    assert checkpoint.latest(copy).name == "step_00000012"
    kept = {path.name for path in (copy / "checkpoints").glob("step_*")}
    assert {"step_00000012", "step_00000030"} <= kept
    assert ("step_00000002" in kept) == (how != "links are lost")


def test_a_copied_folder_is_put_back_where_its_original_is_lost_or_differs(run):
    copy = copied(run, "links become folders")
    shutil.rmtree(checkpoint.checkpoint_folder(copy, 10))
    (checkpoint.checkpoint_folder(copy, 2) / SHARD).write_bytes(b"other")
    write(copy, 40, links=("last", "best"))
    assert checkpoint.read_state(checkpoint.checkpoint_folder(copy, 10))["step"] == 10
    assert checkpoint.read_state(copy / "checkpoints" / "copied-best-1")["step"] == 2
    assert (copy / "checkpoints" / "best").resolve().name == "step_00000040"


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.EACCES])
def test_a_file_system_without_links_holds_files_with_the_names(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "symlink", refuse)
    for step in range(1, 6):
        write(tmp_path, step, keep=1, links=("last", "best") if step == 2 else ("last",))
    assert (tmp_path / "checkpoints" / "last").read_text() == "step_00000005"
    assert checkpoint.latest(tmp_path).name == "step_00000005"
    assert checkpoint.find(tmp_path / "checkpoints" / "best").name == "step_00000002"
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == ["step_00000002", "step_00000005"]
    monkeypatch.undo()
    write(tmp_path, 6, keep=1)
    assert (tmp_path / "checkpoints" / "last").is_symlink()


def test_a_full_disk_is_not_taken_for_one_without_links(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "symlink", full)
    with pytest.raises(SaveError, match="No space left"):
        write(tmp_path, 1)


def test_the_best_checkpoint_is_known_without_its_link(run):
    for step in (2, 10):
        path = checkpoint.checkpoint_folder(run, step) / "state.json"
        state = json.loads(path.read_text()) | {"best": {"metric": "a/b", "value": 1.0, "step": 2}}
        path.write_text(json.dumps(checkpoint.with_checksum(state)))
    (run / "checkpoints" / "best").unlink()
    assert checkpoint.find(run / "checkpoints" / "best").name == "step_00000002"
    write(run, 11, keep=1, best={"metric": "a/b", "value": 1.0, "step": 2})
    assert checkpoint.find(run / "checkpoints" / "best").name == "step_00000002"


def test_later_and_incomplete_checkpoints_are_never_pruned(run):
    incomplete = run / "checkpoints" / "step_00000005"
    incomplete.mkdir()
    write(run, 7, keep=1)
    names = {path.name for path in (run / "checkpoints").glob("step_*")}
    assert {"step_00000005", "step_00000007", "step_00000010", "step_00000030"} <= names


def test_a_flipped_bit_in_any_byte_of_the_state_is_noticed_or_without_meaning(tmp_path):
    path = write(tmp_path, 2) / "state.json"
    data = path.read_bytes()
    state = json.loads(data)
    for position in range(len(data)):
        flipped = data[position] ^ 1 << position % 8
        path.write_bytes(data[:position] + bytes([flipped]) + data[position + 1 :])
        try:
            assert checkpoint.peek(path.parent) == state
        except CheckpointError:
            continue


def test_a_state_of_an_earlier_version_has_no_checksum(tmp_path):
    path = write(tmp_path, 2) / "state.json"
    state = json.loads(path.read_text())
    del state["checksum"]
    path.write_text(json.dumps(state))
    assert checkpoint.read_state(path.parent)["step"] == 2


@pytest.mark.parametrize("name", [SHARD, "config.yaml", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_names_the_older_whole_one_which_previous_takes(tmp_path, name, damage):
    for step in (1, 2, 9, 10):
        write(tmp_path, step)
    for step in (9, 10):
        file = checkpoint.checkpoint_folder(tmp_path, step) / name
        file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"step_00000010 is damaged.*step_00000002 is whole.*resume=previous"):
        checkpoint.read_state(checkpoint.latest(tmp_path))
    assert checkpoint.latest_whole(tmp_path).name == "step_00000002"
    assert checkpoint.latest(tmp_path).name == "step_00000002"
    assert checkpoint.latest_whole(tmp_path).name == "step_00000002"
    assert {p.name for p in (tmp_path / "checkpoints").glob("damaged-*")} == {
        "damaged-step_00000009",
        "damaged-step_00000010",
    }


def test_previous_does_not_pass_over_a_whole_checkpoint_and_finds_none_where_all_are_damaged(tmp_path):
    write(tmp_path, 1)
    assert checkpoint.latest_whole(tmp_path).name == "step_00000001"
    (checkpoint.checkpoint_folder(tmp_path, 1) / SHARD).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no other checkpoint"):
        checkpoint.latest_whole(tmp_path)
    assert checkpoint.latest(tmp_path).name == "step_00000001"


@pytest.mark.parametrize("data", [{"num_samples": 3}, {"num_samples": "x", "classes": [], "digest": ""}, [1]])
def test_a_wrong_description_of_the_data_is_refused_by_name(run, data):
    path = checkpoint.checkpoint_folder(run, 10) / "state.json"
    path.write_text(json.dumps(checkpoint.with_checksum(json.loads(path.read_text()) | {"data": data})))
    with pytest.raises(CheckpointError, match="data"):
        checkpoint.peek(path.parent)
