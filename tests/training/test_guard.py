"""The guard against spikes of the loss: what it compares with, and for how long it remembers."""

import torch

from jepa.training.step import SpikeGuard


def accepts(guard: SpikeGuard, *losses: float) -> list[bool]:
    return [bool(guard(torch.tensor(loss))) for loss in losses]


def test_a_loss_that_never_changes_is_no_spike() -> None:
    assert all(accepts(SpikeGuard(num_std=3.0), *[0.5] * 700))


def test_a_step_is_refused_above_so_many_deviations_of_the_accepted_losses_and_not_below() -> None:
    losses = [1.0, 3.0] * 20
    limit = 2.0 + 2.5 * torch.tensor(losses).std().item()
    for loss, expected in ((limit - 0.01, True), (limit + 0.01, False), (-99.0, True)):
        guard = SpikeGuard(num_std=2.5)
        assert all(accepts(guard, *losses))
        assert accepts(guard, loss) == [expected]


def test_losses_of_more_than_300_steps_ago_are_forgotten() -> None:
    guard = SpikeGuard(num_std=3.0)
    accepts(guard, *[9.0, 11.0] * 150, *[-9.0, -11.0] * 150)
    assert accepts(guard, 0.0) == [False]
    assert accepts(guard, -10.0) == [True]


def test_the_first_thirty_losses_are_accepted_whatever_they_are() -> None:
    guard = SpikeGuard(num_std=1.0)
    assert all(accepts(guard, *[0.1, 0.2] * 14, 1.0, 1e6))
    assert accepts(guard, 1e9) == [False]
