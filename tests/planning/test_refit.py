"""The dynamics of a world are fitted on frozen states of stored episodes."""

from __future__ import annotations

import pytest
import torch
from tiny_world import PIXELS, make_world
from torch import Tensor

from jepa.planning import refit
from jepa.planning.heads import Recordings
from jepa.planning.refit import NUM_STEPS, fit_dynamics, starts
from jepa.types import ActionSpace

DISCRETE = ActionSpace(num_actions=3)


def pushes(space: ActionSpace, history: int, *, count: int = 60, steps: int = 8) -> Recordings:
    """Episodes of states of 6 numbers, of which each action shifts the first ones; with a history half as far again."""
    random = torch.Generator().manual_seed(0)
    codes = 2 * torch.rand(count, steps, space.size, generator=random) - 1
    if space.is_discrete:
        codes = torch.nn.functional.one_hot(codes.argmax(dim=2), space.size).float()
    change = codes.clone()
    if history > 1:
        change[:, 1:] += codes[:, :-1] / 2
    moved = torch.nn.functional.pad(change, (0, 6 - space.size)).cumsum(dim=1)
    states = torch.randn(count, 1, 6, generator=random) + torch.nn.functional.pad(moved, (0, 0, 1, 0))
    ends = (torch.arange(count) * (steps + 1) + steps).repeat_interleave(steps + 1)
    flat, none = states.flatten(0, 1), torch.zeros(count * (steps + 1))
    acted = torch.nn.functional.pad(codes, (0, 0, 0, 1)).flatten(0, 1)
    return Recordings(flat, ends, acted, none, none, flat, torch.zeros(0, 0), space, history)


def error_over_copying(predict: object, data: Recordings) -> float:
    """Of a step, on all frames whose history is their episode's own."""
    rows = starts(data)[1]
    states = data.seen(rows).unflatten(1, (data.history, 1, 6))
    codes = data.actions[rows[:, None] + torch.arange(1 - data.history, 1)]
    following: Tensor = predict.advance(states, predict.actions.mlp(codes))[:, 0]  # pyright: ignore
    target, last = data.states[rows + 1], data.states[rows]
    return ((following - target).square().mean() / (last - target).square().mean()).item()


@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize("space", [PIXELS, DISCRETE])
def test_fitted_dynamics_predict_what_the_actions_do(
    space: ActionSpace, history: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "BATCH_SIZE", 96)
    predictor = make_world(space, history=history, width=64).predictor.requires_grad_(False)
    data = pushes(space, history)
    for parameter in predictor.dynamics.parameters():
        parameter.mul_(0.3)
    assert error_over_copying(predictor, data) > 0.8
    fit_dynamics(predictor, data, 300, 0)
    assert error_over_copying(predictor, data) < 0.2


def test_only_the_dynamics_and_their_actions_change_and_all_is_frozen_again() -> None:
    predictor = make_world().predictor.requires_grad_(False)
    before = {name: value.clone() for name, value in predictor.state_dict().items()}
    fit_dynamics(predictor, pushes(PIXELS, 1), 3, 0)
    changed = {name.split(".")[0] for name, value in predictor.state_dict().items() if not value.equal(before[name])}
    assert changed == {"actions", "dynamics"}
    assert not any(parameter.requires_grad for parameter in predictor.parameters())


@pytest.mark.parametrize(("lengths", "history"), [([5, 2, 7], 1), ([5, 2, 7], 3), ([2, 1, 2], 1), ([1, 1], 2)])
def test_rollouts_begin_where_history_and_future_are_of_one_episode(lengths: list[int], history: int) -> None:
    ends, rows, first = [], [], 0
    possible = max(length - history + 1 for length in lengths)
    expected = max(1, min(NUM_STEPS, possible))
    for length in lengths:
        ends += [first + length] * (length + 1)
        rows += range(first + history - 1, first + length - expected + 1)
        first += length + 1
    data = pushes(PIXELS, history)._replace(states=torch.zeros(len(ends), 6), ends=torch.tensor(ends))
    count, found = starts(data)
    assert (count, found.tolist()) == (expected, rows)
