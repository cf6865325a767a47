"""Heads on frozen states: values that count steps, goals that stay in their episode, policies that go the right way."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from jepa.planning import heads
from jepa.planning.heads import (
    GAMMA,
    READ_DREAMS,
    STATES_IN,
    MLPHead,
    Recordings,
    build_head,
    expectile_loss,
    fit_head,
    later,
    mixed_goals,
    windows_of,
)
from jepa.reports.statistics import spearman
from jepa.types import ActionSpace

SIDE = 5
MOVES = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])
DISCRETE = ActionSpace(num_actions=4)
PLANE = ActionSpace(low=(-1.0, -1.0), high=(1.0, 1.0))
LENGTHS = (3, 7, 1, 5)


@pytest.fixture(autouse=True, scope="module")
def _small_heads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "WIDTH", 64)
        patch.setattr(heads, "BATCH_SIZE", 128)
        yield


def record(
    episodes: list[Tensor], actions: list[Tensor], space: ActionSpace, rewards: Tensor | None = None
) -> Recordings:
    """Episodes of positions [T + 1, 2] and the codes of the actions between them [T, A]"""
    ends, total = [], 0
    for positions in episodes:
        total += len(positions)
        ends += [total - 1] * len(positions)
    states = torch.cat(episodes).float()
    codes = torch.cat([torch.cat([taken, torch.zeros(1, taken.shape[1])]) for taken in actions])
    zeros = torch.zeros(len(states))
    return Recordings(
        states, torch.tensor(ends), codes, zeros if rewards is None else rewards, zeros, states[:, :1] * 3 + 1,
        torch.zeros(0, 0), space,
    )  # fmt: skip


@cache
def walks(*, discrete: bool = True, count: int = 300, steps: int = 12) -> Recordings:
    """Random walks on a grid; each keeps its direction half of the time."""
    random = torch.Generator().manual_seed(0)
    episodes, actions = [], []
    for _ in range(count):
        position, choice = torch.randint(SIDE, (2,), generator=random), 0
        positions, taken = [position], []
        for _ in range(steps):
            if torch.rand(1, generator=random) < 0.5:
                choice = int(torch.randint(4, (1,), generator=random))
            taken.append(torch.eye(4)[choice] if discrete else MOVES[choice].float())
            positions.append((positions[-1] + MOVES[choice]).clamp(0, SIDE - 1))
        episodes.append(torch.stack(positions))
        actions.append(torch.stack(taken))
    return record(episodes, actions, DISCRETE if discrete else PLANE)


def cells() -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of different cells, and the number of steps between them."""
    cells = list(product(range(SIDE), repeat=2))
    pairs = torch.tensor([[*a, *b] for a in cells for b in cells if a != b]).float()
    return pairs[:, :2], pairs[:, 2:], (pairs[:, :2] - pairs[:, 2:]).abs().sum(dim=1)


@cache
def value_of_the_grid() -> MLPHead:
    return fit_head("value", walks(), {}, 1500, 0)[0]


def test_the_value_of_a_grid_counts_the_steps_of_the_shortest_way() -> None:
    states, goals, steps = cells()
    values = value_of_the_grid()(states, goals)[:, 0]
    assert spearman(-values.numpy(), steps.numpy()) > 0.95
    expected = -(1 - GAMMA**steps) / (1 - GAMMA)
    assert (values - expected).abs().mean() < 1


def test_the_value_reads_imagined_states_as_it_reads_encoded_ones() -> None:
    """Imagined states drift along a third number, which encoded states hardly have."""
    data, random = walks(), torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(len(data.states), 1, generator=random)
    known = torch.cat([data.states, noise], dim=1)
    drifted = known + torch.tensor([0.0, 0.0, 1.0])
    value = fit_head("value", data._replace(states=known, imagined=drifted), {}, 1000, 0)[0]
    own = torch.cat([torch.tensor(list(product(range(SIDE), repeat=2))).float(), torch.zeros(SIDE**2, 1)], dim=1)
    assert value(own + torch.tensor([0.0, 0.0, 1.0]), own).abs().mean() < 0.5


