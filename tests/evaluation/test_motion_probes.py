"""Evaluation of clips: quantities, tokens, still clips, imbalanced classes, rows of frames."""

import logging
import signal

import numpy as np
import pytest
import torch
from checked import checked
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score
from torch import nn
from toy_model import CPU

from jepa.errors import Interrupted
from jepa.evaluation.attentive import AttentiveHead, AttentiveProbe, attend_once, num_heads
from jepa.evaluation.diagnostics import Diagnostics, frame_steps
from jepa.evaluation.knn import KNN
from jepa.evaluation.linear import LinearProbe
from jepa.evaluation.pictures import frame_indices, mask_overlay
from jepa.evaluation.probe import balanced, is_imbalanced
from jepa.evaluation.readout import coarse_grid, pool_tokens
from jepa.evaluation.regression import Regression, r2, ridge
from jepa.evaluation.snapshot import Snapshotter
from jepa.evaluation.splits import probe_splits
from jepa.evaluation.types import Features, Snapshot
from jepa.layers.attention import CrossAttentionBlock
from jepa.objectives.base import Objective
from jepa.parallel.session import Session
from jepa.parallel.signals import listen
from jepa.types import Field, Masks, MaskSets, PatchGrid, Sample

GRID = PatchGrid(4, 2, 2)
QUANTITIES = ("position/x", "position/y", "velocity/x")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def measured(num, *, noise=0.0, seed=0):
    """Features with quantities that are linear functions of them."""
    vectors = torch.randn(num, 6, generator=seeded(seed))
    targets = vectors @ torch.randn(6, 3, generator=seeded(99)) + noise * torch.randn(
        num, 3, generator=seeded(seed + 1)
    )
    return Features(vectors, torch.full((num,), -1), targets)


def snapshot_of(train, val, **changes):
    values = {
        "step": 0, "train": train, "val": val, "classes": (), "grid": GRID, "quantities": QUANTITIES,
        "pictures": torch.randint(0, 256, (5, 3, 8, 16, 16), generator=seeded(1), dtype=torch.uint8),
        "tokens": torch.randn(5, GRID.num_tokens, 6, generator=seeded(2)),
        "thumbnails": torch.zeros(len(val.labels), 3, 32, 32, dtype=torch.uint8),
        "masks": future_masks(20, GRID), "diagnosis": {},
    }  # fmt: skip
    return Snapshot(**(values | changes))


def future_masks(num, grid):
    """The first half of the time steps is the context, the next two steps are target blocks."""
    tokens = torch.arange(grid.num_tokens).expand(num, -1)
    step = grid.h * grid.w
    half = grid.t // 2 * step
    return Masks(tokens[:, :half], tokens[:, half : half + 2 * step].unflatten(1, (2, step)))


# regression


def test_ridge_equals_that_of_sklearn_at_the_same_l2():
    train, val = measured(80, noise=1.0), measured(30, noise=1.0, seed=5)
    mean, deviation = train.vectors.mean(0), train.vectors.std(0, correction=0)
    rows = [((part.vectors - mean) / deviation).numpy() for part in (train, val)]
    for l2, predicted in zip((1.0, 0.01), ridge(train, val, (1.0, 0.01)), strict=True):
        reference = Ridge(alpha=80 * l2).fit(rows[0], train.targets.numpy())
        np.testing.assert_allclose(predicted.numpy(), reference.predict(rows[1]), atol=1e-4)


def test_r2_is_the_mean_over_the_quantities_that_vary():
    predicted, targets = torch.randn(2, 20, 3, generator=seeded()).double()
    assert r2(predicted, targets) == pytest.approx(100 * r2_score(targets.numpy(), predicted.numpy()))
    constant = torch.ones(20, 1).double()
    padded = torch.cat([predicted, constant], 1), torch.cat([targets, constant], 1)
    assert r2(*padded) == pytest.approx(r2(predicted, targets))


def test_each_group_of_quantities_is_one_score():
    metrics = Regression()(snapshot_of(measured(200), measured(50, seed=5))).metrics
    assert set(metrics) == {"probe/position_r2", "probe/velocity_r2"}
    assert min(metrics.values()) > 99.9


def test_features_without_the_quantities_explain_nothing():
    train, val = (part._replace(vectors=torch.randn(part.vectors.shape, generator=seeded(9 + i))) for i, part in
                  enumerate((measured(200), measured(100, seed=5))))  # fmt: skip
    assert all(-20 < value < 10 for value in Regression()(snapshot_of(train, val)).metrics.values())


