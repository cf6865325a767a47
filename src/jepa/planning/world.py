"""A trained world model as planners use it: encode frames, step and roll out states, read its heads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from jepa.config.files import Fields, as_mapping, read_json
from jepa.encoders.pretrained import open_encoder
from jepa.envs.types import BatchedEnv
from jepa.errors import ConfigError, FileError
from jepa.layers.shapes import ShapesOnly, fake_init
from jepa.layers.tokens import make_grid
from jepa.planning.heads import GAMMA, MLPHead, build_head
from jepa.planning.metric import Metric
from jepa.planning.refit import DynamicsHead
from jepa.predictors.action import ActionPredictor
from jepa.runs.checkpoint import CheckpointError, find, load_model, read_state
from jepa.types import ActionSpace, Field, NonNegativeInt, PositiveInt

HEADS_FILE = "heads"
"""heads.safetensors and heads.json in the run folder."""
BUILD_ERRORS = (
    TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError, ArithmeticError, MemoryError,
)  # fmt: skip
"""Exceptions of constructors for arguments that a file holds."""
MAX_BUFFER_BYTES = 1 << 30
"""Largest size of the tables of a module, in bytes."""
Module = TypeVar("Module", bound=nn.Module)
ROWS = 512
"""Frames that are encoded together."""
CONTRACT_FIELDS: Fields = {
    "predictor": dict, "low": list[float], "high": list[float], "num_actions": NonNegativeInt, "block": PositiveInt,
    "frame_skip": PositiveInt, "frame_shape": tuple[PositiveInt, PositiveInt, PositiveInt], "env": dict,
}  # fmt: skip
"""Fields of `world` in state.json."""


@dataclass(frozen=True, kw_only=True)
class WorldContract:
    """The conventions of the data that a world was trained on; an environment is compared with it before planning."""

    frame_shape: tuple[int, int, int]
    """(C, H, W) of frames before they are resized to the encoder's input"""
    actions: ActionSpace
    block: int
    """Actions of one step of the model."""
    frame_skip: int
    """Steps of the environment for one action."""
    env: Mapping[str, Any]
    """Node of the environment that the episodes are from; empty for recordings."""

    def channels_first(self, picture: Any) -> np.ndarray:
        """uint8 [C, H, W] or [H, W, C] -> [C, H, W]. Raises ValueError for pictures of another size."""
        picture, shape = np.asarray(picture), self.frame_shape
        if picture.dtype != np.uint8 or picture.shape not in (shape, (*shape[1:], shape[0])):
            expected = f"uint8 {shape} or {(*shape[1:], shape[0])}"
            raise ValueError(f"a picture of {picture.dtype} {picture.shape}: the world was trained on {expected}")
        return picture if picture.shape == shape else picture.transpose(2, 0, 1)

    def check(self, env: BatchedEnv) -> None:
        """Raises ConfigError that names all differences with both values."""
        pairs = {
            "frame_shape": (self.frame_shape, env.frame_shape),
            "actions": (self.actions, env.actions),
            "frame_skip": (self.frame_skip, env.settings.get("frame_skip", 1)),
        }
        faults = [
            f"{name}: the world was trained with {ours}, the environment has {theirs}"
            for name, (ours, theirs) in pairs.items()
            if ours != theirs
        ]
        if faults:
            raise ConfigError(faults)


class World(nn.Module):
    """Encoder, dynamics and heads of a run with objective=dynamics, in eval mode and frozen."""

    def __init__(
        self, encoder: Any, predictor: ActionPredictor, contract: WorldContract, heads: Mapping[str, MLPHead]
    ) -> None:
        super().__init__()
        self.encoder, self.predictor, self.contract = encoder, predictor, contract
        self.heads = nn.ModuleDict(heads)
        self.num_rows = 0
        """Rows of states that the predictor has stepped so far."""
        self.gamma = GAMMA
        """Discount of a step in its heads of values and returns."""

    @property
    def history(self) -> int:
        return self.predictor.history

    @torch.no_grad()
    def encode(self, frames: Tensor | np.ndarray) -> Tensor:
        """uint8 frames [.., C, H, W] -> states [.., S, Z]"""
        frames = frames if isinstance(frames, Tensor) else torch.from_numpy(np.array(frames))
        flat = frames.flatten(0, -4)
        parts = [self._encode(flat[start : start + ROWS]) for start in range(0, len(flat), ROWS)]
        return torch.cat(parts).unflatten(0, frames.shape[:-3])

    def _encode(self, frames: Tensor) -> Tensor:
        tokens = self.encoder(self.encoder.transform(frames).to(next(self.predictor.parameters()).device))
        return self.predictor.project(tokens[:, None])[:, 0]

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        """The last `history` states [B, h, S, Z] and the actions after each [B, h, A] -> the next state [B, S, Z]."""
        self.num_rows += len(states)
        return self.predictor.step(states, actions)

    def rollout(self, states: Tensor, actions: Tensor) -> Tensor:
        """States [B, h, S, Z], actions between and after them [B, h - 1 + K, A] -> K next states [B, K, S, Z]."""
        self.num_rows += len(states) * (actions.shape[1] - self.history + 1)
        return self.predictor.rollout(states, actions)

    def unscale(self, actions: Tensor) -> Tensor:
        """Actions [.., A] of planners in [-1, 1] -> those of the environment, [.., block, A] if a block has several.

        Discrete actions are whole numbers in both.
        """
        space, block = self.contract.actions, self.contract.block
        if not space.is_discrete:
            actions = space.unscale(actions.unflatten(-1, (block, -1)))
        return actions if block > 1 else actions.squeeze(-1 if space.is_discrete else -2)