def test_rewards_and_ends_are_read_from_states_one_step_ahead_and_not_from_encoded_or_imagined_ones() -> None:
    data = walks()
    given = (torch.rand(len(data.states), generator=torch.Generator().manual_seed(0)) < 0.5).float()
    data = data._replace(states=torch.randn(len(given), 2, generator=torch.Generator().manual_seed(1)))
    shown = torch.stack([given, torch.zeros_like(given)], dim=1)
    data = data._replace(rewards=given, terminated=given, predicted=shown, imagined=1 - shown)
    reward, goes_on = (fit_head(name, data, {}, 200, 0)[0](shown)[:, 0] for name in ("reward", "continuation"))
    assert (reward - given).abs().mean() < 0.1
    assert ((goes_on < 0) == given.bool()).all()


def test_the_value_of_the_goal_itself_is_the_highest() -> None:
    own = torch.tensor(list(product(range(SIDE), repeat=2))).float()
    states, goals, _ = cells()
    assert value_of_the_grid()(own, own).min() > value_of_the_grid()(states, goals).mean() + 1
    assert value_of_the_grid()(own, own).abs().mean() < 0.5


def test_the_value_of_a_chain_reaches_beyond_single_episodes() -> None:
    """Episodes are three steps long, the chain twelve."""
    starts = [torch.arange(first, first + 4) for first in range(9)] * 4
    both = [*starts, *(positions.flip(0) for positions in starts)]
    episodes = [torch.stack([positions, torch.zeros(4)], dim=1) for positions in both]
    moves = [(positions[1:] - positions[:-1]) for positions in episodes]
    value = fit_head("value", record(episodes, moves, PLANE), {}, 1500, 0)[0]
    place = torch.arange(12.0)
    points = torch.stack([place, torch.zeros(12)], dim=1)
    found = value(points, points[-1:].expand(12, -1))[:, 0]
    assert spearman(found.numpy(), place.numpy()) > 0.95
    assert found[0] < found[8] - 2


def test_the_temporal_distance_grows_with_the_steps() -> None:
    states, goals, steps = cells()
    head = fit_head("distance", walks(), {}, 600, 0)[0]
    assert spearman(head(states, goals)[:, 0].numpy(), steps.numpy()) > 0.85


@pytest.mark.parametrize("discrete", [True, False])
def test_the_policy_goes_the_right_way(discrete: bool) -> None:
    data = walks(discrete=discrete)
    policy = fit_head("policy", data, {"value": value_of_the_grid()}, 600, 0)[0]
    states, goals, steps = cells()
    outputs = policy(states, goals)
    moves = MOVES[outputs.argmax(dim=1)] if discrete else outputs.clamp(-1, 1)
    after = (states + moves).clamp(0, SIDE - 1)
    nearer = (goals - after).abs().sum(dim=1) < steps - (0.5 if discrete else 0.02)
    assert nearer.float().mean() > 0.9


def test_the_clone_imitates_its_data() -> None:
    """Right to goals on the right, left to those on the left."""
    ways = [torch.stack([torch.arange(6), torch.zeros(6)], dim=1)]
    ways = [*ways, ways[0].flip(0)] * 8
    data = record(ways, [(way[1:] - way[:-1]).float() for way in ways], PLANE)
    clone = fit_head("clone", data, {}, 300, 0)[0]
    found = clone(torch.tensor([[2.0, 0], [2.0, 0]]), torch.tensor([[5.0, 0], [0.0, 0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0], [-1.0, 0]]), atol=0.15, rtol=0)


def test_reward_continuation_and_probe_are_read_from_states() -> None:
    data = walks()
    is_corner = (data.states == SIDE - 1).all(dim=1).float()
    data = data._replace(rewards=2 * is_corner, terminated=is_corner)
    at = torch.tensor([[4.0, 4.0], [1.0, 1.0]])
    torch.testing.assert_close(
        fit_head("reward", data, {}, 500, 0)[0](at)[:, 0], torch.tensor([2.0, 0.0]), atol=0.3, rtol=0
    )
    goes_on = fit_head("continuation", data, {}, 500, 0)[0](at)[:, 0].sigmoid()
    assert goes_on[0] < 0.2
    assert goes_on[1] > 0.9
    torch.testing.assert_close(fit_head("probe", data, {}, 1200, 0)[0](at)[:, 0], 3 * at[:, 0] + 1, atol=0.3, rtol=0)


