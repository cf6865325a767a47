"""What a run of jepa-rl shows: table, what is true of the world, returns, film strips, page and video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import write_png

from jepa.config import RLConfig
from jepa.evaluation.pictures import enlarge, montage, resize_nearest, to_rgb
from jepa.planning.protocol import SCHEMA, read_results
from jepa.planning.report import NUM_STRIP, returned, write_video
from jepa.reports.charts import Chart, Line, line_chart
from jepa.reports.console import header_line
from jepa.reports.page import Table, picture, render
from jepa.rl.evaluate import check_rows
from jepa.rl.film import Film
from jepa.runs.metrics import MEDIA, read_provenance, write_atomically

MAX_SHOWN = 50
"""Longest film."""
ROW_WIDTH = 12
"""Characters of a column of rows that are printed one by one."""
SIDE = 96
"""Pixels of a frame in a film strip."""
MEANINGS = {
    "distinct": "different tokens over different frames",
    "exact_frames": "frames after one dreamt step that are the right one", "reward_recall": "rewards that are expected",
    "false_rewards": "steps without a reward that promise one", "reward_error": "mean error of the expected reward",
    "imagined_return": "return of dreams from the first frames of the evaluated episodes",
    "real_return": "return of these episodes over as many steps",
    "reward_size": "share of the rewards of these episodes that single dreamt steps expect",
}  # fmt: skip


def table(results: Mapping[str, Any]) -> Table:
    """A row for each policy, with 95 % intervals."""
    has_success = any("success" in found for found in results["rows"])
    rows = []
    for found in results["rows"]:
        seed = "mean" if found["seed"] is None else str(found["seed"])
        success = [success_of(found)] if has_success else []
        numbers = (f"{found['mean_steps']:.1f}", f"{found['env_steps']:,}")
        name = " ".join(filter(None, (found["policy"], found.get("run"))))
        rows.append([name, seed, str(found["episodes"]), *success, returned(found), *numbers])
    success_head = ["success %"] if has_success else []
    heads = ["", "seed", "episodes", *success_head, "return", "steps", "steps learnt from"]
    return Table(heads=heads, rows=rows)


def header(config: RLConfig, folder: Path, kind: str) -> str:
    rounds = f"{config.rounds} round{'s' * (config.rounds > 1)}"
    lines = {
        "rl": f"{folder}: a policy that learns in the dreams of a world ({kind})",
        "plan": f"{config.env_steps:,} steps of the environment in {rounds}, {config.world_steps:,} of the world, "
        f"{config.policy_steps:,} of the policy; a row for each evaluated round",
        "report": f"{folder / 'rl.html'}, written at the end",
        "Ctrl-C": "saves after the step and stops; the same command goes on; a second one stops at once",
    }
    return "\n".join(header_line(label, text) for label, text in lines.items())


def row_lines(found: Mapping[str, Any], *, with_head: bool) -> str:
    """The row of a policy for the console as soon as it is known, at first below the heads of its columns."""
    return "\n".join(table({"rows": [found]}).terminal(ROW_WIDTH).splitlines()[not with_head :])


def success_of(found: Mapping[str, Any]) -> str:
    """Share and interval in percent: 97 (92-99)"""
    low, high = found["interval"]
    return f"{100 * found['success']:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def truth_table(figures: Mapping[str, float]) -> Table:
    rows = [[name, f"{figures[name]:.3f}", meaning] for name, meaning in MEANINGS.items() if name in figures]
    return Table(heads=["what the world gets right", "", ""], rows=rows, text_columns={2})


def verdict(figures: Mapping[str, Any]) -> str:
    """One sentence on the imagined return."""
    if reasons := figures["doubts"]:
        return f"not to be trusted: {'; '.join(reasons)}"
    return f"trustworthy: dreams return {figures['imagined_return']:.3g}, episodes {figures['real_return']:.3g}"


def terminal(results: Mapping[str, Any], folder: Path) -> str:
    parts = [table(results).terminal()]
    if "truth" in results:
        parts += [truth_table(results["truth"]).terminal(), f"imagined return: {verdict(results['truth'])}"]
    return "\n".join([*parts, f"page: {folder / 'rl.html'}"])


def write(folder: Path, name: str, results: Mapping[str, Any], films: Sequence[Film]) -> None:
    """Write rl.html and rl.md, the films as PNG and mp4."""
    strips = [(f"episode {number}", save_strip(folder, number, one)) for number, one in enumerate(films)]
    if films:
        write_video(folder / MEDIA / "dreams.mp4", [columns(one) for one in films])
    truth = results.get("truth")
    page = render(
        "rl.html", name=name, machine=machine(folder), result=table(results), truth=truth and truth_table(truth),
        verdict=truth and verdict(truth), strips=strips, charts=charts(results["history"]),
    )  # fmt: skip
    write_atomically(folder / "rl.html", page)
    text = [f"# {name}", table(results).markdown()]
    if truth:
        text += ["## Is the dream true?", truth_table(truth).markdown(), f"The imagined return is {verdict(truth)}."]
    write_atomically(folder / "rl.md", "\n\n".join(text) + "\n")


def machine(folder: Path) -> str:
    """Device, machine and versions of a run, or of the first of several in its folder; empty if unknown."""
    folders = [folder, *(path.parent for path in sorted(folder.glob("*/provenance.json")))]
    provenance = next(filter(None, map(read_provenance, folders)), {})
    versions = ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items())
    return "; ".join(filter(None, [provenance.get("device"), provenance.get("machine"), versions]))


def read(path: Path) -> dict[str, Any]:
    """results.json; empty results if it is not there. Raises FileError with what to do."""
    if not path.exists():
        return {"schema": SCHEMA, "world": {}, "rows": [], "history": []}
    return read_results(path, {"rows": list[dict], "history": list[dict]}, check, check_rows)


def check(results: Mapping[str, Any]) -> None:
    """Raises LookupError, TypeError, ValueError or AttributeError for results of which no page can be made."""
    table(results).markdown()
    charts(results["history"] * 2)
    if "truth" in results:
        truth_table(results["truth"])
        verdict(results["truth"])


def columns(one: Film) -> list[Tensor]:
    """Real and dreamt frames, uint8 [T, 3, h, w] each, of one size."""
    real, dreamt = (to_rgb(torch.from_numpy(frames)) for frames in (one.real, one.dreamt))
    return [real, resize_nearest(dreamt, real.shape[-2:])]


def save_strip(folder: Path, number: int, one: Film) -> Any:
    """Real frames, and below them the dreamt ones."""
    picks = np.linspace(0, len(one.real) - 1, min(NUM_STRIP + 2, len(one.real))).round().astype(int)
    path = folder / MEDIA / f"dream-{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [enlarge(frames[picks], SIDE) for frames in columns(one)]
    write_png(montage(rows).permute(2, 0, 1), str(path))
    return picture(path)


def charts(history: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Real and imagined returns, success, and the truth of the world over the steps of the environment."""
    if len(history) < 2:
        return []
    steps = [float(entry["env_steps"]) for entry in history]

    def line(name: str, values: Sequence[float | None]) -> Line:
        points = [(step, float("nan") if value is None else value) for step, value in zip(steps, values, strict=True)]
        return Line(name=name, points=points)

    returns = [
        line(name, [entry["truth"][key] for entry in history])
        for name, key in (("real", "real_return"), ("imagined", "imagined_return"))
    ]
    names = ("distinct", "exact_frames", "reward_recall", "false_rewards")
    kept = [name for name in names if any(name in entry["truth"] for entry in history)]
    figures = [line(name, [entry["truth"].get(name) for entry in history]) for name in kept]
    axis = "steps of the environment"
    parts = [("Return", "", returns), ("What the world gets right", "share", figures)]
    if any("success" in entry for entry in history):
        successes = [line("success", [100 * entry["success"] for entry in history])]
        parts.insert(1, ("Success", "%", successes))
    return [line_chart(Chart(title=title, unit=unit, axis=axis), lines) for title, unit, lines in parts]
