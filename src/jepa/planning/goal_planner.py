"""Planning for programs of one's own: from frames and a goal to actions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jepa.planning.control import Goals, Planning
from jepa.planning.types import Cost, Planner
from jepa.planning.world import World


class GoalPlanner:
    """A planner with its costs.

    In a loop, `reset` begins an episode and `act` is given each of its frames; it keeps what was seen and done, and
    makes a new plan every `planner.execute` steps, as jepa-plan does. `plan` makes one plan from one frame.

    Pictures are uint8 [C, H, W] or [H, W, C]. Raises ValueError for others, and for heads that the costs need and the
    world lacks.
    """

    def __init__(self, planner: Planner, costs: Mapping[str, Cost], seed: int = 0) -> None:
        self.planner, self.costs, self.seed = planner, costs, seed
        self.control: Planning | None = None

    def reset(self, world: World, goal: np.ndarray) -> None:
        """Begin an episode, at rest, with a picture of its goal."""
        self.control, self.step = self._begin(world, goal), 0

    def act(self, frame: np.ndarray) -> np.ndarray:
        """The picture of now, each since `reset` once and in order -> the action of the environment, [A] or []."""
        if self.control is None:
            raise ValueError("act() continues an episode: begin it with reset(world, goal)")
        action = _act(self.control, self.step, frame)
        self.step += 1
        return action

    def plan(self, world: World, goal: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Pictures of the goal and of now -> actions of the environment, [K, A] or [K]: K steps, or blocks of them.

        Raises ValueError for worlds with a history of several frames, which `act` keeps.
        """
        if world.history > 1:
            raise ValueError(f"plan() takes one frame, this world sees {world.history}: use reset(world, goal) and act")
        control = self._begin(world, goal)
        _act(control, 0, frame)
        (actions,) = control.first_plans()
        return actions if world.contract.block == 1 else actions.reshape(-1, *actions.shape[2:])

    def _begin(self, world: World, goal: np.ndarray) -> Planning:
        control = Planning(world, self.planner, self.costs, self.seed)
        control.begin(Goals(world.contract.channels_first(goal)[None], np.zeros((1, 0))), [0], self.planner.horizon)
        return control


def _act(control: Planning, step: int, frame: np.ndarray) -> np.ndarray:
    frames = control.world.contract.channels_first(frame)[None]
    return control.act(step, frames, np.zeros((1, 0)), np.ones(1, dtype=bool))[0]
