"""Fit the heads of a world model on its stored episodes and keep them in the run folder."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from jepa.data.episode_store import EpisodeStore
from jepa.errors import ConfigError
from jepa.parallel.bars import bar
from jepa.planning.heads import DISCOUNTED, GAMMA, READ_DREAMS, MLPHead, Recordings, fit_head
from jepa.planning.metric import fit_metric
from jepa.planning.refit import DynamicsHead, fit_dynamics
from jepa.planning.world import HEADS_FILE, World, build_predictor, digest_of, load_world
from jepa.predictors.action import ActionPredictor
from jepa.runs.state import find
from jepa.seeding import derive_seed
from jepa.types import ActionSpace

log = logging.getLogger(__name__)
PICTURE_SIDE = 32
"""Pixels of a decoded picture."""
FORESIGHT = 8
"""Largest number of steps after which values see imagined states."""
DEFAULT_STEPS = 4000
DEFAULT_FRAMES = 100_000


def fit_heads(
    folder: Path, store: EpisodeStore, names: Sequence[str], *, num_steps: int = DEFAULT_STEPS,
    num_episodes: int | None = None, max_frames: int = DEFAULT_FRAMES, gamma: float = GAMMA, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Fit those heads that the world in `folder` lacks, each saved as soon as it is fitted; returns their last losses.

    They see the first `num_episodes` at most, so that those held out are new to them too, and no more than `max_frames`
    of them. Values and returns discount a step by `gamma`. The dynamics are fitted before all others, the value before
    the policy, which needs it. Raises ConfigError if the episodes lack what a head needs.
    """
    world = load_world(folder)
    ordered = sorted(names, key=lambda name: (name != "dynamics", name == "policy"))
    if "dynamics" in names and "dynamics" not in world.heads:
        world.heads.clear()  # they may have been fitted on what was predicted before
    missing = [name for name in ordered if name not in world.heads]
    if not missing:
        return {}
    if "probe" in missing and not store.facts.state_names:
        raise ConfigError([f"objective.heads: probe reads the simulator's state, and {store.folder} has none"])
    if "policy" in missing and "value" not in names and "value" not in world.heads:
        raise ConfigError(["objective.heads: policy needs value, which weights its actions; add value"])
    if not DISCOUNTED.isdisjoint(missing):
        world.gamma = gamma
    begun = time.perf_counter()
    wanted = {"pictures": "decoder" in missing, "dreams": not READ_DREAMS.isdisjoint(missing)}
    relearns = "dynamics" in missing  # it comes first, and all else is recorded again after it
    data = record(world, store, num_episodes=num_episodes, max_frames=max_frames, **({} if relearns else wanted))
    log.info("encoded %s frames in %.0f s", f"{len(data.states):,}", time.perf_counter() - begun)
    losses = {}
    for name in bar(missing, desc="heads"):
        begun = time.perf_counter()
        drawn = derive_seed(seed, 0, 0, f"head {name}")
        if name == "dynamics":
            losses[name] = fit_dynamics(fresh_dynamics(world, drawn), data, num_steps, drawn)
            world.heads[name] = DynamicsHead(world.predictor)
            data = record(world, store, num_episodes=num_episodes, max_frames=max_frames, **wanted)
        elif name == "metric":
            world.heads[name], losses[name] = fit_metric(data)
        else:
            fitted: dict[str, MLPHead] = dict(world.heads.items())  # pyright: ignore[reportAssignmentType]
            world.heads[name], losses[name] = fit_head(name, data, fitted, num_steps, drawn, gamma)
        save_heads(folder, world)
        log.info("head %s: loss %.4g, %.0f s", name, losses[name], time.perf_counter() - begun)
    return losses


