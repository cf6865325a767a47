"""Masks: exact sizes, disjoint, unbiased on any grid, and a function of the generator alone."""

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from jepa.config import factory
from jepa.config.rules import mask_errors
from jepa.masks.block import BlockMasker
from jepa.masks.geometry import BlockGeometry, block_shape, show_grid
from jepa.masks.sampling import smallest, smallest_and_largest, uniform_rows
from jepa.parallel.session import Session
from jepa.training.loop import draw_masks
from jepa.types import Masks, PatchGrid

CONF = Path(__file__).parents[2] / "conf" / "mask"
MASKS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "none")  # none hides nothing
SIZES = [(4, 4), (6, 6), (7, 5), (14, 14), (32, 32), (4, 16), (8, 24), (16, 4)]
IMAGES = [PatchGrid(1, *size) for size in SIZES]
CLIPS = [PatchGrid(2, 4, 4), PatchGrid(4, 6, 6), PatchGrid(3, 7, 5), PatchGrid(8, 14, 14), PatchGrid(16, 4, 16)]

on_images = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
each_mask = pytest.mark.parametrize("name", MASKS)


def each_mask_on(grids: list[PatchGrid], names: list[str] = MASKS):
    """Every pair of a mask and a grid, except temporal masks of a single time step."""
    pairs = [(name, grid) for name in names for grid in grids if name != "temporal" or grid.t > 1]
    return pytest.mark.parametrize(("name", "grid"), pairs, ids=[f"{name}-{show_grid(grid)}" for name, grid in pairs])


def node(name: str) -> dict:
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(values, dict)
    return dict(values)


