"""One optimizer step: accumulation, clipping, the finite check and the loss-spike guard."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from jepa.optim import parameter_groups, set_schedule
from jepa.seeding import derive_seed, generator
from jepa.training.step import SpikeGuard, train_step
from jepa.types import Batch, LossOutput, Masks


class Regression(nn.Module):
    """A mean over the batch, as every objective's loss is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 1))

    def forward(self, batch, masks):
        flat = batch.clips.flatten(1)
        loss = (self.inner(flat) ** 2).mean()
        return LossOutput(loss, {"extra": loss.detach() * 2}, flat)


def batch_of(values):
    size = len(values)
    masks = Masks(torch.zeros(size, 1, dtype=torch.long), torch.ones(size, 1, 1, dtype=torch.long))
    return Batch(values.reshape(size, 1, 1, 2, 2), {"labels": torch.full((size,), -1)}), masks


def take(module, values, *, fused=True, micro=None, clip_grad=None, guard=None, lr=0.1):
    optimizer = torch.optim.AdamW(parameter_groups(module), lr=lr, fused=fused)
    return train_step(
        module,
        optimizer,
        *batch_of(values),
        micro_batch_size=micro or len(values),
        autocast=nullcontext,
        clip_grad=clip_grad,
        guard=guard,
        seed=0,
    )


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_accumulated_pieces_give_the_step_of_the_whole_batch():
    whole, pieces, values = Regression(), Regression(), torch.randn(8, 4)
    outputs = take(whole, values), take(pieces, values, micro=2)
    torch.testing.assert_close(weights(whole), weights(pieces))
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    torch.testing.assert_close(outputs[0].metrics, outputs[1].metrics)


def test_a_last_smaller_piece_counts_by_its_size():
    whole, pieces, values = Regression(), Regression(), torch.randn(7, 4)
    take(whole, values), take(pieces, values, micro=3)
    torch.testing.assert_close(weights(whole), weights(pieces))


@pytest.mark.parametrize("fused", [True, False])
def test_a_batch_that_is_not_finite_leaves_the_weights_alone(fused):
    module, values = Regression(), torch.randn(8, 4)
    before = weights(module)
    values[3, 2] = float("nan")
    output = take(module, values, fused=fused)
    assert output.skipped == 1
    assert torch.equal(weights(module), before)


def test_gradients_are_clipped_to_the_norm():
    module, free = Regression(), Regression()
    values = 100 * torch.randn(8, 4)
    optimizer = torch.optim.SGD(parameter_groups(module), lr=1.0)
    before = weights(module)
    output = train_step(
        module,
        optimizer,
        *batch_of(values),
        micro_batch_size=8,
        autocast=nullcontext,
        clip_grad=0.01,
        guard=None,
        seed=0,
    )
    assert output.grad_norm > 0.01
    assert (weights(module) - before).norm() == pytest.approx(0.01, rel=1e-3)
    assert output.grad_norm == pytest.approx(take(free, values).grad_norm.item())


def test_the_guard_refuses_a_spike_and_forgets_it():
    guard = SpikeGuard(num_std=3.0)
    noise = generator(0, 0, 0, "noise")
    accepted = [bool(guard(1 + 0.1 * torch.randn((), generator=noise))) for _ in range(100)]
    assert sum(accepted) > 95
    count = int(guard.count)
    assert not guard(torch.tensor(5.0))
    assert not guard(torch.tensor(float("nan")))
    assert int(guard.count) == count
    assert guard(torch.tensor(1.0))


def test_the_guard_is_silent_until_it_has_seen_enough():
    guard = SpikeGuard(num_std=1.0)
    assert all(bool(guard(torch.tensor(float(10**i)))) for i in range(20))


def test_a_refused_spike_leaves_the_weights_alone():
    module, guard = Regression(), SpikeGuard(num_std=2.0)
    for _ in range(40):
        guard(torch.tensor(1e-9) * (1 + torch.rand(())))
    before = weights(module)
    assert take(module, 100 * torch.randn(8, 4), guard=guard).skipped == 1
    assert torch.equal(weights(module), before)


def test_biases_norms_and_vectors_do_not_decay():
    module = Regression()
    optimizer = torch.optim.AdamW(parameter_groups(module), lr=0.1)
    set_schedule(optimizer, lr=0.5, weight_decay=0.3)
    matrices, vectors = optimizer.param_groups
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert matrices["lr"] == vectors["lr"] == 0.5


def test_frozen_parameters_are_not_optimised():
    module = Regression()
    module.inner[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(module)) == 4


def test_seeds_differ_in_every_argument_and_are_stable():
    keys = [(0, 0, 0, "masks"), (1, 0, 0, "masks"), (0, 1, 0, "masks"), (0, 0, 1, "masks"), (0, 0, 0, "augment")]
    assert len({derive_seed(*key) for key in keys}) == 5
    first, second = (torch.rand(3, generator=generator(7, 3, 1, "a")) for _ in range(2))
    assert torch.equal(first, second)
