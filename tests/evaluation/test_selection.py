"""Criteria without labels against closed forms and an independent formula; the selection metric."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from checked import checked
from toy_model import CPU, Crop, Images, Toy, random_masker

from jepa.data.transforms import Augment
from jepa.evaluation.selection import DELTA, Selection, lidar, power_law, spectrum
from jepa.evaluation.snapshot import Snapshotter
from jepa.reports.verdict import last_selection_value, selection_metric

SIZES = {"num_views": 3, "num_viewed": 10, "view_scale": (0.3, 1.0)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def crops(**changes):
    values = {"crop_scale": (1.0, 1.0), "crop_aspect": (1.0, 1.0), "flip": True}
    return Augment(image_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, **(values | changes))


def snapshotter_of(dataset, **changes):
    values = {
        "dataset": dataset, "transform": Crop(), "masker": random_masker, "session": CPU, "batch_size": 8,
        "train_samples": 30, "val_samples": 12, "seed": 0, "evaluators": [Selection(**SIZES)], "crops": crops,
    }  # fmt: skip
    return Snapshotter(**(values | changes))


# LiDAR


def test_lidar_equals_an_independent_formula():
    views = torch.randn(20, 5, 6, generator=seeded()) + 2 * torch.randn(20, 1, 6, generator=seeded(1))
    x = views.double().numpy()
    means = x.mean(1)
    between = np.cov(means.T, bias=True)
    within = np.mean([np.cov(image.T, bias=True) for image in x], axis=0) + DELTA * np.eye(6)
    values = np.linalg.eigvals(np.linalg.solve(within, between)).real
    shares = values / values.sum()
    assert lidar(views) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_lidar_counts_the_directions_that_separate_images():
    for num in (1, 3):
        corners = torch.cat([torch.eye(8)[:num], -torch.eye(8)[:num]])  # [2 num, 8]
        noise = 0.1 * torch.cat([torch.eye(8), -torch.eye(8)])  # the same in every direction
        assert lidar(corners[:, None] + noise) == pytest.approx(num, rel=1e-6)


def test_lidar_is_low_if_crops_vary_most_along_the_directions_that_separate_images():
    strong, weak = torch.zeros(50, 4, 2), torch.zeros(50, 4, 2)
    strong[:], weak[:] = torch.randn(50, 1, 2, generator=seeded()), torch.randn(50, 1, 2, generator=seeded())
    strong += 0.01 * torch.randn(50, 4, 2, generator=seeded(1))
    weak += torch.randn(50, 4, 2, generator=seeded(1)) * torch.tensor([0.01, 10.0])
    assert lidar(strong) > 1.7
    assert lidar(weak) < 1.1


def test_lidar_of_equal_crops_is_the_rank_of_the_images_and_of_equal_images_one():
    images = torch.cat([torch.eye(5), -torch.eye(5)])
    assert lidar(images[:, None].expand(10, 3, 5)) == pytest.approx(5)
    assert lidar(torch.ones(10, 3, 5)) == 1.0


def test_lidar_is_invariant_to_rotation_and_shift():
    views = torch.randn(30, 4, 5, generator=seeded()).double()
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=seeded(1)).double())[0]
    assert lidar(views @ rotation + 3) == pytest.approx(lidar(views), rel=1e-6)


# alpha


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_power_law_recovers_the_exponent(alpha):
    values = torch.arange(1, 201).double() ** -alpha
    assert power_law(values) == pytest.approx(alpha, rel=1e-6)
    values[:3] *= 10  # the first directions do not count
    assert power_law(values) == pytest.approx(alpha, rel=1e-6)


def test_the_spectrum_is_that_of_the_covariance():
    vectors = torch.randn(50, 6, generator=seeded()) * torch.arange(1, 7) + 5
    expected = np.linalg.eigvalsh(np.cov(vectors.double().numpy().T, bias=True))[::-1]
    np.testing.assert_allclose(spectrum(vectors).numpy(), expected, rtol=1e-6)
    assert len(spectrum(vectors[:4])) == 3


def test_too_few_eigenvalues_have_no_exponent():
    assert power_law(torch.tensor([1.0, 0.5, 0.0, 0.0])) is None
    assert power_law(torch.zeros(50)) is None


# the evaluator


def test_crops_are_the_same_at_each_evaluation_and_depend_on_the_seed():
    snapshotter, objective = snapshotter_of(Images(50)), Toy()
    first, second = (snapshotter.snapshot(step, objective).views for step in (0, 9))
    assert first.shape == (10, 3, 8)
    assert torch.equal(first, second)
    assert not torch.equal(first, snapshotter_of(Images(50), seed=1).snapshot(0, objective).views)
    assert not torch.equal(first[:, 0], first[:, 1])


def test_crops_change_nothing_else_of_a_snapshot():
    objective = Toy()
    plain = snapshotter_of(Images(50), evaluators=[]).snapshot(0, objective)
    with_views = snapshotter_of(Images(50)).snapshot(0, objective)
    assert plain.views is None
    assert torch.equal(plain.val.vectors, with_views.val.vectors)
    assert torch.equal(plain.masks.context, with_views.masks.context)
    assert plain.diagnosis == with_views.diagnosis


def test_both_criteria_are_reported_and_only_for_features():
    evaluator = Selection(**SIZES)
    snapshot = snapshotter_of(Images(50)).snapshot(0, Toy())
    wide = replace(snapshot, val=snapshot.val._replace(vectors=torch.randn(60, 40, generator=seeded())))
    assert set(evaluator(wide).metrics) == {"select/lidar", "select/alpha"}
    assert evaluator(replace(wide, views=None)).metrics == {}
    assert len(evaluator.protocol) > 40


@pytest.mark.parametrize(
    ("change", "message"), [({"num_views": 1}, "num_views=1"), ({"view_scale": (0.0, 1.0)}, "view_")]
)
def test_impossible_values_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        checked(Selection, **(SIZES | change))


# the selection metric


def test_the_selection_metric_is_the_configured_one_or_the_first_known():
    names = ["predict/gain", "probe/knn_top1", "select/lidar"]
    assert selection_metric(names, None) == "probe/knn_top1"
    assert selection_metric(names, "select/*") == "select/lidar"
    assert selection_metric(names, "probe/linear_top1") is None
    assert selection_metric(["train/loss"], None) is None


def test_a_sweep_gets_the_last_value_of_the_trained_encoder():
    rows = [{"step": 0, "probe/knn_top1": 9.0, "select/lidar": 1.0}, {"step": 5, "probe/knn_top1": 7.0}, {"step": 6}]
    assert last_selection_value(rows, None) == 7.0
    assert last_selection_value(rows, "select/lidar") is None
    assert last_selection_value([], None) is None


@pytest.mark.slow
def test_best_follows_the_configured_metric_and_an_unknown_one_is_warned_of_once(tmp_path, caplog):
    from tiny_agent import agent

    options = ["steps=6", "eval_every=2", "save_every=2", "evaluator=[knn,selection]"]
    chosen = agent(tmp_path / "chosen", *options, "evaluation.judge=select/lidar")
    chosen.train()
    state = json.loads((tmp_path / "chosen/checkpoints/last/state.json").read_text())
    assert state["best"]["metric"] == "select/lidar"
    with caplog.at_level(logging.WARNING):
        agent(tmp_path / "other", *options, "evaluation.judge=probe/nothing").train()
    messages = [record.getMessage() for record in caplog.records if "judge" in record.getMessage()]
    assert len(messages) == 1
    assert "select/lidar" in messages[0]
