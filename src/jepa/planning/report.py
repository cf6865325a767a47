"""What a planning run shows: table, film strips, success over distance, cost landscape, page and video."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import write_png

from jepa.config import PlanConfig
from jepa.envs.types import BatchedEnv, EnvTraits, Task
from jepa.evaluation.pictures import enlarge, heatmap, montage, resize_nearest, to_rgb
from jepa.planning.control import Controller, Planning
from jepa.planning.costs import cost_at_rest
from jepa.planning.plannability import verdict
from jepa.planning.protocol import Played
from jepa.planning.types import Cost
from jepa.planning.world import World
from jepa.reports.charts import Chart, Line, line_chart
from jepa.reports.page import Table, picture, render
from jepa.runs.metrics import MEDIA, write_atomically

log = logging.getLogger(__name__)
ROW_WIDTH = 10
"""Least characters of a column of rows that are printed one by one."""
NUM_STRIP = 8
"""Frames of a film strip."""
VIDEO_SIDE, VIDEO_RATE = 192, 10
"""Pixels of a frame in the video, frames per second."""
NUM_BINS = 5
LANDSCAPE = 32
"""Points along each axis of a cost landscape."""


def table(results: Mapping[str, Any]) -> Table:
    """A row for each policy, with 95 % intervals in percent."""
    rows = []
    for found in results["rows"]:
        cells = scores_of(found)
        seed = "mean" if found["seed"] is None else str(found["seed"])
        costs = (
            f"{found['seconds_per_episode']:.3f}",
            f"{found['ms_per_step']:.2f}",
            f"{found['predictor_rows']:,.0f}",
        )
        name = " ".join(filter(None, [found["world"], f"({found['encoder']})" if "encoder" in found else ""]))
        rows.append([found["policy"], found["cost"], name, seed, str(found["episodes"]), *cells, *costs])
    scores = score_heads(results["rows"])
    heads = ("", "cost", "world", "seed", "episodes", *scores, "s/episode", "ms/step", "rows/episode")
    return Table(heads=heads, rows=rows, text_columns={1, 2})


def row_lines(found: Mapping[str, Any], *, with_head: bool) -> str:
    """The row of a policy for the console as soon as it is known, at first below the heads of its columns."""
    return "\n".join(table({"rows": [found]}).terminal(ROW_WIDTH).splitlines()[not with_head :])


def scores_of(found: Mapping[str, Any]) -> list[str]:
    """Success by both criteria, or the return where there are no goals."""
    if "mean_return" in found:
        return [returned(found)]
    return [share(found, name) for name in ("moderate", "strict")]


def score_heads(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return ["return"] if any("mean_return" in found for found in rows) else ["moderate %", "strict %"]


def share(found: Mapping[str, Any], name: str) -> str:
    """Success and its interval in percent: 97 (92-99)"""
    low, high = found[f"interval_{name}"]
    return f"{100 * found[f'success_{name}']:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def encoder_table(results: Mapping[str, Any]) -> Table | None:
    """Success and figures of the worlds on each encoder; None if no encoders were compared."""
    compared = results.get("encoders") or []
    names = list(dict.fromkeys(name for found in compared for name in found["plannable"]))
    rows = [
        [found["encoder"], str(found["episodes"]), *scores_of(found)]
        + [f"{found['plannable'][name]:.3f}" if name in found["plannable"] else "-" for name in names]
        for found in compared
    ]
    return Table(heads=["encoder", "episodes", *score_heads(compared), *names], rows=rows) if compared else None


def returned(found: Mapping[str, Any]) -> str:
    """Mean return and its interval: 8.60 (8.12 to 9.08)"""
    low, high = found["interval_return"]
    return f"{found['mean_return']:.2f} ({low:.2f} to {high:.2f})"


def plannable_table(results: Mapping[str, Any]) -> Table:
    """Figures of every world, and what they say."""
    names = list(dict.fromkeys(name for figures in results["plannable"].values() for name in figures))
    rows = [
        [label, *(f"{figures[name]:.3f}" if name in figures else "-" for name in names), verdict(figures)]
        for label, figures in results["plannable"].items()
    ]
    return Table(heads=["world", *names, "is this latent plannable?"], rows=rows, text_columns={len(names) + 1})


def terminal(results: Mapping[str, Any], folder: Path) -> str:
    tables = filter(None, [table(results), plannable_table(results), encoder_table(results)])
    return "\n".join([*(part.terminal() for part in tables), f"page: {folder / 'plan.html'}"])


def save_strips(
    folder: Path, contender: Any, played: Played, controller: Controller, env: BatchedEnv, tasks: Sequence[Task],
    count: int,
) -> None:  # fmt: skip
    """Film strips of the first episodes as PNG, and a video, with the goal and what the world imagined."""
    if not played.frames:
        return
    media = folder / MEDIA
    media.mkdir(parents=True, exist_ok=True)
    traits, shown_tasks = EnvTraits.of(env), tasks[: len(played.frames)]
    goals = None
    if traits.task and traits.render:
        goals = traits.render(np.stack([task.goal for task in shown_tasks]))
    films = []
    for number, frames in enumerate(played.frames):
        agent = to_rgb(torch.from_numpy(frames))
        columns = [agent]
        if goals is not None:
            columns.append(to_rgb(torch.from_numpy(goals[number]))[None].expand(len(agent), -1, -1, -1))
        if isinstance(controller, Planning) and (imagined := controller.film(number, len(agent))) is not None:
            columns.append(resize_nearest(to_rgb(imagined)[None], agent.shape[-2:])[0])
        films.append(columns)
    stem = "-".join(filter(None, (contender.policy, contender.cost, contender.label.replace("/", "_"))))
    write_png(strip(films, has_goals=goals is not None).permute(2, 0, 1), str(media / f"strip-{stem}.png"))
    if isinstance(controller, Planning):
        write_video(media / f"{stem}.mp4", films)


def strip(films: Sequence[Sequence[Tensor]], *, has_goals: bool) -> Tensor:
    """Films of columns [T, 3, h, w] -> [H, W, 3]: evenly spaced frames of each column in a row.

    The first column is the agent. With goals the second one is the goal, which ends each row instead of having one.
    """
    rows = []
    for agent, *others in films:
        picks = np.linspace(0, len(agent) - 1, min(NUM_STRIP, len(agent))).round().astype(int)
        goal, imagined = (others[0][:1], others[1:]) if has_goals else (agent[:0], others)
        rows += [enlarge(torch.cat([film[picks], goal]), 64) for film in (agent, *imagined)]
    return montage(rows)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """PyAV does not say which file it cannot write."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_video(path: Path, films: Sequence[Sequence[Tensor]]) -> None:
    """agent | goal (if there is one) | imagined side by side, one episode after the other, as h264."""
    try:
        import av
    except ImportError:
        log.warning("no video is written: pip install 'jepa-train[video]'")
        return
    with _named_errors(path), av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=VIDEO_RATE)
        stream.height, stream.width, stream.pix_fmt = VIDEO_SIDE, VIDEO_SIDE * len(films[0]), "yuv420p"
        for columns in films:
            frames = [resize_nearest(column[None], (VIDEO_SIDE, VIDEO_SIDE))[0] for column in columns]
            for together in torch.cat(frames, dim=3).permute(0, 2, 3, 1).contiguous().numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(together, format="rgb24")))
        container.mux(stream.encode())


