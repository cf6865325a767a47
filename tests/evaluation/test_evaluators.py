"""Probes, diagnostics and pictures against closed forms and independent references."""

import logging
import math

import numpy as np
import pytest
import torch
from checked import checked
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from synthetic_features import GRID, clusters, masks_of, seeded, snapshot_of
from torch.nn import functional as F

from jepa.evaluation.diagnostics import Diagnostics, collapse, coverage, effective_rank, mean_cosine
from jepa.evaluation.embeddings import Embeddings
from jepa.evaluation.knn import KNN, knn_votes
from jepa.evaluation.linear import L2_GRID, LinearProbe, fit_logistic, in_row_space, select_l2
from jepa.evaluation.pictures import mask_overlay, montage, principal_colours, to_rgb
from jepa.evaluation.probe import nearest, standardise
from jepa.evaluation.types import Features
from jepa.types import Masks, PatchGrid

# kNN


def test_knn_equals_an_independent_weighted_vote():
    train, val = clusters(200, spread=2.0), clusters(60, spread=2.0, seed=5)
    reference = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07), algorithm="brute"
    ).fit(train.vectors.numpy(), train.labels.numpy())
    votes = knn_votes(val.vectors, train.vectors, train.labels, num_classes=3, k=20, temperature=0.07)
    np.testing.assert_allclose(votes.numpy(), reference.predict_proba(val.vectors.numpy()), atol=1e-4)
    expected = 100 * (reference.predict(val.vectors.numpy()) == val.labels.numpy()).mean()
    measured = KNN(k=20, temperature=0.07)(snapshot_of(train, val)).metrics["probe/knn_top1"]
    assert measured == pytest.approx(expected)


def test_knn_does_not_depend_on_the_norm_of_a_vector():
    train, val = clusters(100), clusters(40, seed=5)
    scaled = Features(train.vectors * torch.rand(100, 1, generator=seeded()).add(0.1), train.labels)
    knn = KNN(k=5, temperature=0.07)
    assert knn(snapshot_of(train, val)).metrics == knn(snapshot_of(scaled, val)).metrics


def test_knn_uses_all_samples_when_there_are_fewer_than_k():
    train, val = clusters(6, spread=0.01, classes=2), clusters(10, spread=0.01, classes=2, seed=5)
    assert KNN(k=20, temperature=0.07)(snapshot_of(train, val)).metrics["probe/knn_top1"] == 100


@pytest.mark.parametrize(("k", "temperature", "message"), [(0, 0.07, "k=0"), (5, 0.0, "temperature=0.0")])
def test_knn_refuses_impossible_values_by_name(k, temperature, message):
    with pytest.raises(ValueError, match=message):
        checked(KNN, k=k, temperature=temperature)


# linear probe


@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_the_linear_probe_equals_logistic_regression_of_sklearn_at_the_same_l2(l2):
    train = clusters(300, spread=2.0)
    vectors = train.vectors.double()
    model = fit_logistic(vectors, train.labels, num_classes=3, l2=l2, max_iterations=1000, tolerance=1e-9)
    reference = LogisticRegression(C=1 / (300 * l2), tol=1e-10, max_iter=10000).fit(
        vectors.numpy(), train.labels.numpy()
    )
    np.testing.assert_allclose(model.weight.numpy(), reference.coef_, atol=1e-5)
    centred = model.bias - model.bias.mean()
    np.testing.assert_allclose(centred.numpy(), reference.intercept_ - reference.intercept_.mean(), atol=1e-5)


def test_the_linear_probe_scores_like_sklearn_at_the_chosen_l2():
    train, val = clusters(600, dim=16, spread=1.5), clusters(300, dim=16, spread=1.5, seed=5)
    measured = LinearProbe()(snapshot_of(train, val)).metrics["probe/linear_top1"]
    train, val = standardise(train, val)
    l2, _ = select_l2(train, num_classes=3)
    reference = LogisticRegression(C=1 / (600 * l2), max_iter=10000).fit(train.vectors.numpy(), train.labels.numpy())
    assert measured == pytest.approx(100 * reference.score(val.vectors.numpy(), val.labels.numpy()), abs=0.5)


