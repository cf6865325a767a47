"""The regularisers against independent formulas, closed forms and symmetries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from checked import checked
from torch import Tensor, nn

from jepa.regularizers.cross_view import CrossView
from jepa.regularizers.sigreg import SIGReg
from jepa.regularizers.temporal_similarity import TemporalSimilarity
from jepa.regularizers.vicreg import VICReg
from jepa.types import Latents, Masks, PatchGrid

GRID = PatchGrid(3, 2, 2)
Formula = Callable[[np.ndarray, np.ndarray], float]
"""(tokens [B, n, D], time step of each [B, n]) -> penalty, in float64"""


def latents(num_samples: int = 8, width: int = 3, views: int = 1, seed: int = 0) -> Latents:
    """Latents with five context tokens and two blocks of two target tokens per sample, anywhere in GRID."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_samples, GRID.num_tokens, generator=generator).argsort(dim=1)
    masks = Masks(order[:, :5].sort().values, order[:, 5:9].unflatten(1, (2, 2)).sort().values)
    mixed = torch.randn(num_samples, 9, width, generator=generator) @ torch.randn(width, width, generator=generator)
    mixed = mixed * torch.linspace(0.3, 1.5, width) + 1
    return Latents(mixed[:, :5], mixed[:, 5:].unflatten(1, (2, 2)), masks, GRID, views)


def pooled(embeddings: Tensor, views: int = 1) -> Latents:
    """[B, D] -> latents of one token with these embeddings"""
    tokens = torch.zeros(len(embeddings), 1, dtype=torch.long)
    masks = Masks(tokens, tokens[:, None])
    return Latents(embeddings[:, None], embeddings[:, None, None], masks, PatchGrid(1, 1, 1), views)


def pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i)]


def vicreg(views: int, variance: float, covariance: float, invariance: float) -> Formula:
    def formula(tokens: np.ndarray, _: np.ndarray) -> float:
        crops = tokens.mean(axis=1).reshape(-1, views, tokens.shape[-1])
        total = 0.0
        for view in range(views):
            matrix = np.cov(crops[:, view], rowvar=False, ddof=1)
            width = len(matrix)
            hinge = np.mean([max(0.0, 1 - np.sqrt(matrix[d, d] + 1e-4)) for d in range(width)])
            cross = sum(matrix[i, j] ** 2 for i in range(width) for j in range(width) if i != j) / width
            total += (variance * hinge + covariance * cross) / views
        if invariance:
            total += invariance * np.mean([(crops[:, i] - crops[:, j]) ** 2 for i, j in pairs(views)])
        return float(total)

    return formula