def write(
    folder: Path, config: PlanConfig, results: Mapping[str, Any], env: BatchedEnv, worlds: Mapping[str, World],
    costs: Mapping[str, Cost], tasks: Sequence[Task],
) -> None:  # fmt: skip
    """Write plan.html and plan.md."""
    landscapes = [
        (label, figure) for label, world in worlds.items()
        if (figure := landscape(folder, label, world, costs, env, tasks[0])) is not None
    ]  # fmt: skip
    strips = [
        (path.stem.removeprefix("strip-"), picture(path)) for path in sorted((folder / MEDIA).glob("strip-*.png"))
    ]
    encoders = encoder_table(results)
    page = render(
        "planning.html", name=config.name, result=table(results), plannable=plannable_table(results), encoders=encoders,
        tasks=results["tasks"], budget=config.budget, landscapes=landscapes, strips=strips,
        has_goals=EnvTraits.of(env).task is not None,
        charts=[chart for chart in [success_chart(results, env)] if chart],
    )  # fmt: skip
    write_atomically(folder / "plan.html", page)
    text = [
        f"# {config.name}",
        table(results).markdown(),
        "## Is this latent plannable?",
        plannable_table(results).markdown(),
        *(["## Encoders as world models", encoders.markdown()] if encoders else []),
    ]
    write_atomically(folder / "plan.md", "\n\n".join(text) + "\n")


def check(results: Mapping[str, Any], env: BatchedEnv) -> None:
    """Raises LookupError, TypeError, ValueError or AttributeError for results of which no page can be made."""
    table(results).markdown()
    plannable_table(results).markdown()
    success_chart(results, env)


def success_chart(results: Mapping[str, Any], env: BatchedEnv) -> Any:
    """Strict success over the length of the shortest path, in bins with about as many tasks."""
    traits = EnvTraits.of(env)
    measure = traits.path_length or traits.distance
    if not (traits.task and measure):
        return None
    lines = []
    for found in sorted(results["rows"], key=lambda found: not found["cost"])[:8]:
        if not found["outcomes"]:
            continue
        starts, goals = (np.array([o[key] for o in found["outcomes"]], dtype=np.float32) for key in ("start", "goal"))
        lengths = measure(starts, goals)
        parts = np.array_split(np.argsort(lengths), NUM_BINS)
        won = np.array([o["strict"] for o in found["outcomes"]])
        points = [(float(lengths[part].mean()), 100 * float(won[part].mean())) for part in parts if len(part)]
        lines.append(Line(name=" ".join(filter(None, (found["policy"], found["cost"], found["world"]))), points=points))
    return line_chart(Chart(title="Success over the length of the way", unit="% strict", axis="length"), lines)


@torch.no_grad()
def landscape(folder: Path, label: str, world: World, costs: Mapping[str, Cost], env: BatchedEnv, task: Task) -> Any:
    """The cost of being at each position, beside the length of the way from there; None if positions are no plane."""
    traits = EnvTraits.of(env)
    if not (traits.render and traits.path_length and traits.extent):
        return None
    (left, right), (top, bottom) = traits.extent
    x, y = np.meshgrid(np.linspace(left, right, LANDSCAPE), np.linspace(top, bottom, LANDSCAPE))
    states = np.repeat(task.start[None], x.size, axis=0)
    states[:, 0], states[:, 1] = x.ravel(), y.ravel()
    goals = np.repeat(task.goal[None], x.size, axis=0)
    target = world.encode(traits.render(goals[:1]))[0]
    encoded = world.encode(traits.render(states))
    values = [cost_at_rest(costs, world, state, target) for state in encoded]
    maps = [np.array(values), traits.path_length(states, goals)]
    scaled = [
        torch.from_numpy((m - m.min()) / max(float(np.ptp(m)), 1e-9)).float().view(LANDSCAPE, LANDSCAPE) for m in maps
    ]
    (folder / MEDIA).mkdir(exist_ok=True)
    path = folder / MEDIA / f"landscape-{label.replace('/', '_')}.png"
    write_png(montage([enlarge(heatmap(torch.stack(scaled)), 192)]).permute(2, 0, 1), str(path))
    return picture(path)
