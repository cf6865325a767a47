"""Environments of gymnasium, several of which are stepped together; frames are what they render. Needs `gymnasium`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
from PIL import Image

from jepa.envs.types import Transition, check_actions
from jepa.suggestions import suggestion
from jepa.types import ActionSpace, Channels, PositiveInt

EXTRA = "pip install 'jepa-train[envs]'"
PLUGINS = {
    "MiniGrid-": "minigrid", "BabyAI-": "minigrid", "ALE/": "ale_py", "jepa/": "jepa.envs.registered",
    "Vizdoom": "vizdoom.gymnasium_wrapper",
    **dict.fromkeys(("PointMaze_", "AntMaze_", "Fetch", "Hand", "Adroit", "Franka"), "gymnasium_robotics"),
}  # fmt: skip
"""First letters of an id -> the module that registers it."""
EXTRAS = {"ale_py": "pip install 'jepa-train[atari]'", "vizdoom": "pip install 'jepa-train[vizdoom]'"}
"""Packages that have an extra of their own."""
NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})
MAX_STATE = 64
"""Observations of more numbers are not taken for states."""
GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness (ITU-R BT.601)."""


class GymEnv:
    """Environments `gymnasium.make(id, **kwargs)` that are stepped together, as many as `reset` gets seeds.

    A frame is the rendered picture, scaled to `size` x `size` pixels. A transition is `frame_skip` steps of the
    simulator with the same action; an episode has at most `max_steps` transitions, or as many as gymnasium's limit
    allows. The state is what the simulator is known to tell: position and direction in MiniGrid, else an observation
    of at most `MAX_STATE` numbers. An environment that has ended is not stepped again until all are reset.

    An id with a module, as "module:Env-v0", makes gymnasium import that module. It is meant for ids that a user has
    typed; a node that was read from a file goes through `jepa.envs.types.stored_node`, which refuses it.
    """

    requires = ("envs", "gymnasium")

    group_size = 25

    def __init__(
        self, *, id: str, kwargs: Mapping[str, Any] = NO_ARGUMENTS, size: PositiveInt = 64, channels: Channels = 3,
        frame_skip: PositiveInt = 1, max_steps: PositiveInt | None = None,
    ) -> None:  # fmt: skip
        self.settings: Mapping[str, Any] = {
            "id": id, "kwargs": dict(kwargs), "size": size, "channels": channels, "frame_skip": frame_skip,
            "max_steps": max_steps,
        }  # fmt: skip
        self.id, self.kwargs, self.frame_skip = id, kwargs, frame_skip
        self.limit = None if max_steps is None else max_steps * frame_skip
        self.frame_shape = (channels, size, size)
        self.envs = [self._make()]
        self.actions = action_space(id, self.envs[0].action_space)
        self.state_names = state_names(self.envs[0])
        self.envs[0].reset(seed=0)
        picture(self.envs[0], size)  # refuses what cannot be drawn before anything is collected

    def _make(self) -> Any:
        return make(self.id, self.kwargs, self.limit)

    def reset(
        self, seeds: Sequence[int], states: np.ndarray | None = None, goals: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raises ValueError for states and goals where the environment has no way to set them."""
        self.envs += [self._make() for _ in range(len(seeds) - len(self.envs))]
        results = [env.reset(seed=int(seed))[0] for env, seed in zip(self.envs, seeds, strict=False)]
        if states is not None or goals is not None:
            self._place(len(seeds), states, goals)
        pairs = zip(self.envs, results, strict=False)
        self.states = np.stack([self._state(env, observation) for env, observation in pairs])
        self.frames = np.stack([self._frame(env) for env in self.envs[: len(seeds)]])
        self.has_ended = np.zeros(len(seeds), dtype=bool)
        return self.frames.copy(), self.states.copy()

    def step(self, actions: np.ndarray) -> Transition:
        actions = check_actions(self.actions, actions, len(self.states))
        rewards = np.zeros(len(actions), dtype=np.float32)
        terminated, truncated = np.zeros((2, len(actions)), dtype=bool)
        for n in np.flatnonzero(~self.has_ended):
            env = self.envs[n]
            observation, rewards[n], terminated[n], truncated[n] = self._transition(env, actions[n])
            self.states[n], self.frames[n] = self._state(env, observation), self._frame(env)
        self.has_ended |= terminated | truncated
        return Transition(self.frames.copy(), self.states.copy(), rewards, terminated, truncated)

    def _transition(self, env: Any, action: np.ndarray) -> tuple[Any, float, bool, bool]:
        """Steps of the simulator with one action, until the episode ends."""
        space = env.action_space
        value = int(action + space.start) if self.actions.is_discrete else _within(action, space)
        total, observation, terminated, truncated = 0.0, None, False, False
        for _ in range(self.frame_skip):
            observation, reward, terminated, truncated, _ = env.step(value)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, bool(terminated), bool(truncated)

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def _place(self, count: int, states: np.ndarray | None, goals: np.ndarray | None) -> None:
        """Put the first `count` environments into states [B, S] and give them goals [B, S]."""
        what = "goals" if states is None else "states"
        raise ValueError(f"{self.id}: {what} cannot be set, since gymnasium has no way to; reset it by seeds")

    def _state(self, env: Any, observation: Any) -> np.ndarray:
        return known_state(env, observation)

    def _frame(self, env: Any) -> np.ndarray:
        """uint8 [C, H, W]"""
        return to_frame(picture(env, self.frame_shape[1]), self.frame_shape)


def make(id: str, kwargs: Mapping[str, Any], limit: int | None = None) -> Any:
    """An environment that renders pictures, with at most `limit` steps an episode, or -1 for no limit.

    Raises ValueError with what to do if there is none.
    """
    gymnasium = require("gymnasium")
    if "render_mode" in kwargs:
        raise ValueError(f"env.kwargs.render_mode={kwargs['render_mode']}: frames are rgb_array always; leave it out")
    module, _, name = id.rpartition(":")
    module = module or next((plugin for prefix, plugin in PLUGINS.items() if id.startswith(prefix)), "")
    known = gymnasium.registry.get(name)
    if module == "gymnasium_robotics" or "mujoco" in str(getattr(known, "entry_point", "")):
        import_mujoco()
    try:
        if module:
            require(module)
        _check_renders(gymnasium.spec(name))
        made = gymnasium.make(name, limit, disable_env_checker=True, render_mode="rgb_array", **kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        raise ValueError(f"env.id={id}: {_no_such_id(name, list(gymnasium.registry))}") from error
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(f"env.id={id}: {_one_line(error)}") from error
    except ModuleNotFoundError as error:
        raise ValueError(f"env.id={id}: needs the package {error.name}; install it") from error
    except (gymnasium.error.Error, TypeError) as error:
        raise ValueError(f"env.id={id} with env.kwargs={kwargs}: {_one_line(error)}") from error
    return _without_autoreset(made)


def _without_autoreset(env: Any) -> Any:
    """Raises ValueError for an environment that resets itself: a frame of a new episode would follow the old action."""
    gymnasium, layer = require("gymnasium"), env
    mode = env.metadata.get("autoreset_mode")
    resets = getattr(mode, "value", mode) not in (None, "Disabled")
    while layer is not env.unwrapped and not resets:
        resets, layer = isinstance(layer, gymnasium.wrappers.Autoreset), layer.env
    if resets:
        raise ValueError(f"env.id={env.spec.id} resets itself at the end of an episode; register it without Autoreset")
    return env


def require(module: str) -> ModuleType:
    """The module. Raises ValueError with the line of pip that installs it, where that is known."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        line = dict.fromkeys(("gymnasium", "mujoco", *PLUGINS.values()), EXTRA) | EXTRAS
        raise ValueError(f"env: needs the package {package}: {line.get(package, 'install it')}") from error


def import_mujoco() -> ModuleType:
    """Raises ValueError if it finds nothing to draw with."""
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo reads it when it is first imported
    with suppress(ImportError):
        import_module("triton")  # torch loads it later, and its LLVM crashes if Mesa's was there before
    try:
        return require("mujoco")
    except (AttributeError, RuntimeError) as error:  # of a library of OpenGL that is not there
        raise cannot_draw(error) from error


def cannot_draw(error: Exception) -> ValueError:
    backend = os.environ.get("MUJOCO_GL", "")
    return ValueError(f"env: MuJoCo cannot draw with MUJOCO_GL={backend} ({error}); set it to egl, osmesa or glfw")


def _no_such_id(id: str, registered: list[str]) -> str:
    hint = suggestion(id, registered) or "; gymnasium.pprint_registry() lists them, MODULE:ID imports a module"
    return f"gymnasium has no such environment{hint}"


def _check_renders(spec: Any) -> None:
    """Raises ValueError for an environment without pictures."""
    creator = spec.entry_point
    if isinstance(creator, str):
        module, _, name = creator.partition(":")
        creator = getattr(import_module(module), name)
    modes = getattr(creator, "metadata", {}).get("render_modes", ["rgb_array"])
    if "rgb_array" not in modes:
        raise ValueError(
            f"env.id={spec.id}: renders no pictures (render_mode rgb_array); it has {', '.join(modes) or 'none'}"
        )


def action_space(id: str, space: Any) -> ActionSpace:
    """Raises ValueError for a space that is neither Discrete nor a bounded Box of one dimension."""
    spaces = require("gymnasium.spaces")
    if isinstance(space, spaces.Discrete):
        return ActionSpace(num_actions=int(space.n))
    if not isinstance(space, spaces.Box) or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
        raise ValueError(
            f"env.id={id}: actions {space} cannot be used; they must be Discrete, or a Box of one dimension"
        )
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise ValueError(f"env.id={id}: actions {space} have no bounds; choose an environment whose actions have")
    return ActionSpace(low=tuple(space.low.tolist()), high=tuple(space.high.tolist()))


def state_names(env: Any) -> tuple[str, ...]:
    if is_minigrid(env):
        return ("position/x", "position/y", "direction")
    space = env.observation_space
    parts = space.spaces if _is_goal_space(space) else {"observation": space}
    names = ("achieved_goal", "observation") if _is_goal_space(space) else ("observation",)
    sizes = [parts[name].shape for name in names]
    are_numbers = all(shape is not None and len(shape) == 1 for shape in sizes)
    if not are_numbers or sum(shape[0] for shape in sizes) > MAX_STATE:
        return ()
    return tuple(f"{name}/{k}" for name, shape in zip(names, sizes, strict=True) for k in range(shape[0]))


def known_state(env: Any, observation: Any) -> np.ndarray:
    """float32 [S], in the order of `state_names`"""
    if is_minigrid(env):
        inner = env.unwrapped
        return np.array([*inner.agent_pos, inner.agent_dir], dtype=np.float32)
    if not state_names(env):
        return np.zeros(0, dtype=np.float32)
    parts = [observation["achieved_goal"], observation["observation"]] if isinstance(observation, dict) else observation
    return np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)


