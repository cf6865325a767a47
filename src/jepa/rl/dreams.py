"""Worlds in which a policy acts in imagination: latents of a JEPA, or tokens of IRIS.

Legend of shape letters: B dreams side by side, h frames that a policy sees, H steps of a dream, F numbers that a policy
reads, E the shape of an encoded frame: (S, Z) states of a JEPA, (K,) codes of IRIS.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from jepa.config.files import Fields, as_mapping
from jepa.encoders.pretrained import open_encoder
from jepa.errors import ConfigError, RunError
from jepa.objectives.iris import IRIS
from jepa.planning.fit import decoded
from jepa.planning.world import ROWS, World, WorldContract, load_built, load_world, read_contract
from jepa.predictors.token_dynamics import Imagination
from jepa.runs.checkpoint import find, load_model, read_state
from jepa.types import ActionSpace, Field, NonNegativeInt, PositiveInt

SIDE = 16
"""Pixels of a side of the frames that a policy reads."""
FIT_AGAIN = "run that command again, which fits it"
TOKENS_FIELDS: Fields = {
    "tokens": dict, "num_frames": PositiveInt, "low": list[float], "high": list[float], "num_actions": NonNegativeInt,
    "block": PositiveInt, "frame_skip": PositiveInt, "frame_shape": tuple[PositiveInt, PositiveInt, PositiveInt],
    "env": dict,
}  # fmt: skip
"""Fields of `world` in state.json of a run with objective=iris."""


class StepOutcome(NamedTuple):
    """Of a step in B dreams."""

    encoded: Tensor
    """[B, *E]"""
    rewards: Tensor
    """float32 [B]"""
    goes_on: Tensor
    """float32 [B]: probability that the world did not end"""


class Dream(Protocol):
    def step(self, actions: Tensor) -> StepOutcome:
        """Actions of the environment, [B, A] or [B]"""
        ...


class DreamWorld(nn.Module):
    """A trained world, in eval mode and frozen, with what a policy needs of it."""

    contract: WorldContract
    context: int
    """Frames that a dream begins with."""

    @property
    def actions(self) -> ActionSpace:
        return self.contract.actions

    def encode(self, frames: Tensor | np.ndarray) -> Tensor:
        """uint8 [n, C, H, W] -> [n, *E]"""
        raise NotImplementedError

    def features(self, seen: Tensor, sees: str) -> Tensor:
        """What a policy reads of the last frames [B, h, *E]: float32 [B, F].

        It `sees` states (latents, or the vectors of tokens) or frames, which the world draws.
        """
        values = self.vectors(seen) if sees == "states" else small(self.draw(seen.flatten(0, 1)))
        return values.reshape(len(seen), -1)

    def vectors(self, encoded: Tensor) -> Tensor:
        """[B, h, *E] -> float32 [B, h, ...]"""
        raise NotImplementedError

    def draw(self, encoded: Tensor) -> Tensor:
        """[n, *E] -> uint8 pictures [n, C, H, W]"""
        raise NotImplementedError

    def dream(self, encoded: Tensor, actions: Tensor, random: Generator | None) -> Dream:
        """After the frames [B, context, *E] and the actions [B, context - 1, ...] between them."""
        raise NotImplementedError


class LatentWorld(DreamWorld):
    """A run with objective=dynamics, whose heads tell rewards and ends (and draw frames, with the head decoder)."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.contract, self.context = world, world.contract, world.history

    def encode(self, frames: Tensor | np.ndarray) -> Tensor:
        return self.world.encode(frames)

    def vectors(self, encoded: Tensor) -> Tensor:
        return encoded

    @torch.no_grad()
    def draw(self, encoded: Tensor) -> Tensor:
        return decoded(_head(self.world, "decoder")(encoded.flatten(1)), self.contract.frame_shape[0])

    def dream(self, encoded: Tensor, actions: Tensor, random: Generator | None) -> Dream:
        return LatentDream(self.world, encoded, actions)


def _head(world: World, name: str) -> nn.Module:
    """Raises RunError if the head was lost with its file."""
    if name not in world.heads:
        raise RunError(f"the world has no head {name}, and heads.json beside its checkpoint may be lost: {FIT_AGAIN}")
    return world.heads[name]


class LatentDream:
    """Deterministic: the dynamics predict one state."""

    def __init__(self, world: World, states: Tensor, actions: Tensor) -> None:
        self.world, self.states, self.actions = world, states, actions

    @torch.no_grad()
    def step(self, actions: Tensor) -> StepOutcome:
        past = torch.cat([self.actions, actions[:, None].to(self.actions.dtype)], dim=1)
        following = self.world.step(self.states, past)
        self.states = torch.cat([self.states[:, 1:], following[:, None]], dim=1)
        self.actions = past[:, 1:]
        seen = self.states.flatten(1)
        reward, goes_on = (_head(self.world, name)(seen)[:, 0] for name in ("reward", "continuation"))
        return StepOutcome(following, reward, goes_on.sigmoid())