def test_the_linear_probe_of_more_dimensions_than_samples_scores_like_sklearn():
    """Alike dimensions make the curvature so large that rounding once left it indefinite."""
    base, widen = clusters(220, dim=16, spread=1.5), torch.randn(16, 4000, generator=seeded(1)) + 3
    train, val = (Features(base.vectors[rows] @ widen, base.labels[rows]) for rows in (slice(0, 150), slice(150, 220)))
    measured = LinearProbe()(snapshot_of(train, val)).metrics["probe/linear_top1"]
    l2, _ = select_l2(in_row_space(*standardise(train, val))[0], num_classes=3)
    scaled = standardise(train, val)
    reference = LogisticRegression(C=1 / (150 * l2), max_iter=10000).fit(
        scaled[0].vectors.numpy(), train.labels.numpy()
    )
    assert measured == pytest.approx(100 * reference.score(scaled[1].vectors.numpy(), val.labels.numpy()), abs=1.5)
    assert measured > 60


def test_logistic_regression_stands_alike_dimensions():
    train = clusters(150, dim=16)
    vectors = train.vectors @ (torch.randn(16, 4000, generator=seeded(1)) + 3)
    model = fit_logistic(vectors, train.labels, num_classes=3, l2=1e-6)
    assert model.weight.isfinite().all()


def test_the_l2_weight_is_chosen_without_the_validation_samples():
    train, val = clusters(100), clusters(50, seed=5)
    chosen = [select_l2(standardise(train, v)[0], num_classes=3)[0] for v in (val, clusters(9, seed=8))]
    assert chosen[0] == chosen[1]
    assert chosen[0] in L2_GRID


def test_the_linear_probe_does_not_depend_on_shift_or_scale_of_a_dimension():
    train, val = clusters(200, spread=2.0), clusters(100, spread=2.0, seed=5)
    factor, shift = torch.logspace(-2, 2, 8), torch.linspace(-5, 5, 8)
    transformed = [Features(part.vectors * factor + shift, part.labels) for part in (train, val)]
    probe = LinearProbe()
    before, after = (probe(snapshot_of(*parts)).metrics["probe/linear_top1"] for parts in ((train, val), transformed))
    assert before == pytest.approx(after, abs=1.01)


def test_a_constant_dimension_changes_nothing():
    train, val = clusters(90), clusters(60, seed=5)
    padded = [Features(F.pad(part.vectors, (0, 1), value=3.0), part.labels) for part in (train, val)]
    assert LinearProbe()(snapshot_of(*padded)).metrics == LinearProbe()(snapshot_of(train, val)).metrics


# labels that are missing


