"""World models for programs of others: `as_swm` for the solvers of stable-worldmodel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jepa.agent import load_planner
from jepa.planning.control import Planning
from jepa.planning.costs import total
from jepa.planning.types import Imagined
from jepa.planning.world import World
from jepa.types import ActionSpace

START, GOAL = "jepa_start", "jepa_goal"
"""Keys of the encoded pictures, which a solver hands back for every iteration."""


def as_swm(world: World, cost: str | Sequence[str] = "gc_value") -> SwmModel:
    """The world as a model of stable-worldmodel, with costs of conf/cost; that package is not imported.

    Its solvers take it as `model`, its WorldModelPolicy the scale of the actions as `process=model.process`. Raises
    ConfigError for an unknown cost, ValueError for a world that lacks a head or sees several frames.
    """
    return SwmModel(world, cost)


class SwmModel(nn.Module):
    """`get_cost` of candidate actions in [-1, 1] (one-hot for discrete ones), from pictures of now and of the goal."""

    def __init__(self, world: World, cost: str | Sequence[str]) -> None:
        super().__init__()
        if world.history > 1:
            raise ValueError("as_swm() hands over one frame, and this world sees several: use jepa-plan")
        chosen = load_planner("cem", cost)
        Planning(world, chosen.planner, chosen.costs)  # refuses a world that lacks a head
        self.world, self.costs = world, chosen.costs
        space = world.contract.actions
        self.process = {} if space.is_discrete else {"action": ActionScale(space)}

    def get_cost(self, info_dict: dict[str, Any], action_candidates: Tensor) -> Tensor:
        """`pixels` and `goal` uint8 [B, N, T, H, W, C], candidates [B, N, H, block * A] -> [B, N]; differentiable"""
        if START not in info_dict:
            info_dict |= {START: self._encode(info_dict["pixels"]), GOAL: self._encode(info_dict["goal"])}
        rows = zip(info_dict[START], info_dict[GOAL], action_candidates, strict=True)
        return torch.stack([self._cost(*row) for row in rows])

    def _encode(self, pictures: Any) -> Tensor:
        """The last picture of each episode -> states [B, S, Z]; grey may come as three equal channels."""
        last = np.asarray(pictures[:, 0, -1])
        if self.world.contract.frame_shape[0] == 1 and (last == last[..., :1]).all():
            last = last[..., :1]
        return self.world.encode(np.stack([self.world.contract.channels_first(picture) for picture in last]))

    def _cost(self, start: Tensor, goal: Tensor, candidates: Tensor) -> Tensor:
        """[S, Z], [S, Z], [N, H, A] -> [N]"""
        world, space = self.world, self.world.contract.actions
        if space.is_discrete:
            candidates = candidates.unflatten(-1, (-1, space.num_actions)).argmax(dim=-1)
        else:
            candidates = candidates.clamp(-1, 1)
        states = start.expand(len(candidates), 1, *start.shape)
        imagined = world.rollout(states, world.unscale(candidates))
        return total(self.costs, world, Imagined(imagined, states[0], goal, candidates))


class ActionScale:
    """Actions of the environment to those of planners in [-1, 1], and back."""

    def __init__(self, space: ActionSpace) -> None:
        self.low, self.high = (np.array(bound, dtype=np.float32) for bound in (space.low, space.high))
        self.inverse_transform = space.unscale

    def transform(self, x: np.ndarray) -> np.ndarray:
        return 2 * (x - self.low) / (self.high - self.low) - 1
