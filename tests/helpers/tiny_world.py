"""World models without training, and one that is trained for a few steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jepa.cli import train
from jepa.data.transforms import EvalTransform
from jepa.encoders.spatial import SpatialEncoder
from jepa.planning.heads import build_head
from jepa.planning.metric import Metric
from jepa.planning.world import World, WorldContract
from jepa.predictors.action import ActionPredictor
from jepa.types import ActionSpace, Field

PIXELS = ActionSpace(low=(-4.0, -4.0), high=(4.0, 4.0))
"""Of two_rooms."""
TINY = [
    *("experiment=two_rooms", "steps=20", "batch_size=16", "eval_every=20", "save_every=10", "num_workers=0"),
    *("logger=none", "evaluator=[]", "dataset.path=outputs/episodes", "dataset.episodes=40", "dataset.steps=12"),
    *("predictor.width=32", "predictor.state_dim=16", "encoder.embed_dim=16", "objective.head_steps=20"),
    "objective.heads=[probe,value,policy,clone]",
]
"""Overrides of a world of two rooms that takes seconds."""


def make_world(
    space: ActionSpace = PIXELS, *, history: int = 1, block: int = 1, env: Mapping[str, Any] | None = None,
    heads: Mapping[str, int] | None = None, side: int = 64, **options: Any,
) -> World:  # fmt: skip
    """A world of frames [1, side, side] with random weights; `heads` are sizes by name."""
    torch.manual_seed(0)
    encoder = SpatialEncoder(clip_shape=(1, 1, side, side), patch_size=side // 4, embed_dim=8, depth=1, num_heads=2)
    encoder.transform = EvalTransform(image_size=(side, side), mean=(0.5,), std=(0.5,))  # pyright: ignore
    shape = (1, *((block,) if block > 1 else ()), *space.shape)
    fields = {"actions": Field(shape=shape, space=space)}
    sizes = {"state_dim": 6, "width": 16, "depth": 1, "num_heads": 2, "history": history, **options}
    predictor = ActionPredictor(grid=encoder.grid, embed_dim=8, fields=fields, **sizes)
    with torch.no_grad():
        for parameter in predictor.dynamics.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    contract = WorldContract(frame_shape=(1, side, side), actions=space, block=block, frame_skip=1, env=env or {})
    sizes_of = dict(heads or {})
    width = sizes_of.pop("metric", 0)
    built: dict[str, Any] = {name: build_head(name, predictor.state_size, n, history) for name, n in sizes_of.items()}
    if width:
        built["metric"] = Metric(predictor.state_size, width)
        built["metric"].directions.normal_()
    return World(encoder, predictor, contract, built)


def train_world(name: str, overrides: Sequence[str] = ()) -> Path:
    """The run folder, below outputs/ of the working folder."""
    assert train.main([*TINY, f"name={name}", *overrides]) == 0
    return Path("outputs", name)
