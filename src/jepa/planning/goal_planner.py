"""Planning for programs of one's own: from a frame and a goal to actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jepa.planning.control import Goals, Planning
from jepa.planning.types import Cost, Planner
from jepa.planning.world import World


class GoalPlanner:
    """A planner with its costs; `planner.execute` steps of a plan are usually taken before the next is made."""

    def __init__(self, planner: Planner, costs: Mapping[str, Cost], seed: int = 0) -> None:
        self.planner, self.costs, self.seed = planner, costs, seed

    def plan(self, world: World, goal: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Pictures uint8 [C, H, W] or [H, W, C] of the goal and of now -> actions of the environment [H, A] or [H].

        For worlds with a history of one frame and blocks of one action. Raises ValueError for other worlds, pictures
        and heads that the costs need and the world lacks.
        """
        if world.history > 1 or world.contract.block > 1:
            raise ValueError("plan() takes one frame: this world sees several, or acts in blocks; use jepa-plan")
        control = Planning(world, self.planner, self.costs, self.seed)
        control.begin(Goals(channels_first(goal, world)[None], np.zeros((1, 0))), [0], self.planner.horizon)
        control.act(0, channels_first(frame, world)[None], np.zeros((1, 0)), np.ones(1, dtype=bool))
        assert control.plan is not None
        return world.unscale(control.plan[0]).numpy()


def channels_first(picture: Any, world: World) -> np.ndarray:
    """uint8 [C, H, W]. Raises ValueError if it is not of the world's size."""
    picture = np.asarray(picture)
    shape = world.contract.frame_shape
    if picture.dtype != np.uint8 or picture.shape not in (shape, (*shape[1:], shape[0])):
        expected = f"uint8 {shape} or {(*shape[1:], shape[0])}"
        raise ValueError(f"a picture of {picture.dtype} {picture.shape}: the world was trained on {expected}")
    return picture if picture.shape == shape else picture.transpose(2, 0, 1)
