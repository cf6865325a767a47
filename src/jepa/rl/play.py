"""jepa-play: an episode in the environment and in the dream at once, under a policy, a script or typed keys."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.io import encode_png

from jepa.config import PlayConfig, build_with
from jepa.envs.types import BatchedEnv, check_actions, stored_node
from jepa.errors import ConfigError
from jepa.evaluation.pictures import enlarge, montage
from jepa.planning.report import write_video
from jepa.reports.page import data_url, image, render
from jepa.rl.film import Film, Stage, follow
from jepa.rl.policy import Actor, load_actor
from jepa.rl.report import columns
from jepa.runs.metrics import write_atomically
from jepa.types import ActionSpace

NUM_SHOWN = 8
"""Last frames of an episode that the page shows."""
SIDE = 128
QUIT = "q"


def play(config: PlayConfig) -> Path:
    """Play the episodes and write play.mp4 and play.html; returns the page. Raises ConfigError for unusable actions."""
    actor = load_actor(config.run, dreams=True)
    actor.greedy = config.greedy
    env = make_env(config, actor)
    folder = Path(config.output or Path(config.run, "play")).expanduser()
    script = None if config.actions is None else scripted(config.actions, actor.world.actions)
    folder.mkdir(parents=True, exist_ok=True)
    page, films = folder / "play.html", []
    for episode in range(config.episodes):
        stage = Stage(env, actor, config.seed + episode)
        if config.typed:
            follow_keys(stage, config, sys.stdin, partial(draw_again, page, config, films, stage))
        else:
            follow(stage, config.steps, script)
        films.append(stage.film())
        print(summary(episode, stage), flush=True)
    write_page(page, config, films)
    write_video(folder / "play.mp4", [columns(one) for one in films])
    return page


def draw_again(page: Path, config: PlayConfig, films: Sequence[Film], stage: Stage) -> None:
    write_page(page, config, [*films, stage.film()], refreshes=True)


def make_env(config: PlayConfig, actor: Actor) -> BatchedEnv:
    """That of the configuration, else that of the world's episodes."""
    node = config.env or dict(stored_node(actor.world.contract.env, Path(config.run)))
    env = build_with(node)
    actor.world.contract.check(env)
    return env


def scripted(actions: Sequence[Any] | str, space: ActionSpace) -> np.ndarray:
    """A list of actions, or a file with one a line. Raises ConfigError if they are not of this space."""
    try:
        if isinstance(actions, str):
            text = Path(actions).expanduser().read_text(encoding="utf-8")
            rows = [[float(number) for number in line.split()] for line in text.splitlines() if line.strip()]
            actions = [row[0] for row in rows] if space.is_discrete else rows
        return check_actions(space, np.array(actions, dtype=float), len(actions))
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise ConfigError([f"actions: {error}"]) from error


def follow_keys(stage: Stage, config: PlayConfig, lines: Iterable[str], draw: Callable[[], None]) -> None:
    """Lines of keys, until one says q or there is no step left; unknown keys are told and skipped."""
    space, keys = stage.actor.world.actions, dict(config.keys)
    draw()
    print(f"type actions, then Enter: {', '.join(choices(keys, space))}; {QUIT} ends the episode", flush=True)
    left = config.steps
    for line in lines:
        if line.strip() == QUIT:
            return
        for action in typed_actions(line.strip()[:left], keys, space):
            stage.take(action)
            left -= 1
        draw()
        print(state_of(stage), flush=True)
        if left <= 0 or (stage.has_ended and stage.dream_has_ended):
            return


def choices(keys: Mapping[str, Any], space: ActionSpace) -> list[str]:
    digits = [str(number) for number in range(min(10, space.num_actions))]
    return [*(f"{key} for {action}" for key, action in keys.items()), *digits]


def typed_actions(line: str, keys: Mapping[str, Any], space: ActionSpace) -> Iterator[np.ndarray]:
    for key in line.replace(" ", ""):
        value = keys.get(key, int(key) if key.isdigit() and space.is_discrete else None)
        try:
            yield check_actions(space, np.array([value], dtype=float), 1)[0]
        except ValueError as error:
            print(f"{key}: {error}" if value is not None else f"{key}: no such key; {', '.join(choices(keys, space))}")


def state_of(stage: Stage) -> str:
    real, dreamt = (sum(part) for part in zip(*stage.rewards, strict=True)) if stage.rewards else (0, 0)
    ends = [name for name, ended in (("episode", stage.has_ended), ("dream", stage.dream_has_ended)) if ended]
    ended = "".join(f"; the {name} has ended" for name in ends)
    return f"step {len(stage.actions)}: real {real:.3g}, dreamt {dreamt:.3g}{ended}"


def summary(episode: int, stage: Stage) -> str:
    return f"episode {episode}, {state_of(stage)}"


def write_page(path: Path, config: PlayConfig, films: Sequence[Film], *, refreshes: bool = False) -> None:
    """The last frames of each episode, real ones above dreamt ones."""
    episodes = []
    for number, one in enumerate(films):
        frames = [enlarge(part[-NUM_SHOWN:], SIDE) for part in columns(one)]
        png = bytes(encode_png(montage(frames).permute(2, 0, 1)).numpy())
        title = f"episode {number}: real return {one.real_rewards.sum():.3g}, dreamt {one.dreamt_rewards.sum():.3g}"
        episodes.append((title, image(data_url(png), title), " ".join(map(str, one.actions.tolist()))))
    page = render("play.html", name=str(config.run), episodes=episodes, refreshes=refreshes)
    write_atomically(path, page)
