"""The point task of torch-world through our protocol of planning; skipped where that package is not installed."""

import pytest

from jepa.planning.control import Function
from jepa.planning.protocol import make_tasks, play

pytest.importorskip("torch_world")


def test_going_straight_reaches_every_goal_in_as_many_steps_as_the_way_takes() -> None:
    from point_task import PointTask

    env = PointTask()
    tasks = make_tasks(env, 4, 0)
    straight = Function(lambda states, goals: (10 * (goals - states)).clip(-1, 1))
    played = play(env, straight, tasks, budget=20)
    assert all(outcome.strict for outcome in played.outcomes)
    for task, outcome in zip(tasks, played.outcomes, strict=True):
        assert outcome.steps <= 10 * abs(task.goal - task.start).max() + 1
