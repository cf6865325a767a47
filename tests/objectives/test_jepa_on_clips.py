"""The JEPA objective on clips: several mask sets, the future by horizon, several views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.objectives.jepa import JEPA
from jepa.predictors.transformer import TransformerPredictor
from jepa.types import Batch, Masks, MaskSets, PatchGrid

B, T, D = 3, 8, 24
ENCODERS = {"temporal": (TemporalEncoder, {"tubelet_size": 2}), "spatial": (SpatialEncoder, {})}


def make_objective(kind: str = "temporal", num_mask_tokens: int = 1, **changes: Any) -> JEPA:
    torch.manual_seed(0)
    build, options = ENCODERS[kind]
    encoder = build(clip_shape=(3, T, 16, 16), patch_size=8, embed_dim=D, depth=2, num_heads=2, **options)
    predictor = TransformerPredictor(
        grid=encoder.grid, embed_dim=D, num_heads=2, width=24, depth=2, num_mask_tokens=num_mask_tokens
    )
    return JEPA(encoder=encoder, predictor=predictor, batch_size=B, total_steps=10, **changes)


def clips(frames: int = T) -> Batch:
    return Batch(
        torch.randn(B, 3, frames, 16, 16, generator=torch.Generator().manual_seed(1)), {"labels": torch.zeros(B).long()}
    )


def random_masks(grid: PatchGrid, num_context: int, num_targets: int, seed: int) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(grid.num_tokens, generator=generator) for _ in range(B)])
    context, targets = order[:, :num_context], order[:, num_context : num_context + num_targets]
    return Masks(context.sort(dim=1).values, targets.sort(dim=1).values.unsqueeze(1))


def future_masks(grid: PatchGrid, splits: Tensor, horizon: int) -> Masks:
    """Context: all of the step before the split and a bit of the first; targets: the steps that follow."""
    num_patches = grid.h * grid.w
    step = torch.arange(num_patches)
    context = torch.cat([step[:1].expand(len(splits), -1), (splits[:, None] - 1) * num_patches + step], dim=1)
    blocks = (splits[:, None, None] + torch.arange(horizon)[:, None]) * num_patches + step
    return Masks(context, blocks)


def test_the_loss_of_several_mask_sets_is_the_mean_of_theirs() -> None:
    objective, batch = make_objective(num_mask_tokens=2), clips()
    grid = objective.context_encoder.grid
    sets = [random_masks(grid, 5, 9, seed=2), random_masks(grid, 3, 4, seed=3)]
    joined = objective(batch, MaskSets(sets))
    first = objective(batch, sets[0])
    objective.predictor.mask_tokens = nn.Parameter(objective.predictor.mask_tokens.detach().flip(0))
    second = objective(batch, sets[1])
    torch.testing.assert_close(joined.loss, (first.loss + second.loss) / 2)
    torch.testing.assert_close(joined.metrics["prediction"], joined.loss.detach())
    assert joined.embedding.equal(first.embedding)


def test_every_mask_set_trains_a_mask_token_of_its_own() -> None:
    objective = make_objective(num_mask_tokens=2)
    grid = objective.context_encoder.grid
    sets = MaskSets([random_masks(grid, 5, 9, seed=2), random_masks(grid, 3, 4, seed=3)])
    objective(clips(), sets).loss.backward()
    gradient = objective.predictor.mask_tokens.grad
    assert (gradient.abs().sum(dim=1) > 0).all()
    assert not gradient[0].equal(gradient[1])


@pytest.mark.parametrize("kind", ENCODERS)
def test_copying_repeats_the_last_step_of_the_context(kind: str) -> None:
    objective, batch = make_objective(kind), clips()
    grid = objective.context_encoder.grid
    masks = future_masks(grid, torch.tensor([1, 2, 2]), horizon=2)
    diagnosis = objective.diagnose(batch, masks)
    latents = torch.nn.functional.layer_norm(objective.target_encoder(batch.clips), (D,)).unflatten(1, (grid.t, -1))
    targets = torch.stack([latents[row, s : s + 2] for row, s in enumerate((1, 2, 2))])  # [B, 2, h * w, D]
    copies = torch.stack([latents[row, s - 1] for row, s in enumerate((1, 2, 2))])[:, None]
    for horizon in (1, 2):
        future = targets[:, horizon - 1]
        error = (copies[:, 0] - future).square().mean()
        torch.testing.assert_close(diagnosis[f"copy_error_h{horizon}"], error)
        trivial_error = (future - future.mean(dim=(0, 1))).square().mean()
        torch.testing.assert_close(diagnosis[f"trivial_error_h{horizon}"], trivial_error)
    torch.testing.assert_close(diagnosis["copy_error"], (copies - targets).square().mean())
    torch.testing.assert_close(diagnosis["error"], (diagnosis["error_h1"] + diagnosis["error_h2"]) / 2)


def test_no_copy_error_unless_the_targets_are_in_the_future() -> None:
    objective = make_objective()
    diagnosis = objective.diagnose(clips(), random_masks(objective.context_encoder.grid, 5, 9, seed=2))
    assert set(diagnosis) == {"error", "trivial_error", "target_std"}


def test_images_among_clips_are_predicted_on_their_own_grid() -> None:
    objective, batch = make_objective(), clips(frames=1)
    masks = random_masks(PatchGrid(1, 2, 2), 1, 2, seed=4)
    alone = make_objective()
    assert objective(batch, masks).loss.isfinite()
    assert alone.target_encoder(batch.clips).shape == (B, 4, D)


def test_a_future_frame_does_not_reach_its_own_prediction() -> None:
    objective, batch = make_objective("temporal"), clips()
    batch.clips.requires_grad_()
    objective(batch, future_masks(objective.context_encoder.grid, torch.tensor([2, 2, 2]), horizon=2)).loss.backward()
    touched = batch.clips.grad.abs().sum(dim=(0, 1, 3, 4)) > 0  # [T]
    assert touched.tolist() == [True] * 4 + [False] * 4


@pytest.mark.slow
def test_mask_sets_compile_into_one_graph() -> None:
    objective, batch = make_objective(num_mask_tokens=2), clips()
    grid = objective.context_encoder.grid
    sets = MaskSets([random_masks(grid, 5, 9, seed=2), random_masks(grid, 3, 4, seed=3)])
    torch.compiler.reset()
    compiled = torch.compile(objective, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch, sets).loss, objective(batch, sets).loss)
