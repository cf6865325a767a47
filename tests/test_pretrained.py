"""Encoders that begin with weights: stored positions, timm's models, and runs that go on from a source."""

from __future__ import annotations

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.layers.position import resampled
from jepa.types import PatchGrid

SIZES = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("wanted", [(5, 6), (2, 3), (4, 3)])
def test_a_table_is_resampled_in_space_as_timm_does_it(wanted) -> None:
    table = noise(12, 8)
    ours = resampled(table, PatchGrid(1, 4, 3), PatchGrid(1, *wanted))
    timms = resample_abs_pos_embed(table[None], new_size=wanted, old_size=(4, 3), num_prefix_tokens=0, antialias=False)
    torch.testing.assert_close(ours, timms[0])


def test_a_table_is_resampled_in_time_on_straight_lines() -> None:
    grid = PatchGrid(4, 2, 3)
    rows = torch.arange(4.0).repeat_interleave(6)[:, None].expand(-1, 5)  # the time itself
    halves = resampled(rows, grid, PatchGrid(2, 2, 3))
    torch.testing.assert_close(halves, torch.tensor([0.5, 2.5]).repeat_interleave(6)[:, None].expand(-1, 5))


@pytest.mark.parametrize(("kind", "clip_shape"), [(SpatialEncoder, (3, 1, 32, 24)), (TemporalEncoder, (3, 4, 32, 24))])
def test_stored_positions_begin_as_sines_and_are_weights_that_are_not_trained(kind, clip_shape) -> None:
    torch.manual_seed(0)
    plain = kind(clip_shape=clip_shape, **SIZES)
    torch.manual_seed(0)
    stored = kind(clip_shape=clip_shape, **SIZES, position="table")
    clips, keep = noise(2, *clip_shape), torch.tensor([[0, 5, 7], [1, 2, 10]])
    assert torch.equal(plain(clips, keep), stored(clips, keep))
    assert stored.state_dict().keys() - plain.state_dict().keys() == {"positions.table"}
    assert dict(stored.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    with torch.no_grad():
        stored.positions.table.add_(1)
    assert not torch.equal(stored(clips), plain(clips))
    torch.manual_seed(0)
    again = kind(clip_shape=clip_shape, **SIZES, position="table")
    assert torch.equal(again(clips), plain(clips)), "tables of two encoders are one tensor"


def test_stored_positions_of_another_grid_are_those_of_the_clip_shape_resampled() -> None:
    encoder = SpatialEncoder(clip_shape=(3, 1, 32, 24), **SIZES, position="table").eval()
    larger = SpatialEncoder(clip_shape=(3, 1, 40, 48), **SIZES, position="table").eval()
    table = resampled(encoder.positions.table, encoder.frame_grid, larger.frame_grid)
    larger.load_state_dict(encoder.state_dict() | {"positions.table": table})
    images = noise(2, 3, 40, 48)
    torch.testing.assert_close(encoder(images), larger(images))


def test_layer_norms_have_the_epsilon_that_is_asked_for() -> None:
    encoder = SpatialEncoder(clip_shape=(3, 1, 16, 16), **SIZES, norm_eps=0.5)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [0.5] * 5
