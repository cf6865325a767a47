"""The metric of a world finds the directions of its steps, counts them, and is blind to errors and to what stays."""

from __future__ import annotations

import torch
from tiny_world import PIXELS, make_world

from jepa.planning.costs import MetricDistance
from jepa.planning.heads import Recordings
from jepa.planning.metric import fit_metric
from jepa.planning.types import Imagined

COUNT, STEPS, SIZE = 80, 20, 8


def walks(scale: float = 1.0, history: int = 1) -> tuple[Recordings, torch.Tensor]:
    """Episodes that move in two of eight mixed directions, by steps of length 1, among large errors in the others."""
    random = torch.Generator().manual_seed(0)
    angles = 2 * torch.pi * torch.rand(COUNT, STEPS, generator=random)
    moves = torch.nn.functional.pad(torch.stack([angles.cos(), angles.sin()], dim=2), (0, SIZE - 2))
    places = torch.nn.functional.pad(moves.cumsum(dim=1), (0, 0, 1, 0))
    places = places + 10 * torch.randn(COUNT, 1, SIZE, generator=random)  # differs between episodes alone
    spread = torch.tensor([0.05, 0.05, *[2.0] * (SIZE - 2)])
    errors = spread * torch.randn(places.shape, generator=random)
    jitter = torch.nn.functional.pad(torch.randn(COUNT, STEPS + 1, SIZE - 2, generator=random), (2, 0))
    mixing = scale * torch.linalg.qr(torch.randn(SIZE, SIZE, generator=random)).Q
    states, predicted = ((part @ mixing).flatten(0, 1) for part in (places + jitter, places + jitter + errors))
    ends = (torch.arange(COUNT) * (STEPS + 1) + STEPS).repeat_interleave(STEPS + 1)
    none = torch.zeros(len(states))
    data = Recordings(
        states, ends, torch.zeros(len(states), 2), none, none, states, torch.zeros(0, 0), PIXELS, history, predicted
    )
    return data, mixing


def test_the_metric_counts_steps_in_their_directions_and_no_others() -> None:
    data, mixing = walks()
    metric, ratio = fit_metric(data)
    assert metric.size == 2
    assert ratio > 50
    moved = torch.tensor([[3.0, 4.0, *[0.0] * 6], [0.0, 0.0, *[5.0] * 6]]) @ mixing
    lengths = metric(moved).norm(dim=1)
    assert abs(lengths[0] - 5) < 0.3
    assert lengths[1] < 0.5


def test_the_scale_of_states_changes_no_distance() -> None:
    (one, _), (other, _) = walks(), walks(scale=100.0)
    places, scaled = (fit_metric(data)[0](data.states) for data in (one, other))
    lengths, others = ((part - part[:1]).norm(dim=1) for part in (places, scaled))
    torch.testing.assert_close(lengths, others, rtol=1e-3, atol=1e-3)


def test_frames_that_are_not_predicted_have_no_error() -> None:
    """The first ones of an episode are as they were seen, fewer than a history before them."""
    data, _ = walks(history=6)
    first = torch.searchsorted(data.ends, data.ends)
    early = torch.arange(len(data.states)) - first < 6
    assert data.predicted is not None
    copied = torch.where(early[:, None], data.states, data.predicted)
    broken = torch.where(early[:, None], torch.nan, data.predicted)
    expected, found = (fit_metric(data._replace(predicted=part))[0] for part in (copied, broken))
    assert torch.equal(found.directions, expected.directions)


def test_the_cost_is_the_distance_of_places_from_that_of_the_goal() -> None:
    world = make_world(side=16, heads={"metric": 3})
    states, goal = torch.randn(4, 5, 1, 6), torch.randn(1, 6)
    imagined = Imagined(states, torch.randn(2, 1, 6), goal, torch.zeros(4, 5, 2))
    away = ((states - goal) @ world.heads["metric"].directions).norm(dim=-1)[..., 0]
    torch.testing.assert_close(MetricDistance(over="last", weight=2.0)(world, imagined), 2 * away[:, -1])
    torch.testing.assert_close(MetricDistance()(world, imagined), away.sum(dim=1))