def _is_goal_space(space: Any) -> bool:
    return {"achieved_goal", "observation"} <= set(getattr(space, "spaces", None) or ())


def is_minigrid(env: Any) -> bool:
    return hasattr(env.unwrapped, "get_frame") and hasattr(env.unwrapped, "agent_dir")


def picture(env: Any, size: int) -> np.ndarray:
    """uint8 [H, W, 3]; MiniGrid is drawn with tiles of about the pixels that remain, not with its 32."""
    if is_minigrid(env):
        inner = env.unwrapped
        tiles = inner.agent_view_size if inner.agent_pov else max(inner.width, inner.height)
        return inner.get_frame(inner.highlight, -(-size // tiles), inner.agent_pov)
    pixels = np.asarray(env.render())
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"{env.spec.id} renders {pixels.dtype} {pixels.shape}, no uint8 [H, W, 3]; it cannot be used")
    return pixels


def to_frame(pixels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> [C, size, size], each pixel the mean of the area that it covers"""
    if pixels.shape[:2] != shape[1:]:
        pixels = np.asarray(Image.fromarray(pixels).resize((shape[2], shape[1]), Image.Resampling.BOX))
    if shape[0] == 1:
        return np.round(pixels @ np.array(GREY)).astype(np.uint8)[None]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _within(action: np.ndarray, space: Any) -> np.ndarray:
    """The action, without the rounding error that `check_actions` lets pass."""
    return np.clip(action, space.low, space.high).astype(space.dtype)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
