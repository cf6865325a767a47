"""Every masker against plain loops over the same random numbers, token by token; and sizes at their limits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from jepa.masks.block import BlockMasker
from jepa.masks.geometry import local_size, show_grid
from jepa.masks.multiblock3d import MultiBlock3DMasker
from jepa.masks.none import NoMask
from jepa.masks.random import RandomMasker
from jepa.masks.temporal import TemporalMasker
from jepa.masks.tube import TubeMasker
from jepa.types import PatchGrid

BATCH = 24
GRIDS = [PatchGrid(1, 6, 6), PatchGrid(1, 5, 9), PatchGrid(3, 4, 5)]
Expected = tuple[list[list[int]], list[list[list[int]]]]
"""context and target blocks of each sample"""
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=show_grid)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lowest(keys: Tensor, tokens: list[int], number: int) -> list[int]:
    """Of these tokens the `number` with the smallest keys, in raster order."""
    assert len(tokens) >= number
    return sorted(sorted(tokens, key=lambda token: (float(keys[token]), token))[:number])


def rectangle(row: int, column: int, shape: tuple[int, int], width: int) -> list[int]:
    return [(row + y) * width + column + x for y in range(shape[0]) for x in range(shape[1])]


def through_time(patches: list[int], grid: PatchGrid) -> list[int]:
    return [step * grid.h * grid.w + patch for step in range(grid.t) for patch in patches]


def assert_same(masks: Any, expected: Expected) -> None:
    assert masks.context.tolist() == expected[0]
    assert masks.targets.tolist() == expected[1]


@each_grid
@pytest.mark.parametrize("ratio", [0.3, 0.75])
def test_random_masks_keep_the_tokens_with_the_smallest_keys(grid: PatchGrid, ratio: float) -> None:
    everything, keys = list(range(grid.num_tokens)), torch.rand(BATCH, grid.num_tokens, generator=seeded(1))
    seen = [lowest(row, everything, grid.num_tokens - round(ratio * grid.num_tokens)) for row in keys]
    hidden = [[sorted(set(everything) - set(own))] for own in seen]
    assert_same(RandomMasker(grid=grid, ratio=ratio)(BATCH, seeded(1)), (seen, hidden))


@each_grid
@pytest.mark.parametrize("ratio", [0.3, 0.75])
def test_tubes_are_random_masks_of_one_frame_in_every_frame(grid: PatchGrid, ratio: float) -> None:
    frame = PatchGrid(1, grid.h, grid.w)
    masks = RandomMasker(grid=frame, ratio=ratio)(BATCH, seeded(1))
    seen = [through_time(own, grid) for own in masks.context.tolist()]
    hidden = [[through_time(own[0], grid)] for own in masks.targets.tolist()]
    assert_same(TubeMasker(grid=grid, ratio=ratio)(BATCH, seeded(1)), (seen, hidden))


@pytest.mark.parametrize("grid", [PatchGrid(8, 2, 3), PatchGrid(3, 4, 5), PatchGrid(2, 3, 3)], ids=show_grid)
@pytest.mark.parametrize("values", [{}, {"ratio": 0.3}, {"past": 1}, {"split": 1}, {"past": 1, "ratio": 0.01}], ids=str)
@pytest.mark.parametrize("horizon", [1, 2])
def test_temporal_masks_keep_the_smallest_keys_of_the_past_and_of_each_future_step(
    grid: PatchGrid, values: dict[str, Any], horizon: int
) -> None:
    if horizon + 1 > grid.t:
        horizon = 1
    draws = torch.rand(BATCH, 1 + grid.num_tokens, generator=seeded(2))
    patches, last = grid.h * grid.w, values.get("split", grid.t - horizon)
    first = values.get("split") or values.get("past") or max(1, min(grid.t // 2, last))
    num_targets = max(1, round(values.get("ratio", 1.0) * patches))
    context, targets = [], []
    for row in draws:
        split = first + int(row[0] * (last - first + 1))
        context.append(lowest(row[1:], list(range(split * patches)), first * patches))
        steps = [list(range(step * patches, (step + 1) * patches)) for step in range(split, split + horizon)]
        targets.append([lowest(row[1:], step, num_targets) for step in steps])
    assert_same(TemporalMasker(grid=grid, horizon=horizon, **values)(BATCH, seeded(2)), (context, targets))


def block_by_loops(masker: BlockMasker, row: Tensor, shapes: tuple[Any, Any]) -> tuple[list[int], list[list[int]]]:
    """Context and target blocks of one sample, from its row of random numbers."""
    grid, (target, context) = masker.grid, shapes
    attempts = row[: 4 * (masker.num_targets + 1) * 2].unflatten(0, (4, masker.num_targets + 1, 2))

    def place(draw: Tensor, shape: tuple[int, int]) -> list[int]:
        corner = [
            int(draw[axis] * (size - side + 1)) for axis, (size, side) in enumerate(zip(grid_size, shape, strict=True))
        ]
        return rectangle(*corner, shape, grid.w)

    grid_size = (grid.h, grid.w)
    everything = set(range(grid.h * grid.w))
    for draws in attempts:
        around, blocks = set(place(draws[0], context)), [place(draw, target) for draw in draws[1:]]
        if len(around - set().union(*blocks)) * grid.t >= masker.num_context:
            break
    for number in range(masker.num_targets - 1, 0, -1):
        if len(everything - set().union(*blocks)) * grid.t >= masker.num_context:
            break
        blocks[number] = blocks[0]
    hidden = set().union(*blocks)
    distance = torch.tensor([2.0 if patch in hidden else float(patch not in around) for patch in sorted(everything)])
    scores = row[4 * (masker.num_targets + 1) * 2 :] + distance.repeat(grid.t)
    seen = lowest(scores, list(range(grid.num_tokens)), masker.num_context)
    return seen, [through_time(block, grid) for block in blocks]


@each_grid
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"ratio": None},
        {"ratio": 0.6, "num_targets": 3, "target_scale": (0.1, 0.4), "context_scale": (0.3, 0.8)},
        {"ratio": 0.4, "num_targets": 12},
        {"ratio": 0.55, "num_targets": 5, "target_scale": (0.2, 0.3)},
        {"ratio": 0.65, "num_targets": 1, "target_scale": (0.5, 0.5), "context_scale": (0.05, 0.1)},
    ],
    ids=str,
)
def test_block_masks_take_the_first_of_four_placements_that_leaves_the_context(
    grid: PatchGrid, values: dict[str, Any]
) -> None:
    """Where none does, the surroundings of the context block serve too, then one block after the other moves."""
    masker = BlockMasker(grid=grid, **values)
    for seed in range(4):
        generator = seeded(seed)
        which = torch.rand(2, generator=generator)
        target = masker.target_shapes[int(which[0] * len(masker.target_shapes))]
        context = masker.context_shapes[int(which[1] * len(masker.context_shapes))]
        draws = torch.rand(BATCH, 4 * (masker.num_targets + 1) * 2 + grid.num_tokens, generator=generator)
        rows = [block_by_loops(masker, row, (target, context)) for row in draws]
        assert_same(masker(BATCH, seeded(seed)), ([seen for seen, _ in rows], [blocks for _, blocks in rows]))


def cuboids_by_loops(sampler: Any, keys: Tensor, places: Tensor) -> tuple[list[int], list[list[int]]]:
    """Context and targets of one mask set of one sample; of two placements the first that fits, else the first."""
    grid, drawn, num_tokens = sampler.grid, sampler.block_grid, sampler.grid.num_tokens
    unions = []
    for blocks in places.unflatten(0, (2, sampler.num_blocks, 5)):
        hidden = set()
        for draw in blocks:
            lengths = [
                int(sampler.durations[int(draw[0] * len(sampler.durations))]),
                *sampler.shapes[int(draw[1] * len(sampler.shapes))].int().tolist(),
            ]
            sizes = (drawn.t, drawn.h, drawn.w)
            starts = [int(draw[2 + axis] * (sizes[axis] - lengths[axis] + 1)) for axis in range(3)]
            spans = [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]
            hidden |= {(t * grid.h + y) * grid.w + x for t, y, x in itertools.product(*spans)}
        patches, repeats = drawn.num_tokens, grid.t // drawn.t
        unions.append({copy * patches + token for copy in range(repeats) for token in hidden})
    fitting = [u for u in unions if sampler.num_targets <= len(u) <= num_tokens - sampler.num_context]
    hidden = (fitting or unions)[0]
    order = sorted(range(num_tokens), key=lambda token: (float(keys[token] + (token not in hidden)), token))
    return sorted(order[num_tokens - sampler.num_context :]), [sorted(order[: sampler.num_targets])]


@pytest.mark.parametrize("grid", [PatchGrid(1, 6, 6), PatchGrid(4, 4, 5), PatchGrid(3, 7, 3)], ids=show_grid)
def test_the_mask_sets_of_clips_are_unions_of_cuboids(grid: PatchGrid) -> None:
    sets = [
        {"num_blocks": 4, "spatial_scale": (0.15, 0.15), "aspect": (0.75, 1.5), "temporal_scale": (1.0, 1.0)},
        {"num_blocks": 2, "spatial_scale": (0.3, 0.7), "aspect": (0.5, 2.0), "temporal_scale": (0.3, 1.0)},
        {"num_blocks": 1, "spatial_scale": (0.1, 0.9)},
    ]
    masker = MultiBlock3DMasker(grid=grid, sets=sets)
    for seed in range(4):
        sizes = [sampler.num_draws for sampler in masker.samplers]
        draws = torch.rand(BATCH, grid.num_tokens + sum(sizes), generator=seeded(seed))
        keys, *places = draws.split([grid.num_tokens, *sizes], dim=1)
        for masks, sampler, part in zip(masker(BATCH, seeded(seed)).sets, masker.samplers, places, strict=True):
            rows = [cuboids_by_loops(sampler, *row) for row in zip(keys, part, strict=True)]
            assert_same(masks, ([seen for seen, _ in rows], [hidden for _, hidden in rows]))


@each_grid
def test_no_mask_shows_every_token_of_every_row_asked_for(grid: PatchGrid) -> None:
    masker = NoMask(grid=grid)
    for rows, number in ((None, 5), (torch.tensor([1, 4]), 2)):
        masks = masker(5, seeded(0), rows)
        assert masks.context.tolist() == [list(range(grid.num_tokens))] * number
        assert masks.targets.shape == (number, 0, 0)
        assert not masks.hides_some


@pytest.mark.parametrize(
    ("image", "patch", "expected"),
    [((8, 8), (8, 8), (8, 8)), ((64, 32), (8, 8), (32, 16)), ((24, 40), (8, 8), (16, 16)), ((7, 70), (7, 7), (7, 35))],
)
def test_smaller_crops_are_half_of_the_image_in_whole_patches_and_one_at_least(image, patch, expected) -> None:
    assert local_size(None, image, patch) == expected


def test_the_size_of_smaller_crops_is_taken_as_given() -> None:
    assert local_size(48, (224, 224), (16, 16)) == (48, 48)
    assert local_size([32, 48], (224, 224), (16, 16)) == (32, 48)


def test_a_grid_is_shown_with_its_time_steps_where_there_are_several() -> None:
    assert show_grid(PatchGrid(1, 14, 7)) == "14x7"
    assert show_grid(PatchGrid(8, 14, 7)) == "8x14x7"