def sigreg(views: int, num_slices: int, weight: float) -> Formula:
    def formula(tokens: np.ndarray, _: np.ndarray) -> float:
        torch.manual_seed(3)
        directions = torch.randn(num_slices, tokens.shape[-1]).double().numpy()
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        crops = tokens.mean(axis=1).reshape(-1, views, tokens.shape[-1])
        t = np.linspace(-3, 3, 33)
        distances = []
        for view in range(views):
            for direction in directions:
                empirical = np.exp(1j * t * (crops[:, view] @ direction)[:, None]).mean(axis=0)
                distance = np.abs(empirical - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
                distances.append(((distance[1:] + distance[:-1]) / 2 * np.diff(t)).sum())
        return float(weight * np.mean(distances))

    return formula


def by_step(tokens: np.ndarray, steps: np.ndarray) -> list[dict[int, np.ndarray]]:
    """The mean token of each time step, for each sample."""
    return [{t: x[of == t].mean(axis=0) for t in set(of.tolist())} for x, of in zip(tokens, steps, strict=True)]


def temporal_similarity(weight: float) -> Formula:
    def formula(tokens: np.ndarray, steps: np.ndarray) -> float:
        means = by_step(tokens, steps)
        squares = [((mean[t + 1] - mean[t]) ** 2).mean() for mean in means for t in mean if t + 1 in mean]
        return float(weight * np.mean(squares))

    return formula


def cross_frames(weight: float) -> Formula:
    def formula(tokens: np.ndarray, steps: np.ndarray) -> float:
        squares = []
        for means in by_step(tokens, steps):
            centre = np.mean(list(means.values()), axis=0)
            squares += [((mean - centre) ** 2).mean() for mean in means.values()] if len(means) > 1 else []
        return float(weight * np.mean(squares))

    return formula


def cross_crops(views: int, weight: float) -> Formula:
    def formula(tokens: np.ndarray, _: np.ndarray) -> float:
        crops = tokens.mean(axis=1).reshape(-1, views, tokens.shape[-1])
        centre = crops.mean(axis=1, keepdims=True)
        return float(weight * ((crops - centre) ** 2).mean(axis=2).mean(axis=1).mean())

    return formula


CASES: dict[str, tuple[int, nn.Module, Formula]] = {
    "vicreg": (1, VICReg(), vicreg(1, 1.0, 0.04, 0.0)),
    "vicreg-paper": (1, VICReg(variance=25.0, covariance=1.0), vicreg(1, 25.0, 1.0, 0.0)),
    "vicreg-variance": (1, VICReg(covariance=0.0), vicreg(1, 1.0, 0.0, 0.0)),
    "vicreg-two-views": (2, VICReg(invariance=1.0), vicreg(2, 1.0, 0.04, 1.0)),
    "vicreg-four-views": (4, VICReg(variance=0.0, invariance=2.0), vicreg(4, 0.0, 0.04, 2.0)),
    "sigreg": (1, SIGReg(num_slices=5), sigreg(1, 5, 1.0)),
    "sigreg-two-views": (2, SIGReg(num_slices=3, weight=0.3), sigreg(2, 3, 0.3)),
    "temporal_similarity": (1, TemporalSimilarity(weight=2.0), temporal_similarity(2.0)),
    "cross_view-frames": (1, CrossView(between="frames", weight=0.5), cross_frames(0.5)),
    "cross_view-two-crops": (2, CrossView(), cross_crops(2, 1.0)),
    "cross_view-four-crops": (4, CrossView(weight=3.0), cross_crops(4, 3.0)),
}


def numeric_gradient(formula: Formula, tokens: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Central differences."""
    gradient = np.zeros_like(tokens)
    for index in np.ndindex(*tokens.shape):
        step = np.zeros_like(tokens)
        step[index] = 1e-6
        gradient[index] = (formula(tokens + step, steps) - formula(tokens - step, steps)) / 2e-6
    return gradient


@pytest.mark.parametrize("of", ["context", "predicted"])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_equal_an_independent_formula(case: str, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    views, regularizer, formula = CASES[case]
    inputs = latents(views=views)
    monkeypatch.setattr(regularizer, "of", of)
    compared = getattr(inputs, of).requires_grad_()
    torch.manual_seed(3)
    penalty, _ = regularizer(inputs)
    penalty.backward()
    tokens = compared.detach().double().reshape(8, -1, 3).numpy()
    steps = (inputs.masks.context if of == "context" else inputs.masks.targets.flatten(1)).numpy() // 4
    assert penalty.item() == pytest.approx(formula(tokens, steps), rel=1e-5)
    expected = numeric_gradient(formula, tokens, steps).reshape(compared.shape)
    np.testing.assert_allclose(compared.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_autocast_does_not_change_the_penalty(case: str) -> None:
    views, regularizer, _ = CASES[case]
    inputs = latents(views=views)
    torch.manual_seed(3)
    expected, _ = regularizer(inputs)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        penalty, _ = regularizer(inputs)
    assert penalty.dtype == torch.float32
    assert penalty.equal(expected)


@pytest.mark.parametrize("case", CASES)
def test_terms_are_detached_float32_scalars(case: str) -> None:
    views, regularizer, _ = CASES[case]
    inputs = latents(views=views)
    inputs.context.requires_grad_()
    inputs.predicted.requires_grad_()
    _, terms = regularizer(inputs)
    assert terms
    assert not any(term.requires_grad for term in terms.values())
    assert all(term.dtype == torch.float32 and term.ndim == 0 for term in terms.values())


@pytest.mark.parametrize("case", CASES)
def test_a_regularizer_adds_nothing_to_the_checkpoint(case: str) -> None:
    assert not CASES[case][1].state_dict()


def test_spread_and_uncorrelated_embeddings_have_no_penalty() -> None:
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    loss, terms = VICReg()(pooled(2 * signs))
    assert loss == terms["variance"] == terms["covariance"] == 0


def test_collapsed_embeddings_have_a_variance_term_of_almost_one_and_no_covariance_term() -> None:
    _, terms = VICReg()(pooled(torch.ones(4, 3)))
    assert terms["variance"].item() == pytest.approx(1 - 1e-2)
    assert terms["covariance"] == 0


@pytest.mark.parametrize("width", [2, 3, 8])
def test_the_covariance_term_of_equal_dimensions_is_their_squared_variance_per_other_dimension(width: int) -> None:
    column = torch.randn(16, 1, generator=torch.Generator().manual_seed(0))
    _, terms = VICReg()(pooled(column.expand(-1, width)))
    assert terms["covariance"].item() == pytest.approx((width - 1) * column.var().item() ** 2, rel=1e-5)


def test_vicreg_ignores_a_shift_the_order_of_samples_the_order_and_the_sign_of_dimensions() -> None:
    x, regularizer = latents(width=5).context.mean(dim=1), VICReg()
    expected, _ = regularizer(pooled(x))
    for same in (x + torch.arange(5.0), x.flip(0), x.flip(1), x * torch.tensor([1.0, -1, 1, -1, 1])):
        torch.testing.assert_close(regularizer(pooled(same))[0], expected)


def test_equal_views_have_no_invariance_term_and_the_other_terms_of_one_view() -> None:
    x = latents().context.mean(dim=1)
    twice = pooled(x.repeat_interleave(2, dim=0), views=2)
    loss, terms = VICReg(invariance=1.0)(twice)
    assert terms["invariance"] == CrossView()(twice)[0] == 0
    torch.testing.assert_close(loss, VICReg()(pooled(x))[0])


def test_sigreg_of_a_standard_normal_falls_with_the_number_of_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (64, 512):
        clouds = [torch.randn(count, 4, generator=generator) for _ in range(40)]
        costs = torch.stack([SIGReg(num_slices=64)(pooled(cloud))[0] for cloud in clouds])
        assert costs.mean().item() == pytest.approx(1.06 / count, rel=0.1)


def test_sigreg_of_a_point_and_of_an_unbounded_cloud_are_known() -> None:
    point, _ = SIGReg()(pooled(torch.zeros(4, 3)))
    assert point.item() == pytest.approx((2 * np.pi) ** 0.5 * (1 - 2**0.5 + 3**-0.5), abs=0.01)
    spread, _ = SIGReg()(pooled(1e3 * torch.randn(4096, 3, generator=torch.Generator().manual_seed(0))))
    assert spread.item() == pytest.approx(1.26, abs=0.02)


@pytest.mark.parametrize("change", ["shift", "scale", "stretch", "two clouds"])
def test_sigreg_is_larger_for_any_other_cloud_than_for_the_standard_normal(change: str) -> None:
    cloud = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    changed = {
        "shift": cloud + torch.tensor([1.0, 0, 0, 0]),
        "scale": 0.5 * cloud,
        "stretch": cloud * torch.tensor([2.0, 1, 1, 1]),
        "two clouds": 0.3 * cloud + cloud.sign() * 0.95,
    }
    assert SIGReg()(pooled(changed[change]))[0] > 4 * SIGReg()(pooled(cloud))[0]


def test_gradient_descent_on_sigreg_makes_a_cloud_standard_normal() -> None:
    torch.manual_seed(0)
    cloud = (0.2 * torch.randn(256, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.4]]) + 1).requires_grad_()
    optimizer, regularizer = torch.optim.Adam([cloud], lr=0.05), SIGReg(num_slices=32)
    for _ in range(200):
        optimizer.zero_grad()
        regularizer(pooled(cloud))[0].backward()
        optimizer.step()
    torch.testing.assert_close(cloud.detach().T.cov(), torch.eye(2), atol=0.15, rtol=0)
    assert cloud.detach().mean(dim=0).abs().max() < 0.1


def test_sigreg_does_not_scale_with_the_batch_size() -> None:
    cloud = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) * 2
    costs = []
    for repeats in (1, 4):
        torch.manual_seed(0)
        costs.append(SIGReg()(pooled(cloud.repeat(repeats, 1)))[0])
    torch.testing.assert_close(*costs)


def test_each_call_draws_new_directions_from_the_global_generator() -> None:
    inputs, regularizer = latents(), SIGReg(num_slices=4)
    torch.manual_seed(0)
    first, second = regularizer(inputs)[0], regularizer(inputs)[0]
    torch.manual_seed(0)
    assert first.equal(regularizer(inputs)[0])
    assert not first.equal(second)


def test_constant_clips_have_no_penalty_and_samples_without_a_pair_do_not_count() -> None:
    constant = Latents(
        torch.ones(2, 6, 3) * torch.tensor([1.0, 5.0])[:, None, None],
        torch.zeros(2, 1, 1, 3),
        Masks(torch.tensor([[0, 1, 4, 5, 8, 9], [0, 1, 2, 3, 8, 9]]), torch.tensor([[[11]], [[11]]])),
        GRID,
        1,
    )
    assert TemporalSimilarity()(constant)[0] == CrossView(between="frames")(constant)[0] == 0
    moved = constant._replace(context=constant.context + torch.tensor([0.0, 1.0])[:, None, None] * torch.randn(6, 3))
    assert TemporalSimilarity()(moved)[0] == 0, "the second sample has only steps 0 and 2"
    assert CrossView(between="frames")(moved)[0] > 0


@pytest.mark.parametrize("regularizer", [TemporalSimilarity(), CrossView(between="frames")])
def test_images_have_no_penalty_between_time_steps(regularizer: nn.Module) -> None:
    penalty: Tensor = regularizer(pooled(torch.randn(4, 3).requires_grad_()))[0]
    assert penalty == 0
    penalty.backward()


@pytest.mark.parametrize("build", [VICReg, SIGReg, TemporalSimilarity, CrossView])
def test_refuses_unknown_latents(build: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="of=target: no such of; valid: context, predicted"):
        checked(build, of="target")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: checked(VICReg, covariance=-1), "covariance=-1"),
        (lambda: checked(VICReg, invariance=-1), "invariance=-1"),
        (lambda: checked(SIGReg, weight=-1), "SIGReg: weight=-1"),
        (lambda: checked(SIGReg, num_slices=0), "num_slices=0"),
        (lambda: checked(TemporalSimilarity, weight=-1), "TemporalSimilarity: weight=-1"),
        (lambda: checked(CrossView, weight=-1), "CrossView: weight=-1"),
        (lambda: checked(CrossView, between="clips"), "between=clips: no such between"),
    ],
)
def test_refuses_impossible_settings_by_key_and_value(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_refuses_batches_without_anything_to_compare() -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        VICReg()(pooled(torch.zeros(1, 3)))
    for regularizer in (VICReg(invariance=1.0), CrossView()):
        with pytest.raises(ValueError, match=r"augment\.views to 2 or more"):
            regularizer(pooled(torch.zeros(4, 3)))