def fresh_dynamics(world: World, seed: int) -> ActionPredictor:
    """The predictor of the world, its dynamics as they are before any training: those of moving states fit worse."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_predictor(world.encoder, world.contract, world.predictor.settings, "objective.heads: dynamics")
    world.predictor.actions, world.predictor.dynamics = fresh.actions, fresh.dynamics
    return world.predictor.eval()


@torch.no_grad()
def record(
    world: World, store: EpisodeStore, *, pictures: bool = False, dreams: bool = False, num_episodes: int | None = None,
    max_frames: int = DEFAULT_FRAMES,
) -> Recordings:  # fmt: skip
    """Encode the frames of the first episodes; `pictures` and `dreams` are for the heads that read them."""
    counts = np.cumsum(store.lengths[:num_episodes] + 1)
    number = max(1, int(np.searchsorted(counts, max_frames, side="right")))
    block = world.contract.block
    parts: list[tuple[Tensor, ...]] = []
    ends, total = [], 0
    for episode in range(number):
        arrays = store.read(episode)
        frames = np.ascontiguousarray(arrays["frames"][::block])
        steps = len(frames) - 1
        actions = torch.from_numpy(arrays["actions"][: steps * block].copy())
        codes, states = world.predictor.actions.scale(actions), world.encode(frames)
        acted = actions if block == 1 else actions.unflatten(0, (-1, block))
        transitions = [arrays[name][: steps * block].reshape(steps, block) for name in ("rewards", "terminated")]
        parts.append((
            states.flatten(1),
            torch.cat([codes.reshape(steps, -1), torch.zeros(1, codes[0].numel() * block)]),
            torch.from_numpy(np.append(0, transitions[0].sum(axis=1)).astype(np.float32)),
            torch.from_numpy(np.append(0, transitions[1].any(axis=1)).astype(np.float32)),
            torch.from_numpy(arrays["states"][::block].copy()),
            small(frames) if pictures else torch.zeros(0, 0),
            *(foresee(world, states, acted, depth).flatten(1) for depth in ((1, FORESIGHT) if dreams else (1,))),
        ))  # fmt: skip
        total += steps + 1
        ends += [total - 1] * (steps + 1)
    columns = [torch.cat(part) for part in zip(*parts, strict=True)]
    states, taken, rewards, terminated, simulator, small_frames, *foreseen = columns
    space: ActionSpace = store.facts.actions
    known = (states, torch.tensor(ends), taken, rewards, terminated, simulator, small_frames, space)
    return Recordings(*known, world.history, *foreseen)


def foresee(world: World, states: Tensor, actions: Tensor, depth: int) -> Tensor:
    """States [T, S, Z] and the actions between them -> each as predicted from one 1 to `depth` steps before.

    Every `depth`th state begins a rollout. The first states, which have too few before them, stay as they are.
    """
    history, predicted = world.history, states.clone()
    count, rest = divmod(max(0, len(states) - history), depth)
    whole = history - 1 + depth * torch.arange(count)
    for firsts, steps in ((whole, depth), (history - 1 + depth * torch.tensor([count]), rest)):
        if len(firsts) and steps:
            known, acted = (firsts[:, None] + torch.arange(1 - history, end) for end in (1, steps))
            after = firsts[:, None] + torch.arange(1, steps + 1)
            predicted[after] = world.rollout(states[known], actions[acted])
    return predicted


def small(frames: np.ndarray) -> Tensor:
    """uint8 [n, C, H, W] -> float32 [n, C * side * side] in [0, 1]"""
    pictures = torch.tensor(frames).float() / 255
    return F.interpolate(pictures, size=(PICTURE_SIDE, PICTURE_SIDE), mode="area").flatten(1)


def save_heads(folder: Path, world: World) -> None:
    """Write heads.safetensors, then heads.json, each atomically."""
    tensors = {f"{name}.{key}": value for name, head in world.heads.items() for key, value in head.state_dict().items()}
    sizes, digests = ({name: of(head) for name, head in world.heads.items()} for of in (attrgetter("size"), digest_of))
    facts = {"checkpoint": find(folder).name, "heads": sizes, "digests": digests, "gamma": world.gamma}
    temporary = folder / f".{HEADS_FILE}.{os.getpid()}"
    save_file(tensors, temporary)
    os.replace(temporary, folder / f"{HEADS_FILE}.safetensors")
    temporary.write_text(json.dumps(facts, indent=1))
    os.replace(temporary, folder / f"{HEADS_FILE}.json")


def decoded(pictures: Tensor, channels: int) -> Tensor:
    """float32 [n, C * side * side] in [0, 1] -> uint8 [n, C, side, side]"""
    return (255 * pictures.clamp(0, 1)).byte().unflatten(1, (channels, PICTURE_SIDE, PICTURE_SIDE))
