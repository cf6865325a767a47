"""A world of a run folder: its contract is saved and compared, and what is damaged is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import make_world, train_world

from jepa.data.episode_store import EpisodeStore
from jepa.envs.two_rooms import TwoRooms
from jepa.errors import ConfigError, FileError
from jepa.planning import fit
from jepa.planning.fit import FORESIGHT, fit_heads, foresee, record
from jepa.planning.heads import GAMMA
from jepa.planning.world import load_world
from jepa.runs.checkpoint import CheckpointError, load_model, with_checksum
from jepa.types import ActionSpace

DISCRETE = ActionSpace(num_actions=3)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with outputs/world and outputs/episodes."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_world("world", ["steps=2", "objective.head_steps=3", "eval_every=2", "save_every=2"])
    return folder / "outputs"


@pytest.fixture
def run(outputs: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(outputs / "world", tmp_path / "world", symlinks=True))


def state_file(run: Path) -> Path:
    return max(run.glob("checkpoints/step_*/state.json"))


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(with_checksum(content) if path.name == "state.json" else content))


def test_the_contract_is_saved_and_loaded(run: Path) -> None:
    saved = json.loads(state_file(run).read_text())["world"]
    assert saved["predictor"]["history"] == 1
    world = load_world(run)
    contract = world.contract
    assert contract.frame_shape == (1, 64, 64)
    assert contract.actions == TwoRooms().actions
    assert (contract.block, contract.frame_skip) == (1, 1)
    assert contract.env["_target_"] == "jepa.envs.two_rooms.TwoRooms"
    assert contract.env["walls"] == "fixed"
    contract.check(TwoRooms())
    assert set(world.heads) == {"probe", "value", "policy", "clone"}
    assert set(load_world(run, heads=False).heads) == set()


def test_the_weights_are_those_of_the_checkpoint_and_frozen(run: Path) -> None:
    world = load_world(run)
    for name, tensor in load_model(state_file(run).parent, "predictor.").items():
        torch.testing.assert_close(world.predictor.state_dict()[name], tensor, rtol=0, atol=0)
    assert not world.training
    assert not any(parameter.requires_grad for parameter in world.parameters())


def test_frames_are_encoded_as_in_training(run: Path, outputs: Path) -> None:
    """Pixels are normalised by the mean and deviation of the episodes."""
    world = load_world(run)
    frames = EpisodeStore(outputs / "episodes").read(0)["frames"]
    facts = json.loads(state_file(run).read_text())
    mean, std = (torch.tensor(facts[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    pixels = (torch.from_numpy(frames.copy()) / 255 - mean) / std
    tokens = world.encoder(pixels)
    expected = world.predictor.project(tokens[:, None])[:, 0]
    torch.testing.assert_close(world.encode(frames), expected)


class Smaller(TwoRooms):
    def __init__(self) -> None:
        super().__init__(channels=3)
        self.actions = ActionSpace(low=(-1.0, -1.0), high=(1.0, 1.0))


def test_an_environment_of_another_contract_is_refused_with_both_values_of_each(run: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_world(run).contract.check(Smaller())
    shape, actions = refusal.value.errors
    assert "frame_shape" in shape
    assert "(1, 64, 64)" in shape
    assert "(3, 64, 64)" in shape
    assert "-4.0" in actions
    assert "-1.0" in actions


class Skipping(TwoRooms):
    def __init__(self) -> None:
        super().__init__()
        self.settings = {**self.settings, "frame_skip": 5}


def test_an_environment_that_skips_other_frames_is_refused_with_both_values(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"frame_skip: the world was trained with 1, the environment has 5"):
        load_world(run).contract.check(Skipping())


def test_a_run_without_a_world_is_refused(run: Path) -> None:
    change_json(state_file(run), lambda state: state.pop("world"))
    with pytest.raises(CheckpointError, match="holds no world model; train one with objective=dynamics"):
        load_world(run)


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no dictionary": lambda state: state.update(world=3),
    "a field is missing": lambda state: state["world"].pop("block"),
    "block 0": lambda state: state["world"].update(block=0),
    "text for numbers": lambda state: state["world"].update(low=["a", "b"]),
    "bounds of differing length": lambda state: state["world"].update(low=[-4.0]),
    "no actions at all": lambda state: state["world"].update(low=[], high=[]),
    "a shape of two": lambda state: state["world"].update(frame_shape=[64, 64]),
    "an unknown setting": lambda state: state["world"]["predictor"].update(wings=2),
    "a setting of another type": lambda state: state["world"]["predictor"].update(width="wide"),
    "history 0": lambda state: state["world"]["predictor"].update(history=0),
    "an unknown model": lambda state: state["world"]["predictor"].update(model="rnn"),
    "another width": lambda state: state["world"]["predictor"].update(width=64),
    "heads that do not divide the width": lambda state: state["world"]["predictor"].update(
        model="transformer", num_heads=5
    ),
    "as many numbers as no machine holds": lambda state: state["world"]["predictor"].update(width=10**12),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_contract_is_refused_by_name(kind: str, run: Path) -> None:
    change_json(state_file(run), DAMAGE[kind])
    with pytest.raises((CheckpointError, FileError), match=r"state\.json"):
        load_world(run)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


HEADS_DAMAGE: dict[str, Callable[[Path], Any]] = {
    "json cut off": lambda run: (run / "heads.json").write_text((run / "heads.json").read_text()[:20]),
    "json of other types": lambda run: (run / "heads.json").write_text('{"checkpoint": 3, "heads": []}'),
    "no weights": lambda run: (run / "heads.safetensors").unlink(),
    "weights cut off": lambda run: (run / "heads.safetensors").write_bytes(
        (run / "heads.safetensors").read_bytes()[:1000]
    ),
    "weights of nothing": lambda run: (run / "heads.safetensors").write_bytes(b""),
    "a flipped bit": lambda run: flip_last_bit(run / "heads.safetensors"),
    "an unknown head": lambda run: change_json(run / "heads.json", lambda facts: facts["heads"].update(wings=2)),
    "another size": lambda run: change_json(run / "heads.json", lambda facts: facts["heads"].update(probe=7)),
    "a size that is none": lambda run: change_json(run / "heads.json", lambda facts: facts["heads"].update(probe="x")),
    "a size of a list": lambda run: change_json(run / "heads.json", lambda facts: facts["heads"].update(probe=[2])),
    "a negative size": lambda run: change_json(run / "heads.json", lambda facts: facts["heads"].update(probe=-2)),
    "a head without weights": lambda run: change_json(
        run / "heads.json", lambda facts: facts["heads"].update(reward=1)
    ),
}


@pytest.mark.parametrize("kind", HEADS_DAMAGE)
def test_damaged_heads_are_refused_by_name(kind: str, run: Path) -> None:
    HEADS_DAMAGE[kind](run)
    with pytest.raises((CheckpointError, FileError), match=r"heads\.(json|safetensors)"):
        load_world(run)


def test_pickled_heads_run_no_code(run: Path) -> None:
    marker = run / "ran"
    program = f"cos\nsystem\n(S'touch {marker}'\ntR."
    (run / "heads.safetensors").write_bytes(program.encode())
    with pytest.raises((CheckpointError, FileError), match="heads"):
        load_world(run)
    assert not marker.exists()


def test_heads_of_another_checkpoint_are_not_used(run: Path) -> None:
    change_json(run / "heads.json", lambda facts: facts.update(checkpoint="step_00000001"))
    assert set(load_world(run).heads) == set()


def test_heads_that_are_there_are_not_fitted_again_and_missing_ones_are(run: Path, outputs: Path) -> None:
    store = EpisodeStore(outputs / "episodes")
    before = load_world(run).heads.state_dict()
    assert fit_heads(run, store, ["probe", "value"], num_steps=2) == {}
    assert fit_heads(run, store, ["value", "reward", "metric"], num_steps=2).keys() == {"reward", "metric"}
    after = load_world(run).heads.state_dict()
    assert set(load_world(run).heads) == {"probe", "value", "policy", "clone", "reward", "metric"}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_heads_keep_the_discount_that_they_were_fitted_with(run: Path, outputs: Path) -> None:
    store = EpisodeStore(outputs / "episodes")
    assert load_world(run).gamma == GAMMA
    fit_heads(run, store, ["reward"], num_steps=2, gamma=0.5)
    assert load_world(run).gamma == GAMMA
    fit_heads(run, store, ["return"], num_steps=2, gamma=0.5)
    assert load_world(run).gamma == 0.5
    change_json(run / "heads.json", lambda facts: facts.update(gamma="half"))
    with pytest.raises(CheckpointError, match="remove it, and the heads are fitted again"):
        load_world(run)


def test_heads_are_fitted_on_no_more_frames_than_they_are_given(
    run: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, seen = EpisodeStore(outputs / "episodes"), []
    monkeypatch.setattr(fit, "fit_head", lambda name, data, *_: (seen.append(len(data.states)), (None, 0.0))[1])
    monkeypatch.setattr(fit, "save_heads", lambda *_: None)
    lengths = np.cumsum(store.lengths + 1)
    for limit, expected in ((1, lengths[0]), (lengths[2], lengths[2]), (lengths[2] + 1, lengths[2])):
        fit_heads(run, store, ["reward"], num_steps=2, max_frames=int(limit))
        assert seen.pop() == expected


def test_dynamics_that_are_fitted_again_are_those_of_the_world_and_other_heads_follow(run: Path, outputs: Path) -> None:
    store, before = EpisodeStore(outputs / "episodes"), load_world(run)
    assert list(fit_heads(run, store, ["probe", "dynamics"], num_steps=2)) == ["dynamics", "probe"]
    after = load_world(run)
    assert set(after.heads) == {"dynamics", "probe"}
    kept, moved = (("encoder.", "predictor.projector."), ("predictor.actions.", "predictor.dynamics."))
    weights, others = after.state_dict(), before.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in others if name.startswith(kept))
    assert any(not torch.equal(weights[name], others[name]) for name in others if name.startswith(moved))
    assert fit_heads(run, store, ["probe", "dynamics"], num_steps=2) == {}


def test_heads_do_not_depend_on_which_were_fitted_before(run: Path, outputs: Path) -> None:
    store = EpisodeStore(outputs / "episodes")
    expected = load_world(run).heads.state_dict()
    for path in run.glob("heads.*"):
        path.unlink()
    for names in (["clone"], ["value"], ["policy", "value"], ["probe"]):
        fit_heads(run, store, names, num_steps=3, num_episodes=len(store) - round(0.1 * len(store)))
    found = load_world(run).heads.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("names", "expected"), [(["policy"], "policy needs value"), (["probe"], "reads the simulator's state")]
)
def test_what_heads_need_is_asked_for(
    names: list[str], expected: str, run: Path, outputs: Path, tmp_path: Path
) -> None:
    for path in run.glob("heads.*"):
        path.unlink()
    folder = Path(shutil.copytree(outputs / "episodes", tmp_path / "episodes"))
    change_json(folder / "store.json", lambda facts: facts.update(state_names=[]))
    for states in folder.glob("group-*/states.npy"):
        np.save(states, np.load(states)[:, :0])
    with pytest.raises(ConfigError, match=expected):
        fit_heads(run, EpisodeStore(folder), names, num_steps=2)


def test_recordings_pair_each_frame_with_the_action_after_it_and_the_reward_before(run: Path, outputs: Path) -> None:
    world, store = load_world(run), EpisodeStore(outputs / "episodes")
    data = record(world, store)
    first = 0
    for number in range(3):
        arrays = store.read(number)
        length = len(arrays["actions"])
        rows = slice(first, first + length + 1)
        assert data.ends[rows].tolist() == [first + length] * (length + 1)
        torch.testing.assert_close(data.states[rows], world.encode(arrays["frames"]).flatten(1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(data.actions[rows][:-1], arrays["actions"] / 4, atol=1e-6)
        assert data.actions[first + length].tolist() == [0, 0]
        np.testing.assert_array_equal(data.rewards[rows], [0, *arrays["rewards"]])
        np.testing.assert_array_equal(data.terminated[rows], [0, *arrays["terminated"]])
        np.testing.assert_array_equal(data.simulator[rows], arrays["states"])
        first += length + 1


@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("count", [2, 9, 11, 20])
@pytest.mark.parametrize("depth", [1, FORESIGHT])
def test_states_are_foreseen_from_some_steps_before(history: int, count: int, depth: int) -> None:
    world = make_world(history=history, side=16)
    states, actions = torch.randn(count, 1, 6), torch.randn(count - 1, 2)
    foreseen = foresee(world, states, actions, depth)
    torch.testing.assert_close(foreseen[:history], states[:history])
    for frame in range(history, count):
        steps = (frame - history) % depth + 1
        begin = frame - steps - history + 1
        known, acted = states[begin : begin + history], actions[begin:frame]
        torch.testing.assert_close(foreseen[frame], world.rollout(known[None], acted[None])[0, -1])


@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("space", [None, DISCRETE], ids=["continuous", "discrete"])
def test_shapes_of_states_and_the_count_of_predicted_rows(space: ActionSpace | None, history: int) -> None:
    world = make_world(space, history=history, side=16) if space else make_world(history=history, side=16)
    states = world.encode(np.zeros((2, history, 1, 16, 16), dtype=np.uint8))
    assert states.shape == (2, history, 1, 6)
    actions = torch.zeros(2, history + 3, *world.contract.actions.shape).long()
    assert world.step(states, actions[:, :history]).shape == (2, 1, 6)
    assert world.num_rows == 2
    assert world.rollout(states, actions).shape == (2, 4, 1, 6)
    assert world.num_rows == 2 + 2 * 4


def test_many_frames_are_encoded_as_one_by_one() -> None:
    world = make_world(side=16)
    frames = np.random.default_rng(0).integers(0, 255, (600, 1, 16, 16), dtype=np.uint8)
    one_by_one = torch.stack([world.encode(frame[None])[0] for frame in frames[::100]])
    torch.testing.assert_close(world.encode(frames)[::100], one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 3])
def test_plans_are_unscaled_to_the_bounds_and_back(block: int) -> None:
    space = ActionSpace(low=(-4.0, 0.0), high=(4.0, 10.0))
    world = make_world(space, block=block, side=16)
    plan = torch.rand(2, 5, 2 * block) * 2 - 1
    actions = world.unscale(plan)
    assert actions.shape == ((2, 5, 2) if block == 1 else (2, 5, block, 2))
    torch.testing.assert_close(world.predictor.actions.scale(actions).flatten(2), plan)
    corners = world.unscale(torch.ones(1, 1, 2 * block)).flatten()
    assert corners.tolist() == [4.0, 10.0] * block


@pytest.mark.parametrize("block", [1, 3])
def test_discrete_plans_are_whole_numbers_in_the_environment_too(block: int) -> None:
    world = make_world(DISCRETE, block=block, side=16)
    plan = torch.randint(3, (2, 5, block))
    actions = world.unscale(plan)
    assert torch.equal(actions, plan[..., 0] if block == 1 else plan)