def test_a_regression_of_time_steps_reads_what_their_mean_forgets():
    """The quantity is that of one of four steps."""
    parts = []
    for num, seed in ((400, 0), (100, 5)):
        tokens = torch.randn(num, 4, 3, generator=seeded(seed))
        parts.append(
            Features(tokens.mean(1), torch.full((num,), -1), tokens[:, 1], readouts={"steps": tokens.flatten(1)})
        )
    read = {name: Regression(readout=name) for name in ("mean", "steps")}
    scores = {name: probe(snapshot_of(*parts)).metrics["probe/position_r2"] for name, probe in read.items()}
    assert scores["steps"] > 99
    assert scores["mean"] < 50
    assert "readout=steps" in read["steps"].protocol
    assert "readout" not in read["mean"].protocol


def test_samples_with_an_unknown_quantity_are_left_out_of_its_group():
    train, val = measured(200), measured(50, seed=5)
    train.targets[::3, 2] = float("nan")
    metrics = Regression()(snapshot_of(train, val)).metrics
    assert metrics["probe/velocity_r2"] > 99.9
    val.targets[:, 2] = float("nan")
    assert set(Regression()(snapshot_of(train, val)).metrics) == {"probe/position_r2"}


def test_without_quantities_regression_reports_and_logs_nothing(caplog):
    train, val = (Features(part.vectors, part.labels, torch.zeros(len(part.labels), 0)) for part in
                  (measured(30), measured(20)))  # fmt: skip
    with caplog.at_level(logging.INFO):
        assert Regression()(snapshot_of(train, val, quantities=())).metrics == {}
    assert not caplog.records


# attentive probe


def with_tokens(num, *, seed=0, classes=2):
    """One random token of each sample carries the class, all others are strong noise of either sign."""
    labels = torch.randint(classes, (num,), generator=seeded(seed))
    tokens = torch.randn(num, 8, 6, generator=seeded(seed + 1))
    tokens[..., 0] = 0
    tokens[..., 1] = 0
    position = torch.randint(8, (num,), generator=seeded(seed + 2))
    tokens[torch.arange(num), position, 0] = 4
    tokens[..., 1] = torch.randn(num, 8, generator=seeded(seed + 3)).sign() * 3
    tokens[torch.arange(num), position, 1] = 3.0 * (2 * labels - 1)
    return Features(tokens.mean(1), labels, torch.zeros(num, 0), tokens.half())


def test_attend_once_equals_the_cross_attention_layer():
    block = CrossAttentionBlock(width=12, num_heads=3, mlp_ratio=2.0)
    query, context = torch.randn(1, 1, 12, generator=seeded()), torch.randn(5, 7, 12, generator=seeded(1))
    nn.init.normal_(block.attn.kv.bias)
    torch.testing.assert_close(attend_once(block.attn, query, context), block.attn(query.expand(5, -1, -1), context))


def test_the_attentive_probe_uses_information_that_averaging_loses():
    snapshot = snapshot_of(with_tokens(300), with_tokens(200, seed=7))
    linear = LinearProbe()(snapshot).metrics["probe/linear_top1"]
    attentive = AttentiveProbe(epochs=12, batch_size=32, max_tokens=8)(snapshot).metrics["probe/attentive_top1"]
    assert attentive > 90 > 80 > linear


def test_the_attentive_probe_is_deterministic_and_restores_the_random_state():
    snapshot = snapshot_of(with_tokens(40), with_tokens(30, seed=7))
    before = torch.get_rng_state()
    probe = AttentiveProbe(epochs=1, batch_size=16, max_tokens=8)
    with torch.no_grad():
        assert probe(snapshot).metrics == probe(snapshot).metrics
    assert torch.equal(torch.get_rng_state(), before)


def test_the_attentive_probe_reports_and_logs_nothing_without_tokens(caplog):
    parts = [with_tokens(30)._replace(tokens=None) for _ in range(2)]
    assert AttentiveProbe(epochs=1, batch_size=8, max_tokens=8)(snapshot_of(*parts)).metrics == {}
    assert not caplog.records


def test_impossible_values_of_the_attentive_probe_are_refused_by_name():
    with pytest.raises(ValueError, match="epochs=0"):
        checked(AttentiveProbe, epochs=0, batch_size=8, max_tokens=8)