def test_a_reward_is_read_from_what_the_action_led_to_and_not_from_what_came_next() -> None:
    """Whoever reaches the corner is taken elsewhere at once, so the state that follows does not show the reward."""
    data = walks()
    is_corner = (data.states == SIDE - 1).all(dim=1)
    elsewhere = torch.where(is_corner[:, None], torch.zeros(2), data.states)
    data = data._replace(rewards=is_corner.float(), states=elsewhere, predicted=data.states)
    reward = fit_head("reward", data, {}, 500, 0)[0](torch.tensor([[4.0, 4.0], [0.0, 0.0]]))[:, 0]
    torch.testing.assert_close(reward, torch.tensor([1.0, 0.0]), atol=0.2, rtol=0)


@pytest.mark.parametrize("gamma", [GAMMA, 0.7])
def test_the_return_falls_with_the_steps_to_a_reward_that_ends_the_world(
    gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reward in the corner; the way there is at most as good as the best one."""
    monkeypatch.setattr(heads, "AVERAGE", 0.97)
    data = walks()
    is_corner = (data.states == SIDE - 1).all(dim=1).float()
    value = fit_head("return", data._replace(rewards=is_corner, terminated=is_corner), {}, 500, 0, gamma)[0]
    values = value(torch.tensor([[4.0, 3.0], [3.0, 3.0], [2.0, 2.0], [0.0, 0.0]]))[:, 0]
    assert (values.diff() < 0).all()
    assert (values < gamma ** torch.tensor([0.0, 1.0, 3.0, 7.0]) + 0.05).all()
    assert values[0] > 0.75


def test_the_expectile_loss_weights_positive_errors() -> None:
    assert expectile_loss(torch.tensor([2.0]), 0.9).item() == pytest.approx(0.9 * 4)
    assert expectile_loss(torch.tensor([-2.0]), 0.9).item() == pytest.approx(0.1 * 4)
    values = torch.tensor([0.0, 1.0])
    grid = torch.linspace(0, 1, 1001)
    best = grid[torch.stack([expectile_loss(values - guess, 0.9) for guess in grid]).argmin()]
    assert best.item() == pytest.approx(0.9, abs=1e-3)


def lengths_data() -> Recordings:
    episodes = [
        torch.stack([torch.full((n + 1,), float(k)), torch.arange(n + 1.0)], dim=1) for k, n in enumerate(LENGTHS)
    ]
    return record(episodes, [torch.zeros(n, 2) for n in LENGTHS], PLANE)


def test_frames_with_a_successor_are_all_but_the_last_of_each_episode() -> None:
    states = lengths_data().states[lengths_data().transitions]
    assert states.tolist() == [[k, t] for k, n in enumerate(LENGTHS) for t in range(n)]


def test_later_frames_are_all_those_of_the_same_episode_and_as_likely() -> None:
    data = lengths_data()
    rows = data.transitions.repeat(4000)
    goals = later(data, rows, torch.Generator().manual_seed(0))
    assert (data.states[goals, 0] == data.states[rows, 0]).all()
    ahead = (data.states[goals, 1] - data.states[rows, 1])[data.states[rows, 0].eq(1) & data.states[rows, 1].eq(2)]
    shares = [(ahead == k).float().mean().item() for k in range(1, 6)]
    np.testing.assert_allclose(shares, 0.2, atol=0.03)


def test_goals_are_of_any_episode_of_their_own_or_the_state_itself() -> None:
    data = lengths_data()
    rows = data.transitions.repeat(2000)
    goals = mixed_goals(data, rows, torch.Generator().manual_seed(0))
    own = data.states[goals, 0] == data.states[rows, 0]
    others = (~own).float().mean().item()
    sizes = torch.tensor([n + 1 for n in LENGTHS]) / len(data.states)
    strangers = 0.3 * (1 - sizes[data.states[rows, 0].long()]).mean().item()
    assert others == pytest.approx(strangers, abs=0.02)
    assert (goals == rows).float().mean() > 0.04
    assert goals.max() == len(data.states) - 1


@pytest.mark.parametrize("name", ["value", "distance", "clone", "probe"])
def test_a_head_is_a_function_of_data_and_seed(name: str) -> None:
    torch.manual_seed(5)
    one, loss = fit_head(name, walks(), {}, 5, 3)
    torch.manual_seed(6)
    again, same_loss = fit_head(name, walks(), {}, 5, 3)
    other, _ = fit_head(name, walks(), {}, 5, 4)
    assert loss == same_loss
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_fitting_leaves_the_random_numbers_of_the_process_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit_head("probe", walks(), {}, 2, 3)
    assert torch.equal(torch.rand(3), expected)


def test_a_fitted_head_is_frozen_and_standardises_its_states() -> None:
    data = walks()._replace(states=1000 + 50 * walks().states)
    head = fit_head("probe", data, {}, 2, 0)[0]
    torch.testing.assert_close(head.mean, data.states.mean(dim=0))
    torch.testing.assert_close(head.std, data.states.std(dim=0))
    assert not any(parameter.requires_grad for parameter in head.parameters())


@pytest.mark.parametrize("history", [1, 2, 4, 9])
def test_what_a_head_sees_is_of_one_episode_and_begins_with_its_first_frame_repeated(history: int) -> None:
    data = lengths_data()._replace(history=history)
    seen = data.seen(torch.arange(len(data.states))).unflatten(1, (history, 2)).tolist()
    places = [(k, t) for k, n in enumerate(LENGTHS) for t in range(n + 1)]
    assert seen == [[[k, max(0, t - back)] for back in reversed(range(history))] for k, t in places]


@pytest.mark.parametrize("history", [1, 3])
def test_windows_of_consecutive_frames_are_what_recordings_give(history: int) -> None:
    states = torch.randn(2, 7, 3, 2, generator=torch.Generator().manual_seed(0))
    data = record(list(states.flatten(2)), [torch.zeros(6, 2)] * 2, PLANE)._replace(history=history)
    expected = data.seen(torch.arange(14)).unflatten(0, (2, 7))[:, history - 1 :]
    assert torch.equal(windows_of(states, history), expected)


@pytest.mark.parametrize("name", STATES_IN)
def test_imagined_states_change_the_heads_that_are_said_to_read_them(name: str) -> None:
    data = walks()._replace(frames=walks().states)
    fitted = {"value": build_head("value", 2, 1)}
    one, other = (fit_head(name, data._replace(imagined=states), fitted, 8, 0)[0] for states in (None, -data.states))
    are_equal = all(torch.equal(*both) for both in zip(one.parameters(), other.parameters(), strict=True))
    assert are_equal == (name not in READ_DREAMS)


def test_a_history_changes_no_head_that_reads_one_frame() -> None:
    data = walks()._replace(frames=walks().states)
    pairs = [fit_head("decoder", data._replace(history=history), {}, 8, 0)[0] for history in (1, 3)]
    assert all(torch.equal(*both) for both in zip(*(head.parameters() for head in pairs), strict=True))
    assert build_head("value", 5, 1, 3).layers[0].in_features == 4 * 5
    assert build_head("probe", 5, 1, 3).layers[0].in_features == 3 * 5


def test_heads_read_from_two_frames_which_way_something_moves() -> None:
    """A speed of 1 or -1, and an action that brakes."""
    speeds = [1.0, -1.0] * 40
    right = torch.stack([torch.arange(6.0), torch.zeros(6)], dim=1)
    ways = [right if speed > 0 else right.flip(0) for speed in speeds]
    data = record(ways, [torch.tensor([[-speed, 0.0]]).expand(5, 2) for speed in speeds], PLANE)
    data = data._replace(simulator=torch.tensor(speeds).repeat_interleave(6)[:, None], history=2)
    moving = torch.tensor([[1.0, 0, 2, 0], [3, 0, 2, 0]])
    goals = torch.tensor([[2.0, 0], [2.0, 0]])
    probe, clone = (fit_head(name, data, {}, steps, 0)[0] for name, steps in (("probe", 1200), ("clone", 300)))
    torch.testing.assert_close(probe(moving), torch.tensor([[1.0], [-1.0]]), atol=0.2, rtol=0)
    torch.testing.assert_close(clone(moving, goals)[:, 0], torch.tensor([-1.0, 1.0]), atol=0.2, rtol=0)
    blind = fit_head("clone", data._replace(history=1), {}, 300, 0)[0]
    assert blind(moving[:, 2:], goals)[:, 0].abs().max() < 0.5


@pytest.mark.parametrize("name", ["value", "distance", "policy", "reward", "continuation"])
def test_every_head_is_fitted_on_windows(name: str) -> None:
    data = walks()._replace(history=3)
    fitted = {"value": fit_head("value", data, {}, 2, 0)[0]}
    head = fit_head(name, data, fitted, 2, 0)[0]
    goals = [data.states[:5]] if name in ("value", "distance", "policy") else []
    assert torch.isfinite(head(data.seen(torch.arange(5)), *goals)).all()