class TokenWorld(DreamWorld):
    """A run with objective=iris on episodes with rewards; a dream begins with one frame, as in the paper."""

    context = 1

    mean: Tensor
    std: Tensor

    def __init__(self, model: IRIS, contract: WorldContract, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model, self.contract = model, contract
        for name, values in {"mean": mean, "std": std}.items():
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1, 1), persistent=False)

    @torch.no_grad()
    def encode(self, frames: Tensor | np.ndarray) -> Tensor:
        frames = frames if isinstance(frames, Tensor) else torch.from_numpy(np.array(frames))
        parts = [self._encode(frames[start : start + ROWS]) for start in range(0, len(frames), ROWS)]
        return torch.cat(parts)

    def _encode(self, frames: Tensor) -> Tensor:
        clips = self.model.encoder.transform(frames).to(self.mean.device)
        return self.model.tokenizer(self.model.encoder(clips)).codes[:, 0]

    def vectors(self, encoded: Tensor) -> Tensor:
        return self.model.tokenizer.quantizer.lookup(encoded)

    @torch.no_grad()
    def draw(self, encoded: Tensor) -> Tensor:
        pixels = self.model.tokenizer.decode(self.model.tokenizer.quantizer.lookup(encoded[:, None]))
        clips = self.model.tokenizer.to_clips(pixels) * self.std + self.mean
        return (255 * clips[:, :, 0].clamp(0, 1)).round().byte()

    def dream(self, encoded: Tensor, actions: Tensor, random: Generator | None) -> Dream:
        return TokenDream(Imagination(dynamics=self.model.dynamics, codes=encoded, actions=actions, random=random))


class TokenDream:
    """Codes are drawn from their predicted distribution."""

    def __init__(self, imagination: Imagination) -> None:
        self.imagination = imagination

    def step(self, actions: Tensor) -> StepOutcome:
        frame = self.imagination.step(actions)
        return StepOutcome(frame.codes, frame.rewards, 1 - frame.ends)


def small(pictures: Tensor) -> Tensor:
    """uint8 [n, C, H, W] -> float32 [n, C * SIDE * SIDE] in [-1, 1]"""
    return (F.adaptive_avg_pool2d(pictures.float(), SIDE) / 127.5 - 1).flatten(1)


def load_dream_world(path_or_name: str | os.PathLike, *, dreams: bool = True) -> DreamWorld:
    """The world of a run folder or a checkpoint, with objective=dynamics or objective=iris.

    Without `dreams` it only encodes, and needs no heads. Raises CheckpointError if there is none, ConfigError if it
    knows no rewards.
    """
    checkpoint = find(Path(path_or_name).expanduser())
    values = read_state(checkpoint).get("world") or {}
    is_of_tokens = "tokens" in values
    world = _token_world(checkpoint, values) if is_of_tokens else _latent_world(checkpoint, dreams)
    if world.contract.block > 1:
        raise ConfigError(
            [f"{checkpoint}: its actions are blocks of {world.contract.block}; train it with frame_skip=1"]
        )
    return world.eval().requires_grad_(False)


def _latent_world(checkpoint: Path, dreams: bool) -> LatentWorld:
    world = load_world(checkpoint)
    if dreams and (missing := [name for name in ("reward", "continuation") if name not in world.heads]):
        reason = f"{checkpoint}: the world has no head {missing[0]}"
        raise ConfigError([f"{reason}; add it to objective.heads, or in a run of jepa-rl {FIT_AGAIN}"])
    return LatentWorld(world)


def _token_world(checkpoint: Path, values: dict[str, Any]) -> TokenWorld:
    where = f"{checkpoint / 'state.json'}: world"
    as_mapping(values, where, TOKENS_FIELDS)
    contract, _ = read_contract({"predictor": {}, **values})
    encoder: Any = open_encoder(checkpoint)
    tensors, frames = load_model(checkpoint), values["num_frames"]
    fields = {"actions": Field(shape=(frames - 1, *contract.actions.shape), space=contract.actions)}
    fields |= {"rewards": Field(shape=(frames - 1,))} if "dynamics.outcome.weight" in tensors else {}
    settings = values["tokens"]
    model = load_built(lambda: IRIS(encoder=encoder, fields=fields, **settings), tensors, where, settings)
    if model.dynamics.outcome is None:
        raise ConfigError([f"{checkpoint}: it learnt no rewards, since its data have none"])
    state = read_state(checkpoint)
    return TokenWorld(model, contract, state["mean"], state["std"])