@pytest.mark.parametrize("width", [6, 96, 192, 200, 1024])
def test_heads_divide_the_width(width):
    assert width % num_heads(width) == 0
    AttentiveHead(tokens=torch.randn(3, 4, width), num_classes=2)


def test_pooled_tokens_are_means_of_neighbours_and_at_most_max_tokens():
    tokens = torch.randn(2, 32, 3, generator=seeded())  # 2 x 4 x 4
    pooled = pool_tokens(tokens, PatchGrid(2, 4, 4), 8)
    assert pooled.shape == (2, 8, 3)
    corner = tokens.unflatten(1, (2, 4, 4))[:, 1, 2:, 2:].mean((1, 2))
    torch.testing.assert_close(pooled[:, 7], corner)
    assert pool_tokens(tokens, PatchGrid(2, 4, 4), 32) is tokens


@pytest.mark.parametrize("most", [1, 7, 64, 5000])
@pytest.mark.parametrize("grid", [PatchGrid(8, 14, 14), PatchGrid(1, 3, 50), PatchGrid(64, 1, 1), PatchGrid(1, 1, 1)])
def test_a_coarse_grid_has_at_most_max_tokens(grid, most):
    t, h, w = coarse_grid(grid, most)
    assert 1 <= t * h * w <= most
    assert t <= grid.t
    assert h <= grid.h
    assert w <= grid.w


# imbalanced classes


def test_balanced_accuracy_equals_that_of_sklearn():
    labels = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 100, replacement=True, generator=seeded())
    predicted = torch.randint(3, (100,), generator=seeded(1))
    assert balanced(predicted, labels) == pytest.approx(100 * balanced_accuracy_score(labels, predicted))


@pytest.mark.parametrize(
    ("shares", "num", "expected"),
    [([1, 1, 1], 300, False), ([4, 1, 1], 300, True), ([1] * 100, 2000, False), ([6, 5, 4], 3000, False)],
)
def test_classes_are_imbalanced_if_the_largest_is_clearly_above_its_fair_share(shares, num, expected):
    labels = torch.multinomial(torch.tensor(shares).float(), num, replacement=True, generator=seeded())
    assert is_imbalanced(labels) == expected


def test_balanced_accuracy_is_reported_for_imbalanced_classes():
    vectors = torch.randn(200, 6, generator=seeded())
    probes = KNN(k=5, temperature=0.07), LinearProbe()
    for labels, extra in ((torch.arange(200) % 10 == 0, {"balanced"}), (torch.arange(200) % 2, set())):
        part = Features(vectors, labels.long())
        names = {name for probe in probes for name in probe(snapshot_of(part, part, quantities=())).metrics}
        assert {name.rpartition("_")[2] for name in names} == {"top1"} | extra


# snapshots of clips


