"""Two ranks with half of the batch each give the value and the gradient of one process with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from jepa.parallel.collectives import mean_over_ranks, same_on_all_ranks, sum_over_ranks, world_size
from jepa.regularizers.cross_view import CrossView
from jepa.regularizers.sigreg import SIGReg
from jepa.regularizers.temporal_similarity import TemporalSimilarity
from jepa.regularizers.vicreg import VICReg
from jepa.types import Latents, Masks, PatchGrid

pytestmark = pytest.mark.slow

NAMES = ("vicreg", "vicreg-views", "sigreg", "temporal_similarity", "cross_view-crops", "cross_view-frames")
NUM_SAMPLES, WIDTH = 8, 4


class Embed(nn.Module):
    """A linear layer that makes all latents, and one regulariser."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)))
        self.regularizer = {
            "vicreg": VICReg(covariance=1.0),
            "vicreg-views": VICReg(invariance=1.0),
            "sigreg": SIGReg(num_slices=16),
            "temporal_similarity": TemporalSimilarity(),
            "cross_view-crops": CrossView(),
            "cross_view-frames": CrossView(between="frames"),
        }[name]
        self.views = 2 if name in ("vicreg-views", "cross_view-crops") else 1

    def forward(self, inputs: Tensor, tokens: Tensor) -> Tensor:
        context = self.linear(inputs)
        masks = Masks(tokens, tokens[:, None])
        return self.regularizer(Latents(context, context[:, None], masks, PatchGrid(3, 2, 2), self.views))[0]


def batch() -> tuple[Tensor, Tensor]:
    """[B, K, D] and [B, K]; the first samples have fewer time steps than the last, so the ranks' counts differ."""
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(NUM_SAMPLES, 4, WIDTH, generator=generator) * 0.4 + torch.arange(NUM_SAMPLES)[:, None, None] / 9
    )
    early = torch.tensor([0, 1, 2, 3]).expand(NUM_SAMPLES // 4, -1)
    rest = torch.rand(NUM_SAMPLES - len(early), 12, generator=generator).argsort(dim=1)[:, :4].sort().values
    return inputs, torch.cat([early, rest])


def penalty_and_gradient(module: nn.Module, inputs: Tensor, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Value of the penalty and its gradient with respect to the weight."""
    torch.manual_seed(seed)
    value = module(inputs, tokens)
    value.backward()
    (weight,) = module.parameters()
    assert weight.grad is not None
    return value.detach(), weight.grad


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    part = slice(rank * NUM_SAMPLES // 2, (rank + 1) * NUM_SAMPLES // 2)
    inputs, tokens = (tensor[part] for tensor in batch())
    results: dict[str, tuple] = {name: penalty_and_gradient(Embed(name), inputs, tokens, seed=rank) for name in NAMES}
    for _, gradient in results.values():  # like DDP, which takes longer to import than the test
        dist.all_reduce(gradient)
        gradient /= 2
    values = torch.tensor([1.0, 10.0]) * (rank + 1)
    values.requires_grad_()
    total = sum_over_ranks(values)
    (total * torch.tensor([1.0, rank])).sum().backward()
    results["collectives"] = (
        total.detach(),
        values.grad,
        mean_over_ranks(values).detach(),
        same_on_all_ranks(values),
        values.detach(),
    )
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(work, args=(str(folder),), nprocs=2, start_method="fork")  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_with_the_joined_batch(name: str, two_ranks: list[dict]) -> None:
    value, gradient = penalty_and_gradient(Embed(name), *batch(), seed=0)
    assert value > 0
    torch.testing.assert_close(torch.stack([results[name][0] for results in two_ranks]).mean(), value)
    for results in two_ranks:
        torch.testing.assert_close(results[name][1], gradient)


def test_collectives_and_their_gradients_sum_over_ranks(two_ranks: list[dict]) -> None:
    for rank, results in enumerate(two_ranks):
        total, gradient, mean, shared, values = results["collectives"]
        assert total.tolist() == [3.0, 30.0]
        assert gradient.tolist() == [2.0, 1.0]
        assert mean.tolist() == [1.5, 15.0]
        assert shared.tolist() == [1.0, 10.0]
        assert not shared.requires_grad
        assert values.tolist() == [1.0 + rank, 10.0 * (1 + rank)], "the input is unchanged"


def test_collectives_of_a_single_process_return_their_input() -> None:
    values = torch.randn(3, requires_grad=True)
    assert world_size() == 1
    assert sum_over_ranks(values) is values
    assert same_on_all_ranks(values) is values
    assert mean_over_ranks(values).equal(values)
