"""Two Rooms as `jepa/TwoRooms-v0` of gymnasium, which `import jepa.envs.registered` registers."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces

from jepa.envs.two_rooms import SIDE, STRICT, TwoRooms, distance
from jepa.types import Channels


class TwoRoomsEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One environment: observations are uint8 [H, W, channels], actions are steps in pixels.

    `reset(seed=, options={"state": ..., "goal_state": ...})` takes (x, y, x of the wall, y of the door) in pixels; what
    is not given is drawn, with start and goal in different rooms. `info` has `state`, `goal_state`, `goal` (a picture,
    as of `render` or else as of the observations), `distance` in pixels, `success` and the number of `steps`. An
    episode ends with a reward of 1 when the dot is within `STRICT` of the goal.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self, *, walls: Literal["fixed", "random"] = "fixed", channels: Channels = 3, render_mode: str | None = None
    ) -> None:
        self.rooms = TwoRooms(walls=walls, channels=channels)
        self.render_mode = render_mode
        low, high = (np.array(bound, dtype=np.float32) for bound in (self.rooms.actions.low, self.rooms.actions.high))
        self.action_space = spaces.Box(low, high, dtype=np.float32)
        self.observation_space = spaces.Box(0, 255, (SIDE, SIDE, channels), dtype=np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Raises ValueError for a state or a goal inside a wall."""
        super().reset(seed=seed)
        task = self.rooms.task(int(self.np_random.integers(2**31)))
        given = {name: value for name, value in (options or {}).items() if value is not None}
        if unknown := given.keys() - {"state", "goal_state"}:
            raise ValueError(f"options {sorted(unknown)}: valid are state and goal_state")
        start, goal = _states(given, start=task.start, goal=task.goal)
        frames, self.states = self.rooms.reset([0], start[None], goal[None])
        self.goals, self.num_steps = goal[None], 0
        self.frame, goal_frame = _image(frames), _image(self.rooms.render(self.goals))
        self.goal_frame = _in_colours(goal_frame) if self.render_mode == "rgb_array" else goal_frame
        return self.frame, self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        frames, self.states, rewards, terminated, _ = self.rooms.step(np.asarray(action)[None])
        self.frame, self.num_steps = _image(frames), self.num_steps + 1
        return self.frame, float(rewards[0]), bool(terminated[0]), False, self._info()

    def render(self) -> np.ndarray | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """uint8 [H, W, 3]"""
        return _in_colours(self.frame) if self.render_mode == "rgb_array" else None

    def _info(self) -> dict[str, Any]:
        left = float(distance(self.states, self.goals)[0])
        state, goal_state = self.states[0].copy(), self.goals[0].copy()
        return {
            "state": state, "goal_state": goal_state, "goal": self.goal_frame.copy(), "distance": left,
            "success": left < STRICT, "steps": self.num_steps,
        }  # fmt: skip


def _states(given: dict[str, Any], start: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and goal [4], those given instead of those drawn; the layout of a lone one is that of the other."""
    values = {name: np.asarray(value, dtype=np.float32) for name, value in given.items()}
    for name, value in values.items():
        if value.shape != (4,):
            raise ValueError(f"options {name}={value.tolist()}: takes x, y, x of the wall and y of the door")
    if len(values) == 1:
        layout = next(iter(values.values()))[2:]
        start, goal = (np.concatenate([drawn[:2], layout]) for drawn in (start, goal))
    return values.get("state", start), values.get("goal_state", goal)


def _image(frames: np.ndarray) -> np.ndarray:
    """[1, C, H, W] -> [H, W, C]"""
    return np.ascontiguousarray(frames[0].transpose(1, 2, 0))


def _in_colours(image: np.ndarray) -> np.ndarray:
    """[H, W, 1 or 3] -> [H, W, 3]"""
    return np.broadcast_to(image, (SIDE, SIDE, 3)).copy()


gymnasium.register(
    "jepa/TwoRooms-v0", entry_point="jepa.envs.registered:TwoRoomsEnv", max_episode_steps=100, order_enforce=True
)
