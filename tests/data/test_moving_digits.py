"""Moving digits: determinism, colours, and quantities that agree with the pixels."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from checked import checked
from torch import Tensor

from jepa.data.moving_digits import COOL, STROKES, WARM, MovingDigits, stamp, trajectories, write
from jepa.types import ClipDataset

SIDE = 32


def digits(num_frames: int = 8, **changes: Any) -> MovingDigits:
    return checked(MovingDigits, **{"num_frames": num_frames, "side": SIDE, **changes})


def boxes(frames: Tensor) -> Tensor:
    """bool [T, H, W] -> [T, 2, 2]: bounds of the non-zero columns and rows"""
    spans = []
    for frame in frames:
        lines = [frame.any(dim=axis).nonzero() for axis in (0, 1)]  # columns, rows
        spans.append(torch.tensor([[line.min(), line.max() + 1] for line in lines]))
    return torch.stack(spans)


def quantities(dataset: MovingDigits, index: int) -> Tensor:
    return dataset[index].fields["quantities"]


def test_it_is_a_data_set_of_clips_with_quantities() -> None:
    dataset = digits()
    assert isinstance(dataset, ClipDataset)
    assert quantities(dataset, 0).shape == (len(dataset.fields["quantities"].names),)
    assert dataset.fields["quantities"].names[:2] == ("position/x1", "position/y1")
    assert dataset.fields["quantities"].names[-1] == "velocity/y2"


@pytest.mark.parametrize(("frames", "side"), [(1, 16), (8, 32), (16, 100)])
def test_clips_have_the_configured_frames_and_side(frames: int, side: int) -> None:
    dataset = digits(frames, side=side)
    for clip, label, _ in (dataset[13], dataset.draw(13, 5)):
        assert clip.shape == (3, frames, side, side)
        assert clip.dtype == torch.uint8
        assert label == 3


def test_a_clip_is_pure_in_seed_and_index() -> None:
    first, second = digits(seed=3), digits(seed=3, num_samples=50)
    backwards = {index: second[index] for index in reversed(range(20))}
    for index in range(20):
        assert first[index][0].equal(backwards[index][0])
        assert first.draw(index, 7)[0].equal(second.draw(index, 7)[0])
        assert quantities(first, index).equal(quantities(second, index))
    assert not first[0][0].equal(digits(seed=4)[0][0])


def test_a_draw_moves_the_same_digits_differently() -> None:
    dataset = digits(1, side=64)
    for index in range(6):
        clips = [dataset[index][0], *(dataset.draw(index, seed)[0] for seed in (0, 1, 2**62))]
        assert len({clip.numpy().tobytes() for clip in clips}) == 4
        for channel in (0, 2):  # equal brightness except for subpixel shifts and overlaps
            strength = torch.tensor([clip[channel].float().sum() for clip in clips])
            assert strength.max() < 1.15 * strength.min()


def test_a_shorter_clip_is_the_beginning_of_a_longer_one() -> None:
    long, short = digits(16), digits(5)
    assert long[4][0][:, :5].equal(short[4][0])
    assert long.draw(4, 9)[0][:, :5].equal(short.draw(4, 9)[0])


def test_the_side_changes_the_resolution_and_nothing_else() -> None:
    fine, coarse = digits(4, side=128), digits(4)
    for index in range(5):
        reduced = torch.nn.functional.avg_pool2d(fine[index][0].float(), 4)
        assert (reduced - coarse[index][0]).abs().mean() < 2
        torch.testing.assert_close(quantities(fine, index), quantities(coarse, index), atol=1e-6, rtol=0)


def test_the_first_digit_is_warm_and_the_second_cool() -> None:
    (red, _, warm_blue), (cool_red, _, blue) = WARM, COOL
    assert warm_blue[1] < blue[0]
    assert cool_red[1] < red[0]
    for index in range(20):
        clip = digits()[index].clip
        assert red[0] <= clip[0].max() <= red[1]
        assert blue[0] <= clip[2].max() <= blue[1]


def test_the_digits_alternate() -> None:
    dataset = digits(1, side=16)
    assert torch.bincount(torch.tensor([dataset[index][1] for index in range(50)])).tolist() == [5] * 10
    assert "3, clip 13 of the training" in dataset.describe(13)
    assert len(dataset.classes) == len(STROKES) == 10


def test_the_held_out_part_shows_other_clips() -> None:
    dataset = digits(2, num_samples=200, val_samples=100, side=16)
    held_out = dataset.validation()
    assert held_out is not None
    assert held_out.validation() is None
    assert (len(held_out), held_out.classes, held_out.num_frames) == (100, dataset.classes, 2)
    training = {dataset[index][0].numpy().tobytes() for index in range(200)}
    validation = {held_out[index][0].numpy().tobytes() for index in range(100)}
    assert len(training | validation) == 300
    assert not quantities(held_out, 0).equal(quantities(dataset, 0))


def test_positions_and_velocities_are_those_of_the_pixels_in_the_last_frame() -> None:
    """Channels tell the digits apart; a digit at 0 touches the left or upper wall, at 1 the right or lower one."""
    side, frames = 128, 6
    dataset = digits(frames, side=side, speed=(0.03, 0.04))
    for index in range(30):
        clip, values = (
            dataset[index][0],
            quantities(dataset, index).unflatten(0, (2, 2, 2)),
        )  # kind, digit, axis
        for digit, channel in ((0, 0), (1, 2)):
            spans = boxes(clip[channel] > 100).double()  # [T, axis, edge]
            width = spans[..., 1] - spans[..., 0]
            position = spans[-1, :, 0] / (side - width[-1])
            assert (position - values[0, digit]).abs().max() < 0.03
            centre = spans.mean(dim=-1) / side  # [T, axis]
            step = centre[-1] - centre[-2]
            speed = values[1, digit]
            straight = (step - speed).abs() < 0.012  # in picture sides; an edge is known to about a pixel
            bounced = step.abs() < speed.abs() + 0.012
            at_wall = torch.minimum(values[0, digit], 1 - values[0, digit]) < 0.09
            assert (straight | (at_wall & bounced)).all()


def test_digits_reflect_at_the_walls() -> None:
    rng = np.random.default_rng(0)
    pair = (write(3, 64, WARM, rng), write(8, 64, COOL, rng))
    position, velocity = trajectories(pair, 200, (0.1, 0.3), rng)
    free = np.stack([glyph.free for glyph in pair])
    assert position.min() >= 0
    assert position.max() <= 1
    assert position.min() < 0.02
    assert position.max() > 0.98
    np.testing.assert_allclose(np.abs(velocity), np.abs(velocity[:1]).repeat(200, axis=0))
    steps, straight = np.diff(position, axis=0) * free, (velocity[1:] == velocity[:-1])
    np.testing.assert_allclose(steps[straight], velocity[1:][straight], atol=1e-9)
    assert 0.1 < (~straight).mean() < 0.9


def test_at_the_default_speed_a_digit_covers_half_of_its_range_in_sixteen_frames() -> None:
    dataset = digits(16)
    distances = []
    for index in range(200):
        velocity = quantities(dataset, index).unflatten(0, (2, 2, 2))[1].abs()
        free = torch.from_numpy(np.stack([glyph.free for glyph in dataset._glyphs(index)]))
        distances.append((velocity / free * 15).mean())
    assert 1 / 3 < torch.stack(distances).mean() < 2 / 3


@pytest.mark.parametrize("digit", range(10))
def test_a_digit_fills_its_bounding_box_at_any_position(digit: int) -> None:
    for seed in range(3):
        glyph = write(digit, 64, WARM, np.random.default_rng(seed))
        canvas = np.zeros((3, 2, 90, 90), dtype=np.uint8)
        centres = np.array([[40.0, 45.0], [44.37, 40.81]])
        stamp(canvas, glyph, centres)
        for frame, centre in zip(torch.from_numpy(canvas[0]) > 100, centres, strict=True):
            (span,) = boxes(frame[None]).double().numpy()
            half = (1 - glyph.free) * 64 / 2
            assert np.abs(span[:, 0] - (centre - half)).max() < 1
            assert np.abs(span[:, 1] - (centre + half)).max() < 1


def test_a_shift_by_whole_pixels_shows_the_same_digit_and_a_smaller_one_keeps_its_ink() -> None:
    glyph = write(5, 48, COOL, np.random.default_rng(0))
    canvas = np.zeros((3, 6, 48, 48), dtype=np.uint8)
    stamp(canvas, glyph, np.array([[20.3, 20.6], [23.3, 22.6], [20.5, 20.5], [20.8, 20.0], [20.1, 20.9], [20, 20]]))
    assert (canvas[:, 0, :40, :40] == canvas[:, 1, 2:42, 3:43]).all()
    ink = canvas[2].sum(axis=(1, 2), dtype=float)
    assert ink.max() < 1.05 * ink.min()


def test_the_ten_digits_look_different() -> None:
    pictures = []
    for digit in range(10):
        canvas = np.zeros((3, 1, 64, 64), dtype=np.uint8)
        stamp(canvas, write(digit, 64, WARM, np.random.default_rng(1)), np.array([[32.0, 32.0]]))
        pictures.append(canvas[0, 0].astype(float) / 255)
    for number, picture in enumerate(pictures):
        for other in pictures[number + 1 :]:
            assert np.minimum(picture, other).sum() < 0.85 * np.maximum(picture, other).sum()


def test_strokes_stay_in_their_box_and_have_no_empty_segment() -> None:
    for strokes in STROKES:
        points = np.concatenate(strokes)
        assert np.abs(points[:, 0]).max() <= 0.65
        assert np.abs(points[:, 1]).max() <= 1
        assert all(np.hypot(*(b - a)) > 0 for stroke in strokes for a, b in pairwise(stroke))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "num_frames=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"val_samples": 0}, "val_samples=0"),
        ({"side": 8}, "side=8: must be from 16 to 1024"),
        ({"speed": (0.3, 0.1)}, r"speed=\[0.3,0.1\]: must be two numbers, the smaller first"),
        ({"speed": (0.1, 0.6)}, "from 0 to 0.5"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_sizes_are_refused_by_value_and_bound(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits(**changes)


def test_an_index_beyond_the_end_is_refused() -> None:
    for read in (digits(num_samples=10).__getitem__, partial(digits(num_samples=10).draw, seed=0)):
        with pytest.raises(IndexError, match="index 10 of 10"):
            read(10)