class Clips:
    """Bright squares that move by 1 or 2 pixels a frame; the middle frame does not show their speed."""

    channels, classes, mean, std = 1, ("slow", "fast"), (0.5,), (0.25,)
    num_frames = 4
    fields = {"quantities": Field(shape=(2,), names=("position/x", "velocity/x"))}

    def __init__(self, num):
        self.num, self.num_read = num, 0

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        self.num_read += 1
        clip = torch.zeros(1, 4, 8, 16, dtype=torch.uint8)
        for frame in range(4):
            clip[0, frame, 2:5, 4 + index // 2 % 4 + (frame - 2) * (1 + index % 2) :][..., :3] = 255
        return Sample(clip, index % 2, {"quantities": torch.tensor([float(index // 2 % 4), 1.0 + index % 2])})

    def draw(self, index, seed):
        return self[index]

    def describe(self, index):
        return f"clip {index}"

    def validation(self):
        return None


class Plain:
    def pictures(self, clips):
        return torch.stack(list(clips))

    def normalise(self, pixels):
        return pixels / 255


class Frames(nn.Module):
    """Backbone with four tokens of 2 frames each, flattened; records the largest batch."""

    grid = PatchGrid(2, 1, 2)

    def __init__(self):
        super().__init__()
        self.largest = 0

    def grid_of(self, clips):
        return self.grid

    def forward(self, clips):
        self.largest = max(self.largest, len(clips))
        return clips[:, 0].unflatten(1, (2, 2)).unflatten(-1, (2, 8)).permute(0, 1, 4, 2, 3, 5).flatten(3).flatten(1, 2)


class Toy(Objective):
    def __init__(self):
        super().__init__()
        self.backbone = Frames()
        self.masks = []

    def diagnose(self, batch, masks):
        self.masks.append(masks)
        return {"error": torch.tensor(0.5), "copy_error": torch.tensor(2.0), "error_h2": torch.tensor(0.7)}


def two_sets(num, generator):
    tokens = torch.arange(4).expand(num, -1)
    return MaskSets([Masks(tokens[:, :2], tokens[:, None, 2:]), Masks(tokens[:, :1], tokens[:, None, 1:])])


def snapshotter_of(dataset, **changes):
    values = {
        "dataset": dataset, "transform": Plain(), "masker": two_sets, "session": CPU,
        "batch_size": 40, "train_samples": 40, "val_samples": 20, "seed": 0,
    }  # fmt: skip
    return Snapshotter(**(values | changes))


EVALUATORS = (KNN(k=3, temperature=0.07), LinearProbe(), Regression(), Diagnostics())


def test_clips_are_probed_as_they_are_and_with_their_middle_frame_repeated():
    snapshotter, objective = snapshotter_of(Clips(80)), Toy()
    snapshot = snapshotter.snapshot(0, objective)
    assert objective.backbone.largest == 10  # as many frames as 40 images
    first = snapshot.pictures[:1]
    still = first[:, :, 2:3].expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(snapshot.still[1].vectors[:1], objective.backbone(still.float() / 255).mean(1))
    metrics = {name: value for evaluator in EVALUATORS for name, value in evaluator(snapshot).metrics.items()}
    for kind in ("probe", "still"):
        assert {f"{kind}/knn_top1", f"{kind}/linear_top1", f"{kind}/position_r2", f"{kind}/velocity_r2"} <= set(metrics)
    assert metrics["probe/velocity_r2"] > 99
    assert metrics["still/velocity_r2"] < 10
    assert metrics["still/position_r2"] > 99
    assert snapshotter.num_samples == 2 * 60


def test_quantities_stay_with_their_samples():
    snapshotter = snapshotter_of(Clips(80))
    snapshot = snapshotter.snapshot(0, Toy())
    expected = torch.tensor([[i // 2 % 4, 1 + i % 2] for i in snapshotter.splits.val.indices]).float()
    assert torch.equal(snapshot.val.targets, expected)
    assert snapshot.quantities == Clips.fields["quantities"].names


def test_every_clip_is_attend_once_for_features_pictures_and_baselines():
    dataset = Clips(80)
    snapshotter = snapshotter_of(dataset)
    baselines = snapshotter.baselines(snapshotter.snapshot(0, Toy()), EVALUATORS)
    assert dataset.num_read == 60
    assert {"baseline/pixels_position_r2", "baseline/pixels_velocity_r2", "baseline/pixels_rank"} <= set(baselines)
    assert not any("still" in name or "_error" in name for name in baselines)


def test_the_still_clips_can_be_left_out():
    snapshotter = snapshotter_of(Clips(80), still=False)
    assert snapshotter.snapshot(0, Toy()).still is None
    assert snapshotter.num_samples == 60
    assert "still" not in snapshotter.protocol


def test_snapshots_have_tokens_only_if_an_evaluator_needs_them():
    probe = AttentiveProbe(epochs=1, batch_size=8, max_tokens=2)
    assert snapshotter_of(Clips(80)).snapshot(0, Toy()).train.tokens is None
    snapshot = snapshotter_of(Clips(80), evaluators=(*EVALUATORS, probe)).snapshot(0, Toy())
    assert snapshot.train.tokens.shape[:2] == (40, 2)
    assert snapshot.train.tokens.dtype == torch.float16
    torch.testing.assert_close(snapshot.train.tokens.float().mean(1), snapshot.train.vectors, atol=1e-3, rtol=0)
    assert set(probe(snapshot).metrics) == {"probe/attentive_top1", "still/attentive_top1"}


def test_snapshots_have_tokens_with_bfloat16_on_a_cpu_too():
    probe = AttentiveProbe(epochs=1, batch_size=8, max_tokens=2)
    session = Session(device=torch.device("cpu"), bf16=True)
    snapshot = snapshotter_of(Clips(80), evaluators=[probe], session=session).snapshot(0, Toy())
    assert snapshot.val.tokens.shape[:2] == (20, 2)


def test_every_mask_set_reaches_the_diagnosis():
    snapshotter, objective = snapshotter_of(Clips(80)), Toy()
    metrics = Diagnostics()(snapshotter.snapshot(0, objective)).metrics
    assert [len(masks.sets) for masks in objective.masks] == [2, 2]
    assert torch.equal(objective.masks[1].sets[1].context, snapshotter.masks.sets[1].context[10:20])
    assert metrics["predict/copy_gain"] == 0.75
    assert metrics["predict/error_h2"] == pytest.approx(0.7)


def test_an_evaluation_that_a_signal_interrupts_ends_at_once_and_can_be_repeated():
    class Stopping(Clips):
        def __getitem__(self, index):
            if self.num_read == 17:
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    dataset = Stopping(80)
    snapshotter = snapshotter_of(dataset)
    with listen() as interrupt, pytest.raises(Interrupted), interrupt.at_once():
        snapshotter.snapshot(0, Toy())
    assert (interrupt.signum, dataset.num_read) == (signal.SIGINT, 17)
    dataset.num_read = 18
    assert len(snapshotter.snapshot(0, Toy()).val.labels) == 20


def test_labelled_samples_come_first_in_both_parts():
    dataset = Clips(200)
    dataset.labels = np.where(np.arange(200) % 20 == 0, 1, -1)
    split = probe_splits(dataset, train_samples=15, val_samples=10, seed=0)
    labelled = [[dataset.labels[i] >= 0 for i in part.indices] for part in (split.train, split.val)]
    assert labelled == [[True] * 8 + [False] * 7, [True] * 2 + [False] * 8]
    assert not set(split.train.indices) & set(split.val.indices)


def test_splits_of_a_fully_labelled_data_set_are_those_without_labels():
    plain, labelled = Clips(50), Clips(50)
    labelled.labels = np.zeros(50)
    splits = [probe_splits(d, train_samples=20, val_samples=10, seed=0) for d in (plain, labelled)]
    assert splits[0].train.indices == splits[1].train.indices
    assert splits[0].val.indices == splits[1].val.indices


# rows of frames


@pytest.mark.parametrize("num_frames", [1, 4, 8, 10, 16, 64])
def test_frame_indices_are_few_distinct_and_evenly_spaced(num_frames):
    indices = frame_indices(num_frames)
    assert len(indices) == min(8, num_frames)
    assert indices == sorted(set(indices))
    assert indices[0] == num_frames - 1 - indices[-1] or num_frames > 8
    assert 0 <= indices[0] <= indices[-1] < num_frames


def test_each_frame_is_overlaid_with_the_masks_of_its_own_time_step():
    masks = future_masks(1, GRID)
    image = torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)
    overlays = [mask_overlay(image, masks.context, masks.targets, GRID, step) for step in range(4)]
    assert all((overlays[step] == 200).all() for step in (0, 1))
    assert overlays[2][0, 0, 0, 0] > overlays[2][0, 2, 0, 0]  # red, the first block
    assert overlays[3][0, 0, 0, 0] < overlays[3][0, 2, 0, 0]  # blue, the second


def test_each_frame_belongs_to_the_time_step_that_covers_it():
    snapshot = snapshot_of(measured(20), measured(20))
    assert frame_steps(snapshot) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("num_sets", [1, 2])
def test_clips_are_rows_of_frames_with_a_row_for_each_mask_set(num_sets):
    masks = future_masks(20, GRID)
    sets = masks if num_sets == 1 else MaskSets([masks, Masks(masks.context[:, :3], masks.targets)])
    evaluation = Diagnostics()(snapshot_of(measured(20), measured(20), masks=sets))
    pictures = {picture.name: picture for picture in evaluation.pictures}
    assert list(pictures) == ["masks", "features", "coverage"]
    assert pictures["masks"].pixels.shape == (4 * (1 + num_sets) * 100 + 4, 8 * 100 + 4, 3)
    assert pictures["features"].pixels.shape == (8 * 100 + 4, 8 * 100 + 4, 3)
    assert pictures["coverage"].pixels.shape == (2 * num_sets * 100 + 4, 4 * 100 + 4, 3)
    assert ("2 mask sets" in pictures["masks"].caption) == (num_sets == 2)
    assert all(picture.pixels.dtype == torch.uint8 for picture in evaluation.pictures)