def build(name: str, size: PatchGrid | tuple[int, int], **changes):
    grid = size if isinstance(size, PatchGrid) else PatchGrid(1, *size)
    return instantiate({**node(name), **changes}, _partial_=True, _convert_="all")(grid=grid)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def covered(tokens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[B, ...] -> [B, N] bool: True for tokens that appear in the row."""
    return torch.zeros(len(tokens), num_tokens, dtype=torch.bool).scatter_(1, tokens.flatten(1), True)


def assert_valid(masks: Masks, num_tokens: int, num_context: int) -> None:
    assert masks.context.dtype == masks.targets.dtype == torch.int64
    assert masks.context.shape[1] == num_context
    assert masks.context.min() >= 0 <= masks.targets.min()
    assert max(masks.context.max(), masks.targets.max()) < num_tokens
    assert (masks.context.diff(dim=-1) > 0).all()
    assert (masks.targets.diff(dim=-1) > 0).all()
    assert not (covered(masks.context, num_tokens) & covered(masks.targets, num_tokens)).any()


def assert_full_rectangles(targets: torch.Tensor, width: int) -> None:
    shapes = set()
    for block in targets.flatten(0, 1).tolist():
        rows = range(block[0] // width, block[-1] // width + 1)
        columns = range(block[0] % width, block[-1] % width + 1)
        assert block == [row * width + column for row in rows for column in columns]
        shapes.add((len(rows), len(columns)))
    assert len(shapes) == 1


def assert_equal(first: Masks, second: Masks) -> None:
    for one, other in zip(first.sets, second.sets, strict=True):
        assert one.context.equal(other.context)
        assert one.targets.equal(other.targets)


def coverage(masker, grid: PatchGrid, seeds: int, batch_size: int = 1024) -> Iterator[tuple[str, torch.Tensor]]:
    """For context and targets: the frequency of each token in the mask sets, float [t, h, w]."""
    draws = [masker(batch_size, seeded(seed)).sets for seed in range(seeds)]
    for part in ("context", "targets"):
        covers = [covered(getattr(masks, part), grid.num_tokens).float().mean(0) for sets in draws for masks in sets]
        yield part, torch.stack(covers).mean(0).unflatten(0, (grid.t, grid.h, grid.w))


@each_mask_on(IMAGES + CLIPS)
def test_tokens_are_sorted_disjoint_and_as_many_as_configured(name, grid):
    masker = build(name, grid)
    samplers = getattr(masker, "samplers", [masker])
    for seed in range(3):
        for masks, sampler in zip(masker(16, seeded(seed)).sets, samplers, strict=True):
            assert_valid(masks, grid.num_tokens, sampler.num_context)
    if name in ("block", "random", "tube"):
        step, num_steps = (PatchGrid(1, grid.h, grid.w), grid.t) if name == "tube" else (grid, 1)
        assert masker.num_context == step.num_context(0.75) * num_steps


@each_mask_on(IMAGES + CLIPS)
def test_masks_of_a_sample_do_not_depend_on_the_batch_size(name, grid):
    masker = build(name, grid)
    many = masker(2048 if grid == PatchGrid(1, 14, 14) else 128, seeded(7))
    assert_equal(masker(3, seeded(7)), many.map(lambda rows: rows[:3]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("views", [1, 2])
@each_mask_on([PatchGrid(1, 14, 14), PatchGrid(4, 6, 6)], [*MASKS, "none"])
def test_the_masks_of_the_ranks_are_rows_of_the_whole(name, grid, views, world_size):
    masker, whole_generator, shares = build(name, grid), seeded(3), []
    whole = masker(24 * views, whole_generator)
    for rank in range(world_size):
        session, generator = Session(torch.device("cpu"), bf16=False, rank=rank, world_size=world_size), seeded(3)
        part = draw_masks(masker, 24 * views, generator, session.local_row_indices(24, views))
        assert_equal(part, whole.map(lambda tokens, take=session: take.local_rows(tokens, views)))
        assert generator.get_state().equal(whole_generator.get_state())
        shares.append(len(part.sets[0].context))
    assert shares == [24 * views // world_size] * world_size


def test_a_masker_that_draws_all_rows_only_serves_several_ranks_too():
    masker, rows = build("random", (6, 6)), torch.tensor([1, 4])
    part = draw_masks(lambda batch_size, generator: masker(batch_size, generator), 6, seeded(1), rows)
    assert_equal(part, masker(6, seeded(1)).map(lambda tokens: tokens[rows]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    before=st.integers(0, 1400),
    num_numbers=st.integers(1, 700),
    rows=st.sets(st.integers(0, 8), min_size=1).map(sorted),
)
def test_selected_rows_equal_those_of_all_and_the_generator_ends_in_the_same_state(before, num_numbers, rows):
    generator, other = seeded(before), seeded(before)
    torch.rand(before, generator=generator)
    torch.rand(before, generator=other)
    whole = uniform_rows(9, num_numbers, generator)
    assert uniform_rows(9, num_numbers, other, torch.tensor(rows)).equal(whole[rows])
    assert torch.rand(5, generator=generator).equal(torch.rand(5, generator=other))
    assert generator.get_state().equal(other.get_state())


@each_mask_on([PatchGrid(4, 6, 6)])
def test_everything_random_comes_from_the_generator(name, grid):
    masker = build(name, grid)
    state = torch.get_rng_state()
    first, other = masker(8, seeded(1)), masker(8, seeded(2))
    torch.manual_seed(99)
    again = masker(8, seeded(1))
    torch.set_rng_state(state)
    assert_equal(first, again)
    assert not first.context.equal(other.context)


@each_mask_on([PatchGrid(4, 6, 6)])
def test_drawing_leaves_the_global_random_state_alone(name, grid):
    state = torch.get_rng_state()
    build(name, grid)(8, seeded(1))
    assert state.equal(torch.get_rng_state())


@each_mask_on(IMAGES + CLIPS)
def test_every_token_is_reached_as_context_and_as_target(name, grid):
    for part, share in coverage(build(name, grid), grid, seeds=3, batch_size=512 if grid.num_tokens > 500 else 1024):
        within = {"context": slice(0, grid.t - 1), "targets": slice(grid.t // 2, None)}[part]
        assert (share[within if name == "temporal" else slice(None)] > 0).all()


@each_mask_on([PatchGrid(1, 6, 6), PatchGrid(1, 14, 14), PatchGrid(1, 4, 16), PatchGrid(4, 6, 6), PatchGrid(2, 5, 9)])
def test_coverage_is_symmetric_under_flips(name, grid):
    for _, share in coverage(build(name, grid), grid, seeds=8):
        for flip in ([1], [2]) if name == "temporal" else ([0], [1], [2]):
            difference = (share - share.flip(flip)).abs().max()
            assert difference < 6 * (2 * 0.25 / 8192) ** 0.5  # six deviations of a binomial


@each_mask_on([PatchGrid(8, 6, 6), PatchGrid(5, 4, 9)], ["block", "random", "tube", "multiblock3d"])
def test_every_time_step_is_seen_and_predicted_equally_often(name, grid):
    for _, share in coverage(build(name, grid), grid, seeds=4):
        by_step = share.mean((1, 2))
        assert (by_step - by_step.mean()).abs().max() < 6 * (0.25 / (4096 * grid.h * grid.w)) ** 0.5


few_or_many_equals = settings(max_examples=60, deadline=None, derandomize=True)


def score_rows(data: st.DataObject) -> torch.Tensor:
    rows = st.lists(st.integers(0, data.draw(st.sampled_from([1, 3, 1000]))), min_size=7, max_size=7)
    return torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=4)), dtype=torch.float32)


@few_or_many_equals
@given(st.data())
def test_the_smallest_scores_are_chosen_in_raster_order_even_among_equal_ones(data):
    scores = score_rows(data)
    number = data.draw(st.integers(1, 7))
    indices = smallest(scores, number)
    assert indices.dtype == torch.int64
    assert (indices.diff(dim=1) > 0).all()
    assert scores.gather(1, indices).sort(dim=1).values.equal(scores.sort(dim=1).values[:, :number])


@few_or_many_equals
@given(st.data())
def test_the_smallest_and_the_largest_scores_are_disjoint(data):
    scores = score_rows(data)
    num_first = data.draw(st.integers(1, 6))
    num_last = data.draw(st.integers(1, 7 - num_first))
    first, last = smallest_and_largest(scores, num_first, num_last)
    in_order = scores.sort(dim=1).values
    assert scores.gather(1, first).sort(dim=1).values.equal(in_order[:, :num_first])
    assert scores.gather(1, last).sort(dim=1).values.equal(in_order[:, -num_last:])
    both = torch.cat([first, last], dim=1).sort(dim=1).values
    assert (both.diff(dim=1) > 0).all()
    assert all((indices.diff(dim=1) > 0).all() for indices in (first, last))


@on_images
@pytest.mark.parametrize("ratio", [0.75, 0.5, None])
def test_blocks_are_full_rectangles_of_one_possible_shape(size, ratio):
    masker = build("block", size, ratio=ratio)
    for seed in range(3):
        masks = masker(8, seeded(seed))
        assert masks.targets.shape[:2] == (8, 4)
        assert_full_rectangles(masks.targets, size[1])
        assert masks.targets.shape[2] in {height * width for height, width in masker.target_shapes}


def test_scale_and_aspect_are_drawn_independently_and_over_their_whole_range():
    masker, shapes = build("block", (32, 32)), []
    for seed in range(400):
        block = masker(1, seeded(seed)).targets[0, 0]
        height = int(block[-1] // 32 - block[0] // 32 + 1)
        shapes.append((height * len(block) // height / 1024, height * height / len(block)))
    scale, aspect = torch.tensor(shapes).T
    assert torch.corrcoef(torch.stack([scale, aspect]))[0, 1].abs() < 0.2
    assert 0.135 < scale.min() < 0.155 < 0.195 < scale.max() < 0.21
    assert 0.65 < aspect.min() < 0.85 < 1.35 < aspect.max() < 1.7


@pytest.mark.parametrize(("size", "scale", "aspect", "shape"), [
    ((8, 8), 1.0, 1.0, (8, 8)),
    ((4, 16), 1.0, 4 / 16, (4, 16)),
    ((8, 8), 0.5, 2.0, (8, 4)),
    ((4, 16), 0.5, 1.0, (4, 8)),
    ((16, 4), 0.5, 1.0, (8, 4)),
    ((4, 4), 0.01, 1.0, (1, 1)),
])  # fmt: skip
def test_a_block_fits_the_grid_and_keeps_its_scale(size, scale, aspect, shape):
    assert block_shape(PatchGrid(1, *size), scale, aspect) == shape


@pytest.mark.parametrize("ratio", [0.75, None])
def test_coverage_agrees_with_a_slow_reference(ratio):
    size, draw = (6, 8), random.Random(3)
    masker = build("block", size, ratio=ratio)
    reference = [slow_sample(size, masker.num_context, draw) for _ in range(6000)]
    draws = [masker(8, seeded(seed)) for seed in range(1500)]
    for part, sets in zip(("context", "targets"), zip(*reference, strict=True), strict=True):
        expected = torch.tensor([sum(token in chosen for chosen in sets) / len(sets) for token in range(48)])
        frequency = torch.cat([covered(getattr(masks, part), 48) for masks in draws]).float().mean(0)
        torch.testing.assert_close(frequency, expected, atol=0.04, rtol=0)


def slow_draw(size, draw, attempts=1):
    """Context block and union of the targets as sets, in plain loops; positions are drawn anew for each attempt."""
    height, width = size

    def block(scale, aspect):
        rows = min(height, max(1, round((scale * height * width * aspect) ** 0.5)))
        columns = min(width, max(1, round((scale * height * width / aspect) ** 0.5)))
        return rows, columns

    def place(shape):
        top, left = draw.randrange(height - shape[0] + 1), draw.randrange(width - shape[1] + 1)
        return {(top + row) * width + left + column for row in range(shape[0]) for column in range(shape[1])}

    target = block(draw.uniform(0.15, 0.2), draw.uniform(0.75, 1.5))
    large = block(draw.uniform(0.85, 1.0), height / width)
    for _ in range(attempts):
        yield place(large), set().union(*(place(target) for _ in range(4)))


def slow_sample(size, num_context, draw):
    """Context and union of the targets of one sample."""
    tokens = set(range(size[0] * size[1]))
    for around, hidden in slow_draw(size, draw, attempts=4):
        if len(around - hidden) >= num_context:
            return set(draw.sample(sorted(around - hidden), num_context)), hidden
    if len(tokens - hidden) < num_context:
        return slow_sample(size, num_context, draw)
    extra = draw.sample(sorted(tokens - around - hidden), num_context - len(around - hidden))
    return (around - hidden) | set(extra), hidden


@pytest.mark.parametrize("size", [(4, 4), (14, 14), (5, 9)], ids=str)
def test_context_stays_exact_when_the_targets_leave_too_little(size):
    masker, grid = build("block", size, ratio=0.4, num_targets=12), PatchGrid(1, *size)
    for seed in range(5):
        masks = masker(64, seeded(seed))
        assert_valid(masks, grid.num_tokens, grid.num_context(0.4))
        assert_full_rectangles(masks.targets, size[1])


@pytest.mark.parametrize("size", [(14, 14), (16, 16), (8, 24)], ids=str)
def test_without_a_ratio_about_nine_draws_in_ten_leave_the_context_free(size):
    num_context, draw = BlockGeometry(grid=PatchGrid(1, *size), ratio=None).num_context(), random.Random(5)
    free = [len(around - hidden) for _ in range(1500) for around, hidden in slow_draw(size, draw)]
    assert 0.87 < sum(count >= num_context for count in free) / len(free) < 0.95
    assert build("block", size, ratio=None)(4, seeded(0)).context.shape == (4, num_context)


@pytest.mark.parametrize(("values", "named"), [
    ({"ratio": 1.0}, "ratio=1.0"),
    ({"ratio": 0.0}, "ratio=0.0"),
    ({"ratio": 0.999}, "leaves no context"),
    ({"ratio": 0.1}, "no room for both"),
    ({"num_targets": 0}, "num_targets=0"),
    ({"target_scale": [0.2, 0.1]}, r"target_scale=\[0.2, 0.1\]"),
    ({"target_scale": [0.5, 1.5]}, "at most 1"),
    ({"target_scale": [0.9, 1.0], "ratio": None}, "leaves no context"),
    ({"target_aspect": 1.0}, "target_aspect=1.0"),
    ({"context_scale": [0.0, 1.0]}, "context_scale"),
])  # fmt: skip
def test_impossible_blocks_are_refused_with_value_and_bound(values, named):
    with pytest.raises(ValueError, match=named):
        build("block", (14, 14), **values)
    faults = mask_errors({**node("block"), **values}, PatchGrid(1, 14, 14))
    assert any(fault.startswith(key) for fault in faults for key in values)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.01, 0.99, "half"])
def test_a_random_mask_without_context_or_target_is_refused(ratio):
    with pytest.raises(ValueError, match=f"ratio={ratio}"):
        build("random", (4, 4), ratio=ratio)
    assert mask_errors({**node("random"), "ratio": ratio}, PatchGrid(1, 4, 4))


@pytest.mark.parametrize("ratio", [0.75, None])
def test_blocks_reach_through_all_steps_of_a_clip(ratio):
    grid = PatchGrid(4, 6, 6)
    masker = build("block", grid, ratio=ratio)
    for seed in range(3):
        masks = masker(8, seeded(seed))
        frames = masks.targets.unflatten(2, (grid.t, -1))
        assert_full_rectangles(frames[:, :, 0], grid.w)
        assert (frames - frames[:, :, :1] == 36 * torch.arange(grid.t).reshape(4, 1)).all()
        assert_valid(masks, grid.num_tokens, masker.num_context)


scales = st.tuples(st.floats(0.02, 1.0), st.floats(0.02, 1.0)).map(sorted)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    grid=st.builds(PatchGrid, st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
    ratio=st.one_of(st.none(), st.floats(0.05, 0.98)),
    num_targets=st.integers(1, 6),
    target_scale=scales,
    target_aspect=st.tuples(st.floats(0.2, 5.0), st.floats(0.2, 5.0)).map(sorted),
    context_scale=scales,
)
def test_configurations_that_pass_the_check_can_be_drawn(grid, **values):
    if mask_errors({**node("block"), **values}, grid):
        with pytest.raises(ValueError, match="="):
            BlockMasker(grid=grid, **values)
        return
    masker = BlockMasker(grid=grid, **values)
    for seed in range(3):
        masks = masker(9, seeded(seed))
        assert_valid(masks, grid.num_tokens, masker.num_context)
        assert_full_rectangles(masks.targets.unflatten(2, (grid.t, -1))[:, :, 0], grid.w)


@pytest.mark.slow
def test_the_check_needs_no_torch():
    code = "import sys, jepa.masks.geometry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_masker_in_contributing_returns_valid_masks(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n# checkerboard.py\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "checkerboard.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    masker = factory({"_target_": "checkerboard.CheckerboardMasker"})(grid=PatchGrid(1, 4, 6))
    masks = masker(3, seeded(0))
    assert_valid(masks, num_tokens=24, num_context=12)
    assert masks.targets.shape == (3, 1, 12)