@pytest.mark.parametrize("label", [-1, 2])
@pytest.mark.parametrize("probe", [KNN(k=5, temperature=0.07), LinearProbe()], ids=["knn", "linear"])
def test_without_two_classes_a_probe_is_skipped_with_one_warning(probe, label, caplog):
    parts = [Features(torch.randn(20, 8, generator=seeded()), torch.full((20,), label)) for _ in range(2)]
    probe = type(probe)(**({"k": 5, "temperature": 0.07} if isinstance(probe, KNN) else {}))
    with caplog.at_level(logging.WARNING):
        assert [probe(snapshot_of(*parts)).metrics for _ in range(3)] == [{}, {}, {}]
    assert [("no labels" if label < 0 else "one class") in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("make", [lambda: KNN(k=5, temperature=0.07), LinearProbe], ids=["knn", "linear"])
def test_samples_without_a_label_change_nothing(make):
    train, val = clusters(60, spread=2.0), clusters(40, spread=2.0, seed=5)
    padded = [
        Features(torch.cat([p.vectors, torch.zeros(7, 8)]), F.pad(p.labels, (0, 7), value=-1)) for p in (train, val)
    ]
    assert make()(snapshot_of(*padded)).metrics == make()(snapshot_of(train, val)).metrics


def test_diagnostics_and_embeddings_need_no_labels():
    parts = [Features(torch.randn(20, 8, generator=seeded()), torch.full((20,), -1)) for _ in range(2)]
    assert "collapse/rank" in Diagnostics()(snapshot_of(*parts)).metrics
    evaluation = Embeddings(rows=5)(snapshot_of(*parts))
    assert evaluation.tables[0].labels == [""] * 5
    assert evaluation.pictures[0].name == "neighbours"


# collapse


def test_the_rank_of_one_repeated_vector_is_one():
    values = collapse(torch.randn(1, 16, generator=seeded()).repeat(50, 1))
    assert values["collapse/rank"] == pytest.approx(1.0, abs=1e-3)
    assert values["collapse/std"] == pytest.approx(0.0, abs=1e-7)
    assert values["collapse/cosine"] == pytest.approx(1.0, abs=1e-6)


def test_the_centred_rank_of_one_exactly_repeated_vector_is_one():
    assert collapse(torch.ones(50, 16))["collapse/rank_centred"] == 1.0


def test_the_rank_of_orthogonal_directions_is_their_number():
    basis = torch.linalg.qr(torch.randn(16, 16, generator=seeded())).Q
    assert effective_rank(basis) == pytest.approx(16)
    assert effective_rank(torch.cat([basis[:5]] * 3)) == pytest.approx(5, abs=1e-3)


def test_the_rank_follows_the_formula_on_known_singular_values():
    left = torch.linalg.qr(torch.randn(40, 4, generator=seeded()).double()).Q
    right = torch.linalg.qr(torch.randn(6, 4, generator=seeded(1)).double()).Q
    p = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    expected = math.exp(-sum(x * math.log(x) for x in p.tolist()))
    assert effective_rank(left @ (7 * p).diag() @ right.T) == pytest.approx(expected, rel=1e-4)


def test_a_far_mean_lowers_the_raw_rank_and_not_the_centred_one():
    cloud = torch.randn(400, 16, generator=seeded())
    near, far = collapse(cloud), collapse(cloud + 1000)
    assert near["collapse/rank"] == pytest.approx(16, abs=0.5)
    assert far["collapse/rank"] < 1.1
    assert far["collapse/rank_centred"] == pytest.approx(near["collapse/rank_centred"], rel=1e-3)


def test_the_mean_cosine_is_that_of_the_pairs():
    vectors = torch.randn(12, 5, generator=seeded()) + 0.5
    pairs = [F.cosine_similarity(vectors[i], vectors[j], dim=0) for i in range(12) for j in range(12) if i != j]
    assert mean_cosine(vectors) == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)


def test_std_and_norm_are_those_of_the_dimensions_and_samples():
    values = collapse(torch.tensor([[3.0, 4.0], [-3.0, 4.0]]))
    assert values["collapse/std"] == pytest.approx(1.5)
    assert values["collapse/std_min"] == 0
    assert values["collapse/norm"] == pytest.approx(5)


# prediction and masks


def test_the_gain_is_one_minus_the_error_over_that_of_the_trivial_predictor():
    metrics = Diagnostics()(snapshot_of(clusters(30), clusters(20))).metrics
    assert metrics["predict/error"] == 0.25
    assert metrics["predict/gain"] == 0.75
    assert "predict/gain" not in Diagnostics()(snapshot_of(clusters(30), clusters(20), diagnosis={})).metrics


def test_coverage_is_the_share_of_samples_in_which_a_token_is_context_or_target():
    context = torch.tensor([[0, 1], [0, 2]])
    targets = torch.tensor([[[4, 5], [5, 6]], [[5, 6], [6, 7]]])
    context_share, target_share = coverage(Masks(context, targets), GRID)
    assert context_share.tolist() == [1.0, 0.5, 0.5] + [0.0] * 13
    assert target_share.tolist() == [0.0] * 4 + [0.5, 1.0, 1.0, 0.5] + [0.0] * 8
    metrics = Diagnostics()(snapshot_of(clusters(30), clusters(20), masks=masks_of(500))).metrics
    assert metrics["mask/context_tokens"] == 4
    assert 0.15 < metrics["mask/coverage_context_min"] <= 0.25 <= metrics["mask/coverage_context_max"] < 0.35
    assert 0.27 < metrics["mask/coverage_target_min"] <= 0.375 <= metrics["mask/coverage_target_max"] < 0.48