def load_world(path_or_name: str | os.PathLike, *, heads: bool = True) -> World:
    """The world model of a run folder or a checkpoint of `objective=dynamics`, with its fitted heads.

    Raises CheckpointError if there is none. Only classes of this package are built, so that no file can run code.
    """
    checkpoint = find(Path(path_or_name).expanduser())
    values = read_state(checkpoint).get("world")
    where = f"{checkpoint / 'state.json'}: world"
    if values is None:
        raise CheckpointError(f"{checkpoint} holds no world model; train one with objective=dynamics")
    contract, settings = read_contract(as_mapping(values, where, CONTRACT_FIELDS))
    encoder: Any = open_encoder(checkpoint)
    build = partial(build_predictor, encoder, contract, settings, where)
    predictor = load_built(build, load_model(checkpoint, "predictor."), where, settings)
    world = World(encoder, predictor, contract, {})
    if heads:
        world.heads.update(read_heads(run_folder(checkpoint), world, checkpoint.name))
    return world.eval().requires_grad_(False)


def load_built(
    build: Callable[[], Module], tensors: Mapping[str, Tensor], where: str, settings: Mapping[str, Any]
) -> Module:
    """What `build` makes, with the tensors of a file. Raises CheckpointError if a module of these settings has others.

    It is built without memory first, so that sizes in a file take no more memory than its tensors.
    """
    if any("depth" in name and isinstance(depth, int) and depth > len(tensors) for name, depth in settings.items()):
        raise CheckpointError(f"{where}: its tensors have fewer blocks than it says")
    try:
        with torch.random.fork_rng(devices=[]), fake_init(ShapesOnly()):
            outline = build()
        own = {name: tensor.shape for name, tensor in outline.state_dict().items()}
        stored = {name: tensor.shape for name, tensor in tensors.items()}
        if differing := [name for name in {**own, **stored} if own.get(name) != stored.get(name)]:
            name = differing[0]
            sizes = (list(shapes[name]) if name in shapes else "nothing" for shapes in (own, stored))
            raise ValueError("{} is {} by its description, {} in the file".format(name, *sizes))
        if sum(buffer.nbytes for buffer in outline.buffers()) > MAX_BUFFER_BYTES:
            raise ValueError("its tables do not fit into memory")
        module = build()
        module.load_state_dict(tensors)
    except BUILD_ERRORS as error:
        raise CheckpointError(f"{where}: {' '.join(str(error).split())[:240]}") from error
    return module


def run_folder(checkpoint: Path) -> Path:
    return checkpoint.parent.parent


def read_contract(values: Mapping[str, Any]) -> tuple[WorldContract, dict[str, Any]]:
    """The contract in state.json, and the settings of the predictor."""
    actions = ActionSpace(tuple(values["low"]), tuple(values["high"]), values["num_actions"])
    shape: Any = tuple(values["frame_shape"])
    names = ("block", "frame_skip", "env")
    return WorldContract(frame_shape=shape, actions=actions, **{name: values[name] for name in names}), values[
        "predictor"
    ]


def build_predictor(encoder: Any, contract: WorldContract, settings: Mapping[str, Any], where: str) -> ActionPredictor:
    _, _, height, width = encoder.clip_shape
    shape = (1, *((contract.block,) if contract.block > 1 else ()), *contract.actions.shape)
    fields = {"actions": Field(shape=shape, space=contract.actions)}
    grid = make_grid((1, height, width), encoder.patch_size)
    try:
        return ActionPredictor(grid=grid, embed_dim=encoder.embed_dim, fields=fields, **settings)
    except BUILD_ERRORS as error:
        raise CheckpointError(f"{where}: {error}") from error


def read_heads(folder: Path, world: World, checkpoint: str) -> dict[str, MLPHead]:
    """The heads in the run folder that were fitted on this checkpoint; empty if there are none."""
    path = folder / f"{HEADS_FILE}.json"
    if not path.exists():
        return {}
    remedy = "remove it, and the heads are fitted again"
    try:
        facts = read_json(path, {"checkpoint": str, "heads": dict, "digests": dict})
    except FileError as error:
        raise CheckpointError(f"{error}; {remedy}") from error
    if facts["checkpoint"] != checkpoint:
        return {}
    heads = {}
    try:
        world.gamma = float(facts.get("gamma", GAMMA))
        tensors = load_file(path.with_suffix(".safetensors"))
        for name, size in facts["heads"].items():
            if name == "dynamics":
                build = partial(DynamicsHead, world.predictor)
            elif name == "metric":
                build = partial(Metric, world.predictor.state_size, int(size))
            else:
                build = partial(build_head, name, world.predictor.state_size, int(size), world.history)
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            heads[name] = load_built(build, own, name, {})
            if digest_of(heads[name]) != facts["digests"].get(name):
                raise ValueError(f"{name} has changed since it was written")
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())[:200]}; {remedy}") from error
    return heads


def digest_of(head: nn.Module) -> str:
    """Of a head's numbers; it stays the same when others are fitted beside it."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in head.state_dict().values())).hexdigest()
