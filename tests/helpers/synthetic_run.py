"""Run folders as a training leaves them, drawn from formulas, for tests of the report and for looking at it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch

from jepa.evaluation.types import EmbeddingTable, Evaluation, Picture
from jepa.runs.metrics import FolderLogger

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross", "bar", "crescent")


def write_run(
    folder: Path, *, steps: int = 3000, log_every: int = 10, eval_every: int = 500, name: str = "quickstart",
    kind: str = "learning", status: str = "finished", message: str = "", pictures: bool = True, classes: int = 8,
    clips: bool = False,
) -> Path:  # fmt: skip
    """`kind` is learning or collapsing; `classes` 0 is a run without labels; `eval_every` 0 one without evaluations.

    `clips` is a run on clips with measured positions and velocities that predicts the future.
    """
    rng = np.random.default_rng(0)
    config = {"name": name, "batch_size": 64, "lr": 1e-3, "encoder": {"patch_size": 8, "embed_dim": 192}}
    logger = FolderLogger(folder=folder, config=config, run_id="a1b2c3d4", resume_step=None)
    (folder / "config.yaml").write_text(json.dumps(config, indent=2))
    for step in range(steps + 1):
        place = {"epoch": step * 64 / 20000, "samples": step * 64}
        if step and (step % log_every == 0 or step == steps):
            logger.log(step, place | _training_row(step, steps, kind, rng))
        if eval_every and (step % eval_every == 0 or step == steps):
            logger.log(step, place | _evaluation_row(step, steps, kind, classes, rng))
            logger.log(step, _motion_row(step, steps) if clips else {})
            if pictures:
                logger.show(step, _evaluation(step / max(1, steps), classes, rng))
    logger.close(status)
    (folder / "run.json").write_text(json.dumps({"run_id": "a1b2c3d4", "status": status, "message": message}))
    return folder


def _training_row(step: int, steps: int, kind: str, rng: np.random.Generator) -> dict[str, float]:
    done = step / steps
    loss = 0.9 * math.exp(-12 * done) + 0.35 + 0.12 * done + 0.02 * rng.normal()
    if kind == "collapsing":
        loss = 0.5 * math.exp(-9 * done)
    return {
        "train/loss": loss,
        "train/grad_norm": 0.3 + 20 * math.exp(-40 * done) * (1 + 0.3 * rng.random()) + 0.1 * rng.random(),
        "train/skipped": 0.0,
        "train/lr": 1e-3 * min(1.0, done / 0.1) * (0.5 + 0.5 * math.cos(math.pi * max(0.0, done - 0.1) / 0.9)),
        "train/weight_decay": 0.4 - 0.36 * (0.5 + 0.5 * math.cos(math.pi * done)),
        "train/momentum": 0.996 + 0.004 * done,
        "perf/samples_per_s": 820 + 60 * rng.normal(),
        "perf/data_wait": abs(0.012 + 0.006 * rng.normal()),
    }


def _evaluation_row(step: int, steps: int, kind: str, classes: int, rng: np.random.Generator) -> dict[str, float]:
    done = step / max(1, steps)
    good = (1 - math.exp(-3 * done)) if kind == "learning" else -0.4 * done
    fall = math.exp(-7 * done) if kind == "collapsing" else 1.0
    row = {
        "collapse/rank": 18 + 30 * good * fall,
        "collapse/rank_centred": 1 + (35 + 40 * good) * fall,
        "collapse/std": 0.4 * fall + 0.3 * max(good, 0),
        "collapse/std_min": 0.1 * fall,
        "collapse/cosine": 1 - 0.4 * fall - 0.2 * max(good, 0),
        "collapse/norm": 9.0 + 2 * done,
        "predict/error": (1.0 - 0.55 * max(good, 0)) * fall,
        "predict/trivial_error": 1.02 * fall,
        "predict/gain": 0.02 + 0.5 * max(good, 0),
        "mask/coverage_context_min": 0.21,
    }
    if classes:
        row |= {"probe/linear_top1": 33 + 38 * good + rng.normal(), "probe/knn_top1": 27 + 33 * good + rng.normal()}
    if step == 0:
        row |= {"baseline/pixels_rank": 12.4}
        row |= {"baseline/pixels_linear_top1": 35.2, "baseline/pixels_knn_top1": 29.7} if classes else {}
    return row


def _motion_row(step: int, steps: int) -> dict[str, float]:
    good = 1 - math.exp(-3 * step / max(1, steps))
    row = {
        "probe/attentive_top1": 35 + 45 * good, "still/attentive_top1": 34 + 30 * good,
        "still/linear_top1": 31 + 25 * good, "still/knn_top1": 26 + 20 * good,
        "probe/position_r2": 40 + 50 * good, "still/position_r2": 38 + 35 * good,
        "probe/velocity_r2": 5 + 60 * good, "still/velocity_r2": -1.5 + 2 * good,
        "predict/copy_error": 0.8, "predict/copy_gain": -0.3 + 0.7 * good,
    }  # fmt: skip
    for ahead in range(1, 5):
        row |= {
            f"predict/error_h{ahead}": 0.5 - 0.3 * good + 0.08 * ahead,
            f"predict/copy_error_h{ahead}": 0.5 + 0.15 * ahead,
            f"predict/trivial_error_h{ahead}": 1.02,
        }
    if step == 0:
        row |= {"baseline/pixels_position_r2": 61.0, "baseline/pixels_velocity_r2": 0.8}
    return row


def _evaluation(done: float, classes: int, rng: np.random.Generator) -> Evaluation:
    labels = rng.integers(0, classes, 256) if classes else np.full(256, -1)
    centres = np.random.default_rng(1).normal(size=(max(1, classes), 24))
    vectors = rng.normal(size=(256, 24)) + 3 * done * centres[np.maximum(labels, 0)]
    thumbnails = torch.from_numpy(rng.integers(0, 255, (256, 3, 32, 32), dtype=np.uint8))
    names = [CLASSES[label % len(CLASSES)] if label >= 0 else "" for label in labels]
    pictures = (
        Picture("masks", _stripes(420, 840, 0.5), "Masks as in training: bright is the context, coloured the targets."),
        Picture("features", _stripes(420, 840, 0.1 + done), "Feature maps: equal colours are equal features."),
        Picture("neighbours", _stripes(600, 460, 0.2 + done), "Nearest neighbours of eight validation images."),
        Picture("coverage", _stripes(192, 400, 0.5), "How often a token is context (left) and target (right)."),
    )
    table = EmbeddingTable("embeddings", torch.from_numpy(vectors).float(), names, thumbnails)
    return Evaluation(pictures=pictures, tables=(table,))


def _stripes(height: int, width: int, phase: float) -> torch.Tensor:
    """uint8 [H, W, 3]"""
    y, x = torch.meshgrid(torch.arange(height) // 12, torch.arange(width) // 12, indexing="ij")
    waves = [torch.sin(x * (0.21 + 0.05 * k) + y * 0.13 * (k + 1) + 5 * phase * k) for k in range(3)]
    return ((torch.stack(waves, dim=-1) + 1) * 127).to(torch.uint8)