# pictures and tables


def test_an_overlay_keeps_the_context_tints_targets_and_darkens_the_rest():
    image = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    overlay = mask_overlay(image, torch.tensor([[0]]), torch.tensor([[[3], [15]]]), GRID)
    assert overlay.dtype == torch.uint8
    assert (overlay[0, :, :2, :2] == 200).all()
    assert (overlay[0, :, 2:4, 2:4] == 40).all()
    first, second = overlay[0, :, 0, 7], overlay[0, :, 7, 7]
    assert first[0] > first[2]
    assert second[2] > second[0]


def test_equal_tokens_have_equal_colours_and_different_ones_differ():
    tokens = torch.randn(2, 1, 8, generator=seeded()).repeat_interleave(8, 1)  # [2, 8, 8]
    tokens = torch.cat([tokens, tokens.flip(0)], dim=1)
    colours, shares = principal_colours(tokens, GRID)
    assert colours.shape == (2, 3, 1, 4, 4)
    colours = colours[:, :, 0]
    assert (colours[0, :, :2] == colours[0, :, :1, :1]).all()
    assert (colours[0, :, 0, 0] == colours[1, :, 3, 3]).all()
    assert (colours[0, 0, 0, 0].int() - colours[0, 0, 3, 3].int()).abs() == 255
    assert shares[0] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_becomes_rgb(channels):
    images = torch.randint(0, 256, (2, channels, 4, 4), generator=seeded(), dtype=torch.uint8)
    rgb = to_rgb(images)
    assert rgb.shape == (2, 3, 4, 4)
    assert (rgb[:, : min(channels, 3)] == images[:, :3]).all()


def test_tiles_of_a_montage_are_the_images():
    tiles = torch.randint(0, 255, (2, 3, 5, 6), generator=seeded(), dtype=torch.uint8)
    sheet = montage([tiles, tiles[:1]])
    assert sheet.shape == (2 * (5 + 4) + 4, 2 * (6 + 4) + 4, 3)
    assert (sheet[4:9, 14:20] == tiles[1].permute(1, 2, 0)).all()
    assert (sheet[13:18, 4:10] == tiles[0].permute(1, 2, 0)).all()
    assert (sheet[13:, 14:] == 255).all()


@pytest.mark.parametrize("grid", [GRID, PatchGrid(1, 2, 5), PatchGrid(2, 4, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_picture_is_rgb_and_large_enough_to_read(grid, channels):
    shape = (5, channels, grid.t, 2 * grid.h, 2 * grid.w)
    pictures = torch.randint(0, 256, shape, generator=seeded(), dtype=torch.uint8)
    snapshot = snapshot_of(
        clusters(30), clusters(20), grid=grid, pictures=pictures,
        tokens=torch.randn(5, grid.num_tokens, 8, generator=seeded()), masks=masks_of(32, grid=PatchGrid(1, 2, 5)),
    )  # fmt: skip
    drawn = [*Diagnostics()(snapshot).pictures, *Embeddings(rows=10)(snapshot).pictures]
    assert [picture.name for picture in drawn] == ["masks", "features", "coverage", "neighbours"]
    for picture in drawn:
        assert picture.pixels.dtype == torch.uint8
        assert picture.pixels.shape[2] == 3
        assert min(picture.pixels.shape[:2]) >= 96
        assert picture.caption


def test_the_neighbours_are_the_most_similar_others():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 3.0], [-1.0, 0.0]])
    assert nearest(vectors[:2], vectors, 2, exclude_self=True)[0].tolist() == [[2, 3], [3, 2]]


def test_the_embedding_table_has_the_configured_rows_with_names_and_thumbnails():
    val = clusters(20)
    table = Embeddings(rows=7)(snapshot_of(clusters(30), val)).tables[0]
    assert table.vectors.shape == (7, 8)
    assert table.thumbnails.shape == (7, 3, 32, 32)
    assert table.labels == [("ant", "bee", "cat")[label] for label in val.labels[:7]]
