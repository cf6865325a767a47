"""Masks of clips: the past against the future, tubes, and the mask sets of V-JEPA."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa.config.rules import mask_errors
from jepa.masks.geometry import CuboidGeometry, TemporalGeometry
from jepa.masks.multiblock3d import MultiBlock3DMasker
from jepa.masks.random import RandomMasker
from jepa.masks.temporal import TemporalMasker
from jepa.masks.tube import TubeMasker
from jepa.types import Masks, MaskSets, PatchGrid

GRID = PatchGrid(8, 3, 5)
GRIDS = [PatchGrid(2, 4, 4), PatchGrid(3, 5, 3), PatchGrid(8, 3, 5), PatchGrid(16, 2, 6)]
VJEPA = [
    {"num_blocks": 8, "spatial_scale": (0.15, 0.15), "aspect": (0.75, 1.5), "temporal_scale": (1.0, 1.0)},
    {"num_blocks": 2, "spatial_scale": (0.7, 0.7), "aspect": (0.75, 1.5), "temporal_scale": (1.0, 1.0)},
]
on_grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.t}x{grid.h}x{grid.w}")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps(tokens: torch.Tensor, grid: PatchGrid) -> torch.Tensor:
    return tokens // (grid.h * grid.w)


def splits(masks: Masks, grid: PatchGrid) -> torch.Tensor:
    """[B]: the first step of the future"""
    return steps(masks.targets[:, 0, 0], grid)


def temporal_node(**values) -> dict:
    return {"_target_": "jepa.masks.temporal.TemporalMasker", **values}


def sets_node(sets: object) -> dict:
    return {"_target_": "jepa.masks.multiblock3d.MultiBlock3DMasker", "sets": sets}


@on_grids
@pytest.mark.parametrize("values", [{}, {"ratio": 0.3}, {"past": 1}, {"split": 1}], ids=str)
def test_the_past_comes_strictly_before_the_future(grid, values):
    masker = TemporalMasker(grid=grid, horizon=max(1, grid.t // 4), **values)
    for seed in range(5):
        masks = masker(32, seeded(seed))
        split = splits(masks, grid)
        assert (steps(masks.context, grid).amax(1) < split).all()
        offsets = torch.arange(masker.horizon)[None, :, None]
        assert (steps(masks.targets, grid) == split[:, None, None] + offsets).all()


@on_grids
def test_the_context_is_as_large_as_the_smallest_past(grid):
    frame, half = grid.h * grid.w, max(1, grid.t // 2)
    assert TemporalMasker(grid=grid)(4, seeded(0)).context.shape == (4, min(half, grid.t - 1) * frame)
    assert TemporalMasker(grid=grid, past=1)(4, seeded(0)).context.shape == (4, frame)
    assert TemporalMasker(grid=grid, split=grid.t - 1)(4, seeded(0)).context.shape == (4, (grid.t - 1) * frame)


def test_a_fixed_split_keeps_the_whole_past():
    masks = TemporalMasker(grid=GRID, horizon=2, split=5)(6, seeded(0))
    assert masks.context.equal(torch.arange(5 * 15).repeat(6, 1))
    assert masks.targets.equal(torch.arange(5 * 15, 7 * 15).reshape(1, 2, 15).repeat(6, 1, 1))


@pytest.mark.parametrize(("values", "first", "last"), [({}, 4, 7), ({"horizon": 3}, 4, 5), ({"past": 1}, 1, 7)])
def test_all_splits_are_drawn_equally_often(values, first, last):
    frequency = splits(TemporalMasker(grid=GRID, **values)(6000, seeded(3)), GRID).bincount(minlength=8) / 6000
    expected = torch.zeros(8)
    expected[first : last + 1] = 1 / (last - first + 1)
    assert (frequency - expected).abs().max() < 6 * (0.25 / 6000) ** 0.5
    assert frequency[expected == 0].sum() == 0


def test_a_long_past_is_thinned_evenly_over_space_and_time():
    masks = TemporalMasker(grid=GRID, past=2)(8000, seeded(4))
    split = splits(masks, GRID)
    for length in range(2, 8):
        rows = masks.context[split == length]
        frequency = torch.zeros(len(rows), GRID.num_tokens).scatter_(1, rows, 1.0).mean(0)[: length * 15]
        assert (frequency - 2 / length).abs().max() < 6 * (0.25 / len(rows)) ** 0.5


def test_a_share_of_each_future_step_is_drawn_from_all_of_it():
    masks = TemporalMasker(grid=GRID, horizon=2, split=6, ratio=0.4)(4000, seeded(5))
    assert masks.targets.shape == (4000, 2, 6)
    assert (masks.targets.diff(dim=-1) > 0).all()
    frequency = torch.zeros(4000, GRID.num_tokens).scatter_(1, masks.targets.flatten(1), 1.0).mean(0)
    assert (frequency[6 * 15 :] - 0.4).abs().max() < 6 * (0.25 / 4000) ** 0.5
    assert TemporalMasker(grid=GRID, ratio=0.001)(2, seeded(0)).targets.shape == (2, 1, 1)


@pytest.mark.parametrize(("values", "named"), [
    ({"horizon": 8}, r"horizon=8 needs 9 time steps, 1 of context and 8 to predict, the clip has 8"),
    ({"horizon": 4, "split": 5}, r"horizon=4 needs 9 time steps with split=5"),
    ({"horizon": 4, "past": 5}, r"horizon=4 needs 9 time steps with past=5"),
    ({"horizon": 0}, r"horizon=0 must be"),
    ({"horizon": 1.5}, r"horizon=1.5 must be"),
    ({"split": 0}, r"split=0 must be"),
    ({"past": True}, r"past=True must be"),
    ({"split": 3, "past": 2}, r"past=2 must be null with split=3"),
    ({"ratio": 0}, r"ratio=0 must"),
    ({"ratio": 1.2}, r"ratio=1.2 must"),
])  # fmt: skip
def test_impossible_temporal_masks_are_refused_with_value_and_bound(values, named):
    with pytest.raises(ValueError, match=named):
        TemporalMasker(grid=GRID, **values)
    assert len(mask_errors(temporal_node(**values), GRID)) == 1


def test_an_image_has_no_future():
    with pytest.raises(ValueError, match="the clip has 1: choose a dataset that delivers clips"):
        TemporalMasker(grid=PatchGrid(1, 4, 4))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    grid=st.builds(PatchGrid, st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)),
    horizon=st.integers(0, 6),
    split=st.none() | st.integers(0, 6),
    past=st.none() | st.integers(0, 6),
    ratio=st.none() | st.floats(0.01, 1.0),
)
def test_temporal_masks_that_pass_the_check_can_be_drawn(grid, **values):
    if mask_errors(temporal_node(**values), grid):
        with pytest.raises(ValueError, match="="):
            TemporalMasker(grid=grid, **values)
        return
    masks, geometry = TemporalMasker(grid=grid, **values)(5, seeded(0)), TemporalGeometry(grid=grid, **values)
    assert masks.context.shape == (5, geometry.num_context())
    assert masks.targets.shape == (5, values["horizon"], geometry.num_targets())
    assert (steps(masks.context, grid).amax(1) < splits(masks, grid)).all()


@on_grids
def test_a_tube_hides_the_same_patches_in_every_frame(grid):
    masks = TubeMasker(grid=grid, ratio=0.6)(16, seeded(1))
    for tokens in (masks.context, masks.targets[:, 0]):
        frames = tokens.unflatten(1, (grid.t, -1)) - torch.arange(grid.t)[:, None] * grid.h * grid.w
        assert (frames == frames[:, :1]).all()
    together = torch.cat([masks.context, masks.targets[:, 0]], dim=1).sort(dim=1).values
    assert together.equal(torch.arange(grid.num_tokens).repeat(16, 1))


def test_a_tube_through_one_frame_is_a_random_mask():
    grid = PatchGrid(1, 5, 7)
    tube, flat = TubeMasker(grid=grid)(9, seeded(2)), RandomMasker(grid=grid)(9, seeded(2))
    assert tube.context.equal(flat.context)
    assert tube.targets.equal(flat.targets)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.01, 0.99, "half"])
def test_a_tube_without_context_or_target_is_refused(ratio):
    with pytest.raises(ValueError, match=f"ratio={ratio}"):
        TubeMasker(grid=PatchGrid(64, 4, 4), ratio=ratio)


def cuboid(scale: float, duration: float, **values) -> dict:
    return {"num_blocks": 1, "aspect": (1.0, 1.0), **values} | {
        "spatial_scale": (scale, scale),
        "temporal_scale": (duration, duration),
    }


def test_a_block_of_one_size_loses_nothing_and_lies_anywhere():
    grid = PatchGrid(4, 5, 6)
    masks = MultiBlock3DMasker(grid=grid, sets=[cuboid(4 / 30, 0.5)])(4000, seeded(3))
    assert masks.targets.shape == (4000, 1, 2 * 2 * 2)
    assert masks.context.shape == (4000, grid.num_tokens - 8)
    first = masks.targets[:, 0, 0]
    offsets = torch.tensor([0, 1, 6, 7, 30, 31, 36, 37])
    assert (masks.targets[:, 0] == first[:, None] + offsets).all()
    counts = first.bincount(minlength=grid.num_tokens).unflatten(0, (4, 5, 6))
    assert (counts[:3, :4, :5] > 0).all()
    assert counts[:3, :4, :5].sum() == 4000
    assert (counts[:3, :4, :5] / 4000 - 1 / 60).abs().max() < 6 * (1 / 60 / 4000) ** 0.5


def slow_union(grid: PatchGrid, values: dict, draw: random.Random) -> set[tuple[int, int, int]]:
    """Positions (step, row, column) that the blocks of a set cover, in plain loops."""
    hidden = set()
    for _ in range(values["num_blocks"]):
        area, aspect = draw.uniform(*values["spatial_scale"]) * grid.h * grid.w, draw.uniform(*values["aspect"])
        sides = (
            max(1, round(draw.uniform(*values["temporal_scale"]) * grid.t)),
            min(grid.h, max(1, round((area * aspect) ** 0.5))),
            min(grid.w, max(1, round((area / aspect) ** 0.5))),
        )
        axes = []
        for side, whole in zip(sides, (grid.t, grid.h, grid.w), strict=True):
            first = draw.randrange(whole - side + 1)
            axes.append(range(first, first + side))
        hidden |= {(step, row, column) for step in axes[0] for row in axes[1] for column in axes[2]}
    return hidden


@pytest.mark.parametrize("values", [*VJEPA, VJEPA[0] | {"temporal_scale": (0.3, 0.8)}], ids=["8", "2", "short"])
def test_about_nine_draws_in_ten_have_enough_targets_and_nine_in_ten_enough_context(values):
    grid, draw = PatchGrid(4, 9, 9), random.Random(5)
    num_context, num_targets = CuboidGeometry.of(grid, values).counts()
    sizes = [len(slow_union(grid, values, draw)) for _ in range(400)]
    assert sum(size >= num_targets for size in sizes) / 400 > 0.82
    assert sum(size <= grid.num_tokens - num_context for size in sizes) / 400 > 0.82
    assert num_context + num_targets > 0.6 * grid.num_tokens


@pytest.mark.parametrize("values", [VJEPA[0], VJEPA[0] | {"temporal_scale": (0.3, 0.8)}], ids=["long", "short"])
def test_coverage_of_a_mask_set_agrees_with_a_slow_reference(values):
    grid, draw = PatchGrid(3, 6, 8), random.Random(3)
    num_context, num_targets = CuboidGeometry.of(grid, values).counts()
    counts = torch.zeros(2, grid.num_tokens)
    fitting = 0
    while fitting < 800:
        hidden = {(step * 6 + row) * 8 + column for step, row, column in slow_union(grid, values, draw)}
        if num_targets <= len(hidden) <= grid.num_tokens - num_context:
            fitting += 1
            counts[0, draw.sample(sorted(set(range(grid.num_tokens)) - hidden), num_context)] += 1
            counts[1, draw.sample(sorted(hidden), num_targets)] += 1
    masks = MultiBlock3DMasker(grid=grid, sets=[values])(6000, seeded(1))
    for expected, tokens in zip(counts / fitting, (masks.context, masks.targets[:, 0]), strict=True):
        frequency = torch.zeros(6000, grid.num_tokens).scatter_(1, tokens, 1.0).mean(0)
        torch.testing.assert_close(frequency, expected, atol=0.07, rtol=0)


def test_each_mask_set_has_sizes_of_its_own():
    masker = MultiBlock3DMasker(grid=PatchGrid(2, 14, 14), sets=VJEPA)
    masks = masker(3, seeded(0))
    assert isinstance(masks, MaskSets)
    assert masker.num_sets == len(masks.sets) == 2
    assert masks.sets[0].context.shape[1] > 2 * masks.sets[1].context.shape[1]
    assert masks.sets[0].targets.shape[2] < masks.sets[1].targets.shape[2]


@pytest.mark.parametrize(("sets", "named"), [
    (None, r"sets=None must be a list"),
    ([], r"sets=\[\] must be a list"),
    ([3], r"sets.0=3 must be a mask set"),
    ([*VJEPA, {"num_blocks": 3}], r"sets.2=.* must have the key spatial_scale"),
    ([VJEPA[0] | {"num_block": 3}], r"sets.0.num_block=3 must go: a mask set has no 'num_block'; did you mean"),
    ([VJEPA[0] | {"num_blocks": 0}], r"sets.0.num_blocks=0 must be"),
    ([VJEPA[0] | {"spatial_scale": [0.2, 1.2]}], r"sets.0.spatial_scale=\[0.2, 1.2\] must be .* at most 1"),
    ([VJEPA[0] | {"aspect": 1.0}], r"sets.0.aspect=1.0 must be two numbers"),
    ([VJEPA[1], VJEPA[0] | {"temporal_scale": [0.0, 1.0]}], r"sets.1.temporal_scale=\[0.0, 1.0\] must be"),
    ([cuboid(1.0, 1.0)], r"sets.0.spatial_scale=\[1.0, 1.0\] leaves no context with num_blocks=1"),
])  # fmt: skip
def test_impossible_mask_sets_are_refused_with_key_value_and_bound(sets, named):
    with pytest.raises(ValueError, match=named):
        MultiBlock3DMasker(grid=GRID, sets=sets)
    assert len(mask_errors(sets_node(sets), GRID)) == 1


scales = st.tuples(st.floats(0.02, 1.0), st.floats(0.02, 1.0)).map(sorted)
mask_sets = st.fixed_dictionaries({
    "num_blocks": st.integers(1, 5),
    "spatial_scale": scales,
    "aspect": st.tuples(st.floats(0.2, 5.0), st.floats(0.2, 5.0)).map(sorted),
    "temporal_scale": scales,
})  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    grid=st.builds(PatchGrid, st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    sets=st.lists(mask_sets, min_size=1, max_size=2),
)
def test_mask_sets_that_pass_the_check_can_be_drawn(grid, sets):
    if mask_errors(sets_node(sets), grid):
        with pytest.raises(ValueError, match="="):
            MultiBlock3DMasker(grid=grid, sets=sets)
        return
    for values, masks in zip(sets, MultiBlock3DMasker(grid=grid, sets=sets)(9, seeded(0)).sets, strict=True):
        num_context, num_targets = CuboidGeometry.of(grid, values).counts()
        assert (masks.context.shape, masks.targets.shape) == ((9, num_context), (9, 1, num_targets))
        both = torch.cat([masks.context, masks.targets[:, 0]], dim=1).sort(dim=1).values
        assert (both.diff(dim=1) > 0).all()
        assert both.min() >= 0
        assert both.max() < grid.num_tokens
