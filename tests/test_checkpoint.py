"""Checkpoints are whole or not there, checked when read, and cannot run code."""

import json
import pickle
import shutil

import pytest
import torch

from jepa import checkpoint
from jepa.checkpoint import CheckpointError


def write(folder, step, value=1.0):
    return checkpoint.save(
        folder,
        step=step,
        model={"weight": torch.full((3, 2), value)},
        optimizer={"optimizer": {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(4.0)}}}, "guard": {}},
        config="seed: 3\n",
        state={"best": {"value": -1.5, "step": 0}},
    )


def test_what_is_saved_is_what_is_loaded(tmp_path):
    write(tmp_path, 7, 2.5)
    found = checkpoint.latest(tmp_path)
    assert checkpoint.read_state(found)["step"] == 7
    assert checkpoint.read_state(found)["best"] == {"value": -1.5, "step": 0}
    assert checkpoint.read_config(found) == {"seed": 3}
    assert torch.equal(checkpoint.load_model(found)["weight"], torch.full((3, 2), 2.5))
    assert torch.equal(checkpoint.load_optimizer(found)["optimizer"]["state"][0]["exp_avg"], torch.ones(2))


def test_a_folder_without_checkpoints_has_nothing_to_resume(tmp_path):
    assert checkpoint.latest(tmp_path) is None


def test_last_points_to_the_newest_and_pruning_keeps_last_and_best(tmp_path):
    for step in range(1, 6):
        target = write(tmp_path, step)
        if step == 2:
            checkpoint.link(tmp_path, "best", target)
    checkpoint.prune(tmp_path, keep=1)
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
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path).name == "step_00000001"
    write(tmp_path, 2)
    assert checkpoint.latest(tmp_path).name == "step_00000002"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "config.yaml", "state.json"])
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
    torch.save({"optimizer": Attack()}, target / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        checkpoint.load_optimizer(target)
    (target / "optimizer.pt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        checkpoint.load_optimizer(target)
    assert "ran" not in capsys.readouterr().out


def test_saving_twice_at_one_step_keeps_the_first(tmp_path):
    write(tmp_path, 3, 1.0)
    write(tmp_path, 3, 2.0)
    assert torch.equal(checkpoint.load_model(checkpoint.find(tmp_path))["weight"], torch.ones(3, 2))


def test_a_checkpoint_folder_can_be_moved_away_and_loaded(tmp_path):
    target = write(tmp_path, 3)
    moved = tmp_path / "elsewhere"
    shutil.move(target, moved)
    assert checkpoint.read_state(checkpoint.find(moved))["step"] == 3
